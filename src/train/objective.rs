//! The contract between what is trained and the loop that trains it.

use super::TrainError;

/// A tensor that is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// As in the file that will hold it.
    pub name: String,
    /// Row-major axes.
    pub shape: Vec<usize>,
    /// Whether weight decay applies (matrices yes; norms and biases no).
    pub decay: bool,
}

/// What a batch's means are taken over. Known before the forward pass, so that a batch may be computed in parts.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Sequences or pairs.
    pub items: usize,
    /// Tokens that are not padding, over all sequences.
    pub tokens: usize,
    /// Weights of the tokens that count, for losses that are means over tokens.
    pub weight: f64,
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            items: self.items + other.items,
            tokens: self.tokens + other.tokens,
            weight: self.weight + other.weight,
        }
    }
}

/// A part's share of its batch's loss and gradient: shares add up.
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// d loss / d parameter, in the order of [`Objective::parameters`], row-major.
    pub values: Vec<Vec<f32>>,
    /// Share of the loss.
    pub loss: f64,
    /// Shares of what else is watched (`accuracy`, `delta`, `margin`, `alpha`, ...), means over the batch once added up. The names are the same in
    /// every part.
    pub watched: Vec<(&'static str, f64)>,
}

/// What a pass back finds of the pass forward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// All that it needs.
    #[default]
    Kept,
    /// What each layer took: the layer is computed again on the way back. The same bits, about a third more arithmetic, and memory of one
    /// layer instead of all (Chen et al., arXiv 1604.06174).
    Checkpointed,
}

/// How far a pass over a batch goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// To the loss.
    Forward,
    /// And back to the gradient.
    Back(Activations),
}

/// What is trained, and how good it is. Parts of one batch are computed on several threads at once.
pub trait Objective: Sync {
    /// What a batch is made of.
    type Item: Sync;

    /// What moves, in a fixed order.
    fn parameters(&self) -> &[Parameter];

    /// Values of the parameters, in order, row-major.
    ///
    /// # Errors
    /// [`TrainError`] where the engine fails.
    fn values(&self) -> Result<Vec<Vec<f32>>, TrainError>;

    /// Replaces the values of the parameters.
    ///
    /// # Errors
    /// [`TrainError::Shape`] where number or lengths differ from [`Objective::parameters`].
    fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError>;

    /// What `item` adds to its batch's totals.
    fn totals(&self, item: &Self::Item) -> Totals;

    /// Some items of a batch whose totals are `batch`: loss and what is watched, and with [`Pass::Back`] the gradient (else `values` are
    /// empty).
    ///
    /// # Errors
    /// [`TrainError`] where the engine fails.
    fn shares(
        &self,
        items: &[&Self::Item],
        batch: Totals,
        pass: Pass,
    ) -> Result<Gradients, TrainError>;

    /// Forward and backward.
    ///
    /// # Errors
    /// [`TrainError`] where the engine fails.
    fn gradients(
        &self,
        items: &[&Self::Item],
        batch: Totals,
        activations: Activations,
    ) -> Result<Gradients, TrainError> {
        self.shares(items, batch, Pass::Back(activations))
    }

    /// Forward alone.
    ///
    /// # Errors
    /// [`TrainError`] where the engine fails.
    fn evaluate(&self, items: &[&Self::Item], batch: Totals) -> Result<Gradients, TrainError> {
        self.shares(items, batch, Pass::Forward)
    }
}
