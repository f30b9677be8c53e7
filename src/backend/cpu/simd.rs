//! Sixteen f32 lanes on every instruction set: kernels are written once over [`Simd`] and chosen at run time.
//!
//! Sixteen lanes are a panel's outputs, a block's keys, or a stretch of a row, whatever the registers' width. Each lane is
//! computed alone, so a sum's order depends on the kernel only. A value of a `Simd` type is a proof: it exists only where the
//! processor has the instructions.

#![allow(unsafe_code)]

use half::bf16;

use super::scalar::Scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2::Avx2, avx512::Avx512};

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Instruction sets with kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust; multiplies and adds separately where the others fuse.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512F, and AVX2's as well.
    Avx512,
    /// aarch64's.
    Neon,
}

impl Isa {
    /// Every instruction set, best last.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Neon];

    /// The word used in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }
}

/// An instruction set that this processor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Isa);

impl Level {
    /// The best one.
    pub fn best() -> Self {
        let best = Isa::ALL.into_iter().rev().find_map(Self::of);
        best.unwrap_or(Self(Isa::Scalar))
    }

    /// `isa`, if the processor has it.
    pub fn of(isa: Isa) -> Option<Self> {
        let here = match isa {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::detect().is_some(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::detect().is_some(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => true,
            #[allow(unreachable_patterns)]
            _ => false,
        };
        here.then_some(Self(isa))
    }

    /// Which one.
    pub fn isa(self) -> Isa {
        self.0
    }

    /// Runs `kernel` with this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Isa::Scalar => Scalar.call(kernel),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                if let Some(simd) = Avx2::detect() {
                    simd.call(kernel);
                }
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                if let Some(simd) = Avx512::detect() {
                    simd.call(kernel);
                }
            }
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => super::neon::Neon.call(kernel),
            #[allow(unreachable_patterns)]
            _ => {}
        }
    }
}

/// A piece of work that runs on any instruction set. `run` and all it calls are `#[inline(always)]`, so that they are compiled
/// with the features of the one function that starts them; a kernel starts another by [`Simd::call`], so that what many use is
/// compiled once.
pub trait Kernel {
    /// Does it.
    fn run<S: Simd>(self, simd: S);
}

/// Arithmetic on [`LANES`] f32 lanes.
pub trait Simd: Copy {
    /// f32 lanes.
    type F: Copy;
    /// i32 lanes.
    type I: Copy;
    /// Sums of 16 lanes that fit the registers beside operands: 1 (no tiles), 6 or 24.
    const ACCUMULATORS: usize;
    /// Rows of a tile of integers that fit the registers.
    const INTEGER_ROWS: usize;
    /// Whether [`Simd::dot_small`] sums integers, of which [`Simd::whole`] has nothing to make.
    const SMALL_IS_WHOLE: bool;
    /// What [`Simd::dot_signed`] takes each byte of `w` to be too large by.
    const SIGNED_OFFSET: i32;

    /// Runs `kernel` in a function of its own.
    fn call<K: Kernel>(self, kernel: K);

    /// All lanes x.
    fn splat(self, x: f32) -> Self::F;
    /// 16 numbers.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load(self, from: *const f32) -> Self::F;
    /// 16 bf16, widened.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_bf16(self, from: *const u16) -> Self::F;
    /// 16 f16, widened.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_f16(self, from: *const u16) -> Self::F;
    /// Writes 16 numbers.
    ///
    /// # Safety
    /// They must be writable.
    unsafe fn store(self, to: *mut f32, x: Self::F);
    /// a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a - b.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger; `b` where one is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; `b` where one is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// a b + c, fused where the set can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `x` where `a >= b`, else 0 (and where one is NaN).
    fn keep_where_ge(self, a: Self::F, b: Self::F, x: Self::F) -> Self::F;
    /// To the nearest integer; |x| is below 2^22.
    fn round(self, x: Self::F) -> Self::I;

    /// 16 unsigned bytes.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_u8(self, from: *const u8) -> Self::I;
    /// 16 signed bytes.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load_i8(self, from: *const i8) -> Self::I;
    /// All lanes x.
    fn splat_int(self, x: i32) -> Self::I;
    /// a + b.
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise and.
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    /// Bitwise or.
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    /// Shift to the right by BITS, zeros come in.
    fn shr<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// Shift to the left by BITS.
    fn shl<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// Shift to the right by BITS, copies of the sign come in.
    fn sar<const BITS: i32>(self, a: Self::I) -> Self::I;
    /// 16 lanes of four bytes each, as they lie.
    ///
    /// # Safety
    /// 64 bytes must be readable.
    unsafe fn load_quads(self, from: *const u8) -> Self::I;
    /// Writes 16 integers of a signed byte each.
    ///
    /// # Safety
    /// 16 bytes must be writable.
    unsafe fn store_i8(self, to: *mut i8, x: Self::I);
    /// Adds each lane's sum of four products of bytes to `sums`: bytes of `w` below 128, those of `x` in -127..=127. What `sums`
    /// holds only [`Simd::whole`] knows, and only while no half of four products' sums leaves an i16.
    fn dot_small(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// The sums of [`Simd::dot_small`] as integers.
    fn whole(self, sums: Self::I) -> Self::I;
    /// Adds each lane's sum of four products of signed bytes, those of `x` in -127..=127, to the integers `sums`; a product's byte
    /// of `w` may be too large by [`Simd::SIGNED_OFFSET`].
    fn dot_signed(self, sums: Self::I, w: Self::I, x: Self::I) -> Self::I;
    /// `a`, in a register and not computed earlier or later: the compiler orders a tile of sums one by one if it may, and each is then
    /// a chain that waits for itself.
    #[inline(always)]
    fn pin(self, a: Self::I) -> Self::I {
        a
    }
    /// As [`Simd::pin`]: a tile of sums leaves no room for operands that are loaded long before they are used.
    #[inline(always)]
    fn pin_floats(self, a: Self::F) -> Self::F {
        a
    }
    /// Integers as floats.
    fn to_float(self, a: Self::I) -> Self::F;
    /// The bits of integers taken for floats.
    fn bits_to_float(self, a: Self::I) -> Self::F;

    /// The largest lane; any, where one is NaN.
    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        fold(to_array(self, x), f32::max)
    }

    /// Whether a lane is NaN.
    #[inline(always)]
    fn any_nan(self, x: Self::F) -> bool {
        let mut any = false;
        for lane in to_array(self, x) {
            any |= lane.is_nan();
        }
        any
    }

    /// Writes 16 numbers as bf16, rounded as [`bf16::from_f32`] does.
    ///
    /// # Safety
    /// They must be writable.
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16, x: Self::F) {
        for (i, lane) in to_array(self, x).into_iter().enumerate() {
            // SAFETY: by contract.
            unsafe { to.add(i).write(bf16::from_f32(lane).to_bits()) };
        }
    }
}

/// Lanes 0..lanes are loaded, the others are 0.
///
/// # Safety
/// `lanes <= LANES` numbers must be readable.
#[inline(always)]
pub unsafe fn load_some<S: Simd>(simd: S, from: *const f32, lanes: usize) -> S::F {
    if lanes == LANES {
        // SAFETY: by contract.
        return unsafe { simd.load(from) };
    }
    let mut all = [0.0f32; LANES];
    // SAFETY: by contract, and `lanes < LANES`; `all` holds LANES.
    unsafe {
        std::ptr::copy_nonoverlapping(from, all.as_mut_ptr(), lanes);
        simd.load(all.as_ptr())
    }
}

/// Stores lanes 0..lanes.
///
/// # Safety
/// `lanes <= LANES` numbers must be writable.
#[inline(always)]
pub unsafe fn store_some<S: Simd>(simd: S, to: *mut f32, lanes: usize, x: S::F) {
    if lanes == LANES {
        // SAFETY: by contract.
        return unsafe { simd.store(to, x) };
    }
    let all = to_array(simd, x);
    // SAFETY: by contract, and `lanes < LANES`.
    unsafe { std::ptr::copy_nonoverlapping(all.as_ptr(), to, lanes) }
}

/// The lanes.
#[inline(always)]
pub fn to_array<S: Simd>(simd: S, x: S::F) -> [f32; LANES] {
    let mut all = [0.0f32; LANES];
    // SAFETY: `all` holds LANES.
    unsafe { simd.store(all.as_mut_ptr(), x) };
    all
}

/// The sum of all lanes, in one fixed tree.
#[inline(always)]
pub fn sum<S: Simd>(simd: S, x: S::F) -> f32 {
    fold(to_array(simd, x), |a, b| a + b)
}

#[inline(always)]
fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = f(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// Below this exp is 0: its least normal result. Above the other it is the largest finite one's neighbour.
const EXP_LEAST: f32 = -87.336_54;
const EXP_MOST: f32 = 88.376_26;

/// e^x within 2 units in the last place; 0 below -87.34 (results that would be subnormal), 2.4e38 above 88.37; NaN stays NaN.
///
/// x = n ln 2 + r with |r| <= ln 2 / 2, e^r by Cephes' polynomial (public domain coefficients of `expf`), times 2^n.
#[inline(always)]
pub fn exp<S: Simd>(simd: S, x: S::F) -> S::F {
    let c = |value: f32| simd.splat(value);
    let inside = simd.min(c(EXP_MOST), simd.max(c(EXP_LEAST), x));
    let n = simd.round(simd.mul(inside, c(std::f32::consts::LOG2_E)));
    let n_float = simd.to_float(n);
    // ln 2 in two parts: the first has few enough bits that n times it is exact.
    let r = simd.fma(n_float, c(-0.693_359_4), inside);
    let r = simd.fma(n_float, c(2.121_944_4e-4), r);
    let mut p = c(1.987_569_1e-4);
    for coefficient in [
        1.398_2e-3,
        8.333_452e-3,
        4.166_579_6e-2,
        1.666_666_5e-1,
        5.000_000_3e-1,
    ] {
        p = simd.fma(p, r, c(coefficient));
    }
    let p = simd.add(simd.fma(p, simd.mul(r, r), r), c(1.0));
    let power = simd.bits_to_float(simd.shl::<23>(simd.add_int(n, simd.splat_int(127))));
    let y = simd.mul(p, power);
    // NaN fails the comparison from both sides: `0 * x` carries it on, and is 0 for all finite x.
    let nan = simd.sub(inside, inside);
    simd.add(simd.keep_where_ge(x, c(EXP_LEAST), y), nan)
}

/// x / (1 + e^-x).
#[inline(always)]
pub fn silu<S: Simd>(simd: S, x: S::F) -> S::F {
    let negative = simd.sub(simd.splat(0.0), x);
    simd.div(x, simd.add(simd.splat(1.0), exp(simd, negative)))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dots<'a> {
        small: &'a [u8; 4 * LANES],
        signed: &'a [u8; 4 * LANES],
        x: &'a [u8; 4 * LANES],
        sums: &'a mut [[f32; LANES]; 2],
        bytes: &'a mut [i8; LANES],
    }

    impl Kernel for Dots<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            // SAFETY: the arrays are quads.
            let [small, signed, x] =
                unsafe { [self.small, self.signed, self.x].map(|at| simd.load_quads(at.as_ptr())) };
            let zero = simd.splat_int(0);
            let sums = [
                simd.whole(simd.dot_small(simd.dot_small(zero, small, x), small, x)),
                simd.dot_signed(simd.splat_int(-S::SIGNED_OFFSET * 9), signed, x),
            ];
            *self.sums = sums.map(|sum| to_array(simd, simd.to_float(sum)));
            // SAFETY: LANES bytes.
            unsafe { simd.store_i8(self.bytes.as_mut_ptr(), simd.sar::<24>(x)) };
        }
    }

    #[test]
    fn products_of_bytes_are_exact_up_to_their_bounds() {
        let small: [u8; 64] = std::array::from_fn(|i| [0, 1, 62, 63][i / 16]);
        let signed: [u8; 64] = std::array::from_fn(|i| [128, 127, 255, 3][i % 4]);
        // Each lane's sum of x is 9 for the check of SIGNED_OFFSET.
        let x: [i8; 64] = std::array::from_fn(|i| [127, -127, 100, -91][(i + i / 4) % 4]);
        let x = x.map(|x| x as u8);
        for level in levels() {
            let (mut sums, mut bytes) = ([[0.0; LANES]; 2], [0; LANES]);
            level.run(Dots {
                small: &small,
                signed: &signed,
                x: &x,
                sums: &mut sums,
                bytes: &mut bytes,
            });
            for lane in 0..LANES {
                let product = |w: fn(u8) -> i32, at: &[u8]| -> i32 {
                    let four = at[4 * lane..].iter().zip(&x[4 * lane..]).take(4);
                    four.map(|(a, x)| w(*a) * i32::from(*x as i8)).sum()
                };
                let want = [
                    2 * product(i32::from, &small),
                    product(|w| i32::from(w as i8), &signed),
                ];
                let got = sums.map(|sums| sums[lane] as i32);
                assert_eq!(got, want, "{level:?} lane {lane}");
                assert_eq!(bytes[lane], x[4 * lane + 3] as i8, "{level:?} lane {lane}");
            }
        }
    }

    struct Lanes<'a>(&'a [f32; LANES], &'a mut (f32, bool, [u16; LANES]));

    impl Kernel for Lanes<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            // SAFETY: the arrays are LANES numbers.
            unsafe {
                let x = simd.load(self.0.as_ptr());
                self.1.0 = simd.largest(x);
                self.1.1 = simd.any_nan(x);
                simd.store_bf16(self.1.2.as_mut_ptr(), x);
            }
        }
    }

    #[test]
    fn the_largest_lane_is_found_and_bf16_is_rounded_as_the_crate_does() {
        // All signs, exponents and ways to round, NaN among them.
        let bits = (0..1u32 << 17).map(|i| i << 15 | [0, 1, 0x3fff, 0x7fff][i as usize / 3 % 4]);
        let numbers: Vec<f32> = bits.map(f32::from_bits).collect();
        for level in levels() {
            for x in numbers.as_chunks::<LANES>().0 {
                let mut got = (0.0, false, [0; LANES]);
                level.run(Lanes(x, &mut got));
                let (largest, nan, kept) = got;
                assert_eq!(nan, x.iter().any(|x| x.is_nan()), "{level:?} {x:?}");
                if !nan {
                    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(largest, most, "{level:?} {x:?}");
                }
                assert_eq!(kept, x.map(|x| bf16::from_f32(x).to_bits()), "{level:?}");
            }
        }
    }

    struct Exp<'a>(&'a [f32], &'a mut Vec<f32>);

    impl Kernel for Exp<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            for x in self.0.as_chunks::<LANES>().0 {
                // SAFETY: `x` is LANES numbers.
                let x = unsafe { simd.load(x.as_ptr()) };
                self.1.extend(to_array(simd, exp(simd, x)));
            }
        }
    }

    fn levels() -> impl Iterator<Item = Level> {
        Isa::ALL.into_iter().filter_map(Level::of)
    }

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let xs: Vec<f32> = (0..1 << 18)
            .map(|i| -87.3 + 175.6 * (i as f32 / (1 << 18) as f32))
            .collect();
        for level in levels() {
            let mut got = Vec::new();
            level.run(Exp(&xs, &mut got));
            let worst = xs.iter().zip(&got).map(|(x, got)| {
                let want = f64::from(*x).exp();
                let unit = f64::from(f32::EPSILON) * 2f64.powf(want.log2().floor());
                (f64::from(*got) - want).abs() / unit
            });
            let worst = worst.fold(0.0, f64::max);
            assert!(worst <= 2.0, "{level:?}: {worst}");
        }
    }

    #[test]
    fn exp_ends_well_on_both_sides() {
        let mut xs = [0.0; LANES];
        xs[..6].copy_from_slice(&[
            f32::NEG_INFINITY,
            -1e30,
            -88.0,
            f32::INFINITY,
            f32::NAN,
            0.0,
        ]);
        for level in levels() {
            let mut got = Vec::new();
            level.run(Exp(&xs, &mut got));
            assert_eq!(got[..3], [0.0; 3], "{level:?}");
            assert!(
                got[3] > 2e38 && got[4].is_nan() && got[5] == 1.0,
                "{level:?}: {got:?}"
            );
        }
    }

    struct Integers<'a>(&'a [u8; LANES], &'a mut [[f32; LANES]; 4]);

    impl Kernel for Integers<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            // SAFETY: the array is LANES bytes.
            let (unsigned, signed) = unsafe {
                (
                    simd.load_u8(self.0.as_ptr()),
                    simd.load_i8(self.0.as_ptr().cast()),
                )
            };
            let nibble = simd.and(simd.shr::<4>(unsigned), simd.splat_int(0xf));
            let both = simd.or(simd.shl::<8>(unsigned), nibble);
            *self.1 = [unsigned, signed, nibble, both].map(|x| to_array(simd, simd.to_float(x)));
        }
    }

    #[test]
    fn integers_widen_and_shift() {
        let bytes: [u8; LANES] = std::array::from_fn(|i| (i * 37 + 100) as u8);
        for level in levels() {
            let mut got = [[0.0; LANES]; 4];
            level.run(Integers(&bytes, &mut got));
            for (i, byte) in bytes.into_iter().enumerate() {
                let wide = u32::from(byte);
                let want = [
                    f32::from(byte),
                    f32::from(byte as i8),
                    (wide >> 4) as f32,
                    (wide << 8 | wide >> 4) as f32,
                ];
                assert_eq!(got.map(|lanes| lanes[i]), want, "{level:?}");
            }
        }
    }
}
