//! A linear layer whose weight may be packed.

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::Tensor,
};

use crate::{PackedTensor, Projection};

/// A packed weight with its bias.
#[derive(Module, Debug)]
pub struct PackedLinear {
    /// The weight, `[d_input, d_output]`.
    pub weight: PackedTensor,
    /// The bias `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
}

/// A linear layer that is packed or dense: mixed precision is data, layer by layer.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a model holds a few hundred of them
pub enum QuantLinear {
    /// Packed, frozen.
    Packed(PackedLinear),
    /// Dense.
    Dense(Linear),
}

impl Projection for QuantLinear {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Packed(linear) => {
                let y = linear.weight.forward(x);
                match &linear.bias {
                    Some(bias) => y + bias.val().unsqueeze(),
                    None => y,
                }
            }
            Self::Dense(linear) => Projection::forward(linear, x),
        }
    }

    fn weight(&self) -> Tensor<2> {
        match self {
            Self::Packed(linear) => linear.weight.dequantize(),
            Self::Dense(linear) => linear.weight.val(),
        }
    }

    fn bias(&self) -> Option<Tensor<1>> {
        match self {
            Self::Packed(linear) => linear.bias.as_ref().map(|bias| bias.val()),
            Self::Dense(linear) => Projection::bias(linear),
        }
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(linear) => linear.weight.shape(),
            Self::Dense(linear) => Projection::shape(linear),
        }
    }
}
