//! Products of matrices, views of `ndarray`, by `gemm`: on the calling thread, into what is there, of any strides.

// The products are asked for by address.
#![allow(unsafe_code)]

use gemm_common::Parallelism;
use ndarray::{ArrayView2, ArrayViewMut2, ShapeBuilder};

/// `count` columns from column `first` on, of rows of `width` numbers.
#[derive(Clone, Copy)]
pub(super) struct Columns {
    /// Numbers of a whole row.
    pub width: usize,
    /// The first.
    pub first: usize,
    /// How many.
    pub count: usize,
}

impl Columns {
    /// All of a row.
    pub(super) fn all(width: usize) -> Self {
        Self {
            width,
            first: 0,
            count: width,
        }
    }

    /// (rows, count) of (rows, width).
    pub(super) fn of(self, matrix: &[f32]) -> ArrayView2<'_, f32> {
        let rows = matrix.len() / self.width.max(1);
        let shape = (rows, self.count).strides((self.width, 1));
        let view = ArrayView2::from_shape(shape, matrix.get(self.first..).unwrap_or_default());
        let Ok(view) = view else {
            panic!(
                "{} columns from {} on of rows of {}",
                self.count, self.first, self.width
            )
        };
        view
    }

    /// As [`Columns::of`], to write to.
    pub(super) fn of_mut(self, matrix: &mut [f32]) -> ArrayViewMut2<'_, f32> {
        let rows = matrix.len() / self.width.max(1);
        let shape = (rows, self.count).strides((self.width, 1));
        let view =
            ArrayViewMut2::from_shape(shape, matrix.get_mut(self.first..).unwrap_or_default());
        let Ok(view) = view else {
            panic!(
                "{} columns from {} on of rows of {}",
                self.count, self.first, self.width
            )
        };
        view
    }
}

/// c (m, n) = alpha * a b + beta * c, of a (m, k) and b (k, n).
pub(super) fn product(
    alpha: f32,
    a: &ArrayView2<'_, f32>,
    b: &ArrayView2<'_, f32>,
    beta: f32,
    c: &mut ArrayViewMut2<'_, f32>,
) {
    let ((m, k), n) = (a.dim(), b.dim().1);
    assert_eq!((b.dim().0, c.dim()), (k, (m, n)), "axes of a product");
    let (&[a_row, a_column], &[b_row, b_column], &[c_row, c_column]) =
        (a.strides(), b.strides(), c.strides())
    else {
        return;
    };
    let multiply = gemm_f32::gemm::f32::get_gemm_fn();
    // SAFETY: the views hold all that their axes and strides reach, of the sizes just compared; `c` is borrowed alone, and a view that can
    // be written to reaches nothing twice.
    unsafe {
        multiply(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_column,
            c_row,
            beta != 0.0,
            a.as_ptr(),
            a_column,
            a_row,
            b.as_ptr(),
            b_column,
            b_row,
            beta,
            alpha,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// x (n, k), w (o, k): x w^T, (n, o).
pub(in super::super) fn linear(x: &[f32], w: &[f32], k: usize) -> Vec<f32> {
    let o = w.len() / k.max(1);
    let mut y = vec![0.0; x.len() / k.max(1) * o];
    linear_into(x, w, k, 1.0, 0.0, &mut y);
    y
}

/// y (n, o) += factor * x w^T.
pub(in super::super) fn add_linear(y: &mut [f32], factor: f32, x: &[f32], w: &[f32], k: usize) {
    linear_into(x, w, k, factor, 1.0, y);
}

fn linear_into(x: &[f32], w: &[f32], k: usize, alpha: f32, beta: f32, y: &mut [f32]) {
    let o = w.len() / k.max(1);
    let (x, w) = (Columns::all(k).of(x), Columns::all(k).of(w));
    product(alpha, &x, &w.t(), beta, &mut Columns::all(o).of_mut(y));
}

/// dx (n, k) += factor * dy w, the way back through [`linear`]: dy (n, o), w (o, k).
pub(in super::super) fn add_product(dx: &mut [f32], factor: f32, dy: &[f32], w: &[f32], k: usize) {
    let o = w.len() / k.max(1);
    let (dy, w) = (Columns::all(o).of(dy), Columns::all(k).of(w));
    product(factor, &dy, &w, 1.0, &mut Columns::all(k).of_mut(dx));
}

/// dw (o, k) += factor * dy^T x, the way back through [`linear`]: dy (n, o), x (n, k).
pub(in super::super) fn add_weight_gradient(
    dw: &mut [f32],
    factor: f32,
    dy: &[f32],
    x: &[f32],
    k: usize,
) {
    let o = dw.len() / k.max(1);
    let (dy, x) = (Columns::all(o).of(dy), Columns::all(k).of(x));
    product(factor, &dy.t(), &x, 1.0, &mut Columns::all(k).of_mut(dw));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::check;
    use super::*;

    #[test]
    fn linear_and_its_way_back_are_candles_matmul() {
        check::same_as(
            &[&[5, 7], &[3, 7]],
            |inputs| linear(&inputs[0], &inputs[1], 7),
            |inputs, dy| {
                let (mut dx, mut dw) = (vec![0.0; 35], vec![0.0; 21]);
                add_product(&mut dx, 1.0, dy, &inputs[1], 7);
                add_weight_gradient(&mut dw, 1.0, dy, &inputs[0], 7);
                vec![dx, dw]
            },
            |t| t[0].matmul(&t[1].t().unwrap()).unwrap(),
            2e-6,
        );
    }

    #[test]
    fn products_add_to_what_is_there() {
        let mut y = vec![1.0, 2.0];
        add_linear(&mut y, 2.0, &[1.0, 3.0], &[1.0, 0.0, 0.0, 1.0], 2);
        assert_eq!(y, [3.0, 8.0]);
    }
}
