//! [`Simd`] in pairs of 256-bit registers.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::simd::{Kernel, Simd};

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub struct Avx2(());

impl Avx2 {
    /// The proof, if the processor has them all.
    #[inline]
    pub fn detect() -> Option<Self> {
        let here = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        here.then_some(Self(()))
    }
}

/// # Safety
/// The processor must have the features named.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn start<K: Kernel>(simd: Avx2, kernel: K) {
    kernel.run(simd);
}

/// Adds the sums of two products each of unsigned bytes of `w` and signed ones of `x` to the i16 of `sum`.
///
/// In assembly because LLVM turns the chain over the quads into a tree for each row, for which it keeps a block's unpacked weights
/// on the stack: a load for each product instead of one for all rows of a tile.
#[target_feature(enable = "avx2")]
#[inline]
fn add_products(mut sum: __m256i, w: __m256i, x: __m256i) -> __m256i {
    // SAFETY: registers only, of an instruction set that the function names.
    unsafe {
        std::arch::asm!(
            "vpmaddubsw {product}, {w}, {x}",
            "vpaddw {sum}, {sum}, {product}",
            product = out(ymm_reg) _,
            w = in(ymm_reg) w,
            x = in(ymm_reg) x,
            sum = inout(ymm_reg) sum,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// As bf16, in the low halves of 32 bits.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow(x: __m256) -> __m256i {
    let bits = _mm256_castps_si256(x);
    let cut = _mm256_srli_epi32::<16>(bits);
    let odd = _mm256_and_si256(cut, _mm256_set1_epi32(1));
    let half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, half));
    let quiet = _mm256_or_si256(cut, _mm256_set1_epi32(0x40));
    let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(x, x));
    _mm256_blendv_epi8(rounded, quiet, nan)
}

// Every `unsafe` below is a call of an intrinsic of AVX2, FMA or F16C, which the processor has since `self` exists; where it
// takes a pointer, the caller's contract makes it good for 16 items.
impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const ACCUMULATORS: usize = 6;
    const INTEGER_ROWS: usize = 4;
    const SIGNED_OFFSET: i32 = 0;
    const SMALL_IS_WHOLE: bool = false;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        // SAFETY: see above the impl.
        unsafe { start(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: see above the impl.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            self.bits_to_float([_mm256_slli_epi32::<16>(low), _mm256_slli_epi32::<16>(high)])
        }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: see above the impl.
        unsafe {
            let (low, high) = (from.cast(), from.add(8).cast());
            [
                _mm256_cvtph_ps(_mm_loadu_si128(low)),
                _mm256_cvtph_ps(_mm_loadu_si128(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        // SAFETY: see above the impl.
        unsafe {
            _mm256_storeu_ps(to, x[0]);
            _mm256_storeu_ps(to.add(8), x[1]);
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    fn keep_where_ge(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        // SAFETY: see above the impl.
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_GE_OQ>(a[0], b[0]);
            let high = _mm256_cmp_ps::<_CMP_GE_OQ>(a[1], b[1]);
            [_mm256_and_ps(low, x[0]), _mm256_and_ps(high, x[1])]
        }
    }

    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1])] }
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            let (low, high) = (from.cast(), from.add(8).cast());
            [
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(low)),
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            let (low, high) = (from.cast(), from.add(8).cast());
            [
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(low)),
                _mm256_cvtepi8_epi32(_mm_loadl_epi64(high)),
            ]
        }
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }

    #[inline(always)]
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            [
                _mm256_srli_epi32::<BITS>(a[0]),
                _mm256_srli_epi32::<BITS>(a[1]),
            ]
        }
    }

    #[inline(always)]
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            [
                _mm256_slli_epi32::<BITS>(a[0]),
                _mm256_slli_epi32::<BITS>(a[1]),
            ]
        }
    }

    #[inline(always)]
    fn sar<const BITS: i32>(self, a: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            [
                _mm256_srai_epi32::<BITS>(a[0]),
                _mm256_srai_epi32::<BITS>(a[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(32).cast()),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        // SAFETY: see above the impl.
        unsafe {
            // Packing works within halves of a register: the permutation puts them in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(x[0], x[1]));
            let (low, high) = (
                _mm256_castsi256_si128(words),
                _mm256_extracti128_si256::<1>(words),
            );
            _mm_storeu_si128(to.cast(), _mm_packs_epi16(low, high));
        }
    }

    // Sums are sixteen i16 a register, two neighbours a lane.
    #[inline(always)]
    fn dot_small(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            [
                add_products(sums[0], w[0], x[0]),
                add_products(sums[1], w[1], x[1]),
            ]
        }
    }

    #[inline(always)]
    fn whole(self, sums: Self::I) -> Self::I {
        // SAFETY: see above the impl.
        unsafe {
            let one = _mm256_set1_epi16(1);
            [
                _mm256_madd_epi16(sums[0], one),
                _mm256_madd_epi16(sums[1], one),
            ]
        }
    }

    // The instruction multiplies unsigned bytes by signed ones: the signs of w go to x.
    #[inline(always)]
    fn dot_signed(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        let half = |i: usize| {
            // SAFETY: see above the impl.
            unsafe {
                let (w, x) = (_mm256_abs_epi8(w[i]), _mm256_sign_epi8(x[i], w[i]));
                let pairs = _mm256_maddubs_epi16(w, x);
                _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
            }
        };
        [half(0), half(1)]
    }

    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
    }

    #[inline(always)]
    fn bits_to_float(self, a: Self::I) -> Self::F {
        // SAFETY: see above the impl.
        unsafe { [_mm256_castsi256_ps(a[0]), _mm256_castsi256_ps(a[1])] }
    }

    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        // SAFETY: see above the impl.
        unsafe {
            let eight = _mm256_max_ps(x[0], x[1]);
            let four = _mm_max_ps(
                _mm256_castps256_ps128(eight),
                _mm256_extractf128_ps::<1>(eight),
            );
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn any_nan(self, x: Self::F) -> bool {
        // SAFETY: see above the impl.
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(x[0], x[1])) != 0 }
    }

    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: Self::F) {
        // SAFETY: see above the impl.
        unsafe {
            let (low, high) = (narrow(x[0]), narrow(x[1]));
            // Sixteen bits each, in the order 0, 2, 1, 3 of quarters until they are turned.
            let packed = _mm256_packus_epi32(low, high);
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(to.cast(), ordered);
        }
    }
}
