// gather_rows: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block copies one row, 16 bytes a thread; rows are the residual stream, f32 whatever the storage.
// Bound: memory, 8 * r * d bytes.
// Checked: 32 registers; LDG.E.128
#include "common.cuh"

// y (r, d_padded), x (n, d_padded), rows (r): each below n.
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
gather_rows(float* __restrict__ y, const float* __restrict__ x, const int* __restrict__ rows, int d_padded) {
    ptx::let_kernels_behind_start();
    ptx::wait_for_kernels_before();
    const float4* from = reinterpret_cast<const float4*>(x + size_t(rows[blockIdx.x]) * d_padded);
    float4* to = reinterpret_cast<float4*>(y + size_t(blockIdx.x) * d_padded);
    for (int i = threadIdx.x; i < d_padded / 4; i += GATHER_THREADS) to[i] = from[i];
}
EXPORT(gather_rows)
