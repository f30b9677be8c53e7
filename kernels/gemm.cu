// matmul: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs. The GEMM of --deterministic, and of the emulation.
// Plan:  a block owns a tile of y; x and W come through shared memory in GEMM_STAGES stages of cp.async, 16 bytes a thread; warps multiply
//        with mma.m16n8k16. Every element adds its k in the same order in one accumulator, whatever the tile: GEMM_FEW and GEMM_MANY
//        give the same bits, so a row's result does not depend on the batch.
// Bound: few rows: memory, o * k * sizeof(T) bytes; many rows: the tensor cores, 2 n o k.
// Checked: 128 registers; HMMA LDSM LDGSTS
#include "common.cuh"

constexpr int GEMM_PITCH = GEMM_DEPTH + 8;  // rows of shared memory an odd number of 16 bytes apart: ldmatrix without bank conflicts

template <typename T, int THREADS, int ROWS>
__device__ __forceinline__ void fetch_tile(T* tile, const T* __restrict__ from, int first, int rows, int k0, int k) {
    for (int i = threadIdx.x; i < ROWS * GEMM_DEPTH / 8; i += THREADS) {
        const int row = i / (GEMM_DEPTH / 8), col = i % (GEMM_DEPTH / 8) * 8;
        const bool valid = first + row < rows && k0 + col < k;
        ptx::cp_async_16(tile + row * GEMM_PITCH + col, valid ? from + size_t(first + row) * k + k0 + col : from, valid);
    }
}

// y (n, y_stride) in Y, x (n, k), w (o, k); k % 8 == 0 and padded with zeros in both. Grid: (tiles of o, tiles of n).
template <typename T, typename Y, int THREADS, int ROWS, int COLS, int WARP_ROWS, int WARP_COLS>
__device__ __forceinline__ void gemm(Y* __restrict__ y, const T* __restrict__ x, const T* __restrict__ w, int n, int o, int k, int y_stride,
                                     int add) {
    constexpr int STAGE = (ROWS + COLS) * GEMM_PITCH, ACROSS = COLS / WARP_COLS;
    static_assert(ROWS / WARP_ROWS * ACROSS * WARP == THREADS && WARP_ROWS % 16 == 0 && WARP_COLS % 16 == 0, "warps cover the tile");
    DYNAMIC_SHARED(T, shared);
    const int row0 = blockIdx.y * ROWS, col0 = blockIdx.x * COLS, lane = lane_id();
    const int warp_row = warp_id() / ACROSS * WARP_ROWS, warp_col = warp_id() % ACROSS * WARP_COLS;
    const int stages = (k + GEMM_DEPTH - 1) / GEMM_DEPTH;
    const auto fetch = [&](int stage) {
        if (stage < stages) {
            T* at = shared + stage % GEMM_STAGES * STAGE;
            fetch_tile<T, THREADS, ROWS>(at, x, row0, n, stage * GEMM_DEPTH, k);
            fetch_tile<T, THREADS, COLS>(at + ROWS * GEMM_PITCH, w, col0, o, stage * GEMM_DEPTH, k);
        }
        ptx::cp_async_commit();
    };

    float sum[WARP_ROWS / 16][WARP_COLS / 8][4] = {};
#pragma unroll
    for (int stage = 0; stage < GEMM_STAGES - 1; ++stage) fetch(stage);
    for (int stage = 0; stage < stages; ++stage) {
        ptx::cp_async_wait<GEMM_STAGES - 2>();
        __syncthreads();  // this stage is there for all, and all are done with the one before it
        fetch(stage + GEMM_STAGES - 1);
        const T* x_tile = shared + stage % GEMM_STAGES * STAGE + warp_row * GEMM_PITCH;
        const T* w_tile = shared + stage % GEMM_STAGES * STAGE + (ROWS + warp_col) * GEMM_PITCH;
#pragma unroll
        for (int kk = 0; kk < GEMM_DEPTH; kk += 16) {
            uint32_t a[WARP_ROWS / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_ROWS / 16; ++i)
                ptx::ldmatrix_x4(a[i], x_tile + (i * 16 + lane % 16) * GEMM_PITCH + kk + lane / 16 * 8);
#pragma unroll
            for (int j = 0; j < WARP_COLS / 16; ++j) {
                uint32_t b[4];  // columns j * 16 ..+8 at k, k + 8, then columns + 8 ..+16
                ptx::ldmatrix_x4(b, w_tile + (j * 16 + lane / 16 * 8 + lane % 8) * GEMM_PITCH + kk + lane / 8 % 2 * 8);
#pragma unroll
                for (int i = 0; i < WARP_ROWS / 16; ++i) {
                    ptx::mma_m16n8k16<T>(sum[i][j * 2], a[i], b[0], b[1]);
                    ptx::mma_m16n8k16<T>(sum[i][j * 2 + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

#pragma unroll
    for (int i = 0; i < WARP_ROWS / 16; ++i)
#pragma unroll
        for (int j = 0; j < WARP_COLS / 8; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int row = row0 + warp_row + i * 16 + lane / 4 + e / 2 * 8;
                const int col = col0 + warp_col + j * 8 + lane % 4 * 2 + e % 2;
                if (row >= n || col >= o) continue;
                Y* at = y + size_t(row) * y_stride + col;
                *at = from_float<Y>(sum[i][j][e] + (add ? to_float(*at) : 0.f));
            }
}

template <typename T> __device__ void gemm_few(T* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add) {
    gemm<T, T, GEMM_FEW_THREADS, GEMM_FEW_ROWS, GEMM_FEW_COLS, 16, 16>(y, x, w, n, o, k, y_stride, add);
}
template <typename T> __device__ void gemm_many(T* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add) {
    gemm<T, T, GEMM_MANY_THREADS, GEMM_MANY_ROWS, GEMM_MANY_COLS, 64, 32>(y, x, w, n, o, k, y_stride, add);
}
template <typename T> __device__ void gemm_few_exact(float* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add) {
    gemm<T, float, GEMM_FEW_THREADS, GEMM_FEW_ROWS, GEMM_FEW_COLS, 16, 16>(y, x, w, n, o, k, y_stride, add);
}
template <typename T> __device__ void gemm_many_exact(float* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add) {
    gemm<T, float, GEMM_MANY_THREADS, GEMM_MANY_ROWS, GEMM_MANY_COLS, 64, 32>(y, x, w, n, o, k, y_stride, add);
}

KERNEL(gemm_few, (GEMM_FEW_THREADS), (T* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add),
       (y, x, w, n, o, k, y_stride, add))
KERNEL(gemm_many, (GEMM_MANY_THREADS), (T* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add),
       (y, x, w, n, o, k, y_stride, add))
KERNEL(gemm_few_exact, (GEMM_FEW_THREADS), (float* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add),
       (y, x, w, n, o, k, y_stride, add))
KERNEL(gemm_many_exact, (GEMM_MANY_THREADS), (float* y, const T* x, const T* w, int n, int o, int k, int y_stride, int add),
       (y, x, w, n, o, k, y_stride, add))
