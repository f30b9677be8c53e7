//! [`Simd`] in four 128-bit registers of aarch64.

#![allow(unsafe_code)]

use std::arch::aarch64::*;

use half::f16;

use super::simd::{Kernel, LANES, Simd};

/// Every aarch64 processor has it.
#[derive(Clone, Copy)]
pub struct Neon;

#[inline(always)]
fn zip<T: Copy, U>(a: [T; 4], b: [T; 4], f: impl Fn(T, T) -> U) -> [U; 4] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(never)]
fn start<K: Kernel>(simd: Neon, kernel: K) {
    kernel.run(simd);
}

// Every `unsafe` below is a call of a NEON intrinsic, which is part of aarch64; where it takes a pointer, the caller's contract
// makes it good for 16 items.
impl Simd for Neon {
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    const ACCUMULATORS: usize = 6;
    const INTEGER_ROWS: usize = 4;
    const SIGNED_OFFSET: i32 = 0;
    const SMALL_IS_WHOLE: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        start(self, kernel);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: see above the impl.
        std::array::from_fn(|i| unsafe { vld1q_f32(from.add(4 * i)) })
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        std::array::from_fn(|i| {
            // SAFETY: see above the impl.
            unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.add(4 * i)))) }
        })
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // The conversion's intrinsic needs the unstable f16 type.
        // SAFETY: see above the impl.
        let halves = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        let wide = halves.map(|x| f16::from_bits(x).to_f32());
        // SAFETY: see above the impl.
        unsafe { self.load(wide.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        for (i, x) in x.into_iter().enumerate() {
            // SAFETY: see above the impl.
            unsafe { vst1q_f32(to.add(4 * i), x) };
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vaddq_f32(a, b) })
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vsubq_f32(a, b) })
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vmulq_f32(a, b) })
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vdivq_f32(a, b) })
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vbslq_f32(vcltq_f32(a, b), a, b) })
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        std::array::from_fn(|i| unsafe { vfmaq_f32(c[i], a[i], b[i]) })
    }

    #[inline(always)]
    fn keep_where_ge(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        std::array::from_fn(|i| {
            // SAFETY: see above the impl.
            unsafe { vbslq_f32(vcgeq_f32(a[i], b[i]), x[i], vdupq_n_f32(0.0)) }
        })
    }

    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        // SAFETY: see above the impl.
        x.map(|x| unsafe { vcvtnq_s32_f32(x) })
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        let bytes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() }.map(i32::from);
        // SAFETY: see above the impl.
        std::array::from_fn(|i| unsafe { vld1q_s32(bytes.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::I {
        // SAFETY: see above the impl.
        let bytes = unsafe { from.cast::<[i8; LANES]>().read_unaligned() }.map(i32::from);
        // SAFETY: see above the impl.
        std::array::from_fn(|i| unsafe { vld1q_s32(bytes.as_ptr().add(4 * i)) })
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [vdupq_n_s32(x); 4] }
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vaddq_s32(a, b) })
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vandq_s32(a, b) })
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        zip(a, b, |a, b| unsafe { vorrq_s32(a, b) })
    }

    #[inline(always)]
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I {
        a.map(|a| {
            // SAFETY: see above the impl.
            unsafe {
                vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(a), vdupq_n_s32(-BITS)))
            }
        })
    }

    #[inline(always)]
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        a.map(|a| unsafe { vshlq_s32(a, vdupq_n_s32(BITS)) })
    }

    #[inline(always)]
    fn sar<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        a.map(|a| unsafe { vshlq_s32(a, vdupq_n_s32(-BITS)) })
    }

    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        std::array::from_fn(|i| unsafe { vreinterpretq_s32_u8(vld1q_u8(from.add(16 * i))) })
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        // SAFETY: see above the impl.
        unsafe {
            let low = vcombine_s16(vqmovn_s32(x[0]), vqmovn_s32(x[1]));
            let high = vcombine_s16(vqmovn_s32(x[2]), vqmovn_s32(x[3]));
            vst1q_s8(to, vcombine_s8(vqmovn_s16(low), vqmovn_s16(high)));
        }
    }

    #[inline(always)]
    fn dot_small(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        self.dot_signed(sums, w, x)
    }

    #[inline(always)]
    fn whole(self, sums: Self::I) -> Self::I {
        sums
    }

    // In instructions that every aarch64 has: products in i16, then sums of pairs of pairs.
    #[inline(always)]
    fn dot_signed(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        std::array::from_fn(|i| {
            // SAFETY: see above the impl.
            unsafe {
                let (w, x) = (vreinterpretq_s8_s32(w[i]), vreinterpretq_s8_s32(x[i]));
                let low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
                let high = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
                vaddq_s32(sums[i], vpaddq_s32(low, high))
            }
        })
    }

    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        a.map(|a| unsafe { vcvtq_f32_s32(a) })
    }

    #[inline(always)]
    fn bits_to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        a.map(|a| unsafe { vreinterpretq_f32_s32(a) })
    }
}
