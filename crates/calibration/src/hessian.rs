//! Second moments of a linear layer's inputs.

use burn::tensor::Tensor;
use kiln_quant_core::to_host;

use crate::{Error, Result};

/// `sum X^T X` over samples of a layer's inputs `X` `[rows, d_input]`, in f64.
///
/// # Memory
/// Eight bytes for each pair of inputs.
#[derive(Debug, Clone)]
pub struct Hessian {
    pub(crate) d_input: usize,
    pub(crate) samples: usize,
    pub(crate) sum: Vec<f64>,
}

impl Hessian {
    /// No samples yet.
    pub fn new(d_input: usize) -> Self {
        Self { d_input, samples: 0, sum: vec![0.0; d_input * d_input] }
    }

    /// Adds one sample: the inputs `[rows, d_input]` of a whole sequence count as one. The product is made on the
    /// device of `x`, in its type.
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming `projection` for inputs that hold NaN or infinity; a device that can't be read.
    ///
    /// # Panics
    /// If `x` doesn't have `d_input` columns.
    pub fn add(&mut self, projection: &str, x: Tensor<2>) -> Result<()> {
        self.add_window(projection, self.samples, x)
    }

    /// [`add`](Self::add) of a window, whose number is used in errors.
    pub(crate) fn add_window(&mut self, projection: &str, window: usize, x: Tensor<2>) -> Result<()> {
        assert_eq!(x.dims()[1], self.d_input, "inputs of {projection}");
        let product = to_host(projection, x.clone().transpose().matmul(x))?;
        // A bad input spoils its own diagonal entry.
        if product.iter().step_by(self.d_input + 1).any(|value| !value.is_finite()) {
            return Err(Error::NotFinite {
                place: projection.into(),
                quantity: format!("inputs in window {window} are"),
            });
        }
        self.sum.iter_mut().zip(product).for_each(|(sum, value)| *sum += f64::from(value));
        self.samples += 1;
        Ok(())
    }

    /// Inputs of the layer.
    pub fn d_input(&self) -> usize {
        self.d_input
    }

    /// Samples added.
    pub fn samples(&self) -> usize {
        self.samples
    }

    /// `H = 2 / samples * sum X^T X`, `[d_input, d_input]`: the Hessian of the layer's squared error per output.
    pub fn matrix(&self) -> Vec<f64> {
        let factor = 2.0 / self.samples.max(1) as f64;
        self.sum.iter().map(|value| value * factor).collect()
    }
}
