//! Tensors in the shapes in which a forward pass reads them. Matrices that it multiplies at once (q, k, v; gate, up) are one block;
//! outside each is a parameter of its own. Invariant: a block is its parameters' numbers end to end.

use super::NamedTensor;
use crate::train::{Parameter, TrainError};

/// Numbers of a block, and what it consists of.
pub(super) struct Block {
    /// Row-major.
    pub values: Vec<f32>,
    /// In order.
    pub parts: Vec<Parameter>,
}

/// Blocks in order, trained or frozen.
#[derive(Default)]
pub(super) struct Blocks {
    values: Vec<Vec<f32>>,
    /// Parameters of each block.
    counts: Vec<usize>,
    parameters: Vec<Parameter>,
}

impl Blocks {
    pub(super) fn new(blocks: Vec<Block>) -> Self {
        let mut joined = Self::default();
        for block in blocks {
            joined.values.push(block.values);
            joined.counts.push(block.parts.len());
            joined.parameters.extend(block.parts);
        }
        joined
    }

    /// In order.
    pub(super) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Each block's numbers.
    pub(super) fn blocks(&self) -> &[Vec<f32>] {
        &self.values
    }

    /// What gradients are added up in: zeros in the blocks' shapes.
    pub(super) fn zeros(&self) -> Vec<Vec<f32>> {
        self.values
            .iter()
            .map(|block| vec![0.0; block.len()])
            .collect()
    }

    /// One a parameter.
    pub(super) fn values(&self) -> Vec<Vec<f32>> {
        self.split(self.values.clone())
    }

    /// Names, shapes and numbers.
    pub(super) fn named(&self) -> Vec<NamedTensor> {
        let named = self.parameters.iter().zip(self.values());
        named
            .map(|(parameter, values)| (parameter.name.clone(), parameter.shape.clone(), values))
            .collect()
    }

    /// Blocks to parameters.
    pub(super) fn split(&self, blocks: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
        let mut parameters = self.parameters.iter();
        let mut values = Vec::with_capacity(self.parameters.len());
        for (mut block, count) in blocks.into_iter().zip(&self.counts) {
            for parameter in parameters.by_ref().take(*count) {
                let rest = block.split_off(size(parameter).min(block.len()));
                values.push(std::mem::replace(&mut block, rest));
            }
        }
        values
    }

    /// Replaces all values.
    pub(super) fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        check(&self.parameters, values)?;
        let mut rest = values.iter();
        for (block, count) in self.values.iter_mut().zip(&self.counts) {
            block.clear();
            for values in rest.by_ref().take(*count) {
                block.extend_from_slice(values);
            }
        }
        Ok(())
    }
}

/// Numbers of a parameter.
fn size(parameter: &Parameter) -> usize {
    parameter.shape.iter().product()
}

/// Whether there are as many numbers as the parameters' shapes say.
pub(super) fn check(parameters: &[Parameter], values: &[Vec<f32>]) -> Result<(), TrainError> {
    if parameters.len() != values.len() {
        return Err(TrainError::Shape {
            name: "parameters".to_owned(),
            expected: parameters.len(),
            found: values.len(),
        });
    }
    for (parameter, values) in parameters.iter().zip(values) {
        check_one(parameter, values)?;
    }
    Ok(())
}

/// As [`check`], of one.
pub(super) fn check_one(parameter: &Parameter, values: &[f32]) -> Result<(), TrainError> {
    let expected = size(parameter);
    if expected == values.len() {
        return Ok(());
    }
    Err(TrainError::Shape {
        name: parameter.name.clone(),
        expected,
        found: values.len(),
    })
}
