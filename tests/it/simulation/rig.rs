//! An engine over a tiny checkpoint, stepped by hand, and what its streams said.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use midpo::backend::cpu::{Cpu, CpuOptions};
use midpo::backend::{Backend, KvFormat, WeightFormat};
use midpo::checkpoint::{Checkpoint, Sources, load};
use midpo::config::{EngineConfig, Speculation};
use midpo::engine::{
    Engine, EngineHandle, Event, EventStream, GateDetail, GeneratedToken, PromptGates, Submission,
    TokenLogprobs, model_options,
};
use midpo::metrics::Metrics;
use midpo::model::RoutedLlama;
use midpo::types::{FinishReason, SamplingParams, TokenId, Variant};

pub(super) fn fixture(model: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(model)
}

pub(super) fn checkpoint(model: &str) -> Checkpoint {
    let dir = fixture(model);
    let sources = Sources {
        safety: Some(dir.join("safety")),
        helpfulness: Some(dir.join("helpfulness")),
        router: Some(dir.join("router.pth")),
        ..Sources::model(dir)
    };
    load(&sources).unwrap()
}

pub(super) fn cpu() -> Cpu {
    let options = CpuOptions {
        threads: Some(1),
        ..CpuOptions::default()
    };
    Cpu::new(options).unwrap()
}

/// Room for everything.
pub(super) fn roomy() -> EngineConfig {
    EngineConfig {
        batch_tokens_max: 512,
        // No clock in a test's plans.
        step_time_max: Duration::MAX,
        sequences_max: 32,
        queue_max: 64,
        context_tokens_max: 512,
        kv_blocks: 1024,
        prefix_cache: true,
        speculation: Speculation::OFF,
    }
}

pub(super) fn model<B: Backend>(backend: B, model: &str, config: &EngineConfig) -> RoutedLlama<B> {
    let options = model_options(config, KvFormat::F32, WeightFormat::Stored);
    RoutedLlama::new(backend, &checkpoint(model), options).unwrap()
}

/// An engine and a handle to it.
pub(super) struct Rig<B: Backend = Cpu> {
    pub handle: EngineHandle,
    pub engine: Engine<B>,
    pub metrics: Arc<Metrics>,
}

impl Rig {
    pub(super) fn new(name: &str, config: &EngineConfig) -> Self {
        Self::over(cpu(), name, config)
    }
}

impl<B: Backend> Rig<B> {
    pub(super) fn over(backend: B, name: &str, config: &EngineConfig) -> Self {
        let metrics = Arc::new(Metrics::new(name));
        let model = model(backend, name, config);
        let (handle, engine) = Engine::new(model, config, Arc::clone(&metrics));
        Self {
            handle,
            engine,
            metrics,
        }
    }

    pub(super) fn submit(&self, submission: &Submission) -> EventStream {
        self.handle.submit(submission.clone()).unwrap()
    }

    /// Steps until there is nothing left to do.
    pub(super) fn run(&mut self) {
        loop {
            self.engine.step().unwrap();
            self.engine.scheduler().assert_invariants();
            if self.engine.is_idle() {
                return;
            }
        }
    }

    /// The answers to requests that run together.
    pub(super) fn answers(&mut self, submissions: &[Submission]) -> Vec<Answer> {
        let mut streams: Vec<_> = submissions.iter().map(|one| self.submit(one)).collect();
        self.run();
        assert_eq!(self.engine.scheduler().pool().counts().held, 0);
        streams.iter_mut().map(Answer::read).collect()
    }

    pub(super) fn answer(&mut self, submission: &Submission) -> Answer {
        let mut answers = self.answers(std::slice::from_ref(submission));
        answers.remove(0)
    }

    pub(super) fn held(&self) -> usize {
        self.engine.scheduler().pool().counts().held
    }
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum End {
    Finished(FinishReason),
    Failed(String),
}

/// One choice's tokens and end.
#[derive(Debug, Default)]
pub(super) struct ChoiceAnswer {
    pub tokens: Vec<GeneratedToken>,
    pub end: Option<End>,
}

impl ChoiceAnswer {
    pub(super) fn ids(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.id.0).collect()
    }

    /// Everything that was said, to the bit.
    pub(super) fn bits(&self) -> Vec<u32> {
        let mut bits = Vec::new();
        for token in &self.tokens {
            bits.push(token.id.0);
            if let Some(logprobs) = &token.logprobs {
                bits.extend(logprob_bits(logprobs));
            }
            if let Some(gates) = &token.gates {
                let both = gates.safety.iter().chain(&gates.helpfulness);
                bits.extend(both.map(|gate| gate.to_bits()));
            }
        }
        bits
    }
}

pub(super) fn logprob_bits(logprobs: &TokenLogprobs) -> Vec<u32> {
    let top = logprobs.top.iter();
    std::iter::once(logprobs.logprob.to_bits())
        .chain(top.flat_map(|(token, logprob)| [token.0, logprob.to_bits()]))
        .collect()
}

/// What a stream said, its promises checked: the prompt once and first, one end a choice, nothing after it.
#[derive(Debug)]
pub(super) struct Answer {
    pub cached_tokens: Option<usize>,
    pub prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub prompt_gates: Option<PromptGates>,
    pub choices: Vec<ChoiceAnswer>,
}

impl Answer {
    pub(super) fn read(stream: &mut EventStream) -> Self {
        let mut answer = Self {
            cached_tokens: None,
            prompt_logprobs: None,
            prompt_gates: None,
            choices: Vec::new(),
        };
        while let Some(event) = stream.try_next() {
            answer.push(event);
        }
        answer
    }

    pub(super) fn push(&mut self, event: Event) {
        match event {
            Event::Prompt {
                cached_tokens,
                logprobs,
                gates,
            } => {
                assert!(self.cached_tokens.replace(cached_tokens).is_none());
                assert!(self.choices.is_empty(), "the prompt comes first");
                self.prompt_logprobs = logprobs;
                self.prompt_gates = gates;
            }
            Event::Token { choice, token } => {
                assert!(self.cached_tokens.is_some(), "the prompt comes first");
                self.open(choice).tokens.push(token);
            }
            Event::Finished { choice, reason } => {
                self.open(choice).end = Some(End::Finished(reason));
            }
            Event::Failed { choice, message } => {
                self.open(choice).end = Some(End::Failed(message));
            }
        }
    }

    fn open(&mut self, choice: u32) -> &mut ChoiceAnswer {
        let index = choice as usize;
        while self.choices.len() <= index {
            self.choices.push(ChoiceAnswer::default());
        }
        let choice = &mut self.choices[index];
        assert!(choice.end.is_none(), "nothing follows the end");
        choice
    }

    /// The only choice, which finished.
    pub(super) fn only(&self) -> &ChoiceAnswer {
        assert_eq!(self.choices.len(), 1);
        let choice = &self.choices[0];
        assert!(matches!(choice.end, Some(End::Finished(_))), "{choice:?}");
        choice
    }
}

/// A greedy request that tells everything.
pub(super) fn greedy(prompt: &[u32], variant: Variant, max_tokens: u32) -> Submission {
    Submission {
        prompt: prompt.iter().map(|id| TokenId(*id)).collect(),
        sampling: SamplingParams {
            temperature: 0.0,
            max_tokens,
            ignore_eos: true,
            logprobs: Some(3),
            ..SamplingParams::default()
        },
        choices: 1,
        variant,
        gates: variant.gates(),
        cache_salt: None,
        prompt_logprobs: None,
        gate_detail: GateDetail::Layers,
        prompt_gates: false,
    }
}

/// As [`greedy`], but drawn at random.
pub(super) fn random(prompt: &[u32], variant: Variant, max_tokens: u32, seed: u64) -> Submission {
    let mut submission = greedy(prompt, variant, max_tokens);
    submission.sampling.temperature = 0.9;
    submission.sampling.top_p = 0.95;
    submission.sampling.seed = seed;
    submission.sampling.repetition_penalty = 1.1;
    submission
}

/// Ids that are no text: `len` of them, the same for the same `stem`.
pub(super) fn ids(stem: u32, len: usize) -> Vec<u32> {
    (0..len as u32)
        .map(|i| 3 + (stem.wrapping_mul(7919) + i * i * 31 + i * 17) % 500)
        .collect()
}
