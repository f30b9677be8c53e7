// embed: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block copies one row of the table, widened, 8 numbers a thread.
// Bound: memory, n * d * (sizeof(T) + 4) bytes.
// Checked: 32 registers; LDG.E.128
#include "common.cuh"

// x (n, d_padded) f32, table (v, d_padded), tokens (n): each below v.
template <typename T>
__device__ void embed(float* __restrict__ x, const T* __restrict__ table, const int* __restrict__ tokens, int d_padded) {
    const T* from = table + size_t(tokens[blockIdx.x]) * d_padded;
    float* to = x + size_t(blockIdx.x) * d_padded;
    for (int i = threadIdx.x * 8; i < d_padded; i += EMBED_THREADS * 8) {
        float v[8];
        load(v, from + i);
        store(to + i, v);
    }
}

KERNEL(embed, (EMBED_THREADS), (float* x, const T* table, const int* tokens, int d_padded), (x, table, tokens, d_padded))
