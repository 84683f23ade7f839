//! Adapters into the weights of whole models.

use burn::tensor::Tensor;
use kiln_adapters::{Adapted, Adapter, PackedMerge, RequantizeError, Result};
use kiln_models::{AnyModel, Slots};
use kiln_quant_core::{HostQuantizer, Plan, QuantLinear, Scheme};

/// The model without adapters, which are in the packed weights' offsets: codes and scales as they were, outputs the same
/// to rounding ([`PackedMerge`]). Dense linears take their adapters into the dense weight.
///
/// # Errors
/// The first linear that can't take its adapter exactly, by path, with the sizes that would fit.
pub fn merge_packed<A: PackedMerge>(
    model: AnyModel<Adapted<QuantLinear, A>>,
) -> Result<AnyModel<QuantLinear>> {
    model.try_map(|path, slot| slot.merge_packed(path))
}

/// The model without adapters; every linear that had one is dense. Rounds once, in the type of the base's dense weight.
pub fn merge_dense<A: Adapter>(model: AnyModel<Adapted<QuantLinear, A>>) -> AnyModel<QuantLinear> {
    let merged = model.try_map(|_, slot| {
        Ok::<_, std::convert::Infallible>(match slot.adapter {
            Some(_) => QuantLinear::Dense(slot.merge_dense()),
            None => slot.into_base(),
        })
    });
    match merged {
        Ok(model) => model,
        Err(never) => match never {},
    }
}

/// A model quantized again, and what that lost of each linear, by path.
pub type Requantized = (AnyModel<QuantLinear>, Vec<(String, RequantizeError)>);

/// The model without adapters, its adapted linears quantized again, and what that lost of each. **Lossy**: light
/// fine-tuning may drown in the rounding. `inputs` gives typical inputs `[rows, d_input]` of a linear, where there are
/// any, so that the loss of its outputs is measured too. Linears that `schemes` wants dense stay dense.
///
/// # Errors
/// As [`HostQuantizer::quantize`].
pub fn requantize<A: Adapter>(
    model: AnyModel<Adapted<QuantLinear, A>>,
    schemes: &Plan<Scheme>,
    quantizer: &dyn HostQuantizer,
    inputs: &mut dyn FnMut(&str) -> Option<Tensor<2>>,
) -> Result<Requantized> {
    let mut errors = Vec::new();
    let model = model.try_map(|path, slot| match schemes.get(path) {
        Scheme::Dense if slot.adapter.is_some() => Ok(QuantLinear::Dense(slot.merge_dense())),
        Scheme::Dense => Ok(slot.into_base()),
        Scheme::Packed(scheme) => {
            let (layer, error) = slot.requantize(path, scheme, quantizer, inputs(path))?;
            errors.extend(error.map(|error| (path.to_owned(), error)));
            Ok::<_, kiln_adapters::Error>(layer)
        }
    })?;
    Ok((model, errors))
}
