//! A model's projections in every scheme that was asked for.

use std::collections::HashMap;

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{DType, Tensor},
};
use kiln_calibration::Rounding;
use kiln_mixq_search::Plan;
use kiln_models::{AnyModel, Slots};
use kiln_quant_core::{PackedLinear, PackedTensor, Projection, QuantLinear, Scheme};

use super::{Error, Result, apply::scheme_of};

/// A model with its projections' quantized variants, each made once: a plan's model shares them and costs no time.
///
/// # Memory
/// The model, and every projection in every scheme that a plan asked for.
#[derive(Debug)]
pub struct Variants {
    model: AnyModel<QuantLinear>,
    rounding: Rounding,
    made: HashMap<String, HashMap<Scheme, QuantLinear>>,
}

impl Variants {
    /// Variants of a model's weights, which are the reference of all quality, be they dense or packed.
    pub fn new(model: AnyModel<QuantLinear>) -> Self {
        Self { model, rounding: Rounding::default(), made: HashMap::new() }
    }

    /// The same with another quantizer.
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        (self.rounding, self.made) = (rounding, HashMap::new());
        self
    }

    /// The model as it came.
    pub fn original(&self) -> &AnyModel<QuantLinear> {
        &self.model
    }

    /// The quantizer.
    pub fn rounding(&self) -> Rounding {
        self.rounding
    }

    /// The model quantized by a plan; tensors are shared.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a plan that isn't of this model; what the quantizer refuses.
    pub fn model(&mut self, plan: &Plan) -> Result<AnyModel<QuantLinear>> {
        let settings: HashMap<&str, Scheme> = plan
            .iter()
            .map(|(path, setting)| Ok((path, scheme_of(path, setting)?)))
            .collect::<Result<_>>()?;
        let (made, rounding) = (&mut self.made, self.rounding);
        let mut known = 0;
        let model = self.model.clone().try_map(|path, original| {
            let scheme = settings.get(path).ok_or_else(|| Error::argument(path, "a setting", "none"))?;
            known += 1;
            variant(made, rounding, path, original, *scheme)
        })?;
        match settings.len() {
            found if found == known => Ok(model),
            found => Err(Error::argument("plan", format!("{known} paths of this model"), found)),
        }
    }

    /// One projection in one scheme.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a path that the model lacks; what the quantizer refuses.
    pub fn projection(&mut self, path: &str, scheme: Scheme) -> Result<QuantLinear> {
        let original = self.projection_of_original(path)?;
        variant(&mut self.made, self.rounding, path, original, scheme)
    }

    fn projection_of_original(&self, path: &str) -> Result<QuantLinear> {
        let mut found = None;
        self.model.for_each_slot(|known, slot| {
            if known == path {
                found = Some(slot.clone());
            }
        });
        found.ok_or_else(|| Error::argument(path, "a linear of the model's blocks", "none"))
    }
}

fn variant(
    made: &mut HashMap<String, HashMap<Scheme, QuantLinear>>,
    rounding: Rounding,
    path: &str,
    original: QuantLinear,
    scheme: Scheme,
) -> Result<QuantLinear> {
    let variants = made.entry(path.to_string()).or_default();
    if let Some(variant) = variants.get(&scheme) {
        return Ok(variant.clone());
    }
    let variant = make(rounding, path, original, scheme)?;
    variants.insert(scheme, variant.clone());
    Ok(variant)
}

fn make(rounding: Rounding, path: &str, original: QuantLinear, scheme: Scheme) -> Result<QuantLinear> {
    let [d_input, d_output] = original.shape();
    let bias = match &original {
        QuantLinear::Packed(linear) => linear.bias.clone(),
        QuantLinear::Dense(linear) => linear.bias.clone(),
    };
    match (scheme, original) {
        (Scheme::Dense, dense @ QuantLinear::Dense(_)) => Ok(dense),
        (Scheme::Dense, packed) => {
            let weight = Param::initialized(ParamId::new(), packed.weight());
            Ok(QuantLinear::Dense(Linear { weight, bias }))
        }
        (Scheme::Packed(scheme), original) => {
            let weight = original.weight();
            let device = weight.device();
            // As checkpoints store it.
            let values = host(path, weight.transpose())?;
            let packed = rounding.quantizer().quantize(path, &values, d_input, d_output, &scheme)?;
            Ok(QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&packed, &device), bias }))
        }
    }
}

/// A tensor's values in host memory.
pub(super) fn host<const D: usize>(name: &str, tensor: Tensor<D>) -> Result<Vec<f32>> {
    let data = tensor.into_data();
    let data = if data.dtype() == DType::F32 { data } else { data.convert::<f32>() };
    data.try_into_vec().map_err(|error| Error::argument(name, "values that can be read as f32", error))
}
