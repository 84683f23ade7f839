//! What stays of a model: blocks, heads, channels.

use kiln_models::{
    config::{LayerShape, ModelConfig},
    families::Channels,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, structure::Structure};

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
        let layers = structure.layers.iter().enumerate().map(|(layer, groups)| KeptLayer {
            layer,
            heads: (0..groups.shape.num_key_value_heads).collect(),
            channels: (0..groups.shape.intermediate_size).collect(),
        });
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
            })
        });
        Ok(Self {
            hidden: pick("hidden", &self.hidden, &later.hidden)?,
            layers: layers.collect::<Result<_>>()?,
        })
    }

    /// Checks that all indices rise, exist in `structure`, and leave at least one of each kind.
    ///
    /// # Errors
    /// [`Error::Mismatch`] naming the group.
    pub fn validate(&self, structure: &Structure) -> Result<()> {
        if *self != Self::everything(structure) {
            structure.check_goes()?;
        }
        rising("hidden", &self.hidden, structure.hidden)?;
        if !structure.hidden_goes && self.hidden.len() < structure.hidden {
            let expected = "all channels, as the embedding is narrower and projected";
            return Err(Error::mismatch("hidden", expected, self.hidden.len()));
        }
        let layers: Vec<usize> = self.layers.iter().map(|layer| layer.layer).collect();
        rising("layers", &layers, structure.layers.len())?;
        for kept in &self.layers {
            let groups = &structure.layers[kept.layer];
            rising(&groups.attention, &kept.heads, groups.shape.num_key_value_heads)?;
            if !groups.heads_go && kept.heads.len() < groups.shape.num_key_value_heads {
                let expected = "all heads, as a norm runs over all of them together";
                return Err(Error::mismatch(&groups.attention, expected, kept.heads.len()));
            }
            rising(&groups.mlp, &kept.channels, groups.shape.intermediate_size)?;
        }
        Ok(())
    }

    /// Positions that stay along an axis with that meaning in the `place`-th block that stays; `None` if all do.
    pub(crate) fn positions(
        &self,
        structure: &Structure,
        place: usize,
        channels: Channels,
    ) -> Option<Vec<usize>> {
        let kept = &self.layers[place];
        let groups = &structure.layers[kept.layer];
        let (of, unit, total) = match channels {
            Channels::Hidden => (&self.hidden, 1, structure.hidden),
            Channels::Query => {
                let queries = groups.queries_per_group();
                (&kept.heads, queries * structure.head_dim, groups.shape.num_key_value_heads)
            }
            Channels::KeyValue => (&kept.heads, structure.head_dim, groups.shape.num_key_value_heads),
            Channels::QueryKeyValue(rows) => {
                let LayerShape { num_attention_heads: heads, num_key_value_heads: all, .. } = groups.shape;
                let unit =
                    |unit: usize| kept.heads.iter().flat_map(move |head| head * unit..(head + 1) * unit);
                let [queries, keys, values] = rows.rows(heads, all, structure.head_dim);
                let queries = unit(groups.queries_per_group() * structure.head_dim).map(|i| queries[i]);
                let [keys, values] =
                    [keys, values].map(|rows| unit(structure.head_dim).map(move |i| rows[i]));
                let mut positions: Vec<usize> = queries.chain(keys).chain(values).collect();
                // As they stand in the matrix, where kept rows keep their order.
                positions.sort_unstable();
                return (kept.heads.len() < all).then_some(positions);
            }
            Channels::Expert
            | Channels::SharedExpert
            | Channels::PerLayer
            | Channels::Experts
            | Channels::One
            | Channels::GatedQuery
            | Channels::DeltaMixed
            | Channels::DeltaValue
            | Channels::DeltaHeads => return None,
            Channels::Mlp => (&kept.channels, 1, groups.shape.intermediate_size),
            Channels::GateUp => {
                let all = groups.shape.intermediate_size;
                let both = kept.channels.iter().copied().chain(kept.channels.iter().map(|i| i + all));
                return (kept.channels.len() < all).then(|| both.collect());
            }
        };
        (of.len() < total).then(|| of.iter().flat_map(|index| index * unit..(index + 1) * unit).collect())
    }

    /// The shape of what stays.
    pub(crate) fn config(&self, original: &ModelConfig) -> ModelConfig {
        let structure = Structure::of(original);
        let shapes = self.layers.iter().map(|kept| {
            let groups = &structure.layers[kept.layer];
            let mut shape = groups.shape;
            shape.num_key_value_heads = kept.heads.len();
            shape.num_attention_heads = kept.heads.len() * groups.queries_per_group();
            shape.intermediate_size = kept.channels.len();
            shape
        });
        let shapes = shapes.collect();
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
