//! [`Simd`] in one 512-bit register. Processors with AVX-512 but without its byte products (VNNI) use AVX2.

#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::simd::{Kernel, Simd};

/// Proof of AVX-512F, BW and VNNI, and of AVX2's set.
#[derive(Clone, Copy)]
pub struct Avx512(());

impl Avx512 {
    /// The proof, if the processor has them all.
    #[inline]
    pub fn detect() -> Option<Self> {
        let here = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vnni")
            && Avx2::detect().is_some();
        here.then_some(Self(()))
    }
}

/// # Safety
/// The processor must have the features named.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
#[inline(never)]
unsafe fn start<K: Kernel>(simd: Avx512, kernel: K) {
    kernel.run(simd);
}

/// See [`Simd::pin`] and [`Simd::pin_floats`].
#[target_feature(enable = "avx512f")]
#[inline]
fn pinned(mut a: __m512i) -> __m512i {
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(zmm_reg) a, options(nomem, nostack, preserves_flags));
    }
    a
}

// Every `unsafe` below is a call of an intrinsic of AVX-512F or VNNI, which the processor has since `self` exists; where it takes a
// pointer, the caller's contract makes it good for 16 items.
impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const ACCUMULATORS: usize = 24;
    const INTEGER_ROWS: usize = 12;
    const SIGNED_OFFSET: i32 = 128;
    const SMALL_IS_WHOLE: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        // SAFETY: see above the impl.
        unsafe { start(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: see above the impl.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        // SAFETY: see above the impl.
        unsafe { _mm512_storeu_ps(to, x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn keep_where_ge(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(a, b), x) }
    }

    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_cvtps_epi32(x) }
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_and_si512(a, b) }
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_or_si512(a, b) }
    }

    #[inline(always)]
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            // This one wants its shift as u32, which a const i32 cannot become.
            _mm512_srl_epi32(a, _mm_cvtsi32_si128(BITS))
        }
    }

    #[inline(always)]
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(BITS)) }
    }

    #[inline(always)]
    fn sar<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_sra_epi32(a, _mm_cvtsi32_si128(BITS)) }
    }

    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        // SAFETY: see above the impl.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtsepi32_epi8(x)) }
    }

    #[inline(always)]
    fn dot_small(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_dpbusd_epi32(sums, w, x) }
    }

    #[inline(always)]
    fn whole(self, sums: Self::I) -> Self::I {
        sums
    }

    // The instruction multiplies unsigned bytes by signed ones: w + 128 is w with its highest bit turned.
    #[inline(always)]
    fn dot_signed(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { _mm512_dpbusd_epi32(sums, _mm512_xor_si512(w, _mm512_set1_epi8(-128)), x) }
    }

    #[inline(always)]
    fn pin(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { pinned(a) }
    }

    #[inline(always)]
    fn pin_floats(self, a: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_castsi512_ps(pinned(_mm512_castps_si512(a))) }
    }

    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_cvtepi32_ps(a) }
    }

    #[inline(always)]
    fn bits_to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { _mm512_castsi512_ps(a) }
    }

    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: see above the impl.
        unsafe { _mm512_reduce_max_ps(x) }
    }

    #[inline(always)]
    fn any_nan(self, x: Self::F) -> bool {
        // SAFETY: see above the impl.
        unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x) != 0 }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: Self::F) {
        // SAFETY: see above the impl.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let cut = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(cut, _mm512_set1_epi32(1));
            let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let quiet = _mm512_set1_epi32(0x40);
            let kept = _mm512_mask_or_epi32(rounded, nan, cut, quiet);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(kept));
        }
    }
}
