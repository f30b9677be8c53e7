//! Trained tensors. Matrices that a forward pass multiplies at once (q, k, v; gate, up) are one variable, a block; outside each is
//! a parameter of its own. Invariant: a block is its parameters' numbers end to end.

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};

use super::ops::read;
use crate::train::{Parameter, TrainError};

/// Numbers of a block before it is a tensor.
pub(super) struct Block {
    /// Row-major axes.
    pub shape: Vec<usize>,
    /// Its numbers.
    pub values: Vec<f32>,
    /// What it consists of, in order.
    pub parts: Vec<Parameter>,
}

impl Block {
    /// Not trained.
    pub(super) fn frozen(self) -> Result<Tensor, TrainError> {
        Ok(Tensor::from_vec(self.values, self.shape, &Device::Cpu)?)
    }
}

/// All that an objective trains.
pub(super) struct Blocks {
    variables: Vec<Var>,
    /// Parameters of each variable.
    counts: Vec<usize>,
    parameters: Vec<Parameter>,
}

impl Blocks {
    /// Makes variables of them.
    pub(super) fn new(blocks: Vec<Block>) -> Result<Self, TrainError> {
        let (mut variables, mut counts, mut parameters) = (Vec::new(), Vec::new(), Vec::new());
        for block in blocks {
            variables.push(Var::from_vec(block.values, block.shape, &Device::Cpu)?);
            counts.push(block.parts.len());
            parameters.extend(block.parts);
        }
        Ok(Self {
            variables,
            counts,
            parameters,
        })
    }

    /// In order.
    pub(super) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The blocks for a forward pass; with `tracked` one that a backward pass follows.
    pub(super) fn tensors(&self, tracked: bool) -> Vec<Tensor> {
        let tensor = |variable: &Var| {
            if tracked {
                variable.as_tensor().clone()
            } else {
                variable.as_detached_tensor()
            }
        };
        self.variables.iter().map(tensor).collect()
    }

    /// One a parameter.
    pub(super) fn values(&self) -> Result<Vec<Vec<f32>>, TrainError> {
        let tensors = self.variables.iter().map(Var::as_tensor);
        self.split(tensors.map(Some))
    }

    /// One a parameter; zeros where nothing depended on it.
    pub(super) fn gradients(&self, store: &GradStore) -> Result<Vec<Vec<f32>>, TrainError> {
        self.split(self.variables.iter().map(|variable| store.get(variable)))
    }

    fn split<'a>(
        &self,
        tensors: impl Iterator<Item = Option<&'a Tensor>>,
    ) -> Result<Vec<Vec<f32>>, TrainError> {
        let mut parameters = self.parameters.iter();
        let mut values = Vec::with_capacity(self.parameters.len());
        for (tensor, count) in tensors.zip(&self.counts) {
            let sizes = parameters.by_ref().take(*count).map(size);
            match tensor {
                None => values.extend(sizes.map(|size| vec![0.0; size])),
                Some(tensor) => read(tensor, |mut rest| {
                    for size in sizes {
                        let (part, others) = rest.split_at(size.min(rest.len()));
                        values.push(part.to_vec());
                        rest = others;
                    }
                })?,
            }
        }
        Ok(values)
    }

    /// Replaces all values.
    pub(super) fn set_values(&mut self, values: &[Vec<f32>]) -> Result<(), TrainError> {
        check(&self.parameters, values)?;
        let mut rest = values.iter();
        for (variable, count) in self.variables.iter_mut().zip(&self.counts) {
            let joined: Vec<f32> = rest.by_ref().take(*count).flatten().copied().collect();
            *variable = Var::from_vec(joined, variable.shape(), &Device::Cpu)?;
        }
        Ok(())
    }
}

/// Numbers of a parameter.
pub(super) fn size(parameter: &Parameter) -> usize {
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
