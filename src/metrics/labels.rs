//! Labels: closed sets of values, so that no client can add a series.

use crate::types::{FinishReason, Variant};

/// A closed set of values of one label.
pub trait Label: Copy + PartialEq + 'static {
    /// Name of the label.
    const NAME: &'static str;
    /// Every value.
    const ALL: &'static [Self];
    /// The value as it is written.
    fn as_str(self) -> &'static str;
}

impl Label for Variant {
    const NAME: &'static str = "variant";
    const ALL: &'static [Self] = &Self::ALL;
    fn as_str(self) -> &'static str {
        Variant::as_str(self)
    }
}

impl Label for FinishReason {
    const NAME: &'static str = "finish_reason";
    const ALL: &'static [Self] = &[Self::Stop, Self::Length, Self::Cancelled, Self::Failed];
    fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident, $label:literal, { $($(#[$value_doc:meta])* $value:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$value_doc])* $value),+ }
        impl Label for $name {
            const NAME: &'static str = $label;
            const ALL: &'static [Self] = &[$(Self::$value),+];
            fn as_str(self) -> &'static str {
                match self { $(Self::$value => $word),+ }
            }
        }
    };
}

labels! {
    /// A gate of the router.
    Gate, "gate", {
        /// alpha.
        Safety = "safety",
        /// beta.
        Helpfulness = "helpfulness",
    }
}

labels! {
    /// What a block of the K/V cache is.
    BlockState, "state", {
        /// Holds nothing.
        Free = "free",
        /// Holds a prefix that nobody uses; evicted when a block is needed.
        Cached = "cached",
        /// Used by at least one sequence.
        Held = "held",
    }
}

labels! {
    /// Where an HTTP request went.
    Route, "route", {
        /// `/v1/chat/completions`.
        ChatCompletions = "/v1/chat/completions",
        /// `/v1/completions`.
        Completions = "/v1/completions",
        /// `/v1/models` and `/v1/models/{id}`.
        Models = "/v1/models",
        /// `/tokenize`.
        Tokenize = "/tokenize",
        /// `/detokenize`.
        Detokenize = "/detokenize",
        /// `/health`.
        Health = "/health",
        /// `/ready`.
        Ready = "/ready",
        /// `/metrics`.
        Metrics = "/metrics",
        /// `/version`.
        Version = "/version",
        /// `/openapi.json`.
        OpenApi = "/openapi.json",
        /// Everything else, known or not.
        Other = "other",
    }
}

labels! {
    /// Status of an HTTP response.
    Status, "status", {
        /// 200.
        Ok = "200",
        /// 400.
        BadRequest = "400",
        /// 401.
        Unauthorized = "401",
        /// 403.
        Forbidden = "403",
        /// 404.
        NotFound = "404",
        /// 405.
        MethodNotAllowed = "405",
        /// 408.
        RequestTimeout = "408",
        /// 413.
        ContentTooLarge = "413",
        /// 415.
        UnsupportedMediaType = "415",
        /// 422.
        UnprocessableContent = "422",
        /// 429.
        TooManyRequests = "429",
        /// The client left before there was a response.
        ClientClosed = "499",
        /// 500.
        Internal = "500",
        /// 503.
        Unavailable = "503",
        /// 504.
        GatewayTimeout = "504",
        /// Any other.
        Other = "other",
    }
}

impl Status {
    /// The label of an HTTP status code.
    pub fn of(code: u16) -> Self {
        Self::ALL
            .iter()
            .copied()
            .find(|status| status.as_str().parse() == Ok(code))
            .unwrap_or(Self::Other)
    }
}

labels! {
    /// Why the engine refused a submission.
    Refusal, "reason", {
        /// It is wrong in itself: empty, outside the vocabulary, too long, no experts.
        Invalid = "invalid",
        /// Too many wait.
        QueueFull = "queue_full",
        /// The server is shutting down.
        Draining = "draining",
        /// The engine thread is gone.
        EngineGone = "engine_gone",
    }
}
