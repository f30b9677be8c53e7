//! rope_kv_write and attention.

use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::backend::ops::{self, Heads};
use midpo::backend::reference::Reference;
use midpo::backend::{Backend, BackendError, KvFormat, KvShape, StepLayout, StepSequence};
use midpo::types::{BLOCK_TOKENS, BlockId, TokenId, Variant};

use super::{Random, assert_close, assert_same_bits, cpus, exact, filled, label, limits};

/// Sequences with random q, k and v at every position, and a shuffled table of blocks each.
pub(crate) struct AttentionCase {
    pub(crate) heads: Heads,
    pub(crate) format: KvFormat,
    /// (positions, qkv width) of each sequence.
    pub(crate) qkv: Vec<Vec<f32>>,
    pub(crate) tables: Vec<Vec<BlockId>>,
    pub(crate) rope: Vec<f32>,
}

/// Which rows of which sequence a step holds.
pub(crate) type Step = Vec<(usize, std::ops::Range<usize>)>;

impl AttentionCase {
    pub(crate) fn new(
        random: &mut Random,
        heads: Heads,
        format: KvFormat,
        lengths: &[usize],
    ) -> Self {
        let mut free: Vec<u32> = (0..512).collect();
        let mut take =
            |random: &mut Random| BlockId::new(free.swap_remove(random.below(free.len())));
        let tables = lengths.iter().map(|length| {
            let blocks = length.div_ceil(BLOCK_TOKENS);
            (0..blocks).map(|_| take(random)).collect()
        });
        let tables = tables.collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let rope = (0..longest).flat_map(|position| {
            let half = heads.size / 2;
            let angle = move |i: usize| position as f32 * 0.7f32.powi(i as i32);
            let cos = (0..half).map(move |i| angle(i).cos());
            cos.chain((0..half).map(move |i| angle(i).sin()))
        });
        Self {
            heads,
            format,
            qkv: lengths
                .iter()
                .map(|length| {
                    let mut qkv = random.numbers(length * heads.qkv_width());
                    // Scores of some size, so that the softmax has something to do.
                    qkv.iter_mut().for_each(|x| *x *= 2.0);
                    qkv
                })
                .collect(),
            tables,
            rope: rope.collect(),
        }
    }

    pub(super) fn cache<B: Backend>(&self, backend: &B) -> B::KvCache {
        self.try_cache(backend).unwrap()
    }

    fn try_cache<B: Backend>(&self, backend: &B) -> Result<B::KvCache, BackendError> {
        let shape = KvShape {
            layers: 2,
            blocks: 512,
            kv_heads: self.heads.kv,
            head_size: self.heads.size,
            format: self.format,
        };
        backend.kv_cache(shape)
    }

    /// Runs the steps in order; returns (positions, query width) of each sequence. `poisoned`: in a cache full of NaN.
    pub(crate) fn run<B: Backend>(
        &self,
        backend: &mut B,
        steps: &[Step],
        poisoned: bool,
    ) -> Vec<Vec<f32>> {
        let out = self.heads.query * self.heads.size;
        let mut cache = self.cache(backend);
        let mut results: Vec<_> = self
            .lengths()
            .into_iter()
            .map(|length| vec![0.0; length * out])
            .collect();
        if poisoned {
            self.run_step(backend, &mut cache, &self.whole()[0], |x| x * f32::NAN);
        }
        for rows in steps {
            let got = self.run_step(backend, &mut cache, rows, |x| x);
            let mut got = &got[..];
            for (sequence, rows) in rows {
                let (these, rest) = got.split_at(rows.len() * out);
                results[*sequence][rows.start * out..rows.end * out].copy_from_slice(these);
                got = rest;
            }
        }
        results
    }

    /// Writes the rows' k and v and attends; returns (n, query width).
    fn run_step<B: Backend>(
        &self,
        backend: &mut B,
        cache: &mut B::KvCache,
        rows: &Step,
        change: impl Fn(f32) -> f32,
    ) -> Vec<f32> {
        let mut y = self.run_into(backend, cache, rows, change);
        let n = rows.iter().map(|(_, rows)| rows.len()).sum();
        backend.read(&mut y, n).unwrap().to_vec()
    }

    pub(super) fn run_into<B: Backend>(
        &self,
        backend: &mut B,
        cache: &mut B::KvCache,
        rows: &Step,
        change: impl Fn(f32) -> f32,
    ) -> B::Buffer {
        let (layer, heads) = (1, self.heads);
        let (width, out) = (heads.qkv_width(), heads.query * heads.size);
        let positions = self.rope.len() / heads.size;
        let rope = &exact(backend, positions, heads.size, &self.rope);
        let step = &self.step(backend, rows);
        let qkv = rows.iter().flat_map(|(sequence, rows)| {
            let qkv = &self.qkv[*sequence];
            qkv[rows.start * width..rows.end * width].iter()
        });
        let qkv: Vec<f32> = qkv.map(|x| change(*x)).collect();
        let n = qkv.len() / width;
        let qkv = &mut filled(backend, n, width, &qkv);
        let write = ops::RopeKvWrite {
            step,
            layer,
            heads,
            rope,
            qkv,
            cache,
        };
        backend.rope_kv_write(write).unwrap();
        let mut y = backend.buffer(n, out).unwrap();
        let attend = ops::Attention {
            step,
            layer,
            heads,
            qkv,
            cache,
            y: &mut y,
        };
        backend.attention(attend).unwrap();
        y
    }

    fn step<B: Backend>(&self, backend: &B, rows: &Step) -> B::Step {
        let tokens = vec![TokenId(0); rows.iter().map(|(_, rows)| rows.len()).sum()];
        let sequences = rows.iter().map(|(sequence, rows)| StepSequence {
            rows: rows.len(),
            start: rows.start,
            block_table: &self.tables[*sequence],
            gates: Variant::Routed.gates(),
        });
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences.collect::<Vec<_>>(),
            logit_rows: &[],
        };
        let mut step = backend.step(limits(tokens.len())).unwrap();
        backend.load_step(&layout, &mut step).unwrap();
        step
    }

    fn lengths(&self) -> Vec<usize> {
        let width = self.heads.qkv_width();
        self.qkv.iter().map(|qkv| qkv.len() / width).collect()
    }

    /// All sequences whole, in one step.
    pub(crate) fn whole(&self) -> Vec<Step> {
        let rows = self.lengths().into_iter().map(|length| 0..length);
        vec![rows.enumerate().collect()]
    }

    /// Steps of random chunks of random sequences, single rows often.
    pub(crate) fn chunked(&self, random: &mut Random) -> Vec<Step> {
        let lengths = self.lengths();
        let mut done = vec![0; lengths.len()];
        let mut steps = Vec::new();
        while done != lengths {
            let mut step = Vec::new();
            for sequence in 0..lengths.len() {
                let left = lengths[sequence] - done[sequence];
                if left == 0 || random.below(3) == 0 {
                    continue;
                }
                // The last rows one by one, as decoding does.
                let rows = match left {
                    ..=4 => 1,
                    _ => 1 + random.below(left.min(90)),
                };
                step.push((sequence, done[sequence]..done[sequence] + rows));
                done[sequence] += rows;
            }
            if !step.is_empty() {
                steps.push(step);
            }
        }
        steps
    }
}

fn check_attention(case: &AttentionCase, cpus: &mut [Vec<Cpu>], random: &mut Random) {
    let want = case.run(&mut Reference, &case.whole(), false).concat();
    let tolerance = match case.format {
        KvFormat::F32 => ops::ATTENTION.tolerance.f32,
        KvFormat::BF16 | KvFormat::FP8 | KvFormat::INT8 => ops::ATTENTION.tolerance.bf16,
    };
    for set in cpus {
        let whole = case.run(&mut set[0], &case.whole(), false).concat();
        let what = format!("attention {} {:?}", label(&set[0]), case.heads);
        assert_close(&what, tolerance, &whole, &want);
        for (i, cpu) in set.iter_mut().enumerate() {
            let what = format!("attention {} {:?}", label(cpu), case.heads);
            if i > 0 {
                assert_same_bits(&what, &case.run(cpu, &case.whole(), false).concat(), &whole);
            }
            let steps = case.chunked(random);
            assert_same_bits(&what, &case.run(cpu, &steps, true).concat(), &whole);
        }
    }
}

#[test]
fn attention_matches_the_reference_and_chunks_match_the_whole_for_all_heads() {
    let (random, mut cpus) = (&mut Random(7), cpus());
    for size in [8, 16, 64, 80, 96, 128] {
        for (query, kv) in [(1, 1), (3, 3), (6, 2), (4, 1), (8, 1)] {
            let heads = Heads { query, kv, size };
            for format in [KvFormat::F32, KvFormat::BF16, KvFormat::INT8] {
                let case = AttentionCase::new(random, heads, format, &[1, 17, 40]);
                check_attention(&case, &mut cpus, random);
            }
        }
    }
}

/// The only row sees itself alone: it gives back v as the cache keeps it. Calls `check` with v, what came back, and the largest of v's head.
fn check_kept(case: &AttentionCase, backend: &mut impl Backend, check: impl Fn(f32, f32, f32)) {
    let heads = case.heads;
    let v = &case.qkv[0][2 * heads.kv * heads.size..];
    let got = case.run(backend, &case.whole(), false).concat();
    for (got, v) in got.chunks_exact(heads.size).zip(v.chunks_exact(heads.size)) {
        let most = v.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        v.iter().zip(got).for_each(|(v, got)| check(*v, *got, most));
    }
}

/// One row, with a head of nothing and one of numbers far below its largest.
fn uneven_heads(format: KvFormat) -> AttentionCase {
    let heads = Heads {
        query: 3,
        kv: 3,
        size: 40,
    };
    let mut case = AttentionCase::new(&mut Random(16), heads, format, &[1]);
    let v = &mut case.qkv[0][2 * 3 * 40..];
    v[..40].fill(0.0);
    v[41..80].iter_mut().for_each(|x| *x *= 1e-3);
    case
}

#[test]
fn eight_bits_of_k_and_v_are_within_a_sixteenth_of_each_number() {
    let case = uneven_heads(KvFormat::FP8);
    check_kept(&case, &mut Reference, |v, got, most| {
        let bound = (v.abs() / 16.0).max(most / 448.0 / 1024.0) * 1.000_01;
        assert!((got - v).abs() <= bound, "{got} for {v}");
    });
    let refused = match Cpu::new(CpuOptions::default()) {
        Ok(cpu) => case.try_cache(&cpu).err(),
        Err(error) => panic!("{error}"),
    };
    let message = refused.unwrap().to_string();
    assert!(
        message.contains("format") && message.contains("FP8"),
        "{message}"
    );
}

#[test]
fn integers_of_k_and_v_are_within_half_a_step_of_each_number() {
    let case = uneven_heads(KvFormat::INT8);
    let check = |v: f32, got: f32, most: f32| {
        // The scale is rounded to eight bits.
        let bound = most / 127.0 / 2.0 * (1.0 + 1.0 / 128.0);
        assert!((got - v).abs() <= bound, "{got} for {v}");
    };
    check_kept(&case, &mut Reference, check);
    for cpu in cpus().iter_mut().flatten() {
        check_kept(&case, cpu, check);
    }
}

#[test]
fn attention_crosses_blocks_and_splits_without_a_seam() {
    let (random, mut cpus) = (&mut Random(8), cpus());
    let heads = Heads {
        query: 2,
        kv: 1,
        size: 16,
    };
    for lengths in [&[15, 16, 255][..], &[257, 3], &[530]] {
        for format in [KvFormat::F32, KvFormat::BF16, KvFormat::INT8] {
            let case = AttentionCase::new(random, heads, format, lengths);
            check_attention(&case, &mut cpus, random);
        }
    }
}
