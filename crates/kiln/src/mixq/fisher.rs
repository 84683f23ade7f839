//! The diagonal Fisher information of the weights.

use std::collections::HashMap;

use burn::tensor::Tensor;
use kiln_models::{Decoder, Windows, squared_gradients};
use kiln_quant_core::{Projection, QuantLinear, to_host};

use super::{Error, Result};

/// The mean over windows of the squared gradient of a window's loss, for every weight of the blocks' linears.
///
/// # Memory
/// Three times the dense weights while it is measured, once afterwards.
#[derive(Debug, Clone)]
pub struct Fisher {
    squares: HashMap<String, Tensor<2>>,
    /// Scored tokens of a window.
    tokens: usize,
}

impl Fisher {
    /// Takes gradients of the original model's loss on the windows, one at a time.
    ///
    /// # Errors
    /// [`Error::is_argument`] for windows that don't fit the model.
    pub fn measure(original: &Decoder<QuantLinear>, windows: &Windows) -> Result<Self> {
        let squares = squared_gradients(original, windows)?;
        Ok(Self { squares, tokens: windows.length() - 1 })
    }

    /// The second-order estimate of what the projection's error adds to the loss, in nats a token: half the squared
    /// weight errors, weighted.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a path that the model lacks.
    pub fn harm(&self, path: &str, original: &QuantLinear, quantized: &QuantLinear) -> Result<f64> {
        let squares =
            self.squares.get(path).ok_or_else(|| Error::argument(path, "a measured linear", "none"))?;
        let error = original.weight() - quantized.weight();
        let sums = (error.powi_scalar(2) * squares.clone()).sum_dim(0);
        let sum: f64 = to_host(path, sums)?.into_iter().map(f64::from).sum();
        Ok(0.5 * sum / self.tokens as f64)
    }
}
