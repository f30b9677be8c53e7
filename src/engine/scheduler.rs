//! Who runs in the next step, which tokens, in which blocks. Owns the sequences and the pool.
//!
//! First come, first served: a sequence's id is its place in line for good. Those that run and have one token to compute
//! (decodes) come first, so that no stream waits behind a prompt; prompts share what is left of the step. When the pool is
//! full the youngest running sequence is put back in line, and the oldest always advances: every request fits alone. Guesses
//! at next tokens fill what is left of a small step, and go first when anything is short.
//!
//! Invariant: a sequence is in `running` (sorted), in `waiting`, or follows another, as its `place` says; only running ones
//! hold blocks.

use std::collections::{BTreeSet, HashMap};

use super::pool::BlockPool;
use super::sequence::{NewSequence, Place, RequestId, Sequence};
use crate::config::Speculation;
use crate::types::{SeqId, TokenId};

/// Rows of a step that has drafts, at most. Up to about 8 a row costs a fraction of the step, which reads every weight for
/// the first one; beyond, a row of a guess costs as much as a row that surely makes a token.
const DRAFT_STEP_ROWS_MAX: usize = 8;

/// Bounds of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Tokens.
    pub tokens: usize,
    /// Sequences; at most `tokens` and `logit_rows` are used, so that every running one can decode.
    pub sequences: usize,
    /// Tokens whose logits are wanted.
    pub logit_rows: usize,
    /// Guesses at next tokens.
    pub speculation: Speculation,
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedSequence {
    /// Which.
    pub id: SeqId,
    /// Position of the first row.
    pub start: usize,
    /// Rows, at least 1.
    pub rows: usize,
    /// From this row on logits are wanted; `logit_rows` of them.
    pub logits_from: usize,
    /// Rows whose logits are wanted.
    pub logit_rows: usize,
    /// Of the rows, so many at the end are of tokens that are guessed: [`Sequence::drafted`].
    pub drafts: usize,
    /// Whether the last row's logits choose the next token; with drafts, those of the last `1 + drafts` rows one token each,
    /// as far as the guesses are right.
    pub samples: bool,
}

/// A sequence that came to run in this step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Started {
    /// Which.
    pub id: SeqId,
    /// Tokens found in the prefix cache.
    pub cached_tokens: usize,
    /// Whether it looked there.
    pub looked_up: bool,
    /// Whether it never ran before.
    pub first: bool,
}

/// A step.
#[derive(Debug, Default)]
pub struct Plan {
    /// What is computed.
    pub sequences: Vec<PlannedSequence>,
    /// Who came to run.
    pub started: Vec<Started>,
    /// Sequences that were put back in line.
    pub preempted: usize,
    /// The first so many of `sequences` are decodes.
    pub decodes: usize,
}

impl Plan {
    /// Tokens of the sequences that are no decodes.
    pub fn prefill_tokens(&self) -> usize {
        let prefills = self.sequences.iter().skip(self.decodes);
        prefills.map(|planned| planned.rows).sum()
    }
}

/// What is left of the step.
struct Budget {
    tokens: usize,
    logit_rows: usize,
}

/// Owns sequences and blocks.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    pool: BlockPool,
    sequences: HashMap<SeqId, Sequence>,
    running: Vec<SeqId>,
    waiting: BTreeSet<SeqId>,
    followers: HashMap<SeqId, Vec<SeqId>>,
    next_id: u64,
}

impl Scheduler {
    /// No sequences, all blocks free.
    pub fn new(limits: SchedulerLimits, blocks: usize) -> Self {
        let sequences = limits.sequences.min(limits.tokens).min(limits.logit_rows);
        Self {
            limits: SchedulerLimits {
                sequences: sequences.max(1),
                ..limits
            },
            pool: BlockPool::new(blocks),
            sequences: HashMap::new(),
            running: Vec::new(),
            waiting: BTreeSet::new(),
            followers: HashMap::new(),
            next_id: 0,
        }
    }

    /// Puts a sequence in line; behind `lead`, which has the same prompt and root, until that has computed it. The whole
    /// sequence must fit the pool alone.
    pub fn add(&mut self, new: NewSequence, lead: Option<SeqId>) -> SeqId {
        let id = SeqId::new(self.next_id);
        self.next_id += 1;
        let lead = lead.filter(|lead| {
            let lead = self.sequences.get(lead);
            lead.is_some_and(|lead| !lead.prompt_done())
        });
        let place = match lead {
            Some(lead) => {
                self.followers.entry(lead).or_default().push(id);
                Place::Following(lead)
            }
            None => {
                self.waiting.insert(id);
                Place::Waiting
            }
        };
        let sequence = Sequence::new(new, self.limits.speculation, place);
        self.sequences.insert(id, sequence);
        id
    }

    /// Plans one step. Not empty while there are sequences. `prefill_tokens`: most tokens of prompts beside decodes; the limit
    /// of the step alone holds where none decodes.
    pub fn plan(&mut self, plan: &mut Plan, prefill_tokens: usize) {
        plan.sequences.clear();
        plan.started.clear();
        plan.preempted = 0;
        let mut budget = Budget {
            tokens: self.limits.tokens,
            logit_rows: self.limits.logit_rows,
        };
        self.plan_decodes(plan, &mut budget);
        plan.decodes = plan.sequences.len();
        if plan.decodes > 0 {
            budget.tokens = budget.tokens.min(prefill_tokens);
        }
        self.plan_prefills(plan, &mut budget);
        self.plan_waiting(plan, &mut budget);
        self.plan_drafts(plan, &budget);
    }

    fn plan_decodes(&mut self, plan: &mut Plan, budget: &mut Budget) {
        let mut index = 0;
        while let Some(id) = self.running.get(index).copied() {
            let decodes = self.get(id).pending() == 1;
            if decodes && self.provide_block(id, plan) {
                self.plan_rows(id, plan, budget);
            }
            // A sequence that had to go was the last of all.
            index += 1;
        }
    }

    fn plan_prefills(&mut self, plan: &mut Plan, budget: &mut Budget) {
        for index in 0..self.running.len() {
            let id = self.running[index];
            if self.get(id).pending() > 1 {
                self.plan_rows(id, plan, budget);
            }
        }
    }

    fn plan_waiting(&mut self, plan: &mut Plan, budget: &mut Budget) {
        // With a row of either kind left, whoever starts also computes something.
        let room = |budget: &Budget| budget.tokens > 0 && budget.logit_rows > 0;
        while room(budget) && self.running.len() < self.limits.sequences {
            let Some(id) = self.waiting.first().copied() else {
                return;
            };
            // Each running sequence will want a block soon: without room for them the newcomer would be put back at once.
            let spare = self.running.len();
            let Some(sequence) = self.sequences.get_mut(&id) else {
                unreachable!("waiting sequences are alive");
            };
            let looked_up = sequence.uses_prefix_cache();
            let Some((cached_tokens, first)) = sequence.start(&mut self.pool, spare) else {
                return;
            };
            self.waiting.remove(&id);
            let at = self.running.partition_point(|other| *other < id);
            self.running.insert(at, id);
            plan.started.push(Started {
                id,
                cached_tokens,
                looked_up,
                first,
            });
            self.plan_rows(id, plan, budget);
        }
    }

    /// Adds guesses to decodes, the oldest first, while the step stays small.
    fn plan_drafts(&mut self, plan: &mut Plan, budget: &Budget) {
        if self.limits.speculation.speculative_tokens == 0 {
            return;
        }
        let rows: usize = plan.sequences.iter().map(|planned| planned.rows).sum();
        let mut room = DRAFT_STEP_ROWS_MAX
            .saturating_sub(rows)
            .min(budget.tokens)
            .min(budget.logit_rows);
        let spare = self.running.len();
        for planned in &mut plan.sequences {
            let Some(sequence) = self.sequences.get_mut(&planned.id) else {
                unreachable!("planned sequences are alive");
            };
            let decodes = planned.samples && planned.rows == 1 && sequence.prompt_done();
            if room > 0 && decodes {
                planned.drafts = sequence.draft(room, &mut self.pool, spare);
                planned.rows += planned.drafts;
                planned.logit_rows += planned.drafts;
                room -= planned.drafts;
            }
        }
    }

    /// Makes sure that a decode has a block to write to. False: the sequence itself had to go.
    fn provide_block(&mut self, id: SeqId, plan: &mut Plan) -> bool {
        while self.get(id).lacks_block() {
            if let Some(block) = self.pool.allocate() {
                self.get_mut(id).add_block(block);
                continue;
            }
            let Some(youngest) = self.running.pop() else {
                unreachable!("`id` runs");
            };
            if let Some(sequence) = self.sequences.get_mut(&youngest) {
                sequence.stop(&mut self.pool);
            }
            self.waiting.insert(youngest);
            plan.preempted += 1;
            if youngest == id {
                return false;
            }
        }
        true
    }

    /// As many rows of a sequence as the step has room for.
    fn plan_rows(&self, id: SeqId, plan: &mut Plan, budget: &mut Budget) {
        let sequence = self.get(id);
        let start = sequence.computed();
        let wanted = sequence.wanted_logits();
        let first = wanted.start.max(start);
        let end =
            (start + sequence.pending())
                .min(start + budget.tokens)
                .min(if wanted.is_empty() {
                    usize::MAX
                } else {
                    first + budget.logit_rows
                });
        if end <= start {
            return;
        }
        let logit_rows = wanted.end.min(end).saturating_sub(first);
        budget.tokens -= end - start;
        budget.logit_rows -= logit_rows;
        plan.sequences.push(PlannedSequence {
            id,
            start,
            rows: end - start,
            logits_from: first - start,
            logit_rows,
            drafts: 0,
            samples: end == sequence.tokens().len() && wanted.end == end,
        });
    }

    /// The rows of `planned` are computed, those of guesses apart, which count as soon as they are right. Returns whether this
    /// completed its prompt for the first time.
    pub fn advance(&mut self, planned: &PlannedSequence) -> bool {
        let Some(sequence) = self.sequences.get_mut(&planned.id) else {
            return false;
        };
        let completed = sequence.advance(planned.rows - planned.drafts, &mut self.pool);
        if completed {
            self.wake_followers(planned.id);
        }
        completed
    }

    /// A token was sampled for a sequence whose tokens are all computed.
    pub fn append(&mut self, id: SeqId, token: TokenId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.append(token);
        }
    }

    /// Whether the token just appended is what the step of `planned` guessed after `accepted` right guesses: then it is
    /// computed already.
    pub fn accept(&mut self, planned: &PlannedSequence, accepted: usize) -> bool {
        let Some(sequence) = self.sequences.get_mut(&planned.id) else {
            return false;
        };
        let guess = sequence.drafted()[..planned.drafts].get(accepted);
        let right = guess.is_some() && guess == sequence.tokens().last();
        if right {
            sequence.advance(1, &mut self.pool);
        }
        right
    }

    /// The step of `planned` had drafts, of which the first `accepted` were right.
    pub fn verified(&mut self, planned: &PlannedSequence, accepted: usize) {
        if let Some(sequence) = self.sequences.get_mut(&planned.id) {
            sequence.verified(planned.drafts, accepted);
        }
    }

    /// Forgets a sequence and gives its blocks back.
    pub fn finish(&mut self, id: SeqId) {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return;
        };
        match sequence.place() {
            Place::Running => {
                sequence.stop(&mut self.pool);
                self.running.retain(|other| *other != id);
            }
            Place::Waiting => {
                self.waiting.remove(&id);
            }
            Place::Following(lead) => {
                if let Some(followers) = self.followers.get_mut(&lead) {
                    followers.retain(|other| *other != id);
                }
            }
        }
        self.wake_followers(id);
    }

    fn wake_followers(&mut self, lead: SeqId) {
        for id in self.followers.remove(&lead).unwrap_or_default() {
            self.get_mut(id).place = Place::Waiting;
            self.waiting.insert(id);
        }
    }

    /// A sequence that has not ended.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that do not run.
    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running.len()
    }

    /// The blocks.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    fn get(&self, id: SeqId) -> &Sequence {
        match self.sequences.get(&id) {
            Some(sequence) => sequence,
            None => unreachable!("sequence {id} is in a list, so it is alive"),
        }
    }

    fn get_mut(&mut self, id: SeqId) -> &mut Sequence {
        match self.sequences.get_mut(&id) {
            Some(sequence) => sequence,
            None => unreachable!("sequence {id} is in a list, so it is alive"),
        }
    }

    /// Panics where an invariant of scheduler or pool is broken. For tests.
    pub fn assert_invariants(&self) {
        assert!(self.running.is_sorted(), "running is in line");
        assert!(self.running.len() <= self.limits.sequences);
        let mut counted = 0;
        for (id, sequence) in &self.sequences {
            let running = self.running.contains(id);
            let waiting = self.waiting.contains(id);
            let following = self.followers.values().flatten().any(|other| other == id);
            let place = (running, waiting, following);
            let want = match sequence.place() {
                Place::Running => (true, false, false),
                Place::Waiting => (false, true, false),
                Place::Following(_) => (false, false, true),
            };
            assert_eq!(place, want, "place of sequence {id}");
            assert!(running || sequence.blocks().is_empty());
            let room = sequence.blocks().len() * crate::types::BLOCK_TOKENS;
            assert!(sequence.computed() <= room && sequence.pending() > 0);
            counted += 1;
        }
        let listed = self.running.len() + self.waiting.len();
        let following: usize = self.followers.values().map(Vec::len).sum();
        assert_eq!(counted, listed + following, "lists hold the living only");
        let holds = self
            .sequences
            .values()
            .flat_map(|sequence| sequence.blocks());
        self.pool.assert_invariants(holds);
    }

    /// The request and choice of a sequence.
    pub fn owner(&self, id: SeqId) -> Option<(RequestId, u32)> {
        let sequence = self.sequences.get(&id)?;
        Some((sequence.request(), sequence.choice()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::prefix::{PrefixRoot, Sharing};
    use super::*;
    use crate::types::Variant;

    fn new(prompt: usize, request: u64) -> NewSequence {
        let gates = Variant::Base.gates();
        let root = PrefixRoot {
            fingerprint: "",
            variant: Variant::Base,
            gates,
            sharing: Sharing::Request(request),
        };
        NewSequence {
            request: RequestId(request),
            choice: 0,
            prompt: (0..prompt as u32).map(TokenId).collect(),
            gates,
            root: root.hash(),
            max_tokens: 1000,
            prompt_logits: false,
            prompt_gates: false,
        }
    }

    fn scheduler(tokens: usize, logit_rows: usize, blocks: usize) -> Scheduler {
        let limits = SchedulerLimits {
            tokens,
            sequences: 4,
            logit_rows,
            speculation: Speculation::OFF,
        };
        Scheduler::new(limits, blocks)
    }

    /// Plans and computes one step; returns (sequence, rows, logit rows) of each part.
    fn step(scheduler: &mut Scheduler) -> Vec<(SeqId, usize, usize)> {
        paced_step(scheduler, usize::MAX)
    }

    fn paced_step(scheduler: &mut Scheduler, prefill_tokens: usize) -> Vec<(SeqId, usize, usize)> {
        let mut plan = Plan::default();
        scheduler.plan(&mut plan, prefill_tokens);
        for planned in &plan.sequences {
            scheduler.advance(planned);
            if planned.samples {
                scheduler.append(planned.id, TokenId(0));
            }
        }
        scheduler.assert_invariants();
        let parts = plan.sequences.iter();
        parts.map(|p| (p.id, p.rows, p.logit_rows)).collect()
    }

    #[test]
    fn decodes_come_before_prompts_which_share_what_is_left() {
        let mut scheduler = scheduler(20, 8, 100);
        let short = scheduler.add(new(3, 0), None);
        assert_eq!(step(&mut scheduler), [(short, 3, 1)]);
        let long = scheduler.add(new(30, 1), None);
        let last = scheduler.add(new(4, 2), None);
        assert_eq!(step(&mut scheduler), [(short, 1, 1), (long, 19, 0)]);
        let third = [(short, 1, 1), (long, 11, 1), (last, 4, 1)];
        assert_eq!(step(&mut scheduler), third);
        let decodes = [(short, 1, 1), (long, 1, 1), (last, 1, 1)];
        assert_eq!(step(&mut scheduler), decodes);
    }

    #[test]
    fn beside_decodes_prompts_share_what_they_are_given() {
        let mut scheduler = scheduler(64, 8, 100);
        let first = scheduler.add(new(20, 0), None);
        let second = scheduler.add(new(9, 1), None);
        // Nobody waits for a next token yet.
        let prompts = [(first, 20, 1), (second, 9, 1)];
        assert_eq!(paced_step(&mut scheduler, 4), prompts);
        let third = scheduler.add(new(6, 2), None);
        let fourth = scheduler.add(new(5, 3), None);
        let decodes = [(first, 1, 1), (second, 1, 1)];
        let with = |prompts: &[_]| [&decodes, prompts].concat();
        assert_eq!(paced_step(&mut scheduler, 4), with(&[(third, 4, 0)]));
        let shared = with(&[(third, 2, 1), (fourth, 2, 0)]);
        assert_eq!(paced_step(&mut scheduler, 4), shared);
    }

    #[test]
    fn a_full_pool_puts_the_youngest_back_in_line() {
        let mut scheduler = scheduler(64, 8, 3);
        let older = scheduler.add(new(16, 0), None);
        let younger = scheduler.add(new(16, 1), None);
        assert_eq!(step(&mut scheduler), [(older, 16, 1), (younger, 16, 1)]);
        // Both want a second block, and there is one.
        assert_eq!(step(&mut scheduler), [(older, 1, 1)]);
        assert_eq!(scheduler.sequence(younger).unwrap().place(), Place::Waiting);
        scheduler.finish(older);
        // Its first block was found again: only the token that it had sampled is computed.
        assert_eq!(step(&mut scheduler), [(younger, 1, 1)]);
    }

    #[test]
    fn a_newcomer_leaves_a_block_to_each_that_runs() {
        let mut scheduler = scheduler(64, 8, 2);
        let older = scheduler.add(new(15, 0), None);
        step(&mut scheduler);
        let younger = scheduler.add(new(15, 1), None);
        assert_eq!(step(&mut scheduler), [(older, 1, 1)]);
        scheduler.finish(older);
        assert_eq!(step(&mut scheduler), [(younger, 15, 1)]);
    }

    #[test]
    fn followers_wait_for_the_prompt_and_compute_only_its_rest() {
        let mut scheduler = scheduler(30, 8, 100);
        let lead = scheduler.add(new(40, 0), None);
        let follower = scheduler.add(new(40, 0), Some(lead));
        assert_eq!(step(&mut scheduler), [(lead, 30, 0)]);
        assert_eq!(step(&mut scheduler), [(lead, 10, 1)]);
        assert_eq!(step(&mut scheduler), [(lead, 1, 1), (follower, 8, 1)]);
        // A lead that has its prompt is followed by nobody.
        let late = scheduler.add(new(40, 0), Some(lead));
        assert_eq!(scheduler.sequence(late).unwrap().place(), Place::Waiting);
    }

    #[test]
    fn followers_of_a_lead_that_is_gone_compute_for_themselves() {
        let mut scheduler = scheduler(30, 8, 100);
        let lead = scheduler.add(new(40, 0), None);
        let follower = scheduler.add(new(40, 0), Some(lead));
        scheduler.finish(lead);
        assert_eq!(step(&mut scheduler), [(follower, 30, 0)]);
    }

    #[test]
    fn logits_of_a_prompt_come_in_chunks_of_what_the_step_can_hold() {
        let mut scheduler = scheduler(64, 4, 100);
        let id = scheduler.add(
            NewSequence {
                prompt_logits: true,
                ..new(6, 0)
            },
            None,
        );
        assert_eq!(step(&mut scheduler), [(id, 4, 4)]);
        assert_eq!(step(&mut scheduler), [(id, 2, 2)]);
        assert_eq!(step(&mut scheduler), [(id, 1, 1)]);
    }
}
