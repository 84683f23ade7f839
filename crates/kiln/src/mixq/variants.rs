//! A model's projections in every scheme that was asked for.

use std::collections::HashMap;

use kiln_calibration::Rounding;
use kiln_mixq_search::{Plan, Setting};
use kiln_models::{Decoder, Slots};
use kiln_quant_core::{QuantLinear, Scheme};

use super::{Error, Prunings, Result, apply::scheme_of, prunings::ratio_of};

/// A model with its projections' quantized variants, each made once: a plan's model shares them and costs no time.
///
/// # Memory
/// The model, and every projection in every scheme that a plan asked for.
#[derive(Debug)]
pub struct Variants {
    model: Decoder<QuantLinear>,
    rounding: Rounding,
    prunings: Option<Prunings>,
    /// By path; by scheme, and by the bits of a ratio.
    made: HashMap<String, HashMap<(Scheme, u64), QuantLinear>>,
}

impl Variants {
    /// Variants of a model's weights, which are the reference of all quality, be they dense or packed.
    pub fn new(model: Decoder<QuantLinear>) -> Self {
        Self { model, rounding: Rounding::default(), prunings: None, made: HashMap::new() }
    }

    /// The same with another quantizer.
    #[must_use]
    pub fn with_rounding(mut self, rounding: Rounding) -> Self {
        (self.rounding, self.made) = (rounding, HashMap::new());
        self
    }

    /// The same for plans that say how much of each block's heads and channels goes: `prunings` of this model.
    ///
    /// # Errors
    /// [`Error::is_argument`] for those of another model.
    pub fn with_prunings(mut self, prunings: Prunings) -> Result<Self> {
        let [expected, found] = [&self.model, prunings.original()].map(kiln_models::fingerprint);
        let (expected, found) = (expected?, found?);
        if expected != found {
            return Err(Error::argument("prunings", format!("those of the model {expected}"), found));
        }
        (self.prunings, self.made) = (Some(prunings), HashMap::new());
        Ok(self)
    }

    /// What plans may prune.
    pub fn prunings(&self) -> Option<&Prunings> {
        self.prunings.as_ref()
    }

    /// The model before quantization, cut as a plan says, and the plan without its ratios.
    ///
    /// # Errors
    /// As [`Prunings::apply`]; ratios where none may be chosen.
    pub fn cut(&self, plan: &Plan) -> Result<(Decoder<QuantLinear>, Plan)> {
        match &self.prunings {
            Some(prunings) => prunings.apply(plan),
            None => Ok((self.model.clone(), plan.clone())),
        }
    }

    /// The whole model cut by a setting's ratio.
    pub(super) fn model_of(&self, path: &str, setting: &Setting) -> Result<&Decoder<QuantLinear>> {
        match &self.prunings {
            Some(prunings) => prunings.model(path, setting),
            None => Ok(&self.model),
        }
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
        let (model, plain) = self.cut(plan)?;
        let settings: HashMap<&str, (Scheme, u64)> = plain
            .iter()
            .zip(plan.iter())
            .map(|((path, plain), (_, setting))| {
                Ok((path, (scheme_of(path, plain)?, ratio_of(setting).to_bits())))
            })
            .collect::<Result<_>>()?;
        let (made, rounding) = (&mut self.made, self.rounding);
        let mut known = 0;
        let model = model.try_map(|path, original| {
            let key = settings.get(path).ok_or_else(|| Error::argument(path, "a setting", "none"))?;
            known += 1;
            variant(made, rounding, path, original, *key)
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
        variant(&mut self.made, self.rounding, path, original.clone(), (scheme, 0f64.to_bits()))
    }
}

fn variant(
    made: &mut HashMap<String, HashMap<(Scheme, u64), QuantLinear>>,
    rounding: Rounding,
    path: &str,
    original: QuantLinear,
    key: (Scheme, u64),
) -> Result<QuantLinear> {
    let variants = made.entry(path.to_string()).or_default();
    if let Some(variant) = variants.get(&key) {
        return Ok(variant.clone());
    }
    let variant = original.requantized(path, &key.0, &*rounding.quantizer())?;
    variants.insert(key, variant.clone());
    Ok(variant)
}
