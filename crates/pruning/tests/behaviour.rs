//! What the options do.

use std::ops::Range;

use kiln_models::{Targets, Windows, token_nll};
use kiln_pruning::{
    BlockPruning, Budget, Criterion, CutOptions, HeadRounding, LayerPruning, LayerRange, Normalise, Pruned,
    Scope, Units,
};
use kiln_quant_core::Plan;

use super::*;

fn prune(pruning: &BlockPruning, model: &Decoder<QuantLinear>, calibration: &Windows) -> Pruned {
    pruning.prune(model.clone(), Some(calibration), &CutOptions::default()).unwrap()
}

/// Mean loss over windows of 64 tokens.
fn loss(model: &Decoder<QuantLinear>, ids: &[u32]) -> f64 {
    let rows: Vec<Vec<u32>> = ids.chunks_exact(64).map(<[u32]>::to_vec).collect();
    let next: Vec<u32> = rows.iter().flat_map(|row| row[1..].iter().copied().chain([0])).collect();
    let scored: Vec<bool> = (0..next.len()).map(|place| place % 64 != 63).collect();
    let tokens = TokenBatch::new(&rows).unwrap();
    let nll = token_nll(model, &tokens, Targets { ids: &next, scored: &scored }).unwrap();
    nll.iter().map(|&nll| f64::from(nll)).sum::<f64>() / nll.len() as f64
}

const CALIBRATION: Range<usize> = 0..4096;
const EVALUATION: Range<usize> = 8192..12288;

#[test]
fn every_informed_criterion_beats_random_on_a_trained_model() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 64, 16, 1).unwrap();
    let lost = |criterion: Criterion, seed: u64| {
        let mut pruning = BlockPruning::new(criterion, 0.5);
        (pruning.layers, pruning.seed) = (LayerRange::All, seed);
        // Channels only: with two key-value heads there is little to choose.
        pruning.ratio = Plan::uniform(0.5).with_override("self_attn", 0.0).unwrap();
        loss(&prune(&pruning, &model, &calibration).model, &ids[EVALUATION])
    };
    let dense = loss(&model, &ids[EVALUATION]);
    let random =
        [0, 1, 2].map(|seed| lost(Criterion::Random, seed)).into_iter().fold(f64::INFINITY, f64::min);
    for criterion in [
        Criterion::TaylorVector,
        Criterion::TaylorFirst,
        Criterion::TaylorSecond,
        Criterion::TaylorMixed,
        Criterion::Wanda,
        Criterion::FlapWifv,
    ] {
        let found = lost(criterion, 0);
        println!("{criterion:?}: {:.2}, random {:.2}, dense {:.2}", found.exp(), random.exp(), dense.exp());
        // At most three quarters of the damage of the luckiest of three random choices.
        assert!(found - dense < 0.75 * (random - dense), "{criterion:?}: {found} {random} {dense}");
    }
}

#[test]
fn bias_compensation_repairs_what_the_mean_can() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 64, 16, 1).unwrap();
    let mut pruning = BlockPruning::new(Criterion::FlapWifv, 0.5);
    pruning.layers = LayerRange::All;
    let plain = prune(&pruning, &model, &calibration);
    pruning.bias_compensation = true;
    let repaired = prune(&pruning, &model, &calibration);
    assert_eq!(plain.report.kept, repaired.report.kept);
    let [plain, repaired] = [plain, repaired].map(|pruned| loss(&pruned.model, &ids[EVALUATION]));
    assert!(repaired < plain, "{repaired} {plain}");
}

#[test]
fn steps_end_at_the_widths_of_one_shot() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 32, 4, 1).unwrap();
    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, 0.5);
    (pruning.layers, pruning.round_to) = (LayerRange::All, 32);
    let once = prune(&pruning, &model, &calibration);
    pruning.steps = 4;
    let stepwise = prune(&pruning, &model, &calibration);
    assert_eq!(once.model.config().clone(), stepwise.model.config().clone());
    assert_eq!(stepwise.report.calibration_loss.len(), 4);
    assert_ne!(once.report.kept, stepwise.report.kept);
    // Kept indices are the original's: the mask of the original computes the same.
    let tokens = TokenBatch::new(&[ids[..48].to_vec()]).unwrap();
    let expected = logits(&masked(model, &stepwise.report.kept), &tokens);
    kiln_testkit::assert_close("stepwise", &logits(&stepwise.model, &tokens), &expected, 2e-4);
}

#[test]
fn the_same_seed_gives_the_same_choice() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 32, 4, 1).unwrap();
    for criterion in [Criterion::Random, Criterion::TaylorMixed, Criterion::FlapWifv] {
        let mut pruning = BlockPruning::new(criterion, 0.5);
        let [a, b] = [(); 2].map(|()| prune(&pruning, &model, &calibration).report);
        assert_eq!(a, b);
        pruning.seed = 1;
        let other = prune(&pruning, &model, &calibration).report;
        assert_eq!(other.kept == a.kept, criterion != Criterion::Random);
    }
}

#[test]
fn a_global_ratio_is_a_share_of_the_budget() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 64, 4, 1).unwrap();
    let structure = Structure::of(model.config());
    let weights = |kept: &Kept| -> f64 {
        let cost = |layer: &kiln_pruning::KeptLayer| {
            layer.heads.len() * structure.unit_parameters(layer.layer, Units::Heads)
                + layer.channels.len() * structure.unit_parameters(layer.layer, Units::Channels)
        };
        kept.layers.iter().map(cost).sum::<usize>() as f64
    };
    let before = weights(&Kept::everything(&structure));
    let mut pruning = BlockPruning::new(Criterion::FlapWifv, 0.3);
    pruning.layers = LayerRange::All;
    pruning.scope = Scope::Global { normalise: Normalise::Standardise, budget: Budget::Parameters };
    let report = prune(&pruning, &model, &calibration).report;
    let share = weights(&report.kept) / before;
    // Within half a head of the target, floors permitting.
    assert!(
        (share - 0.7).abs() < 0.5 * structure.unit_parameters(0, Units::Heads) as f64 / before,
        "{share}"
    );
    let widths: Vec<usize> = report.kept.layers.iter().map(|layer| layer.channels.len()).collect();
    assert!(widths.iter().any(|width| *width != widths[0]), "{widths:?}");
    // Raw sums of a head are far above those of a channel, so only channels go.
    pruning.criterion = Criterion::L1;
    pruning.scope = Scope::Global { normalise: Normalise::None, budget: Budget::Units };
    let report = prune(&pruning, &model, &calibration).report;
    assert!(report.kept.layers.iter().all(|layer| layer.heads.len() == 2));
    let channels: usize = report.kept.layers.iter().map(|layer| layer.channels.len()).sum();
    let units = 4 * (512 + 2);
    assert_eq!(channels + 8, (0.7 * units as f64).trunc() as usize);
    // Nearly everything: the floors hold.
    pruning.ratio = Plan::uniform(0.99);
    for layer in prune(&pruning, &model, &calibration).report.kept.layers {
        assert!(!layer.heads.is_empty() && layer.channels.len() >= 26, "{layer:?}");
    }
}

#[test]
fn ratios_by_path_protected_blocks_and_rounding_are_obeyed() {
    let (model, _) = embedded();
    let mut pruning = BlockPruning::new(Criterion::L2, 0.3);
    pruning.layers = LayerRange::All;
    pruning.protected = vec![3];
    pruning.round_to = 64;
    pruning.head_rounding = HeadRounding::Nearest;
    pruning.ratio = Plan::uniform(0.3)
        .with_override(r"layers\.0\.mlp", 0.7)
        .unwrap()
        .with_override(r"layers\.1\.self_attn", 0.0)
        .unwrap();
    let report = pruning.prune(model, None, &CutOptions::default()).unwrap().report;
    let widths: Vec<[usize; 2]> =
        report.kept.layers.iter().map(|layer| [layer.heads.len(), layer.channels.len()]).collect();
    // 0.3 of two heads is 0.6; 0.7 and 0.3 of 512 leave 153 and 358 channels before rounding up.
    assert_eq!(widths, [[1, 192], [2, 384], [1, 384], [2, 512]]);
}

#[test]
fn rerunning_shows_later_blocks_what_they_will_get() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 64, 8, 1).unwrap();
    let mut pruning = BlockPruning::new(Criterion::Wanda, 0.5);
    pruning.layers = LayerRange::All;
    let plain = prune(&pruning, &model, &calibration).report.kept;
    pruning.rerun = true;
    let rerun = prune(&pruning, &model, &calibration).report.kept;
    // The first block sees the same either way; a later one doesn't.
    assert_eq!(plain.layers[0], rerun.layers[0]);
    assert_ne!(plain.layers[3], rerun.layers[3]);
    // What it saw is what a model pruned in the blocks before gives.
    let structure = Structure::of(model.config());
    let mut before = Kept::everything(&structure);
    before.layers[..3].clone_from_slice(&rerun.layers[..3]);
    let (before, _) = kiln_pruning::apply(model, &before, &CutOptions::default()).unwrap();
    let (mut last, kept) = (BlockPruning::new(Criterion::Wanda, 0.5), &rerun.layers[3]);
    last.layers = LayerRange::Between { start: 3, end: 4 };
    let last = prune(&last, &before, &calibration).report.kept.layers[3].clone();
    assert_eq!((&last.heads, &last.channels), (&kept.heads, &kept.channels));
}

#[test]
fn the_least_influential_block_goes() {
    let (model, ids) = embedded();
    let calibration = Windows::disjoint(&ids[CALIBRATION], 64, 8, 1).unwrap();
    // Two blocks that do next to nothing.
    let faint = edit(model, |path, _, weight, _| {
        if path.contains("layers.1.") || path.contains("layers.2.") {
            weight.iter_mut().for_each(|w| *w *= 0.01);
        }
    });
    let report =
        LayerPruning::new(2).prune(faint.clone(), &calibration, &CutOptions::default()).unwrap().report;
    let stay = |report: &kiln_pruning::PruningReport| -> Vec<usize> {
        report.kept.layers.iter().map(|layer| layer.layer).collect()
    };
    assert_eq!(stay(&report), [0, 3]);
    let protected = LayerPruning { remove: 1, protected: vec![1, 2] };
    let report = protected.prune(faint, &calibration, &CutOptions::default()).unwrap().report;
    assert!(stay(&report).contains(&1) && stay(&report).contains(&2));
}

#[test]
fn adapters_go_on_a_pruned_model() {
    use kiln_adapters::{AdapterConfig, LoraAttacher};
    let (model, ids) = embedded();
    let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
    pruning.layers = LayerRange::Inner;
    let pruned = pruning.prune(model, None, &CutOptions::default()).unwrap().model;
    let attacher = LoraAttacher::new(&AdapterConfig::lora(4, 8.0), &pruned.slot_shapes()).unwrap();
    let adapted = pruned.clone().try_map(|path, base| attacher.attach(path, base)).unwrap();
    let tokens = TokenBatch::new(&[ids[..16].to_vec()]).unwrap();
    // LoRA begins as nothing.
    assert_eq!(read(adapted.forward(&adapted.context(&tokens, None).unwrap())), logits(&pruned, &tokens));
}
