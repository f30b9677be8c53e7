//! Drives a model step by step with random tokens, without engine or sampler: what `midpo bench --engine` times. Owns the model
//! and hands out its K/V blocks by itself: sequence s of a group has the s-th run of blocks.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::backend::{Backend, BackendError, SampleRow, Sampled, StepLayout, StepSequence};
use crate::bench::Work;
use crate::checkpoint::LlamaConfig;
use crate::model::RoutedLlama;
use crate::random::SplitMix64;
use crate::types::{BLOCK_TOKENS, BlockId, GateOverride, TokenId};

/// A model and the tokens that it is fed.
pub(super) struct Steps<B: Backend> {
    model: RoutedLlama<B>,
    blocks: Vec<BlockId>,
    rows: usize,
    seed: u64,
    /// What is drawn on a device that draws.
    wants: Vec<SampleRow>,
    sampled: Sampled,
}

/// Sequences that run together, each with room for `positions`.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// One a sequence.
    pub gates: Vec<GateOverride>,
    /// Prompt and answer together, at most.
    pub positions: usize,
}

/// The part of one sequence in one step.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    sequence: usize,
    positions: Range<usize>,
    /// Whether the sequence's last token is in it: only then are logits wanted.
    last: bool,
}

impl<B: Backend> Steps<B> {
    /// `rows`: most rows of a step, as the model was made for.
    pub(super) fn new(model: RoutedLlama<B>, rows: usize, seed: u64) -> Self {
        let blocks = u32::try_from(model.kv_shape().blocks).unwrap_or(u32::MAX);
        Self {
            blocks: (0..blocks).map(BlockId::new).collect(),
            model,
            rows: rows.max(1),
            seed,
            wants: Vec::new(),
            sampled: Sampled::default(),
        }
    }

    /// Shapes of steps that the device replays.
    pub(super) fn recorded(&self) -> usize {
        self.model.recorded()
    }

    /// As [`RoutedLlama::set_replays`].
    pub(super) fn set_replays(&mut self, replays: bool) {
        self.model.set_replays(replays);
    }

    /// Computes positions `from..to` of every sequence of `group`, as many rows a step as fit. Returns the time in forward passes.
    pub(super) fn prefill(
        &mut self,
        group: &Group,
        positions: Range<usize>,
    ) -> Result<Duration, BackendError> {
        let mut spent = Duration::ZERO;
        for step in chunks(group.gates.len(), positions, self.rows) {
            spent += self.step(group, &step)?;
        }
        Ok(spent)
    }

    /// Computes `steps` tokens of every sequence, one a step, from `position` on. Returns the time in forward passes.
    pub(super) fn decode(
        &mut self,
        group: &Group,
        position: usize,
        steps: usize,
    ) -> Result<Duration, BackendError> {
        let mut spent = Duration::ZERO;
        for position in position..position + steps {
            let part = |sequence| Part {
                sequence,
                positions: position..position + 1,
                last: true,
            };
            let step: Vec<Part> = (0..group.gates.len()).map(part).collect();
            spent += self.step(group, &step)?;
        }
        Ok(spent)
    }

    fn step(&mut self, group: &Group, parts: &[Part]) -> Result<Duration, BackendError> {
        let vocabulary = self.model.vocabulary();
        let seed = self.seed;
        let token = |sequence: usize, position: usize| {
            let stream = ((sequence as u64) << 32) | position as u64;
            TokenId(SplitMix64::new(seed, stream).below(vocabulary) as u32)
        };
        let blocks_each = group.positions.div_ceil(BLOCK_TOKENS);
        let (mut tokens, mut sequences, mut logit_rows) = (Vec::new(), Vec::new(), Vec::new());
        for part in parts {
            let start = part.sequence * blocks_each;
            let table = self.blocks.get(start..start + blocks_each);
            tokens.extend(part.positions.clone().map(|p| token(part.sequence, p)));
            sequences.push(StepSequence {
                rows: part.positions.len(),
                start: part.positions.start,
                // An empty table is refused by the layout's check, with the sizes.
                block_table: table.unwrap_or_default(),
                gates: group.gates[part.sequence],
            });
            logit_rows.extend(part.last.then(|| tokens.len() - 1));
        }
        let layout = StepLayout {
            tokens: &tokens,
            sequences: &sequences,
            logit_rows: &logit_rows,
        };
        self.wants.resize(logit_rows.len(), SampleRow::default());
        let begun = Instant::now();
        // As the engine does: where the device draws, no logits come back.
        if self.model.samples() {
            let (wants, sampled) = (&self.wants, &mut self.sampled);
            let submitted = self.model.submit(&layout, wants)?;
            self.model.collect(submitted, wants, sampled)?;
        } else {
            std::hint::black_box(self.model.forward(&layout)?.logits);
        }
        Ok(begun.elapsed())
    }
}

/// Cuts `positions` of `count` sequences into steps of at most `rows` rows, sequence after sequence.
fn chunks(count: usize, positions: Range<usize>, rows: usize) -> Vec<Vec<Part>> {
    let (mut steps, mut step, mut room) = (Vec::new(), Vec::new(), rows);
    for sequence in 0..count {
        let mut from = positions.start;
        while from < positions.end {
            let to = positions.end.min(from + room);
            step.push(Part {
                sequence,
                positions: from..to,
                last: to == positions.end,
            });
            room -= to - from;
            from = to;
            if room == 0 {
                steps.push(std::mem::take(&mut step));
                room = rows;
            }
        }
    }
    if !step.is_empty() {
        steps.push(step);
    }
    steps
}

/// The least that a step must read and compute (PERFORMANCE.md "What decode costs").
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// Multiply-adds of one row through all layers.
    row_macs: f64,
    /// Multiply-adds of one row of logits.
    head_macs: f64,
    /// Multiply-adds of one row for each position that it attends to.
    position_macs: f64,
    /// Weights that every step reads, the head with them.
    weight_bytes: f64,
    /// K and V of one position in all layers.
    position_bytes: f64,
    rows: usize,
}

impl Cost {
    /// `expert_width`: w of MIDPO.md 1, 0 without experts. `rows`: most rows of a step.
    pub(super) fn new<B: Backend>(
        config: &LlamaConfig,
        expert_width: usize,
        model: &RoutedLlama<B>,
        rows: usize,
    ) -> Self {
        let (d, m) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        );
        let experts = match expert_width {
            0 => 0,
            w => (w + 2) * m + d * w,
        };
        let layer = d * (q + 2 * kv) + q * d + 3 * d * m + experts;
        let shape = model.kv_shape();
        Self {
            row_macs: (config.num_layers * layer) as f64,
            head_macs: (config.vocab_size * d) as f64,
            position_macs: (config.num_layers * 2 * q) as f64,
            weight_bytes: model.step_weight_bytes() as f64,
            position_bytes: shape.block_bytes() as f64 / BLOCK_TOKENS as f64,
            rows,
        }
    }

    /// One token of each of `batch` sequences, at `position` on average.
    pub(super) fn decode(&self, batch: usize, position: f64) -> Work {
        let attended = batch as f64 * (position + 1.0);
        Work {
            tokens: batch,
            bytes: self.weight_bytes + attended * self.position_bytes,
            ops: 2.0
                * (batch as f64 * (self.row_macs + self.head_macs) + attended * self.position_macs),
        }
    }

    /// A prompt of `tokens`, in chunks: each chunk reads the weights, and K and V of all before it.
    pub(super) fn prefill(&self, tokens: usize) -> Work {
        let (n, rows) = (tokens as f64, self.rows.max(1));
        let ends = (rows..tokens).step_by(rows).chain([tokens]);
        let (mut steps, mut read) = (0.0, 0.0);
        for end in ends {
            steps += 1.0;
            read += end as f64;
        }
        Work {
            tokens,
            bytes: steps * self.weight_bytes + read * self.position_bytes,
            ops: 2.0
                * (n * self.row_macs + self.head_macs + n * (n + 1.0) / 2.0 * self.position_macs),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(sequence: usize, positions: Range<usize>, last: bool) -> Part {
        Part {
            sequence,
            positions,
            last,
        }
    }

    #[test]
    fn chunks_fill_every_step_and_mark_each_sequences_end_once() {
        let want = [
            vec![part(0, 0..4, false)],
            vec![part(0, 4..5, true), part(1, 0..3, false)],
            vec![part(1, 3..5, true)],
        ];
        assert_eq!(chunks(2, 0..5, 4), want);
        assert_eq!(chunks(1, 3..5, 2), [vec![part(0, 3..5, true)]]);
        assert!(chunks(3, 2..2, 4).is_empty());
        for (count, tokens, rows) in [(1, 1, 1), (3, 7, 2), (32, 96, 512), (5, 100, 7)] {
            let steps = chunks(count, 0..tokens, rows);
            let all = || steps.iter().flatten();
            assert_eq!(
                all().map(|p| p.positions.len()).sum::<usize>(),
                count * tokens
            );
            assert_eq!(all().filter(|p| p.last).count(), count);
            assert_eq!(steps.len(), (count * tokens).div_ceil(rows));
        }
    }
}
