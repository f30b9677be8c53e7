// rope_kv_write: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a thread owns four pairs (i, i + c/2) of a q or k head, or eight numbers of a v head; q is rotated in place, k and v go to the
//        cache and nowhere else (k in qkv stays as it was: attention reads the cache). Lists of the step and the table of angles are there
//        before any of its kernels runs, so they are read before the kernels in front are done (EARLY_KERNEL).
// Bound: memory, n * (2 q + 3 k + 2 v) * sizeof(T) bytes and the rows of the table.
// Checked: 40 registers; LDG.E.128
#include "common.cuh"

// qkv (n, stride): query heads, kv heads of K, of V, each c; rope (p, c_padded) f32: c/2 cosines, c/2 sines; positions, slots (n): a slot is
// block * KV_BLOCK + place in the block, or -1 for a row that only fills a bucket. Caches of this layer (blocks, kv, KV_BLOCK, c). c % 8 == 0.
template <typename T>
__device__ void rope_kv_write(T* __restrict__ qkv, const float* __restrict__ rope, const int* __restrict__ positions,
                              const int* __restrict__ slots, T* __restrict__ k_cache, T* __restrict__ v_cache, int query, int kv, int c,
                              int stride) {
    const int row = blockIdx.x, packs = c / 8;  // of a head: c/2 pairs in fours, or c numbers in eights
    const int i = blockIdx.y * ROPE_THREADS + threadIdx.x;
    const int head = i / packs, pack = i % packs;
    const int slot = slots[row];
    float cosine[4], sine[4];
    if (head < query + kv) {
        const float* table = rope + size_t(positions[row]) * round_up(c, ROW_ALIGN);
        load(cosine, table + pack * 4);
        load(sine, table + c / 2 + pack * 4);
    }
    ptx::wait_for_kernels_before();
    if (head >= query + 2 * kv) return;
    T* from = qkv + size_t(row) * stride + size_t(head) * c;
    const int kv_head = head < query + kv ? head - query : head - query - kv;
    const size_t at = (size_t(slot / KV_BLOCK * kv + kv_head) * KV_BLOCK + slot % KV_BLOCK) * c;
    if (head >= query + kv) {
        if (slot >= 0) *reinterpret_cast<uint4*>(v_cache + at + pack * 8) = *reinterpret_cast<const uint4*>(from + pack * 8);
        return;
    }
    float low[4], high[4], turned_low[4], turned_high[4];
    load(low, from + pack * 4);
    load(high, from + c / 2 + pack * 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        turned_low[j] = low[j] * cosine[j] - high[j] * sine[j];
        turned_high[j] = high[j] * cosine[j] + low[j] * sine[j];
    }
    if (head >= query && slot < 0) return;
    T* to = head < query ? from : k_cache + at;
    store(to + pack * 4, turned_low);
    store(to + c / 2 + pack * 4, turned_high);
}

EARLY_KERNEL(rope_kv_write, (ROPE_THREADS),
             (T* qkv, const float* rope, const int* positions, const int* slots, T* k_cache, T* v_cache, int query, int kv, int c,
              int stride),
             (qkv, rope, positions, slots, k_cache, v_cache, query, kv, c, stride))
