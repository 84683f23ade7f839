//! Heads and MLP channels, block by block.

use std::collections::BTreeMap;

use kiln_models::{CausalLm, Decoder, Windows, families::Channels};
use kiln_quant_core::{Plan, QuantLinear};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Pruned, Run, compensation::compensation, matrix};
use crate::{
    Error, Result,
    aggregation::{Aggregation, GqaFold, head_sums},
    apply::{CutOptions, add_biases},
    criterion::{Criterion, InputStatistics},
    importance::{MatrixScores, Scored, Statistics, gradient_scores, statistics, weight_scores},
    kept::Kept,
    selection::{
        GlobalRanking, HeadRounding, LayerRange, LayerScores, Scope, UnitScores, lowest, removed_heads,
        removed_mlp_channels, without,
    },
    structure::Structure,
};

/// Prunes attention heads and MLP channels block by block.
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `criterion` | | what is measured |
/// | `ratio` | | share of heads and channels to remove, 0..1; a plan over `model.layers.3.self_attn` and `model.layers.3.mlp` |
/// | `aggregation` | sum; mean for L1 and L2 | how the matrices of a group add up |
/// | `gqa_fold` | grouped | where query heads' scores go |
/// | `scope` | local | within each group or in the whole model |
/// | `layers` | inner | blocks that may be pruned |
/// | `protected` | none | blocks that may not, beside those |
/// | `round_to` | 1 | MLP widths become multiples of it |
/// | `head_rounding` | floor | how a share of a head becomes none or one |
/// | `steps` | 1 | repetitions of measuring and cutting, the ratio growing linearly |
/// | `seed` | 0 | of the random criterion |
/// | `bias_compensation` | false | what the removed inputs of o and down gave on average becomes their bias (FLAP) |
/// | `rerun` | false | later blocks are measured behind pruned ones, as in Wanda-sp; needs the local scope |
///
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, LoadOptions, Windows};
/// use kiln_pruning::{BlockPruning, Criterion, CutOptions};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let (model, _) = Checkpoint::open(folder)?.load(&LoadOptions::default(), &Device::flex())?;
/// let ids: Vec<u32> = (0..640).map(|i| (i * 37 + 11) % 2048).collect();
/// let calibration = Windows::disjoint(&ids, 32, 4, 42)?;
///
/// let mut pruning = BlockPruning::new(Criterion::TaylorFirst, 0.5);
/// pruning.round_to = 64;
/// let pruned = pruning.prune(model, Some(&calibration), &CutOptions::default())?;
/// // Two of four blocks lost one of two key-value heads and half of 512 channels.
/// assert_eq!(pruned.report.kept.layers[1].channels.len(), 256);
/// assert!(pruned.report.parameters_after < pruned.report.parameters_before);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockPruning {
    /// What is measured.
    pub criterion: Criterion,
    /// Share of heads and channels to remove.
    pub ratio: Plan<f64>,
    /// How the matrices of a group add up; `None` is the criterion's default.
    #[serde(default)]
    pub aggregation: Option<Aggregation>,
    /// Where query heads' scores go.
    #[serde(default)]
    pub gqa_fold: GqaFold,
    /// Within each group or in the whole model.
    #[serde(default)]
    pub scope: Scope,
    /// Blocks that may be pruned.
    #[serde(default)]
    pub layers: LayerRange,
    /// Blocks that may not, beside those.
    #[serde(default)]
    pub protected: Vec<usize>,
    /// MLP widths become multiples of it.
    #[serde(default = "super::one")]
    pub round_to: usize,
    /// How a share of a head becomes none or one.
    #[serde(default)]
    pub head_rounding: HeadRounding,
    /// Repetitions of measuring and cutting.
    #[serde(default = "super::one")]
    pub steps: usize,
    /// Seed of the random criterion.
    #[serde(default)]
    pub seed: u64,
    /// Whether o and down get what their removed inputs gave on average.
    #[serde(default)]
    pub bias_compensation: bool,
    /// Whether later blocks are measured behind pruned ones.
    #[serde(default)]
    pub rerun: bool,
}

impl BlockPruning {
    /// One ratio for all groups of the inner blocks.
    pub fn new(criterion: Criterion, ratio: f64) -> Self {
        Self {
            criterion,
            ratio: Plan::uniform(ratio),
            aggregation: None,
            gqa_fold: GqaFold::Grouped,
            scope: Scope::Local,
            layers: LayerRange::Inner,
            protected: Vec::new(),
            round_to: 1,
            head_rounding: HeadRounding::Floor,
            steps: 1,
            seed: 0,
            bias_compensation: false,
            rerun: false,
        }
    }

    /// Prunes `model`. Gradients, where the criterion asks for them, are made and reduced one block at a time.
    ///
    /// # Errors
    /// [`Error::Option`] for options out of range, [`Error::RemovesAll`] for a ratio that leaves a group nothing,
    /// [`Error::NothingToPrune`] if all blocks are protected, [`Error::Calibration`] if the criterion needs data that
    /// aren't given or don't fit the model, and [`Error::Mismatch`] from cutting.
    pub fn prune(
        &self,
        model: Decoder<QuantLinear>,
        calibration: Option<&Windows>,
        options: &CutOptions,
    ) -> Result<Pruned> {
        model.check_one_device("pruning")?;
        self.check(calibration)?;
        let initial = Structure::of(model.config());
        if let Some(layer) = initial.layers.iter().find(|layer| layer.has_experts) {
            return Err(Error::mismatch(&layer.mlp, "an MLP without experts", "experts"));
        }
        initial.check_goes()?;
        let range = self.blocks(&initial)?;
        self.check_ratios(&initial, &range)?;
        let mut run = Run::start(model, &initial, calibration);
        for step in 1..=self.steps {
            let share = step as f64 / self.steps as f64;
            let structure = Structure::of(run.model.config());
            let (removed, statistics) =
                self.choose(&mut run, &initial, &structure, &range, share, calibration)?;
            let mut kept = Kept::everything(&structure);
            for (layer, [heads, channels]) in range.iter().zip(&removed) {
                let shape = structure.layers[*layer].shape;
                kept.layers[*layer].heads = without(shape.num_key_value_heads, heads);
                kept.layers[*layer].channels = without(shape.intermediate_size, channels);
            }
            let biases = match self.bias_compensation {
                true => compensation(&run.model, &structure, &kept, &statistics)?,
                false => BTreeMap::new(),
            };
            run.cut(&kept, options)?;
            run.model = add_biases(run.model, &biases)?;
        }
        run.finish()
    }

    fn check(&self, calibration: Option<&Windows>) -> Result<()> {
        let fail = |field: &str, expected: &str, found: String| {
            Err(Error::option(&format!("BlockPruning.{field}"), expected, found))
        };
        if self.steps == 0 {
            return fail("steps", "at least 1", "0".into());
        }
        if self.round_to == 0 {
            return fail("round_to", "at least 1", "0".into());
        }
        let ratios =
            self.ratio.overrides().iter().map(|(_, ratio)| ratio).chain([self.ratio.default_value()]);
        if let Some(ratio) = ratios.copied().find(|ratio| !(0.0..=1.0).contains(ratio)) {
            return fail("ratio", "shares in 0..1", ratio.to_string());
        }
        if self.scope != Scope::Local && !self.ratio.overrides().is_empty() {
            return fail("ratio", "one ratio under a global scope", "overrides".into());
        }
        if self.rerun && (self.scope != Scope::Local || !self.criterion.needs_inputs()) {
            let expected = "false, or a criterion of activations under the local scope";
            return fail("rerun", expected, "true".into());
        }
        let needs =
            self.criterion.needs_gradients() || self.criterion.needs_inputs() || self.bias_compensation;
        if needs && calibration.is_none() {
            let expected = format!("windows for {:?}", self.criterion);
            return Err(Error::Calibration { expected, found: "none".into() });
        }
        Ok(())
    }

    /// The blocks that are pruned.
    fn blocks(&self, structure: &Structure) -> Result<Vec<usize>> {
        let count = structure.layers.len();
        if let Some(layer) = self.protected.iter().find(|&&layer| layer >= count) {
            let expected = format!("blocks below {count}");
            return Err(Error::option("BlockPruning.protected", expected, layer));
        }
        let range = self.layers.resolve(count)?;
        let blocks: Vec<usize> = range.filter(|layer| !self.protected.contains(layer)).collect();
        if blocks.is_empty() {
            return Err(Error::NothingToPrune { reason: format!("all {count} blocks are protected") });
        }
        Ok(blocks)
    }

    /// Fails before anything is computed if a ratio removes a whole group.
    fn check_ratios(&self, structure: &Structure, blocks: &[usize]) -> Result<()> {
        for &layer in blocks {
            let groups = &structure.layers[layer];
            let [heads, channels] = self.targets(structure, layer, 1.0);
            let (head_count, channel_count) =
                (groups.shape.num_key_value_heads, groups.shape.intermediate_size);
            let all = |path: &str, count: usize, units: &str| {
                let (group, units) = (path.to_string(), units.to_string());
                Err(Error::RemovesAll { group, ratio: *self.ratio.get(path), count, units })
            };
            // A global ranking leaves something of each group; only a ratio of 1 asks it for everything.
            let local = self.scope == Scope::Local;
            if (local && heads >= head_count) || *self.ratio.get(&groups.attention) >= 1.0 {
                return all(&groups.attention, head_count, "key-value heads");
            }
            if (local && channels >= channel_count) || *self.ratio.get(&groups.mlp) >= 1.0 {
                return all(&groups.mlp, channel_count, "channels");
            }
        }
        Ok(())
    }

    /// Heads and channels that are to have gone of `layer` once `share` of the ratio is reached.
    fn targets(&self, initial: &Structure, layer: usize, share: f64) -> [usize; 2] {
        let groups = &initial.layers[layer];
        let (attention, mlp) =
            (self.ratio.get(&groups.attention) * share, self.ratio.get(&groups.mlp) * share);
        let heads = groups.shape.num_key_value_heads;
        [
            removed_heads(heads, initial.head_dim, attention, self.head_rounding),
            removed_mlp_channels(groups.shape.intermediate_size, mlp, self.round_to),
        ]
    }

    /// Heads and channels to go now from each block of `blocks`, and the statistics that were taken on the way.
    fn choose(
        &self,
        run: &mut Run,
        initial: &Structure,
        structure: &Structure,
        blocks: &[usize],
        share: f64,
        calibration: Option<&Windows>,
    ) -> Result<(Vec<[Vec<usize>; 2]>, Statistics)> {
        let local = |layer: usize, scores: &LayerScores| {
            let (first, now) = (initial.layers[layer].shape, structure.layers[layer].shape);
            let [heads, channels] = self.targets(initial, layer, share);
            let gone = |first: usize, now: usize, target: usize| target.saturating_sub(first - now);
            [
                lowest(
                    &scores.attention.units,
                    gone(first.num_key_value_heads, now.num_key_value_heads, heads),
                ),
                lowest(&scores.mlp.units, gone(first.intermediate_size, now.intermediate_size, channels)),
            ]
        };
        let mut found = Statistics::default();
        if let (true, Some(calibration)) =
            (self.criterion.needs_inputs() || self.bias_compensation, calibration)
        {
            let model = &run.model;
            let mut decide = |layer: usize, inputs: &BTreeMap<String, InputStatistics>| {
                if !blocks.contains(&layer) {
                    return Ok(Vec::new());
                }
                let scores = self.input_scores(model, structure, layer, inputs)?;
                Ok(stays(structure, layer, &local(layer, &scores)))
            };
            found = statistics(model, structure, calibration, self.rerun.then_some(&mut decide as _))?;
        }
        let scores = self.layer_scores(run, structure, &found, calibration)?;
        let removed = match self.scope {
            Scope::Local => blocks.iter().map(|&layer| local(layer, &scores[layer])).collect(),
            Scope::Global { normalise, budget } => GlobalRanking {
                initial,
                structure,
                blocks: blocks.to_vec(),
                ratio: self.ratio.default_value() * share,
                normalise,
                budget,
                round_to: self.round_to,
            }
            .select(&scores),
        };
        Ok((removed, found))
    }

    fn layer_scores(
        &self,
        run: &mut Run,
        structure: &Structure,
        found: &Statistics,
        calibration: Option<&Windows>,
    ) -> Result<Vec<LayerScores>> {
        let layers = 0..structure.layers.len();
        if self.criterion == Criterion::Random {
            return Ok(layers.map(|layer| random_scores(structure, layer, self.seed)).collect());
        }
        if self.criterion.needs_inputs() {
            return layers
                .map(|layer| self.input_scores(&run.model, structure, layer, &found.inputs))
                .collect();
        }
        let matrices = match calibration {
            Some(calibration) if self.criterion.needs_gradients() => {
                let (scores, loss) =
                    gradient_scores(&run.model, structure, self.criterion, Scored::Groups, calibration)?;
                run.losses.push(loss);
                scores
            }
            _ => weight_scores(&run.model, structure, self.criterion, Scored::Groups)?,
        };
        layers.map(|layer| self.group_scores(structure, layer, &matrices)).collect()
    }

    /// Aggregates the matrices of each group.
    fn group_scores(
        &self,
        structure: &Structure,
        layer: usize,
        matrices: &MatrixScores,
    ) -> Result<LayerScores> {
        let aggregation = self.aggregation.unwrap_or(match self.criterion {
            Criterion::L1 | Criterion::L2 => Aggregation::Mean,
            _ => Aggregation::Sum,
        });
        let heads = structure.layers[layer].shape.num_key_value_heads;
        let group = |attention: bool| -> Result<Vec<f64>> {
            let mut lists = Vec::new();
            for linear in structure.group(layer, attention) {
                let scores = matrices.get(&linear.path);
                let scores = scores.ok_or_else(|| Error::mismatch(&linear.path, "scores", "none"))?;
                let folded = |scores: &[f64]| self.gqa_fold.apply(scores, heads, structure.head_dim);
                match (linear.input, linear.output) {
                    (Channels::Query, _) | (_, Channels::Query) => lists.push(folded(scores)),
                    (_, Channels::QueryKeyValue(rows)) => {
                        let query_heads = structure.layers[layer].shape.num_attention_heads;
                        let rows = rows.rows(query_heads, heads, structure.head_dim);
                        let [queries, keys, values] =
                            rows.map(|rows| rows.into_iter().map(|i| scores[i]).collect::<Vec<_>>());
                        lists.extend([folded(&queries), keys, values]);
                    }
                    (_, Channels::GateUp) => {
                        lists.extend(scores.chunks_exact(scores.len() / 2).map(<[f64]>::to_vec));
                    }
                    _ => lists.push(scores.clone()),
                }
            }
            Ok(aggregation.apply(&lists))
        };
        let units = |units: Vec<f64>| UnitScores { units, channels: Vec::new() };
        Ok(LayerScores {
            attention: units(head_sums(&group(true)?, structure.head_dim)),
            mlp: units(group(false)?),
        })
    }

    /// Scores by what reaches o and down.
    fn input_scores(
        &self,
        model: &Decoder<QuantLinear>,
        structure: &Structure,
        layer: usize,
        inputs: &BTreeMap<String, InputStatistics>,
    ) -> Result<LayerScores> {
        let score = |attention: bool| -> Result<Vec<f64>> {
            let group = structure.group(layer, attention);
            let path = group.last().map_or("", |linear| linear.path.as_str());
            let statistics = inputs.get(path).ok_or_else(|| Error::mismatch(path, "statistics", "none"))?;
            Ok(matrix(model, path)?.input_scores(self.criterion, statistics))
        };
        let (mut attention, mlp) = (score(true)?, score(false)?);
        let per_group = structure.head_dim * structure.layers[layer].queries_per_group();
        if !self.criterion.is_flap() {
            let attention = UnitScores { units: head_sums(&attention, per_group), channels: Vec::new() };
            return Ok(LayerScores { attention, mlp: UnitScores { units: mlp, channels: Vec::new() } });
        }
        attention.iter_mut().for_each(|score| *score *= *score);
        let units = head_sums(&attention, per_group).iter().map(|sum| sum / per_group as f64).collect();
        Ok(LayerScores {
            attention: UnitScores { units, channels: attention },
            mlp: UnitScores { units: mlp.clone(), channels: mlp },
        })
    }
}

/// Uniform scores; a function of seed and group.
fn random_scores(structure: &Structure, layer: usize, seed: u64) -> LayerScores {
    let groups = &structure.layers[layer];
    let scores = |attention: u64, count: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(2 * layer as u64 + attention);
        let units = (0..count).map(|_| f64::from(rng.next_u32())).collect();
        UnitScores { units, channels: Vec::new() }
    };
    LayerScores {
        attention: scores(1, groups.shape.num_key_value_heads),
        mlp: scores(0, groups.shape.intermediate_size),
    }
}

/// Which inputs of a block's o and down stay.
fn stays(structure: &Structure, layer: usize, removed: &[Vec<usize>; 2]) -> Vec<(String, Vec<bool>)> {
    let groups = &structure.layers[layer];
    let per_head = structure.head_dim * groups.queries_per_group();
    let flags = |count: usize, unit: usize, removed: &[usize]| {
        (0..count * unit).map(|position| !removed.contains(&(position / unit))).collect::<Vec<_>>()
    };
    let path = |attention: bool| structure.group(layer, attention).last().map(|linear| linear.path.clone());
    let shape = groups.shape;
    [
        (path(true), flags(shape.num_key_value_heads, per_head, &removed[0])),
        (path(false), flags(shape.intermediate_size, 1, &removed[1])),
    ]
    .into_iter()
    .filter_map(|(path, flags)| Some((path?, flags)))
    .collect()
}
