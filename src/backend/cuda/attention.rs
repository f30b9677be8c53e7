//! `kernels/attention_decode.cu` for sequences with one row in the step, `kernels/attention_prefill.cu` for the others.

use super::driver::{Driver, Kernel, kernel};
use super::ops::Heads;
use super::tiles::{
    DECODE_HEADS, DECODE_SPLIT, DECODE_WARPS, HEAD_SIZE_MAX, KV_BLOCK, MERGE_WARPS,
    PREFILL_POSITIONS, PREFILL_ROWS, PREFILL_THREADS, WARP,
};
use super::{Arg, Attention, BackendError, Cuda, KvFormat, StepLimits, bind_heads, int};

/// Kernels for heads of up to so many numbers.
struct Instance {
    size: usize,
    decode: Kernel,
    prefill: Kernel,
    /// With K and V of eight bits.
    decode_fp8: Kernel,
    prefill_fp8: Kernel,
}

macro_rules! instance {
    ($size:literal) => {
        Instance {
            size: $size,
            decode: kernel!("attention_decode_", $size),
            prefill: kernel!("attention_prefill_", $size),
            decode_fp8: kernel!("attention_decode_fp8_", $size),
            prefill_fp8: kernel!("attention_prefill_fp8_", $size),
        }
    };
}

const INSTANCES: [Instance; 6] = [
    instance!(16),
    instance!(32),
    instance!(64),
    instance!(80),
    instance!(96),
    instance!(128),
];
const _: () = assert!(INSTANCES[5].size == HEAD_SIZE_MAX);

impl Instance {
    /// The smallest that holds heads of `size`; `bind_heads` has said that there is one.
    fn of(size: usize) -> &'static Self {
        let fits = |instance: &&Self| size <= instance.size;
        INSTANCES.iter().find(fits).unwrap_or(&INSTANCES[5])
    }

    fn decode(&self, format: KvFormat) -> Kernel {
        match format {
            KvFormat::FP8 => self.decode_fp8,
            KvFormat::BF16 | KvFormat::F32 | KvFormat::INT8 => self.decode,
        }
    }

    fn prefill(&self, format: KvFormat) -> Kernel {
        match format {
            KvFormat::FP8 => self.prefill_fp8,
            KvFormat::BF16 | KvFormat::F32 | KvFormat::INT8 => self.prefill,
        }
    }

    /// Bytes of a row in shared memory: attention.cuh, HEAD_PITCH.
    fn pitch(&self) -> usize {
        (self.size + 8) * 2
    }
}

/// Numbers that a split leaves for each head: its part of out, the highest score, the total.
const PARTIAL: usize = HEAD_SIZE_MAX + 2;

/// Bytes that splits leave for the merge, for all steps within `limits`.
pub(super) fn partial_bytes(limits: &StepLimits, heads: Heads) -> usize {
    let splits = limits.positions.div_ceil(DECODE_SPLIT);
    limits.sequences_in_a_step() * splits * heads.query * PARTIAL * 4
}

pub(super) fn attention<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &Attention<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    args.bind(args.step.host(), args.cache.shape())?;
    bind_heads("attention", args.heads)?;
    if args.heads.query * args.heads.size == 0 {
        return Ok(());
    }
    decode(cuda, args)?;
    prefill(cuda, args)
}

/// What both kernels take from the table of blocks on.
fn operands<D: Driver>(
    cuda: &Cuda<D>,
    args: &Attention<'_, Cuda<D>>,
) -> Result<[Arg; 7], BackendError> {
    let driver = &cuda.driver;
    // exp2 in the kernels: softmax's base is folded into the scale.
    let scale = std::f32::consts::LOG2_E / (args.heads.size as f32).sqrt();
    Ok([
        Arg::Pointer(args.step.blocks(driver)),
        int(args.heads.query),
        int(args.heads.kv),
        int(args.heads.size),
        int(args.qkv.stride()),
        int(args.y.stride()),
        Arg::F32(scale),
    ])
}

/// `first`, then `second`: N = A + B.
fn both<const A: usize, const B: usize, const N: usize>(
    first: [Arg; A],
    second: [Arg; B],
) -> [Arg; N] {
    const { assert!(A + B == N, "all of both") };
    let mut all = [Arg::Pointer(0); N];
    all[..A].copy_from_slice(&first);
    all[A..].copy_from_slice(&second);
    all
}

fn decode<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &Attention<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    let rows = args.step.single_rows(&cuda.driver);
    if rows.count == 0 {
        return Ok(());
    }
    let (heads, limits) = (args.heads, args.step.host().limits());
    let splits = rows.longest.div_ceil(DECODE_SPLIT);
    let bytes = partial_bytes(limits, heads);
    let partials = cuda.attention_partials.reserve(&cuda.driver, bytes)?;
    let driver = &cuda.driver;
    let (k, v) = args.cache.layer(driver, args.layer);
    let instance = Instance::of(heads.size);
    let y = Arg::Pointer(args.y.activations(driver, "attention", "y")?);
    let list = [
        y,
        Arg::Pointer(partials),
        Arg::Pointer(args.qkv.activations(driver, "attention", "qkv")?),
        Arg::Pointer(k),
        Arg::Pointer(v),
        Arg::Pointer(rows.address),
    ];
    let list: [Arg; 13] = both(list, operands(cuda, args)?);
    let head_tiles = (heads.query / heads.kv).div_ceil(DECODE_HEADS);
    let tiles = DECODE_HEADS + DECODE_WARPS * 4 * KV_BLOCK;
    let grid = (
        [rows.count, heads.kv * head_tiles, splits],
        DECODE_WARPS * WARP,
    );
    cuda.launch(
        instance.decode(args.cache.shape().format),
        grid,
        tiles * instance.pitch(),
        &list,
    )?;
    if splits == 1 {
        return Ok(());
    }
    let list = [
        y,
        Arg::Pointer(partials),
        Arg::Pointer(rows.address),
        int(heads.query),
        int(heads.size),
        int(args.y.stride()),
        int(splits),
    ];
    let grid = (
        [rows.count, heads.query.div_ceil(MERGE_WARPS), 1],
        MERGE_WARPS * WARP,
    );
    cuda.launch(kernel!("attention_merge"), grid, 0, &list)
}

fn prefill<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &Attention<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    let driver = &cuda.driver;
    let heads = args.heads;
    let tokens = PREFILL_ROWS / (heads.query / heads.kv);
    let tiles = args.step.tiles(driver, tokens)?;
    if tiles.count == 0 {
        return Ok(());
    }
    let (k, v) = args.cache.layer(driver, args.layer);
    let instance = Instance::of(heads.size);
    let list = [
        Arg::Pointer(args.y.activations(driver, "attention", "y")?),
        Arg::Pointer(args.qkv.activations(driver, "attention", "qkv")?),
        Arg::Pointer(k),
        Arg::Pointer(v),
        Arg::Pointer(tiles.address),
        Arg::Pointer(args.step.sequences(driver)),
    ];
    let list: [Arg; 13] = both(list, operands(cuda, args)?);
    let rows = PREFILL_ROWS + 4 * PREFILL_POSITIONS;
    let grid = ([tiles.count, heads.kv, 1], PREFILL_THREADS);
    cuda.launch(
        instance.prefill(args.cache.shape().format),
        grid,
        rows * instance.pitch(),
        &list,
    )
}
