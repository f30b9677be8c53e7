//! Every op in plain loops, summed in f64: the definition of right. Nothing here is fast.

use std::ops::Range;

use half::bf16;

use super::ops::{
    Attention, Embed, ExpertMix, ExpertShape, GatherRows, HeadScale, Heads, INT8_BLOCK, MatMul,
    RmsNorm, RopeKvWrite, SiluMulExpertMix, bind_parts, meets_integers, quantise_block,
    quantise_head, widen_head,
};
use super::step::HostStep;
use super::{
    Backend, BackendError, HostMatrix, KvFormat, KvShape, Matrix, Shaped, StepLayout, StepLimits,
    WeightFormat, Workload,
};
use crate::dtype::DType;
use crate::types::{BLOCK_TOKENS, BlockId, GateOverride};

/// The reference backend: no state, no threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reference;

/// (rows, width), row-major.
#[derive(Clone, Debug)]
pub struct Rows {
    width: usize,
    rows: usize,
    values: Vec<f32>,
}

impl Rows {
    fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..][..self.width]
    }

    fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.values[i * self.width..][..self.width]
    }
}

impl Shaped for Rows {
    fn rows(&self) -> usize {
        self.rows
    }

    fn width(&self) -> usize {
        self.width
    }
}

/// [W | X] (o, k + w), widened.
#[derive(Clone, Debug)]
pub struct WideMatrix {
    outputs: usize,
    inputs: usize,
    extension_inputs: usize,
    values: Vec<f32>,
    /// Of each output: whether it meets x in int8.
    integers: Vec<bool>,
    /// Whether the extension meets its inputs in int8.
    extension_integers: bool,
}

impl WideMatrix {
    fn row(&self, i: usize) -> &[f32] {
        let width = self.inputs + self.extension_inputs;
        &self.values[i * width..][..width]
    }

    /// W x of output `i`; `quantised` is x as block formats meet it.
    fn product(&self, i: usize, x: &[f32], quantised: &[f64]) -> f64 {
        let dot = |at: Range<usize>, integers: bool| {
            let w = self.row(i)[at.clone()].iter().map(|w| f64::from(*w));
            match integers {
                true => w.zip(&quantised[at]).map(|(w, x)| w * x).sum::<f64>(),
                false => w.zip(&x[at]).map(|(w, x)| w * f64::from(*x)).sum(),
            }
        };
        let extension = self.inputs..self.inputs + self.extension_inputs;
        dot(0..self.inputs, self.integers[i]) + dot(extension, self.extension_integers)
    }
}

impl Matrix for WideMatrix {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn inputs(&self) -> usize {
        self.inputs
    }

    fn extension_inputs(&self) -> usize {
        self.extension_inputs
    }

    fn bytes(&self) -> usize {
        self.values.len() * size_of::<f32>()
    }
}

/// K and V, each (layers, blocks, BLOCK_TOKENS, kv_heads, head_size), already rounded as the format says.
#[derive(Clone, Debug)]
pub struct PlainCache {
    shape: KvShape,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl PlainCache {
    /// The head's vector at `position` of a sequence with this `table`.
    fn at(&self, layer: usize, table: &[BlockId], position: usize, head: usize) -> Range<usize> {
        let block = table[position / BLOCK_TOKENS].index();
        let token = (layer * self.shape.blocks + block) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        let start = (token * self.shape.kv_heads + head) * self.shape.head_size;
        start..start + self.shape.head_size
    }

    /// A head's numbers as the cache gives them back.
    fn stored(&self, head: &[f32]) -> Vec<f32> {
        let mut stored = head.to_vec();
        match self.shape.format {
            KvFormat::BF16 => stored
                .iter_mut()
                .for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            KvFormat::F32 => {}
            KvFormat::FP8 => {
                let mut codes = vec![0; head.len()];
                let scale = quantise_head(head, &mut codes);
                widen_head(&codes, scale, &mut stored);
            }
            KvFormat::INT8 => {
                let rule = HeadScale::of(head);
                for x in &mut stored {
                    *x = f32::from(rule.code(*x)) * rule.scale.to_f32();
                }
            }
        }
        stored
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter()
        .zip(b)
        .map(|(a, b)| f64::from(*a) * f64::from(*b))
        .sum()
}

/// x as [`quantise_block`] leaves it (what follows the last whole block is not its to change).
fn quantised(x: &[f32]) -> Vec<f64> {
    let mut wide: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
    let (blocks, _) = x.as_chunks::<INT8_BLOCK>();
    for (x, wide) in blocks.iter().zip(wide.chunks_exact_mut(INT8_BLOCK)) {
        let mut p = [0; INT8_BLOCK];
        let scale = f64::from(quantise_block(x, &mut p));
        wide.iter_mut()
            .zip(p)
            .for_each(|(wide, p)| *wide = scale * f64::from(p));
    }
    wide
}

/// Rotates one head in place; `rope` is a row of the table.
fn rotate(head: &mut [f32], rope: &[f32]) {
    let (low, high) = head.split_at_mut(rope.len() / 2);
    let (cos, sin) = rope.split_at(rope.len() / 2);
    for i in 0..low.len() {
        let (a, b) = (f64::from(low[i]), f64::from(high[i]));
        let (c, s) = (f64::from(cos[i]), f64::from(sin[i]));
        low[i] = (a * c - b * s) as f32;
        high[i] = (b * c + a * s) as f32;
    }
}

/// softmax(q K^T / sqrt(c)) V of one query head over `keys` (ranges of the cache).
fn attend(q: &[f32], keys: &[Range<usize>], cache: &PlainCache, out: &mut [f32]) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let scores: Vec<f64> = keys
        .iter()
        .map(|at| dot(q, &cache.k[at.clone()]) * scale)
        .collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    for (i, out) in out.iter_mut().enumerate() {
        let mixed: f64 = weights
            .iter()
            .zip(keys)
            .map(|(weight, at)| weight * f64::from(cache.v[at.start + i]))
            .sum();
        *out = (mixed / sum) as f32;
    }
}

/// u of a row's z, and its gates.
fn mixed(z: &[f64], shape: &ExpertShape, rules: GateOverride, u: &mut [f32]) -> [f32; 2] {
    let logit = |at: usize, bias: f32| (z[at] + f64::from(bias)) as f32;
    let alpha = rules.safety.apply(logit(shape.width(), shape.safety_bias));
    let beta = rules
        .helpfulness
        .apply(logit(shape.width() + 1, shape.helpfulness_bias));
    for (j, u) in u.iter_mut().enumerate() {
        let gate = if j < shape.safety_rank { alpha } else { beta };
        *u = (f64::from(gate) * z[j]) as f32;
    }
    [alpha, beta]
}

impl Backend for Reference {
    type Buffer = Rows;
    type Matrix = WideMatrix;
    type KvCache = PlainCache;
    type Step = HostStep;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn matrix(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        format: WeightFormat,
    ) -> Result<WideMatrix, BackendError> {
        let (outputs, inputs, extension_inputs) = bind_parts(parts, extension.as_ref())?;
        let mut values = Vec::with_capacity(outputs * (inputs + extension_inputs));
        let mut integers = Vec::with_capacity(outputs);
        let mut widened = vec![0.0; inputs.max(extension_inputs)];
        for (output, (part, row)) in parts
            .iter()
            .flat_map(|part| (0..part.rows).map(move |row| (part, row)))
            .enumerate()
        {
            part.widen_row(row, &mut widened[..inputs]);
            let kept = format.kept(part.dtype, inputs);
            match format {
                WeightFormat::Block(block) if kept == block.dtype() => {
                    kept.widen(&block.quantise(&widened[..inputs]), &mut widened[..inputs]);
                }
                _ if kept == DType::BF16 => {
                    widened[..inputs]
                        .iter_mut()
                        .for_each(|x| *x = bf16::from_f32(*x).to_f32());
                }
                _ => {}
            }
            integers.push(meets_integers(kept, inputs, format));
            values.extend_from_slice(&widened[..inputs]);
            if let Some(extension) = &extension {
                extension.widen_row(output, &mut widened[..extension_inputs]);
                values.extend_from_slice(&widened[..extension_inputs]);
            }
        }
        Ok(WideMatrix {
            outputs,
            inputs,
            extension_inputs,
            values,
            integers,
            extension_integers: extension
                .is_some_and(|extension| meets_integers(extension.dtype, inputs, format)),
        })
    }

    fn matrix_bytes(
        &self,
        parts: &[HostMatrix<'_>],
        extension: Option<HostMatrix<'_>>,
        _: WeightFormat,
    ) -> Result<usize, BackendError> {
        let (outputs, inputs, extension_inputs) = bind_parts(parts, extension.as_ref())?;
        Ok(outputs * (inputs + extension_inputs) * size_of::<f32>())
    }

    fn buffer_bytes(&self, rows: usize, width: usize) -> usize {
        rows.saturating_mul(width).saturating_mul(size_of::<f32>())
    }

    fn buffer(&self, rows: usize, width: usize) -> Result<Rows, BackendError> {
        Ok(Rows {
            width,
            rows,
            values: vec![0.0; rows * width],
        })
    }

    fn write(&self, buffer: &mut Rows, values: &[f32]) -> Result<(), BackendError> {
        super::ops::bind_write(buffer, values)?;
        buffer.values[..values.len()].copy_from_slice(values);
        Ok(())
    }

    fn read<'a>(&'a self, buffer: &'a mut Rows, rows: usize) -> Result<&'a [f32], BackendError> {
        super::ops::bind_read(buffer, rows)?;
        Ok(&buffer.values[..rows * buffer.width])
    }

    fn kv_cache(&self, shape: KvShape) -> Result<PlainCache, BackendError> {
        let numbers = shape.layers * shape.blocks * BLOCK_TOKENS * shape.kv_heads * shape.head_size;
        Ok(PlainCache {
            shape,
            k: vec![0.0; numbers],
            v: vec![0.0; numbers],
        })
    }

    fn kv_block_bytes(&self, shape: KvShape) -> Result<usize, BackendError> {
        let exact = KvShape {
            format: KvFormat::F32,
            ..shape
        };
        Ok(exact.block_bytes())
    }

    fn reserve(&mut self, _: &Workload) -> Result<(), BackendError> {
        Ok(())
    }

    fn workspace_bytes(&self, work: &Workload) -> usize {
        HostStep::bytes(&work.limits)
    }

    fn step(&self, limits: StepLimits) -> Result<HostStep, BackendError> {
        Ok(HostStep::new(limits))
    }

    fn load_step(&self, layout: &StepLayout<'_>, step: &mut HostStep) -> Result<(), BackendError> {
        step.load(layout)
    }

    fn embed(&mut self, args: Embed<'_, Self>) -> Result<(), BackendError> {
        args.bind(args.step.rows(), args.step.limits().vocabulary)?;
        for (i, token) in args.step.tokens().iter().enumerate() {
            args.x
                .row_mut(i)
                .copy_from_slice(args.table.row(token.index()));
        }
        Ok(())
    }

    fn rms_norm(&mut self, args: RmsNorm<'_, Self>) -> Result<(), BackendError> {
        let d = args.bind()?;
        for i in 0..args.n {
            let x = args.x.row(i);
            let scale = 1.0 / (dot(x, x) / d as f64 + f64::from(args.eps)).sqrt();
            for (j, y) in args.y.row_mut(i).iter_mut().enumerate() {
                *y = (f64::from(x[j]) * scale * f64::from(args.weight.row(0)[j])) as f32;
            }
        }
        Ok(())
    }

    fn matmul(&mut self, args: MatMul<'_, Self>) -> Result<(), BackendError> {
        let axes = args.bind()?;
        for i in 0..args.n {
            let x = &args.x.row(i)[..axes.k + axes.w];
            let quantised = quantised(x);
            for (j, y) in args.y.row_mut(i).iter_mut().enumerate() {
                let before = if args.add { f64::from(*y) } else { 0.0 };
                *y = (before + args.w.product(j, x, &quantised)) as f32;
            }
        }
        Ok(())
    }

    fn rope_kv_write(&mut self, args: RopeKvWrite<'_, Self>) -> Result<(), BackendError> {
        let Heads { query, kv, size } = args.heads;
        args.bind(args.step, args.cache.shape)?;
        for sequence in args.step.sequences() {
            for (row, position) in sequence.placed_rows() {
                let qkv = args.qkv.row_mut(row);
                for head in qkv[..(query + kv) * size].chunks_exact_mut(size) {
                    rotate(head, args.rope.row(position));
                }
                for head in 0..kv {
                    let at = args
                        .cache
                        .at(args.layer, sequence.block_table, position, head);
                    let k = args.cache.stored(&qkv[(query + head) * size..][..size]);
                    let v = args
                        .cache
                        .stored(&qkv[(query + kv + head) * size..][..size]);
                    args.cache.k[at.clone()].copy_from_slice(&k);
                    args.cache.v[at].copy_from_slice(&v);
                }
            }
        }
        Ok(())
    }

    fn attention(&mut self, args: Attention<'_, Self>) -> Result<(), BackendError> {
        let Heads { query, kv, size } = args.heads;
        args.bind(args.step, args.cache.shape)?;
        for sequence in args.step.sequences() {
            for (row, position) in sequence.placed_rows() {
                let q = &args.qkv.row(row)[..query * size];
                let y = args.y.row_mut(row);
                for (head, (q, y)) in q
                    .chunks_exact(size)
                    .zip(y.chunks_exact_mut(size))
                    .enumerate()
                {
                    let keys: Vec<_> = (0..=position)
                        .map(|key| {
                            args.cache.at(
                                args.layer,
                                sequence.block_table,
                                key,
                                head / (query / kv),
                            )
                        })
                        .collect();
                    attend(q, &keys, args.cache, y);
                }
            }
        }
        Ok(())
    }

    fn silu_mul_expert_mix(
        &mut self,
        mut args: SiluMulExpertMix<'_, Self>,
    ) -> Result<(), BackendError> {
        let m = args.bind(args.step.rows())?;
        for sequence in args.step.sequences() {
            for (row, _) in sequence.placed_rows() {
                let (gate, up) = args.gate_up.row(row).split_at(m);
                let (h, u) = args.hu.row_mut(row).split_at_mut(m);
                for (j, h) in h.iter_mut().enumerate() {
                    let g = f64::from(gate[j]);
                    *h = (g / (1.0 + (-g).exp()) * f64::from(up[j])) as f32;
                }
                let Some((e, shape)) = &args.experts else {
                    continue;
                };
                let quantised = quantised(h);
                let z: Vec<f64> = (0..e.outputs)
                    .map(|j| e.product(j, h, &quantised))
                    .collect();
                if let Some(part) = &mut args.z {
                    let part = part.row_mut(row).iter_mut();
                    part.zip(z).for_each(|(part, z)| *part = z as f32);
                    continue;
                }
                let gates = mixed(&z, shape, sequence.gates, u);
                args.gates.row_mut(row)[2 * args.layer..][..2].copy_from_slice(&gates);
            }
        }
        Ok(())
    }

    fn expert_mix(&mut self, args: ExpertMix<'_, Self>) -> Result<(), BackendError> {
        args.bind(args.step.rows())?;
        for sequence in args.step.sequences() {
            for (row, _) in sequence.placed_rows() {
                let z: Vec<f64> = args.z.row(row).iter().map(|z| f64::from(*z)).collect();
                let gates = mixed(&z, &args.shape, sequence.gates, args.u.row_mut(row));
                args.gates.row_mut(row)[2 * args.layer..][..2].copy_from_slice(&gates);
            }
        }
        Ok(())
    }

    fn gather_rows(&mut self, args: GatherRows<'_, Self>) -> Result<(), BackendError> {
        args.bind(args.step.rows(), args.step.logit_rows().len())?;
        for (i, row) in args.step.logit_rows().iter().enumerate() {
            args.y.row_mut(i).copy_from_slice(args.x.row(*row));
        }
        Ok(())
    }
}
