// The one header every kernel includes: CUDA or the host emulation (kernels/emu), PTX behind named functions that have a device and an
// emulated body, 16-byte packs, sums over warps and blocks.
#pragma once

#ifdef MIDPO_EMU
#include "cuda_emu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>
#endif

#include "tiles.h"

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// Entry points NAME_bf16 and NAME_f16 of the template NAME<T>: KERNEL(copy, (128), (T* to, const T* from), (to, from))
// A kernel may start while the one before it still runs (src/backend/device), so it waits before it does anything: all
// of it (KERNEL), or the template itself once it has fetched what no kernel writes (EARLY_KERNEL).
#define KERNEL_FOR(name, T_, bounds, params, args, wait)               \
    namespace name##_with_##T_ {                                       \
    using T = T_;                                                      \
    extern "C" __global__ void __launch_bounds__ bounds name##_##T_ params { \
        ptx::let_kernels_behind_start();                               \
        wait;                                                          \
        ::name<T> args;                                                \
    }                                                                  \
    EXPORT(name##_##T_)                                                \
    }
#define KERNEL(name, bounds, params, args)                                          \
    KERNEL_FOR(name, bf16, bounds, params, args, ptx::wait_for_kernels_before()) \
    KERNEL_FOR(name, f16, bounds, params, args, ptx::wait_for_kernels_before())
#define EARLY_KERNEL(name, bounds, params, args)    \
    KERNEL_FOR(name, bf16, bounds, params, args, ) \
    KERNEL_FOR(name, f16, bounds, params, args, )

#ifdef MIDPO_EMU
#define EXPORT(name) static const emu::Entry name##_entry(#name, emu::Thunk<&name>::kinds, &emu::Thunk<&name>::call);
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(emu::dynamic_shared())
#else
#define EXPORT(name)
#define DYNAMIC_SHARED(T, name)                                     \
    extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % WARP; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / WARP; }
constexpr __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr __host__ __device__ int round_up(int a, int b) { return ceil_div(a, b) * b; }

// ---- numbers: arithmetic is f32; bf16 and f16 only convert (their operators would round each step) ----
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half(x); }
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <typename T> __device__ __forceinline__ uint32_t pair_of(float low, float high);
template <> __device__ __forceinline__ uint32_t pair_of<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <> __device__ __forceinline__ uint32_t pair_of<f16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <typename T> __device__ __forceinline__ float2 floats_of(uint32_t pair);
template <> __device__ __forceinline__ float2 floats_of<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> __device__ __forceinline__ float2 floats_of<f16>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// N numbers of two bytes (4 or 8) as one load or store of 2 N bytes. The cast must be to a built-in vector type: nvcc copies a struct
// of pairs member by member, in 32-bit loads.
template <int N> struct PackedWords;
template <> struct PackedWords<4> { using type = uint2; };
template <> struct PackedWords<8> { using type = uint4; };

template <typename T, int N> __device__ __forceinline__ void unpack(float (&v)[N], const typename PackedWords<N>::type& packed) {
    union { typename PackedWords<N>::type packed; uint32_t word[N / 2]; } u;
    u.packed = packed;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        const float2 pair = floats_of<T>(u.word[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}
template <int N, typename T> __device__ __forceinline__ void load(float (&v)[N], const T* p) {
    unpack<T>(v, *reinterpret_cast<const typename PackedWords<N>::type*>(p));
}
template <int N, typename T> __device__ __forceinline__ void store(T* p, const float (&v)[N]) {
    union { typename PackedWords<N>::type packed; uint32_t word[N / 2]; } u;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) u.word[i] = pair_of<T>(v[2 * i], v[2 * i + 1]);
    *reinterpret_cast<typename PackedWords<N>::type*>(p) = u.packed;
}
template <int N> __device__ __forceinline__ void load(float (&v)[N], const float* p) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        const float4 four = reinterpret_cast<const float4*>(p)[i];
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
    }
}
template <int N> __device__ __forceinline__ void store(float* p, const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
        reinterpret_cast<float4*>(p)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

// ---- sums ----
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

// Over a block of THREADS; every thread gets the sum. One call a kernel: `partial` is not guarded against the next.
template <int THREADS> __device__ __forceinline__ float block_sum(float v) {
    static_assert(THREADS % WARP == 0 && THREADS <= 1024, "whole warps");
    __shared__ float partial[THREADS / WARP];
    v = warp_sum(v);
    if (lane_id() == 0) partial[warp_id()] = v;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; ++i) sum += partial[i];
    return sum;
}

// ---- PTX ----
namespace ptx {

#ifndef MIDPO_EMU
__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// Until all kernels before this one are done and what they wrote is seen. Every thread of every kernel calls it: so one that is done tells
// that all before it are, too.
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The kernel behind this one may be put on the device as soon as all blocks of this one are there, beside them.
__device__ __forceinline__ void let_kernels_behind_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 2^x; what is below the normal numbers is 0. exp2f would scale such x first, for results that nothing here can see.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef MIDPO_EMU
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 16 bytes from global to shared memory without passing through registers; zeros when !valid.
__device__ __forceinline__ void cp_async_16(void* shared_to, const void* from, bool valid) {
#ifdef MIDPO_EMU
    emu::async_copy(shared_to, from, 16, valid ? 16 : 0);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared_to)), "l"(from), "r"(bytes) : "memory");
#endif
}

// The same of a stream that goes on behind it: the 256 bytes around go to the L2 cache at once.
__device__ __forceinline__ void cp_async_16_of_stream(void* shared_to, const void* from, bool valid) {
#ifdef MIDPO_EMU
    emu::async_copy(shared_to, from, 16, valid ? 16 : 0);
#else
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared_to)), "l"(from), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef MIDPO_EMU
    emu::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most N of this thread's committed groups are still in flight.
template <int N> __device__ __forceinline__ void cp_async_wait() {
#ifdef MIDPO_EMU
    emu::async_wait(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

#ifdef MIDPO_EMU
// Lane l passes the address of row l % 8 of matrix l / 8 and gets, of each matrix, elements (l / 4, l % 4 * 2 ..+2); transposed: of its transpose.
inline void emulated_ldmatrix(uint32_t (&d)[4], const void* shared_row, bool transposed) {
    struct In { const unsigned char* row; bool transposed; } in{static_cast<const unsigned char*>(shared_row), transposed};
    struct Out { uint32_t r[4]; } out;
    emu::warp_collective(emu::FULL, "ldmatrix.x4", &in, sizeof in, &out, sizeof out, [](emu::WarpSlots& s, unsigned) {
        for (int lane = 0; lane < WARP; ++lane) {
            Out o;
            for (int m = 0; m < 4; ++m) {
                uint16_t half[2];
                for (int i = 0; i < 2; ++i) {
                    int row = lane / 4, col = lane % 4 * 2 + i;
                    if (emu::load<In>(s.in[lane]).transposed) std::swap(row, col);
                    const unsigned char* at = emu::load<In>(s.in[m * 8 + row]).row;
                    if (reinterpret_cast<uintptr_t>(at) % 16) emu::fail("ldmatrix: a row is not 16-byte aligned");
                    half[i] = emu::load<uint16_t>(at + 2 * col);
                }
                o.r[m] = half[0] | uint32_t(half[1]) << 16;
            }
            emu::store(s.out[lane], o);
        }
    });
    for (int i = 0; i < 4; ++i) d[i] = out.r[i];
}
#endif

// Four 8 x 8 matrices of two-byte numbers; lane l passes the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], const void* shared_row) {
#ifdef MIDPO_EMU
    emulated_ldmatrix(d, shared_row, false);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(shared_row)) : "memory");
#endif
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&d)[4], const void* shared_row) {
#ifdef MIDPO_EMU
    emulated_ldmatrix(d, shared_row, true);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared_address(shared_row)) : "memory");
#endif
}

#ifdef MIDPO_EMU
// Adds the exact products in f64 and rounds once; the tensor core's own order and truncation differ in the last bits.
template <typename T> inline void emulated_mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct In { uint32_t a[4], b[2]; float c[4]; } in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
    struct Out { float c[4]; } out;
    emu::warp_collective(emu::FULL, "mma.m16n8k16", &in, sizeof in, &out, sizeof out, [](emu::WarpSlots& s, unsigned) {
        float A[16][16], B[8][16];
        for (int lane = 0; lane < WARP; ++lane) {
            const In v = emu::load<In>(s.in[lane]);
            const int group = lane / 4, pair = lane % 4 * 2;
            for (int r = 0; r < 4; ++r) {
                const float2 x = floats_of<T>(v.a[r]);
                float* at = &A[group + r % 2 * 8][pair + r / 2 * 8];
                at[0] = x.x, at[1] = x.y;
            }
            for (int r = 0; r < 2; ++r) {
                const float2 x = floats_of<T>(v.b[r]);
                float* at = &B[group][pair + r * 8];
                at[0] = x.x, at[1] = x.y;
            }
        }
        for (int lane = 0; lane < WARP; ++lane) {
            const In v = emu::load<In>(s.in[lane]);
            Out o;
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
                double sum = v.c[i];
                for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * double(B[col][k]);
                o.c[i] = float(sum);
            }
            emu::store(s.out[lane], o);
        }
    });
    for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}
#endif

// c (16 x 8, f32) += a (16 x 16, row-major) * b (16 x 8, column-major). Fragments: PTX ISA, "Matrix fragments for mma.m16n8k16".
template <typename T> __device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <> __device__ __forceinline__ void mma_m16n8k16<bf16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MIDPO_EMU
    emulated_mma<bf16>(c, a, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

template <> __device__ __forceinline__ void mma_m16n8k16<f16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MIDPO_EMU
    emulated_mma<f16>(c, a, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace ptx
