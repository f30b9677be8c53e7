//! Weights of any format as f32.

#![allow(unsafe_code)]

use std::ops::Range;

use super::super::pack::Format;
use super::super::simd::{Kernel, LANES, Simd};

/// Widens some inputs (whole units) of a panel, or of its extension, into (inputs, LANES). Its maker vouches that it has them.
pub(super) struct Widen<'a> {
    pub(super) weights: *const u8,
    pub(super) format: Format,
    pub(super) lanes: usize,
    pub(super) inputs: Range<usize>,
    pub(super) out: &'a mut [f32],
}

impl Kernel for Widen<'_> {
    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (weights, lanes) = (self.weights, self.lanes);
        let (out, _) = self.out.as_chunks_mut::<LANES>();
        // SAFETY: vouched for by the maker, and `out` is a slice that `zip` and `chunks` keep within.
        unsafe {
            match self.format {
                Format::F32 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load(weights.cast::<f32>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::BF16 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load_bf16(weights.cast::<u16>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::F16 => {
                    for (out, k) in out.iter_mut().zip(self.inputs) {
                        let w = simd.load_f16(weights.cast::<u16>().add(k * lanes));
                        simd.store(out.as_mut_ptr(), w);
                    }
                }
                Format::Quant(quant) => {
                    let len = quant.unit_len();
                    let units = self.inputs.start / len..self.inputs.end / len;
                    for (unit, out) in units.zip(out.chunks_exact_mut(len)) {
                        let unit = weights.add(unit * quant.unit_bytes());
                        quant.widen(simd, unit, out.as_mut_ptr().cast());
                    }
                }
            }
        }
    }
}
