//! Log-probabilities in the style of chat completions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Of one choice, or of one chunk of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One an answer token.
    pub content: Option<Vec<TokenLogprob>>,
    /// Always null: refusals are ordinary content here.
    pub refusal: Option<Vec<TokenLogprob>>,
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct TokenLogprob {
    /// Its text; half a character shows as U+FFFD.
    pub token: String,
    /// From the unmodified distribution; -9999 stands for minus infinity.
    pub logprob: f32,
    /// Its bytes: joined over tokens they are the text.
    pub bytes: Option<Vec<u8>>,
    /// The most likely tokens at this place, most likely first.
    pub top_logprobs: Vec<TopLogprob>,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Its text.
    pub token: String,
    /// From the unmodified distribution.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
}
