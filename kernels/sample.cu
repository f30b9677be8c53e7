// sample: contract and arithmetic in src/engine/sampler.rs, whose tokens these are to the bit; log-probabilities are rounded in f32.
// Plan:  a block owns a row of logits, which stays in L2 over its passes. One pass finds the largest and checks the row; lists of biases,
//        masked tokens and penalties change the few tokens they name, in a copy; top-k and top-p find the last token that is in by radix
//        selection over the bits of the logit (three histograms of 2048 bins); the draw is the inverse of the cumulative distribution in the
//        vocabulary's order. Counts and probability mass are integers: no order of additions can change a result.
// Bound: latency of up to ten passes over 4 v bytes by one SM; rows run side by side.
// Checked: 64 registers
#include "common.cuh"

constexpr int SAMPLE_WARPS = SAMPLE_THREADS / WARP;
constexpr int BINS_A_THREAD = SAMPLE_BINS / SAMPLE_THREADS;
static_assert(SAMPLE_BINS == 1 << 11, "eleven bits of a key a pass");
enum { NOT_FINITE = -1, NO_TOKEN = -2 };  // instead of a token

using u64 = unsigned long long;

// What a request wants: src/backend/cuda/sample.rs writes it. Lists are ranges of `lists`; biases and history name no token twice.
struct SampleRow {
    double random;  // in [0, 1)
    float scale;    // 1 / temperature; 0: the most likely token
    float least;    // what of the largest logit a token may fall short by, below 0: ln(min_p) * temperature
    float top_p, repetition_penalty, presence_penalty, frequency_penalty;
    uint32_t top_k;                    // 0: all
    int bias_first, bias_count;        // (token, bits of an f32) to add
    int masked_first, masked_count;    // (token): ruled out
    int history_first, history_count;  // (token, times generated): penalised
    int allowed_first;                 // word of `allowed` where this row's bits begin, or -1: all tokens are allowed
    int top;                           // most likely tokens to report, or -1: no log-probability at all
};
static_assert(sizeof(SampleRow) == SAMPLE_ROW_WORDS * 4, "tiles.h");

// Tokens with a larger key are in, and those with this key up to token `last`.
struct Cut {
    uint32_t key;
    int last;
    __device__ __forceinline__ bool holds(uint32_t other, int token) const { return other > key || (other == key && token <= last); }
};

struct SampleShared {
    uint32_t low[SAMPLE_BINS], high[SAMPLE_BINS];
    u64 warps[SAMPLE_WARPS], above, mass;
    uint32_t digit;
    int last, found;
    uint32_t top_key[SAMPLE_TOP];
    int top_token[SAMPLE_TOP];
};

// Order of floats as order of unsigned numbers; both zeros are one.
__device__ __forceinline__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(__fadd_rn(x, 0.f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float of_key(uint32_t key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// engine::sampler's `mass`: exp(x) in units of 2^-30, x <= 0. Every step rounds on its own, on the host too.
__device__ __forceinline__ uint32_t mass_of(float x) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the last bits
    const float t = __fmul_rn(x, 1.442695f);
    if (!(t >= -31.f)) return 0;
    const float shifted = __fadd_rn(t, ROUND);
    const float f = __fadd_rn(t, -__fadd_rn(shifted, -ROUND));
    float p = 0.0001540353f;
    p = __fadd_rn(__fmul_rn(p, f), 0.0013333558f);
    p = __fadd_rn(__fmul_rn(p, f), 0.009618129f);
    p = __fadd_rn(__fmul_rn(p, f), 0.05550411f);
    p = __fadd_rn(__fmul_rn(p, f), 0.2402265f);
    p = __fadd_rn(__fmul_rn(p, f), 0.6931472f);
    p = __fadd_rn(__fmul_rn(p, f), 1.f);
    const int exponent = __float_as_int(shifted) - __float_as_int(ROUND) + 30;
    return uint32_t(__fmul_rn(p, __int_as_float((exponent + 127) << 23)));
}

// Largest over the block; every thread gets it.
__device__ __forceinline__ u64 block_max(SampleShared& shared, u64 v) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, v, step);
        v = other > v ? other : v;
    }
    if (lane_id() == 0) shared.warps[warp_id()] = v;
    __syncthreads();
    for (int i = 0; i < SAMPLE_WARPS; ++i) v = shared.warps[i] > v ? shared.warps[i] : v;
    __syncthreads();
    return v;
}

// The sum over the lanes up to this one.
__device__ __forceinline__ u64 warp_upto(u64 sum) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const u64 other = __shfl_up_sync(ALL_LANES, sum, step);
        if (lane_id() >= step) sum += other;
    }
    return sum;
}

// The sum over the threads before this one; `total`: over all.
__device__ __forceinline__ u64 block_before(SampleShared& shared, u64 mine, u64& total) {
    const u64 sum = warp_upto(mine);
    if (lane_id() == WARP - 1) shared.warps[warp_id()] = sum;
    __syncthreads();
    u64 before = sum - mine;
    total = 0;
    for (int i = 0; i < SAMPLE_WARPS; ++i) {
        if (i < warp_id()) before += shared.warps[i];
        total += shared.warps[i];
    }
    __syncthreads();
    return before;
}

// The largest number and its first token, as one key above all of whose row is finite or -inf; 0 for a row of no numbers.
__device__ __forceinline__ u64 largest(SampleShared& shared, const float* row, int v) {
    u64 best = 0;
    for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) {
        const float x = row[token];
        const u64 key = x < CUDART_INF_F ? u64(key_of(x)) << 32 | uint32_t(~token) : ~0ull;
        best = key > best ? key : best;
    }
    return block_max(shared, best);
}
__device__ __forceinline__ int token_of(u64 largest) { return int(~uint32_t(largest)); }
__device__ __forceinline__ float logit_of(u64 largest) { return of_key(uint32_t(largest >> 32)); }

// A row with a NaN or +inf, or of nothing but -inf, cannot be sampled from: what to say of it, or 0.
__device__ __forceinline__ int trouble(u64 largest) {
    if (largest == ~0ull) return NOT_FINITE;
    return largest == 0 || logit_of(largest) == -CUDART_INF_F ? NO_TOKEN : 0;
}

// The first token in the vocabulary's order up to which the weights add up to `target`; all of them do, and it is at least 1.
template <typename Weight>
__device__ __forceinline__ int reaches(SampleShared& shared, const float* row, int v, u64 target, Weight weight) {
    const int segment = ceil_div(v, SAMPLE_THREADS) * WARP;  // of a warp
    const int first = min(v, warp_id() * segment), end = min(v, first + segment);
    u64 mine = 0, total;
    for (int token = first + lane_id(); token < end; token += WARP) mine += weight(key_of(row[token]), token);
    const u64 before = block_before(shared, mine, total);
    u64 sum = __shfl_sync(ALL_LANES, before, 0);
    const u64 last = __shfl_sync(ALL_LANES, before + mine, WARP - 1);
    if (sum < target && target <= last) {
        for (int start = first; start < end; start += WARP) {
            const int token = start + lane_id();
            const u64 upto = sum + warp_upto(token < end ? weight(key_of(row[token]), token) : 0u);
            const unsigned there = __ballot_sync(ALL_LANES, upto >= target);
            if (there != 0) {
                if (lane_id() == 0) shared.last = start + __ffs(int(there)) - 1;
                break;
            }
            sum = __shfl_sync(ALL_LANES, upto, WARP - 1);
        }
    }
    __syncthreads();
    const int token = shared.last;
    __syncthreads();
    return token;
}

// The shortest list of tokens, by falling logit and rising id, whose weights reach `target` (at least 1). weight(key, token) is the
// same for all tokens of a key, or 0. All tokens, if they do not reach it.
template <typename Weight>
__device__ __forceinline__ Cut select(SampleShared& shared, const float* row, int v, u64 target, Weight weight) {
    uint32_t prefix = 0;
#pragma unroll
    for (int pass = 0; pass < 3; ++pass) {
        const int bits = pass < 2 ? 11 : 10, shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        for (int bin = threadIdx.x; bin < SAMPLE_BINS; bin += SAMPLE_THREADS) shared.low[bin] = shared.high[bin] = 0;
        __syncthreads();
        for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) {
            const uint32_t key = key_of(row[token]);
            if (pass > 0 && key >> (shift + bits) != prefix) continue;
            const uint32_t mass = weight(key, token);
            if (mass == 0) continue;
            const uint32_t bin = key >> shift & ((1u << bits) - 1);
            if (atomicAdd(&shared.low[bin], mass) > 0xffffffffu - mass) atomicAdd(&shared.high[bin], 1u);  // the carry
        }
        __syncthreads();
        const auto mass_in = [&](int bin) { return u64(shared.high[bin]) << 32 | shared.low[bin]; };
        const int top = SAMPLE_BINS - 1 - threadIdx.x * BINS_A_THREAD;  // bins from the top
        u64 mine = 0, total;
        for (int i = 0; i < BINS_A_THREAD; ++i) mine += mass_in(top - i);
        u64 above = block_before(shared, mine, total);
        if (total < target) return Cut{0, v};
        if (above < target && target <= above + mine)
            for (int i = 0; i < BINS_A_THREAD; ++i) {
                const u64 mass = mass_in(top - i);
                if (above < target && target <= above + mass) shared.digit = top - i, shared.above = above, shared.mass = mass;
                above += mass;
            }
        __syncthreads();
        prefix = prefix << bits | shared.digit;
        target -= shared.above;
        __syncthreads();
    }
    const u64 total = shared.mass;
    __syncthreads();
    // Of those with the last key, as many as are still needed. Each weighs the same.
    uint32_t each = 0;
    for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS)
        if (key_of(row[token]) == prefix) each = max(each, weight(prefix, token));
    each = uint32_t(block_max(shared, each));
    u64 ties = 0;  // the least whose ties * each reach the target; a division would be a call that spills
    for (int bit = 30; bit >= 0; --bit)
        if ((ties + (1ull << bit)) * each < target) ties += 1ull << bit;
    ++ties;
    if (ties * each >= total) return Cut{prefix, v};
    return Cut{prefix, reaches(shared, row, v, ties, [&](uint32_t key, int token) { return key == prefix && weight(key, token) > 0 ? 1u : 0u; })};
}

// Log-probability of the chosen token and the most likely ones, from the row as it came.
__device__ __forceinline__ float log_sum(const float* row, int v, float highest) {
    float sum = 0.f;
    for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) sum += expf(row[token] - highest);
    return highest + logf(block_sum<SAMPLE_THREADS>(sum));
}

__device__ __forceinline__ void report_top(SampleShared& shared, const float* row, int v, int top, float log_of_sum, float* logprobs,
                                           int* tokens) {
    if (threadIdx.x == 0) shared.found = 0;
    const auto one = [](uint32_t, int) { return 1u; };
    const Cut cut = top > 0 ? select(shared, row, v, u64(top), one) : Cut{0xffffffffu, -1};
    __syncthreads();
    for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) {
        const uint32_t key = key_of(row[token]);
        if (!cut.holds(key, token)) continue;
        const int at = atomicAdd(&shared.found, 1);
        if (at < SAMPLE_TOP) shared.top_key[at] = key, shared.top_token[at] = token;
    }
    __syncthreads();
    const int found = min(shared.found, SAMPLE_TOP), i = threadIdx.x;
    if (i < found) {
        int rank = 0;  // they came in any order
        for (int j = 0; j < found; ++j) {
            const bool ahead = shared.top_key[j] > shared.top_key[i] ||
                               (shared.top_key[j] == shared.top_key[i] && shared.top_token[j] < shared.top_token[i]);
            rank += ahead;
        }
        tokens[rank] = shared.top_token[i];
        logprobs[rank] = of_key(shared.top_key[i]) - log_of_sum;
    } else if (i < SAMPLE_TOP) {
        tokens[i] = -1;
        logprobs[i] = -CUDART_INF_F;
    }
}

// A copy of the row, changed in engine::sampler's order: biases, masks, penalties.
__device__ __forceinline__ void adjust(float* to, const float* row, int v, const SampleRow& want, const int* lists, const uint32_t* allowed) {
    for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) to[token] = row[token];
    __syncthreads();
    for (int i = threadIdx.x; i < want.bias_count; i += SAMPLE_THREADS) {
        const int* entry = lists + want.bias_first + 2 * i;
        to[entry[0]] += __int_as_float(entry[1]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < want.masked_count; i += SAMPLE_THREADS) to[lists[want.masked_first + i]] = -CUDART_INF_F;
    if (want.allowed_first >= 0)
        for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS)
            if (!(allowed[want.allowed_first + token / 32] >> token % 32 & 1)) to[token] = -CUDART_INF_F;
    __syncthreads();
    for (int i = threadIdx.x; i < want.history_count; i += SAMPLE_THREADS) {
        const int* entry = lists + want.history_first + 2 * i;
        float logit = to[entry[0]];
        logit = logit > 0.f ? logit / want.repetition_penalty : logit * want.repetition_penalty;
        logit = __fadd_rn(logit, -__fmul_rn(want.frequency_penalty, float(entry[1])));
        if (entry[1] > 0) logit -= want.presence_penalty;
        to[entry[0]] = logit;
    }
    __syncthreads();
}

// Temperature, min-p, top-k, top-p, in engine::sampler's order.
__device__ __forceinline__ int choose(SampleShared& shared, const float* row, int v, const SampleRow& want) {
    const u64 best = largest(shared, row, v);
    if (const int wrong = trouble(best)) return wrong;
    if (want.scale == 0.f) return token_of(best);
    const float highest = logit_of(best), least = __fadd_rn(highest, want.least);
    const auto likely = [&](uint32_t key) { return of_key(key) > -CUDART_INF_F && of_key(key) >= least; };
    Cut outer{0, v};
    if (want.top_k > 0 && want.top_k < uint32_t(v))
        outer = select(shared, row, v, want.top_k, [&](uint32_t key, int) { return likely(key) ? 1u : 0u; });
    const auto outer_mass = [&](uint32_t key, int token) {
        return likely(key) && outer.holds(key, token) ? mass_of((of_key(key) - highest) * want.scale) : 0u;
    };
    const auto total_of = [&](auto mass) {
        u64 mine = 0, total;
        for (int token = threadIdx.x; token < v; token += SAMPLE_THREADS) mine += mass(key_of(row[token]), token);
        block_before(shared, mine, total);
        return total;
    };
    u64 total = total_of(outer_mass);
    Cut inner{0, v};
    if (want.top_p < 1.f) {
        const u64 target = u64(ceil(double(want.top_p) * double(total)));
        inner = select(shared, row, v, target > 0 ? target : 1, outer_mass);
    }
    const auto mass = [&](uint32_t key, int token) { return inner.holds(key, token) ? outer_mass(key, token) : 0u; };
    if (want.top_p < 1.f) total = total_of(mass);
    const u64 before = u64(want.random * double(total));
    return reaches(shared, row, v, before < total ? before + 1 : total, mass);
}

// chosen (r): a token, NOT_FINITE or NO_TOKEN. logits (r, stride); work: as large, for rows with lists. wants (r); lists, allowed: see
// SampleRow. Where `top` is not negative: logprobs (r, 1 + SAMPLE_TOP), of the row as it came: the chosen token's, then the most likely
// ones' by falling probability; top_tokens (r, SAMPLE_TOP), -1 where there is none.
// Two blocks a multiprocessor: without that bound ptxas aims for three, and spills.
extern "C" __global__ void __launch_bounds__(SAMPLE_THREADS, 2)
sample(int* chosen, float* logprobs, int* top_tokens, const float* logits, float* work, const uint32_t* wants, const int* lists,
       const uint32_t* allowed, int v, int stride) {
    ptx::let_kernels_behind_start();
    ptx::wait_for_kernels_before();
    DYNAMIC_SHARED(SampleShared, storage);
    SampleShared& shared = *storage;
    const SampleRow want = reinterpret_cast<const SampleRow*>(wants)[blockIdx.x];
    const float* row = logits + size_t(blockIdx.x) * stride;
    const u64 best = largest(shared, row, v);
    int token = trouble(best);
    if (token == 0) {
        const float* changed = row;
        if (want.bias_count > 0 || want.masked_count > 0 || want.history_count > 0 || want.allowed_first >= 0) {
            float* to = work + size_t(blockIdx.x) * stride;
            adjust(to, row, v, want, lists, allowed);
            changed = to;
        }
        token = choose(shared, changed, v, want);
    }
    if (threadIdx.x == 0) chosen[blockIdx.x] = token;
    if (token < 0 || want.top < 0) return;
    float* row_logprobs = logprobs + size_t(blockIdx.x) * (1 + SAMPLE_TOP);
    const float log_of_sum = log_sum(row, v, logit_of(best));
    if (threadIdx.x == 0) row_logprobs[0] = row[token] - log_of_sum;
    report_top(shared, row, v, min(want.top, SAMPLE_TOP), log_of_sum, row_logprobs + 1, top_tokens + size_t(blockIdx.x) * SAMPLE_TOP);
}
EXPORT(sample)
