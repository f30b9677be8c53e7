//! y = x W^T.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

struct Linear;

/// x (n, k), w (o, k): (n, o).
pub(in super::super) fn linear(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    x.apply_op2(w, Linear)
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        w: &CpuStorage,
        w_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (n, k) = x_layout.shape().dims2()?;
        let (o, _) = w_layout.shape().dims2()?;
        let transposed = w_layout.transpose(0, 1)?;
        let y = x.matmul(w, (1, n, o, k), x_layout, &transposed)?;
        Ok((y, (n, o).into()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        // Only what somebody trains: the gradient of a frozen weight would cost as much as the forward pass.
        let dx = x.track_op().then(|| dy.matmul(&w.detach()));
        let dw = w.track_op().then(|| dy.t()?.matmul(&x.detach()));
        Ok((dx.transpose()?, dw.transpose()?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn linear_is_a_matmul_with_the_transpose() {
        let inputs = [check::normal(1, &[5, 7]), check::normal(2, &[3, 7])];
        let op = |t: &[Tensor]| linear(&t[0], &t[1]).unwrap();
        let composed = |t: &[Tensor]| t[0].matmul(&t[1].t().unwrap()).unwrap();
        check::same_as(op, composed, &inputs, 1e-6);
    }

    #[test]
    fn linear_when_the_weight_is_frozen_leaves_no_gradient_of_it() {
        let (x, w) = (check::normal(1, &[2, 3]), check::normal(2, &[4, 3]));
        let frozen = w.as_detached_tensor();
        let store = linear(&x, &frozen)
            .unwrap()
            .sum_all()
            .unwrap()
            .backward()
            .unwrap();
        assert!(store.get(&x).is_some() && store.get(&frozen).is_none());
    }
}
