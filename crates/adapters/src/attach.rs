//! From a configuration to adapters in a model's slots.

use std::{collections::BTreeMap, marker::PhantomData};

use kiln_quant_core::{
    Projection, QuantLinear, Slots,
    random::{Purpose, generator, path_hash},
};

use crate::{
    Adapted, AdapterConfig, AdapterKind, AnyAdapter, Core, Dora, Dropout, InitLoraWeights, Lora, Method,
    PooledAdapter, Result, Target, Targets,
    any::tensor,
    json_fields::Problem,
    lora,
    outline::Outline,
    outside::Outside,
    part::{Description, Part, Parts},
    residual::split,
};

/// Gives each slot of one model its adapter of kind `A`.
///
/// ```no_run
/// # use burn::nn::Linear;
/// # use kiln_adapters::{Adapted, AdapterConfig, Error, Lora, LoraAttacher};
/// # struct Model;
/// # impl Model {
/// #     fn slot_shapes(&self) -> Vec<(String, [usize; 2])> { vec![] }
/// #     fn try_map(self, _: impl FnMut(&str, Linear) -> Result<Adapted<Linear, Lora>, Error>) -> Result<Self, Error> {
/// #         Ok(self)
/// #     }
/// # }
/// # fn example(model: Model) -> Result<(), Error> {
/// let attacher = LoraAttacher::new(&AdapterConfig::lora(16, 16.0), &model.slot_shapes())?;
/// let model = model.try_map(|path, base| attacher.attach(path, base))?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Attacher<A> {
    config: AdapterConfig,
    targets: Targets,
    source: Source,
    outside: Outside,
    kind: PhantomData<fn() -> A>,
}

/// Attaches LoRA adapters.
pub type LoraAttacher = Attacher<Lora>;

/// Attaches adapters of whatever kind the configuration asks for.
pub type AnyAttacher = Attacher<AnyAdapter>;

#[derive(Debug)]
enum Source {
    Initial,
    Stored(BTreeMap<String, Parts>),
}

impl<A: AdapterKind> Attacher<A> {
    /// New adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`.
    ///
    /// # Errors
    /// A configuration that is out of range, asks for another kind or for what isn't implemented, selects nothing, has
    /// an entry without effect, or a size that doesn't divide a selected layer's.
    pub fn new(config: &AdapterConfig, slots: &[(String, [usize; 2])]) -> Result<Self> {
        Self::of(config, &slots.into())
    }

    /// New adapters for `model`, with what they train outside its slots: [`attach_outside`](Self::attach_outside) puts
    /// that into the model after [`attach`](Self::attach) filled the slots.
    ///
    /// # Errors
    /// As [`new`](Self::new), and modules that are to be trained whole and aren't there, or are slots; tokens that the model
    /// doesn't have.
    pub fn for_model<M: Slots>(config: &AdapterConfig, model: &M) -> Result<Self> {
        Self::of(config, &Outline::of(model))
    }

    fn of(config: &AdapterConfig, outline: &Outline) -> Result<Self> {
        A::accept(config)?;
        if config.method.init() == InitLoraWeights::Orthogonal {
            let expected = "Kaiming, Random, Gaussian, Pissa or Olora for new adapters";
            return Err(Problem::new("init", expected, "Orthogonal").argument());
        }
        let targets = config.select(outline)?.require_all()?;
        let outside = Outside::new(config, outline, &targets)?;
        Ok(Self { config: config.clone(), targets, source: Source::Initial, outside, kind: PhantomData })
    }

    /// Adapters with weights from a file, which were checked against the model.
    pub(crate) fn stored(
        config: AdapterConfig,
        targets: Targets,
        parts: BTreeMap<String, Parts>,
        outside: Outside,
    ) -> Self {
        let config = AdapterConfig { save_tables: outside.has_frozen_tables(), ..config };
        Self { config, targets, source: Source::Stored(parts), outside, kind: PhantomData }
    }

    /// Whether something outside the slots is trained or replaced.
    pub fn acts_outside(&self) -> bool {
        !self.outside.is_empty()
    }

    /// Puts what is trained outside the slots into `model`, a clone of the one that the attacher was made for or that one with
    /// other slots, whose parameters are frozen.
    ///
    /// # Errors
    /// An initialisation that isn't made for embedding and head.
    ///
    /// # Panics
    /// If the model has other tables.
    pub fn attach_outside<M: Slots>(&self, model: M) -> Result<M> {
        self.outside.attach(model, &self.config)
    }

    /// The configuration, to be saved with the adapters.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The selected modules, and the entries of a loaded configuration that have no effect on this model.
    pub fn targets(&self) -> &Targets {
        &self.targets
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
        if self.config.method.init().changes_base() {
            let expected = "an initialisation that leaves the base as it is, or a base that can be replaced";
            return Err(Problem::new("init", expected, self.config.method.init()).argument());
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
        let init = self.config.method.init();
        let Some(target) = self.targets.get(path).filter(|_| init.changes_base()) else {
            return self.attach(path, base);
        };
        let seed = match &self.source {
            Source::Initial => Some(self.config.seed),
            Source::Stored(_) => None,
        };
        let description = self.config.describe(target, base.shape());
        let (base, first) = split(init, target, base, seed)?;
        let parts = match &self.source {
            Source::Initial => vec![(Part::A, first.a), (Part::B, first.b)],
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
        let dropout = Dropout::new(self.config.dropout, &target.path, self.config.seed);
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
            (Method::Dora { .. }, Some(a), Some(b), _) => {
                let magnitude = magnitude.map(|row| row.squeeze_dim(0));
                AnyAdapter::Dora(Dora::new(&base, a, b, magnitude, scaling, dropout))
            }
            (Method::Lora { .. }, Some(a), Some(b), _) => AnyAdapter::Lora(Lora::new(a, b, scaling, dropout)),
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
            Source::Initial => self.initial(path, shape, *r, &layout),
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

    /// Values before training; `None` for rules that aren't implemented.
    fn initial(
        &self,
        path: &str,
        shape: [usize; 2],
        r: usize,
        layout: &[(Part, [usize; 2])],
    ) -> Option<Parts> {
        let (method, seed) = (&self.config.method, self.config.seed);
        if let Method::Lora { init } | Method::Dora { init } = *method {
            let [a, b] = lora::initial_values(init, shape, r, seed, path)?;
            return Some(vec![(Part::A, a), (Part::B, b)]);
        }
        let mut rng = generator(Purpose::Initialization, seed, path_hash(path), 0, 0);
        Some(layout.iter().map(|(part, size)| (*part, method.initial(*part, *size, &mut rng))).collect())
    }

    fn misfit(&self, path: &str, [d_input, d_output]: [usize; 2]) -> crate::Error {
        let found = format!("[{d_input}, {d_output}]");
        Problem::new(path, "the shape that the attacher was made for", found).argument()
    }
}
