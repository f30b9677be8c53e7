//! The table of ops: each op's contract, stated once. [`bind`] checks a call against it, `reference.rs` says in plain loops
//! what it means, every backend and every test obeys it.
//!
//! Axes: `n` rows of the step (tokens), `d` hidden size, `m` MLP width, `k` inputs and `o` outputs of a matrix, `w` = both
//! experts' ranks together, `r` rows whose logits are wanted, `l` layers, `c` head size, `p` positions.

use half::bf16;

use super::e4m3;
use super::step::HostStep;
use super::{Backend, BackendError, HostMatrix, KvShape, Matrix, Shaped, WeightFormat};
use crate::dtype::DType;

/// How far a backend may be from the reference, as a fraction of the largest magnitude of the output.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// With f32 storage: sums in any order.
    pub f32: f32,
    /// With bf16 storage of the operand that the op writes or reads back: its roundings.
    pub bf16: f32,
}

/// One op's contract.
#[derive(Debug)]
pub struct Op {
    /// Also the name of its kernel file and of its function in `reference.rs`.
    pub name: &'static str,
    /// What it computes, in MIDPO.md's symbols.
    pub formula: &'static str,
    /// Operands in the order of [`bind`]'s `shapes`: name and axes. An output's name starts with `>`.
    pub operands: &'static [(&'static str, &'static str)],
    /// Layout beyond row-major.
    pub layout: &'static str,
    /// Against `reference.rs`.
    pub tolerance: Tolerance,
}

const SUMS: Tolerance = Tolerance {
    f32: 1e-5,
    bf16: 8e-3,
};
const EXACT: Tolerance = Tolerance {
    f32: 0.0,
    bf16: 0.0,
};

/// Rows of the embedding table.
pub const EMBED: Op = Op {
    name: "embed",
    formula: "x_i = W[token_i], widened exactly",
    operands: &[("table", "v d"), (">x", "n d")],
    layout: "",
    tolerance: EXACT,
};

/// Root-mean-square norm.
pub const RMS_NORM: Op = Op {
    name: "rms_norm",
    formula: "y = x / sqrt(mean(x^2) + eps) * weight",
    operands: &[("x", "n d"), ("weight", "1 d"), (">y", "n d")],
    layout: "",
    tolerance: SUMS,
};

/// Every linear map of the model, with the routed mix as an extension of K.
pub const MATMUL: Op = Op {
    name: "matmul",
    formula: "y (+)= [W | X] [x_k ; x_w]; X is the extension [s B_s | s B_h] (MIDPO.md 1), w = 0 without one; what of W or X is in a block \
              format meets quantise_block(x) where meets_integers says so; a GPU widens it and rounds it to its storage",
    operands: &[("x", "n k+w"), ("w", "o k+w"), (">y", "n o")],
    layout: "W is stored by the backend as it likes; the sum of an element runs over k in a fixed order, whatever n",
    tolerance: SUMS,
};

/// Inputs that share a scale where x meets a block format; divides every block format's length.
pub const INT8_BLOCK: usize = 32;
/// A block whose magnitudes are all below this is 0: the inverse of its scale would overflow.
pub const INT8_LEAST: f32 = 1e-30;

/// Activations as a block format meets them: p = round(x * (127 / max|x|)), to nearest even, and the scale max|x| / 127, so that x is
/// about scale * p. NaN where x is not finite.
///
/// ggml's kernels quantise x by the same rule (Q8_0, Q8_1), so its error is what that format's users know.
pub fn quantise_block(x: &[f32; INT8_BLOCK], p: &mut [i8; INT8_BLOCK]) -> f32 {
    let broken: f32 = x.iter().map(|x| x * 0.0).sum();
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    if most < INT8_LEAST {
        p.fill(0);
        return broken;
    }
    let inverse = 127.0 / most;
    for (p, x) in p.iter_mut().zip(x) {
        *p = (x * inverse).round_ties_even() as i8;
    }
    most / 127.0 + broken
}

/// Whether what is kept as `kept` in a matrix of `inputs` inputs (an extension's excluded) meets [`quantise_block`] of x: block formats
/// do, if whole blocks come before it and the matrix was not made with [`WeightFormat::F32`].
pub fn meets_integers(kept: DType, inputs: usize, format: WeightFormat) -> bool {
    kept.is_quantised() && format != WeightFormat::F32 && inputs.is_multiple_of(INT8_BLOCK)
}

/// K or V of a head as [`super::KvFormat::FP8`] keeps it: codes[i] = e4m3(x[i] * (448 / max|x|)), to nearest even, and the scale max|x| / 448,
/// so that x is about scale * codes. The scale is NaN where x is not finite, and 0 where all of x is below [`INT8_LEAST`].
///
/// A GPU reads scale * code rounded to its storage.
pub fn quantise_head(x: &[f32], codes: &mut [u8]) -> f32 {
    let broken: f32 = x.iter().map(|x| x * 0.0).sum();
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    if most < INT8_LEAST {
        codes.fill(0);
        return broken;
    }
    let inverse = e4m3::LARGEST / most;
    for (code, x) in codes.iter_mut().zip(x) {
        *code = e4m3::encode(x * inverse);
    }
    most / e4m3::LARGEST + broken
}

/// What [`quantise_head`] kept, as f32.
pub fn widen_head(codes: &[u8], scale: f32, x: &mut [f32]) {
    for (x, code) in x.iter_mut().zip(codes) {
        *x = e4m3::decode(*code) * scale;
    }
}

/// How [`super::KvFormat::INT8`] keeps K or V of a head: codes[i] = round(x[i] / scale), to nearest even, with the scale max|x| / 127 in
/// bf16. The scale is NaN where x is not finite, and 0 where all of x is below [`INT8_LEAST`].
#[derive(Clone, Copy, Debug)]
pub struct HeadScale {
    /// What a code is worth.
    pub scale: bf16,
    /// What numbers are multiplied by, before they are rounded.
    pub inverse: f32,
}

impl HeadScale {
    /// That of a head.
    pub fn of(x: &[f32]) -> Self {
        let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        Self::new(most, x.iter().map(|x| x * 0.0).sum())
    }

    /// Of max|x|, and the sum of all x * 0.
    #[inline(always)]
    pub fn new(most: f32, broken: f32) -> Self {
        let scale = match most < INT8_LEAST {
            true => bf16::ZERO,
            false => bf16::from_f32(most / 127.0),
        };
        let inverse = match scale == bf16::ZERO {
            true => 0.0,
            false => 1.0 / scale.to_f32(),
        };
        Self {
            scale: bf16::from_f32(scale.to_f32() + broken),
            inverse,
        }
    }

    /// Of one of its numbers.
    pub fn code(self, x: f32) -> i8 {
        (x * self.inverse).round_ties_even() as i8
    }
}

/// Rotary embedding of q and k, and the new rows of the K/V cache.
pub const ROPE_KV_WRITE: Op = Op {
    name: "rope_kv_write",
    formula: "for q and k: (x_i, x_{i+c/2}) -> (x_i cos - x_{i+c/2} sin, x_{i+c/2} cos + x_i sin); k, v -> cache, each head's c numbers by \
              quantise_head where the cache is of KvFormat::FP8, HeadScale where of KvFormat::INT8",
    operands: &[(">qkv", "n qkv"), ("rope", "p c")],
    layout: "a row of qkv: q heads, k heads, v heads; a row of rope: c/2 cosines, c/2 sines",
    tolerance: SUMS,
};

/// Causal attention over the paged cache.
pub const ATTENTION: Op = Op {
    name: "attention",
    formula: "softmax(q K^T / sqrt(c)) V over positions <= the row's own; query head h reads K/V head h / (heads / kv_heads)",
    operands: &[("qkv", "n qkv"), (">y", "n q")],
    layout: "the cache must already hold this step's k and v (rope_kv_write)",
    tolerance: SUMS,
};

/// The MLP's nonlinearity and the experts' half of the routed layer.
pub const SILU_MUL_EXPERT_MIX: Op = Op {
    name: "silu_mul_expert_mix",
    formula: "h = silu(gate) * up; z = E h, as in MATMUL; alpha = rule_s(z_a), beta = rule_h(z_b); hu = [h ; alpha A_s h ; beta A_h h]",
    operands: &[
        ("gate_up", "n 2m"),
        ("e", "w+2 m"),
        (">hu", "n m+w"),
        (">gates", "n 2l"),
    ],
    layout: "rows of E: A_s, A_h, a, b (biases a0, b0 beside it); gates of layer i in columns 2i (alpha) and 2i + 1 (beta); given >z (n w+2), \
             m is a part of the model's: z is left there, hu = h (n m), and gates are not touched",
    tolerance: SUMS,
};

/// The rest of [`SILU_MUL_EXPERT_MIX`] where z came in parts: their sum, mixed.
pub const EXPERT_MIX: Op = Op {
    name: "expert_mix",
    formula: "alpha = rule_s(z_a), beta = rule_h(z_b); u = [alpha z_s ; beta z_h]",
    operands: &[("z", "n w+2"), (">u", "n w"), (">gates", "n 2l")],
    layout: "z and gates as in silu_mul_expert_mix; z is exact",
    tolerance: SUMS,
};

/// The rows that the head needs.
pub const GATHER_ROWS: Op = Op {
    name: "gather_rows",
    formula: "y_i = x[logit_rows_i]",
    operands: &[("x", "n d"), (">y", "r d")],
    layout: "",
    tolerance: EXACT,
};

/// All ops, for documentation and tests.
pub const ALL: [&Op; 8] = [
    &EMBED,
    &RMS_NORM,
    &MATMUL,
    &ROPE_KV_WRITE,
    &ATTENTION,
    &SILU_MUL_EXPERT_MIX,
    &EXPERT_MIX,
    &GATHER_ROWS,
];

/// Heads of the attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// K/V heads; divides `query`.
    pub kv: usize,
    /// Size of a head, even.
    pub size: usize,
}

impl Heads {
    /// Width of a row of q, k and v together.
    pub fn qkv_width(self) -> usize {
        (self.query + 2 * self.kv) * self.size
    }
}

/// Ranks of the two experts and biases of the folded gates, beside the matrix E.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertShape {
    /// Rows of A_s.
    pub safety_rank: usize,
    /// Rows of A_h.
    pub helpfulness_rank: usize,
    /// a0 of MIDPO.md 1.
    pub safety_bias: f32,
    /// b0: the helpfulness gate's.
    pub helpfulness_bias: f32,
}

impl ExpertShape {
    /// `w`: numbers per token that the experts add behind h.
    pub fn width(&self) -> usize {
        self.safety_rank + self.helpfulness_rank
    }
}

/// Arguments of [`EMBED`]; ids come from the step.
pub struct Embed<'a, B: Backend> {
    /// This step.
    pub step: &'a B::Step,
    /// (v, d).
    pub table: &'a B::Matrix,
    /// (n, d).
    pub x: &'a mut B::Buffer,
}

/// Arguments of [`RMS_NORM`].
pub struct RmsNorm<'a, B: Backend> {
    /// Rows.
    pub n: usize,
    /// (n, d).
    pub x: &'a B::Buffer,
    /// (1, d).
    pub weight: &'a B::Buffer,
    /// Added to the mean square.
    pub eps: f32,
    /// (n, d).
    pub y: &'a mut B::Buffer,
}

/// Arguments of [`MATMUL`].
pub struct MatMul<'a, B: Backend> {
    /// Rows.
    pub n: usize,
    /// (n, k + w).
    pub x: &'a B::Buffer,
    /// (o, k), extension (o, w).
    pub w: &'a B::Matrix,
    /// (n, o).
    pub y: &'a mut B::Buffer,
    /// Add to `y` instead of storing: the residual connection.
    pub add: bool,
}

/// Arguments of [`ROPE_KV_WRITE`].
pub struct RopeKvWrite<'a, B: Backend> {
    /// This step: positions and block tables.
    pub step: &'a B::Step,
    /// Layer of the cache.
    pub layer: usize,
    /// Heads.
    pub heads: Heads,
    /// (p, c).
    pub rope: &'a B::Buffer,
    /// (n, (query + 2 kv) c), rotated in place.
    pub qkv: &'a mut B::Buffer,
    /// Receives k and v.
    pub cache: &'a mut B::KvCache,
}

/// Arguments of [`ATTENTION`].
pub struct Attention<'a, B: Backend> {
    /// This step: positions and block tables.
    pub step: &'a B::Step,
    /// Layer of the cache.
    pub layer: usize,
    /// Heads.
    pub heads: Heads,
    /// (n, (query + 2 kv) c), q already rotated.
    pub qkv: &'a B::Buffer,
    /// K and V.
    pub cache: &'a B::KvCache,
    /// (n, query c).
    pub y: &'a mut B::Buffer,
}

/// Arguments of [`SILU_MUL_EXPERT_MIX`].
pub struct SiluMulExpertMix<'a, B: Backend> {
    /// This step: gate rules.
    pub step: &'a B::Step,
    /// Layer whose columns of `gates` are written.
    pub layer: usize,
    /// (n, 2m): gate, up.
    pub gate_up: &'a B::Buffer,
    /// E (w + 2, m) and its shape; `None` for a plain Llama: then w = 0 and `gates` is left alone.
    pub experts: Option<(&'a B::Matrix, ExpertShape)>,
    /// (n, m + w); (n, m) beside `z`.
    pub hu: &'a mut B::Buffer,
    /// (n, 2l).
    pub gates: &'a mut B::Buffer,
    /// (n, w + 2): receives z where m is a part of the model's, for [`EXPERT_MIX`] to go on from the parts' sum.
    pub z: Option<&'a mut B::Buffer>,
}

/// Arguments of [`EXPERT_MIX`].
pub struct ExpertMix<'a, B: Backend> {
    /// This step: gate rules.
    pub step: &'a B::Step,
    /// Layer whose columns of `gates` are written.
    pub layer: usize,
    /// Ranks and biases.
    pub shape: ExpertShape,
    /// (n, w + 2).
    pub z: &'a B::Buffer,
    /// (n, w).
    pub u: &'a mut B::Buffer,
    /// (n, 2l).
    pub gates: &'a mut B::Buffer,
}

/// Arguments of [`GATHER_ROWS`]; the rows come from the step.
pub struct GatherRows<'a, B: Backend> {
    /// This step: rows whose logits are wanted.
    pub step: &'a B::Step,
    /// (n, d).
    pub x: &'a B::Buffer,
    /// (r, d).
    pub y: &'a mut B::Buffer,
}

/// A buffer may hold more rows than a call uses, never fewer and never of another width.
pub fn bind_rows<S: Shaped>(
    op: &'static Op,
    operand: &'static str,
    buffer: &S,
    rows: usize,
    width: usize,
) -> Result<(), BackendError> {
    if buffer.width() == width && buffer.rows() >= rows {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: op.name,
        operand,
        expected: format!("at least {rows} rows of {width}"),
        found: format!("{} rows of {}", buffer.rows(), buffer.width()),
    })
}

fn bind_value(
    op: &'static Op,
    operand: &'static str,
    expected: usize,
    found: usize,
) -> Result<(), BackendError> {
    if expected == found {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: op.name,
        operand,
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

fn bind_below(
    op: &'static Op,
    operand: &'static str,
    limit: usize,
    needed: usize,
) -> Result<(), BackendError> {
    if needed <= limit {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: op.name,
        operand,
        expected: format!("at least {needed}"),
        found: limit.to_string(),
    })
}

/// Checks whole rows of values that are to be written into `buffer`.
pub fn bind_write<S: Shaped>(buffer: &S, values: &[f32]) -> Result<(), BackendError> {
    let whole = values.len().is_multiple_of(buffer.width().max(1));
    if whole && values.len() <= buffer.rows() * buffer.width() {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: "write",
        operand: "values",
        expected: format!("up to {} rows of {}", buffer.rows(), buffer.width()),
        found: format!("{} numbers", values.len()),
    })
}

/// Checks that `buffer` holds `rows` rows to be read.
pub fn bind_read<S: Shaped>(buffer: &S, rows: usize) -> Result<(), BackendError> {
    if rows <= buffer.rows() {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: "read",
        operand: "rows",
        expected: format!("at most {}", buffer.rows()),
        found: rows.to_string(),
    })
}

/// Checks the parts of a matrix that is to be made; returns o, k and w.
pub fn bind_parts(
    parts: &[HostMatrix<'_>],
    extension: Option<&HostMatrix<'_>>,
) -> Result<(usize, usize, usize), BackendError> {
    let inputs = parts.first().map_or(0, |part| part.cols);
    let outputs = parts.iter().map(|part| part.rows).sum();
    for part in parts {
        bind_part("parts", part, part.rows, inputs)?;
    }
    if let Some(extension) = extension {
        bind_part("extension", extension, outputs, extension.cols)?;
        if !matches!(extension.dtype, DType::F32 | DType::BF16 | DType::Q8_0) {
            return Err(BackendError::Contract {
                op: "matrix",
                operand: "extension",
                expected: "f32, bf16 or q8_0".to_owned(),
                found: extension.dtype.as_str().to_owned(),
            });
        }
    }
    Ok((outputs, inputs, extension.map_or(0, |x| x.cols)))
}

fn bind_part(
    operand: &'static str,
    part: &HostMatrix<'_>,
    rows: usize,
    cols: usize,
) -> Result<(), BackendError> {
    let bytes = part
        .dtype
        .bytes_of(cols)
        .and_then(|row| row.checked_mul(rows));
    if part.rows == rows && part.cols == cols && Some(part.bytes.len()) == bytes {
        return Ok(());
    }
    let name = part.dtype.as_str();
    Err(BackendError::Contract {
        op: "matrix",
        operand,
        expected: format!("{rows} x {cols} of {name} in {bytes:?} bytes"),
        found: format!(
            "{} x {} in {} bytes",
            part.rows,
            part.cols,
            part.bytes.len()
        ),
    })
}

/// Axes of a bound [`MATMUL`].
pub struct MatMulAxes {
    /// Rows.
    pub n: usize,
    /// Inputs of W.
    pub k: usize,
    /// Inputs of the extension.
    pub w: usize,
    /// Outputs.
    pub o: usize,
}

impl<B: Backend> MatMul<'_, B> {
    /// Checks the call; from here on the axes are true.
    pub fn bind(&self) -> Result<MatMulAxes, BackendError> {
        let (o, k, w) = (self.w.outputs(), self.w.inputs(), self.w.extension_inputs());
        bind_rows(&MATMUL, "x", self.x, self.n, k + w)?;
        bind_rows(&MATMUL, "y", self.y, self.n, o)?;
        Ok(MatMulAxes { n: self.n, k, w, o })
    }
}

impl<B: Backend> Embed<'_, B> {
    /// Checks the call for `n` rows whose ids are below `vocabulary`, and returns d.
    pub fn bind(&self, n: usize, vocabulary: usize) -> Result<usize, BackendError> {
        let d = self.table.inputs();
        bind_rows(&EMBED, "x", self.x, n, d)?;
        bind_value(&EMBED, "table.extension", 0, self.table.extension_inputs())?;
        bind_below(&EMBED, "table.outputs", self.table.outputs(), vocabulary)?;
        Ok(d)
    }
}

impl<B: Backend> RmsNorm<'_, B> {
    /// Checks the call and returns d.
    pub fn bind(&self) -> Result<usize, BackendError> {
        let d = self.weight.width();
        bind_rows(&RMS_NORM, "weight", self.weight, 1, d)?;
        bind_rows(&RMS_NORM, "x", self.x, self.n, d)?;
        bind_rows(&RMS_NORM, "y", self.y, self.n, d)?;
        Ok(d)
    }
}

fn bind_cache(
    op: &'static Op,
    shape: KvShape,
    layer: usize,
    heads: Heads,
    blocks: usize,
) -> Result<(), BackendError> {
    bind_value(op, "heads.kv", shape.kv_heads, heads.kv)?;
    bind_value(op, "heads.size", shape.head_size, heads.size)?;
    bind_value(op, "heads.size % 2", 0, heads.size % 2)?;
    bind_value(
        op,
        "heads.query % heads.kv",
        0,
        heads.query % heads.kv.max(1),
    )?;
    bind_below(op, "layer", shape.layers, layer + 1)?;
    bind_below(op, "cache.blocks", shape.blocks, blocks)
}

impl<B: Backend> RopeKvWrite<'_, B> {
    /// Checks the call for `step` and a cache of this shape.
    pub fn bind(&self, step: &HostStep, cache: KvShape) -> Result<(), BackendError> {
        let (op, heads) = (&ROPE_KV_WRITE, self.heads);
        bind_rows(op, "qkv", self.qkv, step.rows(), heads.qkv_width())?;
        bind_rows(op, "rope", self.rope, step.positions_end(), heads.size)?;
        bind_cache(op, cache, self.layer, heads, step.blocks_end())
    }
}

impl<B: Backend> Attention<'_, B> {
    /// Checks the call for `step` and a cache of this shape.
    pub fn bind(&self, step: &HostStep, cache: KvShape) -> Result<(), BackendError> {
        let (op, heads) = (&ATTENTION, self.heads);
        bind_rows(op, "qkv", self.qkv, step.rows(), heads.qkv_width())?;
        bind_rows(op, "y", self.y, step.rows(), heads.query * heads.size)?;
        bind_cache(op, cache, self.layer, heads, step.blocks_end())
    }
}

impl<B: Backend> SiluMulExpertMix<'_, B> {
    /// Checks the call for `n` rows and returns m.
    pub fn bind(&self, n: usize) -> Result<usize, BackendError> {
        let op = &SILU_MUL_EXPERT_MIX;
        let m = self.gate_up.width() / 2;
        bind_value(op, "gate_up % 2", 0, self.gate_up.width() % 2)?;
        let shape = self.experts.as_ref().map(|(_, shape)| shape);
        let w = shape.map_or(0, ExpertShape::width);
        bind_rows(op, "gate_up", self.gate_up, n, 2 * m)?;
        if let Some((e, _)) = &self.experts {
            bind_value(op, "e.inputs", m, e.inputs())?;
            bind_value(op, "e.extension", 0, e.extension_inputs())?;
            bind_value(op, "e.outputs", w + 2, e.outputs())?;
        }
        match (&self.z, shape) {
            (Some(z), _) => {
                bind_rows(op, "z", *z, n, w + 2)?;
                bind_rows(op, "hu", self.hu, n, m)?;
            }
            (None, Some(_)) => {
                bind_rows(op, "hu", self.hu, n, m + w)?;
                bind_gates(op, self.gates, n, self.layer)?;
            }
            (None, None) => bind_rows(op, "hu", self.hu, n, m)?,
        }
        Ok(m)
    }
}

impl<B: Backend> ExpertMix<'_, B> {
    /// Checks the call for `n` rows.
    pub fn bind(&self, n: usize) -> Result<(), BackendError> {
        let (op, w) = (&EXPERT_MIX, self.shape.width());
        bind_rows(op, "z", self.z, n, w + 2)?;
        bind_rows(op, "u", self.u, n, w)?;
        bind_gates(op, self.gates, n, self.layer)
    }
}

fn bind_gates<S: Shaped>(
    op: &'static Op,
    gates: &S,
    n: usize,
    layer: usize,
) -> Result<(), BackendError> {
    bind_rows(op, "gates", gates, n, gates.width().max(2 * (layer + 1)))
}

impl<B: Backend> GatherRows<'_, B> {
    /// Checks the call for `n` rows of which `r` are wanted, and returns d.
    pub fn bind(&self, n: usize, r: usize) -> Result<usize, BackendError> {
        let d = self.x.width();
        bind_rows(&GATHER_ROWS, "x", self.x, n, d)?;
        bind_rows(&GATHER_ROWS, "y", self.y, r, d)?;
        Ok(d)
    }
}
