//! Normalisation layers, with the checkpoint's field names.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use kiln_quant_core::fused;

/// Root-mean-square norm over the last axis: `x / sqrt(mean(x²) + eps) * weight`.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// Gains.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// # Shapes
    /// `[.., width]` → `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        fused::rms_norm(x, self.weight.val(), self.eps)
    }
}

/// Layer norm over the last axis, with or without gains and biases.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// Gains.
    pub weight: Option<Param<Tensor<1>>>,
    /// Biases.
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    /// Whether it has gains and biases.
    pub(crate) fn has_parameters(&self) -> bool {
        self.weight.is_some() && self.bias.is_some()
    }

    /// # Shapes
    /// `[.., width]` → `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let centred = x.clone() - x.mean_dim(D - 1);
        let variance = centred.clone().square().mean_dim(D - 1);
        let mut y = centred / variance.add_scalar(self.eps).sqrt();
        if let Some(weight) = &self.weight {
            y = y * weight.val().unsqueeze();
        }
        if let Some(bias) = &self.bias {
            y = y + bias.val().unsqueeze();
        }
        y
    }
}
