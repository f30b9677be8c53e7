//! From files of examples to token ids: lines read and checked, then encoded as the model will be served with them.

mod encode;
mod jsonl;
mod pairs;
mod prompts;

pub(crate) use encode::common;
pub use encode::{Cut, Encoder};
pub use jsonl::{BadLines, LineError, Lines};
pub use pairs::{PairLine, read_pairs};
pub(crate) use prompts::message;
pub use prompts::{Exchange, read_exchanges};
