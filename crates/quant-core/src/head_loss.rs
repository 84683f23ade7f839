//! The loss of a packed output head and its gradient, a part of the vocabulary at a time: neither all logits nor the dense
//! head are ever there.

use burn::tensor::{Int, Tensor};

use crate::PackedTensor;

/// What a head does to its products `z`: logits are `factor * z`, or `cap * tanh(factor * z / cap)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitSpec {
    /// Factor on the products.
    pub factor: f32,
    /// What logits stay below, above 0; `None` leaves them.
    pub softcap: Option<f32>,
}

impl PackedTensor {
    /// Whether [`cross_entropy`](Self::cross_entropy) takes such rows: it is for f32 on GPUs, and for weights that aren't
    /// trained.
    pub fn has_cross_entropy(&self, x: &Tensor<2>) -> bool {
        #[cfg(feature = "cube")]
        return crate::fused::on_cube(x) && crate::trained_values(self) == 0;
        #[cfg(not(feature = "cube"))]
        {
            let _ = x;
            false
        }
    }

    /// Cross-entropy of the logits that `spec` makes of `x · W`, and the gradient of its sum over rows, each times its
    /// weight, with respect to `x`; `columns` ids at a time, or some more where blocks are of several outputs. Without
    /// weights all are 1. `x` has no graph.
    ///
    /// The head is unpacked and multiplied twice, once for the sums of exponentials and once for the gradient: which costs
    /// less than to unpack all of it for every few rows.
    ///
    /// # Shapes
    /// `x` `[rows, d_input]`, `targets` and `weights` `[rows]` → `[rows]` and `[rows, d_input]`.
    ///
    /// # Panics
    /// If the sizes don't fit together, or where [`has_cross_entropy`](Self::has_cross_entropy) says no.
    pub fn cross_entropy(
        &self,
        x: Tensor<2>,
        targets: Tensor<1, Int>,
        weights: Option<Tensor<1>>,
        spec: LogitSpec,
        columns: usize,
    ) -> (Tensor<1>, Tensor<2>) {
        assert!(self.has_cross_entropy(&x), "cross_entropy of a packed head on {:?}", x.device());
        #[cfg(feature = "cube")]
        {
            use crate::{
                fused::vocabulary::{product_gradients, with_logits},
                ops::{self, PackedSpec},
            };
            use burn::module::Module;

            let weight = self.valid();
            let [rows, width] = x.dims();
            let [d_input, vocabulary] = weight.shape();
            assert_eq!(width, d_input, "rows of a head of {d_input} inputs");
            let order = weight.order();
            let x = match &order {
                Some([order, _]) => x.select(1, order.clone()),
                None => x,
            };
            let weights = weights.unwrap_or_else(|| Tensor::ones([rows], &x.device()));
            let outputs = weight.scheme().block.outputs;
            let columns = columns.max(1).next_multiple_of(outputs);
            // Scales of all, which may be decoded for it, once.
            let (codes, scales, offsets) = weight.parts();
            let part = |first: usize| {
                let count = columns.min(vocabulary - first);
                let blocks =
                    |values: &Tensor<2>| values.clone().narrow(1, first / outputs, count.div_ceil(outputs));
                let spec = PackedSpec { d_output: count, ..weight.spec() };
                (codes.clone().narrow(1, first, count), blocks(&scales), blocks(&offsets), spec)
            };
            let products = |first: usize| {
                let (codes, scales, offsets, spec) = part(first);
                ops::packed_linear(x.clone(), codes, scales, offsets, spec)
            };

            let firsts: Vec<usize> = (0..vocabulary).step_by(columns).collect();
            let mut state = Tensor::zeros([rows, 3], &x.device());
            // The last products are there when the way back begins.
            let mut last = None;
            for &first in &firsts {
                let products = products(first);
                state = with_logits(state, products.clone(), targets.clone(), first, spec);
                last = Some(products);
            }
            let mut dx: Option<Tensor<2>> = None;
            for &first in firsts.iter().rev() {
                let products = last.take().unwrap_or_else(|| products(first));
                let (state, weights) = (state.clone(), weights.clone());
                let dy = product_gradients(products, state, targets.clone(), weights, first, spec);
                let (codes, scales, offsets, spec) = part(first);
                let of_part = ops::packed_linear_dx(dy, codes, scales, offsets, spec);
                dx = Some(match dx {
                    Some(dx) => dx + of_part,
                    None => of_part,
                });
            }
            let dx = dx.expect("a vocabulary of at least one id");
            let dx = match order {
                Some([_, places]) => dx.select(1, places),
                None => dx,
            };
            let known = |column: usize| state.clone().narrow(1, column, 1).squeeze_dim::<1>(1);
            let losses = known(0) + known(1).log() - known(2);
            (losses, dx)
        }
        #[cfg(not(feature = "cube"))]
        {
            let _ = (targets, weights, spec, columns);
            unreachable!("refused above")
        }
    }
}
