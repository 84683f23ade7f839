//! Errors of single projections' outputs, from second moments of their inputs.

use std::collections::HashMap;

use burn::tensor::Tensor;
use kiln_models::{CausalLm, Decoder, Keep, Probe, Slots, Tape, Windows};
use kiln_quant_core::{Projection, QuantLinear, to_host};

use super::{Error, Result};

/// `X^T X` of every projection's inputs in the original model.
///
/// # Memory
/// Four bytes for each pair of inputs of each projection.
#[derive(Debug, Clone)]
pub struct Moments {
    sums: HashMap<String, Tensor<2>>,
}

impl Moments {
    /// Runs the original on the windows, one at a time.
    ///
    /// # Errors
    /// [`Error::is_argument`] for windows that don't fit the model.
    pub fn measure(original: &Decoder<QuantLinear>, windows: &Windows) -> Result<Self> {
        windows.check(original)?;
        let tape = Tape::default();
        let model = original.clone().try_map(|path, base| Ok::<_, Error>(Probe::new(path, base, &tape)))?;
        let mut sums: HashMap<String, Tensor<2>> = HashMap::new();
        for tokens in windows.batches_of(1) {
            let context = model.context(&tokens, None)?;
            let mut x = model.embed(&context);
            for index in 0..model.num_blocks() {
                let (y, calls) = tape.record(Keep::Inputs, || model.block(index, x, &context, None));
                for call in calls {
                    let product = call.input.clone().transpose().matmul(call.input);
                    let sum = match sums.remove(&call.path) {
                        Some(sum) => sum + product,
                        None => product,
                    };
                    sums.insert(call.path, sum);
                }
                x = y;
            }
        }
        Ok(Self { sums })
    }

    /// `|| X (W - Q) ||² / || X W ||²` of a projection, in squared Frobenius norms.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a path that the model lacks.
    pub fn relative_error(&self, path: &str, original: &QuantLinear, quantized: &QuantLinear) -> Result<f64> {
        let sum = self.sums.get(path).ok_or_else(|| Error::argument(path, "a measured linear", "none"))?;
        let energy = |weight: Tensor<2>| -> Result<f64> {
            let products = (sum.clone().matmul(weight.clone()) * weight).sum_dim(0);
            Ok(to_host(path, products)?.into_iter().map(f64::from).sum())
        };
        let weight = original.weight();
        let (error, signal) = (energy(weight.clone() - quantized.weight())?, energy(weight)?);
        Ok(if signal > 0.0 { error.max(0.0) / signal } else { 0.0 })
    }
}
