//! A reward or cost model: Safe-RLHF's `LlamaForScore` (MIDPO.md 2).

use std::path::Path;

use super::json::Object;
use super::limits::CONFIG_BYTES_MAX;
use super::source::Source;
use super::tensor_file::{FileTensor, check_finite};
use super::{CheckpointError, LlamaConfig, NamedTensor, TextParts, hf, text_parts};

/// What a score means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScoreType {
    /// R: higher is better.
    Reward,
    /// C: higher is more harmful, below 0 is safe.
    Cost,
}

impl ScoreType {
    /// Its name in `config.json`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reward => "reward",
            Self::Cost => "cost",
        }
    }
}

/// A score model.
#[derive(Clone, Debug)]
pub struct ScoreCheckpoint {
    /// Of the trunk.
    pub config: LlamaConfig,
    /// Reward or cost.
    pub score_type: ScoreType,
    /// The trunk's tensors by Hugging Face's names (`model.*`), then `score_head.weight` (1, d), then perhaps `score_head.bias` (1).
    pub tensors: Vec<NamedTensor>,
    /// What scores become before they are told; not applied yet.
    pub normalizer: Normalizer,
    /// Its tokenizer, where the directory holds one.
    pub text: Option<TextParts>,
}

/// The normaliser of scores: its buffers, and whether it is on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Normalizer {
    /// `do_normalize` of `config.json`.
    pub is_on: bool,
    /// Running mean.
    pub mean: f32,
    /// Running variance.
    pub var: f32,
    /// Scores seen.
    pub count: i64,
}

impl Default for Normalizer {
    /// One that has seen nothing, and is off.
    fn default() -> Self {
        Self {
            is_on: false,
            mean: 0.0,
            var: 1.0,
            count: 0,
        }
    }
}

impl Normalizer {
    /// `(x - mean) / (sqrt(var) + 1e-8)` of a reward, `x / (sqrt(var) + 1e-8)` of a cost, whose sign means something (MIDPO.md 2);
    /// `x` where it is off.
    pub fn apply(&self, score_type: ScoreType, score: f32) -> f32 {
        const EPS: f32 = 1e-8;
        if !self.is_on {
            return score;
        }
        let centre = match score_type {
            ScoreType::Reward => self.mean,
            ScoreType::Cost => 0.0,
        };
        (score - centre) / (self.var.sqrt() + EPS)
    }
}

/// (1, d).
pub(super) const HEAD: &str = "score_head.weight";
/// (1).
pub(super) const BIAS: &str = "score_head.bias";
/// (1).
pub(super) const MEAN: &str = "normalizer.mean";
/// (1).
pub(super) const VAR: &str = "normalizer.var";
/// (1), int64.
pub(super) const COUNT: &str = "normalizer.count";

/// Names and shapes of [`ScoreCheckpoint::tensors`].
pub(super) fn shapes(config: &LlamaConfig, has_bias: bool) -> Vec<(String, Vec<usize>)> {
    let mut shapes = hf::trunk_shapes(config);
    shapes.push((HEAD.to_owned(), vec![1, config.hidden_size]));
    if has_bias {
        shapes.push((BIAS.to_owned(), vec![1]));
    }
    shapes
}

/// Loads a score model: every file that it needs, every number checked.
///
/// # Errors
/// Any [`CheckpointError`]: names the file, the key or tensor, what was expected and what came.
pub fn load_score(directory: &Path) -> Result<ScoreCheckpoint, CheckpointError> {
    let source = Source::directory(directory);
    let config = hf::read_config(&source)?;
    let file = source.path(hf::CONFIG);
    let json = Object::parse(&file, &source.read(hf::CONFIG, CONFIG_BYTES_MAX)?)?;
    let score_type = match json.string("score_type")? {
        Some("reward") => ScoreType::Reward,
        Some("cost") => ScoreType::Cost,
        _ => return Err(json.error("score_type", "\"reward\" or \"cost\"")),
    };
    json.count_optional("score_dim", 1..=1)?;
    let has_bias = json.truth("score_bias")?.unwrap_or(true);
    let is_on = json.truth("do_normalize")?.unwrap_or(false);

    let (mut weights, _) = hf::Weights::open(&source)?;
    let context = format!(" (as {} says)", file.display());
    let mut taken = Vec::new();
    for (name, shape) in shapes(&config, has_bias) {
        taken.push(weights.take(&name, &shape, &context)?);
    }
    let buffers = [weights.take(MEAN, &[1], "")?, weights.take(VAR, &[1], "")?];
    let count = weights.take_integer(COUNT)?;
    weights.finish("a score model of this configuration", |name| {
        name.ends_with(hf::ROTARY_COPY)
    })?;
    check_finite(taken.iter().chain(&buffers))?;
    let [mean, var] = buffers.each_ref().map(first);
    if is_on && var < 0.0 {
        let reason = format!("expected a variance, found {var}");
        let [_, tensor] = buffers;
        return Err(CheckpointError::tensor(&tensor.file, VAR, reason));
    }
    let has_text = source.exists(text_parts::TOKENIZER);
    Ok(ScoreCheckpoint {
        config,
        score_type,
        tensors: taken.into_iter().map(FileTensor::into_named).collect(),
        normalizer: Normalizer {
            is_on,
            mean,
            var,
            count,
        },
        text: has_text.then(|| text_parts::read(&source)).transpose()?,
    })
}

/// Of a tensor of one number.
fn first(tensor: &FileTensor) -> f32 {
    tensor.tensor.to_f32().first().copied().unwrap_or_default()
}
