//! The weights of a base in blocks, in one safetensors file.

use std::path::Path;

use super::files::Files;
use super::safetensors::{self, Entry, Kept, Numbers};
use crate::checkpoint::{BaseTensors, CheckpointError, HostTensor, LlamaConfig, hf};
use crate::dtype::BlockType;

/// Writes `model.safetensors`: matrices in blocks (embedding and head as [`BlockType::outer`]), norms as they are. What the model
/// computes is bit-equal to what it computes where it is quantised as it is loaded.
///
/// # Errors
/// [`CheckpointError::Tensor`] for a number that no scale holds; [`CheckpointError::Io`].
pub(in crate::checkpoint) fn weights(
    directory: &Path,
    config: &LlamaConfig,
    base: &BaseTensors,
    block: BlockType,
) -> Result<(), CheckpointError> {
    let names = hf::tensor_shapes(config);
    let entries: Vec<Entry<'_>> = names
        .iter()
        .zip(in_order(base))
        .map(|((name, shape), (tensor, outer))| Entry {
            name,
            shape,
            numbers: Numbers::Kept(
                tensor,
                match (shape.len(), outer) {
                    (1, _) => Kept::Same,
                    (_, true) => Kept::Blocks(block.outer()),
                    (_, false) => Kept::Blocks(block),
                },
            ),
        })
        .collect();
    let mut files = Files::new(directory)?;
    files.stage(hf::SINGLE, |file, out| {
        safetensors::write(file, entries, out)
    })?;
    files.finish()
}

/// Tensors in the order of [`hf::tensor_shapes`], and whether each is embedding or head.
fn in_order(base: &BaseTensors) -> impl Iterator<Item = (&HostTensor, bool)> {
    let layers = base.layers.iter().flat_map(|layer| {
        [
            &layer.input_layernorm,
            &layer.q_proj,
            &layer.k_proj,
            &layer.v_proj,
            &layer.o_proj,
            &layer.post_attention_layernorm,
            &layer.gate_proj,
            &layer.up_proj,
            &layer.down_proj,
        ]
    });
    std::iter::once((&base.embed_tokens, true))
        .chain(layers.map(|tensor| (tensor, false)))
        .chain([(&base.norm, false)])
        .chain(base.lm_head.as_ref().map(|head| (head, true)))
}
