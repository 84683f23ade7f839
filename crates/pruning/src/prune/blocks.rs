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
    kept::{Kept, KeptLayer},
    selection::{
        GlobalRanking, HeadRounding, LayerRange, LayerScores, Scope, UnitScores, lowest, removed_heads,
        removed_mlp_channels, without,
    },
    structure::{Coupling, Group, Layer, Structure, Units},
};

/// Prunes attention heads and MLP channels block by block; of a mixture the channels of its experts, of each its own but of all
/// equally many. Blocks without attention lose no heads.
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `criterion` | | what is measured |
/// | `ratio` | | share of each group's heads or channels to remove, 0..1; a plan over [`Group::path`](crate::Group), such as `model.layers.3.self_attn`, `model.layers.3.mlp` and `model.layers.3.mlp.experts` |
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
        let range = self.blocks(&initial)?;
        self.check_ratios(&initial, &range)?;
        let mut run = Run::start(model, &initial, calibration, self, &options.sharing)?;
        for step in 1..=self.steps {
            let share = step as f64 / self.steps as f64;
            let structure = Structure::of(run.model.config());
            let (kept, statistics) =
                self.choose(&mut run, &initial, &structure, &range, share, calibration)?;
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

    /// Fails before anything is computed if a ratio removes a whole group, or something of one that must stay.
    fn check_ratios(&self, structure: &Structure, blocks: &[usize]) -> Result<()> {
        // A global ranking leaves something of each group; only a ratio of 1 asks it for everything.
        let local = self.scope == Scope::Local;
        for &layer in blocks {
            let groups = &structure.layers[layer].groups;
            for (group, target) in groups.iter().zip(self.targets(structure, layer, 1.0)) {
                let ratio = *self.ratio.get(&group.path);
                if let Some(why) = group.stays.filter(|_| local && target > 0) {
                    let expected = format!("a ratio of 0 for {}, as {why}", group.path);
                    return Err(Error::option("BlockPruning.ratio", expected, ratio));
                }
                if (local && target >= group.count) || ratio >= 1.0 {
                    let (path, units) = (group.path.clone(), group.units.name().into());
                    return Err(Error::RemovesAll { group: path, ratio, count: group.count, units });
                }
            }
        }
        Ok(())
    }

    /// Units that are to have gone of each group of `layer` once `share` of the ratio is reached.
    fn targets(&self, initial: &Structure, layer: usize, share: f64) -> Vec<usize> {
        let layer = &initial.layers[layer];
        let target = |group: &Group| {
            let ratio = self.ratio.get(&group.path) * share;
            match group.units {
                Units::Heads => removed_heads(group.count, layer.head_dim, ratio, self.head_rounding),
                _ => removed_mlp_channels(group.count, ratio, self.round_to),
            }
        };
        layer.groups.iter().map(target).collect()
    }

    /// What stays once the blocks `blocks` have lost what is to go now, and the statistics that were taken on the way.
    fn choose(
        &self,
        run: &mut Run,
        initial: &Structure,
        structure: &Structure,
        blocks: &[usize],
        share: f64,
        calibration: Option<&Windows>,
    ) -> Result<(Kept, Statistics)> {
        let local = |layer: usize, scores: &LayerScores| -> Vec<Vec<usize>> {
            let targets = self.targets(initial, layer, share).into_iter();
            let both = initial.layers[layer].groups.iter().zip(&structure.layers[layer].groups);
            let gone = targets
                .zip(both)
                .map(|(target, (first, now))| target.saturating_sub(first.count - now.count));
            gone.zip(scores).map(|(gone, scores)| lowest(&scores.units, gone)).collect()
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
                let kept = kept_layer(structure, layer, &scores, &local(layer, &scores));
                Ok(stays(structure, &kept))
            };
            found = statistics(
                model,
                structure,
                calibration,
                &run.sharing,
                self.rerun.then_some(&mut decide as _),
            )?;
        }
        let scores = self.layer_scores(run, structure, &found, calibration)?;
        let removed: Vec<_> = match self.scope {
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
        let mut kept = Kept::everything(structure);
        for (&layer, removed) in blocks.iter().zip(&removed) {
            kept.layers[layer] = kept_layer(structure, layer, &scores[layer], removed);
        }
        Ok((kept, found))
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
                let (scores, loss) = gradient_scores(
                    &run.model,
                    structure,
                    self.criterion,
                    Scored::Groups,
                    calibration,
                    &run.sharing,
                )?;
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
        let groups = &structure.layers[layer];
        let of_linears = |linears: Vec<&Coupling>| -> Result<Vec<f64>> {
            let mut lists = Vec::new();
            for linear in linears {
                let scores = matrices.get(&linear.path);
                let scores = scores.ok_or_else(|| Error::mismatch(&linear.path, "scores", "none"))?;
                self.lists(groups, linear, scores, &mut lists);
            }
            Ok(aggregation.apply(&lists))
        };
        let of_group = |group: &Group| {
            let linears: Vec<&Coupling> = structure.linears_of(layer, group.units).collect();
            Ok(match group.units {
                Units::Heads => UnitScores::of(head_sums(&of_linears(linears)?, groups.head_dim)),
                Units::Channels | Units::SharedExpertChannels => UnitScores::of(of_linears(linears)?),
                Units::ExpertChannels => {
                    let of_expert =
                        |expert| linears.iter().copied().filter(move |l| l.expert == Some(expert));
                    let scores = (0..groups.experts).map(|expert| of_linears(of_expert(expert).collect()));
                    UnitScores::of_experts(&scores.collect::<Result<Vec<_>>>()?, false)
                }
            })
        };
        groups.groups.iter().map(of_group).collect()
    }

    /// Adds the scores of one linear, one list for each thing that its channels are: of queries folded to their key heads.
    fn lists(&self, groups: &Layer, linear: &Coupling, scores: &[f64], lists: &mut Vec<Vec<f64>>) {
        let (shape, head_dim) = (groups.shape, groups.head_dim);
        let folded = |scores: &[f64]| self.gqa_fold.apply(scores, shape.num_key_value_heads, head_dim);
        match (linear.input, linear.output) {
            (Channels::Query, _) | (_, Channels::Query) => lists.push(folded(scores)),
            (_, Channels::QueryKeyValue(rows)) => {
                let rows = rows.rows(shape.num_attention_heads, shape.num_key_value_heads, head_dim);
                let [queries, keys, values] =
                    rows.map(|rows| rows.into_iter().map(|i| scores[i]).collect::<Vec<_>>());
                lists.extend([folded(&queries), keys, values]);
            }
            (_, Channels::GatedQuery) => lists.extend([0, 1].map(|half| {
                let of_half = scores.chunks_exact(head_dim).skip(half).step_by(2);
                folded(&of_half.flatten().copied().collect::<Vec<_>>())
            })),
            (_, Channels::GateUp) => {
                lists.extend(scores.chunks_exact(scores.len() / 2).map(<[f64]>::to_vec));
            }
            _ => lists.push(scores.to_vec()),
        }
    }

    /// Scores by what reaches o and down.
    fn input_scores(
        &self,
        model: &Decoder<QuantLinear>,
        structure: &Structure,
        layer: usize,
        inputs: &BTreeMap<String, InputStatistics>,
    ) -> Result<LayerScores> {
        let (groups, flap) = (&structure.layers[layer], self.criterion.is_flap());
        let of_linear = |linear: &Coupling| -> Result<Vec<f64>> {
            let path = linear.path.as_str();
            let statistics = inputs.get(path).ok_or_else(|| Error::mismatch(path, "statistics", "none"))?;
            Ok(matrix(model, path)?.input_scores(self.criterion, statistics))
        };
        let of_group = |group: &Group| {
            let ways_out = structure.linears_of(layer, group.units).filter(|linear| linear.loses_inputs());
            let mut scores = ways_out.map(of_linear).collect::<Result<Vec<_>>>()?;
            if group.units == Units::ExpertChannels {
                return Ok(UnitScores::of_experts(&scores, flap));
            }
            let mut scores = scores.pop().ok_or_else(|| Error::mismatch(&group.path, "a way out", "none"))?;
            if group.units != Units::Heads {
                let channels = if flap { scores.clone() } else { Vec::new() };
                return Ok(UnitScores { channels, ..UnitScores::of(scores) });
            }
            let per_group = groups.head_dim * groups.queries_per_group();
            if !flap {
                return Ok(UnitScores::of(head_sums(&scores, per_group)));
            }
            scores.iter_mut().for_each(|score| *score *= *score);
            let units = head_sums(&scores, per_group).iter().map(|sum| sum / per_group as f64).collect();
            Ok(UnitScores { channels: scores, ..UnitScores::of(units) })
        };
        groups.groups.iter().map(of_group).collect()
    }
}

/// Uniform scores; a function of seed and group.
fn random_scores(structure: &Structure, layer: usize, seed: u64) -> LayerScores {
    let groups = &structure.layers[layer];
    let scores = |of: u64, count: usize| -> Vec<f64> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Streams are numbered so that heads and channels keep those that they have always had.
        rng.set_stream(((of / 2) << 32) + 2 * layer as u64 + of % 2);
        (0..count).map(|_| f64::from(rng.next_u32())).collect()
    };
    let of_group = |group: &Group| match group.units {
        Units::Heads => UnitScores::of(scores(1, group.count)),
        Units::Channels => UnitScores::of(scores(0, group.count)),
        Units::SharedExpertChannels => UnitScores::of(scores(2, group.count)),
        Units::ExpertChannels => {
            let experts = (0..groups.experts).map(|expert| scores(3 + expert as u64, group.count));
            UnitScores::of_experts(&experts.collect::<Vec<_>>(), false)
        }
    };
    groups.groups.iter().map(of_group).collect()
}

/// What stays of a block without the units `removed` of each of its groups.
fn kept_layer(
    structure: &Structure,
    layer: usize,
    scores: &LayerScores,
    removed: &[Vec<usize>],
) -> KeptLayer {
    let mut kept = KeptLayer {
        layer,
        heads: Vec::new(),
        channels: Vec::new(),
        experts: Vec::new(),
        shared_expert: Vec::new(),
    };
    for ((group, scores), removed) in structure.layers[layer].groups.iter().zip(scores).zip(removed) {
        let units = || without(group.count, removed);
        match group.units {
            Units::Heads => kept.heads = units(),
            Units::Channels => kept.channels = units(),
            // All of them stay where nothing is listed.
            Units::SharedExpertChannels | Units::ExpertChannels if removed.is_empty() => {}
            Units::SharedExpertChannels => kept.shared_expert = units(),
            Units::ExpertChannels => kept.experts = scores.kept_of_experts(removed),
        }
    }
    kept
}

/// Which inputs stay of the linears that lose some.
fn stays(structure: &Structure, kept: &KeptLayer) -> Vec<(String, Vec<bool>)> {
    let groups = &structure.layers[kept.layer];
    let linears = structure.linears.iter().filter(|linear| linear.layer == kept.layer);
    let lost = linears.filter_map(|linear| {
        let (group, per_unit) = groups.along(linear.input)?;
        let stays = kept.positions(groups, linear.input, linear.expert)?;
        let flags = (0..group.count * per_unit).map(|position| stays.binary_search(&position).is_ok());
        Some((linear.path.clone(), flags.collect()))
    });
    lost.collect()
}
