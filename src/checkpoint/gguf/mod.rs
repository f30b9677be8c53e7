//! A base in a GGUF file of llama.cpp: architecture `llama`, weights as they are stored, tokenizer and template from the metadata.

mod config;
mod pre_tokenizer;
mod reader;
mod rope;
mod tokenizer;

use std::collections::HashSet;
use std::path::Path;

use super::source::FileBytes;
use super::{
    BaseTensors, CheckpointError, HostTensor, LayerTensors, LlamaConfig, TensorBytes, TextParts,
    limits, parallel,
};
use crate::dtype::DType;
use reader::{Header, TensorInfo};

const EMBEDDING: &str = "token_embd.weight";
const NORM: &str = "output_norm.weight";
const HEAD: &str = "output.weight";
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Reads `bytes`, the content of `file`: config, weights in Hugging Face's row order, and what the tokenizer is made from.
///
/// # Errors
/// Names the key or tensor, what was expected and what came.
pub(super) fn load(
    file: &Path,
    bytes: &FileBytes,
) -> Result<(LlamaConfig, BaseTensors, TextParts), CheckpointError> {
    let header = Header::parse(file, bytes.as_slice())?;
    let weights = Weights {
        file,
        bytes,
        header: &header,
    };
    let vocab_size = weights.vocab_size()?;
    let rope_factors = weights.rope_factors()?;
    let config = config::read(&header, vocab_size, rope_factors.as_deref())?;
    let base = weights.base(&config)?;
    let text = tokenizer::read(&header, vocab_size)?;
    Ok((config, base, text))
}

/// The tensors of a file.
struct Weights<'a> {
    file: &'a Path,
    bytes: &'a FileBytes,
    header: &'a Header<'a>,
}

/// A tensor that the model needs.
struct Wanted {
    name: String,
    shape: Vec<usize>,
    rows: Rows,
}

/// How a tensor's rows are ordered in the file.
#[derive(Clone, Copy)]
enum Rows {
    AsTheyAre,
    /// llama.cpp interleaves the halves of each of `heads` heads, since its rotary embedding turns neighbours.
    Interleaved {
        heads: usize,
    },
}

impl Weights<'_> {
    fn info(&self, name: &str, expected: &str) -> Result<&TensorInfo, CheckpointError> {
        self.header
            .tensor(name)
            .ok_or_else(|| CheckpointError::MissingTensor {
                file: self.file.to_path_buf(),
                name: name.to_owned(),
                expected: expected.to_owned(),
            })
    }

    fn wrong(&self, name: &str, reason: String) -> CheckpointError {
        CheckpointError::Tensor {
            file: self.file.to_path_buf(),
            name: name.to_owned(),
            reason,
        }
    }

    fn part(&self, name: &str, info: &TensorInfo) -> Result<TensorBytes, CheckpointError> {
        self.bytes
            .part(info.range.clone())
            .ok_or_else(|| self.wrong(name, "expected bytes within the file".to_owned()))
    }

    fn vocab_size(&self) -> Result<usize, CheckpointError> {
        let info = self.info(EMBEDDING, "(vocabulary, llama.embedding_length)")?;
        match info.shape.as_slice() {
            [rows, _] if *rows <= limits::VOCAB_MAX => Ok(*rows),
            found => Err(self.wrong(
                EMBEDDING,
                format!(
                    "expected 2 axes, the first of at most {}, found {found:?}",
                    limits::VOCAB_MAX
                ),
            )),
        }
    }

    fn rope_factors(&self) -> Result<Option<Vec<f32>>, CheckpointError> {
        let Some(info) = self.header.tensor(ROPE_FACTORS) else {
            return Ok(None);
        };
        // `rope` checks their number against the head.
        match info.shape.as_slice() {
            [len] if info.dtype == DType::F32 && *len <= limits::HEAD_DIM_MAX / 2 => {}
            found => {
                return Err(self.wrong(
                    ROPE_FACTORS,
                    format!(
                        "expected f32 of one axis, found {} of {found:?}",
                        info.dtype.as_str()
                    ),
                ));
            }
        }
        let bytes = self.part(ROPE_FACTORS, info)?;
        let bytes = bytes.as_slice();
        let mut factors = vec![0.0; bytes.len() / size_of::<f32>()];
        info.dtype.widen(bytes, &mut factors);
        Ok(Some(factors))
    }

    fn base(&self, config: &LlamaConfig) -> Result<BaseTensors, CheckpointError> {
        let wanted = wanted(config);
        self.refuse_unknown(&wanted)?;
        let tensors = parallel::map(wanted.len(), |index| match wanted.get(index) {
            Some(wanted) => self.tensor(wanted),
            None => Err(self.wrong("", "expected a tensor".to_owned())),
        })?;
        let mut tensors = tensors.into_iter();
        // The order of `wanted`.
        let mut next = || {
            tensors
                .next()
                .ok_or_else(|| self.wrong(EMBEDDING, "expected more tensors".to_owned()))
        };
        let embed_tokens = next()?;
        let norm = next()?;
        let lm_head = (!config.tie_word_embeddings).then(&mut next).transpose()?;
        let layers = (0..config.num_layers)
            .map(|_| {
                Ok(LayerTensors {
                    input_layernorm: next()?,
                    q_proj: next()?,
                    k_proj: next()?,
                    v_proj: next()?,
                    o_proj: next()?,
                    post_attention_layernorm: next()?,
                    gate_proj: next()?,
                    up_proj: next()?,
                    down_proj: next()?,
                })
            })
            .collect::<Result<_, CheckpointError>>()?;
        Ok(BaseTensors {
            embed_tokens,
            layers,
            norm,
            lm_head,
        })
    }

    /// A tensor that we would leave out makes another model of the rest: biases, for one.
    fn refuse_unknown(&self, wanted: &[Wanted]) -> Result<(), CheckpointError> {
        let known: HashSet<&str> = wanted
            .iter()
            .map(|wanted| wanted.name.as_str())
            .chain([ROPE_FACTORS])
            .collect();
        // The first by name, so that the message does not depend on a map's order.
        let unknown = self
            .header
            .tensor_names()
            .filter(|name| !known.contains(name))
            .min();
        match unknown {
            None => Ok(()),
            Some(name) => Err(self.wrong(
                name,
                "expected the tensors of a plain Llama of llama.block_count layers, found this one beside them".to_owned(),
            )),
        }
    }

    fn tensor(&self, wanted: &Wanted) -> Result<HostTensor, CheckpointError> {
        let name = wanted.name.as_str();
        let info = self.info(name, &format!("shape {:?}", wanted.shape))?;
        if info.shape != wanted.shape {
            return Err(CheckpointError::Shape {
                file: self.file.to_path_buf(),
                name: name.to_owned(),
                expected: wanted.shape.clone(),
                found: info.shape.clone(),
            });
        }
        let part = self.part(name, info)?;
        let bytes = part.as_slice();
        if let Some(at) = info.dtype.first_non_finite(bytes) {
            return Err(self.wrong(
                name,
                format!("expected finite numbers, found NaN or infinity at element {at}"),
            ));
        }
        let bytes = match wanted.rows {
            Rows::AsTheyAre => part,
            Rows::Interleaved { heads } => {
                let rows = wanted.shape.first().copied().unwrap_or_default();
                let row_bytes = bytes.len() / rows.max(1);
                TensorBytes::Owned(deinterleave(bytes, row_bytes, rows / heads.max(1)).into())
            }
        };
        HostTensor::new(wanted.shape.clone(), info.dtype, bytes)
            .ok_or_else(|| self.wrong(name, "expected rows of whole blocks".to_owned()))
    }
}

/// Every tensor of the model, in the order of [`Weights::base`].
fn wanted(config: &LlamaConfig) -> Vec<Wanted> {
    let (d, m) = (config.hidden_size, config.intermediate_size);
    let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
    let (q, kv) = (heads * config.head_dim, kv_heads * config.head_dim);
    let plain = |name: String, shape: &[usize]| Wanted {
        name,
        shape: shape.to_vec(),
        rows: Rows::AsTheyAre,
    };
    let mut wanted = vec![
        plain(EMBEDDING.to_owned(), &[config.vocab_size, d]),
        plain(NORM.to_owned(), &[d]),
    ];
    if !config.tie_word_embeddings {
        wanted.push(plain(HEAD.to_owned(), &[config.vocab_size, d]));
    }
    for layer in 0..config.num_layers {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let interleaved = |part: &str, rows: usize, heads: usize| Wanted {
            name: name(part),
            shape: vec![rows, d],
            rows: Rows::Interleaved { heads },
        };
        wanted.extend([
            plain(name("attn_norm"), &[d]),
            interleaved("attn_q", q, heads),
            interleaved("attn_k", kv, kv_heads),
            plain(name("attn_v"), &[kv, d]),
            plain(name("attn_output"), &[d, q]),
            plain(name("ffn_norm"), &[d]),
            plain(name("ffn_gate"), &[m, d]),
            plain(name("ffn_up"), &[m, d]),
            plain(name("ffn_down"), &[d, m]),
        ]);
    }
    wanted
}

/// Rows 0, 2, 4, ... of each head, then 1, 3, 5, ...: the first half and the second. Rows move whole, in any format.
fn deinterleave(bytes: &[u8], row_bytes: usize, head_rows: usize) -> Vec<u8> {
    let mut ordered = Vec::with_capacity(bytes.len());
    let head_bytes = row_bytes * head_rows;
    for head in bytes.chunks_exact(head_bytes.max(1)) {
        for half in 0..2 {
            for row in head.chunks_exact(row_bytes.max(1)).skip(half).step_by(2) {
                ordered.extend_from_slice(row);
            }
        }
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::deinterleave;

    #[test]
    fn deinterleave_puts_even_rows_of_each_head_before_odd_ones() {
        let bytes: Vec<u8> = (0..16).collect();
        assert_eq!(
            deinterleave(&bytes, 2, 4),
            [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
        );
        assert_eq!(deinterleave(&[], 0, 0), Vec::<u8>::new());
    }
}
