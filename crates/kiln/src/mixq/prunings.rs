//! A model cut by several ratios, for searches that choose a ratio for each block's heads and channels.

use std::collections::{BTreeMap, HashMap};

use kiln_mixq_search::{Plan, Setting};
use kiln_models::{Decoder, Slots, Windows, config::ModelConfig};
use kiln_pruning::{BlockPruning, CutOptions, Scope, Structure, Units};
use kiln_quant_core::{Projection, QuantLinear};

use super::{Error, Result};

/// A model without several shares of its heads and channels, put together as plans ask for it: the attention of one block as it
/// is without a half of its heads, its MLP as it is without a fifth of its channels.
///
/// That is what pruning by these ratios, group by group, would give, as long as no group's scores depend on what others have lost:
/// ratios within each group, measured once.
///
/// # Memory
/// The weights of the blocks once for each ratio.
#[derive(Debug, Clone)]
pub struct Prunings {
    structure: Structure,
    pruning: BlockPruning,
    /// What identifies the windows that were measured on.
    windows: Option<String>,
    /// By rising ratio, the first 0.
    cuts: Vec<Cut>,
}

#[derive(Debug, Clone)]
struct Cut {
    ratio: f64,
    model: Decoder<QuantLinear>,
    slots: HashMap<String, QuantLinear>,
}

impl Cut {
    fn of(ratio: f64, model: Decoder<QuantLinear>) -> Self {
        let slots = model.slots().into_iter().map(|(path, slot)| (path, slot.clone())).collect();
        Self { ratio, model, slots }
    }

    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn shape(&self, path: &str) -> Option<[usize; 2]> {
        self.slots.get(path).map(QuantLinear::shape)
    }
}

pub(super) fn ratio_of(setting: &Setting) -> f64 {
    setting.prune.unwrap_or(0.0)
}

impl Prunings {
    /// Prunes `model` by each of `ratios` as `pruning` says, whose own ratio doesn't count. Not to prune (0) is always among
    /// them.
    ///
    /// # Errors
    /// Ratios outside `0.0..1.0`; a global scope, several steps, measuring behind pruned blocks and biases that make up for what is
    /// lost, with which a group's choice would depend on the others' ratios; a family in which more than the linears loses
    /// something with heads or channels, as sinks or norms over all heads; and as [`BlockPruning::prune`].
    pub fn new(
        model: &Decoder<QuantLinear>,
        pruning: &BlockPruning,
        ratios: impl IntoIterator<Item = f64>,
        windows: Option<&Windows>,
    ) -> Result<Self> {
        let alone = pruning.scope == Scope::Local && pruning.steps == 1;
        if !alone || pruning.rerun || pruning.bias_compensation {
            let expected = "ratios within each group, one step, no rerun and no compensation";
            return Err(Error::argument("Prunings.pruning", expected, format!("{pruning:?}")));
        }
        let mut ratios: Vec<f64> = ratios.into_iter().chain([0.0]).collect();
        if let Some(ratio) = ratios.iter().find(|ratio| !(0.0..1.0).contains(*ratio)) {
            return Err(Error::argument("Prunings.ratios", "0 up to, but not, 1", ratio));
        }
        ratios.sort_by(f64::total_cmp);
        ratios.dedup();
        let structure = Structure::of(model.config());
        let mut cuts = Vec::new();
        for ratio in ratios {
            let model = match ratio {
                0.0 => model.clone(),
                ratio => {
                    let ratio = kiln_quant_core::Plan::uniform(ratio);
                    let pruning = BlockPruning { ratio, ..pruning.clone() };
                    pruning.prune(model.clone(), windows, &CutOptions::default())?.model
                }
            };
            cuts.push(Cut::of(ratio, model));
        }
        let found = Self { structure, pruning: pruning.clone(), windows: windows.map(Windows::hash), cuts };
        found.check()?;
        Ok(found)
    }

    /// Fails where something beside the linears was cut.
    fn check(&self) -> Result<()> {
        let own = self.cuts[0].config();
        let beside_linears = |config: &ModelConfig| -> Vec<String> {
            let of_slot = |name: &str| {
                name.rsplit_once('.').is_some_and(|(path, _)| self.cuts[0].slots.contains_key(path))
            };
            let beside = config.tensors().into_iter().filter(|tensor| !of_slot(&tensor.name));
            beside.map(|tensor| format!("{} {:?}", tensor.name, tensor.shape)).collect()
        };
        for cut in &self.cuts {
            let mut like_own = cut.config().clone();
            like_own.set_layers((0..own.num_hidden_layers).map(|index| own.layer(index)).collect());
            if like_own != *own || beside_linears(cut.config()) != beside_linears(own) {
                let expected = "a family whose linears alone lose something with heads and channels";
                return Err(Error::argument("Prunings.model", expected, own.family.model_type));
            }
        }
        Ok(())
    }

    /// The model before anything goes.
    pub fn original(&self) -> &Decoder<QuantLinear> {
        &self.cuts[0].model
    }

    /// The ratios, rising.
    pub fn ratios(&self) -> impl Iterator<Item = f64> {
        self.cuts.iter().map(|cut| cut.ratio)
    }

    fn cut(&self, path: &str, setting: &Setting) -> Result<&Cut> {
        let ratio = ratio_of(setting);
        self.cuts.iter().find(|cut| cut.ratio == ratio).ok_or_else(|| {
            let ratios: Vec<String> = self.ratios().map(|ratio| ratio.to_string()).collect();
            Error::argument(path, format!("a pruning ratio of {}", ratios.join(", ")), ratio)
        })
    }

    /// Everything that decides a cut but its ratio.
    pub(super) fn describe(&self) -> String {
        format!("{:?} {:?}", self.pruning, self.windows)
    }

    /// The whole model cut by a setting's ratio.
    pub(super) fn model(&self, path: &str, setting: &Setting) -> Result<&Decoder<QuantLinear>> {
        Ok(&self.cut(path, setting)?.model)
    }

    /// The linear at a path, cut as its setting says.
    pub(super) fn linear(&self, path: &str, setting: &Setting) -> Result<&QuantLinear> {
        let found = self.cut(path, setting)?.slots.get(path);
        found.ok_or_else(|| Error::argument(path, "a linear of the model's blocks", "none"))
    }

    /// Whether a ratio leaves some of these linears other than each lower one does.
    pub(super) fn tells_apart(&self, paths: &[String], ratio: f64) -> bool {
        let shapes = |cut: &Cut| -> Vec<_> { paths.iter().map(|path| cut.shape(path)).collect() };
        let Some(at) = self.cuts.iter().position(|cut| cut.ratio == ratio) else { return true };
        self.cuts[..at].iter().all(|lower| shapes(lower) != shapes(&self.cuts[at]))
    }

    /// Linears that lose heads or channels together, block by block.
    pub(super) fn groups(&self) -> BTreeMap<(usize, Units), Vec<&str>> {
        let mut groups: BTreeMap<(usize, Units), Vec<&str>> = BTreeMap::new();
        for linear in &self.structure.linears {
            if let Some(units) = linear.units() {
                groups.entry((linear.layer, units)).or_default().push(&linear.path);
            }
        }
        groups
    }

    /// The model cut as a plan says, and the plan without its ratios, by which it is to be quantized.
    ///
    /// # Errors
    /// [`Error::is_argument`] for ratios that aren't among these, for groups whose linears differ in theirs, and for a plan of
    /// another model.
    pub fn apply(&self, plan: &Plan) -> Result<(Decoder<QuantLinear>, Plan)> {
        let settings: HashMap<&str, &Setting> = plan.iter().collect();
        let setting = |path: &str| {
            settings.get(path).copied().ok_or_else(|| Error::argument(path, "a setting", "none"))
        };
        let own = self.cuts[0].config();
        let mut layers: Vec<_> = (0..own.num_hidden_layers).map(|index| own.layer(index)).collect();
        for ((layer, units), paths) in self.groups() {
            let first = setting(paths[0])?;
            for path in &paths {
                let (ratio, expected) = (ratio_of(setting(path)?), ratio_of(first));
                if ratio != expected {
                    let expected = format!("the pruning ratio of {}, {expected}", paths[0]);
                    return Err(Error::argument(*path, expected, ratio));
                }
            }
            let cut = self.cut(paths[0], first)?.config().layer(layer);
            let shape = &mut layers[layer];
            match units {
                Units::Heads => {
                    shape.num_attention_heads = cut.num_attention_heads;
                    shape.num_key_value_heads = cut.num_key_value_heads;
                }
                Units::Channels => shape.intermediate_size = cut.intermediate_size,
                Units::ExpertChannels => shape.expert_width = cut.expert_width,
                Units::SharedExpertChannels => shape.shared_expert_width = cut.shared_expert_width,
            }
        }
        let mut config = own.clone();
        config.set_layers(layers);
        let mut known = 0;
        let model = self.cuts[0].model.clone().try_map(|path, _| {
            known += 1;
            Ok::<_, Error>(self.linear(path, setting(path)?)?.clone())
        })?;
        if known != settings.len() {
            return Err(Error::argument("plan", format!("{known} paths of this model"), settings.len()));
        }
        let plain = plan.map(|_, setting| {
            let mut plain = setting.clone();
            plain.prune = None;
            plain
        });
        Ok((model.with_config(config)?, plain))
    }
}
