//! Guesses at a sequence's next tokens, copied from where its last tokens stood before (prompt lookup): free to make, and right
//! where an answer quotes, lists or loops. Whoever checks them samples as if there were none, so that a guess costs rows, never
//! a bit.
//!
//! Invariant: a draft is at most `length` tokens, and `length` at most what the rules allow.

use crate::config::Speculation;
use crate::types::TokenId;

/// Tokens for which a sequence makes no draft, at most, however often its drafts were wrong.
const PAUSE_MAX: usize = 32;

/// Drafts for one sequence, and backs off where they are wrong: a draft without a right token makes the next one a single
/// token long and doubles the tokens generated before it (1, 2, 4 .. 32); a right token divides them by 4; a draft that was
/// right as a whole doubles the length again. So fewer than one in three right lead to long pauses, more to none: about
/// where a row of a small step begins to pay (benches/README.md, decode at batch 1 and 8).
#[derive(Clone, Debug)]
pub struct Drafter {
    rules: Speculation,
    length: usize,
    pause: usize,
    /// No draft for fewer tokens than these.
    resume_at: usize,
}

impl Drafter {
    /// A sequence starts with the longest drafts.
    pub fn new(rules: Speculation) -> Self {
        Self {
            rules,
            length: rules.speculative_tokens,
            pause: 0,
            resume_at: 0,
        }
    }

    /// Replaces `draft` by at most `most` tokens that may follow `tokens`; by none where nothing like their end came before.
    pub fn draft(&self, tokens: &[TokenId], most: usize, draft: &mut Vec<TokenId>) {
        draft.clear();
        let length = self.length.min(most);
        if length == 0 || tokens.len() < self.resume_at {
            return;
        }
        let Some(next) = lookup(tokens, self.rules) else {
            return;
        };
        for at in next..next + length {
            // A copy may run into itself: a loop shorter than the draft goes round.
            let token = match tokens.get(at) {
                Some(token) => *token,
                None => draft[at - tokens.len()],
            };
            draft.push(token);
        }
    }

    /// The first `accepted` of `drafted` tokens were right; the sequence has `tokens` tokens now.
    pub fn verified(&mut self, drafted: usize, accepted: usize, tokens: usize) {
        if accepted == 0 {
            self.length = 1;
            self.pause = (2 * self.pause).clamp(1, PAUSE_MAX);
        } else {
            self.pause /= 4;
            if accepted == drafted {
                let doubled = (2 * drafted).min(self.rules.speculative_tokens);
                self.length = self.length.max(doubled);
            } else {
                self.length = accepted;
            }
        }
        self.resume_at = tokens + self.pause;
    }
}

/// Where the copy starts: behind the latest of the longest earlier runs that equal the end of `tokens`. One pass from the end.
fn lookup(tokens: &[TokenId], rules: Speculation) -> Option<usize> {
    let (last, before) = tokens.split_last()?;
    let (mut longest, mut next) = (rules.prompt_lookup_min.saturating_sub(1), None);
    for at in (0..before.len()).rev() {
        if before[at] != *last {
            continue;
        }
        let pairs = before[..at].iter().rev().zip(before.iter().rev());
        let equal = pairs.take_while(|(one, other)| one == other);
        let run = 1 + equal
            .take(rules.prompt_lookup_max.saturating_sub(1))
            .count();
        if run > longest {
            (longest, next) = (run, Some(at + 1));
        }
        if run >= rules.prompt_lookup_max {
            break;
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Speculation = Speculation {
        speculative_tokens: 3,
        prompt_lookup_max: 3,
        prompt_lookup_min: 2,
    };

    fn drafted(drafter: &Drafter, tokens: &[u32], most: usize) -> Vec<u32> {
        let tokens: Vec<TokenId> = tokens.iter().map(|id| TokenId(*id)).collect();
        // What an earlier step left behind must not stay.
        let mut draft = vec![TokenId(99)];
        drafter.draft(&tokens, most, &mut draft);
        draft.iter().map(|token| token.0).collect()
    }

    #[test]
    fn a_draft_copies_what_followed_the_longest_then_the_latest_equal_run() {
        let drafter = Drafter::new(RULES);
        for (tokens, most, want) in [
            (&[][..], 3, &[][..]),
            (&[1], 3, &[]),
            // One token alone is too short a run.
            (&[1, 5, 6, 1], 3, &[]),
            (&[1, 2, 5, 6, 7, 1, 2], 3, &[5, 6, 7]),
            (&[1, 2, 5, 6, 7, 1, 2], 2, &[5, 6]),
            (&[1, 2, 5, 6, 7, 1, 2], 0, &[]),
            // The later of two.
            (&[1, 2, 5, 1, 2, 6, 8, 8, 1, 2], 2, &[6, 8]),
            // The longer, though earlier.
            (&[9, 1, 2, 5, 7, 1, 2, 6, 8, 9, 1, 2], 2, &[5, 7]),
            // Longer than the maximum counts as the maximum.
            (&[7, 9, 1, 2, 5, 9, 1, 2, 6, 7, 9, 1, 2], 1, &[6]),
            // Loops of one and two tokens go round.
            (&[4, 4, 4], 3, &[4, 4, 4]),
            (&[1, 2, 1, 2], 3, &[1, 2, 1]),
            // The end of a run and its match may overlap.
            (&[3, 4, 4, 4], 2, &[4, 4]),
        ] {
            assert_eq!(drafted(&drafter, tokens, most), want, "{tokens:?} {most}");
        }
    }

    #[test]
    fn a_minimum_of_one_matches_single_tokens_and_off_drafts_nothing() {
        let one = Speculation {
            prompt_lookup_min: 1,
            ..RULES
        };
        assert_eq!(drafted(&Drafter::new(one), &[1, 5, 6, 1], 3), [5, 6, 1]);
        let off = Drafter::new(Speculation::OFF);
        assert!(drafted(&off, &[4, 4, 4, 4, 4, 4], 3).is_empty());
    }

    #[test]
    fn wrong_drafts_make_pauses_and_right_ones_end_them() {
        let mut drafter = Drafter::new(RULES);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            drafter.verified(3, 0, 100);
            pauses.push(drafter.resume_at - 100);
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 32]);
        let loops = [4; 132];
        assert!(drafted(&drafter, &loops[..131], 3).is_empty());
        assert_eq!(drafted(&drafter, &loops, 3), [4]);
        let mut lengths = Vec::new();
        pauses.clear();
        for _ in 0..3 {
            let drafted = drafter.length;
            drafter.verified(drafted, drafted, 200);
            pauses.push(drafter.resume_at - 200);
            lengths.push(drafter.length);
        }
        assert_eq!((pauses, lengths), (vec![8, 2, 0], vec![2, 3, 3]));
        // In part right: as long as that next time, without a pause. Cut short by the step, but right: no shorter.
        drafter.verified(3, 2, 200);
        assert_eq!((drafter.length, drafter.resume_at), (2, 200));
        drafter.verified(1, 1, 200);
        assert_eq!((drafter.length, drafter.resume_at), (2, 200));
    }

    #[test]
    fn text_that_never_repeats_as_before_costs_few_rows() {
        // Every pair of tokens came before, and always another token follows: each draft is wrong.
        let mut drafter = Drafter::new(RULES);
        let (mut rows, mut draft) = (0, Vec::new());
        let mut tokens: Vec<TokenId> = Vec::new();
        for step in 0..1000 {
            tokens.extend([1, 2, 1000 + step].map(TokenId));
            for end in tokens.len() - 2..=tokens.len() {
                drafter.draft(&tokens[..end], 3, &mut draft);
                if !draft.is_empty() {
                    let right = draft.first() == tokens.get(end);
                    drafter.verified(draft.len(), usize::from(right), end + 1);
                    rows += draft.len();
                }
            }
        }
        assert!(rows < 3000 / 20, "{rows} rows for 3000 tokens");
    }
}
