//! Products: of few rows by `kernels/gemm_skinny.cu`, of more by the vendor's library where there is one, else by `kernels/gemm.cu`.

use super::driver::{DeviceShape, Driver, Gemm, Kernel, kernel};
use super::tiles::{
    GEMM_DEPTH, GEMM_FEW_COLS, GEMM_FEW_ROWS, GEMM_FEW_THREADS, GEMM_MANY_COLS, GEMM_MANY_ROWS,
    GEMM_MANY_THREADS, GEMM_STAGES, SKINNY_CHUNK, SKINNY_COLS, SKINNY_ROWS, SKINNY_STAGES,
    SKINNY_THREADS, WARP,
};
use super::{Arg, BackendError, Cuda, MatMul, int};

/// A tile of y.
struct Tile {
    rows: usize,
    cols: usize,
    threads: usize,
}

const FEW: Tile = Tile {
    rows: GEMM_FEW_ROWS,
    cols: GEMM_FEW_COLS,
    threads: GEMM_FEW_THREADS,
};
const MANY: Tile = Tile {
    rows: GEMM_MANY_ROWS,
    cols: GEMM_MANY_COLS,
    threads: GEMM_MANY_THREADS,
};

impl Tile {
    /// Stages of x and W, each row 16 bytes longer than it is (kernels/gemm.cu: GEMM_PITCH).
    fn shared_bytes(&self) -> usize {
        GEMM_STAGES * (self.rows + self.cols) * (GEMM_DEPTH + 8) * 2
    }
}

pub(super) fn matmul<D: Driver>(
    cuda: &mut Cuda<D>,
    args: &MatMul<'_, Cuda<D>>,
) -> Result<(), BackendError> {
    let axes = args.bind()?;
    if axes.n == 0 || axes.o == 0 {
        return Ok(());
    }
    let driver = &cuda.driver;
    let gemm = Gemm {
        n: axes.n,
        o: axes.o,
        k: args.w.stride(),
        storage: cuda.options.storage,
        exact: args.y.is_exact(),
        add: args.add,
        y_stride: args.y.stride(),
        x: args.x.activations(driver, "matmul", "x")?,
        w: args.w.address(driver),
        y: args.y.address(driver),
    };
    if cuda.options.deterministic {
        return own(cuda, &gemm);
    }
    if let Some(kernel) = Skinny::of(&gemm).filter(|kernel| kernel.fits(driver.shape())) {
        return skinny(cuda, &gemm, &kernel);
    }
    // SAFETY: bind() has checked the shapes, and every row is as long as its stride.
    match unsafe { driver.gemm(&gemm) }? {
        true => Ok(()),
        false => own(cuda, &gemm),
    }
}

/// Bytes of partial sums, and of counters of the blocks that have arrived, that any product of few rows needs.
pub(super) fn skinny_rooms(device: DeviceShape) -> [usize; 2] {
    let blocks = device.multiprocessors;
    // A block's part of its first tile and of its last; a tile's counter is that of the block that began it.
    [2 * blocks * SKINNY_ROWS * SKINNY_COLS * 4, blocks * 4]
}

/// An instance of `kernels/gemm_skinny.cu`.
struct Skinny {
    kernel: Kernel,
    /// Of eight rows of x.
    tiles: usize,
}

impl Skinny {
    /// `None`: too many rows.
    fn of(gemm: &Gemm) -> Option<Self> {
        let (tiles, kernel) = match (gemm.n.div_ceil(8), gemm.exact) {
            (0..=1, false) => (1, kernel!("gemm_skinny_1")),
            (0..=1, true) => (1, kernel!("gemm_skinny_1_exact")),
            (2, false) => (2, kernel!("gemm_skinny_2")),
            (2, true) => (2, kernel!("gemm_skinny_2_exact")),
            (3..=4, false) => (4, kernel!("gemm_skinny_4")),
            (3..=4, true) => (4, kernel!("gemm_skinny_4_exact")),
            _ => return None,
        };
        Some(Self { kernel, tiles })
    }

    /// `SkinnyShared<TILES>`: for each warp stages of packs of 16 bytes a lane and sums in rows of four more; the flag of the last block.
    fn shared_bytes(&self) -> usize {
        let stage = (SKINNY_COLS / 8 + self.tiles) * SKINNY_CHUNK / 32 * WARP * 16;
        let sums = self.tiles * 8 * (SKINNY_COLS + 4) * 4;
        SKINNY_THREADS / WARP * (SKINNY_STAGES * stage + sums) + 16
    }

    /// Whether a block finds its room: not for more than 16 rows before Hopper.
    fn fits(&self, device: DeviceShape) -> bool {
        self.shared_bytes() <= device.shared_bytes
    }
}

const _: () = assert!(SKINNY_ROWS == 32, "as many as `Skinny::of` knows");

/// Few rows: W goes by once, at the rate of the memory.
fn skinny<D: Driver>(cuda: &mut Cuda<D>, gemm: &Gemm, skinny: &Skinny) -> Result<(), BackendError> {
    let device = cuda.driver.shape();
    let [partials, arrived] = skinny_rooms(device);
    let partials = cuda.skinny_partials.reserve(&cuda.driver, partials)?;
    let arrived = cuda.skinny_arrived.reserve(&cuda.driver, arrived)?;
    let list = [
        Arg::Pointer(gemm.y),
        Arg::Pointer(gemm.x),
        Arg::Pointer(gemm.w),
        Arg::Pointer(partials),
        Arg::Pointer(arrived),
        int(gemm.n),
        int(gemm.o),
        int(gemm.k),
        int(gemm.y_stride),
        int(usize::from(gemm.add)),
    ];
    // A block a multiprocessor: all run at once, each with the same share of W.
    let units =
        gemm.o.div_ceil(SKINNY_COLS) * gemm.k.div_ceil(SKINNY_THREADS / WARP * SKINNY_CHUNK);
    let grid = ([device.multiprocessors.min(units), 1, 1], SKINNY_THREADS);
    cuda.launch(skinny.kernel, grid, skinny.shared_bytes(), &list)
}

/// Both tiles add an element's products in the same order: which one runs changes no bit.
fn own<D: Driver>(cuda: &Cuda<D>, gemm: &Gemm) -> Result<(), BackendError> {
    let few = gemm.n <= GEMM_FEW_ROWS;
    let (tile, kernel) = match (few, gemm.exact) {
        (true, false) => (FEW, kernel!("gemm_few")),
        (true, true) => (FEW, kernel!("gemm_few_exact")),
        (false, false) => (MANY, kernel!("gemm_many")),
        (false, true) => (MANY, kernel!("gemm_many_exact")),
    };
    let list = [
        Arg::Pointer(gemm.y),
        Arg::Pointer(gemm.x),
        Arg::Pointer(gemm.w),
        int(gemm.n),
        int(gemm.o),
        int(gemm.k),
        int(gemm.y_stride),
        int(usize::from(gemm.add)),
    ];
    let grid = [gemm.o.div_ceil(tile.cols), gemm.n.div_ceil(tile.rows), 1];
    cuda.launch(kernel, (grid, tile.threads), tile.shared_bytes(), &list)
}
