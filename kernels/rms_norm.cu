// rms_norm: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block owns one row: once over it for the sum, once more, from L1 and L2, for the result. The residual is added where it is
//        made, by the product before (gemm with `add`, in f32): added here it would be written, read and rounded to two bytes on its way,
//        and move as many bytes in all.
// Bound: memory, n * d * (4 + sizeof(T)) bytes.
// Checked: 40 registers; LDG.E.128
#include "common.cuh"

// y (n, d_padded); x (n, d_padded) f32, the residual stream; weight (d_padded) f32.
// Padding is zero in x and weight, so it adds nothing to the sum and stays zero in y.
template <typename T>
__device__ void rms_norm(T* __restrict__ y, const float* __restrict__ x, const float* __restrict__ weight, int d, int d_padded, float eps) {
    const size_t row = size_t(blockIdx.x) * d_padded;
    float sum = 0.f;
    for (int i = threadIdx.x * 8; i < d_padded; i += NORM_THREADS * 8) {
        float v[8];
        load(v, x + row + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(v[j], v[j], sum);
    }
    const float scale = rsqrtf(block_sum<NORM_THREADS>(sum) / float(d) + eps);
    for (int i = threadIdx.x * 8; i < d_padded; i += NORM_THREADS * 8) {
        float v[8], w[8];
        load(v, x + row + i);
        load(w, weight + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] *= scale * w[j];
        store(y + row + i, v);
    }
}

KERNEL(rms_norm, (NORM_THREADS), (T* y, const float* x, const float* weight, int d, int d_padded, float eps),
       (y, x, weight, d, d_padded, eps))
