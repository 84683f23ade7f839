//! The models that fine-tunes start from, where a method that looks at weights only starts them.

use std::collections::HashMap;

use kiln_adapters::AdapterConfig;
use kiln_calibration::{CalibrationConfig, Method};
use kiln_distributed::Sharing;
use kiln_mixq_search::Plan;
use kiln_models::{Decoder, Slots, Windows};
use kiln_quant_core::{Plan as Schemes, QuantLinear, Scheme};

use super::{
    Error, Result, Variants,
    apply::{alpha_of, check_kinds, kind_of, scheme_of},
    prunings::ratio_of,
};
use crate::{AdaptedLinear, AdaptedModel, stages::calibrated};

/// Packed weights with their factors, each made once. What a method makes of a weight doesn't depend on the others, so that a
/// plan's model is put together from uniform ones.
pub(super) struct Starts {
    method: Method,
    adapters: AdapterConfig,
    windows: Windows,
    made: HashMap<Key, HashMap<String, AdaptedLinear>>,
}

/// A scheme, the plan's rank, where it has one, and the bits of a pruning ratio.
type Key = (Scheme, Option<u32>, u64);

impl Starts {
    /// # Errors
    /// [`Error::is_argument`] for methods that look at activations, and adapters other than LoRA and DoRA.
    pub(super) fn new(method: Method, adapters: AdapterConfig, windows: &Windows) -> Result<Self> {
        match method {
            Method::Loftq(_) | Method::Pissa { .. } => {
                kind_of(&adapters)?;
                Ok(Self { method, adapters, windows: windows.first(1), made: HashMap::new() })
            }
            other => Err(Error::argument(
                "start",
                "LoftQ or PiSSA, which look at weights only",
                format!("{other:?}"),
            )),
        }
    }

    /// Everything that decides a model but the plan.
    pub(super) fn describe(&self) -> String {
        format!("{:?} {:?}", self.method, self.adapters)
    }

    /// The original cut and quantized by a plan, with the factors that make up for the latter.
    pub(super) fn model(&mut self, variants: &Variants, plan: &Plan) -> Result<AdaptedModel> {
        check_kinds(plan, &self.adapters)?;
        let (model, plain) = variants.cut(plan)?;
        let mut settings = HashMap::new();
        for ((path, plain), (_, setting)) in plain.iter().zip(plan.iter()) {
            let key = (scheme_of(path, plain)?, setting.rank, ratio_of(setting).to_bits());
            self.make(variants.model_of(path, setting)?, key)?;
            settings.insert(path, key);
        }
        let mut known = 0;
        let model = model.try_map(|path, _| {
            known += 1;
            let made = settings.get(path).and_then(|key| self.made.get(key)?.get(path));
            made.cloned().ok_or_else(|| Error::argument(path, "a setting", "none"))
        })?;
        match settings.len() {
            found if found == known => Ok(model),
            found => Err(Error::argument("plan", format!("{known} paths of this model"), found)),
        }
    }

    fn make(&mut self, original: &Decoder<QuantLinear>, key: Key) -> Result<()> {
        if self.made.contains_key(&key) {
            return Ok(());
        }
        let (scheme, rank, _) = key;
        let mut adapters = self.adapters.clone();
        if let Some(rank) = rank {
            (adapters.rank, adapters.alpha) = (rank as usize, alpha_of(&self.adapters, rank));
            (adapters.rank_pattern, adapters.alpha_pattern) = (Vec::new(), Vec::new());
        }
        let mut config = CalibrationConfig::new(self.method.clone(), Schemes::uniform(scheme));
        config.measured_windows = 0;
        let model = calibrated(original.clone(), &adapters, &config, &self.windows, &Sharing::default())?;
        let slots = model.slots().into_iter().map(|(path, slot)| (path, slot.clone())).collect();
        self.made.insert(key, slots);
        Ok(())
    }
}
