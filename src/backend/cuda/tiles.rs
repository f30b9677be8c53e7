//! The sizes of `kernels/tiles.h`, read at compile time: a grid and its kernel cannot disagree.

const HEADER: &[u8] = include_bytes!("../../../kernels/tiles.h");

/// The value of `constexpr int NAME = VALUE;`.
const fn tile(name: &str) -> usize {
    let name = name.as_bytes();
    let mut at = 0;
    while at < HEADER.len() {
        if is_at(name, at) && at > 0 && HEADER[at - 1] == b' ' && is_at(b" = ", at + name.len()) {
            return number(at + name.len() + 3);
        }
        at += 1;
    }
    panic!("kernels/tiles.h has no such constant");
}

const fn is_at(word: &[u8], at: usize) -> bool {
    let mut i = 0;
    while i < word.len() {
        if at + i >= HEADER.len() || HEADER[at + i] != word[i] {
            return false;
        }
        i += 1;
    }
    true
}

const fn number(mut at: usize) -> usize {
    let mut value = 0;
    while HEADER[at].is_ascii_digit() {
        value = 10 * value + (HEADER[at] - b'0') as usize;
        at += 1;
    }
    assert!(HEADER[at] == b';', "a tile is a number");
    value
}

macro_rules! tiles {
    ($($name:ident),* $(,)?) => {
        $(#[doc = concat!("`", stringify!($name), "` of `kernels/tiles.h`.")] pub const $name: usize = tile(stringify!($name));)*
    };
}

tiles! {
    ROW_ALIGN, KV_BLOCK, HEAD_SIZE_MAX, EMBED_THREADS, GATHER_THREADS, NORM_THREADS, ROPE_THREADS,
    MIX_ROWS, MIX_COLS, MIX_THREADS, MIX_WIDTH, MIX_BLOCKS, EXPERT_MIX_THREADS,
    DECODE_SPLIT, DECODE_WARPS, DECODE_HEADS, MERGE_WARPS,
    PREFILL_ROWS, PREFILL_POSITIONS, PREFILL_THREADS,
    GEMM_DEPTH, GEMM_STAGES, GEMM_FEW_ROWS, GEMM_FEW_COLS, GEMM_FEW_THREADS, GEMM_MANY_ROWS, GEMM_MANY_COLS, GEMM_MANY_THREADS,
    SKINNY_ROWS, SKINNY_COLS, SKINNY_CHUNK, SKINNY_STAGES, SKINNY_THREADS,
    SAMPLE_THREADS, SAMPLE_BINS, SAMPLE_TOP, SAMPLE_ROW_WORDS,
}

const _: () = assert!(
    KV_BLOCK == crate::types::BLOCK_TOKENS,
    "a block of the cache is a block of the pool"
);

/// Threads of a warp.
pub const WARP: usize = 32;
