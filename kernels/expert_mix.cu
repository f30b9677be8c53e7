// expert_mix: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block mixes one row: both gates by two threads, then u, a number a thread.
// Bound: latency of a launch: a row is w + 2 numbers.
// Checked: 32 registers
#include "gates.cuh"

// u (n, u_stride); z (n, z_stride): z_s, z_h, z_a, z_b; gates: this layer's two columns of (n, gates_stride).
template <typename T>
__device__ void expert_mix(T* u, const float* z, float safety_bias, float helpfulness_bias, const float* rules, const int* sequence_of,
                           float* gates, int w, int safety_rank, int u_stride, int z_stride, int gates_stride) {
    __shared__ float shared[2];
    const int row = blockIdx.x;
    const float* of = z + size_t(row) * z_stride;
    if (threadIdx.x < 2) {
        const int which = threadIdx.x;
        float rule[3];
        load_rule(rule, rules, sequence_of[row], which);
        const float gate = gate_of(of[w + which] + (which ? helpfulness_bias : safety_bias), rule);
        shared[which] = gate;
        gates[size_t(row) * gates_stride + which] = gate;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < w; i += EXPERT_MIX_THREADS)
        u[size_t(row) * u_stride + i] = from_float<T>(shared[i >= safety_rank] * of[i]);
}

KERNEL(expert_mix, (EXPERT_MIX_THREADS),
       (T* u, const float* z, float safety_bias, float helpfulness_bias, const float* rules, const int* sequence_of, float* gates, int w,
        int safety_rank, int u_stride, int z_stride, int gates_stride),
       (u, z, safety_bias, helpfulness_bias, rules, sequence_of, gates, w, safety_rank, u_stride, z_stride, gates_stride))
