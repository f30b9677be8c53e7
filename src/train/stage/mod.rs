//! The stages of the method, from files to files: each is a function of its typed settings (`config::train`), and [`all`] runs those
//! of a recipe. `prepare` makes examples of lines, `session` is what stages share, `stamp` says what need not run again.

mod all;
mod dual;
mod expert;
mod gates;
mod models;
mod prepare;
mod router;
mod score;
mod session;
mod sft;
mod stamp;

pub use all::{AllOptions, all};
pub use dual::dual;
pub use expert::{dpo, helpfulness, safety};
pub use router::router;
pub use score::{cost, reward};
pub use session::How;
pub use sft::sft;

/// Where a stage leaves state, metrics and curves, inside its output.
pub const TRACES: &str = "training";
