// rms_norm: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block owns one row. A thread keeps its first eight numbers in registers; where rows are longer than a block's threads take at
//        once, the rest is read once for the sum and once more, from L1 and L2, for the result. The weights are under way before the
//        kernels in front are done (EARLY_KERNEL). The residual is added where it is made, by the product before (gemm with `add`, in
//        f32): added here it would be written, read and rounded to two bytes on its way, and move as many bytes in all.
// Bound: memory, n * d * (4 + sizeof(T)) bytes.
// Checked: 64 registers; LDG.E.128
#include "common.cuh"

// y (n, d_padded); x (n, d_padded) f32, the residual stream; weight (d_padded) f32.
// Padding is zero in x and weight, so it adds nothing to the sum and stays zero in y.
template <typename T>
__device__ void rms_norm(T* __restrict__ y, const float* __restrict__ x, const float* __restrict__ weight, int d, int d_padded, float eps) {
    const size_t row = size_t(blockIdx.x) * d_padded;
    const int first = threadIdx.x * 8;
    float kept[8] = {}, weights[8] = {};
    if (first < d_padded) load(weights, weight + first);
    ptx::wait_for_kernels_before();
    if (first < d_padded) load(kept, x + row + first);
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) sum = fmaf(kept[j], kept[j], sum);
    for (int i = first + NORM_THREADS * 8; i < d_padded; i += NORM_THREADS * 8) {
        float v[8];
        load(v, x + row + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
    }
    const float scale = rsqrtf(block_sum<NORM_THREADS>(sum) / float(d) + eps);
    for (int i = first; i < d_padded; i += NORM_THREADS * 8) {
        if (i > first) load(kept, x + row + i), load(weights, weight + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) kept[j] *= scale * weights[j];
        store(y + row + i, kept);
    }
}

EARLY_KERNEL(rms_norm, (NORM_THREADS), (T* y, const float* x, const float* weight, int d, int d_padded, float eps),
             (y, x, weight, d, d_padded, eps))
