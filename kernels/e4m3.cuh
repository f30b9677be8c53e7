// Floats of eight bits (sign, 4 bits of exponent, 3 of mantissa), as src/backend/e4m3.rs has them, code for code: in plain integer and f32
// arithmetic, so that it is the same on every GPU and under emulation. K and V of KvFormat::FP8: src/backend/ops.rs, quantise_head.
#pragma once
#include "common.cuh"

constexpr float E4M3_LARGEST = 448.f;
constexpr float E4M3_NOTHING = 1e-30f;  // ops.rs, INT8_LEAST: below it the inverse of a scale would overflow

// A block of the cache: KV_BLOCK x c codes, then KV_BLOCK scales.
constexpr __host__ __device__ int e4m3_block_bytes(int c) { return KV_BLOCK * (c + int(sizeof(float))); }

__device__ __forceinline__ uint32_t e4m3_encode(float x) {
    const uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
    if (__uint_as_float(magnitude) < 1.f / 64.f)  // the sum's last bit is worth 2^-9
        return sign | (__float_as_uint(__uint_as_float(magnitude) + 16384.f) - __float_as_uint(16384.f));
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u), code = (rounded >> 20) - (120u << 3);
    return sign | (code < 0x7eu ? code : 0x7eu);
}

__device__ __forceinline__ float e4m3_decode(uint32_t code) {
    const float magnitude = __uint_as_float((code & 0x7fu) << 20) * __uint_as_float(247u << 23);  // a bias that is 120 larger
    return __uint_as_float(__float_as_uint(magnitude) | (code & 0x80u) << 24);
}

// N numbers (4 or 8) as codes of `inverse` times them, the first in the lowest byte.
template <int N> __device__ __forceinline__ void e4m3_store(uint8_t* to, const float (&v)[N], float inverse) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        uint32_t word = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) word |= e4m3_encode(v[i * 4 + j] * inverse) << (8 * j);
        reinterpret_cast<uint32_t*>(to)[i] = word;
    }
}

// `rows` of a block's KV_BLOCK heads of C numbers, as T and HEAD_PITCH<C> apart, from the block `raw` of `size` <= C numbers a head; the rest
// becomes zero. By `threads` threads of which this is `thread`.
template <typename T, int C, int PITCH>
__device__ __forceinline__ void e4m3_widen_block(T* to, const uint8_t* raw, int rows, int size, int thread, int threads) {
    constexpr int PACKS = C / 8;
    const float* scales = reinterpret_cast<const float*>(raw + KV_BLOCK * size);
    for (int i = thread; i < KV_BLOCK * PACKS; i += threads) {
        const int row = i / PACKS, col = i % PACKS * 8;
        float v[8] = {};
        if (row < rows && col < size) {
            const uint2 codes = *reinterpret_cast<const uint2*>(raw + row * size + col);
            const float scale = scales[row];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] = e4m3_decode(codes.x >> (8 * j) & 0xffu) * scale;
                v[4 + j] = e4m3_decode(codes.y >> (8 * j) & 0xffu) * scale;
            }
        }
        store(to + row * PITCH + col, v);
    }
}
