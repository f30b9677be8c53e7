//! The engine under random work. First scheduler, pool and prefix alone, with a model made of arithmetic whose K/V cache tells
//! on every wrong block; then the whole engine over the tiny checkpoints.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod allocations;
mod books;
mod engine;
mod faults;
pub(crate) mod fragile;
mod gates;
mod rig;

use std::collections::HashMap;

use midpo::config::Speculation;
use midpo::engine::prefix::{PrefixRoot, Sharing};
use midpo::engine::scheduler::{Plan, PlannedSequence, Scheduler, SchedulerLimits};
use midpo::engine::sequence::{NewSequence, Place, RequestId};
use midpo::types::{BLOCK_TOKENS, BlockId, SeqId, TokenId, Variant};
use proptest::prelude::*;

/// Streams of a simulation that are open at once; more only make it slower.
const STREAMS_MAX: usize = 20;

/// splitmix64: numbers for the workload.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0, 0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn mix(a: u64, b: u64) -> u64 {
    let mut z = a ^ b.wrapping_mul(0xD6E8_FEB8_6659_FD93);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// What K and V of the last of `tokens` stand for: all tokens so far, under `root`.
fn memory(root: u64, tokens: &[TokenId]) -> u64 {
    tokens
        .iter()
        .fold(root, |state, token| mix(state, u64::from(token.0) + 1))
}

/// The answer's next token, which depends on all before it: most repeat the last but two, so that guesses are right at times.
fn next_token(root: u64, tokens: &[TokenId]) -> TokenId {
    let memory = memory(root, tokens);
    match tokens {
        [.., earlier, _, _] if !memory.is_multiple_of(8) => *earlier,
        _ => TokenId((memory / 8 % 97) as u32),
    }
}

#[derive(Clone, Copy, Debug)]
struct World {
    seed: u64,
    blocks: usize,
    limits: SchedulerLimits,
}

/// A stream that has not ended.
struct Stream {
    root: u64,
    prompt: Vec<TokenId>,
    answer: Vec<TokenId>,
    max_tokens: usize,
    /// Prompt positions whose logits came.
    prompt_logits: Option<Vec<usize>>,
    prompt_gates: Option<Vec<usize>>,
}

/// What happened in all.
#[derive(Default)]
struct Tally {
    submitted: usize,
    ended: usize,
    preempted: usize,
    cached_tokens: usize,
    drafted: usize,
    accepted: usize,
}

struct Simulation {
    world: World,
    random: Random,
    scheduler: Scheduler,
    plan: Plan,
    /// What each slot of each block remembers.
    cache: Vec<[u64; BLOCK_TOKENS]>,
    streams: HashMap<SeqId, Stream>,
    tally: Tally,
}

impl Simulation {
    fn new(world: World) -> Self {
        Self {
            world,
            random: Random(world.seed),
            scheduler: Scheduler::new(world.limits, world.blocks),
            plan: Plan::default(),
            cache: vec![[0; BLOCK_TOKENS]; world.blocks],
            streams: HashMap::new(),
            tally: Tally::default(),
        }
    }

    fn run(mut self, ticks: usize) -> Tally {
        for tick in 0..ticks {
            self.disturb(tick);
            self.step();
        }
        while !self.scheduler.is_idle() {
            self.step();
        }
        assert!(self.streams.is_empty(), "every stream ends");
        assert_eq!(self.tally.submitted, self.tally.ended, "and ends once");
        assert_eq!(self.scheduler.pool().counts().held, 0, "no block leaks");
        self.tally
    }

    fn disturb(&mut self, tick: usize) {
        if self.streams.len() < STREAMS_MAX && self.random.one_in(2) {
            self.submit(tick as u64);
        }
        if self.random.one_in(12) {
            let mut ids: Vec<SeqId> = self.streams.keys().copied().collect();
            ids.sort();
            if !ids.is_empty() {
                let id = ids[self.random.below(ids.len())];
                self.end(id);
            }
        }
    }

    /// A request whose prompt begins as many others do. It fits the cache alone, which is all that is promised.
    fn submit(&mut self, request: u64) {
        let room = self.world.blocks * BLOCK_TOKENS;
        let (stem, shared) = (self.random.below(3) as u32, self.random.below(1 + room / 2));
        let own = 1 + self.random.below(40);
        let stem_tokens = (0..shared as u32).map(|i| TokenId(stem * 1000 + i));
        let mut prompt: Vec<TokenId> = stem_tokens
            .chain((0..own).map(|_| TokenId(self.random.below(2) as u32)))
            .collect();
        prompt.truncate(room);
        let max_tokens = self.random.below(24).min(room + 1 - prompt.len());
        let variant = Variant::ALL[self.random.below(3)];
        let prompt_logits = self.random.one_in(6);
        let prompt_gates = self.random.one_in(6);
        let mut lead = None;
        for choice in 0..[1, 1, 1, 3][self.random.below(4)] {
            let prompt_logits = prompt_logits && choice == 0;
            let prompt_gates = prompt_gates && choice == 0;
            let root = mix(variant as u64, 0);
            let new = NewSequence {
                request: RequestId(request),
                choice,
                prompt: prompt.clone(),
                gates: variant.gates(),
                root: root_hash(variant),
                max_tokens,
                prompt_logits,
                prompt_gates,
            };
            let stream = Stream {
                root,
                prompt: prompt.clone(),
                answer: Vec::new(),
                max_tokens,
                prompt_logits: prompt_logits.then(Vec::new),
                prompt_gates: prompt_gates.then(Vec::new),
            };
            let id = self.scheduler.add(new, lead);
            lead = lead.or(Some(id));
            assert!(self.streams.insert(id, stream).is_none(), "ids are new");
            self.tally.submitted += 1;
        }
    }

    fn step(&mut self) {
        self.scheduler.assert_invariants();
        if self.scheduler.is_idle() {
            return;
        }
        let prefill_tokens = 1 + self.random.below(80);
        self.scheduler.plan(&mut self.plan, prefill_tokens);
        self.scheduler.assert_invariants();
        self.check_plan(prefill_tokens);
        let plan = std::mem::take(&mut self.plan);
        self.tally.preempted += plan.preempted;
        let cached = plan.started.iter().map(|started| started.cached_tokens);
        self.tally.cached_tokens += cached.sum::<usize>();
        // All rows are written before any is read, as an op over the whole batch does.
        for planned in &plan.sequences {
            self.write(planned);
        }
        let fails = self.random.one_in(50);
        for planned in &plan.sequences {
            self.check_memory(planned);
            if fails {
                self.end(planned.id);
            } else {
                self.commit(planned);
            }
        }
        self.plan = plan;
        self.scheduler.assert_invariants();
    }

    fn check_plan(&self, prefill_tokens: usize) {
        let planned = &self.plan.sequences;
        assert!(!planned.is_empty(), "the oldest always advances");
        let rows: usize = planned.iter().map(|planned| planned.rows).sum();
        assert!(rows <= self.world.limits.tokens);
        let logit_rows: usize = planned.iter().map(|planned| planned.logit_rows).sum();
        assert!(logit_rows <= self.world.limits.logit_rows);
        assert!(planned.len() <= self.world.limits.sequences);
        let (decodes, prefills) = planned.split_at(self.plan.decodes);
        assert!(
            decodes
                .iter()
                .all(|planned| planned.rows == 1 + planned.drafts)
        );
        let beside: usize = prefills.iter().map(|planned| planned.rows).sum();
        assert!(decodes.is_empty() || beside <= prefill_tokens);
        for planned in planned.iter().filter(|planned| planned.drafts > 0) {
            let sequence = self.scheduler.sequence(planned.id).unwrap();
            let most = self.world.limits.speculation.speculative_tokens;
            assert!(planned.drafts <= most && planned.rows == 1 + planned.drafts);
            assert_eq!(planned.rows, planned.logit_rows);
            assert!(planned.samples && sequence.generated() > 0);
            let stream = &self.streams[&planned.id];
            assert!(sequence.generated() + planned.drafts < stream.max_tokens);
            // Only what is left when all others have their rows.
            assert!(rows <= 8, "{rows} rows in a step with drafts");
        }
        let mut oldest_left_out = None;
        for id in self.streams.keys() {
            let sequence = self.scheduler.sequence(*id).unwrap();
            let times = planned.iter().filter(|planned| planned.id == *id).count();
            assert!(times <= 1);
            if sequence.place() == Place::Running && sequence.pending() == 1 {
                assert!(times == 1, "no decode waits behind a prompt");
            }
            if times == 0 && matches!(sequence.place(), Place::Waiting) {
                oldest_left_out = oldest_left_out.min(Some(*id)).or(Some(*id));
            }
        }
        // First come, first served.
        for started in self.plan.started.iter() {
            assert!(oldest_left_out.is_none_or(|left_out| started.id < left_out));
        }
    }

    fn slot(&mut self, blocks: &[BlockId], position: usize) -> &mut u64 {
        let block = blocks[position / BLOCK_TOKENS].index();
        &mut self.cache[block][position % BLOCK_TOKENS]
    }

    fn write(&mut self, planned: &PlannedSequence) {
        let sequence = self.scheduler.sequence(planned.id).unwrap();
        let (mut tokens, blocks) = (sequence.tokens().to_vec(), sequence.blocks().to_vec());
        tokens.extend_from_slice(&sequence.drafted()[..planned.drafts]);
        assert_eq!(sequence.computed(), planned.start);
        let root = self.streams[&planned.id].root;
        for position in planned.start..planned.start + planned.rows {
            *self.slot(&blocks, position) = memory(root, &tokens[..=position]);
        }
    }

    /// What the step reads is what this very sequence would have written.
    fn check_memory(&mut self, planned: &PlannedSequence) {
        let sequence = self.scheduler.sequence(planned.id).unwrap();
        let (mut tokens, blocks) = (sequence.tokens().to_vec(), sequence.blocks().to_vec());
        tokens.extend_from_slice(&sequence.drafted()[..planned.drafts]);
        let mut want = self.streams[&planned.id].root;
        for (position, token) in tokens.iter().enumerate().take(planned.start + planned.rows) {
            want = mix(want, u64::from(token.0) + 1);
            assert_eq!(*self.slot(&blocks, position), want, "{planned:?}");
        }
    }

    fn commit(&mut self, planned: &PlannedSequence) {
        let sequence = self.scheduler.sequence(planned.id).unwrap();
        let stream = self.streams.get_mut(&planned.id).unwrap();
        let reported = planned.logit_rows - usize::from(planned.samples) - planned.drafts;
        let first = planned.start + planned.logits_from;
        if let Some(positions) = &mut stream.prompt_logits {
            positions.extend(first..first + reported);
        } else {
            assert_eq!(reported, 0, "logits that nobody asked for");
        }
        let wanted = sequence.wanted_gates();
        let told = (planned.start..planned.start + planned.rows).filter(|at| wanted.contains(at));
        match &mut stream.prompt_gates {
            Some(positions) => positions.extend(told),
            None => assert!(wanted.is_empty(), "gates that nobody asked for"),
        }
        let mut tokens = sequence.tokens().to_vec();
        self.scheduler.advance(planned);
        let over = if planned.samples {
            assert_eq!(first + planned.logit_rows, tokens.len() + planned.drafts);
            let mut accepted = 0;
            loop {
                let token = next_token(stream.root, &tokens);
                tokens.push(token);
                stream.answer.push(token);
                self.scheduler.append(planned.id, token);
                if !self.scheduler.accept(planned, accepted) {
                    break;
                }
                accepted += 1;
            }
            if planned.drafts > 0 {
                self.scheduler.verified(planned, accepted);
            }
            self.tally.drafted += planned.drafts;
            self.tally.accepted += accepted;
            assert!(accepted <= planned.drafts);
            stream.answer.len() == stream.max_tokens
        } else {
            stream.max_tokens == 0 && planned.start + planned.rows == tokens.len()
        };
        if over {
            self.check_answer(planned.id);
            self.end(planned.id);
        }
    }

    /// Nothing lost, nothing repeated, nothing of anybody else's.
    fn check_answer(&self, id: SeqId) {
        let stream = &self.streams[&id];
        let mut tokens = stream.prompt.clone();
        for _ in 0..stream.max_tokens {
            tokens.push(next_token(stream.root, &tokens));
        }
        assert_eq!(stream.answer, tokens[stream.prompt.len()..]);
        if let Some(positions) = &stream.prompt_logits {
            let all = 0..stream.prompt.len() - 1;
            assert!(positions.iter().copied().eq(all), "{positions:?}");
        }
        if let Some(positions) = &stream.prompt_gates {
            let all = 0..stream.prompt.len();
            assert!(positions.iter().copied().eq(all), "{positions:?}");
        }
    }

    fn end(&mut self, id: SeqId) {
        assert!(self.streams.remove(&id).is_some());
        self.scheduler.finish(id);
        self.tally.ended += 1;
    }
}

fn root_hash(variant: Variant) -> midpo::engine::prefix::BlockHash {
    let root = PrefixRoot {
        fingerprint: "simulation",
        variant,
        gates: variant.gates(),
        sharing: Sharing::Everyone,
    };
    root.hash()
}

/// Rules of guesses; off at times.
pub(crate) fn speculations() -> impl Strategy<Value = Speculation> {
    (0usize..8, 1usize..6, 1usize..6).prop_map(|(tokens, one, other)| Speculation {
        speculative_tokens: tokens,
        prompt_lookup_max: one.max(other),
        prompt_lookup_min: one.min(other),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn scheduler_keeps_its_promises_in_any_world(
        seed: u64,
        blocks in 1usize..24,
        tokens in 1usize..80,
        sequences in 1usize..12,
        logit_rows in 1usize..40,
        speculation in speculations(),
    ) {
        let limits = SchedulerLimits { tokens, sequences, logit_rows, speculation };
        Simulation::new(World { seed, blocks, limits }).run(150);
    }
}

#[test]
fn scheduler_survives_thousands_of_requests_in_a_tiny_cache() {
    let limits = SchedulerLimits {
        tokens: 96,
        sequences: 8,
        logit_rows: 24,
        speculation: Speculation {
            speculative_tokens: 3,
            prompt_lookup_max: 4,
            prompt_lookup_min: 2,
        },
    };
    let world = World {
        seed: 1,
        blocks: 10,
        limits,
    };
    let tally = Simulation::new(world).run(15_000);
    assert!(tally.submitted > 2000, "{}", tally.submitted);
    // The workload would prove little if it met neither.
    assert!(tally.preempted > 50, "{}", tally.preempted);
    assert!(tally.cached_tokens > 1000, "{}", tally.cached_tokens);
    assert!(tally.accepted > 200, "{}", tally.accepted);
    let rejected = tally.drafted - tally.accepted;
    assert!(rejected > 200, "{rejected}");
}
