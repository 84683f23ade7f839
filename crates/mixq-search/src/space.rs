//! What can be chosen: units, their choices, and configurations as choice indices.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use crate::{Cost, Error, MemoryModel, MemoryReport, Plan, Result, Setting, digest::digest};

/// One option of a unit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// What every projection of the unit gets.
    pub setting: Setting,
    /// What that costs, summed over the unit's projections.
    pub cost: Cost,
}

/// Projections that share one decision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Name in reports, e.g. `model.layers.3`.
    pub name: String,
    /// Paths of its projections.
    pub paths: Vec<String>,
    /// What can be chosen, from the fewest bytes to the most. One choice: the unit is frozen.
    pub choices: Vec<Choice>,
}

/// A point of a space: per unit the index of its choice, smallest choice first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Config(pub Vec<u8>);

/// Units with their choices and the memory model: everything that decides how many bytes a plan takes.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchSpace {
    units: Vec<Unit>,
    memory: MemoryModel,
    /// Per unit and choice, what it adds on the searched axis.
    weights: Vec<Vec<u64>>,
    /// The axis' figure of a plan without its units.
    base: u64,
}

/// More choices than an index holds.
const MAX_CHOICES: usize = 255;

impl SearchSpace {
    /// A space of these units; choices are sorted by what they add on the memory axis.
    ///
    /// # Errors
    /// [`Error::Space`] if there is no unit, a unit has no choice, no path, more than 255 choices or one twice, a path
    /// belongs to two units, or the bytes of the largest plan overflow.
    pub fn new(mut units: Vec<Unit>, memory: MemoryModel) -> Result<Self> {
        if units.is_empty() {
            return Err(Error::space("units", "at least one", "none"));
        }
        let mut paths = HashSet::new();
        for unit in &mut units {
            check_unit(unit)?;
            if let Some(path) = unit.paths.iter().find(|path| !paths.insert((*path).clone())) {
                return Err(Error::space(&unit.name, "paths of no other unit", path));
            }
            unit.choices.sort_by_key(|choice| memory.weigh(choice.cost));
        }
        let largest = |part: fn(Cost) -> u64| {
            units.iter().try_fold(0u64, |sum, unit| {
                sum.checked_add(unit.choices.iter().map(|choice| part(choice.cost)).max()?)
            })
        };
        let fits =
            largest(|cost| cost.storage).zip(largest(|cost| cost.trained)).and_then(|(storage, trained)| {
                let state =
                    trained.checked_add(memory.fixed_trained)?.checked_mul(memory.bytes_per_trained)?;
                memory.fixed.checked_add(storage)?.checked_add(state)?.checked_add(memory.activations)
            });
        if fits.is_none() {
            return Err(Error::space("bytes", "a sum that fits into 64 bits", "an overflow"));
        }
        let weights =
            units.iter().map(|unit| unit.choices.iter().map(|c| memory.weigh(c.cost)).collect()).collect();
        let base = memory.report(0, 0).on(memory.axis);
        Ok(Self { units, memory, weights, base })
    }

    /// The units.
    pub fn units(&self) -> &[Unit] {
        &self.units
    }

    /// The memory model.
    pub fn memory(&self) -> &MemoryModel {
        &self.memory
    }

    /// Number of choices of a unit.
    pub fn choices(&self, unit: usize) -> usize {
        self.weights[unit].len()
    }

    /// Number of plans, or `None` beyond 128 bits.
    pub fn size(&self) -> Option<u128> {
        self.weights.iter().try_fold(1u128, |size, choices| size.checked_mul(choices.len() as u128))
    }

    /// What each choice adds on the searched memory axis, `[unit][choice]`.
    pub fn weights(&self) -> &[Vec<u64>] {
        &self.weights
    }

    /// Bytes on the searched axis that no choice changes.
    pub fn base_bytes(&self) -> u64 {
        self.base
    }

    /// Bytes of a plan on the searched axis.
    ///
    /// # Panics
    /// If `config` is not of this space.
    pub fn bytes(&self, config: &Config) -> u64 {
        assert_eq!(config.0.len(), self.units.len(), "a configuration has one index per unit");
        let chosen =
            self.weights.iter().zip(&config.0).map(|(weights, &choice)| weights[usize::from(choice)]);
        self.base + chosen.sum::<u64>()
    }

    /// All figures of a plan.
    ///
    /// # Panics
    /// If `config` is not of this space.
    pub fn report(&self, config: &Config) -> MemoryReport {
        let costs =
            self.units.iter().zip(&config.0).map(|(unit, &choice)| unit.choices[usize::from(choice)].cost);
        let (storage, trained) =
            costs.fold((0, 0), |(storage, trained), cost| (storage + cost.storage, trained + cost.trained));
        self.memory.report(storage, trained)
    }

    /// Every unit at its smallest choice.
    pub fn lowest(&self) -> Config {
        Config(vec![0; self.units.len()])
    }

    /// Every unit at its largest choice.
    pub fn highest(&self) -> Config {
        Config(self.weights.iter().map(|choices| (choices.len() - 1) as u8).collect())
    }

    /// Bytes of the smallest plan.
    pub fn smallest(&self) -> u64 {
        self.bytes(&self.lowest())
    }

    /// Bytes of the largest plan.
    pub fn largest(&self) -> u64 {
        self.bytes(&self.highest())
    }

    /// The plans that give every unit with that choice the same setting, smallest first; units that lack it (frozen
    /// ones, say) stay at their largest choice.
    pub fn uniform(&self) -> Vec<Config> {
        let mut seen = HashSet::new();
        let mut configs: Vec<Config> = Vec::new();
        for setting in self.units.iter().flat_map(|unit| &unit.choices).map(|choice| &choice.setting) {
            if !seen.insert(setting.to_string()) {
                continue;
            }
            let index = |unit: &Unit| {
                unit.choices.iter().position(|c| c.setting == *setting).unwrap_or(unit.choices.len() - 1)
            };
            let config = Config(self.units.iter().map(|unit| index(unit) as u8).collect());
            if !configs.contains(&config) {
                configs.push(config);
            }
        }
        configs.sort_by_key(|config| (self.bytes(config), config.clone()));
        configs
    }

    /// Every configuration in lexicographic order. The caller checks [`Self::size`] first.
    pub fn enumerate(&self) -> impl Iterator<Item = Config> + '_ {
        std::iter::successors(Some(self.lowest()), |config| {
            let mut next = config.clone();
            for unit in (0..self.units.len()).rev() {
                if usize::from(next.0[unit]) + 1 < self.choices(unit) {
                    next.0[unit] += 1;
                    return Some(next);
                }
                next.0[unit] = 0;
            }
            None
        })
    }

    /// Features of a surrogate: per unit `index / (choices - 1)`, so that no bit width dominates distances.
    pub fn encode(&self, config: &Config) -> Vec<f64> {
        let level =
            |(choices, &index): (&Vec<u64>, &u8)| f64::from(index) / (choices.len() - 1).max(1) as f64;
        self.weights.iter().zip(&config.0).map(level).collect()
    }

    /// A configuration as settings per path.
    ///
    /// # Panics
    /// If `config` is not of this space.
    pub fn plan(&self, config: &Config) -> Plan {
        let mut settings = Vec::new();
        for (unit, &choice) in self.units.iter().zip(&config.0) {
            let setting = &unit.choices[usize::from(choice)].setting;
            settings.extend(unit.paths.iter().map(|path| (path.clone(), setting.clone())));
        }
        Plan::new(settings)
    }

    /// The configuration of a plan.
    ///
    /// # Errors
    /// [`Error::Plan`] if the plan lacks a path, has an unknown one, or asks for something that can't be chosen.
    pub fn config(&self, plan: &Plan) -> Result<Config> {
        let fail =
            |path: &str, expected: String, found: String| Error::Plan { path: path.into(), expected, found };
        let mut config = self.lowest();
        let mut known = 0;
        for (index, unit) in config.0.iter_mut().zip(&self.units) {
            let first = plan.get(&unit.paths[0]);
            for path in &unit.paths {
                let setting = plan.get(path).ok_or_else(|| fail(path, "a setting".into(), "none".into()))?;
                if Some(setting) != first {
                    let expected = format!("the setting of {}", unit.paths[0]);
                    return Err(fail(path, expected, format!("\"{setting}\"")));
                }
                let choice = unit.choices.iter().position(|choice| choice.setting == *setting);
                let choices =
                    || unit.choices.iter().map(|c| c.setting.to_string()).collect::<Vec<_>>().join(", ");
                *index = choice
                    .ok_or_else(|| fail(path, format!("one of {}", choices()), format!("\"{setting}\"")))?
                    as u8;
            }
            known += unit.paths.len();
        }
        if known != plan.len() {
            return Err(fail("paths", known.to_string(), plan.len().to_string()));
        }
        Ok(config)
    }

    /// Whether a configuration is of this space.
    pub fn contains(&self, config: &Config) -> bool {
        config.0.len() == self.units.len()
            && self.weights.iter().zip(&config.0).all(|(choices, &index)| usize::from(index) < choices.len())
    }

    /// Fails if no plan fits into `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Limit`], which states the smallest possible bytes.
    pub fn check_limit(&self, limit: Option<u64>) -> Result<()> {
        match limit {
            Some(limit) if limit < self.smallest() => Err(Error::Limit { limit, smallest: self.smallest() }),
            _ => Ok(()),
        }
    }

    /// SHA-256 over units, choices, bytes and the memory model: a log of another space is told apart by it.
    pub fn fingerprint(&self) -> String {
        // Serializing these types into memory can't fail; an empty text would only make fingerprints coincide.
        digest(serde_json::to_string(&(&self.units, &self.memory)).unwrap_or_default())
    }
}

fn check_unit(unit: &Unit) -> Result<()> {
    let field = |part: &str| format!("unit \"{}\": {part}", unit.name);
    if unit.paths.is_empty() {
        return Err(Error::space(field("paths"), "at least one", "none"));
    }
    if unit.choices.is_empty() || unit.choices.len() > MAX_CHOICES {
        return Err(Error::space(field("choices"), "1 to 255", unit.choices.len()));
    }
    let mut seen = HashSet::new();
    match unit.choices.iter().find(|choice| !seen.insert(choice.setting.to_string())) {
        Some(twice) => Err(Error::space(field("choices"), "each once", &twice.setting)),
        None => Ok(()),
    }
}
