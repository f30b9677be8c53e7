// rope_kv_write: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a thread owns four pairs (i, i + c/2) of a q or k head, or eight numbers of a v head; all threads of a head are in one block. q is
//        rotated in place, k and v go to the cache and nowhere else (k in qkv stays as it was: attention reads the cache). Lists of the step
//        and the table of angles are there before any of its kernels runs, so they are read before the kernels in front are done
//        (EARLY_KERNEL).
// Bound: memory, n * (2 q + 3 k + 2 v) * sizeof(T) bytes and the rows of the table.
// Checked: 48 registers; LDG.E.128
#include "e4m3.cuh"

// What a thread owns: place of its numbers in the head, and the numbers, of q and k rotated. `kv_head` counts K's heads, then V's.
struct RopePack {
    int kv_head, pack, slot;
    float low[4], high[4];

    __device__ __forceinline__ bool is_v(int kv) const { return kv_head >= kv; }
};

// Reads and rotates; the query's numbers are written where they were. `false`: there is nothing to write to the cache.
template <typename T>
__device__ __forceinline__ bool rotate(RopePack& mine, T* __restrict__ qkv, const float* __restrict__ rope, const int* __restrict__ positions,
                                       const int* __restrict__ slots, int query, int kv, int c, int stride) {
    const int row = blockIdx.x, packs = c / 8;  // of a head: c/2 pairs in fours, or c numbers in eights
    const int head = blockIdx.y * (ROPE_THREADS / packs) + threadIdx.x / packs;
    const bool here = int(threadIdx.x) < ROPE_THREADS / packs * packs && head < query + 2 * kv;
    mine.pack = threadIdx.x % packs, mine.slot = slots[row], mine.kv_head = head - query;
    float cosine[4], sine[4];
    if (here && head < query + kv) {
        const float* table = rope + size_t(positions[row]) * round_up(c, ROW_ALIGN);
        load(cosine, table + mine.pack * 4);
        load(sine, table + c / 2 + mine.pack * 4);
    }
    ptx::wait_for_kernels_before();
    if (!here) return false;
    T* from = qkv + size_t(row) * stride + size_t(head) * c;
    if (mine.is_v(kv)) {
        float v[8];
        load(v, from + mine.pack * 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) mine.low[j] = v[j], mine.high[j] = v[4 + j];
        return mine.slot >= 0;
    }
    float low[4], high[4];
    load(low, from + mine.pack * 4);
    load(high, from + c / 2 + mine.pack * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        mine.low[j] = low[j] * cosine[j] - high[j] * sine[j];
        mine.high[j] = high[j] * cosine[j] + low[j] * sine[j];
    }
    if (head < query) {
        store(from + mine.pack * 4, mine.low);
        store(from + c / 2 + mine.pack * 4, mine.high);
        return false;
    }
    return mine.slot >= 0;
}

// qkv (n, stride): query heads, kv heads of K, of V, each c; rope (p, c_padded) f32: c/2 cosines, c/2 sines; positions, slots (n): a slot is
// block * KV_BLOCK + place in the block, or -1 for a row that only fills a bucket. Caches of this layer (blocks, kv, KV_BLOCK, c). c % 8 == 0.
template <typename T>
__device__ void rope_kv_write(T* __restrict__ qkv, const float* __restrict__ rope, const int* __restrict__ positions,
                              const int* __restrict__ slots, T* __restrict__ k_cache, T* __restrict__ v_cache, int query, int kv, int c,
                              int stride) {
    RopePack mine;
    if (!rotate(mine, qkv, rope, positions, slots, query, kv, c, stride)) return;
    const int kv_head = mine.kv_head % kv;
    const size_t at = (size_t(mine.slot / KV_BLOCK * kv + kv_head) * KV_BLOCK + mine.slot % KV_BLOCK) * c;
    if (mine.is_v(kv)) {
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; ++j) v[j] = mine.low[j], v[4 + j] = mine.high[j];
        store(v_cache + at + mine.pack * 8, v);
        return;
    }
    store(k_cache + at + mine.pack * 4, mine.low);
    store(k_cache + at + c / 2 + mine.pack * 4, mine.high);
}

EARLY_KERNEL(rope_kv_write, (ROPE_THREADS),
             (T* qkv, const float* rope, const int* positions, const int* slots, T* k_cache, T* v_cache, int query, int kv, int c,
              int stride),
             (qkv, rope, positions, slots, k_cache, v_cache, query, kv, c, stride))

// As rope_kv_write, into caches of codes (blocks, kv, e4m3_block_bytes(c)): a head's threads share its largest magnitude.
template <typename T>
__device__ void rope_kv_write_fp8(T* __restrict__ qkv, const float* __restrict__ rope, const int* __restrict__ positions,
                                  const int* __restrict__ slots, uint8_t* __restrict__ k_cache, uint8_t* __restrict__ v_cache, int query,
                                  int kv, int c, int stride) {
    __shared__ float most_of[ROPE_THREADS], broken_of[ROPE_THREADS];
    RopePack mine;
    const bool writes = rotate(mine, qkv, rope, positions, slots, query, kv, c, stride);
    float most = 0.f, broken = 0.f;  // broken: 0, but NaN where any number is not finite
    if (writes) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            most = fmaxf(most, fmaxf(fabsf(mine.low[j]), fabsf(mine.high[j])));
            broken += mine.low[j] * 0.f + mine.high[j] * 0.f;
        }
    }
    most_of[threadIdx.x] = most, broken_of[threadIdx.x] = broken;
    __syncthreads();
    if (!writes) return;
    const int packs = c / 8, first = threadIdx.x / packs * packs;
    for (int i = first; i < first + packs; ++i) most = fmaxf(most, most_of[i]);
    const bool nothing = most < E4M3_NOTHING;
    const float inverse = nothing ? 0.f : E4M3_LARGEST / most;
    const size_t block = size_t(mine.slot / KV_BLOCK * kv + mine.kv_head % kv) * e4m3_block_bytes(c);
    const int place = mine.slot % KV_BLOCK;
    uint8_t* to = (mine.is_v(kv) ? v_cache : k_cache) + block;
    if (mine.is_v(kv)) {
        e4m3_store(to + place * c + mine.pack * 8, mine.low, inverse);
        e4m3_store(to + place * c + mine.pack * 8 + 4, mine.high, inverse);
    } else {
        e4m3_store(to + place * c + mine.pack * 4, mine.low, inverse);
        e4m3_store(to + place * c + c / 2 + mine.pack * 4, mine.high, inverse);
    }
    if (mine.pack > 0) return;
    for (int i = first; i < first + packs; ++i) broken = i == first ? broken_of[i] : broken + broken_of[i];
    reinterpret_cast<float*>(to + KV_BLOCK * c)[place] = nothing ? broken : most / E4M3_LARGEST + broken;
}

EARLY_KERNEL(rope_kv_write_fp8, (ROPE_THREADS),
             (T* qkv, const float* rope, const int* positions, const int* slots, uint8_t* k_cache, uint8_t* v_cache, int query, int kv, int c,
              int stride),
             (qkv, rope, positions, slots, k_cache, v_cache, query, kv, c, stride))
