//! Evaluation: variants x prompt sets through the engine, judged by rules and by the score models that `train` makes.
//!
//! [`prompts`] reads prompts and their classes, [`answer`] gets all answers, [`Judge`] and [`Scores`] say what they are, [`Summary`]
//! what they come to (means, shares and AUROCs with [`bootstrap`] intervals), [`Report`] and [`svg`] how that is shown.
//! [`Pairs`] are preference pairs of a base's own answers in several voices ([`Voice`]). [`perplexity`] foretells texts.

mod answers;
mod auroc;
pub mod bootstrap;
mod error;
mod gates;
mod judge;
mod lines;
mod pairs;
pub mod perplexity;
mod picture;
pub mod prompts;
mod report;
mod rules;
mod scores;
mod summary;
mod voices;

pub use answers::{Answer, Contender, Drawing, Manner, Subject, answer};
pub use auroc::Ranking;
pub use error::EvalError;
pub use gates::{Auroc, ClassGates, GateTable, Gates, Places, PromptNumbers};
pub use judge::{Exchange, Judge, Outcome};
pub use pairs::{Kept, Pairing, Pairs, is_held_out};
pub use picture::svg;
pub use prompts::{Class, Prompt};
pub use report::{Conditions, PromptCount, Report, count};
pub use rules::RefusalRules;
pub use scores::Scores;
pub use summary::{Evaluation, Judged, Row, Summary};
pub use voices::{Side, Voice, Wanted};
