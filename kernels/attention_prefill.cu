// attention (rows of sequences with more than one row in the step): contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block owns PREFILL_ROWS rows of queries: the heads of one K/V head of some tokens of one sequence. K and V of
//        PREFILL_POSITIONS positions come through shared memory in two stages of cp.async, whole blocks of the paged cache; a warp
//        attends for PREFILL_TILES x 16 rows, so that a fragment of K or V serves that many mma. Tiles of K and V behind the last token
//        are not read, those behind a warp's last are not multiplied, and only those across the diagonal are masked. The tiles with the
//        longest context, a prompt's last, begin first.
// Bound: the tensor cores, 2 c (L + 1) operations a query head and token of context L; memory, K and V once a block.
// Checked: 255 registers; HMMA LDSM LDGSTS
#include "attention.cuh"
#include "e4m3.cuh"

constexpr int PREFILL_WARP_ROWS = PREFILL_ROWS / (PREFILL_THREADS / WARP), PREFILL_TILES = PREFILL_WARP_ROWS / 16;
static_assert(PREFILL_TILES * 16 * (PREFILL_THREADS / WARP) == PREFILL_ROWS, "warps take whole tiles of 16 rows");
static_assert(PREFILL_POSITIONS % KV_BLOCK == 0, "whole blocks of the cache");

// tiles (grid.x, 2): sequence, its first token of this tile; sequences (s, 4): first row in the step, rows, position of the first, place of
// its block table in `blocks`; qkv (n, qkv_stride): rotated q; caches of this layer (blocks, kv, KV_BLOCK, c); y (n, y_stride).
// Grid: (tiles, kv heads). c <= C, c % 8 == 0; query % kv == 0 and query / kv <= PREFILL_ROWS. Caches of numbers, KV = T, or of codes,
// KV = uint8_t, which all threads widen together before they attend.
template <typename T, typename KV, int C>
__device__ __forceinline__ void prefill(T* __restrict__ y, const T* __restrict__ qkv, const KV* __restrict__ k_cache,
                                        const KV* __restrict__ v_cache, const int* __restrict__ tiles, const int* __restrict__ sequences,
                                        const int* __restrict__ blocks, int query, int kv, int c, int qkv_stride, int y_stride,
                                        float scale) {
    constexpr bool CODES = sizeof(KV) == 1;
    constexpr int PITCH = HEAD_PITCH<C>, TILE = PREFILL_POSITIONS * PITCH, BLOCKS = PREFILL_POSITIONS / KV_BLOCK;
    DYNAMIC_SHARED(T, shared);
    T* q_tile = shared;
    T* kv_tiles = shared + PREFILL_ROWS * PITCH;  // stage, then K or V
    const int group = query / kv, kv_head = blockIdx.y, tokens = PREFILL_ROWS / group;
    const int* tile = tiles + (gridDim.x - 1 - blockIdx.x) * 2;
    const int* sequence = sequences + tile[0] * 4;
    const int token0 = tile[1], count = min(tokens, sequence[1] - token0);
    const int row0 = sequence[0] + token0, start = sequence[2] + token0;
    const int* table = blocks + sequence[3];
    const int keys = start + count;  // of the last token

    fetch_heads<T, C>(q_tile, PREFILL_ROWS, c, threadIdx.x, PREFILL_THREADS, [&](int r) -> const T* {
        return r < count * group ? qkv + size_t(row0 + r / group) * qkv_stride + (kv_head * group + r % group) * c : nullptr;
    });
    const int stages = ceil_div(keys, PREFILL_POSITIONS);
    // Codes: the first stage's place is for what they widen to, the second's for the codes of both stages.
    const auto codes_of = [&](int stage, int block) -> uint8_t* {
        return reinterpret_cast<uint8_t*>(kv_tiles + 2 * TILE) + (stage % 2 * BLOCKS + block) * 2 * e4m3_block_bytes(C);
    };
    const auto fetch_codes = [&](int stage) {
        const int bytes = e4m3_block_bytes(c);
#pragma unroll 1
        for (int block = 0; block < BLOCKS; ++block) {
            const int at = stage * BLOCKS + block;
            if (at * KV_BLOCK >= keys) break;
            const size_t head = size_t(table[at]) * kv + kv_head;
#pragma unroll 1
            for (int i = 0; i < 2; ++i) {
                const uint8_t* from = reinterpret_cast<const uint8_t*>(i == 0 ? k_cache : v_cache) + head * bytes;
                fetch_bytes(codes_of(stage, block) + i * e4m3_block_bytes(C), from, bytes, threadIdx.x, PREFILL_THREADS);
            }
        }
    };
    const auto widen = [&](int stage) {
#pragma unroll 1
        for (int block = 0; block < BLOCKS; ++block) {
            const int rows = keys - (stage * BLOCKS + block) * KV_BLOCK;
#pragma unroll 1
            for (int i = 0; i < 2; ++i)
                e4m3_widen_block<T, C, PITCH>(kv_tiles + i * TILE + block * KV_BLOCK * PITCH, codes_of(stage, block) + i * e4m3_block_bytes(C), rows,
                                              c, threadIdx.x, PREFILL_THREADS);
        }
        __syncthreads();
    };
    const auto fetch = [&](int stage) {
        if (CODES && stage < stages) {
            fetch_codes(stage);
        } else if (stage < stages) {
            const auto row_of = [&](const KV* codes_or_numbers) {
                const T* cache = reinterpret_cast<const T*>(codes_or_numbers);
                return [=](int r) -> const T* {
                    const int position = stage * PREFILL_POSITIONS + r;
                    if (position >= keys) return nullptr;
                    const size_t head = size_t(table[position / KV_BLOCK]) * kv + kv_head;
                    return cache + (head * KV_BLOCK + position % KV_BLOCK) * c;
                };
            };
            T* at = kv_tiles + stage % 2 * 2 * TILE;
            fetch_heads<T, C>(at, PREFILL_POSITIONS, c, threadIdx.x, PREFILL_THREADS, row_of(k_cache));
            fetch_heads<T, C>(at + TILE, PREFILL_POSITIONS, c, threadIdx.x, PREFILL_THREADS, row_of(v_cache));
        }
        ptx::cp_async_commit();
    };

    const int warp_row = warp_id() * PREFILL_WARP_ROWS, lane = lane_id();
    const auto limit_of = [&](int row) { return min(start + row / group + 1, keys); };  // keys that a row sees
    const int fewest = limit_of(warp_row), most = warp_row < count * group ? limit_of(warp_row + PREFILL_WARP_ROWS - 1) : 0;
    Rows16<T, C, PREFILL_TILES> rows;
    rows.clear();
    fetch(0);
    for (int stage = 0; stage < stages; ++stage) {
        fetch(stage + 1);
        ptx::cp_async_wait<1>();
        __syncthreads();
        const int first = stage * PREFILL_POSITIONS;
        if constexpr (CODES) widen(stage);
        const T* at = CODES ? kv_tiles : kv_tiles + stage % 2 * 2 * TILE;
        int left[PREFILL_TILES][2];
#pragma unroll
        for (int t = 0; t < PREFILL_TILES; ++t)
#pragma unroll
            for (int r = 0; r < 2; ++r) left[t][r] = limit_of(warp_row + t * 16 + lane / 4 + r * 8) - first;
        if (first + PREFILL_POSITIONS <= fewest)
            rows.template attend<PREFILL_POSITIONS, false>(q_tile + warp_row * PITCH, at, at + TILE, left, scale);
        else if (first < most)
            rows.template attend<PREFILL_POSITIONS, true>(q_tile + warp_row * PITCH, at, at + TILE, left, scale);
        __syncthreads();
    }
#pragma unroll
    for (int t = 0; t < PREFILL_TILES; ++t)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = warp_row + t * 16 + lane / 4 + r * 8;
            if (row >= count * group) continue;
            T* to = y + size_t(row0 + row / group) * y_stride + (kv_head * group + row % group) * c;
            const float norm = 1.f / rows.total(t, r);
#pragma unroll
            for (int i = 0; i < C / 8; ++i) {
                if (i * 8 >= c) continue;
                const uint32_t pair = pair_of<T>(rows.out[t][i][r * 2] * norm, rows.out[t][i][r * 2 + 1] * norm);
                *reinterpret_cast<uint32_t*>(to + i * 8 + lane % 4 * 2) = pair;
            }
        }
}

#define PREFILL_OF(name, KV, C)                                                                                                          \
    template <typename T>                                                                                                                \
    __device__ void name(T* y, const T* qkv, const KV* k_cache, const KV* v_cache, const int* tiles, const int* sequences,               \
                         const int* blocks, int query, int kv, int c, int qkv_stride, int y_stride, float scale) {                       \
        prefill<T, KV, C>(y, qkv, k_cache, v_cache, tiles, sequences, blocks, query, kv, c, qkv_stride, y_stride, scale);                \
    }                                                                                                                                    \
    KERNEL(name, (PREFILL_THREADS),                                                                                                      \
           (T * y, const T* qkv, const KV* k_cache, const KV* v_cache, const int* tiles, const int* sequences, const int* blocks,        \
            int query, int kv, int c, int qkv_stride, int y_stride, float scale),                                                        \
           (y, qkv, k_cache, v_cache, tiles, sequences, blocks, query, kv, c, qkv_stride, y_stride, scale))
#define PREFILL(C)                          \
    PREFILL_OF(attention_prefill_##C, T, C) \
    PREFILL_OF(attention_prefill_fp8_##C, uint8_t, C)
PREFILL(16)
PREFILL(32)
PREFILL(64)
PREFILL(80)
PREFILL(96)
PREFILL(128)
