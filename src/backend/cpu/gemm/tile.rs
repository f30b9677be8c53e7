//! A tile of sums in f32: some rows of x against some panels, in registers.

// Indices name a tile's axes: r its rows, p its panels.
#![allow(unsafe_code, clippy::needless_range_loop)]

use super::super::simd::{Kernel, LANES, Simd, load_some, store_some};

/// Where weights come from.
pub trait Weights: Copy {
    /// Sixteen weights, `at` numbers from the first.
    ///
    /// # Safety
    /// A vector must be readable there.
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F;
}

/// f32, from the first on.
#[derive(Clone, Copy)]
pub struct F32s(pub *const f32);
/// bf16, from the first on.
#[derive(Clone, Copy)]
pub struct Bf16s(pub *const u16);

impl Weights for F32s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load(self.0.add(at)) }
    }
}

impl Weights for Bf16s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        unsafe { simd.load_bf16(self.0.add(at)) }
    }
}

/// Integers of a signed byte, from the first on.
#[derive(Clone, Copy)]
pub struct Int8s(pub *const i8);

impl Weights for Int8s {
    #[inline(always)]
    unsafe fn load<S: Simd>(self, simd: S, at: usize) -> S::F {
        // SAFETY: by contract.
        simd.to_float(unsafe { simd.load_i8(self.0.add(at)) })
    }
}

/// Where a tile's sums go.
#[derive(Clone, Copy)]
pub struct Target {
    /// The first row's first output.
    pub y: *mut f32,
    /// Numbers from row to row.
    pub stride: usize,
    /// Outputs of the last panel.
    pub lanes: usize,
    /// Sums start from y instead of 0.
    pub add: bool,
}

/// R rows of x against P panels: sums over segments of inputs, one behind the other in x, each anywhere among the weights.
///
/// Whoever makes one vouches that all it names is readable, y writable, and that nobody else uses y.
#[derive(Clone, Copy)]
pub struct Tile<'a, W, const R: usize, const P: usize> {
    /// All weights.
    pub weights: W,
    /// Where each segment's weights start in each panel, in numbers from the first.
    pub segments: &'a [[usize; P]],
    /// Numbers from the weights of one input to those of the next.
    pub stride: usize,
    /// Inputs in a segment.
    pub count: usize,
    /// The first row's first input.
    pub x: *const f32,
    /// Numbers from row to row.
    pub x_stride: usize,
    /// Where the sums go.
    pub target: Target,
}

impl<W: Weights, const R: usize, const P: usize> Kernel for Tile<'_, W, R, P> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // SAFETY: vouched for by the maker of the tile.
        unsafe {
            let mut sums = self.begin(simd);
            let mut x = self.x;
            for segment in self.segments {
                for k in 0..self.count {
                    let mut w = [simd.splat(0.0); P];
                    for p in 0..P {
                        w[p] = self.weights.load(simd, segment[p] + k * self.stride);
                    }
                    for r in 0..R {
                        let x = simd.splat(*x.add(r * self.x_stride + k));
                        for p in 0..P {
                            sums[r][p] = simd.fma(x, w[p], sums[r][p]);
                        }
                        for p in 0..P {
                            sums[r][p] = simd.pin_floats(sums[r][p]);
                        }
                    }
                }
                x = x.add(self.count);
            }
            self.finish(simd, sums);
        }
    }
}

impl<W: Weights, const R: usize, const P: usize> Tile<'_, W, R, P> {
    /// # Safety
    /// The tile of y must be readable.
    #[inline(always)]
    unsafe fn begin<S: Simd>(&self, simd: S) -> [[S::F; P]; R] {
        let Target {
            y,
            stride,
            lanes,
            add,
        } = self.target;
        let mut sums = [[simd.splat(0.0); P]; R];
        if add {
            for r in 0..R {
                for p in 0..P {
                    let lanes = if p + 1 == P { lanes } else { LANES };
                    // SAFETY: by contract.
                    sums[r][p] = unsafe { load_some(simd, y.add(r * stride + p * LANES), lanes) };
                }
            }
        }
        sums
    }

    /// # Safety
    /// The tile of y must be writable.
    #[inline(always)]
    unsafe fn finish<S: Simd>(&self, simd: S, sums: [[S::F; P]; R]) {
        let Target {
            y, stride, lanes, ..
        } = self.target;
        for r in 0..R {
            for p in 0..P {
                let lanes = if p + 1 == P { lanes } else { LANES };
                // SAFETY: by contract.
                unsafe { store_some(simd, y.add(r * stride + p * LANES), lanes, sums[r][p]) };
            }
        }
    }
}

/// Panels in a tile of `rows`: as many as the registers hold.
pub const fn panels_beside(accumulators: usize, rows: usize) -> usize {
    match accumulators / rows {
        0 | 1 => 1,
        2 | 3 => 2,
        _ => 4,
    }
}
