//! `kernels/silu_mul_expert_mix.cu` and `kernels/expert_mix.cu`.

use super::driver::{Driver, kernel};
use super::tiles::{
    EXPERT_MIX_THREADS, MIX_BLOCKS, MIX_COLS, MIX_ROWS, MIX_THREADS, MIX_WIDTH, WARP,
};
use super::{
    Arg, BackendError, Buffer, Cuda, ExpertMix, SiluMulExpertMix, StepLimits, Workload, int,
    unsupported,
};

/// `sizeof(MixShared<T>)`: h and A in rows that are 16 bytes longer than they are, a product a warp, dots of parts of rows, gates, the flag of
/// the last block.
const SHARED_BYTES: usize = (MIX_ROWS + MIX_WIDTH) * (MIX_COLS + 8) * 2
    + MIX_THREADS / WARP * MIX_ROWS * MIX_WIDTH * 4
    + (MIX_COLS / (WARP * 8) + 1) * MIX_ROWS * 2 * 4
    + 16;

/// Bytes beside the operands.
#[derive(Default)]
pub(super) struct Rooms {
    /// Sums of each block.
    pub(super) partials: usize,
    /// Counters of the blocks that have arrived.
    pub(super) arrived: usize,
}

impl Rooms {
    pub(super) fn of(work: &Workload) -> Self {
        Self::new(&work.limits, work.mlp_width, work.expert_width)
    }

    /// For all steps within `limits`, h of `m` numbers and experts of `width`.
    pub(super) fn new(limits: &StepLimits, m: usize, width: usize) -> Self {
        if width == 0 {
            return Self::default();
        }
        let tiles = limits.rows.div_ceil(MIX_ROWS);
        Self {
            // Whole packs of four: kernels/silu_mul_expert_mix.cu, partial_pitch.
            partials: tiles * m.div_ceil(MIX_COLS) * MIX_ROWS * (width + 2).next_multiple_of(4) * 4,
            arrived: tiles * 4,
        }
    }
}

pub(super) fn silu_mul_expert_mix<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &SiluMulExpertMix<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    let op = "silu_mul_expert_mix";
    let n = args.step.host().rows();
    let m = args.bind(n)?;
    if !m.is_multiple_of(8) {
        let found = m.to_string();
        return Err(unsupported(op, "gate_up / 2", "a multiple of 8", found));
    }
    if n == 0 || m == 0 {
        return Ok(());
    }
    let splits = m.div_ceil(MIX_COLS);
    let experts = ExpertOperands::of(cuda, args, splits)?;
    let driver = &cuda.driver;
    let z = args.z.as_ref();
    // A block keeps its part of A from tile to tile: where there are many, it takes some.
    let tiles = n.div_ceil(MIX_ROWS);
    let tiles_a_block = (tiles * splits).div_ceil(MIX_BLOCKS);
    let list = [
        Arg::Pointer(args.hu.activations(driver, op, "hu")?),
        Arg::Pointer(args.gate_up.activations(driver, op, "gate_up")?),
        Arg::Pointer(experts.a),
        Arg::Pointer(experts.gate_rows),
        Arg::F32(experts.biases[0]),
        Arg::F32(experts.biases[1]),
        Arg::Pointer(args.step.rules(driver)),
        Arg::Pointer(args.step.sequence_of(driver)),
        Arg::Pointer(experts.gates),
        Arg::Pointer(z.map_or(Ok(0), |z| z.exact(driver, op, "z"))?),
        Arg::Pointer(experts.partials),
        Arg::Pointer(experts.arrived),
        int(n),
        int(m),
        int(experts.width),
        int(experts.safety_rank),
        int(args.hu.stride()),
        int(args.gate_up.stride()),
        int(args.gates.stride()),
        int(z.map_or(0, |z| z.stride())),
        int(tiles_a_block),
    ];
    let grid = ([splits, tiles.div_ceil(tiles_a_block), 1], MIX_THREADS);
    cuda.launch(kernel!("silu_mul_expert_mix"), grid, SHARED_BYTES, &list)
}

pub(super) fn expert_mix<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &ExpertMix<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    let op = "expert_mix";
    let (n, shape, driver) = (args.step.host().rows(), args.shape, &cuda.driver);
    args.bind(n)?;
    if n == 0 {
        return Ok(());
    }
    let list = [
        Arg::Pointer(args.u.activations(driver, op, "u")?),
        Arg::Pointer(args.z.exact(driver, op, "z")?),
        Arg::F32(shape.safety_bias),
        Arg::F32(shape.helpfulness_bias),
        Arg::Pointer(args.step.rules(driver)),
        Arg::Pointer(args.step.sequence_of(driver)),
        Arg::Pointer(gate_columns(driver, op, args.gates, args.layer)?),
        int(shape.width()),
        int(shape.safety_rank),
        int(args.u.stride()),
        int(args.z.stride()),
        int(args.gates.stride()),
    ];
    cuda.launch(
        kernel!("expert_mix"),
        ([n, 1, 1], EXPERT_MIX_THREADS),
        0,
        &list,
    )
}

/// Both columns of `layer`.
fn gate_columns<D: Driver>(
    driver: &D,
    op: &'static str,
    gates: &Buffer<D>,
    layer: usize,
) -> Result<u64, BackendError> {
    Ok(gates.exact(driver, op, "gates")? + 8 * layer as u64)
}

/// What the experts add to the kernel's arguments; all null for a plain Llama.
#[derive(Default)]
struct ExpertOperands {
    a: u64,
    gate_rows: u64,
    biases: [f32; 2],
    gates: u64,
    partials: u64,
    arrived: u64,
    width: usize,
    safety_rank: usize,
}

impl ExpertOperands {
    fn of<D: Driver>(
        cuda: &mut Cuda<D>,
        args: &SiluMulExpertMix<'_, Cuda<D>>,
        splits: usize,
    ) -> Result<Self, BackendError> {
        let Some((e, shape)) = args.experts else {
            return Ok(Self::default());
        };
        let op = "silu_mul_expert_mix";
        let driver = &cuda.driver;
        let gate_rows = e.exact_rows(driver).ok_or_else(|| {
            let found = "a matrix of one storage".to_owned();
            unsupported(op, "e", "what Backend::experts makes", found)
        })?;
        let rooms = Rooms::new(args.step.host().limits(), splits * MIX_COLS, shape.width());
        Ok(Self {
            a: e.address(driver),
            gate_rows,
            biases: [shape.safety_bias, shape.helpfulness_bias],
            gates: gate_columns(driver, op, args.gates, args.layer)?,
            partials: cuda.mix_partials.reserve(driver, rooms.partials)?,
            arrived: cuda.mix_arrived.reserve(driver, rooms.arrived)?,
            width: shape.width(),
            safety_rank: shape.safety_rank,
        })
    }
}
