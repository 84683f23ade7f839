//! A model's projections in every scheme that was asked for.

use std::collections::HashMap;

use kiln_calibration::Rounding;
use kiln_mixq_search::Plan;
use kiln_models::{Decoder, Slots};
use kiln_quant_core::{QuantLinear, Scheme};

use super::{Error, Result, apply::scheme_of};

/// A model with its projections' quantized variants, each made once: a plan's model shares them and costs no time.
///
/// # Memory
/// The model, and every projection in every scheme that a plan asked for.
#[derive(Debug)]
pub struct Variants {
    model: Decoder<QuantLinear>,
    rounding: Rounding,
    made: HashMap<String, HashMap<Scheme, QuantLinear>>,
}

impl Variants {
    /// Variants of a model's weights, which are the reference of all quality, be they dense or packed.
    pub fn new(model: Decoder<QuantLinear>) -> Self {
        Self { model, rounding: Rounding::default(), made: HashMap::new() }
    }

    /// The same with another quantizer.
    #[must_use]
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        (self.rounding, self.made) = (rounding, HashMap::new());
        self
    }

    /// The model as it came.
    pub fn original(&self) -> &Decoder<QuantLinear> {
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
    pub fn model(&mut self, plan: &Plan) -> Result<Decoder<QuantLinear>> {
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
        let original = self.model.slots().into_iter().find(|(known, _)| known == path);
        let (_, original) =
            original.ok_or_else(|| Error::argument(path, "a linear of the model's blocks", "none"))?;
        variant(&mut self.made, self.rounding, path, original.clone(), scheme)
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
    let variant = original.requantized(path, &scheme, &*rounding.quantizer())?;
    variants.insert(scheme, variant.clone());
    Ok(variant)
}
