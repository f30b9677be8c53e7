//! What every chunk of a response repeats.

use std::time::{SystemTime, UNIX_EPOCH};

/// Id, time and names of one response.
#[derive(Clone, Debug)]
pub struct Head {
    /// A prefix and a uuid.
    pub id: String,
    /// Unix seconds.
    pub created: u64,
    /// As it was asked for.
    pub model: String,
    /// This program and its version.
    pub fingerprint: String,
}

impl Head {
    /// Of a response that begins now.
    pub fn new(prefix: &str, model: &str) -> Self {
        Self {
            id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()),
            created: unix_seconds(),
            model: model.to_owned(),
            fingerprint: concat!("midpo-", env!("CARGO_PKG_VERSION")).to_owned(),
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
