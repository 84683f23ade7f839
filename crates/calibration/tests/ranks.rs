//! Calibrations that several ranks share: the same bits as on one, and errors that all hear of.

use std::{ops::ControlFlow, path::Path, sync::Arc};

use kiln_adapters::Svd;
use kiln_calibration::{
    CalibrationConfig, CalibrationReport, Calibrator, Error, GptqConfig, LoftqConfig, Method, Observer,
    Progress, Result, Rounding,
};
use kiln_distributed::{Alone, Sharing};
use kiln_models::{Decoder, Windows, families::LinearRole};
use kiln_quant_core::QuantLinear;
use kiln_testkit::on_ranks;

use crate::setup::*;

type Found = (Vec<Contents>, CalibrationReport);

fn calibrated(
    config: &CalibrationConfig,
    windows: &Windows,
    sharing: Sharing,
    folder: Option<&Path>,
    observer: Observer,
) -> Result<Found> {
    let model = tiny();
    let attacher = attacher(&model);
    let mut calibrator = Calibrator::new(config, windows).with_adapters(&attacher).with_sharing(sharing);
    if let Some(folder) = folder {
        calibrator = calibrator.with_folder(folder);
    }
    let (model, mut report) = calibrator.run_with(model, observer)?;
    for block in &mut report.blocks {
        block.seconds = 0.0;
        block.projections.iter_mut().for_each(|projection| projection.seconds = 0.0);
    }
    Ok((contents(&model), report))
}

fn quiet(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn gptq() -> CalibrationConfig {
    config(Method::Gptq(GptqConfig { act_order: true, ..GptqConfig::default() }), "affine3:64:f16")
}

#[test]
fn any_number_of_ranks_gives_the_bits_of_one() {
    let windows = windows(7);
    let mut scaled = gptq();
    (scaled.scaling, scaled.correction) = (Some(Default::default()), Some(Svd::default()));
    let loftq = config(Method::Loftq(LoftqConfig::default()), "nf4:64");
    let mut partly = config(Method::Rtn(Rounding::MinMax), "affine2:64");
    partly.schemes = partly.schemes.with_override("v_proj", "dense".parse().unwrap()).unwrap();
    for config in [gptq(), scaled, loftq, partly] {
        let alone = |parts| {
            let sharing = Sharing::new(Arc::new(Alone), parts);
            calibrated(&config, &windows, sharing, None, &mut quiet).unwrap()
        };
        let plain = calibrated(&config, &windows, Sharing::default(), None, &mut quiet).unwrap();
        assert_eq!(alone(1), plain);
        let expected = alone(5);
        // Sums in parts are the same sums, but for their last bits.
        for (block, same) in expected.1.blocks.iter().zip(&plain.1.blocks) {
            let apart = (block.activation_error - same.activation_error).abs();
            assert!(
                apart < 0.02 * same.activation_error,
                "{} {}",
                block.activation_error,
                same.activation_error
            );
        }
        for size in [2, 3, 5] {
            let found = on_ranks(size, |ranks| {
                calibrated(&config, &windows, Sharing::new(ranks, 5), None, &mut quiet).unwrap()
            });
            assert!(found.iter().all(|found| *found == expected), "{size} ranks, {:?}", config.method);
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_with_another_number_of_ranks() {
    let (config, windows) = (gptq(), windows(4));
    let expected = calibrated(&config, &windows, Sharing::new(Arc::new(Alone), 4), None, &mut quiet).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    std::fs::create_dir(&path).unwrap();
    // Ended by the last rank's observer, first behind the first block, then in the middle of the third.
    for (size, last) in [(3, 0), (2, 2)] {
        let errors = on_ranks(size, |ranks| {
            let is_last = ranks.rank() == size - 1;
            let mut observer = |progress: Progress| match progress {
                Progress::Block { report, .. } if is_last && last == 0 && report.index == 0 => {
                    ControlFlow::Break(())
                }
                Progress::Projection { block, .. } if is_last && last == 2 && block == 2 => {
                    ControlFlow::Break(())
                }
                _ => ControlFlow::Continue(()),
            };
            calibrated(&config, &windows, Sharing::new(ranks, 4), Some(&path), &mut observer).unwrap_err()
        });
        let blocks = if last == 0 { 1 } else { 2 };
        for (rank, error) in errors.iter().enumerate() {
            match error {
                Error::Cancelled { blocks: found, total: 4 } if rank == size - 1 => {
                    assert_eq!(*found, blocks)
                }
                error => {
                    let failed =
                        format!("rank {} failed: calibration cancelled after {blocks} of 4", size - 1);
                    assert!(error.to_string().starts_with(&failed), "{error}");
                }
            }
        }
    }
    let mut seen = Vec::new();
    let alone = Sharing::new(Arc::new(Alone), 4);
    let found = calibrated(&config, &windows, alone, Some(&path), &mut |progress| {
        if let Progress::Block { report, .. } = progress {
            seen.push(report.index);
        }
        ControlFlow::Continue(())
    });
    assert_eq!(found.unwrap(), expected);
    assert_eq!(seen, [2, 3]);
    // All of it is read; rank 1 has no folder there.
    for found in on_ranks(2, |ranks| {
        let path = if ranks.rank() == 0 { path.clone() } else { folder.path().join("missing") };
        calibrated(&config, &windows, Sharing::new(ranks, 4), Some(&path), &mut |_| panic!("nothing to do"))
    }) {
        assert_eq!(found.unwrap(), expected);
    }
    // Sums in other parts are another run.
    let other = calibrated(&config, &windows, Sharing::default(), Some(&path), &mut quiet).unwrap_err();
    assert!(other.to_string().contains("another run's"), "{other}");
}

#[test]
fn ranks_that_differ_or_fail_are_named_by_all() {
    let same = windows(4);
    let refused =
        |parts: usize,
         work: &(dyn Fn(usize) -> (CalibrationConfig, Windows, Decoder<QuantLinear>) + Sync)| {
            let errors = on_ranks(2, |ranks| {
                let (config, windows, model) = work(ranks.rank());
                let calibrator = Calibrator::new(&config, &windows).with_sharing(Sharing::new(ranks, parts));
                calibrator.run(model).map(|_| ()).unwrap_err().to_string()
            });
            errors.into_iter().collect::<Vec<_>>()
        };
    let all = |expected: &str, found: Vec<String>| {
        assert!(found.iter().all(|found| found.contains(expected)), "expected {expected:?}, found {found:?}");
    };
    all(
        "windows: expected",
        refused(4, &|rank| (gptq(), if rank == 0 { same.clone() } else { held_out_of(4) }, tiny())),
    );
    all(
        "options: expected",
        refused(4, &|rank| {
            let mut config = gptq();
            config.measured_windows = 4 + rank;
            (config, same.clone(), tiny())
        }),
    );
    // A weight of a later block.
    all(
        "model.layers.2.mlp.down_proj: expected",
        refused(4, &|rank| (gptq(), same.clone(), changed(2, rank as f32))),
    );
    all("parts: expected from 2", refused(1, &|_| (gptq(), same.clone(), tiny())));
    for method in [Method::ApiqBlock(apiq(1)), Method::ApiqLayer(apiq(1)), Method::Clipping(apiq(1))] {
        let config = config(method, "affine2:64");
        all(
            "Calibrator::with_sharing: expected one rank, for a method that learns from one window after another, found 2",
            refused(2, &|_| (config.clone(), same.clone(), tiny())),
        );
    }
    // Of windows that both have, and of one that rank 1 has.
    all("model.layers.1.mlp.down_proj", refused(2, &|_| (gptq(), same.clone(), changed(1, f32::INFINITY))));
}

/// The embedded model with another value in the down projection of a block.
fn changed(block: usize, by: f32) -> Decoder<QuantLinear> {
    let mut model = tiny();
    let QuantLinear::Dense(linear) = model.blocks[block].linear_mut(LinearRole::Down).unwrap() else {
        panic!("dense")
    };
    linear.weight = linear.weight.clone().map(|weight| weight.slice_fill([3..4, 5..6], by));
    model
}

fn held_out_of(count: usize) -> Windows {
    Windows::random(&ids("indomain_heldout_sotu_2011"), 48, count, 77).unwrap()
}
