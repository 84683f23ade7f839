//! The adapter's kind as a run-time choice.

use burn::{module::Module, tensor::Tensor};
use kiln_quant_core::Projection;

use crate::{Adapter, Lora};

/// An adapter of any kind, for programs that learn which from a configuration.
#[derive(Module, Debug)]
#[non_exhaustive]
pub enum AnyAdapter {
    /// Low-rank.
    Lora(Lora),
}

impl AnyAdapter {
    /// The adapter, if it is low-rank.
    pub fn as_lora(&self) -> Option<&Lora> {
        match self {
            Self::Lora(lora) => Some(lora),
        }
    }
}

impl From<Lora> for AnyAdapter {
    fn from(lora: Lora) -> Self {
        Self::Lora(lora)
    }
}

impl Adapter for AnyAdapter {
    fn forward<P: Projection, const D: usize>(&self, base: &P, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Lora(lora) => lora.forward(base, x),
        }
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        match self {
            Self::Lora(lora) => lora.merged_weight(base),
        }
    }
}
