//! A linear layer whose weight may be packed.

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    tensor::{DType, FloatDType, Tensor},
};

use crate::{
    Compute, Error, HostQuantizer, MinMax, PackedTensor, Projection, QuantScheme, Result, Scheme,
    fused::{self, LowRankSpec},
};

/// A packed weight with its bias.
#[derive(Module, Debug)]
pub struct PackedLinear {
    /// The weight, `[d_input, d_output]`.
    pub weight: PackedTensor,
    /// The bias `[d_output]`.
    pub bias: Option<Param<Tensor<1>>>,
}

/// A linear layer that is packed or dense: mixed precision is data, layer by layer.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::Device};
/// use kiln_quant_core::{MinMax, Projection, QuantLinear, Scheme};
/// let linear = LinearConfig::new(64, 32).init(&Device::flex());
/// let packed = QuantLinear::pack("fc1", linear, &"affine4:32".parse()?)?;
/// assert_eq!((packed.shape(), packed.scheme().to_string()), ([64, 32], "affine4:32".to_string()));
/// let again = packed.requantized("fc1", &"nf4:16".parse()?, &MinMax)?;
/// let dense = again.requantized("fc1", &Scheme::Dense, &MinMax)?;
/// assert!(matches!(dense, QuantLinear::Dense(_)));
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // a model holds a few hundred of them
pub enum QuantLinear {
    /// Packed, frozen.
    Packed(PackedLinear),
    /// Dense.
    Dense(Linear),
}

impl QuantLinear {
    /// Packs a dense layer, by [`MinMax`]; a bias is frozen. `path` is for errors.
    ///
    /// # Errors
    /// As [`HostQuantizer::quantize`].
    pub fn pack(path: &str, linear: Linear, scheme: &QuantScheme) -> Result<Self> {
        let weight = PackedTensor::quantize(path, linear.weight.val(), scheme, &MinMax)?;
        Ok(Self::Packed(PackedLinear { weight, bias: linear.bias.map(|bias| bias.no_grad()) }))
    }

    /// What the weight is stored in.
    pub fn scheme(&self) -> Scheme {
        match self {
            Self::Packed(linear) => Scheme::Packed(*linear.weight.scheme()),
            Self::Dense(_) => Scheme::Dense,
        }
    }

    /// Bytes of the weight: a packed one as stored, a dense one in its type.
    pub fn storage_bytes(&self) -> usize {
        match self {
            Self::Packed(linear) => linear.weight.storage_bytes(),
            Self::Dense(linear) => {
                let weight = linear.weight.val();
                weight.dtype().size() * weight.shape().num_elements()
            }
        }
    }

    /// The bias `[d_output]` as a parameter, where [`Projection::bias`] gives its value.
    pub fn bias_parameter(&self) -> Option<&Param<Tensor<1>>> {
        match self {
            Self::Packed(linear) => linear.bias.as_ref(),
            Self::Dense(linear) => linear.bias.as_ref(),
        }
    }

    /// The same layer with its weight in another scheme, the bias as it is: what is packed is dequantized first, and
    /// every packing rounds. A dense layer that is to be dense stays as it is. `path` is for errors.
    ///
    /// # Errors
    /// As [`HostQuantizer::quantize`]; a device that can't be read.
    pub fn requantized(self, path: &str, scheme: &Scheme, quantizer: &dyn HostQuantizer) -> Result<Self> {
        let bias = self.bias_parameter().cloned();
        Ok(match (scheme, self) {
            (Scheme::Dense, Self::Packed(linear)) => {
                Self::Dense(Linear { weight: frozen(linear.weight.dequantize()), bias })
            }
            (Scheme::Dense, dense) => dense,
            (Scheme::Packed(scheme), linear) => {
                let weight = PackedTensor::quantize(path, linear.weight(), scheme, quantizer)?;
                Self::Packed(PackedLinear { weight, bias })
            }
        })
    }

    /// The same layer with the dense `weight` `[d_input, d_output]`, frozen: a packed layer quantizes it to its own
    /// scheme, by [`MinMax`] and in the inputs' own order, a dense one casts it to its own type. `path` is for errors.
    ///
    /// # Errors
    /// A weight of another shape, or one that can't be quantized.
    pub fn with_weight(self, path: &str, weight: Tensor<2>) -> Result<Self> {
        let (expected, found) = (self.shape(), weight.dims());
        if expected != found {
            let (name, expected, found) = (path.into(), format!("{expected:?}"), format!("{found:?}"));
            return Err(Error::Tensor { name, expected: format!("a weight of {expected}"), found });
        }
        Ok(match self {
            Self::Packed(linear) => {
                let weight = PackedTensor::quantize(path, weight, linear.weight.scheme(), &MinMax)?;
                Self::Packed(PackedLinear { weight, bias: linear.bias })
            }
            Self::Dense(linear) => {
                let dtype = linear.weight.val().dtype();
                let weight = frozen(weight.without_autodiff().cast(dtype));
                Self::Dense(Linear { weight, bias: linear.bias })
            }
        })
    }
}

/// What is stored in 16 bits is widened: whoever asks for a weight computes with it in f32.
fn in_f32(weight: Tensor<2>) -> Tensor<2> {
    if weight.dtype() == DType::F32 { weight } else { weight.cast(FloatDType::F32) }
}

fn frozen(weight: Tensor<2>) -> Param<Tensor<2>> {
    // `Param::from_tensor` would ask for gradients.
    Param::initialized(ParamId::new(), weight)
}

impl From<Linear> for QuantLinear {
    fn from(linear: Linear) -> Self {
        Self::Dense(linear)
    }
}

impl Projection for QuantLinear {
    fn compute(&self) -> Compute {
        match self {
            Self::Packed(linear) => linear.weight.compute(),
            Self::Dense(linear) => Compute::of(linear.weight.val().dtype()),
        }
    }

    /// Of a packed weight's products; a dense one's have the type it is stored in.
    fn set_compute(&mut self, compute: Compute) {
        if let Self::Packed(linear) = self {
            linear.weight.set_compute(compute);
        }
    }

    fn takes_operands(&self) -> bool {
        match self {
            Self::Packed(linear) => linear.weight.takes_operands(),
            // A weight that is f32 may be in training, by Burn's own operations.
            Self::Dense(_) => self.compute() != Compute::F32,
        }
    }

    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Packed(linear) => {
                let y = linear.weight.forward(x);
                match &linear.bias {
                    Some(bias) => y + bias.val().unsqueeze(),
                    None => y,
                }
            }
            Self::Dense(linear) => match Compute::of(linear.weight.val().dtype()) {
                Compute::F32 => Projection::forward(linear, x),
                compute => {
                    let y = fused::matmul(x, linear.weight.val(), compute);
                    match &linear.bias {
                        Some(bias) => y + bias.val().unsqueeze(),
                        None => y,
                    }
                }
            },
        }
    }

    fn forward_low_rank(&self, x: Tensor<2>, a: Tensor<2>, b: Tensor<2>, update: LowRankSpec) -> Tensor<2> {
        match self {
            Self::Packed(PackedLinear { weight, bias: None }) => weight.forward_low_rank(x, a, b, update),
            _ => fused::low_rank(self.forward(x.clone()), x, a, b, update),
        }
    }

    fn weight(&self) -> Tensor<2> {
        match self {
            Self::Packed(linear) => linear.weight.dequantize(),
            Self::Dense(linear) => in_f32(linear.weight.val()),
        }
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias_parameter().map(|bias| bias.val())
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Packed(linear) => linear.weight.shape(),
            Self::Dense(linear) => Projection::shape(linear),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use kiln_testkit::{read, values};

    use super::*;

    fn linear() -> Linear {
        let device = Device::flex();
        let weight = Tensor::from_data(TensorData::new(values(1, 64 * 6), [64, 6]), &device);
        Linear { weight: frozen(weight), bias: Some(Param::from_tensor(Tensor::ones([6], &device))) }
    }

    #[test]
    fn packing_rounds_the_weight_as_the_quantizer_does_and_keeps_the_bias() {
        let scheme = "affine3:16".parse().unwrap();
        let rows = read(linear().weight.val().transpose());
        let expected = MinMax.quantize("w", &rows, 64, 6, &scheme).unwrap();
        let packed = QuantLinear::pack("w", linear(), &scheme).unwrap();
        assert_eq!(read(packed.weight().transpose()), expected.dequantize());
        let bias = packed.bias_parameter().unwrap();
        assert!(read(bias.val()) == [1.0; 6] && !bias.is_require_grad());
        // What is on the grid stays there.
        let again = packed.clone().requantized("w", &packed.scheme(), &MinMax).unwrap();
        let (found, packed) = (read(again.weight()), read(packed.weight()));
        assert!(found.iter().zip(&packed).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn dense_and_back_leaves_the_values_of_the_codes() {
        let packed = QuantLinear::pack("w", linear(), &"nf4:16".parse().unwrap()).unwrap();
        let dense = packed.clone().requantized("w", &Scheme::Dense, &MinMax).unwrap();
        assert_eq!((dense.scheme(), read(dense.weight())), (Scheme::Dense, read(packed.weight())));
        assert_eq!(read(dense.bias().unwrap()), [1.0; 6]);
    }

    #[test]
    fn another_weight_is_rounded_to_the_layers_own_scheme_and_must_fit() {
        let packed = QuantLinear::pack("fc", linear(), &"affine4:32".parse().unwrap()).unwrap();
        let negative = packed.weight().neg();
        let found = packed.clone().with_weight("fc", negative.clone()).unwrap();
        assert_eq!(found.scheme(), packed.scheme());
        assert!(read(found.weight() - negative.clone()).iter().all(|x| x.abs() < 1e-6));
        let dense = QuantLinear::from(linear()).with_weight("fc", negative.clone()).unwrap();
        assert_eq!(read(dense.weight()), read(negative));
        let error = dense.with_weight("fc", packed.weight().transpose()).unwrap_err().to_string();
        assert!(error.contains("\"fc\"") && error.contains("[64, 6], found [6, 64]"), "{error}");
    }
}
