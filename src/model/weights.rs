//! The weights, stacked as the forward pass reads them and handed to the backend.

use super::ModelError;
use super::footprint::Store;
use super::shard::{Piece, Shard};
use crate::backend::ops::{ExpertShape, meets_integers};
use crate::backend::{Backend, BackendError, HostMatrix, Matrix, WeightFormat};
use crate::checkpoint::{
    BaseTensors, Checkpoint, Expert, Experts, HostTensor, LayerTensors, LlamaConfig,
};
use crate::dtype::{self, BlockType, DType};

/// All matrices of the model on the device, with its norms.
pub(super) struct Weights<S: Store> {
    /// (vocabulary, d).
    pub embed: S::Matrix,
    /// One a layer.
    pub layers: Vec<LayerWeights<S>>,
    /// (1, d).
    pub norm: S::Buffer,
    /// (vocabulary, d); `None`: the embedding.
    pub head: Option<S::Matrix>,
}

/// The matrices of one layer.
pub(super) struct LayerWeights<S: Store> {
    /// (1, d).
    pub input_norm: S::Buffer,
    /// (q + k + v, d).
    pub qkv: S::Matrix,
    /// (d, q).
    pub output: S::Matrix,
    /// (1, d).
    pub mlp_norm: S::Buffer,
    /// (2m, d): gate, up.
    pub gate_up: S::Matrix,
    /// E (w + 2, m): A_s, A_h as [`Uploader::experts_dtype`] says, a, b in f32.
    pub experts: Option<(S::Matrix, ExpertShape)>,
    /// (d, m), extended by [s_s B_s | s_h B_h] (d, w) in a model that is whole.
    pub down: S::Matrix,
    /// [s_s B_s | s_h B_h] (d, w) where ranks share m: the gates are known when their sum is.
    pub lora_b: Option<S::Matrix>,
}

impl<S: Store> Weights<S> {
    pub(super) fn upload(
        store: &S,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        shard: Shard,
    ) -> Result<Self, ModelError> {
        let uploader = Uploader {
            store,
            config: &checkpoint.config,
            format,
            shard,
        };
        let BaseTensors {
            embed_tokens,
            layers,
            norm,
            lm_head,
        } = &checkpoint.base;
        let experts = checkpoint.experts.as_ref();
        let layers = layers.iter().enumerate();
        Ok(Self {
            embed: uploader.outer("model.embed_tokens", embed_tokens)?,
            layers: layers
                .map(|(index, tensors)| uploader.layer(index, tensors, experts))
                .collect::<Result<_, _>>()?,
            norm: uploader.vector(norm)?,
            head: lm_head
                .as_ref()
                .map(|head| uploader.outer("lm_head", head))
                .transpose()?,
        })
    }
}

impl<B: Backend> Weights<B> {
    pub(super) fn bytes(&self) -> usize {
        let untied = self.head.as_ref().map_or(0, |_| self.embed.bytes());
        self.step_bytes() + untied
    }

    /// What a decode step reads: all but an embedding that is not the head, of which it reads a row a sequence.
    pub(super) fn step_bytes(&self) -> usize {
        let layer = |layer: &LayerWeights<B>| {
            let lora_b = layer.lora_b.as_ref().map_or(0, Matrix::bytes);
            let experts = lora_b + layer.experts.as_ref().map_or(0, |(e, _)| e.bytes());
            let base = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down];
            experts + base.into_iter().map(Matrix::bytes).sum::<usize>()
        };
        let head = self.head.as_ref().unwrap_or(&self.embed);
        head.bytes() + self.layers.iter().map(layer).sum::<usize>()
    }
}

struct Uploader<'a, S> {
    store: &'a S,
    /// Of the whole model.
    config: &'a LlamaConfig,
    format: WeightFormat,
    shard: Shard,
}

impl<S: Store> Uploader<'_, S> {
    fn layer(
        &self,
        index: usize,
        tensors: &LayerTensors,
        experts: Option<&Experts>,
    ) -> Result<LayerWeights<S>, ModelError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let LayerTensors {
            q_proj,
            k_proj,
            v_proj,
            ..
        } = tensors;
        let rows = |part: &str, tensors: &[&HostTensor]| {
            let name = name(part);
            let pieces = tensors.iter().map(|of| self.shard.rows(&name, of));
            self.matrix(&name, &pieces.collect::<Result<Vec<_>, _>>()?, None)
        };
        let columns = |part: &str, tensor, extension: Option<&Piece<'_>>| {
            let name = name(part);
            let piece = self.shard.columns(&name, tensor)?;
            self.matrix(&name, &[piece], extension)
        };
        let kept = self.experts_dtype(&tensors.down_proj, experts);
        let lora_b = experts.map(|experts| {
            let d = self.config.hidden_size;
            let values = lora_b(experts, index, d);
            small(&name("mlp.experts.B"), d, &values, kept)
        });
        let lora_b = lora_b.transpose()?;
        let (extension, apart) = match self.shard.is_whole() {
            true => (lora_b.as_ref(), None),
            false => (None, lora_b.as_ref()),
        };
        Ok(LayerWeights {
            input_norm: self.vector(&tensors.input_layernorm)?,
            qkv: rows("self_attn.qkv_proj", &[q_proj, k_proj, v_proj])?,
            output: columns("self_attn.o_proj", &tensors.o_proj, None)?,
            mlp_norm: self.vector(&tensors.post_attention_layernorm)?,
            gate_up: rows("mlp.gate_up_proj", &[&tensors.gate_proj, &tensors.up_proj])?,
            experts: experts
                .map(|experts| self.experts(&name("mlp.experts.A"), experts, index, kept))
                .transpose()?,
            down: columns("mlp.down_proj", &tensors.down_proj, extension)?,
            lora_b: apart
                .map(|piece| self.stored(&name("mlp.experts.B"), piece))
                .transpose()?,
        })
    }

    /// How the experts' A and s B are kept beside this base: f32 beside f32, q8_0 where h is made int8 for a base in blocks, else bf16.
    /// Beside a 4-bit base of 135 M parameters bf16 would be 5 % of a decode step's bytes.
    fn experts_dtype(&self, base: &HostTensor, experts: Option<&Experts>) -> DType {
        let cols = base.shape()[1] / self.shard.ranks();
        let kept = self.format.kept(base.dtype(), cols);
        let width = experts.map_or(0, Experts::width);
        let integers = self.store.quantises()
            && meets_integers(kept, cols, self.format)
            && width.is_multiple_of(BlockType::LEN);
        match (self.format, base.dtype()) {
            (WeightFormat::F32, _) | (WeightFormat::Stored, DType::F32) => DType::F32,
            _ if integers => DType::Q8_0,
            _ => DType::BF16,
        }
    }

    /// E: A_s and A_h as `kept`; the gates' two rows in f32, since a gate moves a whole expert.
    fn experts(
        &self,
        name: &str,
        experts: &Experts,
        index: usize,
        kept: DType,
    ) -> Result<(S::Matrix, ExpertShape), ModelError> {
        let Experts {
            safety,
            helpfulness,
            router,
        } = experts;
        let gates = &router[index];
        let lora_a = [
            safety.layers[index].lora_a.as_slice(),
            helpfulness.layers[index].lora_a.as_slice(),
        ];
        let gate_rows = [
            gates.safety.weight.as_slice(),
            gates.helpfulness.weight.as_slice(),
        ];
        let width = experts.width();
        let own = |rows: [&[f32]; 2]| {
            let m = self.config.intermediate_size;
            self.shard.columns_of(&rows.concat(), m)
        };
        let lora_a = small(name, width, &own(lora_a), kept)?;
        let gate_rows = small(name, 2, &own(gate_rows), DType::F32)?;
        let shape = ExpertShape {
            safety_rank: safety.rank,
            helpfulness_rank: helpfulness.rank,
            safety_bias: gates.safety.bias,
            helpfulness_bias: gates.helpfulness.bias,
        };
        let matrix = self.store.experts(lora_a.host(), gate_rows.host());
        Ok((matrix.map_err(|source| weights_error(name, source))?, shape))
    }

    /// Embedding or head.
    fn outer(&self, name: &str, tensor: &HostTensor) -> Result<S::Matrix, ModelError> {
        let format = match self.format {
            WeightFormat::Block(block) => WeightFormat::Block(block.outer()),
            format => format,
        };
        let uploader = Self { format, ..*self };
        uploader.matrix(name, &[Piece::of(tensor)], None)
    }

    fn matrix(
        &self,
        name: &str,
        pieces: &[Piece<'_>],
        extension: Option<&Piece<'_>>,
    ) -> Result<S::Matrix, ModelError> {
        let parts: Vec<HostMatrix<'_>> = pieces.iter().map(Piece::host).collect();
        let matrix = self
            .store
            .matrix(&parts, extension.map(Piece::host), self.format);
        matrix.map_err(|source| weights_error(name, source))
    }

    /// Kept as it is.
    fn stored(&self, name: &str, piece: &Piece<'_>) -> Result<S::Matrix, ModelError> {
        let matrix = self
            .store
            .matrix(&[piece.host()], None, WeightFormat::Stored);
        matrix.map_err(|source| weights_error(name, source))
    }

    fn vector(&self, tensor: &HostTensor) -> Result<S::Buffer, ModelError> {
        let values = tensor.to_f32();
        let mut buffer = self.store.exact_buffer(1, values.len())?;
        self.store.write(&mut buffer, &values)?;
        Ok(buffer)
    }
}

fn weights_error(name: &str, source: BackendError) -> ModelError {
    ModelError::Weights {
        name: name.to_owned(),
        source,
    }
}

/// A matrix (rows, values / rows) of experts or gates, kept in f32, rounded to bf16, or in q8_0 (whole blocks) if that is harmless, else in
/// bf16.
fn small(
    name: &str,
    rows: usize,
    values: &[f32],
    kept: DType,
) -> Result<Piece<'static>, ModelError> {
    let blocks = (kept == DType::Q8_0).then(|| harmless_q8_0(values));
    let (dtype, bytes) = match (kept, blocks.flatten()) {
        (_, Some(bytes)) => (DType::Q8_0, bytes),
        (DType::F32, None) => {
            let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
            (DType::F32, bytes)
        }
        _ => {
            let bytes = dtype::bf16_bytes(values).map_err(|value| ModelError::TooLarge {
                name: name.to_owned(),
                value,
            })?;
            (DType::BF16, bytes)
        }
    };
    Ok(Piece {
        rows,
        cols: values.len() / rows.max(1),
        dtype,
        bytes: bytes.into(),
    })
}

/// q8_0 of `values`, if it is within 1 % of them (in norm; numbers as they are trained come to 0.6 %): where all are so small that an f16
/// scale says little of them, or too large for it, it is not.
fn harmless_q8_0(values: &[f32]) -> Option<Vec<u8>> {
    let bytes = BlockType::Q8_0.quantise(values);
    let mut kept = vec![0.0; values.len()];
    DType::Q8_0.widen(&bytes, &mut kept);
    let square = |x: f32| f64::from(x).powi(2);
    let error: f64 = kept.iter().zip(values).map(|(k, x)| square(k - x)).sum();
    let norm: f64 = values.iter().copied().map(square).sum();
    (error <= 1e-4 * norm).then_some(bytes)
}

/// [s_s B_s | s_h B_h] (d, w) of layer `index` (MIDPO.md 1, "One write").
fn lora_b(experts: &Experts, index: usize, d: usize) -> Vec<f32> {
    let width = experts.width();
    let scaled_row = |expert: &Expert, row: usize| {
        let b = &expert.layers[index].lora_b[row * expert.rank..][..expert.rank];
        let scale = expert.scale;
        b.iter()
            .map(move |value| scale * value)
            .collect::<Vec<f32>>()
    };
    let mut values = Vec::with_capacity(d * width);
    for row in 0..d {
        values.extend(scaled_row(&experts.safety, row));
        values.extend(scaled_row(&experts.helpfulness, row));
    }
    values
}
