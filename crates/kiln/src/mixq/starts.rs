//! The models that fine-tunes start from, where a method that looks at weights only starts them.

use std::collections::HashMap;

use kiln_adapters::AdapterConfig;
use kiln_calibration::{CalibrationConfig, Method};
use kiln_mixq_search::Plan;
use kiln_models::{Decoder, Slots, Windows};
use kiln_quant_core::{Plan as Schemes, QuantLinear, Scheme};

use super::{Error, Result, apply::scheme_of};
use crate::{AdaptedLinear, AdaptedModel, stages::calibrated};

/// Packed weights with their factors, each made once. What a method makes of a weight doesn't depend on the others, so that a
/// plan's model is put together from uniform ones.
pub(super) struct Starts {
    method: Method,
    adapters: AdapterConfig,
    windows: Windows,
    made: HashMap<(Scheme, usize), HashMap<String, AdaptedLinear>>,
}

impl Starts {
    /// # Errors
    /// [`Error::is_argument`] for methods that look at activations.
    pub(super) fn new(method: Method, adapters: AdapterConfig, windows: &Windows) -> Result<Self> {
        match method {
            Method::Loftq(_) | Method::Pissa { .. } => {
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

    /// `original` quantized by a plan, with the factors that make up for it.
    pub(super) fn model(&mut self, original: &Decoder<QuantLinear>, plan: &Plan) -> Result<AdaptedModel> {
        let mut settings = HashMap::new();
        for (path, setting) in plan.iter() {
            if setting.adapter.as_deref().is_some_and(|adapter| adapter != "lora") {
                return Err(Error::argument(path, "adapter lora, for a start of its own", "another"));
            }
            let rank = setting.rank.map_or(self.adapters.rank, |rank| rank as usize);
            let key = (scheme_of(path, setting)?, rank);
            self.make(original, key)?;
            settings.insert(path, key);
        }
        original.clone().try_map(|path, _| {
            let made = settings.get(path).and_then(|key| self.made.get(key)?.get(path));
            made.cloned().ok_or_else(|| Error::argument(path, "a setting", "none"))
        })
    }

    fn make(&mut self, original: &Decoder<QuantLinear>, key: (Scheme, usize)) -> Result<()> {
        if self.made.contains_key(&key) {
            return Ok(());
        }
        let (scheme, rank) = key;
        let mut adapters = self.adapters.clone();
        (adapters.rank, adapters.alpha) = (rank, adapters.alpha * rank as f64 / adapters.rank.max(1) as f64);
        let mut config = CalibrationConfig::new(self.method.clone(), Schemes::uniform(scheme));
        config.measured_windows = 0;
        let model = calibrated(original.clone(), &adapters, &config, &self.windows)?;
        let slots = model.slots().into_iter().map(|(path, slot)| (path, slot.clone())).collect();
        self.made.insert(key, slots);
        Ok(())
    }
}
