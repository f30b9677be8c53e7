//! `llama.*` of the metadata as a [`LlamaConfig`].

use super::super::limits;
use super::super::{CheckpointError, LlamaConfig};
use super::reader::{Header, Value};
use super::rope;
use crate::types::TokenId;

const ROPE_THETA_DEFAULT: f64 = 10_000.0;

/// Reads and checks every size before anything is reserved for it. `vocab_size`: rows of the embedding.
pub(super) fn read(
    header: &Header<'_>,
    vocab_size: usize,
    rope_factors: Option<&[f32]>,
) -> Result<LlamaConfig, CheckpointError> {
    let reader = Reader { header };
    reader.architecture()?;
    let hidden_size = reader.size("llama.embedding_length", limits::WIDTH_MAX)?;
    let num_layers = reader.size("llama.block_count", limits::LAYERS_MAX)?;
    let intermediate_size = reader.size("llama.feed_forward_length", limits::WIDTH_MAX)?;
    let (num_heads, num_kv_heads, head_dim) = reader.heads(hidden_size)?;
    let max_position_embeddings = reader.size("llama.context_length", limits::POSITIONS_MAX)?;
    let rms_norm_eps = reader.positive("llama.attention.layer_norm_rms_epsilon", None)? as f32;
    let rope_theta = reader.positive("llama.rope.freq_base", Some(ROPE_THETA_DEFAULT))?;
    reader.window(max_position_embeddings)?;
    Ok(LlamaConfig {
        vocab_size,
        hidden_size,
        intermediate_size,
        num_layers,
        num_heads,
        num_kv_heads,
        head_dim,
        rms_norm_eps,
        rope_theta,
        rope_scaling: rope::scaling(header, rope_theta, head_dim, rope_factors)?,
        max_position_embeddings,
        tie_word_embeddings: header.tensor("output.weight").is_none(),
        bos_token_id: reader.token("tokenizer.ggml.bos_token_id", vocab_size)?,
        eos_token_ids: reader.ends(vocab_size)?,
    })
}

struct Reader<'a> {
    header: &'a Header<'a>,
}

impl Reader<'_> {
    fn architecture(&self) -> Result<(), CheckpointError> {
        const KEY: &str = "general.architecture";
        let found = self.header.text(KEY)?;
        if found != "llama" {
            return Err(self
                .header
                .value_error(KEY, "`llama`".to_owned(), format!("`{found}`")));
        }
        const EXPERTS: &str = "llama.expert_count";
        match self.header.optional_u64(EXPERTS)? {
            None | Some(0) => Ok(()),
            Some(experts) => Err(self.header.value_error(
                EXPERTS,
                "none: a dense model".to_owned(),
                experts.to_string(),
            )),
        }
    }

    /// From 1 to `limit`.
    fn optional_size(&self, key: &str, limit: usize) -> Result<Option<usize>, CheckpointError> {
        // Some writers give one number a layer; all must be the same.
        let found = match self.header.get(key) {
            Some(Value::Array(array)) => {
                let mut elements = array.iter();
                let first = elements.next();
                match first {
                    Some(Value::Unsigned(size)) if elements.all(|e| Some(e) == first) => Some(size),
                    Some(Value::Signed(size)) if elements.all(|e| Some(e) == first) => {
                        u64::try_from(size).ok()
                    }
                    _ => {
                        return Err(self.header.kind_error(
                            key,
                            "the same number for every layer",
                            Value::Array(array),
                        ));
                    }
                }
            }
            _ => self.header.optional_u64(key)?,
        };
        let Some(found) = found else {
            return Ok(None);
        };
        usize::try_from(found)
            .ok()
            .filter(|size| (1..=limit).contains(size))
            .map(Some)
            .ok_or_else(|| {
                self.header.value_error(
                    key,
                    format!("a number from 1 to {limit}"),
                    found.to_string(),
                )
            })
    }

    fn size(&self, key: &str, limit: usize) -> Result<usize, CheckpointError> {
        self.optional_size(key, limit)?.ok_or_else(|| {
            self.header
                .missing(key, &format!("a number from 1 to {limit}"))
        })
    }

    /// Heads, K/V heads, and the size of a head.
    fn heads(&self, hidden_size: usize) -> Result<(usize, usize, usize), CheckpointError> {
        const HEADS: &str = "llama.attention.head_count";
        const KV_HEADS: &str = "llama.attention.head_count_kv";
        const KEYS: &str = "llama.attention.key_length";
        const VALUES: &str = "llama.attention.value_length";
        const ROPE: &str = "llama.rope.dimension_count";
        let heads = self.size(HEADS, limits::HEADS_MAX)?;
        let kv_heads = self
            .optional_size(KV_HEADS, limits::HEADS_MAX)?
            .unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(self.header.value_error(
                KV_HEADS,
                format!("a divisor of {HEADS}, {heads}"),
                kv_heads.to_string(),
            ));
        }
        let head_dim = match self.optional_size(KEYS, limits::HEAD_DIM_MAX)? {
            Some(size) => size,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(self.header.value_error(
                    HEADS,
                    format!("a divisor of llama.embedding_length, {hidden_size}"),
                    heads.to_string(),
                ));
            }
        };
        if !head_dim.is_multiple_of(2) || head_dim > limits::HEAD_DIM_MAX {
            return Err(self.header.value_error(
                KEYS,
                format!("an even size up to {}", limits::HEAD_DIM_MAX),
                head_dim.to_string(),
            ));
        }
        for key in [VALUES, ROPE] {
            let found = self.optional_size(key, limits::HEAD_DIM_MAX)?;
            if found.is_some_and(|found| found != head_dim) {
                return Err(self.header.value_error(
                    key,
                    format!("the size of a head, {head_dim}"),
                    found.unwrap_or_default().to_string(),
                ));
            }
        }
        if heads
            .checked_mul(head_dim)
            .is_none_or(|width| width > limits::WIDTH_MAX)
        {
            return Err(self.header.value_error(
                HEADS,
                format!("at most {} / {head_dim}", limits::WIDTH_MAX),
                heads.to_string(),
            ));
        }
        Ok((heads, kv_heads, head_dim))
    }

    fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, CheckpointError> {
        let expected = "a number above 0";
        match self.header.optional_f64(key)?.or(default) {
            Some(value) if value > 0.0 => Ok(value),
            Some(value) => {
                Err(self
                    .header
                    .value_error(key, expected.to_owned(), value.to_string()))
            }
            None => Err(self.header.missing(key, expected)),
        }
    }

    /// Attention over a window gives other numbers than ours as soon as a text is longer.
    fn window(&self, positions: usize) -> Result<(), CheckpointError> {
        const KEY: &str = "llama.attention.sliding_window";
        match self.header.optional_u64(KEY)? {
            Some(window) if window > 0 && window < positions as u64 => {
                Err(self.header.value_error(
                    KEY,
                    format!("none, or at least llama.context_length, {positions}"),
                    window.to_string(),
                ))
            }
            _ => Ok(()),
        }
    }

    fn token(&self, key: &str, vocab_size: usize) -> Result<Option<TokenId>, CheckpointError> {
        let Some(found) = self.header.optional_u64(key)? else {
            return Ok(None);
        };
        u32::try_from(found)
            .ok()
            .filter(|id| (*id as usize) < vocab_size)
            .map(|id| Some(TokenId(id)))
            .ok_or_else(|| {
                self.header.value_error(
                    key,
                    format!("an id below the vocabulary of {vocab_size}"),
                    found.to_string(),
                )
            })
    }

    /// A chat's turn, or a message that calls a tool, may end with another token than a text.
    fn ends(&self, vocab_size: usize) -> Result<Vec<TokenId>, CheckpointError> {
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            let id = self.token(&format!("tokenizer.ggml.{name}_token_id"), vocab_size)?;
            ends.extend(id.filter(|id| !ends.contains(id)));
        }
        Ok(ends)
    }
}
