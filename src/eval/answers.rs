//! Answers of all variants to all prompts through one engine: sequences of every variant share its batches.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream;

use super::error::EvalError;
use super::prompts::Prompt;
use crate::engine::{
    EngineHandle, Event, GateDetail, PromptGates, Submission, SubmitError, TokenGates,
};
use crate::random::SplitMix64;
use crate::text::{Chat, ChatTemplate, Message, TextStream, TextStreamOptions, Tokenizer};
use crate::types::{FinishReason, SamplingParams, TokenId, Variant};

/// Requests in the engine at once at most: enough to fill any batch.
const AT_ONCE: usize = 256;
/// Stream of random numbers that choose openings.
const OPENINGS: u64 = 1;

/// A model that answers.
#[derive(Clone)]
pub struct Subject {
    /// Its engine.
    pub engine: EngineHandle,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Chats to text.
    pub template: ChatTemplate,
    /// Ends of sequence: they leave no text.
    pub ends: Vec<TokenId>,
}

/// One row of the tables: what answers, and what it is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contender {
    /// Its name in reports.
    pub name: String,
    /// The gates behind it.
    pub variant: Variant,
    /// What it is told beside the prompt.
    pub manner: Manner,
}

/// What a contender is told beside the prompt; by default nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manner {
    /// System turn.
    pub system: Option<String>,
    /// Words that an answer opens with: one of them, by prompt and seed. They are part of [`Answer::text`] and not of its tokens.
    pub openings: Vec<String>,
    /// Most tokens, where it is less than the drawing's.
    pub max_tokens: Option<u32>,
}

impl Manner {
    fn opening(&self, prompt: &Prompt, seed: u64) -> Option<&str> {
        let mut random = SplitMix64::new(prompt.seed(seed), OPENINGS);
        let opening = self.openings.get(random.below(self.openings.len()));
        opening.map(String::as_str)
    }
}

impl Contender {
    /// A variant under its own name.
    pub fn of(variant: Variant) -> Self {
        Self {
            name: variant.as_str().to_owned(),
            variant,
            manner: Manner::default(),
        }
    }
}

/// How answers are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Drawing {
    /// All but `seed` and `max_tokens`, which is lowered to what the context has room for.
    pub sampling: SamplingParams,
    /// One answer a prompt and contender for each.
    pub seeds: Vec<u64>,
}

/// What a contender answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Name of the contender.
    pub contender: Arc<str>,
    /// Index of the prompt.
    pub prompt: usize,
    /// Of [`Drawing::seeds`].
    pub seed: u64,
    /// The words.
    pub text: String,
    /// Tokens, with the end of sequence.
    pub tokens: usize,
    /// Why it ended.
    pub finish: FinishReason,
    /// Over the prompt: of routed contenders, with the first seed.
    pub prompt_gates: Option<PromptGates>,
    /// Mean over the passes that chose the answer's tokens, one number a layer: of routed contenders.
    pub answer_gates: Option<TokenGates>,
}

/// Answers `prompts` by all `contenders`, each with every seed of `drawing`: ordered by contender, prompt and seed. What is drawn
/// depends on prompt and seed alone. `on_answer` hears of each answer as it comes.
///
/// # Errors
/// A prompt that cannot be encoded or leaves no room for an answer, before any work; a contender that the model has not; an engine
/// that dies.
pub async fn answer(
    subject: &Subject,
    contenders: &[Contender],
    prompts: &[Prompt],
    drawing: &Drawing,
    mut on_answer: impl FnMut(),
) -> Result<Vec<Answer>, EvalError> {
    let names: Vec<Arc<str>> = contenders.iter().map(|c| c.name.as_str().into()).collect();
    let names = &names;
    let mut tasks = Vec::new();
    // Seeds of one prompt run soon after each other, while its blocks are cached.
    for (prompt, asked) in prompts.iter().enumerate() {
        for (draw, seed) in drawing.seeds.iter().enumerate() {
            for (place, contender) in contenders.iter().enumerate() {
                let one = Task {
                    asked,
                    contender,
                    opening: contender.manner.opening(asked, *seed),
                    seed: *seed,
                    is_first: draw == 0,
                };
                let ids = one.encode(subject)?;
                let task = async move {
                    let submission = one.submission(subject, ids, &drawing.sampling);
                    let mut answer = one.read(subject, submission).await?;
                    answer.prompt = prompt;
                    answer.contender = Arc::clone(&names[place]);
                    Ok::<_, EvalError>(((place, prompt, draw), answer))
                };
                tasks.push(task);
            }
        }
    }
    let at_once = subject.engine.limits().queue_max.clamp(1, AT_ONCE);
    let mut running = stream::iter(tasks).buffer_unordered(at_once);
    let mut answers = Vec::new();
    while let Some(answer) = running.next().await {
        answers.push(answer?);
        on_answer();
    }
    answers.sort_by_key(|(place, _)| *place);
    Ok(answers.into_iter().map(|(_, answer)| answer).collect())
}

/// One answer to get.
struct Task<'a> {
    asked: &'a Prompt,
    contender: &'a Contender,
    opening: Option<&'a str>,
    seed: u64,
    is_first: bool,
}

impl Task<'_> {
    /// The ids of the prompt, as one user's turn, with what the contender is told.
    fn encode(&self, subject: &Subject) -> Result<Vec<TokenId>, EvalError> {
        let turns = [
            ("system", self.contender.manner.system.as_deref()),
            ("user", Some(self.asked.text.as_str())),
            ("assistant", self.opening),
        ];
        let messages = turns.into_iter().filter_map(|(role, content)| {
            Some(Message {
                role: role.to_owned(),
                content: content?.to_owned(),
                ..Message::default()
            })
        });
        let chat = Chat {
            messages: messages.collect(),
            add_generation_prompt: self.opening.is_none(),
            continue_final_message: self.opening.is_some(),
            ..Chat::default()
        };
        let ids = subject.template.encode(&subject.tokenizer, &chat);
        let ids = ids.map_err(|source| EvalError::Text {
            id: self.asked.id.clone(),
            source,
        })?;
        let limit = subject.engine.limits().context_tokens_max;
        if ids.len() >= limit {
            return Err(EvalError::Submit {
                id: self.asked.id.clone(),
                variant: self.contender.name.clone(),
                source: SubmitError::ContextLength {
                    limit,
                    prompt: ids.len(),
                    max_tokens: 1,
                },
            });
        }
        Ok(ids)
    }

    fn submission(
        &self,
        subject: &Subject,
        ids: Vec<TokenId>,
        sampling: &SamplingParams,
    ) -> Submission {
        let room = subject.engine.limits().context_tokens_max - ids.len();
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let most = self.contender.manner.max_tokens.unwrap_or(u32::MAX);
        let variant = self.contender.variant;
        let is_routed = variant == Variant::Routed;
        Submission {
            prompt: ids,
            sampling: SamplingParams {
                seed: self.asked.seed(self.seed),
                max_tokens: sampling.max_tokens.min(room).min(most),
                ..sampling.clone()
            },
            choices: 1,
            variant,
            gates: variant.gates(),
            cache_salt: None,
            prompt_logprobs: None,
            gate_detail: if is_routed {
                GateDetail::Layers
            } else {
                GateDetail::None
            },
            // They do not depend on the seed, and would keep the others from the prefix cache.
            prompt_gates: is_routed && self.is_first,
        }
    }

    async fn read(&self, subject: &Subject, submission: Submission) -> Result<Answer, EvalError> {
        let mut events = subject
            .engine
            .submit(submission)
            .map_err(|source| EvalError::Submit {
                id: self.asked.id.clone(),
                variant: self.contender.name.clone(),
                source,
            })?;
        let mut text = TextStream::new(&subject.tokenizer, &TextStreamOptions::default());
        let mut answer = Answer {
            contender: Arc::default(),
            prompt: 0,
            seed: self.seed,
            text: self.opening.unwrap_or_default().to_owned(),
            tokens: 0,
            finish: FinishReason::Failed,
            prompt_gates: None,
            answer_gates: None,
        };
        let mut gates = GateMeans::default();
        loop {
            let event = events.next().await;
            match event.ok_or_else(|| self.failed("the engine has died"))? {
                Event::Prompt { gates, .. } => answer.prompt_gates = gates,
                Event::Token { token, .. } => {
                    answer.tokens += 1;
                    if !subject.ends.contains(&token.id) {
                        answer.text += &text.push(token.id).text;
                    }
                    if let Some(of_token) = &token.gates {
                        gates.push(of_token);
                    }
                }
                Event::Finished { reason, .. } => {
                    answer.finish = reason;
                    break;
                }
                Event::Failed { message, .. } => return Err(self.failed(&message)),
            }
        }
        answer.text += &text.finish().text;
        answer.answer_gates = gates.finish();
        Ok(answer)
    }

    fn failed(&self, reason: &str) -> EvalError {
        EvalError::Answer {
            id: self.asked.id.clone(),
            variant: self.contender.name.clone(),
            reason: reason.to_owned(),
        }
    }
}

/// Mean gates of tokens, layer by layer.
#[derive(Default)]
struct GateMeans {
    safety: Vec<f64>,
    helpfulness: Vec<f64>,
    tokens: usize,
}

impl GateMeans {
    fn push(&mut self, gates: &TokenGates) {
        let sides = [
            (&mut self.safety, &gates.safety),
            (&mut self.helpfulness, &gates.helpfulness),
        ];
        for (sums, gates) in sides {
            sums.resize(gates.len(), 0.0);
            for (sum, gate) in sums.iter_mut().zip(gates) {
                *sum += f64::from(*gate);
            }
        }
        self.tokens += 1;
    }

    /// `None` of no token.
    fn finish(self) -> Option<TokenGates> {
        let tokens = self.tokens as f64;
        let mean = |sums: Vec<f64>| sums.iter().map(|sum| (sum / tokens) as f32).collect();
        (self.tokens > 0).then(|| TokenGates {
            safety: mean(self.safety),
            helpfulness: mean(self.helpfulness),
        })
    }
}
