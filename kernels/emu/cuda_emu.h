// Host-side stand-in for the part of CUDA C++ that our kernels use, so that g++ can compile a
// kernels/*.cu file and a CPU test can run it. Every device thread is a fiber; a block's fibers
// share one OS thread and switch only at barriers, warp collectives and exit.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __constant__ static
// One block runs at a time on an OS thread, so a static local is the block's storage. It keeps its
// bytes from block to block; only dynamic shared memory is poisoned. Never `extern __shared__` in a
// kernel: DYNAMIC_SHARED (device.cuh) names the dynamic array on both targets.
#define __shared__ static thread_local

struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

struct ThreadView {
    uint3 thread_idx, block_idx;
    dim3 block_dim, grid_dim;
    int linear;  // x fastest, as the hardware numbers threads
};
extern thread_local ThreadView* current;

void block_barrier(const char* what);
// Reduces `value` over the block's live threads: 0 = or, 1 = and, 2 = sum.
int block_reduce(int value, int kind);

// A collective over the lanes of `mask`: each lane hands in `in_size` bytes, the last lane to arrive
// calls `resolve` once for the group, every lane takes `out_size` bytes back.
constexpr size_t LANE_BYTES = 64;
struct WarpSlots {
    alignas(16) unsigned char in[WARP][LANE_BYTES];
    alignas(16) unsigned char out[WARP][LANE_BYTES];
};
using Resolve = void (*)(WarpSlots& slots, unsigned mask);
void warp_collective(unsigned mask, const char* what, const void* in, size_t in_size, void* out,
                     size_t out_size, Resolve resolve);

void* dynamic_shared();
unsigned dynamic_shared_bytes();

// cp.async is lazy on purpose: bytes land only when a wait_group covers them, so a missing or too
// weak wait reads stale (poisoned) shared memory here as it may on the device.
void async_copy(void* dst, const void* src, int bytes, int src_bytes);
void async_commit();
void async_wait(int groups_left);

[[noreturn]] void fail(const char* format, ...);

// ---- kernels by name: what EXPORT leaves behind, with the kinds of the parameters for a check at each launch ----
template <class A> constexpr char kind_of() {
    if constexpr (std::is_pointer_v<A>) return 'p';
    else if constexpr (std::is_same_v<A, int>) return 'i';
    else if constexpr (std::is_same_v<A, unsigned>) return 'u';
    else if constexpr (std::is_same_v<A, float>) return 'f';
    else {
        static_assert(std::is_same_v<A, uint64_t>, "a kernel's parameter is a pointer, int, unsigned, uint64_t or float");
        return 'l';
    }
}
struct Entry {
    const char *name, *kinds;
    void (*call)(const void* const* arguments);
    const Entry* next;
    Entry(const char* name, const char* kinds, void (*call)(const void* const*));
};
template <auto Kernel> struct Thunk;
template <class... A, void (*Kernel)(A...)> struct Thunk<Kernel> {
    static constexpr char kinds[] = {kind_of<A>()..., 0};
    static void call(const void* const* arguments) { call_with(arguments, std::index_sequence_for<A...>{}); }
    template <size_t... I> static void call_with([[maybe_unused]] const void* const* arguments, std::index_sequence<I...>) {
        Kernel(*static_cast<const A*>(arguments[I])...);
    }
};

inline int lane() { return current->linear % WARP; }
template <class T> T load(const unsigned char* p) { T v; std::memcpy(&v, p, sizeof(T)); return v; }
template <class T> void store(unsigned char* p, const T& v) { std::memcpy(p, &v, sizeof(T)); }

template <class T> struct ShflIn { T value; int source; };

template <class T> T shuffle(unsigned mask, T value, int source, const char* what) {
    static_assert(sizeof(ShflIn<T>) <= LANE_BYTES && std::is_trivially_copyable<T>::value, "");
    ShflIn<T> in{value, source};
    T out;
    warp_collective(mask, what, &in, sizeof in, &out, sizeof out, [](WarpSlots& s, unsigned group) {
        for (int l = 0; l < WARP; ++l) {
            if (!(group >> l & 1)) continue;
            int source = load<ShflIn<T>>(s.in[l]).source;
            if (!(group >> source & 1)) fail("shuffle: lane %d reads lane %d outside mask %08x", l, source, group);
            store(s.out[l], load<ShflIn<T>>(s.in[source]).value);
        }
    });
    return out;
}

inline unsigned ballot(unsigned mask, int predicate) {
    unsigned out;
    warp_collective(mask, "__ballot_sync", &predicate, sizeof predicate, &out, sizeof out,
                    [](WarpSlots& s, unsigned group) {
                        unsigned bits = 0;
                        for (int l = 0; l < WARP; ++l)
                            if ((group >> l & 1) && load<int>(s.in[l])) bits |= 1u << l;
                        for (int l = 0; l < WARP; ++l)
                            if (group >> l & 1) store(s.out[l], bits);
                    });
    return out;
}

}  // namespace emu

#define threadIdx (::emu::current->thread_idx)
#define blockIdx (::emu::current->block_idx)
#define blockDim (::emu::current->block_dim)
#define gridDim (::emu::current->grid_dim)
constexpr int warpSize = emu::WARP;

// ---- synchronisation, shuffles, votes -------------------------------------------------------
inline void __syncthreads() { emu::block_barrier("__syncthreads"); }
inline int __syncthreads_or(int p) { return emu::block_reduce(p, 0); }
inline int __syncthreads_and(int p) { return emu::block_reduce(p, 1); }
inline int __syncthreads_count(int p) { return emu::block_reduce(p != 0, 2); }
inline void __syncwarp(unsigned mask = emu::FULL) {
    emu::warp_collective(mask, "__syncwarp", nullptr, 0, nullptr, 0, nullptr);
}
template <class T> T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
    int l = emu::lane();
    return emu::shuffle(mask, v, (l & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32) {
    int l = emu::lane(), source = l ^ lane_mask;
    return emu::shuffle(mask, v, source >= (l & ~(width - 1)) + width ? l : source, "__shfl_xor_sync");
}
template <class T> T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    int l = emu::lane();
    return emu::shuffle(mask, v, (l & (width - 1)) + int(delta) < width ? l + int(delta) : l, "__shfl_down_sync");
}
template <class T> T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32) {
    int l = emu::lane();
    return emu::shuffle(mask, v, (l & (width - 1)) >= int(delta) ? l - int(delta) : l, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) { return emu::ballot(mask, p); }
inline int __any_sync(unsigned mask, int p) { return emu::ballot(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return emu::ballot(mask, p) == mask; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

// ---- atomics: real ones, since another OS thread may run another block of the same grid --------
namespace emu {
template <class T, class F> T atomic_update(T* address, F next) {
    T old, want;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do want = next(old);
    while (!__atomic_compare_exchange(address, &old, &want, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    return old;
}
}  // namespace emu
template <class T> T atomicAdd(T* a, T v) { return emu::atomic_update(a, [v](T o) { return T(o + v); }); }
template <class T> T atomicSub(T* a, T v) { return emu::atomic_update(a, [v](T o) { return T(o - v); }); }
template <class T> T atomicMax(T* a, T v) { return emu::atomic_update(a, [v](T o) { return o < v ? v : o; }); }
template <class T> T atomicMin(T* a, T v) { return emu::atomic_update(a, [v](T o) { return v < o ? v : o; }); }
template <class T> T atomicExch(T* a, T v) { return emu::atomic_update(a, [v](T) { return v; }); }
template <class T> T atomicCAS(T* a, T expected, T v) {
    return emu::atomic_update(a, [=](T o) { return o == expected ? v : o; });
}

// ---- vector types ---------------------------------------------------------------------------
#define EMU_VEC(T, N)                                                                     \
    struct alignas(sizeof(T) * 2) N##2 { T x, y; };                                       \
    struct N##3 { T x, y, z; };                                                           \
    struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) N##4 { T x, y, z, w; };       \
    inline N##2 make_##N##2(T x, T y) { return {x, y}; }                                  \
    inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VEC(float, float)
EMU_VEC(int, int)
#undef EMU_VEC
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, const T& v) { *p = v; }

// ---- bf16 and fp16 --------------------------------------------------------------------------
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }

struct __nv_bfloat16 { uint16_t bits; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
    unsigned u = __float_as_uint(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};  // the device's canonical NaN
    return {uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __float2bfloat16(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16(x), __float2bfloat16(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }

inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return {u}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }

struct __half { uint16_t bits; };
struct alignas(4) __half2 { __half x, y; };
inline float __half2float(__half h) {
    unsigned sign = unsigned(h.bits & 0x8000) << 16, e = h.bits >> 10 & 31, m = h.bits & 0x3ff;
    if (e == 31) return __uint_as_float(sign | 0x7f800000u | m << 13);
    if (e == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(float(m), -24);
    return __uint_as_float(sign | (e + 112) << 23 | m << 13);
}
inline __half __float2half(float f) {
    unsigned u = __float_as_uint(f), a = u & 0x7fffffffu;
    uint16_t sign = uint16_t(u >> 16 & 0x8000);
    if (a > 0x7f800000u) return {0x7fff};
    if (a >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};
    // nearbyint rounds to even; the subnormal step is 2^-24
    if (a < 0x38800000u) return {uint16_t(sign | unsigned(std::nearbyint(std::ldexp(__uint_as_float(a), 24))))};
    a += 0xfffu + (a >> 13 & 1);
    return {uint16_t(sign | (a - 0x38000000u) >> 13)};
}
inline __half __float2half_rn(float f) { return __float2half(f); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }

// ---- maths: exact where the device's fast version is approximate; compare with a tolerance -----
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
#ifndef CUDART_INF_F
#define CUDART_INF_F __builtin_inff()
#endif
