//! Element and block formats: their sizes, and the one exact widening of each to f32.
//!
//! The block formats are GGUF's (ggml): a row is cut into blocks of 32 or 256 weights which share scales.
//! Checkpoints name them, backends repack them, training widens them; all through [`DType::widen`].

use half::{bf16, f16};

/// Format of a tensor's elements. A row of `k` elements must be a whole number of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    BF16,
    /// 32 weights: f16 scale, 32 int8.
    Q8_0,
    /// 32 weights: f16 scale, 16 bytes of nibbles minus 8.
    Q4_0,
    /// 32 weights: f16 scale, f16 minimum, 16 bytes of nibbles.
    Q4_1,
    /// 32 weights: f16 scale, 4 bytes of fifth bits, 16 bytes of nibbles, minus 16.
    Q5_0,
    /// 32 weights: f16 scale, f16 minimum, 4 bytes of fifth bits, 16 bytes of nibbles.
    Q5_1,
    /// 256 weights in 8 groups: f16 scale of scales and of minima, 12 bytes of 6-bit scales and minima, 128 bytes of nibbles.
    Q4K,
    /// As `Q4K` with 32 bytes of fifth bits.
    Q5K,
    /// 256 weights in 16 groups: low nibbles, high pairs, int8 scales, f16 scale of scales.
    Q6K,
}

impl DType {
    /// Every format.
    pub const ALL: [Self; 11] = [
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::Q8_0,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Elements in a block; 1 for plain formats.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => 32,
            Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// The field's usual name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5_0 => "q5_0",
            Self::Q5_1 => "q5_1",
            Self::Q4K => "q4_K",
            Self::Q5K => "q5_K",
            Self::Q6K => "q6_K",
        }
    }

    /// Whether elements are stored in blocks.
    pub fn is_quantised(self) -> bool {
        self.block_len() > 1
    }

    /// Bytes of `elements` elements; `None` when they are not whole blocks or the count overflows.
    pub fn bytes_of(self, elements: usize) -> Option<usize> {
        let whole = elements.is_multiple_of(self.block_len());
        whole
            .then(|| (elements / self.block_len()).checked_mul(self.block_bytes()))
            .flatten()
    }
}

impl DType {
    /// Widens `bytes` (whole blocks) into `out`, exactly: f32 holds every value of every format, and block formats are
    /// evaluated in f32 in ggml's order, so that the result is bit-equal to its `dequantize_row_*`.
    ///
    /// # Panics
    /// When `bytes` is not what [`DType::bytes_of`] says for `out.len()`: shapes are checked where tensors are made.
    pub fn widen(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(
            Some(bytes.len()),
            self.bytes_of(out.len()),
            "{} bytes for {} elements",
            self.as_str(),
            out.len()
        );
        match self {
            Self::F32 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *x = f32::from_le_bytes(*b);
                }
            }
            Self::F16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f16::from_le_bytes(*b).to_f32();
                }
            }
            Self::BF16 => {
                for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *x = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                }
            }
            Self::Q8_0 => blocks::<34, 32>(bytes, out, widen_q8_0),
            Self::Q4_0 => blocks::<18, 32>(bytes, out, widen_q4_0),
            Self::Q4_1 => blocks::<20, 32>(bytes, out, widen_q4_1),
            Self::Q5_0 => blocks::<22, 32>(bytes, out, widen_q5_0),
            Self::Q5_1 => blocks::<24, 32>(bytes, out, widen_q5_1),
            Self::Q4K => blocks::<144, 256>(bytes, out, widen_q4_k),
            Self::Q5K => blocks::<176, 256>(bytes, out, widen_q5_k),
            Self::Q6K => blocks::<210, 256>(bytes, out, widen_q6_k),
        }
    }

    /// Index of the first element (for block formats: of the first element of the first block) that is NaN or infinite.
    /// Reads no more than the scales of block formats. `bytes` are whole blocks.
    pub fn first_non_finite(self, bytes: &[u8]) -> Option<usize> {
        let f16_ok = |b: [u8; 2]| f16::from_le_bytes(b).is_finite();
        match self {
            Self::F32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .position(|b| !f32::from_le_bytes(*b).is_finite()),
            Self::F16 => bytes.as_chunks::<2>().0.iter().position(|b| !f16_ok(*b)),
            Self::BF16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .position(|b| !bf16::from_le_bytes(*b).is_finite()),
            Self::Q8_0 | Self::Q4_0 | Self::Q5_0 => {
                self.first_block(bytes, |block| f16_ok([block[0], block[1]])) //
            }
            Self::Q4_1 | Self::Q5_1 | Self::Q4K | Self::Q5K => self.first_block(bytes, |block| {
                f16_ok([block[0], block[1]]) && f16_ok([block[2], block[3]])
            }),
            Self::Q6K => self.first_block(bytes, |block| f16_ok([block[208], block[209]])),
        }
    }

    fn first_block(self, bytes: &[u8], ok: impl Fn(&[u8]) -> bool) -> Option<usize> {
        let bad = bytes
            .chunks_exact(self.block_bytes())
            .position(|block| !ok(block))?;
        Some(bad * self.block_len())
    }
}

fn blocks<const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
    widen: impl Fn(&[u8; BYTES], &mut [f32; LEN]),
) {
    for (block, out) in bytes
        .as_chunks::<BYTES>()
        .0
        .iter()
        .zip(out.as_chunks_mut::<LEN>().0)
    {
        widen(block, out);
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn widen_q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (x, q) in out.iter_mut().zip(&block[2..]) {
        *x = scale * f32::from(*q as i8);
    }
}

fn widen_q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (j, q) in block[2..].iter().enumerate() {
        out[j] = f32::from((q & 0xf) as i8 - 8) * scale;
        out[j + 16] = f32::from((q >> 4) as i8 - 8) * scale;
    }
}

fn widen_q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (j, q) in block[4..].iter().enumerate() {
        out[j] = f32::from(q & 0xf) * scale + minimum;
        out[j + 16] = f32::from(q >> 4) * scale + minimum;
    }
}

/// The fifth bits of weights `j` and `j + 16`, in place.
fn fifth_bits(block: &[u8], at: usize, j: usize) -> (u8, u8) {
    let bits = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    (
        (((bits >> j) & 1) << 4) as u8,
        (((bits >> (j + 16)) & 1) << 4) as u8,
    )
}

fn widen_q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let scale = half_at(block, 0);
    for (j, q) in block[6..].iter().enumerate() {
        let (low, high) = fifth_bits(block, 2, j);
        out[j] = f32::from((q & 0xf | low) as i8 - 16) * scale;
        out[j + 16] = f32::from((q >> 4 | high) as i8 - 16) * scale;
    }
}

fn widen_q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (j, q) in block[8..].iter().enumerate() {
        let (low, high) = fifth_bits(block, 4, j);
        out[j] = f32::from(q & 0xf | low) * scale + minimum;
        out[j + 16] = f32::from(q >> 4 | high) * scale + minimum;
    }
}

/// The 6-bit scale and minimum of group `j` (of 8) in a K-quant's 12 packed bytes.
fn scale_and_minimum(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            (packed[j + 4] & 0xf) | ((packed[j - 4] >> 6) << 4),
            (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4),
        )
    }
}

fn widen_q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, m) = scale_and_minimum(&block[4..16], group);
        let (s, m) = (scale * f32::from(s), minimum * f32::from(m));
        let nibbles = &block[16 + 32 * (group / 2)..][..32];
        for (x, q) in out.iter_mut().zip(nibbles) {
            *x = s * f32::from(if group % 2 == 0 { q & 0xf } else { q >> 4 }) - m;
        }
    }
}

fn widen_q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    let fifth = &block[16..48];
    for (group, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (s, m) = scale_and_minimum(&block[4..16], group);
        let (s, m) = (scale * f32::from(s), minimum * f32::from(m));
        let nibbles = &block[48 + 32 * (group / 2)..][..32];
        for (l, x) in out.iter_mut().enumerate() {
            let nibble = if group % 2 == 0 {
                nibbles[l] & 0xf
            } else {
                nibbles[l] >> 4
            };
            *x = s * f32::from(nibble | (((fifth[l] >> group) & 1) << 4)) - m;
        }
    }
}

fn widen_q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let scale = half_at(block, 208);
    for (half, out) in out.as_chunks_mut::<128>().0.iter_mut().enumerate() {
        let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        let scales = &block[192 + 8 * half..][..8];
        for l in 0..32 {
            let nibbles = [
                low[l] & 0xf,
                low[l + 32] & 0xf,
                low[l] >> 4,
                low[l + 32] >> 4,
            ];
            for (quarter, nibble) in nibbles.into_iter().enumerate() {
                let q = (nibble | (((high[l] >> (2 * quarter)) & 3) << 4)) as i8 - 32;
                let s = f32::from(scales[l / 16 + 2 * quarter] as i8);
                out[l + 32 * quarter] = scale * s * f32::from(q);
            }
        }
    }
}

/// A block format that numbers can be quantised into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockType {
    /// 8.5 bits a number.
    Q8_0,
    /// 4.5 bits a number, around 0.
    Q4_0,
    /// 5 bits a number, with a minimum.
    Q4_1,
}

impl BlockType {
    /// Numbers in a block.
    pub const LEN: usize = 32;

    /// The format.
    pub fn dtype(self) -> DType {
        match self {
            Self::Q8_0 => DType::Q8_0,
            Self::Q4_0 => DType::Q4_0,
            Self::Q4_1 => DType::Q4_1,
        }
    }

    /// How rows of `cols` numbers are kept: bf16 where they are no whole blocks.
    pub fn kept(self, cols: usize) -> DType {
        match cols.is_multiple_of(Self::LEN) {
            true => self.dtype(),
            false => DType::BF16,
        }
    }

    /// The format of embedding and head beside layers of this one. Of four bits the head would lose more than all layers together: it
    /// keeps eight, as llama.cpp's 4-bit files keep six or more.
    pub fn outer(self) -> Self {
        Self::Q8_0
    }

    /// Quantises whole blocks, by the rule of ggml's `quantize_row_*_ref`: bit-equal to it. Numbers from about 8e6 on need a scale that
    /// f16 cannot hold, and become infinite.
    pub fn quantise(self, values: &[f32]) -> Vec<u8> {
        let (blocks, _) = values.as_chunks::<{ Self::LEN }>();
        let mut bytes = Vec::with_capacity(blocks.len() * self.dtype().block_bytes());
        for block in blocks {
            match self {
                Self::Q8_0 => quantise_q8_0(block, &mut bytes),
                Self::Q4_0 => quantise_q4_0(block, &mut bytes),
                Self::Q4_1 => quantise_q4_1(block, &mut bytes),
            }
        }
        bytes
    }
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn quantise_q8_0(block: &[f32; 32], bytes: &mut Vec<u8>) {
    let scale = block.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
    let inverse = inverse(scale);
    bytes.extend_from_slice(&f16::from_f32(scale).to_le_bytes());
    bytes.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
}

fn quantise_q4_0(block: &[f32; 32], bytes: &mut Vec<u8>) {
    // The number of the largest magnitude, with its sign, becomes -8.
    let widest = |most: f32, x: &f32| if x.abs() > most.abs() { *x } else { most };
    let scale = block.iter().fold(0.0, widest) / -8.0;
    let inverse = inverse(scale);
    bytes.extend_from_slice(&f16::from_f32(scale).to_le_bytes());
    nibbles(block, |x| x * inverse + 8.5, bytes);
}

fn quantise_q4_1(block: &[f32; 32], bytes: &mut Vec<u8>) {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let most = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (most - least) / 15.0;
    let inverse = inverse(scale);
    bytes.extend_from_slice(&f16::from_f32(scale).to_le_bytes());
    bytes.extend_from_slice(&f16::from_f32(least).to_le_bytes());
    nibbles(block, |x| (x - least) * inverse + 0.5, bytes);
}

/// Numbers j and j + 16 in byte j, cut to 0..=15.
fn nibbles(block: &[f32; 32], place: impl Fn(f32) -> f32, bytes: &mut Vec<u8>) {
    let (low, high) = block.split_at(16);
    let q = |x: f32| (place(x) as u8).min(15);
    bytes.extend(
        low.iter()
            .zip(high)
            .map(|(low, high)| q(*low) | q(*high) << 4),
    );
}

/// Little-endian bf16, rounded to nearest, ties to even.
///
/// # Errors
/// The first number that becomes infinite, or was none.
pub fn bf16_bytes(values: &[f32]) -> Result<Vec<u8>, f32> {
    let mut bytes = Vec::with_capacity(2 * values.len());
    for value in values {
        let rounded = bf16::from_f32(*value);
        if !rounded.is_finite() {
            return Err(*value);
        }
        bytes.extend_from_slice(&rounded.to_le_bytes());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::borrow::Cow;

    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    use super::*;

    /// candle's name of a block format.
    fn ggml(dtype: DType) -> Option<GgmlDType> {
        Some(match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return None,
            DType::Q8_0 => GgmlDType::Q8_0,
            DType::Q4_0 => GgmlDType::Q4_0,
            DType::Q4_1 => GgmlDType::Q4_1,
            DType::Q5_0 => GgmlDType::Q5_0,
            DType::Q5_1 => GgmlDType::Q5_1,
            DType::Q4K => GgmlDType::Q4K,
            DType::Q5K => GgmlDType::Q5K,
            DType::Q6K => GgmlDType::Q6K,
        })
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    fn check_against_candle(dtype: DType, theirs: &QTensor) {
        let bytes = theirs.data().unwrap();
        let mut ours = vec![0.0; theirs.shape().elem_count()];
        dtype.widen(&bytes, &mut ours);
        let theirs = theirs.dequantize(&Device::Cpu).unwrap();
        let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(bits(&ours), bits(&theirs), "{}", dtype.as_str());
    }

    /// Bytes of whole blocks whose scales are finite: any byte is a legal weight, but not the exponent of an infinity.
    fn finite_blocks(dtype: DType, random: &[u8]) -> Vec<u8> {
        let mut bytes = random.to_vec();
        bytes.truncate(bytes.len() / dtype.block_bytes() * dtype.block_bytes());
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            for at in scales(dtype) {
                block[at + 1] &= 0xbf;
            }
        }
        bytes
    }

    /// Where a block's f16 numbers are.
    fn scales(dtype: DType) -> Vec<usize> {
        match dtype {
            DType::F32 | DType::BF16 => vec![],
            DType::F16 | DType::Q8_0 | DType::Q4_0 | DType::Q5_0 => vec![0],
            DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => vec![0, 2],
            DType::Q6K => vec![208],
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn widen_when_candle_quantised_the_numbers_equals_its_dequantisation(
            values in prop::collection::vec(-4f32..4.0, 512),
        ) {
            let values = Tensor::from_vec(values, (2, 256), &Device::Cpu).unwrap();
            for dtype in DType::ALL {
                if let Some(ggml) = ggml(dtype) {
                    check_against_candle(dtype, &QTensor::quantize(&values, ggml).unwrap());
                }
            }
        }

        #[test]
        fn quantise_when_numbers_are_any_equals_candles_bytes(
            values in prop::collection::vec(-4f32..4.0, 512),
            shape in 0..4,
        ) {
            // Around 0, all of one sign, all equal, all 0.
            let values: Vec<f32> = values.into_iter().map(|x| match shape {
                0 => x,
                1 => x.abs() + 1.0,
                2 => -1.5,
                _ => 0.0,
            }).collect();
            let tensor = Tensor::from_slice(&values, (2, 256), &Device::Cpu).unwrap();
            for block in [BlockType::Q8_0, BlockType::Q4_0, BlockType::Q4_1] {
                let theirs = QTensor::quantize(&tensor, ggml(block.dtype()).unwrap()).unwrap();
                let theirs = theirs.data().unwrap();
                let ours = block.quantise(&values);
                prop_assert_eq!(ours.as_slice(), theirs.as_ref(), "{:?}", block);
            }
        }

        #[test]
        fn widen_when_blocks_hold_any_bytes_equals_candles_dequantisation(
            random in prop::collection::vec(any::<u8>(), 4 * 210),
        ) {
            for dtype in DType::ALL {
                if let Some(ggml) = ggml(dtype) {
                    let bytes = finite_blocks(dtype, &random);
                    let elements = bytes.len() / dtype.block_bytes() * dtype.block_len();
                    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, ggml).unwrap();
                    check_against_candle(dtype, &QTensor::new(storage, (1, elements)).unwrap());
                }
            }
        }

        #[test]
        fn first_non_finite_when_bytes_are_any_is_the_block_of_the_first_that_widens_to_one(
            random in prop::collection::vec(prop_oneof![3 => any::<u8>(), 1 => Just(0xffu8), 4 => Just(0u8)], 4 * 210),
        ) {
            for dtype in DType::ALL {
                let bytes = &random[..random.len() / dtype.block_bytes() * dtype.block_bytes()];
                let mut values = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
                dtype.widen(bytes, &mut values);
                let want = values
                    .iter()
                    .position(|value| !value.is_finite())
                    .map(|at| at / dtype.block_len() * dtype.block_len());
                prop_assert_eq!(dtype.first_non_finite(bytes), want, "{}", dtype.as_str());
            }
        }
    }

    #[test]
    fn widen_when_the_format_is_plain_is_exact() {
        for value in [0.0, -0.0, 1.0, -2.5, 65504.0, 6.103_515_6e-5, 0.333_251_95] {
            let mut out = [0.0; 1];
            DType::F32.widen(&f32::to_le_bytes(value), &mut out);
            assert_eq!(out[0].to_bits(), value.to_bits());
            DType::F16.widen(&f16::from_f32(value).to_le_bytes(), &mut out);
            assert_eq!(out[0].to_bits(), f16::from_f32(value).to_f32().to_bits());
            DType::BF16.widen(&bf16::from_f32(value).to_le_bytes(), &mut out);
            assert_eq!(out[0].to_bits(), bf16::from_f32(value).to_f32().to_bits());
        }
    }

    #[test]
    fn first_non_finite_when_a_scale_is_infinite_names_its_block() {
        for dtype in DType::ALL {
            for scale in scales(dtype) {
                let mut bytes = vec![0; 3 * dtype.block_bytes()];
                assert_eq!(dtype.first_non_finite(&bytes), None);
                let at = dtype.block_bytes() + scale;
                bytes[at..at + 2].copy_from_slice(&f16::INFINITY.to_le_bytes());
                assert_eq!(dtype.first_non_finite(&bytes), Some(dtype.block_len()));
            }
        }
    }

    #[test]
    fn bytes_of_when_elements_are_no_whole_blocks_or_too_many_is_none() {
        for (dtype, elements, want) in [
            (DType::F32, 3, Some(12)),
            (DType::BF16, 3, Some(6)),
            (DType::Q8_0, 64, Some(68)),
            (DType::Q8_0, 63, None),
            (DType::Q6K, 512, Some(420)),
            (DType::Q6K, 32, None),
            (DType::F32, usize::MAX, None),
        ] {
            assert_eq!(
                dtype.bytes_of(elements),
                want,
                "{} {elements}",
                dtype.as_str()
            );
        }
    }

    #[test]
    fn bf16_bytes_rounds_to_nearest_even_and_refuses_what_becomes_infinite() {
        let values = [1.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.0, 3.389e38];
        let bytes = bf16_bytes(&values).unwrap();
        let mut wide = [0.0; 5];
        DType::BF16.widen(&bytes, &mut wide);
        assert_eq!(wide[..4], [1.0, 1.0, 1.0 + 4.0 / 256.0, -0.0]);
        assert_eq!(bf16_bytes(&[1.0, f32::MAX]), Err(f32::MAX));
        assert!(bf16_bytes(&[f32::NAN]).is_err());
    }
}
