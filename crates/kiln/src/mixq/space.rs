//! From a model to its search space.

use kiln_mixq_search::{
    Choice, Cost, Granularity, MemoryAxis, MemoryModel, SearchSpace, Setting, Slot, SpaceBuilder, Unit,
};
use kiln_models::{
    Decoder, Recompute, Slots,
    config::{LayerShape, ModelConfig},
    memory::{Halves, ProcessConstants, Step, Work, estimate},
};
use kiln_quant_core::{PathPattern, Projection, QuantLinear, Scheme};

use super::{Error, Prunings, Result, prunings::ratio_of};

/// Bytes of an adapter's value at rest in training: itself and AdamW's two averages. Its gradient exists for a part of
/// the step only and is in the estimate of what moves.
const TRAINED_BYTES: u64 = 12;

/// What a plan may choose.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `schemes` | required | weight formats |
/// | `granularity` | layer | projections that decide together |
/// | `ranks` | not searched | ranks of the adapters |
/// | `adapters` | not searched | `lora`, `dora` |
/// | `prunings` | not searched | the model cut by several ratios, of which each block's heads and channels choose one; storage only |
/// | `frozen` | none | projections with a fixed scheme: of several patterns that match the first counts |
/// | `training` | none | the training step whose memory counts on the axes but storage |
/// | `axis` | storage | which memory is traded against quality |
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Choices {
    /// Weight formats.
    pub schemes: Vec<Scheme>,
    /// Projections that decide together.
    pub granularity: Granularity,
    /// Ranks of the adapters; empty leaves them to the training.
    pub ranks: Vec<u32>,
    /// Kinds of adapters; empty leaves them to the training.
    pub adapters: Vec<String>,
    /// The model cut by several ratios.
    pub prunings: Option<Prunings>,
    /// Projections with a fixed scheme.
    pub frozen: Vec<(PathPattern, Scheme)>,
    /// The training step.
    pub training: Option<TrainingShape>,
    /// Which memory counts.
    pub axis: MemoryAxis,
}

/// A LoRA training step on all linears of the blocks, for its memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainingShape {
    /// Rank of the adapters where it isn't searched.
    pub rank: u32,
    /// Rows, tokens, what is computed again, and what is kept in 16 bits ([`Halves::of`] a model like those that are searched).
    pub step: Step,
    /// What the process holds beside a step's tensors, part of the peak: [`ProcessConstants::CPU`], or a base of 0 and a
    /// slack of 1 for live bytes alone.
    pub process: ProcessConstants,
}

impl Choices {
    /// These formats for each layer, storage against quality.
    pub fn new(schemes: impl IntoIterator<Item = Scheme>) -> Self {
        Self {
            schemes: schemes.into_iter().collect(),
            granularity: Granularity::default(),
            ranks: Vec::new(),
            adapters: Vec::new(),
            prunings: None,
            frozen: Vec::new(),
            training: None,
            axis: MemoryAxis::Storage,
        }
    }

    /// The same with another granularity.
    #[must_use]
    pub fn with_granularity(mut self, granularity: Granularity) -> Self {
        self.granularity = granularity;
        self
    }

    /// The same with a training step, and the axis that counts.
    #[must_use]
    pub fn with_training(mut self, training: TrainingShape, axis: MemoryAxis) -> Self {
        (self.training, self.axis) = (Some(training), axis);
        self
    }

    /// The same with a pruning ratio for each block's heads and channels, of those that `prunings` were made with.
    #[must_use]
    pub fn with_prunings(mut self, prunings: Prunings) -> Self {
        self.prunings = Some(prunings);
        self
    }

    fn check(&self) -> Result<()> {
        if self.prunings.is_some() && self.axis != MemoryAxis::Storage {
            let found = format!("{:?}", self.axis);
            return Err(Error::argument("Choices.axis", "storage, where pruning ratios are searched", found));
        }
        if self.axis != MemoryAxis::Storage && self.training.is_none() {
            let found = format!("none for the axis {:?}", self.axis);
            return Err(Error::argument("Choices.training", "a training step", found));
        }
        if self.axis == MemoryAxis::Storage && !(self.ranks.is_empty() && self.adapters.is_empty()) {
            let expected = "an axis that counts training, where ranks or adapters are searched";
            return Err(Error::argument("Choices.axis", expected, "storage, on which they all cost nothing"));
        }
        if let Some(rank) = self.ranks.iter().find(|rank| **rank == 0) {
            return Err(Error::argument("Choices.ranks", "at least 1", rank));
        }
        match self.adapters.iter().find(|kind| !["lora", "dora"].contains(&kind.as_str())) {
            Some(kind) => Err(Error::argument("Choices.adapters", "lora or dora", kind)),
            None => Ok(()),
        }
    }

    fn frozen(&self, path: &str) -> Option<Scheme> {
        self.frozen.iter().find(|(pattern, _)| pattern.matches(path)).map(|(_, scheme)| *scheme)
    }

    /// Bytes and trained values of a setting at a projection.
    fn cost(&self, slot: &Slot, setting: &Setting) -> Result<Cost> {
        let rank = setting.rank.or(self.training.map(|training| training.rank)).unwrap_or(0) as u64;
        let magnitudes = if setting.adapter.as_deref() == Some("dora") { slot.d_output as u64 } else { 0 };
        let ([d_input, d_output], bias) = match &self.prunings {
            Some(prunings) => {
                let linear = prunings.linear(&slot.path, setting)?;
                (linear.shape(), bias_bytes(linear))
            }
            None => ([slot.d_input, slot.d_output], 0),
        };
        Ok(Cost {
            storage: (weight_bytes(setting.scheme.parse()?, d_input, d_output) + bias) as u64,
            trained: rank * (slot.d_input + slot.d_output) as u64 + magnitudes,
        })
    }
}

/// Bytes of a bias, which narrows with the outputs.
fn bias_bytes(linear: &QuantLinear) -> usize {
    linear.bias().map_or(0, |bias| 4 * bias.dims()[0])
}

fn weight_bytes(scheme: Scheme, d_input: usize, d_output: usize) -> usize {
    match scheme {
        Scheme::Dense => 4 * d_input * d_output,
        Scheme::Packed(scheme) => scheme.storage_bytes(d_input, d_output),
    }
}

/// The space of a model: every linear of its blocks, with the bytes that each scheme takes as loaded; the bytes of
/// everything else are the model's own. Sizes are the model's, so a pruned one is counted as it is.
///
/// Storage is [`StorageReport`](kiln_quant_core::StorageReport)'s: a plan's bytes are those of the checkpoint loaded
/// with [`load_options`](super::load_options). The peak is that of
/// [`kiln_models::memory`], process and allocator included; its activations hardly depend on the bits.
///
/// # Errors
/// [`Error::is_argument`] for choices out of range; [`kiln_mixq_search::Error::Space`] if there is nothing to choose.
pub fn space_of(model: &Decoder<QuantLinear>, choices: &Choices) -> Result<SearchSpace> {
    choices.check()?;
    let (mut open, mut fixed_units, mut weights) = (Vec::new(), Vec::new(), 0);
    for (path, linear) in model.slots() {
        let path = path.as_str();
        let [d_input, d_output] = linear.shape();
        weights += linear.storage_bytes();
        if choices.prunings.is_some() {
            weights += bias_bytes(linear);
        }
        let slot = Slot::new(path, d_input, d_output);
        let frozen = if model.stays_dense(path) { Some(Scheme::Dense) } else { choices.frozen(path) };
        match frozen {
            Some(scheme) => fixed_units.push((slot, scheme)),
            None => open.push(slot),
        }
    }
    let slots = model.slot_shapes();
    let matched = |pattern: &PathPattern| slots.iter().any(|(path, _)| pattern.matches(path));
    if let Some((pattern, _)) = choices.frozen.iter().find(|(pattern, _)| !matched(pattern)) {
        let expected = "patterns of linears of the model's blocks";
        return Err(Error::argument(
            "Choices.frozen",
            expected,
            format!("\"{pattern}\", which matches none"),
        ));
    }
    let rest = model.stored_bytes().saturating_sub(weights);
    let memory = memory_model(model.config(), rest as u64, choices)?;
    let mut units = if open.is_empty() { Vec::new() } else { open_units(open, &memory, choices)? };
    for (slot, scheme) in fixed_units {
        let setting = Setting::scheme(scheme.to_string());
        let cost = choices.cost(&slot, &setting)?;
        let (name, paths) = (slot.path.clone(), vec![slot.path]);
        units.push(Unit { name, paths, choices: vec![Choice { setting, cost }] });
    }
    if let Some(prunings) = &choices.prunings {
        decide_together(prunings, &units)?;
        for unit in &mut units {
            let Unit { paths, choices, .. } = unit;
            choices.retain(|choice| prunings.tells_apart(paths, ratio_of(&choice.setting)));
        }
    }
    Ok(SearchSpace::new(units, memory)?)
}

/// Fails where linears that lose heads or channels together could be told to lose different ones.
fn decide_together(prunings: &Prunings, units: &[Unit]) -> Result<()> {
    for paths in prunings.groups().into_values() {
        let holds = |unit: &&Unit| unit.paths.iter().any(|path| path == paths[0]);
        let unit = units.iter().find(holds);
        if let Some(other) =
            paths.iter().find(|path| !unit.is_some_and(|unit| unit.paths.iter().any(|known| known == *path)))
        {
            let expected =
                format!("a granularity, and nothing frozen, with which {} decides for it", paths[0]);
            return Err(Error::argument(*other, expected, "a unit of its own"));
        }
    }
    Ok(())
}

fn open_units(slots: Vec<Slot>, memory: &MemoryModel, choices: &Choices) -> Result<Vec<Unit>> {
    let builder = SpaceBuilder::new(slots)
        .granularity(choices.granularity)
        .schemes(choices.schemes.iter().map(Scheme::to_string));
    let builder =
        if choices.ranks.is_empty() { builder } else { builder.ranks(choices.ranks.iter().copied()) };
    let builder = if choices.adapters.is_empty() {
        builder
    } else {
        builder.adapters(choices.adapters.iter().cloned())
    };
    let builder = match &choices.prunings {
        Some(prunings) => builder.prune_ratios(prunings.ratios()),
        None => builder,
    };
    let space = builder.build(*memory, |slot, setting| {
        choices.cost(slot, setting).map_err(|error| kiln_mixq_search::Error::Setting {
            text: setting.to_string(),
            reason: error.to_string(),
        })
    })?;
    Ok(space.units().to_vec())
}

fn memory_model(config: &ModelConfig, fixed: u64, choices: &Choices) -> Result<MemoryModel> {
    let memory = MemoryModel::new(fixed).with_axis(choices.axis);
    let Some(training) = &choices.training else { return Ok(memory) };
    // Where ranks are searched, the largest: what moves depends little on it.
    let rank = choices.ranks.iter().copied().max().unwrap_or(training.rank);
    // DoRA's inputs stay f32.
    let most =
        if choices.adapters.iter().any(|kind| kind == "dora") { Halves::Attention } else { Halves::Operands };
    let step = &Step { halves: training.step.halves.min(most), ..training.step };
    let model = with_one_width(config, training.step.recompute);
    let work = Work::lora(&model, rank as usize, step);
    let moving = estimate(&model, 0, &work, step).moving();
    let beside = training.process.base + training.process.slack * moving;
    Ok(memory.with_trained(0, TRAINED_BYTES).with_activations(beside as u64))
}

/// The same model with blocks of one width. What all blocks keep goes with their mean; with recomputation one block's
/// values exist at a time, so the widest decides.
fn with_one_width(config: &ModelConfig, recompute: Recompute) -> ModelConfig {
    let shapes = &config.layer_shapes;
    if shapes.is_empty() {
        return config.clone();
    }
    let width = |part: fn(&LayerShape) -> usize| match recompute {
        Recompute::Block => shapes.iter().map(part).max().unwrap_or(0),
        _ => shapes.iter().map(part).sum::<usize>().div_ceil(shapes.len()),
    };
    let mut alike = config.clone();
    alike.set_layers(vec![LayerShape {
        num_attention_heads: width(|shape| shape.num_attention_heads),
        num_key_value_heads: width(|shape| shape.num_key_value_heads),
        intermediate_size: width(|shape| shape.intermediate_size),
        expert_width: width(|shape| shape.expert_width),
        shared_expert_width: width(|shape| shape.shared_expert_width),
    }]);
    alike
}
