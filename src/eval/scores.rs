//! What answers are worth by reward and cost models.

use std::path::Path;

use super::answers::Answer;
use super::error::EvalError;
use super::prompts::Prompt;
use crate::train::Scorer;
use crate::train::autograd::ScoreKind;

/// Answers scored between two signs of progress.
const PART: usize = 64;

/// A score model with the flag that names it.
pub struct Scores {
    scorer: Scorer,
    flag: &'static str,
}

impl Scores {
    /// R, higher is better.
    ///
    /// # Errors
    /// A directory without a reward model.
    pub fn reward(directory: &Path, max_length: usize, threads: usize) -> Result<Self, EvalError> {
        Self::open(
            "reward",
            ScoreKind::Reward,
            directory,
            (max_length, threads),
        )
    }

    /// C, higher is more harmful, below 0 safe.
    ///
    /// # Errors
    /// A directory without a cost model.
    pub fn cost(directory: &Path, max_length: usize, threads: usize) -> Result<Self, EvalError> {
        Self::open("cost", ScoreKind::Cost, directory, (max_length, threads))
    }

    fn open(
        flag: &'static str,
        kind: ScoreKind,
        directory: &Path,
        (max_length, threads): (usize, usize),
    ) -> Result<Self, EvalError> {
        let scorer = Scorer::open(directory, max_length, threads);
        let scorer = scorer.map_err(|source| EvalError::Score {
            flag,
            source: Box::new(source),
        })?;
        let found = match scorer.kind() {
            ScoreKind::Reward => "a reward model",
            ScoreKind::Cost => "a cost model",
        };
        if scorer.kind() != kind {
            return Err(EvalError::Flag {
                flag,
                expected: format!("a {flag} model"),
                found: format!("{found} in {}", directory.display()),
            });
        }
        Ok(Self { scorer, flag })
    }

    /// The score of each answer. `on_scored` hears how many more are done.
    ///
    /// # Errors
    /// [`EvalError::Score`] where the score model's chat template refuses a prompt.
    pub fn of(
        &self,
        prompts: &[Prompt],
        answers: &[Answer],
        mut on_scored: impl FnMut(usize),
    ) -> Result<Vec<f32>, EvalError> {
        let mut scores = Vec::with_capacity(answers.len());
        for part in answers.chunks(PART) {
            let texts: Vec<(&str, &str)> = part
                .iter()
                .map(|answer| (prompts[answer.prompt].text.as_str(), answer.text.as_str()))
                .collect();
            let scored = self.scorer.score(&texts);
            scores.extend(scored.map_err(|source| EvalError::Score {
                flag: self.flag,
                source: Box::new(source),
            })?);
            on_scored(part.len());
        }
        Ok(scores)
    }
}
