//! Some rows of a matrix: the embedding of token ids, and what the head needs.

use candle_core::{CpuStorage, CustomOp1, Error, Layout, Result, Shape, Tensor};

use super::math::add_scaled;
use super::{numbers, output, read};

struct SelectRows {
    rows: Vec<usize>,
}

/// x (n, d), rows (k), each below n and as often as it likes: (k, d).
pub(in super::super) fn select_rows(x: &Tensor, rows: Vec<usize>) -> Result<Tensor> {
    x.apply_op1(SelectRows { rows })
}

impl CustomOp1 for SelectRows {
    fn name(&self) -> &'static str {
        "select-rows"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, d) = layout.shape().dims2()?;
        let x = numbers(storage, layout)?;
        let mut y = Vec::with_capacity(self.rows.len() * d);
        for row in &self.rows {
            let values = x.get(row * d..(row + 1) * d);
            y.extend_from_slice(
                values.ok_or_else(|| Error::Msg(format!("row {row}: expected one below {n}")))?,
            );
        }
        output(y, (self.rows.len(), d))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (n, d) = x.dims2()?;
        let dx = read(dy, |dy| {
            let mut dx = vec![0.0; n * d];
            for (row, dy) in self.rows.iter().zip(dy.chunks_exact(d)) {
                if let Some(values) = dx.get_mut(row * d..(row + 1) * d) {
                    add_scaled(values, 1.0, dy);
                }
            }
            dx
        })?;
        Tensor::from_vec(dx, (n, d), x.device()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use candle_core::Device;

    use super::super::check;
    use super::*;

    #[test]
    fn select_rows_is_candles_index_select() {
        let inputs = [check::normal(1, &[5, 3])];
        let op = |t: &[Tensor]| select_rows(&t[0], vec![4, 1, 1]).unwrap();
        let rows = Tensor::new(&[4u32, 1, 1], &Device::Cpu).unwrap();
        let composed = |t: &[Tensor]| t[0].index_select(&rows, 0).unwrap();
        check::same_as(op, composed, &inputs, 1e-6);
    }
}
