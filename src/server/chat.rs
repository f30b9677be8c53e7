//! `POST /v1/chat/completions`.

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use tokio::time::Instant;

use super::AppState;
use super::answer::{Answers, Piece, Progress, Step};
use super::auth::Caller;
use super::error::ApiError;
use super::gates::{self, GateTally};
use super::head::Head;
use super::limits::{Body, Plan};
use super::sse::{self, Chunks};
use super::{logprobs, prompt};
use crate::openai::{
    self, ChatChoice, ChatChunk, ChatChunkChoice, ChatLogprobs, ChatRequest, ChatResponse, Delta,
    ErrorBody, ResponseMessage, Usage,
};
use crate::types::TokenId;

/// Answers a chat.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "completions", request_body = ChatRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as events of `ChatChunk`", content(
            (ChatResponse = "application/json"), (ChatChunk = "text/event-stream")
        )),
        (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 403, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 413, body = ErrorBody), (status = 415, body = ErrorBody),
        (status = 429, body = ErrorBody), (status = 500, body = ErrorBody), (status = 503, body = ErrorBody),
        (status = 504, body = ErrorBody)
    )
)]
pub async fn create(
    State(state): State<AppState>,
    Extension(caller): Extension<Caller>,
    Body(request): Body<ChatRequest>,
) -> Result<Response, ApiError> {
    let accepted = Instant::now();
    let max_tokens = max_tokens(&request)?;
    let top_logprobs = top_logprobs(&request)?;
    let mut plan = Plan::new(request.generation, &request.unknown, &caller, &state)?;
    plan.set_logprobs("top_logprobs", top_logprobs)?;
    let chat = prompt::chat(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message,
        request.chat_template_kwargs,
    )?;
    let ids = prompt::encode_chat(&state, chat).await?;
    plan.set_max_tokens(max_tokens, state.default_max_tokens(ids.len()))?;
    state.log_prompt(&ids);
    let prompts = [ids];
    let answers = Answers::submit(&state, &plan, &prompts, None, "messages", accepted)?;
    let [ids] = prompts;
    let stream = plan.stream;
    let writer = ChatWriter::new(&state, plan, ids);
    if stream {
        return Ok(sse::respond(answers, writer, state.config().keep_alive));
    }
    let response = writer.whole(answers).await?;
    Ok(Json(response).into_response())
}

fn max_tokens(request: &ChatRequest) -> Result<Option<u32>, ApiError> {
    let (param, asked) = match (request.max_tokens, request.max_completion_tokens) {
        (Some(old), Some(new)) if old != new => {
            let message = format!("`max_completion_tokens` says {new}, but this says {old}");
            return Err(ApiError::invalid("max_tokens", message));
        }
        (_, Some(new)) => ("max_completion_tokens", Some(new)),
        (old, None) => ("max_tokens", old),
    };
    if asked == Some(0) {
        return Err(ApiError::invalid(param, "expected at least 1, found 0"));
    }
    Ok(asked)
}

fn top_logprobs(request: &ChatRequest) -> Result<Option<u32>, ApiError> {
    match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "only with `logprobs`")),
    }
}

/// Writes the answers to one chat, in chunks or whole.
struct ChatWriter {
    state: AppState,
    plan: Plan,
    head: Head,
    prompt: Vec<TokenId>,
    tallies: Vec<GateTally>,
}

impl ChatWriter {
    fn new(state: &AppState, plan: Plan, prompt: Vec<TokenId>) -> Self {
        Self {
            state: state.clone(),
            head: Head::new("chatcmpl", &plan.model, &state.model().fingerprint),
            prompt,
            tallies: (0..plan.choices).map(|_| GateTally::default()).collect(),
            plan,
        }
    }

    /// A piece as the wire tells it.
    fn choice(&mut self, piece: Piece) -> ChatChunkChoice {
        let report = &self.plan.gates.report;
        let gates = report.tokens(&piece.tokens);
        let logprobs = self.plan.sampling.logprobs;
        let mut choice = ChatChunkChoice {
            index: piece.choice,
            delta: Delta {
                role: None,
                content: Some(piece.text).filter(|text| !text.is_empty()),
            },
            // Null where there are no tokens to tell of, as in OpenAI's last chunk.
            logprobs: logprobs
                .filter(|_| !piece.tokens.is_empty())
                .map(|_| logprobs::chat(&self.state.model().tokenizer, &piece.tokens)),
            finish_reason: piece.end.and_then(openai::finish_reason).map(str::to_owned),
            token_ids: self
                .plan
                .return_token_ids
                .then(|| piece.tokens.iter().map(|token| token.id.0).collect()),
            midpo: None,
        };
        if let Some(tally) = self.tallies.get_mut(piece.choice as usize) {
            tally.add(&piece.tokens);
            choice.midpo = match piece.end {
                Some(_) => gates::answer(&self.plan.gates, tally, gates),
                None => gates::partial(gates),
            };
        }
        choice
    }

    fn chunk(&self, choices: Vec<ChatChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.head.id.clone(),
            object: "chat.completion.chunk".to_owned(),
            created: self.head.created,
            model: self.head.model.clone(),
            system_fingerprint: Some(self.head.fingerprint.clone()),
            choices,
            usage: self.plan.include_usage.then_some(None),
            prompt_token_ids: None,
        }
    }

    /// The chunks that open every choice.
    fn opening(&self) -> Vec<ChatChunk> {
        let chunks = (0..self.plan.choices).map(|index| {
            let delta = Delta {
                role: Some("assistant".to_owned()),
                content: Some(String::new()),
            };
            let mut chunk = self.chunk(vec![ChatChunkChoice {
                index,
                delta,
                ..ChatChunkChoice::default()
            }]);
            if index == 0 && self.plan.return_token_ids {
                chunk.prompt_token_ids = Some(self.prompt_ids());
            }
            chunk
        });
        chunks.collect()
    }

    fn prompt_ids(&self) -> Vec<u32> {
        self.prompt.iter().map(|id| id.0).collect()
    }

    /// A choice before its first chunk.
    fn empty(&self, index: u32) -> ChatChoice {
        let logprobs = self.plan.sampling.logprobs;
        ChatChoice {
            index,
            message: ResponseMessage {
                role: "assistant".to_owned(),
                content: Some(String::new()),
                refusal: None,
            },
            logprobs: logprobs.map(|_| ChatLogprobs {
                content: Some(Vec::new()),
                refusal: None,
            }),
            finish_reason: None,
            token_ids: None,
            midpo: None,
        }
    }

    async fn whole(mut self, mut answers: Answers) -> Result<ChatResponse, ApiError> {
        let mut choices: Vec<ChatChoice> = (0..self.plan.choices)
            .map(|index| self.empty(index))
            .collect();
        while let Some(progress) = answers.next().await {
            if let Step::Piece(piece) = progress?.step {
                let part = self.choice(piece);
                if let Some(choice) = choices.get_mut(part.index as usize) {
                    join(choice, part);
                }
            }
        }
        for choice in &choices {
            self.state.log_answer(
                choice.index,
                choice.message.content.as_deref().unwrap_or_default(),
            );
        }
        Ok(ChatResponse {
            prompt_token_ids: self.plan.return_token_ids.then(|| self.prompt_ids()),
            id: self.head.id,
            object: "chat.completion".to_owned(),
            created: self.head.created,
            model: self.head.model,
            system_fingerprint: Some(self.head.fingerprint),
            choices,
            usage: answers.usage(),
        })
    }
}

/// A whole choice is all of its chunks, joined.
fn join(choice: &mut ChatChoice, part: ChatChunkChoice) {
    if let (Some(content), Some(more)) = (&mut choice.message.content, part.delta.content) {
        content.push_str(&more);
    }
    if let Some(ChatLogprobs {
        content: Some(more),
        ..
    }) = part.logprobs
    {
        let logprobs = choice.logprobs.get_or_insert_default();
        logprobs.content.get_or_insert_default().extend(more);
    }
    if let Some(ids) = part.token_ids {
        choice.token_ids.get_or_insert_default().extend(ids);
    }
    if let Some(midpo) = part.midpo {
        gates::join(choice.midpo.get_or_insert_default(), midpo);
    }
    choice.finish_reason = part.finish_reason.or(choice.finish_reason.take());
}

impl Chunks for ChatWriter {
    type Chunk = ChatChunk;

    fn step(&mut self, progress: Progress) -> Vec<ChatChunk> {
        let piece = match progress.step {
            Step::Prompt { .. } => return self.opening(),
            Step::Piece(piece) => piece,
        };
        self.state.log_answer(piece.choice, &piece.text);
        if piece.text.is_empty() && piece.end.is_none() && !self.plan.tells_tokens() {
            return Vec::new();
        }
        let choice = self.choice(piece);
        vec![self.chunk(vec![choice])]
    }

    fn end(&mut self, usage: Usage) -> Option<ChatChunk> {
        self.plan.include_usage.then(|| ChatChunk {
            usage: Some(Some(usage)),
            ..self.chunk(Vec::new())
        })
    }
}
