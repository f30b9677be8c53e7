// Kernels with one mistake each: tests/faults.rs shows that the emulator catches it.
#include "common.cuh"

// Reads a neighbour's slot with no barrier in between.
extern "C" __global__ void faulty_missing_barrier(int* out) {
    DYNAMIC_SHARED(int, slot);
    slot[threadIdx.x] = int(threadIdx.x);
    out[threadIdx.x] = slot[(threadIdx.x + 1) % blockDim.x];
}
EXPORT(faulty_missing_barrier)

// Half the block never reaches the barrier that a warp of the other half waits behind.
extern "C" __global__ void faulty_divergent_barrier(int* out) {
    if (threadIdx.x < 16) __syncthreads();
    else out[threadIdx.x] = __shfl_xor_sync(ALL_LANES, int(threadIdx.x), 1);
}
EXPORT(faulty_divergent_barrier)

// Reads what cp.async brings without waiting for it.
extern "C" __global__ void faulty_missing_wait(int* out, const int* in) {
    DYNAMIC_SHARED(int, slot);
    ptx::cp_async_16(slot + threadIdx.x * 4, in + threadIdx.x * 4, true);
    ptx::cp_async_commit();
    __syncthreads();
    out[threadIdx.x] = slot[threadIdx.x * 4];
}
EXPORT(faulty_missing_wait)

// Waits for all groups but the one that it reads.
extern "C" __global__ void faulty_weak_wait(int* out, const int* in) {
    DYNAMIC_SHARED(int, slot);
    ptx::cp_async_16(slot + threadIdx.x * 4, in + threadIdx.x * 4, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = slot[threadIdx.x * 4];
}
EXPORT(faulty_weak_wait)

// cp.async from an address that is not a multiple of 16.
extern "C" __global__ void faulty_misaligned_copy(const int* in) {
    DYNAMIC_SHARED(int, slot);
    ptx::cp_async_16(slot + threadIdx.x * 4, in + 1, true);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
}
EXPORT(faulty_misaligned_copy)

// ldmatrix of rows that begin at multiples of 8 bytes.
extern "C" __global__ void faulty_misaligned_ldmatrix(int* out) {
    DYNAMIC_SHARED(unsigned char, tile);
    uint32_t d[4];
    ptx::ldmatrix_x4(d, tile + threadIdx.x * 24);
    out[threadIdx.x] = int(d[0]);
}
EXPORT(faulty_misaligned_ldmatrix)

// A product that half of the warp has left.
extern "C" __global__ void faulty_partial_mma(float* out) {
    float c[4] = {};
    const uint32_t a[4] = {};
    if (threadIdx.x < 16) ptx::mma_m16n8k16<bf16>(c, a, 0, 0);
    else out[threadIdx.x] = __shfl_sync(ALL_LANES, c[0], 0);
}
EXPORT(faulty_partial_mma)

// Writes the same place from every block, first come first served.
extern "C" __global__ void faulty_racing_blocks(int* out) {
    if (threadIdx.x == 0) out[0] = int(blockIdx.x);
}
EXPORT(faulty_racing_blocks)

// One thread past the end of the buffer.
extern "C" __global__ void faulty_out_of_bounds(int* out, int count) {
    const int i = int(threadIdx.x);
    if (i <= count) out[i] = i;
}
EXPORT(faulty_out_of_bounds)

// A 16-byte load from a 4-byte boundary.
extern "C" __global__ void faulty_misaligned(float* out) { out[0] = reinterpret_cast<const float4*>(out + 1)->x; }
EXPORT(faulty_misaligned)

// An index that overflows int.
extern "C" __global__ void faulty_overflow(int* out, int rows) { out[rows * 65536 % 32] = 1; }
EXPORT(faulty_overflow)
