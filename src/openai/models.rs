//! The list of models, in which every variant is one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// `GET /v1/models`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    /// The served model first, then its variants.
    pub data: Vec<Model>,
}

/// One model.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct Model {
    /// What requests name in `model`.
    pub id: String,
    /// `model`.
    pub object: String,
    /// Unix seconds at which the server loaded it.
    pub created: u64,
    /// `midpo`.
    pub owned_by: String,
    /// The model that this is a variant of.
    pub parent: Option<String>,
    /// What `parent` and this share: the served model's id.
    pub root: String,
    /// Prompt and answer together, at most (vLLM).
    pub max_model_len: usize,
    /// The variant that answers.
    pub variant: String,
}

/// `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
pub struct Version {
    /// Of this program.
    pub version: String,
    /// Hash of the model's weights.
    pub model_fingerprint: String,
}
