//! From a model's projections to a space: which settings, and which projections decide together.

use serde::{Deserialize, Serialize};

use crate::{Choice, Cost, Error, MemoryModel, Result, SearchSpace, Setting, Unit};

/// A projection whose setting is searched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// The checkpoint's name, e.g. `model.layers.3.self_attn.q_proj`.
    pub path: String,
    /// Inputs of the weight.
    pub d_input: usize,
    /// Outputs of the weight.
    pub d_output: usize,
}

impl Slot {
    /// A projection of `d_input` inputs and `d_output` outputs.
    pub fn new(path: impl Into<String>, d_input: usize, d_output: usize) -> Self {
        Self { path: path.into(), d_input, d_output }
    }
}

/// Which projections share a decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Granularity {
    /// Each decides for itself.
    Projection,
    /// Attention and MLP of each layer: everything but the last name of the path.
    Block,
    /// All of one layer: the path up to its first number. The published choice.
    #[default]
    Layer,
    /// All of one kind: the last name of the path, e.g. `q_proj`.
    Kind,
}

impl Granularity {
    /// Name of the unit that a path belongs to.
    pub fn unit(self, path: &str) -> &str {
        match self {
            Self::Projection => path,
            Self::Block => path.rsplit_once('.').map_or(path, |(block, _)| block),
            Self::Kind => path.rsplit('.').next().unwrap_or(path),
            Self::Layer => {
                let mut end = 0;
                for name in path.split('.') {
                    end += name.len();
                    if name.parse::<u32>().is_ok() {
                        return &path[..end];
                    }
                    end += 1;
                }
                path
            }
        }
    }
}

/// Builds a [`SearchSpace`]: the product of weight formats and, where given, ranks, adapters and pruning ratios, at
/// every unit.
///
/// ```
/// use kiln_mixq_search::{Cost, Granularity, MemoryModel, Slot, SpaceBuilder};
///
/// let slots = ["q_proj", "v_proj"].map(|name| Slot::new(format!("model.layers.0.{name}"), 64, 64));
/// let space = SpaceBuilder::new(slots.to_vec())
///     .granularity(Granularity::Projection)
///     .schemes(["affine2:64", "affine4:64", "dense"])
///     .build(MemoryModel::new(1000), |slot, setting| {
///         // In Kiln: the scheme's `storage_bytes`.
///         let bits = match setting.scheme.as_str() { "affine2:64" => 3, "affine4:64" => 5, _ => 16 };
///         Ok(Cost::storage((slot.d_input * slot.d_output * bits / 8) as u64))
///     })?;
/// assert_eq!(space.size(), Some(9));
/// assert_eq!(space.smallest(), 1000 + 2 * 64 * 64 * 3 / 8);
/// # Ok::<(), kiln_mixq_search::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SpaceBuilder {
    slots: Vec<Slot>,
    granularity: Granularity,
    schemes: Vec<String>,
    ranks: Vec<Option<u32>>,
    adapters: Vec<Option<String>>,
    ratios: Vec<Option<f64>>,
}

impl SpaceBuilder {
    /// A space over these projections, by layer.
    pub fn new(slots: Vec<Slot>) -> Self {
        Self {
            slots,
            granularity: Granularity::default(),
            schemes: Vec::new(),
            ranks: vec![None],
            adapters: vec![None],
            ratios: vec![None],
        }
    }

    /// Which projections decide together.
    #[must_use]
    pub fn granularity(mut self, granularity: Granularity) -> Self {
        self.granularity = granularity;
        self
    }

    /// The weight formats, as scheme strings.
    #[must_use]
    pub fn schemes<S: Into<String>>(mut self, schemes: impl IntoIterator<Item = S>) -> Self {
        self.schemes = schemes.into_iter().map(Into::into).collect();
        self
    }

    /// Searches the adapters' ranks too.
    #[must_use]
    pub fn ranks(mut self, ranks: impl IntoIterator<Item = u32>) -> Self {
        self.ranks = ranks.into_iter().map(Some).collect();
        self
    }

    /// Searches the kind of adapter too.
    #[must_use]
    pub fn adapters<S: Into<String>>(mut self, adapters: impl IntoIterator<Item = S>) -> Self {
        self.adapters = adapters.into_iter().map(|adapter| Some(adapter.into())).collect();
        self
    }

    /// Searches the pruning ratio too, each in `0.0..1.0`.
    #[must_use]
    pub fn prune_ratios(mut self, ratios: impl IntoIterator<Item = f64>) -> Self {
        self.ratios = ratios.into_iter().map(Some).collect();
        self
    }

    /// The space; `cost` says what a setting costs at a projection.
    ///
    /// # Errors
    /// [`Error::Space`] if there are no projections or no settings, or as [`SearchSpace::new`]; [`Error::Setting`] for
    /// a setting that its own string doesn't give back; `cost`'s errors.
    pub fn build(
        self,
        memory: MemoryModel,
        mut cost: impl FnMut(&Slot, &Setting) -> Result<Cost>,
    ) -> Result<SearchSpace> {
        let settings = self.settings()?;
        let mut units: Vec<(Unit, Vec<usize>)> = Vec::new();
        for (index, slot) in self.slots.iter().enumerate() {
            let name = self.granularity.unit(&slot.path);
            match units.iter_mut().find(|(unit, _)| unit.name == name) {
                Some((unit, slots)) => {
                    unit.paths.push(slot.path.clone());
                    slots.push(index);
                }
                None => {
                    let paths = vec![slot.path.clone()];
                    units.push((Unit { name: name.into(), paths, choices: Vec::new() }, vec![index]));
                }
            }
        }
        for (unit, slots) in &mut units {
            for setting in &settings {
                let total = slots.iter().try_fold(Cost::default(), |sum, &slot| {
                    sum.checked_add(cost(&self.slots[slot], setting)?)
                        .ok_or_else(|| Error::space(&unit.name, "bytes that fit into 64 bits", "an overflow"))
                })?;
                unit.choices.push(Choice { setting: setting.clone(), cost: total });
            }
        }
        SearchSpace::new(units.into_iter().map(|(unit, _)| unit).collect(), memory)
    }

    fn settings(&self) -> Result<Vec<Setting>> {
        let mut settings = Vec::new();
        for scheme in &self.schemes {
            for &rank in &self.ranks {
                for adapter in &self.adapters {
                    for &prune in &self.ratios {
                        let setting =
                            Setting { scheme: scheme.clone(), rank, adapter: adapter.clone(), prune };
                        let text = setting.to_string();
                        if text.parse::<Setting>()? != setting {
                            return Err(Error::Setting { text, reason: "spaces in a name".into() });
                        }
                        settings.push(setting);
                    }
                }
            }
        }
        if settings.is_empty() {
            return Err(Error::space("settings", "at least one", "none"));
        }
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_fall_into_units() {
        let path = "model.layers.13.self_attn.q_proj";
        let unit = |granularity: Granularity| granularity.unit(path);
        assert_eq!(unit(Granularity::Projection), path);
        assert_eq!(unit(Granularity::Block), "model.layers.13.self_attn");
        assert_eq!(unit(Granularity::Layer), "model.layers.13");
        assert_eq!(unit(Granularity::Kind), "q_proj");
        assert_eq!(Granularity::Layer.unit("lm_head"), "lm_head");
    }

    fn builder() -> SpaceBuilder {
        let paths = ["model.layers.0.q", "model.layers.0.v", "model.layers.1.q", "model.layers.1.v"];
        SpaceBuilder::new(paths.iter().map(|path| Slot::new(*path, 8, 4)).collect())
    }

    fn cost(slot: &Slot, setting: &Setting) -> Result<Cost> {
        let keep = 1.0 - setting.prune.unwrap_or(0.0);
        let values = (slot.d_input as f64 * keep) as u64 * slot.d_output as u64;
        let bits = if setting.scheme == "dense" { 32 } else { 4 };
        let trained = u64::from(setting.rank.unwrap_or(0)) * (slot.d_input + slot.d_output) as u64;
        Ok(Cost { storage: values * bits / 8, trained })
    }

    #[test]
    fn product_of_all_options_at_every_unit() {
        let space = builder()
            .schemes(["affine4:64", "dense"])
            .ranks([4, 8])
            .adapters(["lora", "bara"])
            .prune_ratios([0.0, 0.5])
            .build(MemoryModel::new(10).with_axis(crate::MemoryAxis::Static), cost)
            .unwrap();
        assert_eq!(space.units().len(), 2);
        assert_eq!(space.size(), Some(256));
        let lowest = space.units()[0].choices[0].clone();
        assert_eq!(lowest.setting.to_string(), "affine4:64 rank=4 adapter=lora prune=0.5");
        assert_eq!(lowest.cost, Cost { storage: 2 * 8, trained: 2 * 48 });
        // Two projections in each of two layers, 16 bytes per trained parameter.
        assert_eq!(space.smallest(), 10 + 2 * (2 * 8 + 2 * 48 * 16));
        let plan = space.plan(&space.highest());
        assert_eq!(space.config(&plan).unwrap(), space.highest());
    }

    #[test]
    fn empty_and_contradictory_spaces_are_refused() {
        let fail =
            |builder: SpaceBuilder| builder.build(MemoryModel::default(), cost).unwrap_err().to_string();
        assert!(fail(builder()).contains("settings: expected at least one"));
        assert!(fail(SpaceBuilder::new(vec![]).schemes(["dense"])).contains("units: expected at least one"));
        assert!(fail(builder().schemes(["dense", "dense"])).contains("each once"));
        assert!(fail(builder().schemes(["den se"])).contains("key=value"));
        assert!(fail(builder().schemes(["dense"]).prune_ratios([1.5])).contains("prune"));
        let twice = SpaceBuilder::new(vec![Slot::new("a.q", 1, 1), Slot::new("a.q", 1, 1)]);
        let huge = builder().schemes(["dense"]).build(MemoryModel::new(u64::MAX), cost).unwrap_err();
        assert!(huge.to_string().contains("overflow"));
        assert!(fail(twice.schemes(["dense"])).contains("paths of no other unit"));
    }
}
