//! Stages: each a list of groups, loadable from flags and recipe.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, FromArgMatches};
use serde::Serialize;

use super::options::{
    BaseModel, CostModel, DataOptions, DpoOptions, ExpertOptions, Experts, LoopOptions,
    MarginOptions, OutputOptions, RewardModel, RouterModel, RouterOptions, ScoreOptions,
    SftOptions,
};
use super::recipe::Layers;
use crate::config::ConfigError;

/// A stage of the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stage {
    /// The base.
    Sft,
    /// R.
    Reward,
    /// C.
    Cost,
    /// The safety expert.
    Safety,
    /// The helpfulness expert.
    Helpfulness,
    /// One LoRA by plain DPO on both preferences: what the method is compared with.
    Dpo,
    /// D_dual.
    Dual,
    /// The router.
    Router,
    /// All of it in one directory to serve.
    Pack,
}

impl Stage {
    /// Every stage, in the order in which they run.
    pub const ALL: [Self; 9] = [
        Self::Sft,
        Self::Reward,
        Self::Cost,
        Self::Safety,
        Self::Helpfulness,
        Self::Dpo,
        Self::Dual,
        Self::Router,
        Self::Pack,
    ];

    /// Name of its table and subcommand.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Reward => "reward",
            Self::Cost => "cost",
            Self::Safety => "safety",
            Self::Helpfulness => "helpfulness",
            Self::Dpo => "dpo",
            Self::Dual => "dual",
            Self::Router => "router",
            Self::Pack => "pack",
        }
    }

    /// What it writes inside a recipe's `output` where the recipe does not say.
    pub fn default_output(self) -> &'static str {
        match self {
            Self::Dual => "dual.jsonl",
            Self::Pack => "model",
            _ => self.as_str(),
        }
    }
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The settings of one stage.
pub trait StageOptions: Args + FromArgMatches + Serialize {
    /// Which.
    const STAGE: Stage;

    /// Every group, from where it stands.
    ///
    /// # Errors
    /// A value that has the wrong type.
    fn load(layers: &Layers<'_>) -> Result<Self, ConfigError>;

    /// What it writes.
    fn output(&self) -> &OutputOptions;
}

/// Declares a stage: its groups become one struct of flags and keys.
macro_rules! stages {
    ($($(#[$meta:meta])* $name:ident = $stage:ident { $($(#[$field_meta:meta])* $field:ident: $group:ty),* $(,)? })*) => {$(
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Args, Serialize)]
        pub struct $name {
            $(
                $(#[$field_meta])*
                #[command(flatten)]
                #[serde(flatten)]
                pub $field: $group,
            )*
            /// What is written, and on how many threads.
            #[command(flatten)]
            #[serde(flatten)]
            pub output: OutputOptions,
        }

        impl StageOptions for $name {
            const STAGE: Stage = Stage::$stage;

            fn load(layers: &Layers<'_>) -> Result<Self, ConfigError> {
                Ok(Self {
                    $($field: layers.group()?,)*
                    output: layers.group()?,
                })
            }

            fn output(&self) -> &OutputOptions {
                &self.output
            }
        }
    )*};
}

stages! {
    /// `midpo train sft`.
    SftStage = Sft {
        /// What it goes on from.
        base: BaseModel,
        /// What counts.
        sft: SftOptions,
        /// Prompts and answers.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train reward`.
    RewardStage = Reward {
        /// The trunk.
        base: BaseModel,
        /// How much of it.
        score: ScoreOptions,
        /// Pairs.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train cost`.
    CostStage = Cost {
        /// The trunk.
        base: BaseModel,
        /// How much of it.
        score: ScoreOptions,
        /// Pairs.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train safety`.
    SafetyStage = Safety {
        /// pi_ref.
        base: BaseModel,
        /// Where margins come from.
        cost: CostModel,
        /// Their use.
        margin: MarginOptions,
        /// The LoRA.
        expert: ExpertOptions,
        /// Pairs.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train helpfulness`.
    HelpfulnessStage = Helpfulness {
        /// pi_ref.
        base: BaseModel,
        /// Where margins come from.
        reward: RewardModel,
        /// Their use.
        margin: MarginOptions,
        /// The LoRA.
        expert: ExpertOptions,
        /// Pairs.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train dpo`.
    DpoStage = Dpo {
        /// pi_ref.
        base: BaseModel,
        /// Which pairs.
        dpo: DpoOptions,
        /// The LoRA.
        expert: ExpertOptions,
        /// Pairs.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `midpo train dual`.
    DualStage = Dual {
        /// Who is better.
        reward: RewardModel,
        /// Who is safe, and safer.
        cost: CostModel,
        /// Pairs.
        data: DataOptions,
    }
    /// `midpo train router`.
    RouterStage = Router {
        /// pi_ref.
        base: BaseModel,
        /// What is mixed.
        experts: Experts,
        /// The gates.
        router: RouterOptions,
        /// D_dual.
        data: DataOptions,
        /// How.
        training: LoopOptions,
    }
    /// `[pack]` of a recipe; alone it is `midpo convert`.
    PackStage = Pack {
        /// The base.
        base: BaseModel,
        /// The experts.
        experts: Experts,
        /// The router.
        router: RouterModel,
    }
}

/// Flags of a stage that no recipe holds.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
#[command(next_help_heading = "Run")]
pub struct RunFlags {
    /// Take settings, and inputs that no flag names, from this recipe.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Go on from the state that an interrupted run has left.
    #[arg(long)]
    pub resume: bool,
    /// Replace an output that is there.
    #[arg(long)]
    pub overwrite: bool,
}

/// `midpo train all`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct AllFlags {
    /// The pipeline, in TOML: a table a stage, its keys the flags of the stage's subcommand.
    #[arg(long, value_name = "FILE")]
    pub recipe: PathBuf,
    /// Write here instead of where the recipe says.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Threads; 0: all cores.
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Go on from the state that an interrupted run has left.
    #[arg(long)]
    pub resume: bool,
}
