//! The one object that this API adds each way: what a request asks of the gates, and what they did.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `midpo` of a request. A key that is not listed here is an error.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MidpoRequest {
    /// `routed`, `base`, `safety`, `helpfulness` or `both`; a suffix of `model` must agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Added to the safety gate's logit; above 0 is safer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_bias: Option<f32>,
    /// Added to the helpfulness gate's logit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub helpfulness_bias: Option<f32>,
    /// Least safety gate, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safety_floor: Option<f32>,
    /// Greatest helpfulness gate, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub helpfulness_ceiling: Option<f32>,
    /// What of the gates is answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub return_gates: Option<ReturnGates>,
    /// Which layers, where `return_gates` is `layers`; absent: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate_layers: Option<Vec<u32>>,
}

/// How much of the gates is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReturnGates {
    /// Nothing.
    #[default]
    None,
    /// Statistics of the answer's tokens.
    Summary,
    /// And both gates of every token, as means over layers.
    Tokens,
    /// And those of every layer.
    Layers,
}

/// `midpo` of a choice. In a stream `tokens` comes with the chunks, `variant` and `gates` with the last one.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct MidpoAnswer {
    /// The variant that answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// Statistics over the answer's tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gates: Option<GateSummary>,
    /// One an answer token, aligned with `logprobs` and `token_ids`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<Vec<TokenGates>>,
}

/// Statistics of both gates.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct GateSummary {
    /// alpha.
    pub safety: GateStatistics,
    /// beta.
    pub helpfulness: GateStatistics,
}

/// Statistics of one gate, of its means over layers.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct GateStatistics {
    /// At the last prompt token, where the answer's first word is decided.
    pub prompt_last: f32,
    /// Over the answer's tokens.
    pub mean: f32,
    /// Over the answer's tokens.
    pub min: f32,
    /// Over the answer's tokens.
    pub max: f32,
}

/// The gates of the pass whose logits chose a token.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct TokenGates {
    /// The token.
    pub token_id: u32,
    /// alpha, mean over layers.
    pub safety: f32,
    /// beta, mean over layers.
    pub helpfulness: f32,
    /// By layer, in the order of `gate_layers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<GateLayers>,
}

/// Both gates by layer.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct GateLayers {
    /// alpha.
    pub safety: Vec<f32>,
    /// beta.
    pub helpfulness: Vec<f32>,
}
