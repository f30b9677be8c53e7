//! Products: the vendor's where there are any, else `kernels/gemm.cu`.

use super::driver::{Driver, Gemm, kernel};
use super::tiles::{
    GEMM_DEPTH, GEMM_FEW_COLS, GEMM_FEW_ROWS, GEMM_FEW_THREADS, GEMM_MANY_COLS, GEMM_MANY_ROWS,
    GEMM_MANY_THREADS, GEMM_STAGES,
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
    // SAFETY: bind() has checked the shapes, and every row is as long as its stride.
    if !cuda.options.deterministic && unsafe { driver.gemm(&gemm) }? {
        return Ok(());
    }
    own(cuda, &gemm)
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
