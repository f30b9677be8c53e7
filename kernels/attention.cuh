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

// ROWS rows of a block of the cache, one behind the other, to shared memory by one warp: `rows` are real, `size` of their C numbers, and the
// rest becomes zero.
template <typename T, int C, int ROWS> __device__ __forceinline__ void fetch_block(T* to, const T* from, int rows, int size) {
    constexpr int PACKS = C / 8, TURNS = ROWS * PACKS / WARP;
    static_assert(TURNS * WARP == ROWS * PACKS, "whole turns of a warp");
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
        const int i = turn * WARP + lane_id(), row = i / PACKS, col = i % PACKS * 8;
        ptx::cp_async_16(to + row * HEAD_PITCH<C> + col, from + row * size + col, row < rows && col < size);
    }
}

// `bytes` (whole packs of 16) to shared memory, by `threads` threads of which this is `thread`.
__device__ __forceinline__ void fetch_bytes(uint8_t* to, const uint8_t* from, int bytes, int thread, int threads) {
    for (int i = thread * 16; i < bytes; i += threads * 16) ptx::cp_async_16(to + i, from + i, true);
}

// Two numbers 1 in one word: a column of ones beside V adds up a row's weights.
template <typename T> __device__ __forceinline__ uint32_t pair_of_ones() { return pair_of<T>(1.f, 1.f); }

// The running softmax of TILES x 16 rows: of each tile this lane holds parts of rows lane / 4 and lane / 4 + 8.
template <typename T, int C, int TILES> struct Rows16 {
    float out[TILES][C / 8][4];
    float sum[TILES][4];  // of the weights as they multiply V, rounded: [0] and [2], the whole row's in every lane
    float highest[TILES][2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < C / 8; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) out[tile][i][e] = 0.f;
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[tile][e] = 0.f;
            highest[tile][0] = highest[tile][1] = -CUDART_INF_F;
        }
    }

    __device__ __forceinline__ float total(int tile, int r) const { return sum[tile][r * 2]; }

    // Attends to POSITIONS keys; where MASKED, key p is seen by row r of a tile's two if p < limit[tile][r]. scale: log2(e) / sqrt(c), for
    // exp2.
    template <int POSITIONS, bool MASKED>
    __device__ __forceinline__ void attend(const T* q, const T* keys, const T* values, const int (&limit)[TILES][2], float scale) {
        const int lane = lane_id();
        float score[TILES][POSITIONS / 8][4] = {};
#pragma unroll
        for (int k = 0; k < C; k += 16) {
            uint32_t a[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                ptx::ldmatrix_x4(a[tile], q + (tile * 16 + lane % 16) * HEAD_PITCH<C> + k + lane / 16 * 8);
#pragma unroll
            for (int j = 0; j < POSITIONS / 16; ++j) {
                uint32_t b[4];  // keys j * 16 ..+8 at k, k + 8, then keys + 8 ..+16
                ptx::ldmatrix_x4(b, keys + (j * 16 + lane / 16 * 8 + lane % 8) * HEAD_PITCH<C> + k + lane / 8 % 2 * 8);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    ptx::mma_m16n8k16<T>(score[tile][j * 2], a[tile], b[0], b[1]);
                    ptx::mma_m16n8k16<T>(score[tile][j * 2 + 1], a[tile], b[2], b[3]);
                }
            }
        }
        uint32_t weight[TILES][POSITIONS / 8][2];
        float keep[TILES][2];
        bool moved = false;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float top = -CUDART_INF_F;
#pragma unroll
                for (int j = 0; j < POSITIONS / 8; ++j)
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float& s = score[tile][j][r * 2 + e];
                        if (MASKED && j * 8 + lane % 4 * 2 + e >= limit[tile][r]) s = -CUDART_INF_F;
                        top = fmaxf(top, s);
                    }
                // The four lanes of a row.
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
                top = fmaxf(top * scale, highest[tile][r]);
                const float base = top == -CUDART_INF_F ? 0.f : top;  // a row that has seen nothing yet: exp2(-inf - 0) = 0, not NaN
                keep[tile][r] = ptx::exp2_approx(highest[tile][r] - base);
                moved |= highest[tile][r] != top;
                highest[tile][r] = top;
#pragma unroll
                for (int j = 0; j < POSITIONS / 8; ++j) {
                    const float low = ptx::exp2_approx(fmaf(score[tile][j][r * 2], scale, -base));
                    weight[tile][j][r] = pair_of<T>(low, ptx::exp2_approx(fmaf(score[tile][j][r * 2 + 1], scale, -base)));
                }
            }
        // Seldom after the first positions: where no row of the warp has a new highest score, every `keep` is 1.
        if (__any_sync(ALL_LANES, moved)) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    sum[tile][r * 2] *= keep[tile][r], sum[tile][r * 2 + 1] *= keep[tile][r];
#pragma unroll
                    for (int i = 0; i < C / 8; ++i) out[tile][i][r * 2] *= keep[tile][r], out[tile][i][r * 2 + 1] *= keep[tile][r];
                }
        }
#pragma unroll
        for (int j = 0; j < POSITIONS / 16; ++j) {
            uint32_t a[TILES][4];
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
                a[tile][0] = weight[tile][j * 2][0], a[tile][1] = weight[tile][j * 2][1];
                a[tile][2] = weight[tile][j * 2 + 1][0], a[tile][3] = weight[tile][j * 2 + 1][1];
                ptx::mma_m16n8k16<T>(sum[tile], a[tile], pair_of_ones<T>(), pair_of_ones<T>());
            }
#pragma unroll
            for (int i = 0; i < C / 16; ++i) {
                uint32_t b[4];  // columns i * 16 ..+8 of positions j * 16 ..+8, ..+16, then columns + 8 ..+16
                ptx::ldmatrix_x4_transposed(b, values + (j * 16 + lane % 16) * HEAD_PITCH<C> + i * 16 + lane / 16 * 8);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    ptx::mma_m16n8k16<T>(out[tile][i * 2], a[tile], b[0], b[1]);
                    ptx::mma_m16n8k16<T>(out[tile][i * 2 + 1], a[tile], b[2], b[3]);
                }
            }
        }
    }
};
