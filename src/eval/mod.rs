//! Evaluation: variants x prompt sets through the engine, judged by rules and by the score models that `train` makes.
//!
//! [`prompts`] reads prompts and their classes, [`answer`] gets all answers, [`Judge`] and [`Scores`] say what they are, [`Summary`]
//! what they come to (means, shares and AUROCs with [`bootstrap`] intervals), [`Report`] and [`svg`] how that is shown.
//! [`perplexity`] foretells texts.

mod answers;
mod auroc;
pub mod bootstrap;
mod error;
mod gates;
mod judge;
mod lines;
pub mod perplexity;
mod picture;
pub mod prompts;
mod report;
mod rules;
mod scores;
mod summary;

pub use answers::{Answer, Contender, Drawing, Subject, answer};
pub use auroc::Ranking;
pub use error::EvalError;
pub use gates::{Auroc, ClassGates, GateTable, Gates, Places, PromptNumbers};
pub use judge::{Exchange, Judge, Outcome};
pub use picture::svg;
pub use prompts::{Class, Prompt};
pub use report::{Conditions, PromptCount, Report, count};
pub use rules::RefusalRules;
pub use scores::Scores;
pub use summary::{Evaluation, Judged, Row, Summary};
