// The rule of a gate, which silu_mul_expert_mix and expert_mix share.
#pragma once
#include "common.cuh"

// min(max(sigmoid(logit + bias), floor), ceiling); a bias of -inf gives 0 and +inf gives 1; a sigmoid below GATE_LEAST is 0, as
// GateRule::LEAST says.
constexpr float GATE_LEAST = 1e-20f;

__device__ __forceinline__ float gate_of(float logit, const float (&rule)[3]) {
    const float gate = 1.f / (1.f + expf(-(logit + rule[0])));
    return fminf(fmaxf(gate < GATE_LEAST ? 0.f : gate, rule[1]), rule[2]);
}

// The rule of one of a token's gates (0 safety, 1 helpfulness); rules (sequences, 6): bias, floor, ceiling of each.
__device__ __forceinline__ void load_rule(float (&rule)[3], const float* rules, int sequence, int which) {
    const float* of = rules + size_t(sequence) * 6 + which * 3;
    rule[0] = of[0], rule[1] = of[1], rule[2] = of[2];
}
