//! What every chunk of a response repeats.

use std::time::{SystemTime, UNIX_EPOCH};

/// Enough of the weights' hash to tell two models apart.
const WEIGHTS_CHARS: usize = 12;

/// Id, time and names of one response.
#[derive(Clone, Debug)]
pub struct Head {
    /// A prefix and a uuid.
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// As it was asked for.
    pub model: String,
    /// This program's version and the weights: answers to one seed are equal while it is.
    pub fingerprint: String,
}

impl Head {
    /// Of a response that begins now.
    pub fn new(prefix: &str, model: &str, weights: &str) -> Self {
        let weights = weights.get(..WEIGHTS_CHARS).unwrap_or(weights);
        Self {
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: unix_seconds(),
            model: model.to_owned(),
            fingerprint: format!("midpo-{}-{weights}", env!("CARGO_PKG_VERSION")),
        }
    }
}

/// Now; 0 where the clock stands before 1970.
pub fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|since| since.as_secs())
        .unwrap_or_default()
}
