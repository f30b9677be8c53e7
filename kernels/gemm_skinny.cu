// matmul for few rows of x (a decode step): contract in src/backend/ops.rs, arithmetic in src/backend/reference.rs.
// Plan:  W is read once, at the rate of the memory. Its work is cut into units, SKINNY_COLS rows of W (columns of y) x SKINNY_CHUNK of k for
//        each warp, tile after tile, and every block takes the same number of units in a row, whichever tiles they are of. The warps of a
//        block take turns at k, each through a ring of SKINNY_STAGES stages of cp.async of its own that goes on from tile to tile. W is the
//        first operand of mma.m16n8k16 and 8, 16 or 32 rows of x are the second. A lane multiplies what it has fetched: 16 bytes of a row
//        are its part of two mma, with k in the same order in W and x, so no lane waits for another and nothing is shuffled. W's first
//        stages are under way before the kernels in front are done (EARLY_KERNEL). The warps' sums are added in their order; of a tile
//        that several blocks share, the one that arrives last adds all parts in the order of the blocks. The cut depends on W and the
//        number of blocks alone, so a row's bits do not depend on the batch.
// Bound: memory, o * k * sizeof(T) bytes.
// Checked: 192 registers; HMMA LDGSTS
#include "common.cuh"

constexpr int SKINNY_WARPS = SKINNY_THREADS / WARP;
constexpr int SKINNY_PACKS = SKINNY_CHUNK / 32;  // of a lane in a row's part of a chunk: each of the four lanes of a row takes 8 of 32
constexpr int SKINNY_PITCH = SKINNY_COLS + 4;    // of the warps' sums: lanes of a fragment hit 32 banks
static_assert(SKINNY_COLS % 16 == 0 && SKINNY_CHUNK % 32 == 0, "fragments of mma.m16n8k16");

// 16 bytes for each lane: its part of eight rows.
struct Slot { uint4 lane[WARP]; };

template <int TILES> struct SkinnyStage {
    Slot w[SKINNY_COLS / 8][SKINNY_PACKS];
    Slot x[TILES][SKINNY_PACKS];
};
template <int TILES> struct SkinnyShared {
    SkinnyStage<TILES> stages[SKINNY_WARPS][SKINNY_STAGES];
    float sums[SKINNY_WARPS][TILES * 8][SKINNY_PITCH];
    int is_last;
};

// What blocks do: units first..end of a block, of `turns` to a tile of o.
struct SkinnyWork {
    long long units;
    int turns;
    __device__ SkinnyWork(int o, int k)
        : turns(ceil_div(k, SKINNY_WARPS * SKINNY_CHUNK)) { units = (long long)(ceil_div(o, SKINNY_COLS)) * turns; }
    __device__ int first_of(int block) const { return int(units * block / int(gridDim.x)); }
    // The block that has this unit: the last that begins at or before it.
    __device__ int block_of(int unit) const { return int(((long long)(unit + 1) * int(gridDim.x) - 1) / units); }
};

// Where a lane fetches next, unit after unit.
template <typename T, int TILES> struct SkinnyCursor {
    const T *w, *x;  // its rows of the tile's first eight of W and of x's first eight, at its part of the warp's chunk
    int w_rows, x_rows, turn, k_left;
    const int k, turns;

    __device__ __forceinline__ SkinnyCursor(const T* w_, const T* x_, int n, int o, int k_, int turns_, int unit) : k(k_), turns(turns_) {
        const int group = lane_id() / 4, row = unit / turns * SKINNY_COLS + group;
        turn = unit % turns;
        const int at = turn * SKINNY_WARPS * SKINNY_CHUNK + own();
        w_rows = o - row, x_rows = n - group, k_left = k - at;
        w = w_ + size_t(row) * k + at, x = x_ + size_t(group) * k + at;
    }
    // From a turn's first k to the lane's first.
    __device__ __forceinline__ static int own() { return warp_id() * SKINNY_CHUNK + lane_id() % 4 * 8; }

    __device__ __forceinline__ void fetch_w(SkinnyStage<TILES>& stage) const {
#pragma unroll
        for (int i = 0; i < SKINNY_COLS / 8; ++i)
#pragma unroll
            for (int p = 0; p < SKINNY_PACKS; ++p)
                ptx::cp_async_16_of_stream(&stage.w[i][p].lane[lane_id()], w + size_t(i * 8) * k + p * 32, i * 8 < w_rows && p * 32 < k_left);
    }
    __device__ __forceinline__ void fetch_x(SkinnyStage<TILES>& stage) const {
#pragma unroll
        for (int t = 0; t < TILES; ++t)
#pragma unroll
            for (int p = 0; p < SKINNY_PACKS; ++p)
                ptx::cp_async_16(&stage.x[t][p].lane[lane_id()], x + size_t(t * 8) * k + p * 32, t * 8 < x_rows && p * 32 < k_left);
    }
    __device__ __forceinline__ void advance() {
        constexpr int STEP = SKINNY_WARPS * SKINNY_CHUNK;
        w += STEP, x += STEP, k_left -= STEP;
        if (++turn < turns) return;
        // The next tile's first k.
        w += size_t(SKINNY_COLS) * k - turns * STEP, x -= turns * STEP, k_left += turns * STEP;
        turn = 0, w_rows -= SKINNY_COLS;
    }
};

template <typename T, int TILES>
__device__ __forceinline__ void multiply(float (&sum)[SKINNY_COLS / 16][TILES][4], const SkinnyStage<TILES>& stage) {
    const int lane = lane_id();
#pragma unroll
    for (int p = 0; p < SKINNY_PACKS; ++p) {
        uint4 x[TILES];
#pragma unroll
        for (int t = 0; t < TILES; ++t) x[t] = stage.x[t][p].lane[lane];
#pragma unroll
        for (int i = 0; i < SKINNY_COLS / 16; ++i) {
            const uint4 low = stage.w[2 * i][p].lane[lane], high = stage.w[2 * i + 1][p].lane[lane];
            const uint32_t first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
            for (int t = 0; t < TILES; ++t) {
                ptx::mma_m16n8k16<T>(sum[i][t], first, x[t].x, x[t].y);
                ptx::mma_m16n8k16<T>(sum[i][t], second, x[t].z, x[t].w);
            }
        }
    }
}

__device__ __forceinline__ void add_to(float4& sum, const float4& four) {
    sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
}

// A thread's part of a tile of y: four columns of a row, ITEMS times. All loads of a step are under way before the first is used.
template <int TILES> struct SkinnyItems {
    static constexpr int ITEMS = ceil_div(TILES * 8 * (SKINNY_COLS / 4), SKINNY_THREADS);
    static constexpr int PARTS = 4;  // of a tile that are fetched at once
    float4 sum[ITEMS];
    const int n;

    __device__ __forceinline__ explicit SkinnyItems(int n_) : n(n_) {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) sum[item] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    __device__ __forceinline__ static int at(int item) { return item * SKINNY_THREADS + threadIdx.x; }
    __device__ __forceinline__ static int row(int item) { return at(item) / (SKINNY_COLS / 4); }
    __device__ __forceinline__ static int col(int item) { return at(item) % (SKINNY_COLS / 4) * 4; }
    __device__ __forceinline__ bool is_there(int item) const { return row(item) < n; }

    __device__ __forceinline__ void add_warps(const SkinnyShared<TILES>& shared) {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
#pragma unroll
            for (int warp = 0; warp < SKINNY_WARPS; ++warp)
                if (is_there(item)) add_to(sum[item], *reinterpret_cast<const float4*>(&shared.sums[warp][row(item)][col(item)]));
    }
    __device__ __forceinline__ void leave(float* part) const {
#pragma unroll
        for (int item = 0; item < ITEMS; ++item)
            if (is_there(item)) *reinterpret_cast<float4*>(part + at(item) * 4) = sum[item];
    }
    // part_of(i) for i in first..=last, in that order.
    template <typename Part> __device__ __forceinline__ void add_parts(int first, int last, Part part_of) {
        for (; first <= last; first += PARTS) {
            float4 part[ITEMS][PARTS];
#pragma unroll
            for (int i = 0; i < PARTS; ++i)
#pragma unroll
                for (int item = 0; item < ITEMS; ++item)
                    part[item][i] = first + i <= last && is_there(item)
                                        ? __ldcg(reinterpret_cast<const float4*>(part_of(first + i) + at(item) * 4))
                                        : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int i = 0; i < PARTS; ++i)
#pragma unroll
                for (int item = 0; item < ITEMS; ++item) add_to(sum[item], part[item][i]);
        }
    }
    // y: the tile's first column of row 0, with `cols` from there on.
    template <typename Y> __device__ __forceinline__ void write(Y* y, int cols, int y_stride, int add) const {
        float old[ITEMS][4] = {};
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            const Y* from = y + size_t(row(item)) * y_stride + col(item);
            if (!add || !is_there(item)) continue;
            if (col(item) + 4 <= cols) {
                load(old[item], from);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (col(item) + i < cols) old[item][i] = to_float(from[i]);
            }
        }
#pragma unroll
        for (int item = 0; item < ITEMS; ++item) {
            Y* to = y + size_t(row(item)) * y_stride + col(item);
            const float four[4] = {sum[item].x + old[item][0], sum[item].y + old[item][1], sum[item].z + old[item][2],
                                   sum[item].w + old[item][3]};
            if (!is_there(item)) continue;
            if (col(item) + 4 <= cols) {
                store(to, four);
            } else {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (col(item) + i < cols) to[i] = from_float<Y>(four[i]);
            }
        }
    }
};

// y (n, y_stride) in Y, x (n, k), w (o, k); n <= TILES * 8, k % 8 == 0 and padded with zeros in both. partials (2 * blocks, n, SKINNY_COLS):
// a block's part of its first tile, and of its last; arrived (blocks), of the tile that the block began and others go on with, zero before
// and after. Grid: blocks, at most as many as units.
template <typename T, typename Y, int TILES>
__device__ __forceinline__ void gemm_skinny(Y* __restrict__ y, const T* __restrict__ x, const T* __restrict__ w, float* partials,
                                            unsigned* arrived, int n, int o, int k, int y_stride, int add) {
    DYNAMIC_SHARED(SkinnyShared<TILES>, storage);
    SkinnyShared<TILES>& shared = *storage;
    const SkinnyWork work(o, k);
    const int block = blockIdx.x, first = work.first_of(block), end = work.first_of(block + 1), turns = work.turns;
    SkinnyStage<TILES>(&ring)[SKINNY_STAGES] = shared.stages[warp_id()];

    SkinnyCursor<T, TILES> ahead(w, x, n, o, k, turns, first);
    {
        SkinnyCursor<T, TILES> of_x = ahead;
#pragma unroll
        for (int i = 0; i < SKINNY_STAGES - 1; ++i) {
            if (first + i < end) ahead.fetch_w(ring[i]);
            ahead.advance();
        }
        ptx::wait_for_kernels_before();
#pragma unroll
        for (int i = 0; i < SKINNY_STAGES - 1; ++i) {
            if (first + i < end) of_x.fetch_x(ring[i]);
            of_x.advance();
            ptx::cp_async_commit();
        }
    }

    int stage = 0;
    for (int unit = first; unit < end;) {
        const int tile = unit / turns, stop = min(end, (tile + 1) * turns), col0 = tile * SKINNY_COLS;
        float sum[SKINNY_COLS / 16][TILES][4] = {};
        for (; unit < stop; ++unit) {
            SkinnyStage<TILES>& next = ring[stage == 0 ? SKINNY_STAGES - 1 : stage - 1];
            if (unit + SKINNY_STAGES - 1 < end) ahead.fetch_w(next), ahead.fetch_x(next);
            ahead.advance();
            ptx::cp_async_commit();
            ptx::cp_async_wait<SKINNY_STAGES - 1>();
            multiply<T>(sum, ring[stage]);
            stage = stage == SKINNY_STAGES - 1 ? 0 : stage + 1;
        }

        __syncthreads();  // the sums of the tile before have been read
#pragma unroll
        for (int i = 0; i < SKINNY_COLS / 16; ++i)
#pragma unroll
            for (int t = 0; t < TILES; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    shared.sums[warp_id()][t * 8 + lane_id() % 4 * 2 + e % 2][i * 16 + lane_id() / 4 + e / 2 * 8] = sum[i][t][e];
        __syncthreads();
        const int first_block = work.block_of(tile * turns), last_block = work.block_of((tile + 1) * turns - 1);
        const bool whole = first_block == last_block;
        // Only the first of a tile's blocks can have begun in another.
        const bool begun_before = work.first_of(first_block) < tile * turns;
        const auto part_of = [&](int of) { return partials + size_t(2 * of + (of == first_block && begun_before)) * n * SKINNY_COLS; };
        SkinnyItems<TILES> items(n);
        items.add_warps(shared);
        if (whole) {
            items.write(y + col0, o - col0, y_stride, add);
            continue;
        }
        items.leave(part_of(block));
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();  // all of the part is out before the arrival is counted
            shared.is_last = atomicAdd(arrived + first_block, 1u) == unsigned(last_block - first_block);
        }
        __syncthreads();
        if (!shared.is_last) continue;
        __threadfence();
        if (threadIdx.x == 0) arrived[first_block] = 0;
        SkinnyItems<TILES> all(n);
        all.add_parts(first_block, last_block, part_of);
        all.write(y + col0, o - col0, y_stride, add);
    }
}

#define SKINNY(TILES, SUFFIX, Y)                                                                                                       \
    template <typename T>                                                                                                              \
    __device__ void gemm_skinny_##TILES##SUFFIX(Y* y, const T* x, const T* w, float* partials, unsigned* arrived, int n, int o, int k, \
                                                int y_stride, int add) {                                                               \
        gemm_skinny<T, Y, TILES>(y, x, w, partials, arrived, n, o, k, y_stride, add);                                                  \
    }                                                                                                                                  \
    EARLY_KERNEL(gemm_skinny_##TILES##SUFFIX, (SKINNY_THREADS, 1),                                                                        \
                 (Y * y, const T* x, const T* w, float* partials, unsigned* arrived, int n, int o, int k, int y_stride, int add),      \
                 (y, x, w, partials, arrived, n, o, k, y_stride, add))
SKINNY(1, , T)
SKINNY(2, , T)
SKINNY(4, , T)
SKINNY(1, _exact, float)
SKINNY(2, _exact, float)
SKINNY(4, _exact, float)
