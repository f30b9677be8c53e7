//! The paged cache of K and V, and the writing of new rows into it.
//!
//! A block of a K/V head holds K as (head size, 16 tokens), so that sixteen keys are lanes of one load, and V as (16 tokens,
//! head size). Where numbers are integers, the block's scales lie apart: those of its 16 keys, then those of its 16 values.

#![allow(unsafe_code)]

use half::bf16;

use super::memory::{Arena, Memory};
use super::pool::Parts;
use super::simd::{LANES, Simd, load_some, sum};
use crate::backend::ops::HeadScale;
use crate::backend::{BackendError, KvFormat, KvShape};
use crate::types::{BLOCK_TOKENS, BlockId};

/// K and V of all layers: (layers, blocks, K/V heads, [K | V]).
pub struct KvMemory {
    shape: KvShape,
    numbers: Numbers,
}

enum Numbers {
    F32(Memory<f32>),
    BF16(Memory<u16>),
    /// Codes, and (layers, blocks, K/V heads, 2, 16) scales in bf16.
    INT8(Memory<i8>, Memory<u16>),
}

/// FP8 is a GPU's: here each number would have to be taken apart by hand.
///
/// # Errors
/// A format that a CPU does not keep.
pub fn check(format: KvFormat) -> Result<(), BackendError> {
    if format != KvFormat::FP8 {
        return Ok(());
    }
    Err(BackendError::Contract {
        op: "kv_cache",
        operand: "format",
        expected: "BF16, F32 or INT8: a CPU has no arithmetic for e4m3".to_owned(),
        found: format!("{format:?}"),
    })
}

impl KvMemory {
    /// Zeroed, so that what is never written is finite.
    pub fn new(arena: &mut Arena, shape: KvShape) -> Result<Self, BackendError> {
        check(shape.format)?;
        let heads = [shape.layers, shape.blocks, shape.kv_heads];
        // A vector load at the last number may read this far past it.
        let len = product(heads, 2 * shape.head_size * BLOCK_TOKENS)
            .and_then(|len| len.checked_add(LANES))
            .unwrap_or(usize::MAX);
        let what = "K/V cache";
        let numbers = match shape.format {
            KvFormat::F32 => Numbers::F32(arena.zeroed(what, len)?),
            KvFormat::BF16 => Numbers::BF16(arena.zeroed(what, len)?),
            KvFormat::INT8 | KvFormat::FP8 => {
                let scales = product(heads, 2 * BLOCK_TOKENS).unwrap_or(usize::MAX);
                Numbers::INT8(arena.zeroed(what, len)?, arena.zeroed(what, scales)?)
            }
        };
        Ok(Self { shape, numbers })
    }

    /// Its shape.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// One layer, to write.
    pub fn layer_mut(&mut self, layer: usize) -> Cache<'_> {
        let store = match &mut self.numbers {
            Numbers::F32(numbers) => Store::F32(Parts::new(numbers)),
            Numbers::BF16(numbers) => Store::BF16(Parts::new(numbers)),
            Numbers::INT8(codes, scales) => Store::INT8(Parts::new(codes), Parts::new(scales)),
        };
        Cache {
            shape: self.shape,
            layer,
            store,
        }
    }

    /// All layers, to read.
    pub fn view(&self) -> View<'_> {
        match &self.numbers {
            Numbers::F32(numbers) => View::F32(numbers),
            Numbers::BF16(numbers) => View::BF16(numbers),
            Numbers::INT8(codes, scales) => View::INT8(codes, scales),
        }
    }
}

fn product(heads: [usize; 3], numbers: usize) -> Option<usize> {
    heads.into_iter().try_fold(numbers, usize::checked_mul)
}

/// Where K of this head starts in `block`; V follows.
pub fn block_at(shape: &KvShape, layer: usize, block: BlockId, head: usize) -> usize {
    index(shape, layer, block, head) * 2 * shape.head_size * BLOCK_TOKENS
}

/// Where the scales of the block that starts at `block_at` do: 16 of K, 16 of V.
pub fn scales_at(size: usize, block_at: usize) -> usize {
    block_at / size
}

fn index(shape: &KvShape, layer: usize, block: BlockId, head: usize) -> usize {
    (layer * shape.blocks + block.index()) * shape.kv_heads + head
}

/// The numbers of a cache.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// f32.
    F32(&'a [f32]),
    /// bf16.
    BF16(&'a [u16]),
    /// Integers, and their scales (bf16) at [`scales_at`].
    INT8(&'a [i8], &'a [u16]),
}

/// One layer of the cache, to write.
pub struct Cache<'a> {
    shape: KvShape,
    layer: usize,
    store: Store<'a>,
}

/// The numbers of a cache, in parts.
enum Store<'a> {
    F32(Parts<'a, f32>),
    BF16(Parts<'a, u16>),
    INT8(Parts<'a, i8>, Parts<'a, u16>),
}

impl Cache<'_> {
    /// Writes one position of one head: a column of K, a row of V.
    ///
    /// # Safety
    /// Nobody else may use position `token` of this head's `block`.
    #[inline(always)]
    pub unsafe fn write<S: Simd>(
        &self,
        simd: S,
        (block, token): (BlockId, usize),
        head: usize,
        k: &[f32],
        v: &[f32],
    ) {
        let size = self.shape.head_size;
        let k_at = block_at(&self.shape, self.layer, block, head) + token;
        let v_at = k_at - token + (BLOCK_TOKENS + token) * size;
        // SAFETY: by contract, and `slice` checks the bounds.
        unsafe {
            match &self.store {
                Store::F32(numbers) => {
                    lay(numbers, k_at, BLOCK_TOKENS, k);
                    lay(numbers, v_at, 1, v);
                }
                Store::BF16(numbers) => {
                    lay_bf16(simd, numbers, k_at, BLOCK_TOKENS, k);
                    lay_bf16(simd, numbers, v_at, 1, v);
                }
                Store::INT8(codes, scales) => {
                    let scales_at = scales_at(size, k_at - token) + token;
                    let k_scale = lay_integers(simd, codes, k_at, BLOCK_TOKENS, k);
                    let v_scale = lay_integers(simd, codes, v_at, 1, v);
                    scales.slice(scales_at, 1)[0] = k_scale.to_bits();
                    scales.slice(scales_at + BLOCK_TOKENS, 1)[0] = v_scale.to_bits();
                }
            }
        }
    }
}

/// Writes a head as [`HeadScale`] says, `stride` apart from `at` on; returns its scale.
///
/// # Safety
/// Nobody else may use what is written.
#[inline(always)]
unsafe fn lay_integers<S: Simd>(
    simd: S,
    to: &Parts<'_, i8>,
    at: usize,
    stride: usize,
    x: &[f32],
) -> bf16 {
    let zero = simd.splat(0.0);
    let (mut most, mut broken) = (zero, zero);
    for first in (0..x.len()).step_by(LANES) {
        // SAFETY: within x.
        let x = unsafe { load_some(simd, x[first..].as_ptr(), LANES.min(x.len() - first)) };
        most = simd.max(simd.max(x, simd.sub(zero, x)), most);
        broken = simd.fma(x, zero, broken);
    }
    let rule = HeadScale::new(simd.largest(most), sum(simd, broken));
    let inverse = simd.splat(rule.inverse);
    let mut codes = [0i8; LANES];
    for first in (0..x.len()).step_by(LANES) {
        let lanes = LANES.min(x.len() - first);
        // SAFETY: within x, and by contract.
        unsafe {
            let x = load_some(simd, x[first..].as_ptr(), lanes);
            let rounded = simd.round(simd.mul(x, inverse));
            simd.store_i8(codes.as_mut_ptr(), rounded);
            lay(to, at + first * stride, stride, &codes[..lanes]);
        }
    }
    rule.scale
}

/// Writes a head as bf16, `stride` apart from `at` on.
///
/// # Safety
/// Nobody else may use what is written.
#[inline(always)]
unsafe fn lay_bf16<S: Simd>(simd: S, to: &Parts<'_, u16>, at: usize, stride: usize, x: &[f32]) {
    let mut kept = [0u16; LANES];
    for first in (0..x.len()).step_by(LANES) {
        let lanes = LANES.min(x.len() - first);
        // SAFETY: within x, and by contract.
        unsafe {
            let x = load_some(simd, x[first..].as_ptr(), lanes);
            simd.store_bf16(kept.as_mut_ptr(), x);
            lay(to, at + first * stride, stride, &kept[..lanes]);
        }
    }
}

/// Writes numbers `stride` apart from `at` on.
///
/// # Safety
/// Nobody else may use what is written.
#[inline(always)]
unsafe fn lay<T: Copy>(to: &Parts<'_, T>, at: usize, stride: usize, x: &[T]) {
    // SAFETY: by contract.
    unsafe {
        if stride == 1 {
            return to.slice(at, x.len()).copy_from_slice(x);
        }
        for (i, x) in x.iter().enumerate() {
            to.slice(at + i * stride, 1)[0] = *x;
        }
    }
}
