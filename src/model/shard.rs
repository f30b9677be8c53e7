//! What one of several ranks holds of a model (tensor parallel: ARCHITECTURE.md, "The routed layer"): some heads, some of the MLP's
//! width. Embedding, norms and head are everyone's.

use std::borrow::Cow;
use std::ops::Range;

use super::ModelError;
use crate::backend::HostMatrix;
use crate::checkpoint::{HostTensor, LlamaConfig};
use crate::dtype::DType;

/// Which of how many ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    rank: usize,
    ranks: usize,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// `None` unless `rank` is below `ranks`.
    pub fn new(rank: usize, ranks: usize) -> Option<Self> {
        (rank < ranks).then_some(Self { rank, ranks })
    }

    /// From 0 on.
    pub fn rank(self) -> usize {
        self.rank
    }

    /// How many there are.
    pub fn ranks(self) -> usize {
        self.ranks
    }

    pub(super) fn is_whole(self) -> bool {
        self.ranks == 1
    }

    /// The shape of this rank's part.
    ///
    /// # Errors
    /// Heads or a width that ranks cannot share evenly.
    pub(super) fn config(self, config: &LlamaConfig) -> Result<LlamaConfig, ModelError> {
        let share = |what: &str, len: usize| {
            let range = self.range(len, 1).ok_or_else(|| self.error(what, len, 1))?;
            Ok::<_, ModelError>(range.len())
        };
        Ok(LlamaConfig {
            num_heads: share("num_attention_heads", config.num_heads)?,
            num_kv_heads: share("num_key_value_heads", config.num_kv_heads)?,
            intermediate_size: share("intermediate_size", config.intermediate_size)?,
            ..config.clone()
        })
    }

    /// This rank's part of `len` numbers in whole blocks of `block`.
    fn range(self, len: usize, block: usize) -> Option<Range<usize>> {
        let part = len / self.ranks;
        len.is_multiple_of(self.ranks * block)
            .then(|| self.rank * part..(self.rank + 1) * part)
    }

    fn error(self, what: &str, len: usize, block: usize) -> ModelError {
        ModelError::Shard {
            what: what.to_owned(),
            expected: self.ranks * block,
            found: len,
        }
    }

    /// This rank's outputs of `tensor`.
    pub(super) fn rows<'a>(
        self,
        name: &str,
        tensor: &'a HostTensor,
    ) -> Result<Piece<'a>, ModelError> {
        let (rows, cols) = (tensor.shape()[0], tensor.shape()[1]);
        let range = self
            .range(rows, 1)
            .ok_or_else(|| self.error(name, rows, 1))?;
        let row_bytes = tensor.bytes().len() / rows.max(1);
        Ok(Piece {
            rows: range.len(),
            cols,
            dtype: tensor.dtype(),
            bytes: Cow::Borrowed(&tensor.bytes()[range.start * row_bytes..range.end * row_bytes]),
        })
    }

    /// This rank's inputs of `tensor`: a copy, unless it is the whole.
    pub(super) fn columns<'a>(
        self,
        name: &str,
        tensor: &'a HostTensor,
    ) -> Result<Piece<'a>, ModelError> {
        if self.is_whole() {
            return Ok(Piece::of(tensor));
        }
        let (rows, cols) = (tensor.shape()[0], tensor.shape()[1]);
        let dtype = tensor.dtype();
        let (block, block_bytes) = (dtype.block_len(), dtype.block_bytes());
        let range = self.range(cols, block);
        let range = range.ok_or_else(|| self.error(name, cols, block))?;
        let (from, to) = (
            range.start / block * block_bytes,
            range.end / block * block_bytes,
        );
        let row_bytes = tensor.bytes().len() / rows.max(1);
        let mut bytes = Vec::with_capacity(rows * (to - from));
        for row in tensor.bytes().chunks_exact(row_bytes.max(1)) {
            bytes.extend_from_slice(&row[from..to]);
        }
        Ok(Piece {
            rows,
            cols: range.len(),
            dtype,
            bytes: Cow::Owned(bytes),
        })
    }

    /// This rank's inputs of a matrix of `cols` columns, which [`Self::config`] has found to be shared evenly.
    pub(super) fn columns_of(self, values: &[f32], cols: usize) -> Vec<f32> {
        let range = self.range(cols, 1).unwrap_or_default();
        let rows = values.chunks_exact(cols.max(1));
        rows.flat_map(|row| &row[range.clone()]).copied().collect()
    }
}

/// A matrix on its way to the device.
pub(super) struct Piece<'a> {
    pub rows: usize,
    pub cols: usize,
    pub dtype: DType,
    pub bytes: Cow<'a, [u8]>,
}

impl<'a> Piece<'a> {
    /// The whole of `tensor` (rows, cols).
    pub(super) fn of(tensor: &'a HostTensor) -> Self {
        Self {
            rows: tensor.shape()[0],
            cols: tensor.shape()[1],
            dtype: tensor.dtype(),
            bytes: Cow::Borrowed(tensor.bytes()),
        }
    }

    pub(super) fn host(&self) -> HostMatrix<'_> {
        HostMatrix {
            rows: self.rows,
            cols: self.cols,
            dtype: self.dtype,
            bytes: &self.bytes,
        }
    }
}
