//! Groups of settings that stages are made of. Their doc comments are `--help`.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use serde::{Deserialize, Serialize};

/// What a stage reads.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Data")]
pub struct DataOptions {
    /// JSONL, one example a line. Pairs have PKU-SafeRLHF's fields (prompt, response_0, response_1, is_response_0_safe,
    /// is_response_1_safe, better_response_id, safer_response_id) and may have a `kind`; sft takes {prompt, response} or {messages}.
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Longest sequence. What is longer loses the beginning of its prompt; the answer stays.
    #[arg(long, default_value_t = 512, value_name = "TOKENS")]
    pub max_length: usize,
    /// Count lines that cannot be used instead of stopping at the first.
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = false, default_missing_value = "true")]
    pub skip_bad: bool,
    /// Take only the first N examples that can be used.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// How a stage trains.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Training")]
pub struct LoopOptions {
    /// Times through the data.
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub epochs: usize,
    /// Steps instead of epochs.
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Examples (or pairs) of a step.
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub batch_size: usize,
    /// Of them, examples computed at once, each such part on a thread; their gradients are added up. By default a quarter of the batch.
    /// It changes the order of sums, so the last digits of the result; the number of threads does not.
    #[arg(long, value_name = "N")]
    pub micro_batch: Option<usize>,
    /// Keep only what each layer takes, and compute the layer again on the way back: less memory for long sequences and large
    /// micro-batches, a third more time, the same result.
    #[arg(long, value_name = "BOOL", action = ArgAction::Set, num_args = 0..=1, require_equals = true,
        default_value_t = false, default_missing_value = "true")]
    pub activation_checkpointing: bool,
    /// Before the schedule: linear warm-up, then a cosine.
    #[arg(long, default_value_t = 1e-5, value_name = "RATE")]
    pub learning_rate: f64,
    /// Warm-up, as a share of all steps.
    #[arg(long, default_value_t = 0.03, value_name = "SHARE")]
    pub warmup_share: f64,
    /// Warm-up in steps, instead of the share.
    #[arg(long, value_name = "N")]
    pub warmup_steps: Option<usize>,
    /// What the cosine falls to, as a share of the learning rate.
    #[arg(long, default_value_t = 0.0, value_name = "SHARE")]
    pub final_rate_share: f64,
    /// AdamW's decay of the mean of gradients.
    #[arg(long, default_value_t = 0.9, value_name = "BETA")]
    pub beta1: f64,
    /// AdamW's decay of the mean of their squares.
    #[arg(long, default_value_t = 0.95, value_name = "BETA")]
    pub beta2: f64,
    /// AdamW's weight decay, of matrices only. By default 0.01 for experts, 0 for all else.
    #[arg(long, value_name = "DECAY")]
    pub weight_decay: Option<f64>,
    /// Largest norm of a step's gradient; 0: any.
    #[arg(long, default_value_t = 1.0, value_name = "NORM")]
    pub clip: f64,
    /// Of random weights and of the order of examples.
    #[arg(long, default_value_t = 42, value_name = "N")]
    pub seed: u64,
    /// Save a state to go on from (--resume) every N steps; Ctrl-C saves one anyway.
    #[arg(long, value_name = "N")]
    pub save_every: Option<usize>,
    /// Also measure the result on this file, of the same form as the data.
    #[arg(long, value_name = "FILE")]
    pub validation: Option<PathBuf>,
}

/// What a stage writes, and how many threads compute it.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Output")]
pub struct OutputOptions {
    /// Directory to write (dual: a file). In a recipe it is inside the recipe's `output`, and the stage's name by default.
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Threads; 0: all cores. The result does not depend on it.
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub threads: usize,
    /// Format of the weights that are written.
    #[arg(long, value_enum, default_value_t, value_name = "DTYPE")]
    pub dtype: SavedDType,
}

/// In which format trained weights are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SavedDType {
    /// Two bytes a weight.
    #[default]
    Bf16,
    /// Four bytes a weight, as they were trained.
    F32,
}

/// The base that is trained on.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Models")]
pub struct BaseModel {
    /// The base: a Hugging Face directory or a GGUF file.
    #[arg(long, value_name = "DIR|FILE.gguf")]
    pub base: Option<PathBuf>,
}

/// The frozen reward model.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Models")]
pub struct RewardModel {
    /// The reward model R (higher is better): a LlamaForScore directory.
    #[arg(long, value_name = "DIR")]
    pub reward: Option<PathBuf>,
}

/// The frozen cost model.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Models")]
pub struct CostModel {
    /// The cost model C (below 0 is safe): a LlamaForScore directory.
    #[arg(long, value_name = "DIR")]
    pub cost: Option<PathBuf>,
}

/// Both experts.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Models")]
pub struct Experts {
    /// PEFT directory of the safety expert.
    #[arg(long, value_name = "DIR")]
    pub safety: Option<PathBuf>,
    /// PEFT directory of the helpfulness expert.
    #[arg(long, value_name = "DIR")]
    pub helpfulness: Option<PathBuf>,
}

/// The router.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Models")]
pub struct RouterModel {
    /// The router: a file or a directory with one.
    #[arg(long, value_name = "FILE|DIR")]
    pub router: Option<PathBuf>,
}

/// Supervised training.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Supervised training")]
pub struct SftOptions {
    /// Start from random weights of the shape that this config.json says, instead of a base.
    #[arg(long, value_name = "FILE")]
    pub init: Option<PathBuf>,
    /// Directory of the tokenizer and chat template of a base that starts from random weights.
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Weight of a prompt's tokens in the loss; those of an answer weigh 1.
    #[arg(long, default_value_t = 0.0, value_name = "WEIGHT")]
    pub prompt_weight: f32,
}

/// Reward and cost models.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Score model")]
pub struct ScoreOptions {
    /// Take only the first N layers of the base.
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
}

/// An expert.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Expert")]
pub struct ExpertOptions {
    /// Rank of the LoRA on every layer's mlp.down_proj.
    #[arg(long, default_value_t = 16, value_name = "R")]
    pub rank: usize,
    /// lora_alpha: the LoRA counts alpha / rank.
    #[arg(long, default_value_t = 32.0, value_name = "ALPHA")]
    pub alpha: f32,
    /// beta of DPO.
    #[arg(long, default_value_t = 0.1, value_name = "BETA")]
    pub beta_dpo: f32,
    /// Weight of -log p(y_w), a mean over the answer's tokens; 0 is the paper's loss.
    #[arg(long, default_value_t = 0.0, value_name = "WEIGHT")]
    pub anchor: f32,
    /// End when the smoothed mean Delta is above this: far beyond, an expert breaks (8 for a model of 1 M parameters, 14 for one of 3 M).
    #[arg(long, value_name = "DELTA")]
    pub stop_delta: Option<f64>,
}

/// The margin of SPE-DPO.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Expert")]
pub struct MarginOptions {
    /// SPE-DPO has a margin from the score model of the preference, plain DPO has none.
    #[arg(long, value_enum, default_value_t, value_name = "LOSS")]
    pub loss: PreferenceLoss,
    /// The clamped margin is multiplied by this; 1 is the paper's.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub margin_scale: f32,
}

/// What an expert is trained by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PreferenceLoss {
    /// With the margin.
    #[default]
    SpeDpo,
    /// Without.
    Dpo,
}

/// The plain DPO baseline.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Expert")]
pub struct DpoOptions {
    /// How often a pair with exactly one safe answer is taken, the safe one winning, beside every pair by its better answer.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub safety_repeats: usize,
}

/// The router.
#[derive(Clone, Debug, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Router")]
pub struct RouterOptions {
    /// Weight of mean|alpha|: how much a safety gate costs. 1 in the paper.
    #[arg(long, default_value_t = 1.0, value_name = "WEIGHT")]
    pub weight_alpha: f32,
    /// Weight of mean|beta - 1|: how much it costs to shut a helpfulness gate. 1 in the paper.
    #[arg(long, default_value_t = 1.0, value_name = "WEIGHT")]
    pub weight_beta: f32,
    /// Width between a gate's first two maps.
    #[arg(long, default_value_t = 512, value_name = "N")]
    pub hidden: usize,
    /// beta of DPO.
    #[arg(long, default_value_t = 0.1, value_name = "BETA")]
    pub beta_dpo: f32,
}
