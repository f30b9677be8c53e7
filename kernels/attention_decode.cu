// attention (sequences with one row in the step): contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block owns DECODE_SPLIT positions of one sequence and up to DECODE_HEADS query heads of one K/V head, so that K and V are read
//        once for the group. Its warps take turns at the blocks of the cache, each with two stages of cp.async of its own and an online
//        softmax of its own, merged in shared memory in the order of the warps. A sequence of one split is written at once; else
//        attention_merge adds the splits in their order. Splits have one size, so a row's bits depend on nothing but its own length.
//        The step's lists are there before any of its kernels runs: they are read before the kernels in front are done (EARLY_KERNEL).
// Bound: memory, 2 (L + 1) kv c sizeof(T) bytes a sequence of context L. In flight: DECODE_WARPS * 2 stages of K and V, 64 KB at c = 128.
// Checked: 168 registers; HMMA LDSM LDGSTS
#include "attention.cuh"
#include "e4m3.cuh"

constexpr int DECODE_THREADS = DECODE_WARPS * WARP;
static_assert(DECODE_HEADS == 16 && KV_BLOCK == 16, "fragments of mma.m16n8k16");

// What a split leaves for the merge, for each (row, head, split): C numbers of out, then highest and total.
constexpr int PARTIAL = HEAD_SIZE_MAX + 2;

// rows (grid.x, 4) of sequences with one: row in the step, its position, place of the sequence's block table in `blocks`, 0; the rest as in
// attention_prefill; partials (rows, query, splits, PARTIAL). Grid: (rows, kv heads * head tiles, splits). A row of -1 fills a bucket:
// nothing is read or written for it. Caches of numbers, KV = T, or of codes, KV = uint8_t.
template <typename T, typename KV, int C>
__device__ __forceinline__ void decode(T* __restrict__ y, float* __restrict__ partials, const T* __restrict__ qkv,
                                       const KV* __restrict__ k_cache, const KV* __restrict__ v_cache, const int4* __restrict__ rows,
                                       const int* __restrict__ blocks, int query, int kv, int c, int qkv_stride, int y_stride,
                                       float scale) {
    constexpr bool CODES = sizeof(KV) == 1;
    constexpr int PITCH = HEAD_PITCH<C>, TILE = KV_BLOCK * PITCH;
    const int4 place = rows[blockIdx.x];
    const int row = place.x, keys = place.y + 1, first_key = blockIdx.z * DECODE_SPLIT;
    if (row < 0 || first_key >= keys) {
        ptx::wait_for_kernels_before();
        return;
    }
    const int splits = ceil_div(keys, DECODE_SPLIT);
    const int* table = blocks + place.z + first_key / KV_BLOCK;
    const int group = query / kv, head_tiles = ceil_div(group, DECODE_HEADS);
    const int kv_head = blockIdx.y / head_tiles, head0 = blockIdx.y % head_tiles * DECODE_HEADS;
    const int heads = min(DECODE_HEADS, group - head0), count = min(DECODE_SPLIT, keys - first_key);

    DYNAMIC_SHARED(T, shared);
    T* q_tile = shared;
    const int warp = warp_id(), lane = lane_id();
    T* mine = shared + DECODE_HEADS * PITCH + warp * 4 * TILE;  // stage, then K or V
    const int turns = ceil_div(count, KV_BLOCK);
    const int first_block = warp < turns ? table[warp] : 0;
    ptx::wait_for_kernels_before();
    fetch_heads<T, C>(q_tile, DECODE_HEADS, c, threadIdx.x, DECODE_THREADS, [&](int r) -> const T* {
        return r < heads ? qkv + size_t(row) * qkv_stride + (kv_head * group + head0 + r) * c : nullptr;
    });
    ptx::cp_async_commit();

    // Codes: the first stage's place is for what they widen to, the second's for the codes of both stages.
    const auto codes_of = [&](int turn) -> uint8_t* {
        return reinterpret_cast<uint8_t*>(mine + 2 * TILE) + turn / DECODE_WARPS % 2 * 2 * e4m3_block_bytes(C);
    };
    const auto fetch = [&](int turn) {
        if (turn < turns) {
            const size_t head = size_t(turn == warp ? first_block : table[turn]) * kv + kv_head;
            if constexpr (CODES) {
                const int bytes = e4m3_block_bytes(c);
                fetch_bytes(codes_of(turn), k_cache + head * bytes, bytes, lane, WARP);
                fetch_bytes(codes_of(turn) + e4m3_block_bytes(C), v_cache + head * bytes, bytes, lane, WARP);
            } else {
                T* at = mine + turn / DECODE_WARPS % 2 * 2 * TILE;
                fetch_block<T, C, KV_BLOCK>(at, k_cache + head * KV_BLOCK * c, count - turn * KV_BLOCK, c);
                fetch_block<T, C, KV_BLOCK>(at + TILE, v_cache + head * KV_BLOCK * c, count - turn * KV_BLOCK, c);
            }
        }
        ptx::cp_async_commit();
    };
    Rows16<T, C, 1> state;
    state.clear();
    fetch(warp);
    ptx::cp_async_wait<1>();
    __syncthreads();  // the queries are there for all warps
    for (int turn = warp; turn < turns; turn += DECODE_WARPS) {
        fetch(turn + DECODE_WARPS);
        ptx::cp_async_wait<1>();
        __syncwarp();
        T* at = CODES ? mine : mine + turn / DECODE_WARPS % 2 * 2 * TILE;
        const int left = count - turn * KV_BLOCK, limit[1][2] = {{left, left}};
        if constexpr (CODES) {
            e4m3_widen_block<T, C, PITCH>(at, codes_of(turn), left, c, lane, WARP);
            e4m3_widen_block<T, C, PITCH>(at + TILE, codes_of(turn) + e4m3_block_bytes(C), left, c, lane, WARP);
            __syncwarp();
        }
        state.template attend<KV_BLOCK, true>(q_tile, at, at + TILE, limit, scale);
        __syncwarp();
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // K and V are no longer needed: the warps' results take their place

    float* results = reinterpret_cast<float*>(shared);  // (warps, DECODE_HEADS, C + 2)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float* to = results + (warp * DECODE_HEADS + lane / 4 + r * 8) * (C + 2);
#pragma unroll
        for (int i = 0; i < C / 8; ++i) to[i * 8 + lane % 4 * 2] = state.out[0][i][r * 2], to[i * 8 + lane % 4 * 2 + 1] = state.out[0][i][r * 2 + 1];
        if (lane % 4 == 0) to[C] = state.highest[0][r], to[C + 1] = state.total(0, r);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * c; i += DECODE_THREADS) {
        const int head = i / c, col = i % c;
        const float* from = results + head * (C + 2);
        float top = from[C];
#pragma unroll
        for (int w = 1; w < DECODE_WARPS; ++w) top = fmaxf(top, from[w * DECODE_HEADS * (C + 2) + C]);
        float sum = 0.f, total = 0.f;
#pragma unroll
        for (int w = 0; w < DECODE_WARPS; ++w) {
            const float* part = from + w * DECODE_HEADS * (C + 2);
            const float keep = exp2f(part[C] - top);  // a warp without a turn has highest = -inf and weighs 0
            sum += keep * part[col];
            total += keep * part[C + 1];
        }
        const int q_head = kv_head * group + head0 + head;
        if (splits == 1) {
            y[size_t(row) * y_stride + q_head * c + col] = from_float<T>(sum / total);
        } else {
            float* to = partials + ((size_t(blockIdx.x) * query + q_head) * gridDim.z + blockIdx.z) * PARTIAL;
            to[col] = sum;
            if (col == 0) to[HEAD_SIZE_MAX] = top, to[HEAD_SIZE_MAX + 1] = total;
        }
    }
}

#define DECODE_OF(name, KV, C)                                                                                                        \
    template <typename T>                                                                                                             \
    __device__ void name(T* y, float* partials, const T* qkv, const KV* k_cache, const KV* v_cache, const int4* rows,                 \
                         const int* blocks, int query, int kv, int c, int qkv_stride, int y_stride, float scale) {                    \
        decode<T, KV, C>(y, partials, qkv, k_cache, v_cache, rows, blocks, query, kv, c, qkv_stride, y_stride, scale);                \
    }                                                                                                                                 \
    EARLY_KERNEL(name, (DECODE_THREADS, 3),                                                                                           \
                 (T * y, float* partials, const T* qkv, const KV* k_cache, const KV* v_cache, const int4* rows, const int* blocks,    \
                  int query, int kv, int c, int qkv_stride, int y_stride, float scale),                                               \
                 (y, partials, qkv, k_cache, v_cache, rows, blocks, query, kv, c, qkv_stride, y_stride, scale))
#define DECODE(C)                          \
    DECODE_OF(attention_decode_##C, T, C) \
    DECODE_OF(attention_decode_fp8_##C, uint8_t, C)
DECODE(16)
DECODE(32)
DECODE(64)
DECODE(80)
DECODE(96)
DECODE(128)

// y of the sequences with more than one split, from their partials. A warp a head. Grid: (rows, head tiles).
template <typename T>
__device__ void attention_merge(T* __restrict__ y, const float* __restrict__ partials, const int4* __restrict__ rows, int query, int c,
                                int y_stride, int splits_max) {
    const int head = blockIdx.y * MERGE_WARPS + warp_id();
    const int4 place = rows[blockIdx.x];
    if (head >= query || place.x < 0) return;
    const int splits = ceil_div(place.y + 1, DECODE_SPLIT);
    if (splits == 1) return;
    const float* from = partials + (size_t(blockIdx.x) * query + head) * splits_max * PARTIAL;
    float top = from[HEAD_SIZE_MAX];
    for (int split = 1; split < splits; ++split) top = fmaxf(top, from[split * PARTIAL + HEAD_SIZE_MAX]);
    for (int col = lane_id(); col < c; col += WARP) {
        float sum = 0.f, total = 0.f;
        for (int split = 0; split < splits; ++split) {
            const float* part = from + split * PARTIAL;
            const float keep = exp2f(part[HEAD_SIZE_MAX] - top);
            sum += keep * part[col];
            total += keep * part[HEAD_SIZE_MAX + 1];
        }
        y[size_t(place.x) * y_stride + head * c + col] = from_float<T>(sum / total);
    }
}

KERNEL(attention_merge, (MERGE_WARPS * WARP),
       (T* y, const float* partials, const int4* rows, int query, int c, int y_stride, int splits_max),
       (y, partials, rows, query, c, y_stride, splits_max))
