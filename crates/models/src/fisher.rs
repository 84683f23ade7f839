//! The diagonal of the empirical Fisher information.

use std::collections::HashMap;

use burn::{
    module::{Module, Param},
    nn::Linear,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::Tensor,
};
use kiln_quant_core::{Projection, QuantLinear, Slots};

use crate::{
    Decoder, DriverOptions, Error, Recompute, Result, Targets, TokenBatch, Windows, loss_and_gradients,
};

/// The mean over windows of the squared gradient of a window's loss, for every weight of the blocks' linears: by path,
/// `[d_input, d_output]`. A window's loss is the sum over its tokens.
///
/// # Memory
/// Three times the dense weights while it is measured, once afterwards.
///
/// # Errors
/// Windows that don't fit the model.
pub fn squared_gradients(
    model: &Decoder<QuantLinear>,
    windows: &Windows,
) -> Result<HashMap<String, Tensor<2>>> {
    windows.check(model)?;
    let trained = model.clone().try_map(|_, slot| {
        let bias = slot.bias_parameter().cloned();
        Ok::<_, Error>(Linear { weight: Param::from_tensor(slot.weight()), bias })
    })?;
    let trained = trained.train();
    let options = DriverOptions { recompute: Recompute::Block, ..DriverOptions::default() };
    let mut squares: HashMap<String, Tensor<2>> = HashMap::new();
    for window in windows.as_slice() {
        let mut gradients = GradientsAccumulator::new();
        let ids: Vec<u32> = window[1..].iter().copied().chain([0]).collect();
        let scored: Vec<bool> = (0..ids.len()).map(|place| place + 1 < ids.len()).collect();
        let tokens = TokenBatch::new(std::slice::from_ref(window))?;
        let targets = Targets { ids: &ids, scored: &scored };
        loss_and_gradients(&trained, &tokens, targets, &options, &mut gradients)?;
        let gradients: GradientsParams = gradients.grads();
        for (path, linear) in trained.slots() {
            if let Some(gradient) = gradients.get::<2>(linear.weight.id) {
                let square = gradient.powi_scalar(2) / windows.count() as f64;
                let sum = match squares.remove(&path) {
                    Some(sum) => sum + square,
                    None => square,
                };
                squares.insert(path, sum);
            }
        }
    }
    Ok(squares)
}
