//! Merging into a packed weight with loss, and how much is lost.

use burn::tensor::Tensor;
use kiln_quant_core::{
    HostQuantizer, PackedLinear, PackedTensor, Projection, QuantError, QuantLinear, QuantScheme, to_host,
};
use serde::{Deserialize, Serialize};

use crate::{Adapted, Adapter, Result};

/// What quantizing a merged weight again lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RequantizeError {
    /// Of the weight, against the dense merged one.
    pub weight: QuantError,
    /// Of the outputs, where inputs were given.
    pub output: Option<OutputError>,
}

/// How far a layer's outputs moved: `y` before, `z` after, `b` of the base without its adapter.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct OutputError {
    /// `‖z - y‖ / ‖y‖`.
    pub relative: f64,
    /// `‖z - y‖ / ‖y - b‖`: the share of the fine-tuning that drowns; infinite where the adapter does nothing.
    pub of_shift: f64,
}

impl<A: Adapter> Adapted<QuantLinear, A> {
    /// The layer alone, packed: merged densely, then quantized to `scheme`. Light fine-tuning may not survive it; the
    /// errors say. A layer without adapter stays as it is and has none.
    ///
    /// `inputs` `[rows, d_input]` are to be typical inputs of the layer. `path` is for errors.
    ///
    /// # Errors
    /// As [`HostQuantizer::quantize`].
    pub fn requantize(
        self,
        path: &str,
        scheme: &QuantScheme,
        quantizer: &dyn HostQuantizer,
        inputs: Option<Tensor<2>>,
    ) -> Result<(QuantLinear, Option<RequantizeError>)> {
        if self.adapter.is_none() {
            return Ok((self.base, None));
        }
        let merged = self.weight().without_autodiff();
        let (packed, weight) = PackedTensor::quantize_and_measure(path, merged, scheme, quantizer)?;
        let bias = self.base.bias_parameter().cloned();
        let layer = QuantLinear::Packed(PackedLinear { weight: packed, bias });
        let output = match inputs {
            Some(x) => {
                let [y, b] = [self.forward(x.clone()), self.base.forward(x.clone())];
                Some(output_error(path, layer.forward(x), y, b)?)
            }
            None => None,
        };
        Ok((layer, Some(RequantizeError { weight, output })))
    }
}

fn output_error(path: &str, z: Tensor<2>, y: Tensor<2>, b: Tensor<2>) -> Result<OutputError> {
    let (z, y, b) = (to_host(path, z)?, to_host(path, y)?, to_host(path, b)?);
    let distance = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
    };
    let lost = distance(&z, &y);
    let share = |of: f64| if lost == 0.0 { 0.0 } else { lost / of };
    let zero = vec![0.0; y.len()];
    Ok(OutputError { relative: share(distance(&y, &zero)), of_shift: share(distance(&y, &b)) })
}
