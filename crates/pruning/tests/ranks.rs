//! Prunings that several ranks share: what stays, and all values, are those of one.

use std::sync::Arc;

use kiln_distributed::{Alone, Communicator, Sharing};
use kiln_models::{Decoder, Slots, Windows};
use kiln_pruning::{
    BlockPruning, Criterion, CutOptions, HiddenPruning, LayerPruning, LayerRange, Pruned, PruningReport,
    Result,
};
use kiln_quant_core::{QuantLinear, fingerprint};
use kiln_testkit::on_ranks;

use crate::{architecture, calibration, embedded, load};

type Found = (PruningReport, String);

fn shared(ranks: Arc<dyn Communicator>, parts: usize) -> CutOptions<'static> {
    CutOptions { sharing: Sharing::new(ranks, parts), ..CutOptions::default() }
}

fn found(pruned: Result<Pruned>) -> Found {
    let pruned = pruned.unwrap();
    (pruned.report, fingerprint(&pruned.model, |_| true).unwrap())
}

/// Prunes alone and by several ranks, on seven batches in five parts.
fn same_on_any_number(what: &str, prune: impl Fn(&CutOptions) -> Result<Pruned> + Sync) {
    let plain = found(prune(&CutOptions::default()));
    let alone = |parts| found(prune(&shared(Arc::new(Alone), parts)));
    assert_eq!(alone(1), plain, "{what}");
    let expected = alone(5);
    for size in [2, 3, 5] {
        let found = on_ranks(size, |ranks| found(prune(&shared(ranks, 5))));
        assert!(
            found.iter().all(|found| *found == expected),
            "{what}, {size} ranks: {found:?}, {expected:?}"
        );
    }
    // The same losses as in one part, and a cut as deep.
    let apart = expected.0.calibration_loss.iter().zip(&plain.0.calibration_loss);
    assert!(apart.into_iter().all(|(a, b)| (a - b).abs() < 1e-6));
    assert_eq!(expected.0.parameters_after, plain.0.parameters_after);
}

#[test]
fn any_number_of_ranks_prunes_as_one_does() {
    let (model, ids) = embedded();
    let windows = Windows::disjoint(&ids[..2048], 32, 14, 1).unwrap().with_rows(2);
    let of = |criterion| BlockPruning::new(criterion, 0.5);
    let mut twice = of(Criterion::TaylorMixed);
    twice.steps = 2;
    let mut flap = of(Criterion::FlapWifv);
    (flap.bias_compensation, flap.rerun) = (true, true);
    for pruning in [of(Criterion::TaylorFirst), twice, of(Criterion::Wanda), flap, of(Criterion::L2)] {
        let what = format!("{:?}", pruning.criterion);
        same_on_any_number(&what, |options| pruning.prune(model.clone(), Some(&windows), options));
    }
    let hidden = HiddenPruning::new(Criterion::TaylorVector, 0.25);
    same_on_any_number("hidden", |options| hidden.prune(model.clone(), Some(&windows), options));
    same_on_any_number("layers", |options| LayerPruning::new(1).prune(model.clone(), &windows, options));
}

#[test]
fn experts_that_a_rank_sends_nothing_are_measured_by_the_others() {
    let model = architecture("mixtral");
    // Windows of one token over and over go to few experts.
    let windows = Windows::new((0..7).map(|window| vec![window * 5 + 3; 8]).collect()).unwrap().with_rows(1);
    for criterion in [Criterion::TaylorFirst, Criterion::TaylorMixed, Criterion::FlapIfv] {
        let mut pruning = BlockPruning::new(criterion, 0.5);
        pruning.layers = LayerRange::All;
        same_on_any_number(&format!("{criterion:?}"), |options| {
            pruning.prune(model.clone(), Some(&windows), options)
        });
    }
}

#[test]
fn ranks_that_differ_are_named_by_all() {
    let other = |model: Decoder<QuantLinear>| {
        crate::edit(model, |path, _, weight, _| {
            if path.ends_with("layers.1.mlp.down_proj") {
                weight[3] += 1.0;
            }
        })
    };
    let refused = |parts, work: &(dyn Fn(usize) -> (BlockPruning, Windows, Decoder<QuantLinear>) + Sync)| {
        on_ranks(2, |ranks| {
            let (pruning, windows, model) = work(ranks.rank());
            pruning.prune(model, Some(&windows), &shared(ranks, parts)).unwrap_err().to_string()
        })
    };
    let model = load("llama-untied-bf16");
    assert!(model.slot_shapes().iter().any(|(path, _)| path.ends_with("layers.1.mlp.down_proj")));
    let pruning =
        |ratio| BlockPruning { layers: LayerRange::All, ..BlockPruning::new(Criterion::TaylorFirst, ratio) };
    let windows = calibration().with_rows(1);
    let cases = [
        (
            "rank 1: options: expected",
            refused(2, &|rank| (pruning([0.5, 0.25][rank]), windows.clone(), model.clone())),
        ),
        (
            "rank 1: calibration: expected",
            refused(2, &|rank| (pruning(0.5), windows.first(6 - rank), model.clone())),
        ),
        (
            "rank 1: model: expected",
            refused(2, &|rank| {
                (pruning(0.5), windows.clone(), if rank == 0 { model.clone() } else { other(model.clone()) })
            }),
        ),
        (
            "parts: expected from 2, the number of ranks, to 6",
            refused(1, &|_| (pruning(0.5), windows.clone(), model.clone())),
        ),
        (
            "to 1, the number of things to share, found 2",
            refused(2, &|_| (pruning(0.5), calibration().with_rows(8), model.clone())),
        ),
    ];
    for (expected, found) in cases {
        assert!(found.iter().all(|found| found.contains(expected)), "{expected}: {found:?}");
    }
}
