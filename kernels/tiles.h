// Sizes that a kernel and the Rust that picks its grid must agree on: src/backend/cuda/tiles.rs reads this file at compile time.
// One constant a line, its axes beside it; names as in src/backend/ops.rs (n rows, d hidden, m MLP width, k inputs, o outputs, c head size).
#pragma once

constexpr int ROW_ALIGN = 8;              // elements: rows of buffers and matrices are padded with zeros to 16 bytes
constexpr int KV_BLOCK = 16;              // positions of a K/V block: types::BLOCK_TOKENS
constexpr int HEAD_SIZE_MAX = 128;        // c

constexpr int EMBED_THREADS = 128;        // a block an n
constexpr int GATHER_THREADS = 128;       // a block an r
constexpr int NORM_THREADS = 512;         // a block an n
constexpr int ROPE_THREADS = 256;         // a block the whole heads of so many packs of four pairs of a row of qkv

constexpr int MIX_ROWS = 16;              // n of a block: one m16 of mma
constexpr int MIX_COLS = 512;             // m of a block
constexpr int MIX_THREADS = 256;          // warps share MIX_COLS
constexpr int MIX_WIDTH = 32;             // w that are multiplied at once
constexpr int MIX_BLOCKS = 1056;          // about so many share the tiles of n

constexpr int EXPERT_MIX_THREADS = 64;    // a block an n

constexpr int DECODE_SPLIT = 256;         // positions of a block, whatever the batch: the split decides the bits
constexpr int DECODE_WARPS = 4;           // take turns at the K/V blocks of a split
constexpr int DECODE_HEADS = 16;          // query heads of a block, all of one K/V head: one m16 of mma
constexpr int MERGE_WARPS = 4;            // heads of a block that merges splits

constexpr int PREFILL_ROWS = 128;         // (token, query head of one K/V head) of a block
constexpr int PREFILL_POSITIONS = 32;     // positions of K and V in shared memory at once
constexpr int PREFILL_THREADS = 128;      // warps share the rows

constexpr int GEMM_DEPTH = 64;            // k of a stage
constexpr int GEMM_STAGES = 3;            // stages in flight
constexpr int GEMM_FEW_ROWS = 16;         // n of a block for at most so many rows
constexpr int GEMM_FEW_COLS = 64;         // o of such a block
constexpr int GEMM_FEW_THREADS = 128;     // a warp 16 of its o
constexpr int GEMM_MANY_ROWS = 128;       // n of a block otherwise
constexpr int GEMM_MANY_COLS = 128;       // o of such a block
constexpr int GEMM_MANY_THREADS = 256;    // a warp 64 n x 32 o

constexpr int SKINNY_ROWS = 32;           // n at most
constexpr int SKINNY_COLS = 64;           // o of a unit of work
constexpr int SKINNY_CHUNK = 64;          // k of a warp in a unit
constexpr int SKINNY_STAGES = 3;          // units in flight
constexpr int SKINNY_THREADS = 128;       // warps share the k of a unit

constexpr int SAMPLE_THREADS = 512;       // a block a row of logits
constexpr int SAMPLE_BINS = 2048;         // of a histogram of logits
constexpr int SAMPLE_TOP = 20;            // most likely tokens reported at most
constexpr int SAMPLE_ROW_WORDS = 18;      // 32-bit words of a row's parameters
