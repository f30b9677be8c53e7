//! Text and token ids: [`Tokenizer`], [`ChatTemplate`], and [`TextStream`], which turns generated ids back into text as they come.

mod byte_pairs;
mod decoder;
mod detokenize;
mod error;
mod jinja;
mod special;
mod stop;
mod stream;
mod template;
mod tokenizer;

pub use byte_pairs::BytePairs;
pub use detokenize::{Detokenizer, Start};
pub use error::TextError;
pub use stop::{StopMatch, StopStrings};
pub use stream::{TextPiece, TextStream, TextStreamOptions};
pub use template::{Chat, ChatTemplate, Message, SpecialTokens};
pub use tokenizer::Tokenizer;
