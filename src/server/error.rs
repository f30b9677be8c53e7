//! Every way in which a request can fail, and the one place that turns it into OpenAI's error object and a status.

use std::any::Any;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::engine::SubmitError;
use crate::openai::{ErrorBody, ErrorDetail, ReadError};
use crate::text::TextError;

/// Seconds after which a client that met a full queue should come again. A step takes far less; a whole answer may take more.
const RETRY_AFTER_SECONDS: u64 = 1;
/// Characters of a client's words that an error repeats.
const ECHO_CHARS_MAX: usize = 128;

/// Why a request has no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ApiError {
    /// The body cannot be read as a request.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A field has a value that is not legal.
    #[error("`{param}`: {message}")]
    Invalid {
        /// Path of the field.
        param: String,
        /// What was expected and found.
        message: String,
    },
    /// A field of OpenAI's API, or of vLLM's, that this server does not honour.
    #[error("`{param}` is not supported{hint}")]
    Unsupported {
        /// Path of the field.
        param: String,
        /// Which values are, with a separator in front; may be empty.
        hint: String,
    },
    /// The operator does not allow this.
    #[error("`{param}`: {message}")]
    Denied {
        /// Path of the field.
        param: String,
        /// What is allowed.
        message: String,
    },
    /// No such model.
    #[error("the model `{model}` does not exist; there {}", list(.known))]
    ModelNotFound {
        /// What was asked for.
        model: String,
        /// What there is.
        known: Vec<String>,
    },
    /// The text cannot become a prompt.
    #[error("`{param}`: {source}")]
    Text {
        /// Where the text was.
        param: &'static str,
        /// Why.
        #[source]
        source: TextError,
    },
    /// The engine does not take it.
    #[error("{source}")]
    Submit {
        /// The field that holds the prompt.
        param: &'static str,
        /// Why.
        #[source]
        source: SubmitError,
    },
    /// No key, or none that we know.
    #[error("{message}")]
    Unauthorized {
        /// How to present one.
        message: &'static str,
    },
    /// No route has this path.
    #[error("no such route: {method} {path}")]
    NoRoute {
        /// As it came.
        method: String,
        /// As it came.
        path: String,
    },
    /// The route has other methods.
    #[error("the method {method} is not served at {path}")]
    Method {
        /// As it came.
        method: String,
        /// As it came.
        path: String,
    },
    /// The body is too large.
    #[error("the body is larger than the limit of {limit} bytes")]
    ContentTooLarge {
        /// The limit.
        limit: usize,
    },
    /// The body is no JSON by its own account.
    #[error("expected the content type application/json, found {found}")]
    MediaType {
        /// What the header says.
        found: String,
    },
    /// The body broke off.
    #[error("the body could not be read to its end")]
    Body,
    /// The body did not come in time.
    #[error("the body was not complete within {seconds} seconds")]
    SlowBody {
        /// The limit.
        seconds: u64,
    },
    /// It took too long.
    #[error("the answer was not complete within {seconds} seconds")]
    Timeout {
        /// The limit.
        seconds: u64,
    },
    /// The engine gave up on it.
    #[error("{message}")]
    Failed {
        /// The engine's words.
        message: String,
    },
    /// A mistake of ours.
    #[error(
        "the server met an error of its own; its log tells more under this response's x-request-id"
    )]
    Internal,
}

fn list(known: &[String]) -> String {
    match known {
        [one] => format!("is only `{one}`"),
        many => format!("are `{}`", many.join("`, `")),
    }
}

impl ApiError {
    /// A field with an illegal value.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid {
            param: param.into(),
            message: message.into(),
        }
    }

    /// A field that is not honoured; `hint` may say what is.
    pub fn unsupported(param: impl Into<String>, hint: &str) -> Self {
        let hint = if hint.is_empty() {
            String::new()
        } else {
            format!(": {hint}")
        };
        Self::Unsupported {
            param: param.into(),
            hint,
        }
    }

    /// What the operator does not allow.
    pub fn denied(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Denied {
            param: param.into(),
            message: message.into(),
        }
    }

    /// The engine died while it worked on this.
    pub fn engine_gone() -> Self {
        Self::Submit {
            param: "prompt",
            source: SubmitError::EngineGone,
        }
    }

    /// The status, and the error's `code`.
    fn classify(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Read(ReadError::Syntax { .. } | ReadError::NotAnObject { .. }) => {
                (StatusCode::BAD_REQUEST, "invalid_json")
            }
            Self::Read(ReadError::Field { .. }) => (StatusCode::BAD_REQUEST, "invalid_type"),
            Self::Invalid { .. } => (StatusCode::BAD_REQUEST, "invalid_value"),
            Self::Unsupported { .. } => (StatusCode::BAD_REQUEST, "unsupported_parameter"),
            Self::Denied { .. } => (StatusCode::FORBIDDEN, "policy_denied"),
            Self::ModelNotFound { .. } => (StatusCode::NOT_FOUND, "model_not_found"),
            Self::Text { source, .. } => classify_text(source),
            Self::Submit { source, .. } => classify_submit(source),
            Self::Unauthorized { .. } => (StatusCode::UNAUTHORIZED, "invalid_api_key"),
            Self::NoRoute { .. } => (StatusCode::NOT_FOUND, "unknown_url"),
            Self::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::ContentTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "content_too_large"),
            Self::MediaType { .. } => {
                (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type")
            }
            Self::Body => (StatusCode::BAD_REQUEST, "incomplete_body"),
            Self::SlowBody { .. } => (StatusCode::REQUEST_TIMEOUT, "slow_body"),
            Self::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, "request_timeout"),
            Self::Failed { .. } | Self::Internal => {
                (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
            }
        }
    }

    fn param(&self) -> Option<String> {
        match self {
            Self::Read(ReadError::Field { param, .. }) => param.clone(),
            Self::Invalid { param, .. }
            | Self::Unsupported { param, .. }
            | Self::Denied { param, .. } => Some(param.clone()),
            Self::ModelNotFound { .. } => Some("model".to_owned()),
            Self::Text { param, .. } => Some((*param).to_owned()),
            Self::Submit { param, source } => match source {
                SubmitError::EmptyPrompt
                | SubmitError::TokenOutOfRange { .. }
                | SubmitError::ContextLength { .. }
                | SubmitError::CacheTooSmall { .. } => Some((*param).to_owned()),
                SubmitError::NoExperts { .. } => Some("midpo.variant".to_owned()),
                SubmitError::QueueFull { .. } | SubmitError::Draining | SubmitError::EngineGone => {
                    None
                }
            },
            _ => None,
        }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.classify().0
    }

    /// OpenAI's object.
    pub fn body(&self) -> ErrorBody {
        let (status, code) = self.classify();
        ErrorBody {
            error: ErrorDetail {
                message: self.to_string(),
                kind: kind(status).to_owned(),
                param: self.param(),
                code: Some(code.to_owned()),
            },
        }
    }

    /// Errors of ours go to the log as such; a client's are its own business.
    pub fn log(&self) {
        if self.status().is_server_error() {
            tracing::error!(error = %self, "request failed");
        } else {
            tracing::debug!(status = self.status().as_u16(), error = %self, "request refused");
        }
    }
}

/// OpenAI's `type` of an error with this status.
fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    }
}

fn classify_text(error: &TextError) -> (StatusCode, &'static str) {
    match error {
        TextError::Template { .. } => (StatusCode::BAD_REQUEST, "chat_template_error"),
        TextError::TooLong { .. } => (StatusCode::BAD_REQUEST, "context_length_exceeded"),
        TextError::Encode { .. } => (StatusCode::BAD_REQUEST, "invalid_value"),
        TextError::Tokenizer { .. } | TextError::TemplateSource { .. } => {
            (StatusCode::INTERNAL_SERVER_ERROR, "internal_error")
        }
    }
}

fn classify_submit(error: &SubmitError) -> (StatusCode, &'static str) {
    match error {
        SubmitError::EmptyPrompt | SubmitError::TokenOutOfRange { .. } => {
            (StatusCode::BAD_REQUEST, "invalid_value")
        }
        SubmitError::ContextLength { .. } | SubmitError::CacheTooSmall { .. } => {
            (StatusCode::BAD_REQUEST, "context_length_exceeded")
        }
        SubmitError::NoExperts { .. } => (StatusCode::BAD_REQUEST, "no_experts"),
        SubmitError::QueueFull { .. } => (StatusCode::TOO_MANY_REQUESTS, "queue_full"),
        SubmitError::Draining => (StatusCode::SERVICE_UNAVAILABLE, "draining"),
        SubmitError::EngineGone => (StatusCode::SERVICE_UNAVAILABLE, "engine_unavailable"),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.log();
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if matches!(
            self.status(),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        ) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        if matches!(self, Self::Unauthorized { .. }) {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The response when a handler panicked: a mistake of ours that ends one request and nothing else.
pub fn panicked(panic: Box<dyn Any + Send + 'static>) -> Response {
    let message = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("of an unknown kind");
    tracing::error!(panic = message, "a handler panicked");
    ApiError::Internal.into_response()
}

/// A client's words, cut to what an error may repeat.
pub fn echo(words: &str) -> String {
    match words.char_indices().nth(ECHO_CHARS_MAX) {
        Some((end, _)) => format!("{}...", words.get(..end).unwrap_or_default()),
        None => words.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_its_status_code_and_param() {
        let submit = |source| ApiError::Submit {
            param: "messages",
            source,
        };
        let cases = [
            (ApiError::invalid("n", "x"), 400, Some("n"), "invalid_value"),
            (
                ApiError::unsupported("tools", ""),
                400,
                Some("tools"),
                "unsupported_parameter",
            ),
            (
                ApiError::denied("midpo.variant", "x"),
                403,
                Some("midpo.variant"),
                "policy_denied",
            ),
            (
                ApiError::ModelNotFound {
                    model: "x".to_owned(),
                    known: vec!["m".to_owned()],
                },
                404,
                Some("model"),
                "model_not_found",
            ),
            (
                submit(SubmitError::QueueFull { limit: 3 }),
                429,
                None,
                "queue_full",
            ),
            (
                submit(SubmitError::EmptyPrompt),
                400,
                Some("messages"),
                "invalid_value",
            ),
            (submit(SubmitError::Draining), 503, None, "draining"),
            (ApiError::engine_gone(), 503, None, "engine_unavailable"),
            (
                ApiError::Timeout { seconds: 3 },
                504,
                None,
                "request_timeout",
            ),
            (ApiError::Internal, 500, None, "internal_error"),
        ];
        for (error, status, param, code) in cases {
            let body = error.body().error;
            assert_eq!(error.status().as_u16(), status, "{error}");
            assert_eq!(body.param.as_deref(), param, "{error}");
            assert_eq!(body.code.as_deref(), Some(code), "{error}");
            assert!(!body.message.is_empty() && !body.kind.is_empty());
        }
    }

    #[test]
    fn a_full_queue_tells_when_to_come_again() {
        let error = ApiError::Submit {
            param: "prompt",
            source: SubmitError::QueueFull { limit: 1 },
        };
        let response = error.into_response();
        assert!(response.headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn echo_cuts_at_a_character() {
        let long = "é".repeat(ECHO_CHARS_MAX + 1);
        assert_eq!(echo(&long).chars().count(), ECHO_CHARS_MAX + 3);
        assert_eq!(echo("short"), "short");
    }
}
