//! Normalisation over the last axis, with the checkpoint's parameter names.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use kiln_quant_core::fused;

use crate::families::NormKind;

/// A norm of any kind.
#[derive(Module, Debug)]
pub struct Norm {
    /// Gains; with [`NormKind::RmsOnePlus`] what is added to 1. OPT's and NanoChat's may lack them.
    pub weight: Option<Param<Tensor<1>>>,
    /// Biases, of layer norms only.
    pub bias: Option<Param<Tensor<1>>>,
    /// Added to the mean square or variance.
    pub eps: f64,
    /// What it computes.
    #[module(skip)]
    pub kind: NormKind,
}

impl Norm {
    /// In the place of a norm that a model lacks.
    pub(crate) fn identity() -> Self {
        Self { weight: None, bias: None, eps: 0.0, kind: NormKind::Identity }
    }

    /// Parameters with the names that checkpoints give them after the norm's path.
    pub fn parameters(&self) -> impl Iterator<Item = (&'static str, &Param<Tensor<1>>)> {
        let named = [("weight", &self.weight), ("bias", &self.bias)];
        named.into_iter().filter_map(|(name, parameter)| Some((name, parameter.as_ref()?)))
    }

    /// # Shapes
    /// `[.., width]` → `[.., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match (self.kind, &self.weight) {
            (NormKind::Rms, Some(weight)) => fused::rms_norm(x, weight.val(), self.eps),
            (NormKind::RmsOnePlus, Some(weight)) => {
                fused::rms_norm(x, weight.val().add_scalar(1.0), self.eps)
            }
            (NormKind::Identity, _) => x,
            (NormKind::Rms | NormKind::RmsOnePlus, None) => divided_by_root_mean_square(x, self.eps),
            (NormKind::Layer | NormKind::LayerGain, weight) => {
                let weight = match weight {
                    Some(weight) => weight.val(),
                    None => Tensor::ones([x.dims()[D - 1]], &x.device()),
                };
                let y = fused::layer_norm(x, weight, self.eps);
                match &self.bias {
                    Some(bias) => y + bias.val().unsqueeze(),
                    None => y,
                }
            }
        }
    }
}

/// `x / sqrt(mean(x²) + eps)` over the last axis.
pub(crate) fn divided_by_root_mean_square<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    let scale = x.clone().square().mean_dim(D - 1).add_scalar(eps).sqrt().recip();
    x * scale
}
