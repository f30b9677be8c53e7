//! `router.pth`: `torch.save`'s zip of one pickle and a record for each storage. Records are stored as they are, so a tensor is a
//! range of the file: nothing is unpacked, and nothing reserved by what a header claims.

use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use zip::read::{ArchiveOffset, Config, ZipArchive};

use super::CheckpointError;
use super::limits::{PICKLE_BYTES_MAX, RECORDS_MAX, ROUTER_TENSORS_MAX};
use super::pickle::{self, Pickle, Storage, StorageType, TensorView, Value};
use super::source::FileBytes;
use super::tensor::HostTensor;
use super::tensor_file::{TensorFile, owned};
use crate::dtype::DType;

const PICKLE: &str = "data.pkl";
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";
/// First bytes of a pickle, which is what torch before 1.6 saved.
const LEGACY_MAGIC: &[u8] = b"\x80\x02";

/// Whether a file is to be read as `torch.save`'s, by its content or else its name.
pub(crate) fn is_torch(name: &str, bytes: &[u8]) -> bool {
    bytes.starts_with(ZIP_MAGIC)
        || [".pth", ".pt", ".bin"]
            .iter()
            .any(|ending| name.ends_with(ending))
}

/// Reads a dict of state dicts; names are joined with a dot.
///
/// # Errors
/// [`CheckpointError::Malformed`] for container and pickle, [`CheckpointError::Tensor`] for a tensor that does not fit its record.
pub(crate) fn read(file: &Path, bytes: &FileBytes) -> Result<TensorFile, CheckpointError> {
    let malformed = |reason: String| CheckpointError::malformed(file, reason);
    let content = bytes.as_slice();
    if content.starts_with(LEGACY_MAGIC) {
        let reason = "expected torch.save's zip, found the format of torch before 1.6: load it and save it again";
        return Err(malformed(reason.to_owned()));
    }
    let records = Records::read(content).map_err(malformed)?;
    let pickle = records
        .bytes(content, PICKLE)
        .ok_or_else(|| malformed(format!("expected a record {PICKLE}, found none")))?;
    if pickle.len() as u64 > PICKLE_BYTES_MAX {
        let (found, most) = (pickle.len(), PICKLE_BYTES_MAX);
        return Err(malformed(format!(
            "expected a pickle of at most {most} bytes, found {found}"
        )));
    }
    if let Some(order) = records.bytes(content, "byteorder")
        && order != b"little"
    {
        return Err(malformed("expected little-endian numbers".to_owned()));
    }
    let pickle = pickle::read(pickle).map_err(malformed)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in views(&pickle).map_err(malformed)? {
        let tensor = tensor(&pickle, view, &records, bytes)
            .map_err(|reason| CheckpointError::tensor(file, &name, reason))?;
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(CheckpointError::tensor(
                file,
                &name,
                "expected once, found twice",
            ));
        }
    }
    Ok(TensorFile::from_tensors(file, tensors))
}

/// The tensors of a dict of dicts, in order. Two levels and no more, so a pickle that nests or repeats itself costs nothing.
fn views<'p>(pickle: &'p Pickle<'_>) -> Result<Vec<(String, &'p TensorView)>, String> {
    let Value::Dict(gates) = pickle.root() else {
        return Err("expected a dict of state dicts, found something else".to_owned());
    };
    let mut views = Vec::new();
    for (gate, state) in gates {
        let (Value::Str(gate), Value::Dict(state)) = (pickle.value(*gate), pickle.value(*state))
        else {
            return Err("expected a dict of state dicts by name, found another entry".to_owned());
        };
        let gate = pickle.text(gate);
        for (key, tensor) in state {
            let (Value::Str(key), Value::Tensor(view)) =
                (pickle.value(*key), pickle.value(*tensor))
            else {
                return Err(format!(
                    "expected tensors by name in `{gate}`, found another entry"
                ));
            };
            if views.len() >= ROUTER_TENSORS_MAX {
                return Err(format!(
                    "expected at most {ROUTER_TENSORS_MAX} tensors, found more"
                ));
            }
            views.push((joined(gate, pickle.text(key))?, view.as_ref()));
        }
    }
    Ok(views)
}

/// `layer_0_alpha.linear_0.weight`; a longer name is no name of ours, and would be copied for every entry that repeats it.
fn joined(gate: &str, key: &str) -> Result<String, String> {
    const NAME_BYTES_MAX: usize = 256;
    if gate.len() + key.len() > NAME_BYTES_MAX {
        return Err(format!(
            "expected names of at most {NAME_BYTES_MAX} bytes, found a longer one"
        ));
    }
    Ok(format!("{gate}.{key}"))
}

/// Checks what the pickle claims of a tensor against the record that holds it.
fn tensor(
    pickle: &Pickle<'_>,
    view: &TensorView,
    records: &Records,
    bytes: &FileBytes,
) -> Result<HostTensor, String> {
    let Value::Storage(storage) = pickle.value(view.storage) else {
        return Err("expected a storage".to_owned());
    };
    let record = record(pickle, storage, records)?;
    let shape = sizes(&view.shape).ok_or_else(|| {
        format!(
            "expected a shape without negative axes, found {:?}",
            view.shape
        )
    })?;
    check_contiguous(&shape, &view.strides)?;
    let element_bytes = storage.storage_type.element_bytes();
    let range = byte_range(&shape, view.offset, element_bytes)
        .map(|within| {
            record.start.saturating_add(within.start)..record.start.saturating_add(within.end)
        })
        .filter(|range| range.end <= record.end)
        .ok_or_else(|| {
            format!(
                "expected shape {shape:?} at element {} to fit its record of {} bytes",
                view.offset,
                record.len()
            )
        })?;
    let part = bytes
        .part(range)
        .ok_or("expected a record within the file")?;
    let fits = |dtype, part| {
        HostTensor::new(shape.clone(), dtype, part)
            .ok_or_else(|| "expected bytes as its shape says".to_owned())
    };
    match storage.storage_type {
        StorageType::Plain(dtype) => fits(dtype, part),
        StorageType::Double => {
            let doubles = part.as_slice().as_chunks::<8>().0;
            let singles = doubles
                .iter()
                .flat_map(|double| (f64::from_le_bytes(*double) as f32).to_le_bytes());
            fits(DType::F32, owned(singles.collect()))
        }
    }
}

/// The record of a storage, which must hold exactly the elements claimed.
fn record(
    pickle: &Pickle<'_>,
    storage: &Storage,
    records: &Records,
) -> Result<Range<usize>, String> {
    let key = pickle.text(&storage.key);
    let record = records.range(&format!("data/{key}")).ok_or_else(|| {
        format!(
            "expected a record data/{}, found none",
            key.escape_default()
        )
    })?;
    let claimed = usize::try_from(storage.elements)
        .ok()
        .and_then(|elements| elements.checked_mul(storage.storage_type.element_bytes()));
    if claimed != Some(record.len()) {
        return Err(format!(
            "expected a storage of {} elements of {} bytes, found a record of {} bytes",
            storage.elements,
            storage.storage_type.element_bytes(),
            record.len()
        ));
    }
    Ok(record)
}

fn sizes(axes: &[i64]) -> Option<Vec<usize>> {
    axes.iter()
        .map(|axis| usize::try_from(*axis).ok())
        .collect()
}

/// Row-major without gaps; the stride of an axis of one element does not matter.
fn check_contiguous(shape: &[usize], strides: &[i64]) -> Result<(), String> {
    let mut expected = Some(1usize);
    let mut contiguous = shape.len() == strides.len();
    for (axis, stride) in shape.iter().zip(strides).rev() {
        contiguous &= *axis <= 1 || usize::try_from(*stride).ok() == expected;
        expected = expected.and_then(|stride| stride.checked_mul(*axis));
    }
    if contiguous {
        Ok(())
    } else {
        Err(format!(
            "expected a contiguous tensor, found shape {shape:?} with strides {strides:?}"
        ))
    }
}

fn byte_range(shape: &[usize], offset: i64, element_bytes: usize) -> Option<Range<usize>> {
    let elements = shape
        .iter()
        .try_fold(1usize, |product, axis| product.checked_mul(*axis))?;
    let start = usize::try_from(offset).ok()?.checked_mul(element_bytes)?;
    let end = start.checked_add(elements.checked_mul(element_bytes)?)?;
    Some(start..end)
}

/// Where the records of an archive are, by their names below the archive's one folder.
struct Records(HashMap<String, Range<usize>>);

impl Records {
    /// Reads the archive's directory, and every record once to compare its checksum.
    fn read(content: &[u8]) -> Result<Self, String> {
        let config = Config {
            archive_offset: ArchiveOffset::Known(0),
        };
        let no_zip = |error: zip::result::ZipError| format!("expected torch.save's zip: {error}");
        let mut archive = ZipArchive::with_config(config, Cursor::new(content)).map_err(no_zip)?;
        if archive.len() > RECORDS_MAX {
            return Err(format!(
                "expected at most {RECORDS_MAX} records, found {}",
                archive.len()
            ));
        }
        if archive.has_duplicate_names() {
            return Err("expected records with different names".to_owned());
        }
        let folder = folder(&archive)?;
        let mut records = HashMap::new();
        let mut total = 0usize;
        for index in 0..archive.len() {
            let (name, range) = entry(&mut archive, index, content.len(), &mut total)?;
            if let Some(name) = name.strip_prefix(&folder) {
                records.insert(name.to_owned(), range);
            }
        }
        Ok(Self(records))
    }

    fn range(&self, name: &str) -> Option<Range<usize>> {
        self.0.get(name).cloned()
    }

    fn bytes<'a>(&self, content: &'a [u8], name: &str) -> Option<&'a [u8]> {
        content.get(self.range(name)?)
    }
}

/// The folder that holds the pickle, with its slash.
fn folder(archive: &ZipArchive<Cursor<&[u8]>>) -> Result<String, String> {
    let mut folders = archive
        .file_names_raw()
        .filter_map(|name| std::str::from_utf8(name).ok())
        .filter_map(|name| name.strip_suffix(PICKLE))
        .filter(|folder| folder.ends_with('/'));
    match (folders.next(), folders.next()) {
        (Some(folder), None) => Ok(folder.to_owned()),
        (None, _) => Err(format!("expected a record {PICKLE}, found none")),
        (Some(_), Some(_)) => Err(format!("expected one record {PICKLE}, found several")),
    }
}

/// Name and place of a record: stored as it is, wholly inside the file, with the checksum that the directory says.
fn entry(
    archive: &mut ZipArchive<Cursor<&[u8]>>,
    index: usize,
    file_bytes: usize,
    total_bytes: &mut usize,
) -> Result<(String, Range<usize>), String> {
    let broken = |error: &dyn std::fmt::Display| format!("record {index}: {error}");
    let mut entry = archive.by_index(index).map_err(|error| broken(&error))?;
    let name = entry.name().map_err(|error| broken(&error))?.into_owned();
    let broken =
        |error: &dyn std::fmt::Display| format!("record `{}`: {error}", name.escape_default());
    let (size, stored) = (entry.size(), entry.compressed_size());
    if entry.compression() != zip::CompressionMethod::Stored || entry.encrypted() || size != stored
    {
        return Err(broken(
            &"expected bytes stored as they are, found them packed or encrypted",
        ));
    }
    let start = entry.data_start().unwrap_or(u64::MAX);
    let range = start
        .checked_add(size)
        .filter(|end| usize::try_from(*end).is_ok_and(|end| end <= file_bytes))
        .and_then(|end| Some(usize::try_from(start).ok()?..usize::try_from(end).ok()?))
        .ok_or_else(|| broken(&format!("expected {size} bytes within the file")))?;
    // Records that share bytes could make us read the same ones thousands of times.
    *total_bytes = total_bytes.saturating_add(range.len());
    if *total_bytes > file_bytes {
        return Err(broken(&"expected records that together fit the file"));
    }
    std::io::copy(&mut entry, &mut std::io::sink()).map_err(|error| broken(&error))?;
    Ok((name, range))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::io::Write;

    use zip::write::{SimpleFileOptions, ZipWriter};

    use super::*;

    /// A tensor as a pickle claims it: storage type, key, elements, offset, shape, strides.
    struct Claim {
        storage: &'static str,
        elements: i32,
        offset: i32,
        shape: &'static [i32],
        strides: &'static [i32],
    }

    const GOOD: Claim = Claim {
        storage: "FloatStorage",
        elements: 8,
        offset: 2,
        shape: &[2, 3],
        strides: &[3, 1],
    };

    fn string(pickle: &mut Vec<u8>, text: &str) {
        pickle.push(b'X');
        pickle.extend((text.len() as u32).to_le_bytes());
        pickle.extend(text.as_bytes());
    }

    fn int(pickle: &mut Vec<u8>, int: i32) {
        pickle.push(b'J');
        pickle.extend(int.to_le_bytes());
    }

    fn ints(pickle: &mut Vec<u8>, values: &[i32]) {
        pickle.push(b'(');
        values.iter().for_each(|value| int(pickle, *value));
        pickle.push(b't');
    }

    /// `{"gate": {"weight": tensor}}`.
    fn pickled(claim: &Claim) -> Vec<u8> {
        let mut pickle = b"\x80\x02}".to_vec();
        string(&mut pickle, "gate");
        pickle.push(b'}');
        string(&mut pickle, "weight");
        pickle.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        string(&mut pickle, "storage");
        pickle.extend(format!("ctorch\n{}\n", claim.storage).as_bytes());
        string(&mut pickle, "0");
        string(&mut pickle, "cuda:0");
        int(&mut pickle, claim.elements);
        pickle.extend(b"tQ");
        int(&mut pickle, claim.offset);
        ints(&mut pickle, claim.shape);
        ints(&mut pickle, claim.strides);
        pickle.extend(b"\x89}tRss.");
        pickle
    }

    fn archive(records: &[(&str, &[u8])]) -> Vec<u8> {
        let options =
            SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, bytes) in records {
            zip.start_file(*name, options).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn read_bytes(bytes: Vec<u8>) -> Result<TensorFile, String> {
        // Leaked, which a test of a few bytes may do: embedded files live as long as the program.
        let bytes = FileBytes::Static(bytes.leak());
        read(Path::new("router.pth"), &bytes).map_err(|error| error.to_string())
    }

    fn read_claim(claim: &Claim, record: &[u8]) -> Result<Vec<f32>, String> {
        let pickle = pickled(claim);
        let bytes = archive(&[
            ("r/data.pkl", &pickle),
            ("r/byteorder", b"little"),
            ("r/data/0", record),
        ]);
        let mut tensors = read_bytes(bytes)?;
        let named = tensors
            .take("gate.weight", &[2, 3], "")
            .map_err(|error| error.to_string())?;
        Ok(named.tensor.to_f32())
    }

    fn floats() -> Vec<u8> {
        (0..8u8)
            .flat_map(|value| f32::from(value).to_le_bytes())
            .collect()
    }

    #[test]
    fn read_when_a_tensor_is_a_part_of_its_storage_takes_that_part() {
        let want = [2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        assert_eq!(read_claim(&GOOD, &floats()).unwrap(), want);
        let doubles: Vec<u8> = (0..8u8)
            .flat_map(|value| f64::from(value).to_le_bytes())
            .collect();
        let claim = Claim {
            storage: "DoubleStorage",
            ..GOOD
        };
        assert_eq!(read_claim(&claim, &doubles).unwrap(), want);
        let halves: Vec<u8> = (0..8u8)
            .flat_map(|value| half::bf16::from_f32(value.into()).to_le_bytes())
            .collect();
        let claim = Claim {
            storage: "BFloat16Storage",
            ..GOOD
        };
        assert_eq!(read_claim(&claim, &halves).unwrap(), want);
    }

    #[test]
    fn read_when_a_tensor_does_not_fit_its_storage_names_it() {
        for (claim, want) in [
            (Claim { offset: 3, ..GOOD }, "to fit its record"),
            (Claim { offset: -1, ..GOOD }, "to fit its record"),
            (
                Claim {
                    offset: i32::MAX,
                    ..GOOD
                },
                "to fit its record",
            ),
            (
                Claim {
                    elements: 7,
                    ..GOOD
                },
                "found a record of 32 bytes",
            ),
            (
                Claim {
                    elements: -1,
                    ..GOOD
                },
                "found a record of 32 bytes",
            ),
            (
                Claim {
                    storage: "HalfStorage",
                    ..GOOD
                },
                "found a record of 32 bytes",
            ),
            (
                Claim {
                    shape: &[2, -3],
                    ..GOOD
                },
                "without negative axes",
            ),
            (
                Claim {
                    shape: &[i32::MAX; 8],
                    strides: &[1; 8],
                    ..GOOD
                },
                "contiguous",
            ),
            (
                Claim {
                    strides: &[1, 2],
                    ..GOOD
                },
                "contiguous",
            ),
            (
                Claim {
                    strides: &[3],
                    ..GOOD
                },
                "contiguous",
            ),
            (
                Claim {
                    strides: &[0, 0],
                    ..GOOD
                },
                "contiguous",
            ),
        ] {
            let error = read_claim(&claim, &floats()).unwrap_err();
            assert!(
                error.contains("`gate.weight`") && error.contains(want),
                "{error}"
            );
        }
        let error = read_claim(
            &Claim {
                shape: &[1; 9],
                ..GOOD
            },
            &floats(),
        )
        .unwrap_err();
        assert!(error.contains("for a tensor"), "{error}");
    }

    #[test]
    fn read_when_the_archive_is_not_torchs_says_what_is_wrong() {
        let pickle = pickled(&GOOD);
        let floats = floats();
        let good = archive(&[("r/data.pkl", &pickle), ("r/data/0", &floats)]);
        let mut flipped = good.clone();
        let at = flipped
            .windows(8)
            .position(|bytes| bytes == &floats[4..12])
            .unwrap();
        flipped[at + 3] ^= 1;
        for (bytes, want) in [
            (
                b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9 j\xa8P\x19.".to_vec(),
                "torch before 1.6",
            ),
            (b"PK\x03\x04".to_vec(), "torch.save's zip"),
            (flipped, "checksum"),
            (good[..good.len() - 8].to_vec(), "torch.save's zip"),
            (archive(&[("r/data/0", &floats)]), "data.pkl"),
            (
                archive(&[("data.pkl", &pickle), ("data/0", &floats)]),
                "data.pkl",
            ),
            (
                archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)]),
                "several",
            ),
            (archive(&[("r/data.pkl", &pickle)]), "a record data/0"),
            (
                archive(&[
                    ("r/data.pkl", &pickle),
                    ("r/byteorder", b"big"),
                    ("r/data/0", &floats),
                ]),
                "little-endian",
            ),
            (
                archive(&[("r/data.pkl", b"\x80\x02].")]),
                "a dict of state dicts",
            ),
            (archive(&[("r/data.pkl", b"\x80\x02}NNs.")]), "by name"),
        ] {
            let error = read_bytes(bytes).unwrap_err().to_lowercase();
            assert!(
                error.contains("router.pth") && error.contains(want),
                "{want}: {error}"
            );
        }
    }
}
