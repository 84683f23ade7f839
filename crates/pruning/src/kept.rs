//! What stays of a model: blocks, heads, channels.

use kiln_models::{
    config::{LayerShape, ModelConfig},
    families::Channels,
};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    structure::{Coupling, Group, Layer, Structure, Units},
};

/// What stays of one block. Indices rise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptLayer {
    /// The block's index in the original.
    pub layer: usize,
    /// Key-value heads; the query heads that use them stay with them.
    pub heads: Vec<usize>,
    /// MLP channels.
    pub channels: Vec<usize>,
    /// Channels of each expert, equally many; all stay where it is empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub experts: Vec<Vec<usize>>,
    /// Channels of the expert that all tokens go through; all stay where it is empty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_expert: Vec<usize>,
}

impl KeptLayer {
    /// All of block `layer`, whose groups these are.
    fn everything(layer: usize, groups: &Layer) -> Self {
        let all = |units| (0..groups.group(units).map_or(0, |group| group.count)).collect();
        Self {
            layer,
            heads: all(Units::Heads),
            channels: all(Units::Channels),
            experts: Vec::new(),
            shared_expert: Vec::new(),
        }
    }

    /// The units that stay of one group, of experts those of `expert`; `None` if all do.
    fn of(&self, group: &Group, expert: Option<usize>) -> Option<&[usize]> {
        let kept = match group.units {
            Units::Heads => &self.heads,
            Units::Channels => &self.channels,
            Units::ExpertChannels => self.experts.get(expert?)?,
            Units::SharedExpertChannels if self.shared_expert.is_empty() => return None,
            Units::SharedExpertChannels => &self.shared_expert,
        };
        (kept.len() < group.count).then_some(kept)
    }

    /// How many units stay of one group.
    fn count(&self, group: &Group) -> usize {
        self.of(group, Some(0)).map_or(group.count, <[usize]>::len)
    }

    /// Positions that stay along an axis with that meaning, which isn't the residual stream; `None` if all do.
    pub(crate) fn positions(
        &self,
        groups: &Layer,
        channels: Channels,
        expert: Option<usize>,
    ) -> Option<Vec<usize>> {
        let (group, per_unit) = groups.along(channels)?;
        let kept = self.of(group, expert)?;
        let units = |unit: usize| kept.iter().flat_map(move |index| index * unit..(index + 1) * unit);
        Some(match channels {
            Channels::QueryKeyValue(rows) => {
                let heads = groups.shape.num_attention_heads;
                let [queries, keys, values] = rows.rows(heads, group.count, groups.head_dim);
                let queries = units(groups.queries_per_group() * groups.head_dim).map(|i| queries[i]);
                let [keys, values] = [keys, values].map(|rows| units(groups.head_dim).map(move |i| rows[i]));
                let mut positions: Vec<usize> = queries.chain(keys).chain(values).collect();
                // As they stand in the matrix, where kept rows keep their order.
                positions.sort_unstable();
                positions
            }
            Channels::GateUp => kept.iter().copied().chain(kept.iter().map(|i| i + group.count)).collect(),
            _ => units(per_unit).collect(),
        })
    }

    /// The query heads that stay; `None` if all do.
    pub(crate) fn query_heads(&self, groups: &Layer) -> Option<Vec<usize>> {
        let (heads, queries) = (self.of(groups.group(Units::Heads)?, None)?, groups.queries_per_group());
        Some(heads.iter().flat_map(|head| head * queries..(head + 1) * queries).collect())
    }

    fn check(&self, groups: &Layer) -> Result<()> {
        for group in &groups.groups {
            let lists: Vec<&Vec<usize>> = match group.units {
                Units::Heads => vec![&self.heads],
                Units::Channels => vec![&self.channels],
                Units::ExpertChannels => self.experts.iter().collect(),
                Units::SharedExpertChannels => {
                    Some(&self.shared_expert).into_iter().filter(|list| !list.is_empty()).collect()
                }
            };
            for list in &lists {
                rising(&group.path, list, group.count)?;
                if list.len() != lists[0].len() {
                    let expected = format!("{} channels of each expert", lists[0].len());
                    return Err(Error::mismatch(&group.path, expected, list.len()));
                }
            }
            if group.units == Units::ExpertChannels && ![0, groups.experts].contains(&lists.len()) {
                let expected = format!("channels of {} experts", groups.experts);
                return Err(Error::mismatch(&group.path, expected, lists.len()));
            }
        }
        let mut beside = [
            (Units::ExpertChannels, "experts", self.experts.is_empty()),
            (Units::SharedExpertChannels, "shared_expert", self.shared_expert.is_empty()),
        ]
        .into_iter();
        match beside.find(|(units, _, empty)| groups.group(*units).is_none() && !empty) {
            Some((_, what, _)) => Err(Error::mismatch(what, "none, as the block has none", "some")),
            None => Ok(()),
        }
    }

    /// Fails for a group that lost something and must not.
    fn check_goes(&self, groups: &Layer) -> Result<()> {
        for group in &groups.groups {
            let kept = self.count(group);
            if let Some(why) = group.stays.filter(|_| kept < group.count) {
                let expected = format!("all {}, as {why}", group.units.name());
                return Err(Error::mismatch(&group.path, expected, kept));
            }
        }
        Ok(())
    }
}

/// What stays of a model, in the numbering of the original.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// Channels of the residual stream.
    pub hidden: Vec<usize>,
    /// The blocks that stay, in order.
    pub layers: Vec<KeptLayer>,
}

impl Kept {
    /// Everything.
    pub fn everything(structure: &Structure) -> Self {
        let layers = structure.layers.iter().enumerate();
        let layers = layers.map(|(layer, groups)| KeptLayer::everything(layer, groups));
        Self { hidden: (0..structure.hidden).collect(), layers: layers.collect() }
    }

    /// What stays if `later` is applied to what stays of this: `later` counts from what is left.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if `later` names something that isn't left.
    pub fn then(&self, later: &Self) -> Result<Self> {
        let layers = later.layers.iter().map(|inner| {
            let outer = self.layers.get(inner.layer).ok_or_else(|| {
                Error::mismatch("layers", format!("indices below {}", self.layers.len()), inner.layer)
            })?;
            Ok(KeptLayer {
                layer: outer.layer,
                heads: pick("heads", &outer.heads, &inner.heads)?,
                channels: pick("channels", &outer.channels, &inner.channels)?,
                experts: match outer.experts.is_empty() || inner.experts.is_empty() {
                    true => [&outer.experts, &inner.experts].into_iter().flatten().cloned().collect(),
                    false => {
                        let both = outer.experts.iter().zip(&inner.experts);
                        both.map(|(outer, inner)| pick("experts", outer, inner)).collect::<Result<_>>()?
                    }
                },
                shared_expert: match outer.shared_expert.is_empty() || inner.shared_expert.is_empty() {
                    true => {
                        [&outer.shared_expert, &inner.shared_expert].into_iter().flatten().copied().collect()
                    }
                    false => pick("shared_expert", &outer.shared_expert, &inner.shared_expert)?,
                },
            })
        });
        Ok(Self {
            hidden: pick("hidden", &self.hidden, &later.hidden)?,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Checks that all indices rise, exist in `structure`, leave at least one of each kind and all of what must stay.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the group.
    pub fn validate(&self, structure: &Structure) -> Result<()> {
        self.check(structure)?;
        let stays = [
            ("hidden", "channels", structure.hidden_stays, self.hidden.len(), structure.hidden),
            ("layers", "blocks", structure.layers_stay, self.layers.len(), structure.layers.len()),
        ];
        for (name, units, why, kept, all) in stays {
            if let Some(why) = why.filter(|_| kept < all) {
                return Err(Error::mismatch(name, format!("all {units}, as {why}"), kept));
            }
        }
        self.layers.iter().try_for_each(|kept| kept.check_goes(&structure.layers[kept.layer]))
    }

    /// The same of indices alone: what a record says was done, by rules that may have been others.
    pub(crate) fn check(&self, structure: &Structure) -> Result<()> {
        rising("hidden", &self.hidden, structure.hidden)?;
        let layers: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        rising("layers", &layers, structure.layers.len())?;
        self.layers.iter().try_for_each(|kept| kept.check(&structure.layers[kept.layer]))
    }

    /// Channels of the residual stream that stay; `None` if all do.
    pub(crate) fn hidden(&self, structure: &Structure) -> Option<Vec<usize>> {
        (self.hidden.len() < structure.hidden).then(|| self.hidden.clone())
    }

    /// Positions that stay along an axis of a linear of the `place`-th block that stays; `None` if all do.
    pub(crate) fn positions(
        &self,
        structure: &Structure,
        place: usize,
        linear: &Coupling,
        channels: Channels,
    ) -> Option<Vec<usize>> {
        match channels {
            Channels::Hidden => self.hidden(structure),
            channels => {
                self.layers[place].positions(&structure.layers[linear.layer], channels, linear.expert)
            }
        }
    }

    /// The widths of what stays. A block without a group of some kind, which has no such width, gets that of the first block
    /// with one, so that blocks differ only where they do.
    fn shapes(&self, structure: &Structure) -> Vec<LayerShape> {
        let kept_of = |kept: &KeptLayer, units| {
            structure.layers[kept.layer].group(units).map(|group| kept.count(group))
        };
        let first = |units| self.layers.iter().find_map(|kept| kept_of(kept, units));
        let all = [Units::Heads, Units::Channels, Units::ExpertChannels, Units::SharedExpertChannels];
        let firsts = all.map(first);
        self.layers
            .iter()
            .map(|kept| {
                let groups = &structure.layers[kept.layer];
                let [heads, channels, expert, shared] =
                    std::array::from_fn(|kind| kept_of(kept, all[kind]).or(firsts[kind]));
                let mut shape = groups.shape;
                if let Some(heads) = heads {
                    shape.num_attention_heads = heads * groups.queries_per_group();
                    shape.num_key_value_heads = heads;
                }
                let same = shape.intermediate_size == shape.expert_width;
                shape.expert_width = expert.unwrap_or(shape.expert_width);
                shape.shared_expert_width = shared.unwrap_or(shape.shared_expert_width);
                // Families whose blocks all have experts may have one key for both.
                let channels = channels.or(expert.filter(|_| same));
                shape.intermediate_size = channels.unwrap_or(shape.intermediate_size);
                shape
            })
            .collect()
    }

    /// The shape of what stays.
    pub(crate) fn config(&self, original: &ModelConfig) -> ModelConfig {
        let shapes = self.shapes(&Structure::of(original));
        let mut config = original.clone();
        config.layer_attention =
            self.layers.iter().map(|kept| original.layer_attention[kept.layer]).collect();
        config.num_hidden_layers = self.layers.len();
        config.hidden_size = self.hidden.len();
        if !original.family.norm.centres() {
            // The mean runs over fewer channels: see `apply`.
            config.norm_eps *= original.hidden_size as f64 / self.hidden.len() as f64;
        }
        if !original.block_kinds.is_empty() {
            config.block_kinds = self.layers.iter().map(|kept| original.block_kinds[kept.layer]).collect();
        }
        if !original.layer_head_dims.is_empty() {
            let head_dims = self.layers.iter().map(|kept| original.layer_head_dims[kept.layer]);
            config.set_head_dims(head_dims.collect());
        }
        config.set_layers(shapes);
        config
    }
}

fn pick(what: &str, outer: &[usize], inner: &[usize]) -> Result<Vec<usize>> {
    let one = |&index: &usize| {
        let expected = || Error::mismatch(what, format!("indices below {}", outer.len()), index);
        outer.get(index).copied().ok_or_else(expected)
    };
    inner.iter().map(one).collect()
}

fn rising(name: &str, indices: &[usize], count: usize) -> Result<()> {
    let expected = || format!("rising indices below {count}, at least one");
    if indices.is_empty() {
        return Err(Error::mismatch(name, expected(), "none"));
    }
    if let Some(pair) = indices.windows(2).find(|pair| pair[0] >= pair[1]) {
        return Err(Error::mismatch(name, expected(), format!("{} before {}", pair[0], pair[1])));
    }
    match indices.last() {
        Some(&last) if last >= count => Err(Error::mismatch(name, expected(), last)),
        _ => Ok(()),
    }
}
