//! `POST /v1/completions`.

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
use super::logprobs::TextLogprobsWriter;
use super::prompt;
use super::sse::{self, Chunks};
use crate::engine::TokenLogprobs;
use crate::openai::{
    self, Completion, CompletionChoice, CompletionRequest, ErrorBody, PromptItem, TextLogprobs,
    Usage,
};
use crate::types::TokenId;

/// As OpenAI's.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// Continues texts.
#[utoipa::path(
    post, path = "/v1/completions", tag = "completions", request_body = CompletionRequest,
    responses(
        (status = 200, description = "The answer; with `stream` as events of the same shape", content(
            (Completion = "application/json"), (Completion = "text/event-stream")
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
    Body(request): Body<CompletionRequest>,
) -> Result<Response, ApiError> {
    let accepted = Instant::now();
    let echo = request.echo.unwrap_or(false);
    if request.max_tokens == Some(0) && !echo {
        return Err(ApiError::invalid(
            "max_tokens",
            "expected at least 1 without `echo`, found 0",
        ));
    }
    let mut plan = Plan::new(request.generation, &request.unknown, &caller, &state)?;
    plan.set_logprobs("logprobs", request.logprobs)?;
    plan.set_max_tokens(request.max_tokens, MAX_TOKENS_DEFAULT)?;
    let special = request.add_special_tokens.unwrap_or(true);
    let prompts = prompts(&state, request.prompt.into_items(), special).await?;
    for prompt in &prompts {
        state.log_prompt(&prompt.ids);
    }
    let prompt_logprobs = plan.sampling.logprobs.filter(|_| echo);
    let ids: Vec<Vec<TokenId>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
    let answers = Answers::submit(&state, &plan, &ids, prompt_logprobs, "prompt", accepted)?;
    let stream = plan.stream;
    let writer = TextWriter::new(&state, plan, prompts, echo);
    if stream {
        return Ok(sse::respond(answers, writer, state.config().keep_alive));
    }
    let response = writer.whole(answers).await?;
    Ok(Json(response).into_response())
}

/// One prompt, as it came and as ids.
struct TextPrompt {
    /// `None` where it came as ids.
    text: Option<String>,
    ids: Vec<TokenId>,
}

async fn prompts(
    state: &AppState,
    items: Vec<PromptItem>,
    special: bool,
) -> Result<Vec<TextPrompt>, ApiError> {
    let limit = state.config().limits.prompts_max;
    if items.is_empty() || items.len() > limit {
        let message = format!("expected 1 to {limit} prompts, found {}", items.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let texts = items.iter().filter_map(|item| match item {
        PromptItem::Text(text) => Some(text.clone()),
        PromptItem::Ids(_) => None,
    });
    let mut encoded = prompt::encode_texts(state, texts.collect(), special)
        .await?
        .into_iter();
    let prompts = items.into_iter().map(|item| match item {
        PromptItem::Text(text) => TextPrompt {
            text: Some(text),
            ids: encoded.next().unwrap_or_default(),
        },
        PromptItem::Ids(ids) => TextPrompt {
            text: None,
            ids: ids.into_iter().map(TokenId).collect(),
        },
    });
    Ok(prompts.collect())
}

/// Writes the answers to one request, in chunks or whole.
struct TextWriter {
    state: AppState,
    plan: Plan,
    head: Head,
    prompts: Vec<TextPrompt>,
    echo: bool,
    /// By index of the choice on the wire.
    choices: Vec<ChoiceState>,
}

#[derive(Clone, Debug, Default)]
struct ChoiceState {
    tally: GateTally,
    logprobs: TextLogprobsWriter,
}

impl TextWriter {
    fn new(state: &AppState, plan: Plan, prompts: Vec<TextPrompt>, echo: bool) -> Self {
        let choices = prompts.len() * plan.choices as usize;
        Self {
            state: state.clone(),
            head: Head::new("cmpl", &plan.model, &state.model().fingerprint),
            plan,
            prompts,
            echo,
            choices: vec![ChoiceState::default(); choices],
        }
    }

    /// The wire counts choices through all prompts.
    fn index(&self, prompt: usize, choice: u32) -> usize {
        prompt * self.plan.choices as usize + choice as usize
    }

    fn step_choices(&mut self, progress: Progress) -> Vec<CompletionChoice> {
        match progress.step {
            Step::Prompt { logprobs } => (0..self.plan.choices)
                .filter_map(|choice| self.opening(progress.prompt, choice, logprobs.as_deref()))
                .collect(),
            Step::Piece(piece) => vec![self.choice(progress.prompt, piece)],
        }
    }

    /// What a choice tells before its answer begins; `None` where that is nothing.
    fn opening(
        &mut self,
        prompt: usize,
        choice: u32,
        logprobs: Option<&[Option<TokenLogprobs>]>,
    ) -> Option<CompletionChoice> {
        if !self.echo && !self.plan.return_token_ids {
            return None;
        }
        let index = self.index(prompt, choice);
        let tokenizer = &self.state.model().tokenizer;
        let skip_special = self.plan.text.skip_special_tokens;
        let prompt = self.prompts.get(prompt)?;
        let writer = &mut self.choices.get_mut(index)?.logprobs;
        let mut opening = CompletionChoice {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            ..CompletionChoice::default()
        };
        if self.echo {
            opening.text = match &prompt.text {
                Some(text) => text.clone(),
                None => tokenizer.decode(&prompt.ids, skip_special),
            };
            match logprobs {
                Some(logprobs) => {
                    let told = writer.prompt(tokenizer, &prompt.ids, logprobs, skip_special);
                    opening.logprobs = Some(told);
                }
                None => writer.skip(&opening.text),
            }
        }
        if self.plan.return_token_ids {
            opening.prompt_token_ids = Some(prompt.ids.iter().map(|id| id.0).collect());
            opening.token_ids = Some(Vec::new());
        }
        Some(opening)
    }

    fn choice(&mut self, prompt: usize, piece: Piece) -> CompletionChoice {
        let index = self.index(prompt, piece.choice);
        let plan = &self.plan;
        let gates = plan.gates.report.tokens(&piece.tokens);
        let mut choice = CompletionChoice {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            finish_reason: piece.end.and_then(openai::finish_reason).map(str::to_owned),
            token_ids: plan
                .return_token_ids
                .then(|| piece.tokens.iter().map(|token| token.id.0).collect()),
            ..CompletionChoice::default()
        };
        if let Some(state) = self.choices.get_mut(index) {
            if plan.sampling.logprobs.is_some() {
                let tokenizer = &self.state.model().tokenizer;
                let skip_special = plan.text.skip_special_tokens;
                choice.logprobs = Some(state.logprobs.answer(
                    tokenizer,
                    &piece.tokens,
                    skip_special,
                ));
            }
            state.tally.add(&piece.tokens);
            choice.midpo = match piece.end {
                Some(_) => gates::answer(&plan.gates, &state.tally, gates),
                None => gates::partial(gates),
            };
        }
        choice.text = piece.text;
        choice
    }

    fn completion(
        &self,
        choices: Vec<CompletionChoice>,
        usage: Option<Option<Usage>>,
    ) -> Completion {
        Completion {
            id: self.head.id.clone(),
            object: "text_completion".to_owned(),
            created: self.head.created,
            model: self.head.model.clone(),
            system_fingerprint: Some(self.head.fingerprint.clone()),
            choices,
            usage,
        }
    }

    async fn whole(mut self, mut answers: Answers) -> Result<Completion, ApiError> {
        let empty = |index| CompletionChoice {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            ..CompletionChoice::default()
        };
        let mut choices: Vec<CompletionChoice> = (0..self.choices.len()).map(empty).collect();
        while let Some(progress) = answers.next().await {
            for part in self.step_choices(progress?) {
                if let Some(choice) = choices.get_mut(part.index as usize) {
                    join(choice, part);
                }
            }
        }
        for choice in &choices {
            self.state.log_answer(choice.index, &choice.text);
        }
        Ok(self.completion(choices, Some(Some(answers.usage()))))
    }
}

/// A whole choice is all of its chunks, joined.
fn join(choice: &mut CompletionChoice, part: CompletionChoice) {
    choice.text.push_str(&part.text);
    if let Some(more) = part.logprobs {
        join_logprobs(choice.logprobs.get_or_insert_default(), more);
    }
    if let Some(ids) = part.token_ids {
        choice.token_ids.get_or_insert_default().extend(ids);
    }
    choice.prompt_token_ids = part.prompt_token_ids.or(choice.prompt_token_ids.take());
    if let Some(midpo) = part.midpo {
        gates::join(choice.midpo.get_or_insert_default(), midpo);
    }
    choice.finish_reason = part.finish_reason.or(choice.finish_reason.take());
}

fn join_logprobs(whole: &mut TextLogprobs, part: TextLogprobs) {
    whole.tokens.extend(part.tokens);
    whole.token_logprobs.extend(part.token_logprobs);
    whole.top_logprobs.extend(part.top_logprobs);
    whole.text_offset.extend(part.text_offset);
}

impl Chunks for TextWriter {
    type Chunk = Completion;

    fn step(&mut self, progress: Progress) -> Vec<Completion> {
        if let Step::Piece(piece) = &progress.step {
            self.state.log_answer(piece.choice, &piece.text);
            if piece.text.is_empty() && piece.end.is_none() && !self.plan.tells_tokens() {
                return Vec::new();
            }
        }
        let usage = self.plan.include_usage.then_some(None);
        self.step_choices(progress)
            .into_iter()
            .map(|choice| self.completion(vec![choice], usage))
            .collect()
    }

    fn end(&mut self, usage: Usage) -> Option<Completion> {
        let include = self.plan.include_usage;
        include.then(|| self.completion(Vec::new(), Some(Some(usage))))
    }
}
