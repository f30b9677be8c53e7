//! How many prompt tokens a step may compute beside decodes, so that no running stream waits long for its next token.
//!
//! Invariant: between `PREFILL_TOKENS_MIN` and the step's own bound. Chunks change no bit of an answer, so a clock may choose them.

use std::time::Duration;

use crate::types::BLOCK_TOKENS;

/// Prompts advance by a block a step, however slow the machine.
const PREFILL_TOKENS_MIN: usize = BLOCK_TOKENS;
/// Where nothing was measured yet: small, for it doubles in a step that was fast.
const PREFILL_TOKENS_START: usize = 4 * BLOCK_TOKENS;

/// Learns from each step that had prompt tokens.
#[derive(Debug)]
pub struct PrefillPace {
    step_time_max: Duration,
    batch_tokens_max: usize,
    tokens: usize,
}

impl PrefillPace {
    /// `step_time_max`: how long a step with decodes should last at most; `batch_tokens_max`: tokens of a step.
    pub fn new(step_time_max: Duration, batch_tokens_max: usize) -> Self {
        Self {
            step_time_max,
            batch_tokens_max,
            tokens: PREFILL_TOKENS_START.min(batch_tokens_max),
        }
    }

    /// Most prompt tokens of the next step, where it has decodes too. At least 1.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// A step with `prefill_tokens` prompt tokens, and any number of decodes, took `lasted`.
    ///
    /// A step that lasted too long says how many tokens would have fitted, its decodes counted as theirs: for this errs on the
    /// slow side, and less the longer the chunk, the next steps correct it. A short one raises the bound to twice its own
    /// tokens at most, because time is linear in tokens only nearby.
    pub fn observe(&mut self, prefill_tokens: usize, lasted: Duration) {
        if prefill_tokens == 0 {
            return;
        }
        let speedup = self.step_time_max.as_secs_f64() / lasted.as_secs_f64().max(1e-9);
        // A float beyond usize becomes its greatest.
        let fitting = (prefill_tokens as f64 * speedup) as usize;
        let wanted = if lasted > self.step_time_max {
            fitting
        } else {
            self.tokens.max(fitting.min(2 * prefill_tokens))
        };
        let least = PREFILL_TOKENS_MIN.min(self.batch_tokens_max);
        self.tokens = wanted.clamp(least, self.batch_tokens_max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_millis(200);

    fn check(tokens_max: usize, steps: &[(usize, u64)], want: usize) {
        let mut pace = PrefillPace::new(MAX, tokens_max);
        for (tokens, millis) in steps {
            pace.observe(*tokens, Duration::from_millis(*millis));
        }
        assert_eq!(pace.tokens(), want, "{tokens_max} {steps:?}");
    }

    #[test]
    fn a_slow_step_shortens_the_next_and_a_fast_one_lengthens_it_with_care() {
        for (steps, want) in [
            (&[][..], 64),
            // 512 tokens a second.
            (&[(512, 1000)], 102),
            // Ten times as fast as asked for: at most twice its tokens.
            (&[(64, 20)], 128),
            (&[(64, 20), (128, 40), (256, 80)], 512),
            // A short prompt teaches nothing of long ones.
            (&[(10, 1)], 64),
            // Slow for another reason than its 3 tokens: at least a block, and back in a few steps.
            (&[(64, 150), (3, 300)], 16),
            (&[(3, 300), (16, 40), (32, 60)], 64),
            // Nothing to learn from decodes.
            (&[(0, 5000)], 64),
            (&[(512, 0)], 512),
            (&[(512, u64::MAX)], 16),
        ] {
            check(512, steps, want);
        }
        check(7, &[(7, 1)], 7);
        check(7, &[(7, 10_000)], 7);
    }

    #[test]
    fn the_bound_settles_where_a_step_lasts_as_long_as_it_may() {
        // Decodes take 50 ms, a prompt token 1.5: 100 fit.
        let lasts = |tokens: usize| Duration::from_micros(50_000 + 1500 * tokens as u64);
        for first in [PREFILL_TOKENS_MIN, 512] {
            let mut pace = PrefillPace::new(MAX, 512);
            pace.observe(first, lasts(first));
            for _ in 0..20 {
                pace.observe(pace.tokens(), lasts(pace.tokens()));
            }
            assert!((98..=100).contains(&pace.tokens()), "{}", pace.tokens());
        }
    }
}
