//! Block formats, interleaved for sixteen lanes: how a block of sixteen rows lies in a panel, and its exact widening.
//!
//! A unit is one block (32 or 256 inputs) of the panel's 16 rows, one lane a row. Four inputs of a lane lie together, so that
//! a lane of 32 bits meets four bytes of x in one instruction: a quad, 16 lanes of four bytes.
//!
//! | array | bytes | holds |
//! |---|---|---|
//! | `scale` | 32 | f16 scale |
//! | `minimum` | 32 | f16 minimum (of Q4_1, Q5_1, Q4_K, Q5_K) |
//! | `group_scale` | 16 a group | K-quants: the group's integer scale |
//! | `group_minimum` | 16 a group | Q4_K, Q5_K: the group's integer minimum |
//! | `high` | a quad per 32 (5-bit) or 16 (6-bit) inputs | the bits above the nibble, the first quad's lowest |
//! | `low` | a quad per 8 inputs, or per 4 (Q8_0) | nibbles, the even quad's low; or the byte |
//!
//! The values are bit-equal to [`DType::widen`]: the same f32 operations in the same order.

#![allow(unsafe_code)]

use super::simd::{LANES, Simd};
use crate::dtype::DType;

/// Bytes of a quad.
pub const QUAD: usize = 4 * LANES;

/// How a block format lies in a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quant {
    /// The format.
    pub dtype: DType,
    /// Inputs that share an integer scale (K-quants), else the block.
    pub group: usize,
    minimum: bool,
    /// Bits above the nibble: 0, 1 or 2; 4 says a whole signed byte.
    high_bits: usize,
    /// Subtracted from the integer.
    pub offset: i32,
}

/// Where the arrays of a unit start, in bytes.
#[derive(Clone, Copy)]
pub struct Layout {
    /// f16 minima.
    pub minimum: usize,
    /// Integer scales of the groups.
    pub group_scale: usize,
    /// Integer minima of the groups.
    pub group_minimum: usize,
    /// Bits above the nibbles.
    pub high: usize,
    /// Nibbles or bytes.
    pub low: usize,
    end: usize,
}

impl Quant {
    /// The layout of a block format; `None` for plain floats.
    pub const fn of(dtype: DType) -> Option<Self> {
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
    pub const fn unit_len(self) -> usize {
        self.dtype.block_len()
    }

    /// Bytes of a unit.
    #[inline(always)]
    pub const fn unit_bytes(self) -> usize {
        self.layout().end
    }

    #[inline(always)]
    const fn is_k_quant(self) -> bool {
        self.dtype.block_len() == 256
    }

    /// Where its arrays start.
    #[inline(always)]
    pub const fn layout(self) -> Layout {
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
        if self.interleave_words(block, lane, unit) {
            return;
        }
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
            let (quad, byte) = (k / 4, 4 * lane + k % 4);
            if self.high_bits == 4 {
                unit[at.low + quad * QUAD + byte] = q;
                continue;
            }
            unit[at.low + quad / 2 * QUAD + byte] |= (q & 0xf) << (4 * (quad % 2));
            if let Some(per_byte) = 8usize.checked_div(self.high_bits) {
                unit[at.high + quad / per_byte * QUAD + byte] |=
                    q >> 4 << (self.high_bits * (quad % per_byte));
            }
        }
    }

    /// [`Self::interleave`] four inputs at a time, of the formats that most files are in and whose integers are whole bytes or nibbles:
    /// byte by byte it would be half of the time that a model takes to load. `false`: another format.
    fn interleave_words(self, block: &[u8], lane: usize, unit: &mut [u8]) -> bool {
        let fields = match self.dtype {
            DType::Q8_0 | DType::Q4_0 => 2,
            DType::Q4_1 => 4,
            _ => return false,
        };
        let at = self.layout();
        let (scales, integers) = block.split_at(fields);
        for (field, scale) in scales.as_chunks::<2>().0.iter().enumerate() {
            unit[field * 2 * LANES + 2 * lane..][..2].copy_from_slice(scale);
        }
        let (words, _) = integers.as_chunks::<4>();
        let mut put = |quad: usize, word: u32| {
            unit[at.low + quad * QUAD + 4 * lane..][..4].copy_from_slice(&word.to_ne_bytes());
        };
        if self.high_bits == 4 {
            for (quad, word) in words.iter().enumerate() {
                put(quad, u32::from_ne_bytes(*word));
            }
            return true;
        }
        // Byte j of the block has inputs j and j + 16; each byte of a word is on its own, whatever their order.
        for (half, pair) in words.as_chunks::<2>().0.iter().enumerate() {
            let [even, odd] = pair.map(u32::from_ne_bytes);
            let low = 0x0f0f_0f0f;
            put(half, even & low | (odd & low) << 4);
            put(half + 2, even >> 4 & low | odd & !low);
        }
        true
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
        let (quad, byte) = (k / 4, 4 * lane + k % 4);
        if self.high_bits == 4 {
            return scale * f32::from(unit[at.low + quad * QUAD + byte] as i8);
        }
        let mut q = i32::from(unit[at.low + quad / 2 * QUAD + byte] >> (4 * (quad % 2)) & 0xf);
        if let Some(per_byte) = 8usize.checked_div(self.high_bits) {
            let high = unit[at.high + quad / per_byte * QUAD + byte];
            let high = high >> (self.high_bits * (quad % per_byte)) & ((1 << self.high_bits) - 1);
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
            for quad in 0..self.unit_len() / 4 {
                let bytes = simd.load_quads(low.add(quad * QUAD));
                let tile = tile.add(quad * 4 * LANES);
                for (i, q) in signed_bytes(simd, bytes).into_iter().enumerate() {
                    simd.store(tile.add(i * LANES), simd.mul(scale, simd.to_float(q)));
                }
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
                let finish = Finish::<S, MINIMUM, K> {
                    simd,
                    offset: simd.splat_int(-self.offset),
                    scale,
                    minimum,
                };
                let first = group * self.group / 16;
                for sixteen in first..first + self.group / 16 {
                    let quads = Sixteen::<S, HIGH>::load(
                        simd,
                        unit.add(at.low + sixteen * 2 * QUAD),
                        unit.add(at.high + sixteen * HIGH / 2 * QUAD),
                        sixteen % 2,
                    );
                    for (quad, bytes) in quads.0.into_iter().enumerate() {
                        let tile = tile.add((sixteen * 4 + quad) * 4 * LANES);
                        for (i, q) in bytes_of(simd, bytes).into_iter().enumerate() {
                            simd.store(tile.add(i * LANES), finish.value(q));
                        }
                    }
                }
            }
        }
    }
}

/// Four quads of unsigned bytes: sixteen inputs of nibbles with HIGH bits above them.
pub struct Sixteen<S: Simd, const HIGH: usize>(pub [S::I; 4]);

impl<S: Simd, const HIGH: usize> Sixteen<S, HIGH> {
    /// `half` says whose turn it is among two that share a quad of fifth bits.
    ///
    /// # Safety
    /// `low` is two quads, `high` one (if HIGH > 0).
    #[inline(always)]
    pub unsafe fn load(simd: S, low: *const u8, high: *const u8, half: usize) -> Self {
        let nibbles = simd.splat_int(0x0f0f_0f0f);
        // SAFETY: by contract.
        let words = unsafe { [simd.load_quads(low), simd.load_quads(low.add(QUAD))] };
        let mut quads = [
            simd.and(words[0], nibbles),
            simd.and(simd.shr::<4>(words[0]), nibbles),
            simd.and(words[1], nibbles),
            simd.and(simd.shr::<4>(words[1]), nibbles),
        ];
        if HIGH == 0 {
            return Self(quads);
        }
        // SAFETY: by contract.
        let mut bits = unsafe { simd.load_quads(high) };
        if HIGH == 1 && half == 1 {
            bits = simd.shr::<4>(bits);
        }
        let mask = simd.splat_int(if HIGH == 1 { 0x0101_0101 } else { 0x0303_0303 });
        for quad in &mut quads {
            *quad = simd.or(*quad, simd.shl::<4>(simd.and(bits, mask)));
            bits = match HIGH {
                1 => simd.shr::<1>(bits),
                _ => simd.shr::<2>(bits),
            };
        }
        Self(quads)
    }
}

/// The bytes of a quad, lowest first.
#[inline(always)]
fn bytes_of<S: Simd>(simd: S, quad: S::I) -> [S::I; 4] {
    let byte = simd.splat_int(0xff);
    [
        simd.and(quad, byte),
        simd.and(simd.shr::<8>(quad), byte),
        simd.and(simd.shr::<16>(quad), byte),
        simd.shr::<24>(quad),
    ]
}

/// As [`bytes_of`], signed.
#[inline(always)]
fn signed_bytes<S: Simd>(simd: S, quad: S::I) -> [S::I; 4] {
    [
        simd.sar::<24>(simd.shl::<24>(quad)),
        simd.sar::<24>(simd.shl::<16>(quad)),
        simd.sar::<24>(simd.shl::<8>(quad)),
        simd.sar::<24>(quad),
    ]
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
