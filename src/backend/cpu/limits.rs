//! What this machine can do at most, as loops to be timed: how fast its threads read memory, and its peaks of arithmetic. The
//! bench times them (this module has no clock) and draws its rooflines from them.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::io;

use memmap2::MmapMut;

/// A huge page. The buffer starts at one, so that all of it can be huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Memory to read, in huge pages where the system gives them, each thread's part touched first by that thread's own call.
pub struct ReadBuffer {
    memory: MmapMut,
    start: usize,
    bytes: usize,
}

impl ReadBuffer {
    /// At least `bytes`, filled with numbers that differ.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(HUGE_PAGE_BYTES);
        let mut memory = MmapMut::map_anon(bytes + HUGE_PAGE_BYTES)?;
        // Asked for and gone on without: then the figure is that of small pages, as it is for the weights.
        #[cfg(target_os = "linux")]
        let _ = memory.advise(memmap2::Advice::HugePage);
        let start = memory.as_ptr().align_offset(HUGE_PAGE_BYTES);
        let start = if start <= HUGE_PAGE_BYTES { start } else { 0 };
        for (index, word) in memory[start..start + bytes].chunks_exact_mut(8).enumerate() {
            let value = (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            word.copy_from_slice(&value.to_le_bytes());
        }
        Ok(Self {
            memory,
            start,
            bytes,
        })
    }

    /// Bytes that all parts have together.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Reads all of part `part` of `parts` once, as fast as one thread can.
    pub fn read_part(&self, part: usize, parts: usize) {
        let lines = self.bytes / LINE_BYTES;
        let share = lines.div_ceil(parts.max(1));
        let (from, to) = ((part * share).min(lines), ((part + 1) * share).min(lines));
        let all = &self.memory[self.start..self.start + self.bytes];
        black_box(sum(&all[from * LINE_BYTES..to * LINE_BYTES]));
    }
}

/// What a read takes at a time: four cache lines.
const LINE_BYTES: usize = 256;

fn sum(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature that `sum_avx512` needs was found just now.
            return unsafe { x86::sum_avx512(bytes) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the feature that `sum_avx2` needs was found just now.
            return unsafe { x86::sum_avx2(bytes) };
        }
    }
    let mut sums = [0u64; LINE_BYTES / 8];
    for line in bytes.as_chunks::<LINE_BYTES>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// A peak of arithmetic: a loop of independent multiply-adds in registers.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// `f32`, `bf16` or `int8`: what is multiplied.
    pub name: &'static str,
    /// The instruction that does it here.
    pub instruction: &'static str,
    /// Operations of one round; a multiply-add is two.
    pub ops_per_round: usize,
    run: unsafe fn(usize),
}

impl Peak {
    /// Does `rounds` rounds on this thread.
    pub fn run(&self, rounds: usize) {
        // SAFETY: only `peaks` makes one, after it found the CPU features that its loop needs.
        unsafe { (self.run)(rounds) }
    }
}

/// The best loop of each kind that this CPU has: f32 always, the others where it has instructions for them.
pub fn peaks() -> Vec<Peak> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = x86::peaks();
        if !found.is_empty() {
            return found;
        }
    }
    vec![Peak {
        name: "f32",
        instruction: "portable",
        ops_per_round: 2 * PORTABLE_LANES,
        run: portable,
    }]
}

const PORTABLE_LANES: usize = 64;

fn portable(rounds: usize) {
    let (factor, term) = (black_box(0.999_999f32), black_box(1e-6f32));
    let mut sums = [1.0f32; PORTABLE_LANES];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * factor + term;
        }
    }
    black_box(sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::is_x86_feature_detected as has;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{LINE_BYTES, Peak};

    /// Chains of dependent operations in flight: enough to cover a latency of 4 to 5 at two a cycle, few enough for 16 registers.
    const CHAINS: usize = 12;

    pub(super) fn peaks() -> Vec<Peak> {
        let peak = |name, instruction, ops, run: unsafe fn(usize)| Peak {
            name,
            instruction,
            ops_per_round: ops * CHAINS,
            run,
        };
        let mut found = Vec::new();
        if has!("avx512f") {
            found.push(peak("f32", "vfmadd zmm", 2 * 16, f32_avx512));
        } else if has!("avx2") && has!("fma") {
            found.push(peak("f32", "vfmadd ymm", 2 * 8, f32_avx2));
        }
        if has!("avx512f") && has!("avx512bf16") {
            found.push(peak("bf16", "vdpbf16ps zmm", 2 * 32, bf16_avx512));
        }
        if has!("avx512f") && has!("avx512vnni") {
            found.push(peak("int8", "vpdpbusd zmm", 2 * 64, int8_avx512));
        } else if has!("avxvnni") {
            found.push(peak("int8", "vpdpbusd ymm", 2 * 32, int8_avx_vnni));
        } else if has!("avx2") {
            found.push(peak("int8", "vpmaddubsw ymm", 2 * 32, int8_avx2));
        }
        found
    }

    #[target_feature(enable = "avx2")]
    pub(super) fn sum_avx2(bytes: &[u8]) -> u64 {
        let mut sums = [_mm256_setzero_si256(); 8];
        for line in bytes.as_chunks::<LINE_BYTES>().0 {
            for (sum, word) in sums.iter_mut().zip(line.as_chunks::<32>().0) {
                // SAFETY: `word` is 32 readable bytes; loadu needs no alignment.
                let value = unsafe { _mm256_loadu_si256(word.as_ptr().cast()) };
                *sum = _mm256_add_epi64(*sum, value);
            }
        }
        let total = sums
            .into_iter()
            .fold(_mm256_setzero_si256(), |a, b| _mm256_add_epi64(a, b));
        let pair = _mm_add_epi64(
            _mm256_castsi256_si128(total),
            _mm256_extracti128_si256::<1>(total),
        );
        let lanes = [_mm_extract_epi64::<0>(pair), _mm_extract_epi64::<1>(pair)];
        lanes[0].wrapping_add(lanes[1]) as u64
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_avx512(bytes: &[u8]) -> u64 {
        let mut sums = [_mm512_setzero_si512(); 4];
        for line in bytes.as_chunks::<LINE_BYTES>().0 {
            for (sum, word) in sums.iter_mut().zip(line.as_chunks::<64>().0) {
                // SAFETY: `word` is 64 readable bytes; loadu needs no alignment.
                let value = unsafe { _mm512_loadu_si512(word.as_ptr().cast()) };
                *sum = _mm512_add_epi64(*sum, value);
            }
        }
        let total = sums
            .into_iter()
            .fold(_mm512_setzero_si512(), |a, b| _mm512_add_epi64(a, b));
        _mm512_reduce_add_epi64(total) as u64
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_avx2(rounds: usize) {
        let (factor, term) = (
            _mm256_set1_ps(black_box(0.999_999)),
            _mm256_set1_ps(black_box(1e-6)),
        );
        let mut sums = [_mm256_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, factor, term);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    fn f32_avx512(rounds: usize) {
        let (factor, term) = (
            _mm512_set1_ps(black_box(0.999_999)),
            _mm512_set1_ps(black_box(1e-6)),
        );
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, factor, term);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_avx512(rounds: usize) {
        let ones = _mm512_set1_ps(black_box(1e-3));
        let pairs = _mm512_cvtne2ps_pbh(ones, ones);
        let mut sums = [_mm512_set1_ps(1.0); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, pairs, pairs);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_avx512(rounds: usize) {
        let (a, b) = (
            _mm512_set1_epi8(black_box(3)),
            _mm512_set1_epi8(black_box(-2)),
        );
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,avxvnni")]
    fn int8_avx_vnni(rounds: usize) {
        let (a, b) = (
            _mm256_set1_epi8(black_box(3)),
            _mm256_set1_epi8(black_box(-2)),
        );
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_dpbusd_avx_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// Without VNNI a product of bytes is three instructions. The sum is also a factor: a product of constants would be computed
    /// once, outside the loop.
    #[target_feature(enable = "avx2")]
    fn int8_avx2(rounds: usize) {
        let b = _mm256_set1_epi8(black_box(-2));
        let ones = _mm256_set1_epi16(black_box(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                let pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(*sum, b), ones);
                *sum = _mm256_add_epi32(*sum, pairs);
            }
        }
        black_box(sums);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sum_reads_every_byte_of_its_part_whatever_instructions_it_uses() {
        let bytes: Vec<u8> = (0..LINE_BYTES * 3).map(|i| u8::from(i % 8 == 0)).collect();
        let words = bytes.len() as u64 / 8;
        assert_eq!(sum(&bytes), words);
        assert_eq!(sum(&[]), 0);
    }

    #[test]
    fn read_part_covers_buffers_smaller_than_their_threads() {
        let buffer = ReadBuffer::new(1).unwrap();
        assert_eq!(buffer.bytes(), HUGE_PAGE_BYTES);
        for parts in [1, 2, 3, 100_000] {
            for part in [0, parts - 1] {
                buffer.read_part(part, parts);
            }
        }
    }

    #[test]
    fn peaks_have_f32_and_run() {
        let peaks = peaks();
        assert!(peaks.iter().any(|peak| peak.name == "f32"));
        for peak in peaks {
            assert!(peak.ops_per_round > 0);
            peak.run(10);
        }
    }
}
