//! Random numbers that are a function of what they are for: the same seed gives the same numbers on every machine, and nobody
//! else's draws can move them. [`uniform`] has no state at all (sampling); [`SplitMix64`] is a sequence (shuffles, loads, corpora).

mod counter;
mod stream;

pub use counter::uniform;
pub use stream::SplitMix64;
