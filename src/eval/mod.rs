//! Evaluation: variants x prompt sets through the engine, judged by the score models that `train` makes; and texts foretold.

mod perplexity;

pub use perplexity::{Distance, Mean, Perplexity, Reader, Row, Windows};
