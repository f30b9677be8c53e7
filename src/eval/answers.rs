//! Answers of all variants to all prompts through one engine: sequences of every variant share its batches.

use std::sync::Arc;

use futures_util::StreamExt as _;
use futures_util::stream;

use super::error::EvalError;
use super::prompts::Prompt;
use crate::engine::{
    EngineHandle, Event, GateDetail, PromptGates, Submission, SubmitError, TokenGates,
};
use crate::text::{Chat, ChatTemplate, Message, TextStream, TextStreamOptions, Tokenizer};
use crate::types::{FinishReason, SamplingParams, TokenId, Variant};

/// Requests in the engine at once at most: enough to fill any batch.
const AT_ONCE: usize = 256;

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
}

impl Contender {
    /// A variant under its own name.
    pub fn of(variant: Variant) -> Self {
        Self {
            name: variant.as_str().to_owned(),
            variant,
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
    let encoded = prompts
        .iter()
        .map(|prompt| encode(subject, prompt))
        .collect::<Result<Vec<_>, _>>()?;
    let names: Vec<Arc<str>> = contenders.iter().map(|c| c.name.as_str().into()).collect();
    let (encoded, names) = (&encoded, &names);
    let mut tasks = Vec::new();
    // Seeds of one prompt run soon after each other, while its blocks are cached.
    for (prompt, asked) in prompts.iter().enumerate() {
        for (draw, seed) in drawing.seeds.iter().enumerate() {
            for (place, contender) in contenders.iter().enumerate() {
                let task = async move {
                    let one = Task {
                        asked,
                        contender,
                        seed: *seed,
                        is_first: draw == 0,
                    };
                    let submission = one.submission(subject, &encoded[prompt], &drawing.sampling);
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

/// The ids of a prompt, as one user's turn.
fn encode(subject: &Subject, prompt: &Prompt) -> Result<Vec<TokenId>, EvalError> {
    let message = Message {
        role: "user".to_owned(),
        content: prompt.text.clone(),
        ..Message::default()
    };
    let chat = Chat {
        messages: vec![message],
        add_generation_prompt: true,
        ..Chat::default()
    };
    let ids = subject.template.encode(&subject.tokenizer, &chat);
    let ids = ids.map_err(|source| EvalError::Text {
        id: prompt.id.clone(),
        source,
    })?;
    let limit = subject.engine.limits().context_tokens_max;
    if ids.len() >= limit {
        return Err(EvalError::Submit {
            id: prompt.id.clone(),
            variant: "any".to_owned(),
            source: SubmitError::ContextLength {
                limit,
                prompt: ids.len(),
                max_tokens: 1,
            },
        });
    }
    Ok(ids)
}

/// One answer to get.
struct Task<'a> {
    asked: &'a Prompt,
    contender: &'a Contender,
    seed: u64,
    is_first: bool,
}

impl Task<'_> {
    fn submission(
        &self,
        subject: &Subject,
        ids: &[TokenId],
        sampling: &SamplingParams,
    ) -> Submission {
        let room = subject.engine.limits().context_tokens_max - ids.len();
        let room = u32::try_from(room).unwrap_or(u32::MAX);
        let variant = self.contender.variant;
        let is_routed = variant == Variant::Routed;
        Submission {
            prompt: ids.to_vec(),
            sampling: SamplingParams {
                seed: self.asked.seed(self.seed),
                max_tokens: sampling.max_tokens.min(room),
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
            text: String::new(),
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
