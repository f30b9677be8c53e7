//! Scores of answers, by a trained reward or cost model.

use std::path::Path;

use super::autograd::{ScoreKind, ScoreModel, ScoreTensors};
use super::data::{Encoder, message};
use super::workers::Workers;
use super::{Sequence, TrainError};
use crate::checkpoint::{CheckpointError, Normalizer, ScoreType, load_score};
use crate::text::Message;

/// Sequences that a thread scores at once.
const AT_ONCE: usize = 8;

/// A frozen score model with its tokenizer and chat template: R(x, y), higher is better, or C(x, y), higher is more harmful and below
/// 0 safe (MIDPO.md 3).
pub struct Scorer {
    model: ScoreModel,
    encoder: Encoder,
    normalizer: Normalizer,
    workers: Workers,
}

impl Scorer {
    /// Opens a LlamaForScore directory. `max_length`: what is longer loses the beginning of its prompt. `threads`: 0 takes all cores.
    ///
    /// # Errors
    /// As [`load_score`]; a directory without a tokenizer.
    pub fn open(directory: &Path, max_length: usize, threads: usize) -> Result<Self, TrainError> {
        let checkpoint = load_score(directory)?;
        let text = checkpoint.text.ok_or_else(|| {
            let expected = "expected the tokenizer of the score model, found none";
            CheckpointError::malformed(&directory.join("tokenizer.json"), expected)
        })?;
        let kind = match checkpoint.score_type {
            ScoreType::Reward => ScoreKind::Reward,
            ScoreType::Cost => ScoreKind::Cost,
        };
        let encoder = Encoder::new(&text, &checkpoint.config, max_length)?;
        let tensors = checkpoint.tensors.into_iter();
        let tensors = ScoreTensors {
            config: checkpoint.config,
            tensors: tensors.map(|(name, _, values)| (name, values)).collect(),
        };
        let threads = match threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        };
        Ok(Self {
            model: ScoreModel::from_tensors(&tensors, kind)?,
            encoder,
            normalizer: checkpoint.normalizer,
            workers: Workers::new(threads),
        })
    }

    /// Reward or cost.
    pub fn kind(&self) -> ScoreKind {
        self.model.kind()
    }

    /// The score of each answer (its end of sequence is added) to its prompt, the words of one user's turn.
    ///
    /// # Errors
    /// [`TrainError::Text`] where the chat template refuses a prompt.
    pub fn score(&self, answers: &[(&str, &str)]) -> Result<Vec<f32>, TrainError> {
        let chats: Vec<(Vec<Message>, &str)> = answers
            .iter()
            .map(|(prompt, answer)| (vec![message("user", prompt)], *answer))
            .collect();
        let chats: Vec<(&[Message], &str)> = chats
            .iter()
            .map(|(prompt, answer)| (prompt.as_slice(), *answer))
            .collect();
        self.score_chats(&chats)
    }

    /// As [`Scorer::score`], of prompts of several turns.
    ///
    /// # Errors
    /// As [`Scorer::score`].
    pub fn score_chats(&self, chats: &[(&[Message], &str)]) -> Result<Vec<f32>, TrainError> {
        let parts: Vec<&[(&[Message], &str)]> = chats.chunks(AT_ONCE).collect();
        let scores = self.workers.map(&parts, |part| self.score_here(part))?;
        Ok(scores.into_iter().flatten().collect())
    }

    /// As [`Scorer::score_chats`], on the thread that calls.
    pub(super) fn score_here(&self, chats: &[(&[Message], &str)]) -> Result<Vec<f32>, TrainError> {
        let encode = |(prompt, answer): &(&[Message], &str)| {
            let (sequence, _) = self.encoder.sequence(prompt, answer)?;
            Ok::<_, TrainError>(sequence)
        };
        let sequences = chats.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
        let sequences: Vec<&Sequence> = sequences.iter().collect();
        let score_type = match self.kind() {
            ScoreKind::Reward => ScoreType::Reward,
            ScoreKind::Cost => ScoreType::Cost,
        };
        let scores = self.model.scores(&sequences)?.into_iter();
        Ok(scores
            .map(|score| self.normalizer.apply(score_type, score))
            .collect())
    }
}
