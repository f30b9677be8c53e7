//! `POST /tokenize` and `POST /detokenize`.

use axum::Json;
use axum::extract::State;

use super::AppState;
use super::error::ApiError;
use super::limits::Body;
use super::{models, prompt, unsupported};
use crate::openai::{
    DetokenizeRequest, DetokenizeResponse, ErrorBody, TokenizeRequest, TokenizeResponse,
};
use crate::types::TokenId;

/// The ids of a text or of a chat.
#[utoipa::path(
    post, path = "/tokenize", tag = "tokens", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody))
)]
pub async fn tokenize(
    State(state): State<AppState>,
    Body(request): Body<TokenizeRequest>,
) -> Result<Json<TokenizeResponse>, ApiError> {
    unsupported::refuse(&request.unknown)?;
    models::find(&state, request.model.as_deref())?;
    let ids = match (request.prompt, request.messages) {
        (Some(text), None) => {
            let special = request.add_special_tokens.unwrap_or(true);
            let encoded = prompt::encode_texts(&state, vec![text], special).await?;
            encoded.into_iter().next().unwrap_or_default()
        }
        (None, Some(messages)) => {
            if request.add_special_tokens == Some(true) {
                let message = "a chat's special tokens are the template's to write";
                return Err(ApiError::invalid("add_special_tokens", message));
            }
            let chat = prompt::chat(
                messages,
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs,
            )?;
            prompt::encode_chat(&state, chat).await?
        }
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("messages", "not together with `prompt`"));
        }
        (None, None) => {
            return Err(ApiError::invalid(
                "prompt",
                "expected `prompt` or `messages`, found neither",
            ));
        }
    };
    let tokenizer = &state.model().tokenizer;
    let told = request.return_token_strs.unwrap_or(false);
    Ok(Json(TokenizeResponse {
        count: ids.len(),
        max_model_len: state.engine().limits().context_tokens_max,
        token_strs: told.then(|| ids.iter().map(|id| tokenizer.token_text(*id)).collect()),
        tokens: ids.iter().map(|id| id.0).collect(),
    }))
}

/// The text of ids.
#[utoipa::path(
    post, path = "/detokenize", tag = "tokens", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody), (status = 404, body = ErrorBody))
)]
pub async fn detokenize(
    State(state): State<AppState>,
    Body(request): Body<DetokenizeRequest>,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    unsupported::refuse(&request.unknown)?;
    models::find(&state, request.model.as_deref())?;
    let vocabulary = state.engine().limits().vocabulary;
    let outside = |id: &u32| usize::try_from(*id).is_ok_and(|id| id >= vocabulary);
    if let Some(at) = request.tokens.iter().position(outside) {
        let message = format!("expected token ids below {vocabulary}");
        return Err(ApiError::invalid(format!("tokens[{at}]"), message));
    }
    let ids: Vec<TokenId> = request.tokens.into_iter().map(TokenId).collect();
    Ok(Json(DetokenizeResponse {
        prompt: state.model().tokenizer.decode(&ids, false),
    }))
}
