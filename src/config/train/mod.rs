//! `midpo train`: what each stage may be told. A setting is a key of a recipe's table and a flag of the stage's subcommand at once.

mod options;
mod recipe;
mod stages;

pub use options::{
    BaseModel, CostModel, DataOptions, DpoOptions, ExpertOptions, Experts, LoopOptions,
    MarginOptions, OutputOptions, PreferenceLoss, RewardModel, RouterModel, RouterOptions,
    SavedDType, ScoreOptions, SftOptions,
};
pub use recipe::{Recipe, RecipeOverrides};
pub use stages::{
    AllFlags, CostStage, DpoStage, DualStage, HelpfulnessStage, PackStage, RewardStage,
    RouterStage, RunFlags, SafetyStage, SftStage, Stage, StageOptions,
};
