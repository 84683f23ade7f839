//! From a configuration to adapters in a model's slots.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::{DType, Device, Tensor, TensorData};
use kiln_quant_core::Projection;

use crate::{
    Adapted, CONFIG_FILE, Dropout, DropoutClock, InitLoraWeights, Lora, PeftConfig, Result, Target, Targets,
    json_fields::Problem, lora::initial_values,
};

/// Values of A `[d_input, r]` and B `[r, d_output]`.
pub(crate) type Factors = [Vec<f32>; 2];

/// Gives each slot of one model its adapter.
///
/// ```no_run
/// # use burn::nn::Linear;
/// # use kiln_adapters::{Adapted, Error, Lora, LoraAttacher, PeftConfig, TargetModules};
/// # struct Model;
/// # impl Model {
/// #     fn slot_shapes(&self) -> Vec<(String, [usize; 2])> { vec![] }
/// #     fn try_map(self, _: impl FnMut(&str, Linear) -> Result<Adapted<Linear, Lora>, Error>) -> Result<Self, Error> {
/// #         Ok(self)
/// #     }
/// # }
/// # fn example(model: Model) -> Result<(), Error> {
/// let config = PeftConfig::new(16, 16.0, TargetModules::AllLinear);
/// let attacher = LoraAttacher::new(&config, &model.slot_shapes(), 42)?;
/// let model = model.try_map(|path, base| attacher.attach(path, base))?;
/// attacher.clock().train(true);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct LoraAttacher {
    config: PeftConfig,
    targets: Targets,
    source: Source,
    clock: DropoutClock,
}

#[derive(Debug)]
enum Source {
    Initial { seed: u64 },
    Stored(BTreeMap<String, Factors>),
}

impl LoraAttacher {
    /// New adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. `seed` decides the
    /// initial values and the dropout.
    ///
    /// # Errors
    /// A configuration that is out of range, asks for what isn't implemented, selects nothing, or has an entry without
    /// effect.
    pub fn new(config: &PeftConfig, slots: &[(String, [usize; 2])], seed: u64) -> Result<Self> {
        config.supported(Path::new(CONFIG_FILE))?;
        if config.init_lora_weights == InitLoraWeights::Orthogonal {
            let expected = "Kaiming, Random or Gaussian for new adapters";
            return Err(Problem::new("init_lora_weights", expected, "Orthogonal").argument());
        }
        let paths: Vec<&str> = slots.iter().map(|(path, _)| path.as_str()).collect();
        let targets = Targets::resolve(config, &paths, None)?.require_all()?;
        Ok(Self {
            config: config.clone(),
            targets,
            source: Source::Initial { seed },
            clock: DropoutClock::new(seed),
        })
    }

    /// Adapters with weights from a file, which were checked against the model.
    pub(crate) fn stored(
        config: PeftConfig,
        targets: Targets,
        factors: BTreeMap<String, Factors>,
        seed: u64,
    ) -> Self {
        Self { config, targets, source: Source::Stored(factors), clock: DropoutClock::new(seed) }
    }

    /// The configuration, to be saved with the adapters.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The selected modules, and the entries of a loaded configuration that have no effect on this model.
    pub fn targets(&self) -> &Targets {
        &self.targets
    }

    /// The clock of all dropouts: a trainer's to set.
    pub fn clock(&self) -> &DropoutClock {
        &self.clock
    }

    /// Puts the adapter of the slot `path`, if it gets one, on `base`, which is frozen. To be called before
    /// [`Module::train`](burn::module::Module::train).
    ///
    /// The adapter is in f32, on the base's device.
    ///
    /// # Errors
    /// A base of another shape than the weights that were loaded for it.
    pub fn attach<P: Projection>(&self, path: &str, base: P) -> Result<Adapted<P, Lora>> {
        let Some(target) = self.targets.get(path) else { return Ok(Adapted::new(base, None)) };
        let ([d_input, d_output], r) = (base.shape(), target.r);
        let [a, b] = self.factors(target, [d_input, d_output])?;
        let device = base.devices().into_iter().next().unwrap_or_default();
        let dropout = Dropout::new(self.config.lora_dropout, path, self.clock.clone());
        let (a, b) = (tensor(a, [d_input, r], &device), tensor(b, [r, d_output], &device));
        Ok(Adapted::new(base, Some(Lora::new(a, b, target.scaling, dropout))))
    }

    fn factors(&self, target: &Target, [d_input, d_output]: [usize; 2]) -> Result<Factors> {
        let (path, r) = (&target.path, target.r);
        let factors = match &self.source {
            Source::Initial { seed } => {
                initial_values(self.config.init_lora_weights, [d_input, d_output], r, *seed, path)
            }
            Source::Stored(factors) => factors.get(path).cloned(),
        };
        factors.filter(|[a, b]| a.len() == d_input * r && b.len() == r * d_output).ok_or_else(|| {
            let found = format!("[{d_input}, {d_output}]");
            Problem::new(path, "the shape that the attacher was made for", found).argument()
        })
    }
}

fn tensor(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}
