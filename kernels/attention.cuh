// What both attention kernels do for 16 rows of queries in one warp: S = Q K^T, online softmax, O += P V, with mma.m16n8k16 over K and V
// tiles in shared memory. A row is one query head of one token; all rows of a tile share a K/V head (grouped queries).
#pragma once
#include "common.cuh"

// Pitch of a row of C numbers in shared memory: an odd number of 16 bytes, so that ldmatrix has no bank conflicts.
template <int C> constexpr int HEAD_PITCH = C + 8;

// Rows of C numbers, `size` of them real (the rest becomes zero), to shared memory; row(i) is null for a row of zeros.
template <typename T, int C, typename Row>
__device__ __forceinline__ void fetch_heads(T* to, int rows, int size, int thread, int threads, Row row) {
    for (int i = thread; i < rows * (C / 8); i += threads) {
        const int r = i / (C / 8), col = i % (C / 8) * 8;
        const T* from = row(r);
        const bool valid = from && col < size;
        ptx::cp_async_16(to + r * HEAD_PITCH<C> + col, valid ? from + col : nullptr, valid);
    }
}

// The running softmax of 16 rows: this lane holds parts of rows lane / 4 and lane / 4 + 8.
template <typename T, int C> struct Rows16 {
    float out[C / 8][4];
    float highest[2], total[2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < C / 8; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[i][e] = 0.f;
        highest[0] = highest[1] = -CUDART_INF_F;
        total[0] = total[1] = 0.f;
    }

    // Attends to POSITIONS keys; key p is seen by row r of this lane's two if p < limit[r]. scale: log2(e) / sqrt(c), for exp2.
    template <int POSITIONS>
    __device__ __forceinline__ void attend(const T* q, const T* keys, const T* values, const int (&limit)[2], float scale) {
        const int lane = lane_id();
        float score[POSITIONS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < C; k += 16) {
            uint32_t a[4];
            ptx::ldmatrix_x4(a, q + lane % 16 * HEAD_PITCH<C> + k + lane / 16 * 8);
#pragma unroll
            for (int j = 0; j < POSITIONS / 16; ++j) {
                uint32_t b[4];  // keys j * 16 ..+8 at k, k + 8, then keys + 8 ..+16
                ptx::ldmatrix_x4(b, keys + (j * 16 + lane / 16 * 8 + lane % 8) * HEAD_PITCH<C> + k + lane / 8 % 2 * 8);
                ptx::mma_m16n8k16<T>(score[j * 2], a, b[0], b[1]);
                ptx::mma_m16n8k16<T>(score[j * 2 + 1], a, b[2], b[3]);
            }
        }
        uint32_t weight[POSITIONS / 8][2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = highest[r];
#pragma unroll
            for (int j = 0; j < POSITIONS / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& s = score[j][r * 2 + e];
                    s = j * 8 + lane % 4 * 2 + e < limit[r] ? s * scale : -CUDART_INF_F;
                    top = fmaxf(top, s);
                }
            // The four lanes of a row.
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
            top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
            const float base = top == -CUDART_INF_F ? 0.f : top;  // a row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN
            const float keep = exp2f(highest[r] - base);
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < POSITIONS / 8; ++j) {
                const float low = exp2f(score[j][r * 2] - base), high = exp2f(score[j][r * 2 + 1] - base);
                weight[j][r] = pair_of<T>(low, high);
                const float2 rounded = floats_of<T>(weight[j][r]);  // what multiplies V is what the sum must count
                sum += rounded.x + rounded.y;
            }
            total[r] = total[r] * keep + sum;
            highest[r] = top;
#pragma unroll
            for (int i = 0; i < C / 8; ++i) out[i][r * 2] *= keep, out[i][r * 2 + 1] *= keep;
        }
#pragma unroll
        for (int j = 0; j < POSITIONS / 16; ++j) {
            const uint32_t a[4] = {weight[j * 2][0], weight[j * 2][1], weight[j * 2 + 1][0], weight[j * 2 + 1][1]};
#pragma unroll
            for (int i = 0; i < C / 16; ++i) {
                uint32_t b[4];  // columns i * 16 ..+8 of positions j * 16 ..+8, ..+16, then columns + 8 ..+16
                ptx::ldmatrix_x4_transposed(b, values + (j * 16 + lane % 16) * HEAD_PITCH<C> + i * 16 + lane / 16 * 8);
                ptx::mma_m16n8k16<T>(out[i * 2], a, b[0], b[1]);
                ptx::mma_m16n8k16<T>(out[i * 2 + 1], a, b[2], b[3]);
            }
        }
    }

    // Lanes hold parts of a row's total: their sum.
    __device__ __forceinline__ void join() {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
            total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
        }
    }
};
