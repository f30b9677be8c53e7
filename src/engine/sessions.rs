//! All requests of the engine, and what a step does to them: admit, plan, commit, end.
//!
//! Invariant: a sequence is in the scheduler exactly while its choice is open in its request, and a request is here exactly
//! while it has an open choice.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::batch::Batch;
use super::handle::{Admission, Submission, TokenLogprobs};
use super::pace::PrefillPace;
use super::prefix::{PrefixRoot, Sharing};
use super::request::{End, Request};
use super::sampler::{Position, SampleError, Sampler, describe};
use super::scheduler::{Plan, PlannedSequence, Scheduler, SchedulerLimits};
use super::sequence::{NewSequence, RequestId, Sequence};
use crate::backend::{Backend, SampleRow, Sampled, StepSequence};
use crate::config::EngineConfig;
use crate::metrics::{BlockState, Metrics};
use crate::model::{RoutedLlama, StepOutput};
use crate::types::{FinishReason, SeqId, TokenId};

/// All that the engine thread knows, but for the model.
pub(super) struct Sessions {
    scheduler: Scheduler,
    pace: PrefillPace,
    plan: Plan,
    batch: Batch,
    sampler: Sampler,
    /// What the device drew in this step.
    sampled: Sampled,
    requests: HashMap<RequestId, Request>,
    next_request: u64,
    model: ModelFacts,
    prefix_cache: bool,
    metrics: Arc<Metrics>,
}

/// What must be known of the model beside its numbers.
struct ModelFacts {
    fingerprint: String,
    eos: Vec<TokenId>,
    vocabulary: usize,
    /// Numbers in a row of gates: 2 a layer.
    gates: usize,
}

/// The rows of one sequence in a step's output.
struct Rows<'a> {
    /// (logit rows, vocabulary).
    logits: &'a [f32],
    /// (rows, 2 * layers); empty without experts.
    gates: &'a [f32],
    /// Which of the step's logit rows the last one is, where the device has sampled from them.
    drawn: Option<usize>,
}

/// One row whose logits choose a token.
struct Row<'a> {
    /// (vocabulary); empty where the device has chosen.
    logits: &'a [f32],
    /// Which of the step's logit rows it is, where the device has chosen.
    drawn: Option<usize>,
    /// (2 * layers), or empty.
    gates: &'a [f32],
}

impl<'a> Rows<'a> {
    /// The row that chooses a token after `accepted` right guesses.
    fn sampled(&self, planned: &PlannedSequence, accepted: usize, model: &ModelFacts) -> Row<'a> {
        let part = |all: &'a [f32], rows: usize, width: usize| {
            let row = rows - 1 - planned.drafts + accepted;
            &all[row * width..(row + 1) * width]
        };
        Row {
            logits: match self.drawn {
                Some(_) => &[],
                None => part(self.logits, planned.logit_rows, model.vocabulary),
            },
            drawn: self.drawn,
            gates: match self.gates {
                [] => &[],
                gates => part(gates, planned.rows, model.gates),
            },
        }
    }
}

impl Sessions {
    pub(super) fn new<B: Backend>(
        model: &RoutedLlama<B>,
        config: &EngineConfig,
        metrics: Arc<Metrics>,
    ) -> Self {
        let limits = model.limits();
        let scheduler_limits = SchedulerLimits {
            tokens: config.batch_tokens_max.min(limits.rows),
            sequences: config.sequences_max.min(limits.sequences),
            logit_rows: limits.logit_rows,
            speculation: config.speculation,
        };
        Self {
            scheduler: Scheduler::new(scheduler_limits, limits.blocks),
            pace: PrefillPace::new(config.step_time_max, scheduler_limits.tokens),
            plan: Plan::default(),
            batch: Batch::default(),
            sampler: Sampler::default(),
            sampled: Sampled::default(),
            requests: HashMap::new(),
            next_request: 0,
            model: ModelFacts {
                fingerprint: model.fingerprint().to_owned(),
                eos: model.eos_token_ids().to_vec(),
                vocabulary: model.vocabulary(),
                gates: 2 * model.layers(),
            },
            prefix_cache: config.prefix_cache,
            metrics,
        }
    }

    /// Takes a request in: one sequence a choice, the others behind the first, which computes the prompt for all.
    pub(super) fn admit(&mut self, mut admission: Admission) {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let prompt = std::mem::take(&mut admission.submission.prompt);
        let submission = &admission.submission;
        self.metrics.requests.of(submission.variant).increment();
        let root = self.root(request, submission).hash();
        let mut ids: Vec<SeqId> = Vec::with_capacity(submission.choices as usize);
        for choice in 0..submission.choices {
            let lead = ids.first().copied();
            let new = NewSequence {
                request,
                choice,
                prompt: prompt.clone(),
                gates: submission.gates,
                root,
                max_tokens: submission.sampling.max_tokens as usize,
                prompt_logits: lead.is_none() && submission.prompt_logprobs.is_some(),
                prompt_gates: lead.is_none() && submission.prompt_gates,
            };
            ids.push(self.scheduler.add(new, lead));
        }
        let session = Request::new(admission, ids, &prompt);
        self.requests.insert(request, session);
    }

    fn root<'a>(&'a self, request: RequestId, submission: &'a Submission) -> PrefixRoot<'a> {
        let sharing = match &submission.cache_salt {
            // The choices of a request share its prompt in any case, and so does a sequence that is computed again.
            _ if !self.prefix_cache => Sharing::Request(request.0),
            Some(salt) => Sharing::Salt(salt),
            None => Sharing::Everyone,
        };
        PrefixRoot {
            fingerprint: &self.model.fingerprint,
            variant: submission.variant,
            gates: submission.gates,
            sharing,
        }
    }

    /// Ends what clients have left or have enough of, and frees its blocks.
    pub(super) fn drop_ended(&mut self, now: Instant) {
        let (scheduler, metrics) = (&mut self.scheduler, &self.metrics);
        self.requests.retain(|_, request| {
            let reason = if request.is_abandoned() {
                FinishReason::Cancelled
            } else {
                FinishReason::Stop
            };
            let ending: Vec<(u32, SeqId)> = match reason {
                FinishReason::Cancelled => request.open().collect(),
                _ => request.stopped().collect(),
            };
            for (choice, id) in ending {
                scheduler.finish(id);
                request.end(choice, End::Finished(reason), now, metrics);
            }
            !request.is_over()
        });
    }

    /// Plans a step. False: there is nothing to do.
    pub(super) fn plan(&mut self, now: Instant) -> bool {
        if self.scheduler.is_idle() {
            return false;
        }
        self.scheduler.plan(&mut self.plan, self.pace.tokens());
        self.metrics.preemptions.add(self.plan.preempted as u64);
        for started in &self.plan.started {
            let Some(sequence) = self.scheduler.sequence(started.id) else {
                continue;
            };
            let Some(request) = self.requests.get_mut(&sequence.request()) else {
                continue;
            };
            if started.first && sequence.choice() == 0 {
                request.start(started.cached_tokens, now, &self.metrics);
                if started.looked_up && self.prefix_cache {
                    let queried = sequence.prompt_tokens() as u64;
                    self.metrics.prefix_cache_query_tokens.add(queried);
                    let hit = started.cached_tokens as u64;
                    self.metrics.prefix_cache_hit_tokens.add(hit);
                }
            }
        }
        true
    }

    /// The planned step took `lasted`, whether or not it could be computed.
    pub(super) fn observe_step(&mut self, lasted: Duration) {
        self.pace.observe(self.plan.prefill_tokens(), lasted);
    }

    /// The planned step, flattened.
    pub(super) fn batch(&mut self) -> (Vec<StepSequence<'_>>, &Batch) {
        let sequences = self.batch.fill(&self.plan, &self.scheduler);
        (sequences, &self.batch)
    }

    /// How the device is to sample from the planned step's logits, and where the tokens go that it draws.
    pub(super) fn samples(&mut self) -> (&[SampleRow], &mut Sampled) {
        (self.batch.samples(), &mut self.sampled)
    }

    /// Says how to sample from the planned step's logits; not where some are wanted for more, as log-probabilities
    /// of a prompt and the rows of guesses are.
    pub(super) fn describe_samples(&mut self) {
        self.batch.clear_samples();
        for planned in &self.plan.sequences {
            let owner = self.scheduler.owner(planned.id);
            let request = owner.and_then(|(id, _)| self.requests.get(&id));
            let sequence = self.scheduler.sequence(planned.id);
            let wanted = (planned.samples, planned.logit_rows);
            match (wanted, owner, request, sequence) {
                ((false, 0), ..) => {}
                ((true, 1), Some((_, choice)), Some(request), Some(sequence)) => {
                    let Some(history) = request.history(choice) else {
                        return self.batch.clear_samples();
                    };
                    let position = position(choice, sequence, &self.model.eos);
                    let row = self.batch.push_sample();
                    describe(&request.sampling, history, position, row);
                }
                _ => return self.batch.clear_samples(),
            }
        }
    }

    /// Takes the room of what [`Self::batch`] returned, for the next step.
    pub(super) fn keep_room(&mut self, room: Vec<StepSequence<'static>>) {
        self.batch.keep_room(room);
    }

    /// Moves every planned sequence on; the only place where that happens.
    pub(super) fn commit(&mut self, output: StepOutput<'_>, now: Instant) {
        let plan = std::mem::take(&mut self.plan);
        let (mut row, mut logit_row) = (0, 0);
        for planned in &plan.sequences {
            let gates = row * self.model.gates;
            row += planned.rows;
            let logits = logit_row * self.model.vocabulary;
            logit_row += planned.logit_rows;
            let rows = Rows {
                logits: match output.sampled {
                    true => &[],
                    false => &output.logits[logits..logit_row * self.model.vocabulary],
                },
                gates: match output.gates {
                    [] => &[],
                    all => &all[gates..row * self.model.gates],
                },
                drawn: output.sampled.then(|| logit_row.saturating_sub(1)),
            };
            self.commit_sequence(planned, &rows, now);
        }
        self.plan = plan;
    }

    fn commit_sequence(&mut self, planned: &PlannedSequence, rows: &Rows<'_>, now: Instant) {
        let Some((id, choice)) = self.scheduler.owner(planned.id) else {
            return;
        };
        self.report_prompt_gates(id, planned, rows);
        if let Err(error) = self.report_prompt(id, planned, rows) {
            // Every choice would meet the same numbers.
            self.fail_request(id, &error.to_string(), now);
            return;
        }
        let prompt_completed = self.scheduler.advance(planned);
        let Some(request) = self.requests.get_mut(&id) else {
            return;
        };
        if prompt_completed {
            request.prompt_done(&self.metrics);
        }
        let end = if planned.samples {
            self.sample_rows(id, choice, planned, rows, now)
        } else if prompt_completed && request.sampling.max_tokens == 0 {
            Some(End::Finished(FinishReason::Length))
        } else {
            None
        };
        if let Some(end) = end {
            self.end(id, choice, planned.id, end, now);
        }
    }

    /// Takes in the gates of prompt tokens, where they were asked for.
    fn report_prompt_gates(&mut self, id: RequestId, planned: &PlannedSequence, rows: &Rows<'_>) {
        let request = self.requests.get_mut(&id);
        let sequence = self.scheduler.sequence(planned.id);
        let (Some(request), Some(sequence)) = (request, sequence) else {
            return;
        };
        let wanted = sequence.wanted_gates();
        // A sequence that was preempted computes again what it told before.
        let positions = rows
            .gates
            .chunks_exact(self.model.gates)
            .zip(planned.start..);
        for (gates, position) in positions {
            if wanted.contains(&position) {
                request.push_prompt_gates(gates);
            }
        }
    }

    /// Takes in the log-probabilities of prompt tokens, where they were asked for.
    fn report_prompt(
        &mut self,
        id: RequestId,
        planned: &PlannedSequence,
        rows: &Rows<'_>,
    ) -> Result<(), SampleError> {
        let reported = planned.logit_rows - usize::from(planned.samples) - planned.drafts;
        let request = self.requests.get_mut(&id);
        let sequence = self.scheduler.sequence(planned.id);
        let (Some(request), Some(sequence)) = (request, sequence) else {
            return Ok(());
        };
        let Some(top) = request.prompt_top().filter(|_| reported > 0) else {
            return Ok(());
        };
        let first = planned.start + planned.logits_from;
        let rows = rows.logits.chunks_exact(self.model.vocabulary);
        for (logits, position) in rows.take(reported).zip(first..) {
            // The logits of a position are of the token after it.
            let token = sequence.tokens()[position + 1];
            let logprobs = self.sampler.logprobs(logits, token, top)?;
            request.push_prompt_logprobs(logprobs);
        }
        Ok(())
    }

    /// Chooses a choice's next token, and the one after it as long as the step guessed right: from the very logits that a
    /// step without guesses would have made next.
    fn sample_rows(
        &mut self,
        id: RequestId,
        choice: u32,
        planned: &PlannedSequence,
        rows: &Rows<'_>,
        now: Instant,
    ) -> Option<End> {
        let mut accepted = 0;
        let end = loop {
            let row = rows.sampled(planned, accepted, &self.model);
            let end = match self.sample(id, choice, planned.id, &row, now) {
                Ok(end) => end.map(End::Finished),
                Err(error) => break Some(End::Failed(error.to_string())),
            };
            let right = self.scheduler.accept(planned, accepted);
            accepted += usize::from(right);
            if end.is_some() || !right {
                break end;
            }
        };
        if planned.drafts > 0 {
            self.scheduler.verified(planned, accepted);
            let metrics = &self.metrics;
            metrics.spec_decode_drafts.increment();
            metrics.spec_decode_draft_tokens.add(planned.drafts as u64);
            metrics.spec_decode_accepted_tokens.add(accepted as u64);
        }
        end
    }

    /// Chooses a choice's next token. `Some`: the answer ends with it.
    fn sample(
        &mut self,
        id: RequestId,
        choice: u32,
        sequence_id: SeqId,
        row: &Row<'_>,
        now: Instant,
    ) -> Result<Option<FinishReason>, SampleError> {
        let request = self.requests.get_mut(&id);
        let sequence = self.scheduler.sequence(sequence_id);
        let (Some(request), Some(sequence)) = (request, sequence) else {
            return Ok(None);
        };
        let generated = sequence.generated();
        let params = &request.sampling;
        let Some(history) = request.history(choice) else {
            return Ok(None);
        };
        let (token, logprobs) = match row.drawn {
            Some(at) => drawn(&mut self.sampled, at)?,
            None => {
                let logits = row.logits;
                let position = position(choice, sequence, &self.model.eos);
                let token = self.sampler.sample(logits, params, history, position)?;
                let top = params.logprobs.map(|top| top as usize);
                let logprobs = top.map(|top| self.sampler.logprobs(logits, token, top));
                (token, logprobs.transpose()?)
            }
        };
        let is_end = params.stop_token_ids.contains(&token)
            || (!params.ignore_eos && self.model.eos.contains(&token));
        let is_last = generated + 1 >= params.max_tokens as usize;
        let token_and_logprobs = (token, logprobs);
        request.token(choice, token_and_logprobs, row.gates, now, &self.metrics);
        self.scheduler.append(sequence_id, token);
        Ok(match (is_end, is_last) {
            (true, _) => Some(FinishReason::Stop),
            (false, true) => Some(FinishReason::Length),
            (false, false) => None,
        })
    }

    fn end(&mut self, id: RequestId, choice: u32, sequence: SeqId, end: End, now: Instant) {
        self.scheduler.finish(sequence);
        if let Some(request) = self.requests.get_mut(&id) {
            request.end(choice, end, now, &self.metrics);
            if request.is_over() {
                self.requests.remove(&id);
            }
        }
    }

    fn fail_request(&mut self, id: RequestId, message: &str, now: Instant) {
        let open: Vec<(u32, SeqId)> = match self.requests.get(&id) {
            Some(request) => request.open().collect(),
            None => return,
        };
        for (choice, sequence) in open {
            self.end(id, choice, sequence, End::Failed(message.to_owned()), now);
        }
    }

    /// The planned step could not be computed: its sequences end, the others go on.
    pub(super) fn fail_planned(&mut self, now: Instant) {
        // A client cannot act on a device's words; the log has them.
        let message = "the model could not compute this request";
        let plan = std::mem::take(&mut self.plan);
        for planned in &plan.sequences {
            let Some((id, choice)) = self.scheduler.owner(planned.id) else {
                continue;
            };
            if self.requests.get(&id).is_some_and(Request::has_prompt) {
                let end = End::Failed(message.to_owned());
                self.end(id, choice, planned.id, end, now);
            } else {
                self.fail_request(id, message, now);
            }
        }
        self.plan = plan;
    }

    /// Everything ends with an error. Asks no scheduler, which may be what broke.
    pub(super) fn fail_all(&mut self, message: &str, now: Instant) {
        for (_, mut request) in self.requests.drain() {
            let open: Vec<(u32, SeqId)> = request.open().collect();
            for (choice, _) in open {
                let end = End::Failed(message.to_owned());
                request.end(choice, end, now, &self.metrics);
            }
        }
        self.metrics.sequences_running.set(0);
        self.metrics.sequences_waiting.set(0);
    }

    /// Levels of sequences and blocks, for whoever scrapes.
    pub(super) fn publish_levels(&self) {
        let metrics = &self.metrics;
        metrics.sequences_running.set(self.scheduler.running());
        metrics.sequences_waiting.set(self.scheduler.waiting());
        let pool = self.scheduler.pool();
        let counts = pool.counts();
        metrics.kv_blocks.of(BlockState::Free).set(counts.free);
        metrics.kv_blocks.of(BlockState::Cached).set(counts.cached);
        metrics.kv_blocks.of(BlockState::Held).set(counts.held);
        let usage = counts.held as f64 / pool.len().max(1) as f64;
        metrics.kv_cache_usage.set(usage);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    pub(super) fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}

/// Where the next token of `sequence` will stand.
fn position<'a>(choice: u32, sequence: &Sequence, eos: &'a [TokenId]) -> Position<'a> {
    Position {
        choice,
        position: sequence.tokens().len(),
        generated: sequence.generated(),
        eos,
    }
}

/// What the device drew from logit row `at`.
fn drawn(
    sampled: &mut Sampled,
    at: usize,
) -> Result<(TokenId, Option<TokenLogprobs>), SampleError> {
    let token = sampled.tokens[at]?;
    let top = std::mem::take(&mut sampled.top[at]);
    let logprobs = sampled.logprobs[at].map(|logprob| TokenLogprobs { logprob, top });
    Ok((token, logprobs))
}
