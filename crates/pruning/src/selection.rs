//! Which units go, given their scores.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    aggregation::{head_sums, standardise},
    structure::{Group, Structure, Units},
};

/// Which blocks may lose heads and channels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerRange {
    /// All but the first `ceil(L / 8)` and the last `ceil(L / 16)` of `L` blocks.
    #[default]
    Inner,
    /// All.
    All,
    /// Those from `start` to before `end`.
    Between {
        /// First block.
        start: usize,
        /// The block after the last.
        end: usize,
    },
}

impl LayerRange {
    /// The blocks, of `layers`.
    ///
    /// # Errors
    /// [`Error::Option`] for a range that leaves the model, [`Error::NothingToPrune`] for an empty one.
    pub fn resolve(self, layers: usize) -> Result<Range<usize>> {
        let range = match self {
            Self::Inner => layers.div_ceil(8)..layers - layers.div_ceil(16).min(layers),
            Self::All => 0..layers,
            Self::Between { start, end } if end > layers => {
                let found = format!("{start}..{end}");
                return Err(Error::option("layers", format!("a range within 0..{layers}"), found));
            }
            Self::Between { start, end } => start..end,
        };
        if range.is_empty() {
            return Err(Error::NothingToPrune { reason: format!("no block of {layers} lies in {self:?}") });
        }
        Ok(range)
    }
}

/// How a share of a head becomes none or one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadRounding {
    /// Down, as LLM-Pruner does.
    #[default]
    Floor,
    /// To the nearest.
    Nearest,
}

/// Where scores compete.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// Within each group: every block loses the same share.
    #[default]
    Local,
    /// In the whole model, heads against channels.
    Global {
        /// How scores of different groups become comparable.
        normalise: Normalise,
        /// What the ratio counts.
        budget: Budget,
    },
}

/// How scores of different groups become comparable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalise {
    /// Not at all: heads, which sum over far more weights, almost never go.
    None,
    /// Divided by the unit's number of weights.
    PerParameter,
    /// Distance from the group's mean in standard deviations of its channels, as in FLAP.
    Standardise,
}

/// What a global ratio counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Heads and channels, one as much as the other, as LLM-Pruner does.
    Units,
    /// Their weights, as FLAP does.
    Parameters,
}

/// Scores of the units of one group.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct UnitScores {
    pub units: Vec<f64>,
    /// Scores of single channels on the same scale, where heads average them: FLAP's standard deviations are theirs.
    pub channels: Vec<f64>,
    /// The channels of each expert, the least first, where a unit is one of each.
    pub orders: Vec<Vec<usize>>,
}

impl UnitScores {
    fn standardised(&self) -> Vec<f64> {
        if self.channels.is_empty() {
            return standardise(&self.units);
        }
        let per_unit = (self.channels.len() / self.units.len().max(1)).max(1);
        let means = |unit: &[f64]| unit.iter().sum::<f64>() / unit.len() as f64;
        standardise(&self.channels).chunks(per_unit).map(means).collect()
    }
}

impl UnitScores {
    /// Of units that are what is scored.
    pub(crate) fn of(units: Vec<f64>) -> Self {
        Self { units, ..Self::default() }
    }

    /// Of the channels of experts, from the scores that each expert's have; `means` averages them. A unit is the channel of
    /// one rank in every expert, the least of all experts first.
    pub(crate) fn of_experts(experts: &[Vec<f64>], means: bool) -> Self {
        let order = |scores: &Vec<f64>| lowest_first(scores);
        let orders: Vec<Vec<usize>> = experts.iter().map(order).collect();
        let count = experts.first().map_or(0, Vec::len);
        let of_rank =
            |rank: usize| experts.iter().zip(&orders).map(move |(scores, order)| scores[order[rank]]);
        let channels: Vec<f64> = (0..count).flat_map(of_rank).collect();
        let mut units = head_sums(&channels, experts.len());
        if means {
            units.iter_mut().for_each(|sum| *sum /= experts.len() as f64);
        }
        Self { units, channels: if means { channels } else { Vec::new() }, orders }
    }

    /// What stays of each expert's channels once the units `removed` went.
    pub(crate) fn kept_of_experts(&self, removed: &[usize]) -> Vec<Vec<usize>> {
        let kept = self.orders.iter().map(|order| {
            let mut gone: Vec<usize> = removed.iter().map(|rank| order[*rank]).collect();
            gone.sort_unstable();
            without(order.len(), &gone)
        });
        kept.collect()
    }
}

/// Scores of one block, in the order of its groups.
pub(crate) type LayerScores = Vec<UnitScores>;

/// Channels that go of `channels` at a ratio, by LLM-Pruner's arithmetic: `C - trunc(C (1 - ratio))` in f64.
pub fn removed_channels(channels: usize, ratio: f64) -> usize {
    channels - ((channels as f64 * (1.0 - ratio)).trunc() as usize).min(channels)
}

/// Heads that go of `heads` at a ratio: [`removed_channels`] in whole heads.
pub fn removed_heads(heads: usize, head_dim: usize, ratio: f64, rounding: HeadRounding) -> usize {
    match rounding {
        HeadRounding::Floor => removed_channels(heads * head_dim, ratio) / head_dim.max(1),
        HeadRounding::Nearest => (heads as f64 * ratio).round() as usize,
    }
}

/// MLP channels that go, so that what stays is a multiple of `round_to` (or everything).
pub fn removed_mlp_channels(channels: usize, ratio: f64, round_to: usize) -> usize {
    let kept = channels - removed_channels(channels, ratio);
    channels - if kept == 0 { 0 } else { kept.next_multiple_of(round_to.max(1)).min(channels) }
}

fn lowest_first(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    order
}

/// Indices of the `count` lowest scores; of equal ones the lower index.
pub(crate) fn lowest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order = lowest_first(scores);
    order.truncate(count);
    order.sort_unstable();
    order
}

/// What stays of `count` after `removed` (rising) went.
pub(crate) fn without(count: usize, removed: &[usize]) -> Vec<usize> {
    (0..count).filter(|index| removed.binary_search(index).is_err()).collect()
}

/// Smallest share of MLP channels that a global ranking leaves.
const CHANNEL_FLOOR: f64 = 0.05;

/// A global ranking: the widths it aims at, and how it compares.
pub(crate) struct GlobalRanking<'a> {
    /// Before any step.
    pub initial: &'a Structure,
    /// Now.
    pub structure: &'a Structure,
    /// The blocks that may lose units.
    pub blocks: Vec<usize>,
    pub ratio: f64,
    pub normalise: Normalise,
    pub budget: Budget,
    pub round_to: usize,
}

/// A head or channel.
#[derive(Clone, Copy)]
struct Unit {
    layer: usize,
    /// Of the layer's groups.
    group: usize,
    index: usize,
    score: f64,
    cost: f64,
}

impl GlobalRanking<'_> {
    /// Removed units of each group of each block of `blocks`, rising. Groups that stay don't compete.
    pub(crate) fn select(&self, scores: &[LayerScores]) -> Vec<Vec<Vec<usize>>> {
        let mut units: Vec<Unit> = Vec::new();
        for layer in self.blocks.iter().copied() {
            for (group, scores) in scores[layer].iter().enumerate() {
                let Group { units: kind, stays: None, .. } = self.structure.layers[layer].groups[group]
                else {
                    continue;
                };
                let weights = self.structure.unit_parameters(layer, kind) as f64;
                let comparable: Vec<f64> = match self.normalise {
                    Normalise::None => scores.units.clone(),
                    Normalise::PerParameter => scores.units.iter().map(|score| score / weights).collect(),
                    Normalise::Standardise => scores.standardised(),
                };
                let cost = match self.budget {
                    Budget::Units => 1.0,
                    Budget::Parameters => weights,
                };
                let of_group = comparable.into_iter().enumerate();
                units.extend(of_group.map(|(index, score)| Unit { layer, group, index, score, cost }));
            }
        }
        // Stable: of equal scores the earlier goes first.
        units.sort_by(|a, b| a.score.total_cmp(&b.score));
        let target = self.initial_cost() * (1.0 - self.ratio);
        let target = match self.budget {
            // As within a group.
            Budget::Units => target.trunc(),
            Budget::Parameters => target,
        };
        let mut left: f64 = units.iter().map(|unit| unit.cost).sum();
        let mut removed = 0;
        // The last unit goes only if that comes nearer to the target.
        while removed < units.len() && left - target > units[removed].cost / 2.0 {
            left -= units[removed].cost;
            removed += 1;
        }
        self.with_floors(&units[..removed])
    }

    fn initial_cost(&self) -> f64 {
        let cost = |layer: usize| {
            let groups = self.initial.layers[layer].groups.iter().filter(|group| group.stays.is_none());
            let costs = groups.map(|group| match self.budget {
                Budget::Units => group.count as f64,
                Budget::Parameters => {
                    (group.count * self.structure.unit_parameters(layer, group.units)) as f64
                }
            });
            costs.sum::<f64>()
        };
        self.blocks.iter().copied().map(cost).sum()
    }

    /// Gives back the best of what went where too little would stay, and up to whole multiples.
    fn with_floors(&self, removed: &[Unit]) -> Vec<Vec<Vec<usize>>> {
        let of_group = |layer: usize, group: usize| {
            let units = removed.iter().filter(|unit| unit.layer == layer && unit.group == group);
            let mut units: Vec<usize> = units.map(|unit| unit.index).collect();
            let now = self.structure.layers[layer].groups[group].count;
            let first = &self.initial.layers[layer].groups[group];
            let kept = match first.units {
                Units::Heads => 1,
                _ => {
                    let floor = (first.count as f64 * CHANNEL_FLOOR).ceil() as usize;
                    let kept = (now - units.len()).max(floor.max(1));
                    kept.next_multiple_of(self.round_to.max(1)).min(now)
                }
            };
            units.truncate(now - kept);
            units.sort_unstable();
            units
        };
        let of_layer = |layer: usize| {
            (0..self.structure.layers[layer].groups.len()).map(|group| of_group(layer, group)).collect()
        };
        self.blocks.iter().copied().map(of_layer).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scores_go_by_index() {
        assert_eq!(lowest(&[2.0, 1.0, 1.0, 1.0], 2), [1, 2]);
        assert_eq!(without(4, &[1, 2]), [0, 3]);
    }

    #[test]
    fn the_published_recipe_is_a_range_and_the_default_its_rule() {
        assert_eq!(LayerRange::Between { start: 4, end: 30 }.resolve(32).unwrap(), 4..30);
        assert_eq!(LayerRange::Inner.resolve(32).unwrap(), 4..30);
        assert_eq!(LayerRange::Inner.resolve(4).unwrap(), 1..3);
        for (range, layers) in [
            (LayerRange::Inner, 2),
            (LayerRange::Between { start: 3, end: 3 }, 4),
            (LayerRange::Between { start: 3, end: 5 }, 4),
        ] {
            assert!(range.resolve(layers).is_err(), "{range:?} of {layers}");
        }
    }

    #[test]
    fn widths_are_rounded_up_to_multiples() {
        assert_eq!(512 - removed_mlp_channels(512, 0.25, 64), 384);
        assert_eq!(512 - removed_mlp_channels(512, 0.38, 64), 320);
        assert_eq!(500 - removed_mlp_channels(500, 0.01, 64), 500);
        assert_eq!(removed_mlp_channels(512, 1.0, 64), 512);
        assert_eq!(removed_heads(3, 64, 0.38, HeadRounding::Floor), 1);
        assert_eq!(removed_heads(3, 64, 0.25, HeadRounding::Floor), 0);
        assert_eq!(removed_heads(3, 64, 0.25, HeadRounding::Nearest), 1);
    }
}
