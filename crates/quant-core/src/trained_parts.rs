//! Training what a packed weight has besides its codes.

use burn::{
    module::{Param, ParamId},
    tensor::{Tensor, TensorData},
};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Grid, PackedLinear, PackedTensor, PackedWeight, PathPattern, QuantLinear, Result, ScaleType,
    Scales, Slots, Value,
};

/// What of packed weights is trained; codes never are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainedParts {
    /// Scales. Zero points stay, so that offsets, which are `-scale · zero`, move with their scales (PEQA, Kim et al. 2023;
    /// the end-to-end stage of EfficientQAT, Chen et al. 2024).
    Scales,
    /// Scales and offsets, each by itself.
    ScalesAndOffsets,
}

impl PackedTensor {
    /// The same weight with parts that require gradients: scales in f32, whatever they were stored in. `path` is for errors.
    ///
    /// # Errors
    /// A device that can't be read; offsets of a codebook, which has none; a block of scale 0 beside an offset that would
    /// have to follow it.
    pub fn with_trained(self, path: &str, parts: TrainedParts) -> Result<Self> {
        let (compute, device) = (self.compute(), self.codes.val().device().without_autodiff());
        let mut host = self.to_host()?;
        let (scales, mut offsets) = (host.effective_scales(), host.effective_offsets());
        let shape = host.scheme.scale_shape(host.d_input, host.d_output);
        if parts == TrainedParts::ScalesAndOffsets {
            offsets = Some(with_offsets(path, &mut host, &scales, offsets)?);
        }
        let zeros = match (&offsets, parts) {
            (Some(offsets), TrainedParts::Scales) => Some(zeros(path, &scales, offsets)?),
            _ => None,
        };
        host.scheme.scales = ScaleType::F32;
        (host.scales, host.offsets) = (Scales::Plain(scales), offsets);
        let mut packed = Self::new(&host, &device);
        packed.set_compute(compute);
        packed.scales = packed.scales.set_require_grad(true);
        match zeros {
            Some(zeros) => {
                let zeros = Tensor::from_data(TensorData::new(zeros, shape), &device);
                packed.zeros = Some(Param::initialized(ParamId::new(), zeros));
                packed.offsets = None;
            }
            None => {
                packed.offsets = packed
                    .offsets
                    .map(|offsets| offsets.set_require_grad(parts == TrainedParts::ScalesAndOffsets))
            }
        }
        Ok(packed)
    }

    /// The weight as it was trained, frozen; its parts in f32.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn settled(self) -> Result<Self> {
        let (compute, device) = (self.compute(), self.codes.val().device());
        let mut packed = Self::new(&self.to_host()?, &device);
        packed.set_compute(compute);
        Ok(packed)
    }
}

/// Offsets of every block, in a grid that has them.
fn with_offsets(
    path: &str,
    host: &mut PackedWeight,
    scales: &[f32],
    offsets: Option<Vec<f32>>,
) -> Result<Vec<f32>> {
    let Value::Affine { bits, grid } = host.scheme.value else {
        return Err(Error::Tensor {
            name: path.into(),
            expected: "an affine grid, whose offsets can be trained".into(),
            found: format!("{}, a codebook without offsets", host.scheme),
        });
    };
    host.scheme.value = Value::Affine { bits, grid: Grid::Float };
    let middle = (1u32 << (bits - 1)) as f32;
    Ok(match (grid, offsets) {
        (Grid::Symmetric, _) | (_, None) => scales.iter().map(|scale| -scale * middle).collect(),
        (_, Some(offsets)) => offsets,
    })
}

/// What offsets are in units of their scales.
fn zeros(path: &str, scales: &[f32], offsets: &[f32]) -> Result<Vec<f32>> {
    let zero = |(block, (scale, offset)): (usize, (&f32, &f32))| match (*scale == 0.0, *offset == 0.0) {
        (_, true) => Ok(0.0),
        (false, _) => Ok(offset / scale),
        (true, false) => Err(Error::Tensor {
            name: path.into(),
            expected: "scales that offsets can follow".into(),
            found: format!("scale 0 beside offset {offset} in block {block}"),
        }),
    };
    scales.iter().zip(offsets).enumerate().map(zero).collect()
}

impl QuantLinear {
    /// As [`PackedTensor::with_trained`]; a dense layer stays as it is.
    ///
    /// # Errors
    /// As [`PackedTensor::with_trained`].
    pub fn with_trained(self, path: &str, parts: TrainedParts) -> Result<Self> {
        Ok(match self {
            Self::Packed(PackedLinear { weight, bias }) => {
                Self::Packed(PackedLinear { weight: weight.with_trained(path, parts)?, bias })
            }
            dense => dense,
        })
    }

    /// As [`PackedTensor::settled`]; a dense layer stays as it is.
    ///
    /// # Errors
    /// As [`PackedTensor::settled`].
    pub fn settled(self) -> Result<Self> {
        Ok(match self {
            Self::Packed(PackedLinear { weight, bias }) => {
                Self::Packed(PackedLinear { weight: weight.settled()?, bias })
            }
            dense => dense,
        })
    }
}

/// The model with trained parts in the packed linears whose paths match `pattern`, or in all; everything else is frozen.
///
/// # Errors
/// As [`PackedTensor::with_trained`], and if no packed linear is left.
pub fn with_trained_parts<M: Slots<Slot = QuantLinear>>(
    model: M,
    parts: TrainedParts,
    pattern: Option<&PathPattern>,
) -> Result<M::With<QuantLinear>> {
    let mut count = 0;
    let model = model.freeze().try_map(|path, linear| {
        let is_wanted =
            matches!(linear, QuantLinear::Packed(_)) && pattern.is_none_or(|pattern| pattern.matches(path));
        count += usize::from(is_wanted);
        if is_wanted { linear.with_trained(path, parts) } else { Ok(linear) }
    })?;
    if count == 0 {
        let wanted = pattern.map_or_else(|| "the model".to_owned(), ToString::to_string);
        return Err(Error::Tensor {
            name: wanted,
            expected: "packed linears, whose scales can be trained".into(),
            found: "none".into(),
        });
    }
    Ok(model)
}

/// The model as it was trained, frozen.
///
/// # Errors
/// As [`PackedTensor::settled`].
pub fn with_settled_parts<M: Slots<Slot = QuantLinear>>(model: M) -> Result<M::With<QuantLinear>> {
    model.try_map(|_, linear| linear.settled())
}

#[cfg(test)]
mod tests {
    use burn::{module::Module, tensor::Device};
    use kiln_testkit::{assert_close, read, tensor, values};

    use super::*;
    use crate::{HostQuantizer, MinMax};

    fn packed(scheme: &str) -> PackedTensor {
        let weight = values(3, 64 * 8);
        let packed = MinMax.quantize("w", &weight, 64, 8, &scheme.parse().unwrap()).unwrap();
        PackedTensor::new(&packed, &Device::flex())
    }

    const SCHEMES: [&str; 5] =
        ["affine3:32", "affine4:64:int:f16", "affine2:16:sym", "nf4:64", "nf4:64:double"];

    /// What is trained changes nothing before the first step, and its gradients are those of plain tensors.
    #[test]
    fn gradients_are_those_of_the_plain_formula() {
        let device = Device::flex().autodiff();
        for scheme in SCHEMES {
            for parts in [TrainedParts::Scales, TrainedParts::ScalesAndOffsets] {
                let before = packed(scheme);
                let dense = read(before.dequantize());
                let Ok(trained) = before.with_trained("w", parts) else {
                    assert!(scheme.starts_with("nf4") && parts == TrainedParts::ScalesAndOffsets, "{scheme}");
                    continue;
                };
                assert_close(scheme, &read(trained.dequantize()), &dense, 1e-6);
                let trained = trained.train();
                let x = tensor::<2>(5, [7, 64], &device);
                let seed = Tensor::<2>::from_inner(tensor::<2>(9, [7, 8], &Device::flex()));
                let found = (trained.forward(x.clone()) * seed.clone()).sum().backward();
                let plain = trained.dequantize_reference();
                let expected = (x.matmul(plain) * seed).sum().backward();
                let pairs = [Some(&trained.scales), trained.offsets.as_ref()];
                for param in pairs.into_iter().flatten() {
                    let gradient = |of| read(param.grad(of).expect("a gradient"));
                    assert_close(
                        &format!("{scheme} {parts:?}"),
                        &gradient(&found),
                        &gradient(&expected),
                        1e-4,
                    );
                }
                assert_eq!(trained.offsets.is_some(), parts == TrainedParts::ScalesAndOffsets);
            }
        }
    }

    /// Twice the scale is twice the weight: the zero point stays.
    #[test]
    fn offsets_follow_their_scales_and_settle() {
        for scheme in SCHEMES {
            let mut trained = packed(scheme).with_trained("w", TrainedParts::Scales).unwrap();
            let dense = read(trained.dequantize());
            trained.scales = trained.scales.map(|scales| scales.mul_scalar(2.0));
            let twice: Vec<f32> = dense.iter().map(|value| 2.0 * value).collect();
            let rows = read(trained.outputs(Tensor::from_data([3, 0], &Device::flex())).transpose());
            assert_close(scheme, &read(trained.dequantize()), &twice, 1e-5);
            let settled = trained.settled().unwrap();
            assert_close(scheme, &read(settled.dequantize()), &twice, 1e-5);
            let again = read(settled.outputs(Tensor::from_data([3, 0], &Device::flex())).transpose());
            assert_close(scheme, &rows, &again, 1e-6);
            assert!(!settled.scales.is_require_grad());
            settled.to_host().unwrap().validate("w").unwrap();
        }
    }

    #[test]
    fn a_scale_of_zero_leads_no_offset() {
        let mut host = packed("affine3:32").to_host().unwrap();
        let Scales::Plain(scales) = &mut host.scales else { unreachable!("affine scales are plain") };
        scales[1] = 0.0;
        let packed = PackedTensor::new(&host, &Device::flex());
        let error = packed.clone().with_trained("w", TrainedParts::Scales).unwrap_err().to_string();
        assert!(error.contains("block 1"), "{error}");
        assert!(packed.with_trained("w", TrainedParts::ScalesAndOffsets).is_ok());
    }
}
