//! Block formats, interleaved for sixteen lanes: how a block of sixteen rows lies in a panel, and its exact widening.
//!
//! A unit is one block (32 or 256 inputs) of the panel's 16 rows, stored as arrays of 16 bytes or 16 f16, one lane a row:
//!
//! | array | bytes | holds |
//! |---|---|---|
//! | `scale` | 32 | f16 scale |
//! | `minimum` | 32 | f16 minimum (of Q4_1, Q5_1, Q4_K, Q5_K) |
//! | `group_scale` | 16 a group | K-quants: the group's integer scale |
//! | `group_minimum` | 16 a group | Q4_K, Q5_K: the group's integer minimum |
//! | `high` | 16 per 8 (5-bit) or 4 (6-bit) inputs | the bits above the nibble, lowest input first |
//! | `low` | 16 per 2 inputs, or per input (Q8_0) | nibbles, the even input's low; or the byte |
//!
//! The values are bit-equal to [`DType::widen`]: the same f32 operations in the same order.

#![allow(unsafe_code)]

use super::simd::{LANES, Simd};
use crate::dtype::DType;

/// How a block format lies in a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quant {
    dtype: DType,
    /// Inputs that share an integer scale (K-quants), else the block.
    group: usize,
    minimum: bool,
    /// Bits above the nibble: 0, 1 or 2; 4 says a whole signed byte.
    high_bits: usize,
    /// Subtracted from the integer.
    offset: i32,
}

/// Where the arrays of a unit start, in bytes.
struct Layout {
    minimum: usize,
    group_scale: usize,
    group_minimum: usize,
    high: usize,
    low: usize,
    end: usize,
}

impl Quant {
    /// The layout of a block format; `None` for plain floats.
    pub fn of(dtype: DType) -> Option<Self> {
        let (group, minimum, high_bits, offset) = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            DType::Q8_0 => (32, false, 4, 0),
            DType::Q4_0 => (32, false, 0, 8),
            DType::Q4_1 => (32, true, 0, 0),
            DType::Q5_0 => (32, false, 1, 16),
            DType::Q5_1 => (32, true, 1, 0),
            DType::Q4K => (32, true, 0, 0),
            DType::Q5K => (32, true, 1, 0),
            DType::Q6K => (16, false, 2, 32),
        };
        Some(Self {
            dtype,
            group,
            minimum,
            high_bits,
            offset,
        })
    }

    /// Inputs in a unit.
    #[inline(always)]
    pub fn unit_len(self) -> usize {
        self.dtype.block_len()
    }

    /// Bytes of a unit.
    #[inline(always)]
    pub fn unit_bytes(self) -> usize {
        self.layout().end
    }

    #[inline(always)]
    fn is_k_quant(self) -> bool {
        self.dtype.block_len() == 256
    }

    #[inline(always)]
    fn layout(self) -> Layout {
        let len = self.unit_len();
        let groups = if self.is_k_quant() {
            len / self.group
        } else {
            0
        };
        let minimum = 2 * LANES;
        let group_scale = minimum + if self.minimum { 2 * LANES } else { 0 };
        let group_minimum = group_scale + groups * LANES;
        let high = group_minimum + if self.minimum { groups * LANES } else { 0 };
        let (high_bytes, low_bytes) = match self.high_bits {
            4 => (0, len),
            bits => (len * bits / 8, len / 2),
        };
        let low = high + high_bytes * LANES;
        Layout {
            minimum,
            group_scale,
            group_minimum,
            high,
            low,
            end: low + low_bytes * LANES,
        }
    }

    /// Puts one row's block into lane `lane` of a unit that was zero there.
    pub fn interleave(self, block: &[u8], lane: usize, unit: &mut [u8]) {
        let at = self.layout();
        let mut q = [0u8; 256];
        let q = &mut q[..self.unit_len()];
        let fields = integers(self.dtype, block, q);
        let mut put = |at: usize, bytes: &[u8]| unit[at..][..bytes.len()].copy_from_slice(bytes);
        put(2 * lane, &fields.scale);
        if self.minimum {
            put(at.minimum + 2 * lane, &fields.minimum);
        }
        if self.is_k_quant() {
            for group in 0..self.unit_len() / self.group {
                put(
                    at.group_scale + group * LANES + lane,
                    &[fields.scales[group]],
                );
                if self.minimum {
                    put(
                        at.group_minimum + group * LANES + lane,
                        &[fields.minima[group]],
                    );
                }
            }
        }
        for (k, q) in q.iter().copied().enumerate() {
            if self.high_bits == 4 {
                unit[at.low + k * LANES + lane] = q;
                continue;
            }
            unit[at.low + k / 2 * LANES + lane] |= (q & 0xf) << (4 * (k % 2));
            if let Some(per_byte) = 8usize.checked_div(self.high_bits) {
                unit[at.high + k / per_byte * LANES + lane] |=
                    q >> 4 << (self.high_bits * (k % per_byte));
            }
        }
    }

    /// Input `k` of lane `lane` of a unit.
    pub fn value(self, unit: &[u8], lane: usize, k: usize) -> f32 {
        let at = self.layout();
        let half_at = |at: usize| {
            half::f16::from_le_bytes([unit[at + 2 * lane], unit[at + 2 * lane + 1]]).to_f32()
        };
        let (mut scale, mut minimum) = (half_at(0), 0.0);
        if self.minimum {
            minimum = half_at(at.minimum);
        }
        let group = k / self.group * LANES + lane;
        if self.is_k_quant() {
            let s = unit[at.group_scale + group];
            scale *= if self.minimum {
                f32::from(s)
            } else {
                f32::from(s as i8)
            };
            if self.minimum {
                minimum = -(minimum * f32::from(unit[at.group_minimum + group]));
            }
        }
        if self.high_bits == 4 {
            return scale * f32::from(unit[at.low + k * LANES + lane] as i8);
        }
        let mut q = i32::from(unit[at.low + k / 2 * LANES + lane] >> (4 * (k % 2)) & 0xf);
        if let Some(per_byte) = 8usize.checked_div(self.high_bits) {
            let high = unit[at.high + k / per_byte * LANES + lane];
            let high = high >> (self.high_bits * (k % per_byte)) & ((1 << self.high_bits) - 1);
            q |= i32::from(high) << 4;
        }
        let product = (q - self.offset) as f32 * scale;
        if self.minimum {
            product + minimum
        } else {
            product
        }
    }

    /// Widens a unit into `tile` (unit_len, LANES).
    ///
    /// # Safety
    /// `unit` must be readable for `unit_bytes`, `tile` writable for `unit_len * LANES` numbers.
    #[inline(always)]
    pub unsafe fn widen<S: Simd>(self, simd: S, unit: *const u8, tile: *mut f32) {
        // One branch a unit, so that the loops below are compiled for each format.
        // SAFETY: by contract.
        unsafe {
            match self.dtype {
                DType::Q8_0 => self.widen_bytes(simd, unit, tile),
                DType::Q4_0 => self.widen_nibbles::<S, 0, false, false>(simd, unit, tile),
                DType::Q4_1 => self.widen_nibbles::<S, 0, true, false>(simd, unit, tile),
                DType::Q5_0 => self.widen_nibbles::<S, 1, false, false>(simd, unit, tile),
                DType::Q5_1 => self.widen_nibbles::<S, 1, true, false>(simd, unit, tile),
                DType::Q4K => self.widen_nibbles::<S, 0, true, true>(simd, unit, tile),
                DType::Q5K => self.widen_nibbles::<S, 1, true, true>(simd, unit, tile),
                DType::Q6K => self.widen_nibbles::<S, 2, false, true>(simd, unit, tile),
                DType::F32 | DType::F16 | DType::BF16 => {}
            }
        }
    }

    /// Q8_0.
    ///
    /// # Safety
    /// As `widen`.
    #[inline(always)]
    unsafe fn widen_bytes<S: Simd>(self, simd: S, unit: *const u8, tile: *mut f32) {
        // SAFETY: offsets within the unit, by its layout.
        unsafe {
            let scale = simd.load_f16(unit.cast());
            let low = unit.add(self.layout().low);
            for k in 0..self.unit_len() {
                let q = simd.to_float(simd.load_i8(low.add(k * LANES).cast()));
                simd.store(tile.add(k * LANES), simd.mul(scale, q));
            }
        }
    }

    /// Formats with nibbles: HIGH bits above them, a MINIMUM, K-quants' integer scales.
    ///
    /// # Safety
    /// As `widen`, and the parameters must be the format's.
    #[inline(always)]
    unsafe fn widen_nibbles<S: Simd, const HIGH: usize, const MINIMUM: bool, const K: bool>(
        self,
        simd: S,
        unit: *const u8,
        tile: *mut f32,
    ) {
        let at = self.layout();
        let groups = self.unit_len() / self.group;
        // SAFETY: offsets within the unit, by its layout.
        unsafe {
            let unit_scale = simd.load_f16(unit.cast());
            let unit_minimum = match MINIMUM {
                true => simd.load_f16(unit.add(at.minimum).cast()),
                false => simd.splat(0.0),
            };
            for group in 0..groups {
                let (mut scale, mut minimum) = (unit_scale, unit_minimum);
                if K {
                    let integer = unit.add(at.group_scale + group * LANES);
                    let integer = match MINIMUM {
                        true => simd.load_u8(integer),
                        false => simd.load_i8(integer.cast()),
                    };
                    scale = simd.mul(scale, simd.to_float(integer));
                }
                if K && MINIMUM {
                    let integer = simd.load_u8(unit.add(at.group_minimum + group * LANES));
                    minimum = simd.mul(minimum, simd.to_float(integer));
                }
                // Eight inputs are one byte of fifth bits, two bytes of higher pairs, four of nibbles.
                for eight in group * self.group / 8..(group + 1) * self.group / 8 {
                    let low = unit.add(at.low + eight * 4 * LANES);
                    let high = unit.add(at.high + eight * HIGH * LANES);
                    let tile = tile.add(eight * 8 * LANES);
                    let finish = Finish::<S, MINIMUM, K> {
                        simd,
                        offset: simd.splat_int(-self.offset),
                        scale,
                        minimum,
                    };
                    eight_inputs::<S, HIGH, MINIMUM, K>(finish, low, high, tile);
                }
            }
        }
    }
}

/// The float half of widening.
struct Finish<S: Simd, const MINIMUM: bool, const K: bool> {
    simd: S,
    offset: S::I,
    scale: S::F,
    minimum: S::F,
}

impl<S: Simd, const MINIMUM: bool, const K: bool> Finish<S, MINIMUM, K> {
    #[inline(always)]
    fn value(&self, q: S::I) -> S::F {
        let simd = self.simd;
        if !MINIMUM {
            return simd.mul(simd.to_float(simd.add_int(q, self.offset)), self.scale);
        }
        let product = simd.mul(simd.to_float(q), self.scale);
        match K {
            true => simd.sub(product, self.minimum),
            false => simd.add(product, self.minimum),
        }
    }
}

/// # Safety
/// `low` is 4 arrays of LANES bytes, `high` is HIGH, `tile` 8 of LANES numbers.
#[inline(always)]
unsafe fn eight_inputs<S: Simd, const HIGH: usize, const MINIMUM: bool, const K: bool>(
    finish: Finish<S, MINIMUM, K>,
    low: *const u8,
    high: *const u8,
    tile: *mut f32,
) {
    let simd = finish.simd;
    let nibble = simd.splat_int(0xf);
    // SAFETY: by contract.
    unsafe {
        let mut bits = [simd.splat_int(0); 2];
        if HIGH >= 1 {
            bits[0] = simd.load_u8(high);
        }
        if HIGH == 2 {
            bits[1] = simd.load_u8(high.add(LANES));
        }
        for pair in 0..4 {
            let byte = simd.load_u8(low.add(pair * LANES));
            let mut even = simd.and(byte, nibble);
            let mut odd = simd.shr::<4>(byte);
            if HIGH == 1 {
                let bit = simd.splat_int(1 << 4);
                even = simd.or(even, simd.and(simd.shl::<4>(bits[0]), bit));
                odd = simd.or(odd, simd.and(simd.shl::<3>(bits[0]), bit));
                bits[0] = simd.shr::<2>(bits[0]);
            }
            if HIGH == 2 {
                let two = simd.splat_int(3 << 4);
                even = simd.or(even, simd.and(simd.shl::<4>(bits[pair / 2]), two));
                odd = simd.or(odd, simd.and(simd.shl::<2>(bits[pair / 2]), two));
                bits[pair / 2] = simd.shr::<4>(bits[pair / 2]);
            }
            simd.store(tile.add(2 * pair * LANES), finish.value(even));
            simd.store(tile.add((2 * pair + 1) * LANES), finish.value(odd));
        }
    }
}

/// What a block holds beside its integers.
#[derive(Default)]
struct Fields {
    scale: [u8; 2],
    minimum: [u8; 2],
    scales: [u8; 16],
    minima: [u8; 16],
}

fn two(block: &[u8], at: usize) -> [u8; 2] {
    [block[at], block[at + 1]]
}

/// Takes one block of ggml's apart: its integers before any offset (`q`, in order of the inputs), and its scales.
fn integers(dtype: DType, block: &[u8], q: &mut [u8]) -> Fields {
    let mut fields = Fields {
        scale: two(block, 0),
        ..Fields::default()
    };
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => {}
        DType::Q8_0 => q.copy_from_slice(&block[2..34]),
        DType::Q4_0 => halves(&block[2..], &[0; 4], q),
        DType::Q4_1 => {
            fields.minimum = two(block, 2);
            halves(&block[4..], &[0; 4], q);
        }
        DType::Q5_0 => halves(&block[6..], &block[2..6], q),
        DType::Q5_1 => {
            fields.minimum = two(block, 2);
            halves(&block[8..], &block[4..8], q);
        }
        DType::Q4K | DType::Q5K => {
            fields.minimum = two(block, 2);
            six_bit_scales(&block[4..16], &mut fields);
            let five = dtype == DType::Q5K;
            let (fifth, low) = block[16..].split_at(if five { 32 } else { 0 });
            for (k, q) in q.iter_mut().enumerate() {
                let (group, l) = (k / 32, k % 32);
                *q = low[group / 2 * 32 + l] >> (4 * (group % 2)) & 0xf;
                if five {
                    *q |= (fifth[l] >> group & 1) << 4;
                }
            }
        }
        DType::Q6K => {
            fields.scale = two(block, 208);
            fields.scales.copy_from_slice(&block[192..208]);
            for (k, q) in q.iter_mut().enumerate() {
                let (half, quarter, l) = (k / 128, k % 128 / 32, k % 32);
                let low = block[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 0xf;
                let high = block[128 + 32 * half + l] >> (2 * quarter) & 3;
                *q = low | high << 4;
            }
        }
    }
    fields
}

/// 32 inputs: input j in the low nibble of byte j, input j + 16 in its high one; `fifth` holds bit j of input j.
fn halves(nibbles: &[u8], fifth: &[u8], q: &mut [u8]) {
    for (k, q) in q.iter_mut().enumerate() {
        *q = nibbles[k % 16] >> (4 * (k / 16)) & 0xf | (fifth[k / 8] >> (k % 8) & 1) << 4;
    }
}

/// The 8 scales and 8 minima of 6 bits in a K-quant's 12 bytes.
fn six_bit_scales(packed: &[u8], fields: &mut Fields) {
    for j in 0..8 {
        let (scale, minimum) = match j {
            0..4 => (packed[j] & 63, packed[j + 4] & 63),
            _ => (
                packed[j + 4] & 0xf | packed[j - 4] >> 6 << 4,
                packed[j + 4] >> 4 | packed[j] >> 6 << 4,
            ),
        };
        fields.scales[j] = scale;
        fields.minima[j] = minimum;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::simd::{Isa, Kernel, Level};
    use super::*;

    struct Widen<'a>(Quant, &'a [u8], &'a mut [f32]);

    impl Kernel for Widen<'_> {
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            // SAFETY: the test made both as large as the format says.
            unsafe { self.0.widen(simd, self.1.as_ptr(), self.2.as_mut_ptr()) }
        }
    }

    /// Random bytes, but scales that are finite.
    fn block(dtype: DType, seed: u32) -> Vec<u8> {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
        let mut bytes: Vec<u8> = (0..dtype.block_bytes())
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        let halves: &[usize] = match dtype {
            DType::Q6K => &[208],
            DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => &[0, 2],
            _ => &[0],
        };
        halves.iter().for_each(|at| bytes[at + 1] &= 0b1011_1111);
        bytes
    }

    #[test]
    fn widening_a_unit_is_bit_equal_to_widening_its_rows() {
        for dtype in DType::ALL {
            let Some(quant) = Quant::of(dtype) else {
                continue;
            };
            let mut unit = vec![0; quant.unit_bytes()];
            let mut want = vec![0.0; dtype.block_len() * LANES];
            for lane in 0..LANES {
                let block = block(dtype, lane as u32);
                quant.interleave(&block, lane, &mut unit);
                let mut row = vec![0.0; dtype.block_len()];
                dtype.widen(&block, &mut row);
                for (k, x) in row.into_iter().enumerate() {
                    want[k * LANES + lane] = x;
                    let got = quant.value(&unit, lane, k);
                    assert_eq!(got.to_bits(), x.to_bits(), "{dtype:?} {lane} {k}");
                }
            }
            for level in Isa::ALL.into_iter().filter_map(Level::of) {
                let mut got = vec![0.0; want.len()];
                level.run(Widen(quant, &unit, &mut got));
                for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                    assert_eq!(got.to_bits(), want.to_bits(), "{dtype:?} {level:?} {i}");
                }
            }
        }
    }
}
