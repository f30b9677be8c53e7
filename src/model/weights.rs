//! The weights, stacked as the forward pass reads them and handed to the backend.

use super::{ModelError, rope};
use crate::backend::ops::ExpertShape;
use crate::backend::{Backend, BackendError, HostMatrix, Matrix, WeightFormat};
use crate::checkpoint::{
    BaseTensors, Checkpoint, Expert, Experts, HostTensor, LayerTensors, LlamaConfig,
};
use crate::dtype::DType;

/// All matrices of the model on the device.
pub(super) struct Weights<B: Backend> {
    /// (vocabulary, d).
    pub embed: B::Matrix,
    /// One a layer.
    pub layers: Vec<LayerWeights<B>>,
    /// (1, d).
    pub norm: B::Buffer,
    /// (vocabulary, d); `None`: the embedding.
    pub head: Option<B::Matrix>,
    /// (positions, head_dim): see [`rope::table`].
    pub rope: B::Buffer,
}

/// The matrices of one layer.
pub(super) struct LayerWeights<B: Backend> {
    /// (1, d).
    pub input_norm: B::Buffer,
    /// (q + k + v, d).
    pub qkv: B::Matrix,
    /// (d, q).
    pub output: B::Matrix,
    /// (1, d).
    pub mlp_norm: B::Buffer,
    /// (2m, d): gate, up.
    pub gate_up: B::Matrix,
    /// E (w + 2, m): A_s, A_h, a, b.
    pub experts: Option<(B::Matrix, ExpertShape)>,
    /// (d, m), extended by [s_s B_s | s_h B_h] (d, w).
    pub down: B::Matrix,
}

impl<B: Backend> Weights<B> {
    pub(super) fn upload(
        backend: &B,
        checkpoint: &Checkpoint,
        format: WeightFormat,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let uploader = Uploader {
            backend,
            config: &checkpoint.config,
            format,
        };
        let BaseTensors {
            embed_tokens,
            layers,
            norm,
            lm_head,
        } = &checkpoint.base;
        let experts = checkpoint.experts.as_ref();
        let layers = layers.iter().enumerate();
        let mut rope = backend.buffer(positions, checkpoint.config.head_dim)?;
        backend.write(&mut rope, &rope::table(&checkpoint.config, positions))?;
        Ok(Self {
            embed: uploader.matrix("model.embed_tokens", &[embed_tokens], None)?,
            layers: layers
                .map(|(index, tensors)| uploader.layer(index, tensors, experts))
                .collect::<Result<_, _>>()?,
            norm: uploader.vector(norm)?,
            head: lm_head
                .as_ref()
                .map(|head| uploader.matrix("lm_head", &[head], None))
                .transpose()?,
            rope,
        })
    }

    /// w: both ranks together, 0 without experts.
    pub(super) fn expert_width(&self) -> usize {
        let experts = self.layers.first().and_then(|layer| layer.experts.as_ref());
        experts.map_or(0, |(_, shape)| shape.width())
    }

    pub(super) fn bytes(&self) -> usize {
        let untied = self.head.as_ref().map_or(0, |_| self.embed.bytes());
        self.step_bytes() + untied
    }

    /// What a decode step reads: all but an embedding that is not the head, of which it reads a row a sequence.
    pub(super) fn step_bytes(&self) -> usize {
        let layer = |layer: &LayerWeights<B>| {
            let experts = layer.experts.as_ref().map_or(0, |(e, _)| e.bytes());
            let base = [&layer.qkv, &layer.output, &layer.gate_up, &layer.down];
            experts + base.into_iter().map(Matrix::bytes).sum::<usize>()
        };
        let head = self.head.as_ref().unwrap_or(&self.embed);
        head.bytes() + self.layers.iter().map(layer).sum::<usize>()
    }
}

struct Uploader<'a, B> {
    backend: &'a B,
    config: &'a LlamaConfig,
    format: WeightFormat,
}

impl<B: Backend> Uploader<'_, B> {
    fn layer(
        &self,
        index: usize,
        tensors: &LayerTensors,
        experts: Option<&Experts>,
    ) -> Result<LayerWeights<B>, ModelError> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let LayerTensors {
            q_proj,
            k_proj,
            v_proj,
            ..
        } = tensors;
        let d = self.config.hidden_size;
        let extension = experts.map(|experts| extension(experts, index, d));
        let extension = extension.as_deref().map(|values| host_matrix(d, values));
        let down = self.matrix(&name("mlp.down_proj"), &[&tensors.down_proj], extension)?;
        Ok(LayerWeights {
            input_norm: self.vector(&tensors.input_layernorm)?,
            qkv: self.matrix(&name("self_attn.qkv_proj"), &[q_proj, k_proj, v_proj], None)?,
            output: self.matrix(&name("self_attn.o_proj"), &[&tensors.o_proj], None)?,
            mlp_norm: self.vector(&tensors.post_attention_layernorm)?,
            gate_up: self.matrix(
                &name("mlp.gate_up_proj"),
                &[&tensors.gate_proj, &tensors.up_proj],
                None,
            )?,
            experts: experts
                .map(|experts| self.experts(&name("mlp.experts"), experts, index))
                .transpose()?,
            down,
        })
    }

    /// E, kept in f32: it is a quarter of a percent of the layer, and the gates then lose nothing.
    fn experts(
        &self,
        name: &str,
        experts: &Experts,
        index: usize,
    ) -> Result<(B::Matrix, ExpertShape), ModelError> {
        let Experts {
            safety,
            helpfulness,
            router,
        } = experts;
        let (gates, m) = (&router[index], self.config.intermediate_size);
        let rows = [
            safety.layers[index].lora_a.as_slice(),
            helpfulness.layers[index].lora_a.as_slice(),
            gates.safety.weight.as_slice(),
            gates.helpfulness.weight.as_slice(),
        ]
        .concat();
        let shape = ExpertShape {
            safety_rank: safety.rank,
            helpfulness_rank: helpfulness.rank,
            safety_bias: gates.safety.bias,
            helpfulness_bias: gates.helpfulness.bias,
        };
        let matrix = self.backend.matrix(
            &[host_matrix(rows.len() / m, &rows)],
            None,
            WeightFormat::F32,
        );
        Ok((matrix.map_err(|source| weights_error(name, source))?, shape))
    }

    fn matrix(
        &self,
        name: &str,
        parts: &[&HostTensor],
        extension: Option<HostMatrix<'_>>,
    ) -> Result<B::Matrix, ModelError> {
        let parts: Vec<HostMatrix<'_>> = parts
            .iter()
            .map(|tensor| HostMatrix {
                rows: tensor.shape()[0],
                cols: tensor.shape()[1],
                dtype: tensor.dtype(),
                bytes: tensor.bytes(),
            })
            .collect();
        let matrix = self.backend.matrix(&parts, extension, self.format);
        matrix.map_err(|source| weights_error(name, source))
    }

    fn vector(&self, tensor: &HostTensor) -> Result<B::Buffer, ModelError> {
        let values = tensor.to_f32();
        let mut buffer = self.backend.buffer(1, values.len())?;
        self.backend.write(&mut buffer, &values)?;
        Ok(buffer)
    }
}

fn weights_error(name: &str, source: BackendError) -> ModelError {
    ModelError::Weights {
        name: name.to_owned(),
        source,
    }
}

/// (rows, values / rows) in f32.
fn host_matrix(rows: usize, values: &[f32]) -> HostMatrix<'_> {
    HostMatrix {
        rows,
        cols: values.len() / rows,
        dtype: DType::F32,
        bytes: bytemuck::cast_slice(values),
    }
}

/// [s_s B_s | s_h B_h] (d, w) of layer `index` (MIDPO.md 1, "One write").
fn extension(experts: &Experts, index: usize, d: usize) -> Vec<f32> {
    let width = experts.safety.rank + experts.helpfulness.rank;
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
