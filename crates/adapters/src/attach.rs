//! From a configuration to adapters in a model's slots.

use std::{collections::BTreeMap, marker::PhantomData};

use kiln_quant_core::{Projection, QuantLinear};

use crate::{
    Adapted, AdapterConfig, AdapterKind, AnyAdapter, Core, Dora, Dropout, DropoutClock, InitLoraWeights,
    Lora, Method, PeftConfig, PooledAdapter, Result, Target, Targets,
    any::tensor,
    json_fields::Problem,
    lora,
    part::{Description, Part, Parts},
    random::{Purpose, generator, path_hash},
    residual::split,
};

/// Gives each slot of one model its adapter of kind `A`.
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
pub struct Attacher<A> {
    config: AdapterConfig,
    targets: Targets,
    source: Source,
    clock: DropoutClock,
    kind: PhantomData<fn() -> A>,
}

/// Attaches LoRA adapters.
pub type LoraAttacher = Attacher<Lora>;

/// Attaches adapters of whatever kind the configuration asks for.
pub type AnyAttacher = Attacher<AnyAdapter>;

#[derive(Debug)]
enum Source {
    Initial { seed: u64 },
    Stored(BTreeMap<String, Parts>),
}

impl<A: AdapterKind> Attacher<A> {
    /// New adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. `seed` decides the
    /// initial values and the dropout.
    ///
    /// # Errors
    /// A configuration that is out of range, asks for another kind or for what isn't implemented, selects nothing, has
    /// an entry without effect, or a size that doesn't divide a selected layer's.
    pub fn new<C: Clone + Into<AdapterConfig>>(
        config: &C,
        slots: &[(String, [usize; 2])],
        seed: u64,
    ) -> Result<Self> {
        let config: AdapterConfig = config.clone().into();
        A::accept(&config)?;
        if config.lora.init_lora_weights == InitLoraWeights::Orthogonal {
            let expected = "Kaiming, Random, Gaussian, Pissa or Olora for new adapters";
            return Err(Problem::new("init_lora_weights", expected, "Orthogonal").argument());
        }
        let mut checked = config.clone();
        if let InitLoraWeights::Pissa { iterations } = &mut checked.lora.init_lora_weights {
            // Files can't hold what started at random; new adapters can.
            *iterations = None;
        }
        let targets = checked.targets(slots)?.require_all()?;
        Ok(Self::from_source(config, targets, Source::Initial { seed }, seed))
    }

    /// Adapters with weights from a file, which were checked against the model.
    pub(crate) fn stored(
        config: AdapterConfig,
        targets: Targets,
        parts: BTreeMap<String, Parts>,
        seed: u64,
    ) -> Self {
        Self::from_source(config, targets, Source::Stored(parts), seed)
    }

    fn from_source(config: AdapterConfig, targets: Targets, source: Source, seed: u64) -> Self {
        Self { config, targets, source, clock: DropoutClock::new(seed), kind: PhantomData }
    }

    /// The options under PEFT's names, to be saved with LoRA adapters.
    pub fn config(&self) -> &PeftConfig {
        &self.config.lora
    }

    /// The whole configuration, to be saved with adapters of any kind.
    pub fn adapter_config(&self) -> &AdapterConfig {
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
    /// A base of another shape than the weights that were loaded for it, and an initialisation that changes the base:
    /// those need [`attach_to_residual`](Self::attach_to_residual).
    pub fn attach<P: Projection>(&self, path: &str, base: P) -> Result<Adapted<P, A>> {
        let Some(target) = self.targets.get(path) else { return Ok(Adapted::new(base, None)) };
        if self.config.lora.init_lora_weights.changes_base() {
            let expected = "an initialisation that leaves the base as it is, or a base that can be replaced";
            let found = self.config.lora.to_json()["init_lora_weights"].to_string();
            return Err(Problem::new("init_lora_weights", expected, found).argument());
        }
        let description = self.config.describe(target, base.shape());
        let parts = self.parts(target, &description, base.shape())?;
        self.adapted(target, &description, parts, base)
    }

    /// As [`attach`](Self::attach); for PiSSA and OLoRA the base's weight is replaced by what the adapter's first
    /// values leave of it, on packed bases rounded to their scheme.
    ///
    /// # Errors
    /// As [`attach`](Self::attach); a rank above the smaller size of the weight, a scaling that isn't positive, and
    /// what [`QuantLinear::with_weight`] refuses.
    pub fn attach_to_residual(&self, path: &str, base: QuantLinear) -> Result<Adapted<QuantLinear, A>> {
        let init = self.config.lora.init_lora_weights;
        let Some(target) = self.targets.get(path).filter(|_| init.changes_base()) else {
            return self.attach(path, base);
        };
        let seed = match &self.source {
            Source::Initial { seed } => Some(*seed),
            Source::Stored(_) => None,
        };
        let description = self.config.describe(target, base.shape());
        let (base, first) = split(init, target, base, seed)?;
        let parts = match &self.source {
            Source::Initial { .. } => vec![(Part::A, first.a), (Part::B, first.b)],
            Source::Stored(_) => self.parts(target, &description, base.shape())?,
        };
        self.adapted(target, &description, parts, base)
    }

    fn adapted<P: Projection>(
        &self,
        target: &Target,
        description: &Description,
        parts: Parts,
        base: P,
    ) -> Result<Adapted<P, A>> {
        let device = base.devices().into_iter().next().unwrap_or_default();
        let dropout = Dropout::new(self.config.lora.lora_dropout, &target.path, self.clock.clone());
        let shapes = description.parts(base.shape());
        let [mut a, mut b, mut h, mut magnitude] = [const { None }; 4];
        for ((part, values), (_, shape)) in parts.into_iter().zip(shapes) {
            let slot = match part {
                Part::A => &mut a,
                Part::B => &mut b,
                Part::H => &mut h,
                Part::Magnitude => &mut magnitude,
            };
            *slot = Some(tensor(values, shape, &device));
        }
        let (geometry, scaling) = (description.geometry, description.scaling);
        let pooled = |core| {
            let sizes = [geometry.pool, geometry.repeat];
            AnyAdapter::Pooled(PooledAdapter::new(core, sizes, geometry.pooling, scaling, dropout.clone()))
        };
        let adapter = match (self.config.method, a, b, h) {
            (Method::Lora, Some(a), Some(b), _) if description.magnitudes => {
                let magnitude = magnitude.map(|row| row.squeeze_dim(0));
                AnyAdapter::Dora(Dora::new(&base, a, b, magnitude, scaling, dropout))
            }
            (Method::Lora, Some(a), Some(b), _) => AnyAdapter::Lora(Lora::new(a, b, scaling, dropout)),
            (_, Some(a), Some(b), _) => pooled(Core::low_rank(a, b)),
            (_, _, _, Some(h)) => pooled(Core::full(h)),
            _ => return Err(self.misfit(&target.path, base.shape())),
        };
        let adapter = A::from_any(adapter).ok_or_else(|| self.misfit(&target.path, base.shape()))?;
        Ok(Adapted::new(base, Some(adapter)))
    }

    /// The values of a slot's adapter; of new magnitudes none, since the base has them.
    fn parts(&self, target: &Target, description: &Description, shape: [usize; 2]) -> Result<Parts> {
        let Target { path, r, .. } = target;
        if let Some(problem) = self.config.method.problem(path, shape, *r) {
            return Err(problem.argument());
        }
        let layout = description.parts(shape);
        let parts = match &self.source {
            Source::Initial { seed } if self.config.method == Method::Lora => {
                let init = self.config.lora.init_lora_weights;
                let factors = lora::initial_values(init, shape, *r, *seed, path);
                factors.map(|[a, b]| vec![(Part::A, a), (Part::B, b)])
            }
            Source::Initial { seed } => {
                let mut rng = generator(Purpose::Initialization, *seed, path_hash(path), 0, 0);
                let initial =
                    |(part, size): &(Part, _)| (*part, self.config.method.initial(*part, *size, &mut rng));
                Some(layout.iter().map(initial).collect())
            }
            Source::Stored(stored) => stored.get(path).cloned(),
        };
        let fits = |parts: &Parts| {
            let mut pairs = parts.iter().zip(&layout);
            pairs.all(|((part, values), (expected, [rows, columns]))| {
                part == expected && values.len() == rows * columns
            })
        };
        parts.filter(fits).ok_or_else(|| self.misfit(path, shape))
    }

    fn misfit(&self, path: &str, [d_input, d_output]: [usize; 2]) -> crate::Error {
        let found = format!("[{d_input}, {d_output}]");
        Problem::new(path, "the shape that the attacher was made for", found).argument()
    }
}
