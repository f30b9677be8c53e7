//! What makes two checkpoints the same for a cache: see [`super::Checkpoint::fingerprint`], which says what is hashed.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::source::Source;
use super::{BaseFiles, CheckpointError, Expert, Experts, LlamaConfig};

/// Files up to this size are hashed whole, larger ones up to here and in samples.
const WHOLE_BYTES: usize = 1 << 20;
/// Pages sampled of what follows.
const SAMPLES: usize = 64;
/// Bytes of a page.
const PAGE_BYTES: usize = 4096;

/// The fingerprint, in hex.
///
/// # Errors
/// [`CheckpointError`] when a file of the base cannot be opened again.
pub(super) fn of(
    config: &LlamaConfig,
    base: &BaseFiles,
    experts: Option<&Experts>,
) -> Result<String, CheckpointError> {
    let mut hash = Sha256::new();
    put(&mut hash, b"midpo fingerprint 1");
    put(&mut hash, format!("{config:?}").as_bytes());
    for name in &base.weights {
        let bytes = base.source.open(name)?;
        put(&mut hash, name.as_bytes());
        sample(&mut hash, bytes.as_slice());
    }
    if let Some(experts) = experts {
        put_expert(&mut hash, &experts.safety);
        put_expert(&mut hash, &experts.helpfulness);
        for layer in &experts.router {
            for gate in [&layer.safety, &layer.helpfulness] {
                put_numbers(&mut hash, &gate.weight);
                put_numbers(&mut hash, &[gate.bias]);
            }
        }
    }
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of a whole file, in hex.
///
/// # Errors
/// [`CheckpointError`] when it cannot be opened.
pub(super) fn of_file(source: &Source, name: &str) -> Result<(u64, String), CheckpointError> {
    let bytes = source.open(name)?;
    let hash = Sha256::digest(bytes.as_slice());
    Ok((bytes.as_slice().len() as u64, hex(&hash)))
}

/// As [`of_file`], for a file on disk.
pub(super) fn of_path(file: &Path) -> Result<(u64, String), CheckpointError> {
    let bytes = super::mmap::map(file)?;
    Ok((bytes.len() as u64, hex(&Sha256::digest(&bytes[..]))))
}

/// With its length, so that two parts cannot trade bytes.
fn put(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn sample(hash: &mut Sha256, bytes: &[u8]) {
    let (whole, rest) = bytes.split_at(bytes.len().min(WHOLE_BYTES));
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(whole);
    let last = rest.len().saturating_sub(PAGE_BYTES);
    for index in 0..=SAMPLES {
        // Evenly from the first page of the rest to the last; in a short rest they overlap, which costs nothing.
        let start = last / SAMPLES * index;
        let start = if index == SAMPLES { last } else { start };
        let page = rest.get(start..).unwrap_or_default();
        hash.update(page.get(..PAGE_BYTES).unwrap_or(page));
    }
}

fn put_expert(hash: &mut Sha256, expert: &Expert) {
    put(hash, &(expert.rank as u64).to_le_bytes());
    put_numbers(hash, &[expert.scale]);
    for layer in &expert.layers {
        put_numbers(hash, &layer.lora_a);
        put_numbers(hash, &layer.lora_b);
    }
}

fn put_numbers(hash: &mut Sha256, numbers: &[f32]) {
    put(hash, bytemuck::cast_slice(numbers));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
