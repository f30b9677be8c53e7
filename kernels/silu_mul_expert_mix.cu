// silu_mul_expert_mix: contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  a block owns MIX_COLS of m and one tile of MIX_ROWS tokens after another. Its part of A comes with cp.async, while kernels in front
//        still run (EARLY_KERNEL), as the lists of the step, which are there before any of its kernels. It computes h (stored, and kept in shared memory), takes the two gate rows with f32 FMAs on the way and
//        A h with mma, and leaves partial sums. The block that arrives last for a tile of tokens adds them, MIX_SHARERS lanes a sum, each
//        every MIX_SHARERS-th split in its order; it applies the gates' rules and writes u right behind h: the GEMM that follows, with
//        K = m + w, is the routed mix.
// Bound: memory, n * 3 m * sizeof(T) bytes, and (w sizeof(T) + 8) m bytes of E once a block of tiles.
// Checked: 128 registers; HMMA LDSM LDGSTS LDG.E.128
#include "gates.cuh"

constexpr int MIX_PITCH = MIX_COLS + 8;  // rows of shared memory an odd number of 16 bytes apart: ldmatrix without bank conflicts
constexpr int MIX_WARPS = MIX_THREADS / WARP;
constexpr int MIX_WARP_COLS = MIX_COLS / MIX_WARPS;
constexpr int MIX_TILES = MIX_WIDTH / 8;
constexpr int MIX_SHARERS = 4, MIX_BATCH = 6;  // lanes of a sum; splits that each fetches at once
static_assert(MIX_ROWS == 16 && MIX_WIDTH % 16 == 0 && MIX_WARP_COLS % 16 == 0, "fragments of mma.m16n8k16");
// A warp takes WARP * 8 columns of MIX_WARP_ROWS rows.
constexpr int MIX_ACROSS = MIX_COLS / (WARP * 8);
constexpr int MIX_WARP_ROWS = MIX_ROWS * MIX_ACROSS / MIX_WARPS;
static_assert(MIX_ACROSS * WARP * 8 == MIX_COLS && MIX_WARP_ROWS * MIX_WARPS == MIX_ROWS * MIX_ACROSS, "warps cover the block's part");

template <typename T> struct MixShared {
    T h[MIX_ROWS][MIX_PITCH];
    T a[MIX_WIDTH][MIX_PITCH];
    float products[MIX_WARPS][MIX_ROWS][MIX_WIDTH];
    float dots[MIX_ACROSS][MIX_ROWS][2];
    float gates[MIX_ROWS][2];
    int is_last;
};

// The first of this lane's eight columns.
__device__ __forceinline__ int own_col() { return warp_id() % MIX_ACROSS * WARP * 8 + lane_id() * 8; }

// h of this block's tokens and columns, to hu and to shared memory, and their dots with both gate rows' weights of this lane's columns.
template <typename T>
__device__ __forceinline__ void silu_mul(MixShared<T>& shared, T* hu, const T* gate_up, const float (&weight)[2][8], bool routed, int rows,
                                         int cols, int m, int hu_stride, int gate_up_stride) {
    const int col = own_col(), row0 = warp_id() / MIX_ACROSS * MIX_WARP_ROWS;
    uint4 packed[MIX_WARP_ROWS][2];
#pragma unroll
    for (int i = 0; i < MIX_WARP_ROWS; ++i) {
        if (row0 + i >= rows || col >= cols) continue;
        const T* from = gate_up + size_t(row0 + i) * gate_up_stride + col;
        packed[i][0] = *reinterpret_cast<const uint4*>(from), packed[i][1] = *reinterpret_cast<const uint4*>(from + m);
    }
#pragma unroll
    for (int i = 0; i < MIX_WARP_ROWS; ++i) {
        const int row = row0 + i;
        float h[8] = {}, dots[2] = {};
        if (row < rows && col < cols) {
            float up[8];
            unpack<T>(h, packed[i][0]);
            unpack<T>(up, packed[i][1]);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                h[j] = h[j] / (1.f + __expf(-h[j])) * up[j];
                dots[0] = fmaf(h[j], weight[0][j], dots[0]);
                dots[1] = fmaf(h[j], weight[1][j], dots[1]);
            }
            store(hu + size_t(row) * hu_stride + col, h);
        }
        if (!routed) continue;
        store(&shared.h[row][col], h);
        dots[0] = warp_sum(dots[0]), dots[1] = warp_sum(dots[1]);
        if (lane_id() < 2) shared.dots[warp_id() % MIX_ACROSS][row][lane_id()] = lane_id() ? dots[1] : dots[0];
    }
}

// Rows first..first + MIX_WIDTH of A and this block's columns; zeros beyond both.
template <typename T>
__device__ void fetch_a(MixShared<T>& shared, const T* a, int first, int w, int cols, int m) {
    for (int i = threadIdx.x; i < MIX_WIDTH * MIX_COLS / 8; i += MIX_THREADS) {
        const int row = i / (MIX_COLS / 8), col = i % (MIX_COLS / 8) * 8;
        const bool valid = first + row < w && col < cols;
        ptx::cp_async_16(&shared.a[row][col], valid ? a + size_t(first + row) * m + col : a, valid);
    }
    ptx::cp_async_commit();
}

// products[warp] = h A^T over the warp's columns.
template <typename T> __device__ void multiply(MixShared<T>& shared) {
    const int lane = lane_id(), warp = warp_id();
    float sum[MIX_TILES][4] = {};
#pragma unroll 2
    for (int k = warp * MIX_WARP_COLS; k < (warp + 1) * MIX_WARP_COLS; k += 16) {
        uint32_t h[4];
        ptx::ldmatrix_x4(h, &shared.h[lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int pair = 0; pair < MIX_TILES / 2; ++pair) {
            uint32_t a[4];  // rows pair * 16 ..+8 at k, k + 8, then rows + 8 ..+16
            ptx::ldmatrix_x4(a, &shared.a[pair * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
            ptx::mma_m16n8k16<T>(sum[pair * 2], h, a[0], a[1]);
            ptx::mma_m16n8k16<T>(sum[pair * 2 + 1], h, a[2], a[3]);
        }
    }
#pragma unroll
    for (int tile = 0; tile < MIX_TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) shared.products[warp][lane / 4 + i / 2 * 8][tile * 8 + lane % 4 * 2 + i % 2] = sum[tile][i];
}

// Numbers of a row of partial sums: w of A h, two of the gates, in whole packs of four.
__device__ __forceinline__ int partial_pitch(int w) { return round_up(w + 2, 4); }

// The sums of a tile's partials, to `totals` (rows, pitch), which may be the first split's place.
__device__ __forceinline__ void add_splits(float* totals, const float* partials, int rows, int pitch, int splits) {
    const int packs = rows * (pitch / 4), sharer = threadIdx.x % MIX_SHARERS;
    for (int first = 0; first < packs; first += MIX_THREADS / MIX_SHARERS) {
        const int pack = first + threadIdx.x / MIX_SHARERS;
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
        if (pack < packs) {
            const float* from = partials + pack * 4;
            for (int split = sharer; split < splits; split += MIX_BATCH * MIX_SHARERS) {
                float4 four[MIX_BATCH];
#pragma unroll
                for (int i = 0; i < MIX_BATCH; ++i) {
                    const int at = split + i * MIX_SHARERS;
                    four[i] = at < splits ? __ldcg(reinterpret_cast<const float4*>(from + size_t(at) * MIX_ROWS * pitch))
                                          : make_float4(0.f, 0.f, 0.f, 0.f);
                }
#pragma unroll
                for (int i = 0; i < MIX_BATCH; ++i) sum.x += four[i].x, sum.y += four[i].y, sum.z += four[i].z, sum.w += four[i].w;
            }
        }
#pragma unroll
        for (int step = 1; step < MIX_SHARERS; step *= 2) {
            sum.x += __shfl_xor_sync(ALL_LANES, sum.x, step), sum.y += __shfl_xor_sync(ALL_LANES, sum.y, step);
            sum.z += __shfl_xor_sync(ALL_LANES, sum.z, step), sum.w += __shfl_xor_sync(ALL_LANES, sum.w, step);
        }
        if (sharer == 0 && pack < packs) *reinterpret_cast<float4*>(totals + pack * 4) = sum;
    }
}

// The last block of a token tile: z = sum of the partials, gates by their rules, u = gate * z; or z alone. rule: of this thread's row and gate.
template <typename T>
__device__ __forceinline__ void finish(MixShared<T>& shared, T* hu, float* gates, float* z, float* partials, const float (&rule)[3], int row0,
                                       int rows, int m, int w, int safety_rank, int splits, float safety_bias, float helpfulness_bias,
                                       int hu_stride, int gates_stride, int z_stride) {
    const int pitch = partial_pitch(w);
    // The products are no longer needed, and have room for all but the widest experts.
    float* totals = MIX_ROWS * pitch * sizeof(float) <= sizeof shared.products ? &shared.products[0][0][0] : partials;
    add_splits(totals, partials, rows, pitch, splits);
    __syncthreads();
    if (z) {
        for (int i = threadIdx.x; i < rows * (w + 2); i += MIX_THREADS) {
            const int row = i / (w + 2), j = i % (w + 2);
            z[size_t(row0 + row) * z_stride + j] = totals[row * pitch + j];
        }
        return;
    }
    if (int(threadIdx.x) < rows * 2) {
        const int row = threadIdx.x / 2, which = threadIdx.x % 2;
        const float logit = totals[row * pitch + w + which] + (which ? helpfulness_bias : safety_bias);
        const float gate = gate_of(logit, rule);
        shared.gates[row][which] = gate;
        gates[size_t(row0 + row) * gates_stride + which] = gate;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * w; i += MIX_THREADS) {
        const int row = i / w, j = i % w;
        hu[size_t(row0 + row) * hu_stride + m + j] = from_float<T>(shared.gates[row][j >= safety_rank] * totals[row * pitch + j]);
    }
}

// Partial sums of a tile of tokens over this block's columns, to `mine` (rows, pitch). The first group of A is there or on its way
// when `fetched`.
template <typename T>
__device__ __forceinline__ void leave_partials(MixShared<T>& shared, float* mine, const T* a, bool fetched, int rows, int cols, int m, int w) {
    const int pitch = partial_pitch(w);
    for (int first = 0; first < w; first += MIX_WIDTH) {
        if (first > 0 || !fetched) {
            __syncthreads();  // all have read the products and A of the group before
            fetch_a(shared, a, first, w, cols, m);
        }
        ptx::cp_async_wait<0>();
        __syncthreads();
        multiply(shared);
        __syncthreads();
        const int width = min(MIX_WIDTH, w - first);
        for (int i = threadIdx.x; i < rows * width; i += MIX_THREADS) {
            const int row = i / width, j = i % width;
            float sum = 0.f;
#pragma unroll
            for (int warp = 0; warp < MIX_WARPS; ++warp) sum += shared.products[warp][row][j];
            mine[row * pitch + first + j] = sum;
        }
    }
    if (int(threadIdx.x) < rows * 2) {
        const int row = threadIdx.x / 2, which = threadIdx.x % 2;
        float dot = 0.f;
#pragma unroll
        for (int part = 0; part < MIX_ACROSS; ++part) dot += shared.dots[part][row][which];
        mine[row * pitch + w + which] = dot;
    }
}

// hu (n, hu_stride): h (m), u (w), zeros; gate_up (n, gate_up_stride): gate (m), up (m); a (w, m): A_s, A_h, or null for a plain Llama;
// gate_rows (2, m) f32; rules (sequences, 6): bias, floor, ceiling of the safety and of the helpfulness gate; sequence_of (n);
// gates: this layer's two columns of (n, gates_stride); z (n, z_stride): takes A h and the gates' dots instead, or null; partials (row tiles, splits, MIX_ROWS, partial_pitch(w)); arrived (row tiles), zero
// before and after. Grid: (splits of m, groups of `tiles` row tiles). m % 8 == 0.
template <typename T>
__device__ void silu_mul_expert_mix(T* hu, const T* gate_up, const T* a, const float* gate_rows, float safety_bias, float helpfulness_bias,
                                    const float* rules, const int* sequence_of, float* gates, float* z, float* partials, unsigned* arrived,
                                    int n, int m, int w, int safety_rank, int hu_stride, int gate_up_stride, int gates_stride, int z_stride,
                                    int tiles) {
    DYNAMIC_SHARED(MixShared<T>, storage);
    MixShared<T>& shared = *storage;
    const int col0 = blockIdx.x * MIX_COLS, splits = gridDim.x, cols = min(MIX_COLS, m - col0);
    const size_t partials_of_tile = size_t(splits) * MIX_ROWS * partial_pitch(w);
    float weight[2][8] = {};
    if (a) {
        fetch_a(shared, a + col0, 0, w, cols, m);
        if (own_col() < cols) {
            load(weight[0], gate_rows + col0 + own_col());
            load(weight[1], gate_rows + m + col0 + own_col());
        }
    }
    const int first_tile = blockIdx.y * tiles, end = min(first_tile + tiles, ceil_div(n, MIX_ROWS));
    for (int tile = first_tile; tile < end; ++tile) {
        const int row0 = tile * MIX_ROWS, rows = min(MIX_ROWS, n - row0);
        float rule[3] = {};
        if (a && int(threadIdx.x) < rows * 2) load_rule(rule, rules, sequence_of[row0 + threadIdx.x / 2], threadIdx.x % 2);
        if (tile == first_tile) ptx::wait_for_kernels_before();
        silu_mul(shared, hu + size_t(row0) * hu_stride + col0, gate_up + size_t(row0) * gate_up_stride + col0, weight, a != nullptr, rows,
                 cols, m, hu_stride, gate_up_stride);
        if (!a) continue;
        float* of_tile = partials + tile * partials_of_tile;
        leave_partials(shared, of_tile + size_t(blockIdx.x) * MIX_ROWS * partial_pitch(w), a + col0, tile == first_tile || w <= MIX_WIDTH,
                       rows, cols, m, w);
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // all of the block's partials are out before the arrival is counted
            shared.is_last = atomicAdd(arrived + tile, 1u) == unsigned(splits) - 1;
        }
        __syncthreads();
        if (!shared.is_last) continue;
        __threadfence();
        if (threadIdx.x == 0) arrived[tile] = 0;
        finish(shared, hu, gates, z, of_tile, rule, row0, rows, m, w, safety_rank, splits, safety_bias, helpfulness_bias, hu_stride,
               gates_stride, z_stride);
        __syncthreads();  // all have read the gates that the next tile overwrites
    }
}

EARLY_KERNEL(silu_mul_expert_mix, (MIX_THREADS, 2),
             (T* hu, const T* gate_up, const T* a, const float* gate_rows, float safety_bias, float helpfulness_bias, const float* rules,
              const int* sequence_of, float* gates, float* z, float* partials, unsigned* arrived, int n, int m, int w, int safety_rank,
              int hu_stride, int gate_up_stride, int gates_stride, int z_stride, int tiles),
             (hu, gate_up, a, gate_rows, safety_bias, helpfulness_bias, rules, sequence_of, gates, z, partials, arrived, n, m, w, safety_rank,
              hu_stride, gate_up_stride, gates_stride, z_stride, tiles))
