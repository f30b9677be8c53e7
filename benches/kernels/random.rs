//! Inputs.

use half::bf16;
use midpo::dtype::DType;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (-1, 1).
    pub fn numbers(&mut self, len: usize) -> Vec<f32> {
        let number = |x: u64| (x >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        (0..len).map(|_| number(self.next())).collect()
    }

    /// `len` weights.
    pub fn weights(&mut self, len: usize, dtype: DType) -> Vec<u8> {
        match dtype {
            DType::F32 => self
                .numbers(len)
                .into_iter()
                .flat_map(f32::to_le_bytes)
                .collect(),
            DType::BF16 => {
                let numbers = self.numbers(len).into_iter();
                numbers
                    .flat_map(|x| bf16::from_f32(x).to_le_bytes())
                    .collect()
            }
            // Small scales: the high bits of every f16 are clear, whatever else the bytes say.
            _ => (0..dtype.bytes_of(len).unwrap())
                .map(|_| self.next() as u8 & 0x3b)
                .collect(),
        }
    }
}
