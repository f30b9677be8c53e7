//! [`Simd`] in plain Rust, for any processor.

#![allow(unsafe_code)]

use half::f16;

use super::simd::{Kernel, LANES, Simd};

/// Always there.
#[derive(Clone, Copy)]
pub struct Scalar;

#[inline(always)]
fn zip<T: Copy, U>(a: [T; LANES], b: [T; LANES], f: impl Fn(T, T) -> U) -> [U; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The sum of four products of signed bytes.
#[inline(always)]
fn four_products(w: [u8; 4], x: [u8; 4]) -> i32 {
    let product = |i: usize| i32::from(w[i] as i8) * i32::from(x[i] as i8);
    product(0) + product(1) + product(2) + product(3)
}

/// 16 items, whatever their alignment.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn read<T>(from: *const T) -> [T; LANES] {
    // SAFETY: by contract.
    unsafe { from.cast::<[T; LANES]>().read_unaligned() }
}

#[inline(never)]
fn start<K: Kernel>(simd: Scalar, kernel: K) {
    kernel.run(simd);
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    const ACCUMULATORS: usize = 1;
    const INTEGER_ROWS: usize = 1;
    const SIGNED_OFFSET: i32 = 0;
    const SMALL_IS_WHOLE: bool = true;

    #[inline(always)]
    fn call<K: Kernel>(self, kernel: K) {
        start(self, kernel);
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> Self::F {
        // SAFETY: by contract.
        unsafe { read(from) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const u16) -> Self::F {
        // SAFETY: by contract.
        unsafe { read(from) }.map(|x| f32::from_bits(u32::from(x) << 16))
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> Self::F {
        // SAFETY: by contract.
        unsafe { read(from) }.map(|x| f16::from_bits(x).to_f32())
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: Self::F) {
        // SAFETY: by contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(x) }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Not `mul_add`: without the instruction that is a slow call.
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn keep_where_ge(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F {
        std::array::from_fn(|i| if a[i] >= b[i] { x[i] } else { 0.0 })
    }

    #[inline(always)]
    fn round(self, x: Self::F) -> Self::I {
        // Adding 1.5 * 2^23 leaves the integer, rounded to even, in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        x.map(|x| (x + MAGIC).to_bits() as i32 - MAGIC.to_bits() as i32)
    }

    #[inline(always)]
    unsafe fn load_u8(self, from: *const u8) -> Self::I {
        // SAFETY: by contract.
        unsafe { read(from) }.map(i32::from)
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> Self::I {
        // SAFETY: by contract.
        unsafe { read(from) }.map(i32::from)
    }

    #[inline(always)]
    fn splat_int(self, x: i32) -> Self::I {
        [x; LANES]
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, i32::wrapping_add)
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a & b)
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        zip(a, b, |a, b| a | b)
    }

    #[inline(always)]
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I {
        a.map(|a| ((a as u32) >> BITS) as i32)
    }

    #[inline(always)]
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I {
        a.map(|a| a << BITS)
    }

    #[inline(always)]
    fn sar<const BITS: i32>(self, a: Self::I) -> Self::I {
        a.map(|a| a >> BITS)
    }

    #[inline(always)]
    unsafe fn load_quads(self, from: *const u8) -> Self::I {
        // SAFETY: by contract.
        unsafe { read(from.cast::<[u8; 4]>()) }.map(i32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn store_i8(self, to: *mut i8, x: Self::I) {
        // SAFETY: by contract.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(x.map(|x| x as i8)) }
    }

    #[inline(always)]
    fn dot_small(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        self.dot_signed(sums, w, x)
    }

    #[inline(always)]
    fn whole(self, sums: Self::I) -> Self::I {
        sums
    }

    #[inline(always)]
    fn dot_signed(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I {
        std::array::from_fn(|i| sums[i] + four_products(w[i].to_le_bytes(), x[i].to_le_bytes()))
    }

    #[inline(always)]
    fn to_float(self, a: Self::I) -> Self::F {
        a.map(|a| a as f32)
    }

    #[inline(always)]
    fn bits_to_float(self, a: Self::I) -> Self::F {
        a.map(|a| f32::from_bits(a as u32))
    }
}
