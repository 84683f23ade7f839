//! Whole models by every method.

use burn::{module::Module, optim::GradientsAccumulator};
use kiln_adapters::{PeftFolder, save_peft};
use kiln_calibration::{
    ApiqConfig, CalibrationConfig, CalibrationReport, Calibrator, GptqConfig, LoftqConfig, Method, Rounding,
    Svd, block_errors,
};
use kiln_models::{
    Decoder, DriverOptions, Slots, Targets, TokenBatch, Windows, families::NormPlace, loss_and_gradients,
    token_nll,
};
use kiln_quant_core::{Plan, QuantLinear, Scheme};

use crate::setup::*;

fn calibrate(config: &CalibrationConfig, count: usize) -> (Model, CalibrationReport) {
    let (model, windows) = (tiny(), windows(count));
    let attacher = attacher(&model);
    Calibrator::new(config, &windows).with_adapters(&attacher).run(model).unwrap()
}

/// Held-out error of the residual stream after the last block.
fn last_error(model: &Model) -> f64 {
    *block_errors(&tiny(), model, &held_out()).unwrap().last().unwrap()
}

fn nll(model: &impl kiln_models::CausalLm) -> f64 {
    let windows = held_out();
    let sums = windows.as_slice().iter().map(|window| {
        let mut targets = window[1..].to_vec();
        targets.push(0);
        let mut scored = vec![true; window.len()];
        scored[window.len() - 1] = false;
        let targets = Targets { ids: &targets, scored: &scored };
        let nll = token_nll(model, &TokenBatch::new(std::slice::from_ref(window)).unwrap(), targets).unwrap();
        nll.iter().map(|nll| f64::from(*nll)).sum::<f64>() / nll.len() as f64
    });
    sums.sum::<f64>() / windows.count() as f64
}

#[test]
fn at_two_bits_activations_are_ordered_as_in_the_paper() {
    // Held-out errors of the residual stream after every block, and the likelihood.
    let error = |method: Method| {
        let (model, report) = calibrate(&config(method, "affine2:64"), 24);
        assert_eq!(report.blocks.len(), 4);
        (block_errors(&tiny(), &model, &held_out()).unwrap(), nll(&model))
    };
    let rtn = error(Method::Rtn(Rounding::MinMax));
    let loftq = error(Method::Loftq(LoftqConfig::default()));
    let clipping = error(Method::Clipping(apiq(10)));
    let layer = error(Method::ApiqLayer(apiq(10)));
    let block = error(Method::ApiqBlock(apiq(10)));
    let ordered = |what: &str, better: &[f64], worse: &[f64]| {
        assert!(better.iter().zip(worse).all(|(a, b)| a < b), "{what}: {better:?} and {worse:?}");
    };
    ordered("block, clipping", &block.0, &clipping.0);
    ordered("clipping, rtn", &clipping.0, &rtn.0);
    ordered("layer, loftq", &layer.0, &loftq.0);
    ordered("loftq, rtn", &loftq.0, &rtn.0);
    ordered("block, layer at the end", &block.0[3..], &layer.0[3..]);
    // And the loss of likelihood, though it is not what was optimised.
    let dense = nll(&tiny());
    assert!(block.1 - dense < 0.8 * (loftq.1 - dense), "{dense}: block {block:?}, loftq {loftq:?}");
    assert!(loftq.1 - dense < 0.9 * (rtn.1 - dense), "{dense}: loftq {loftq:?}, rtn {rtn:?}");
}

/// The embedded model with an input of a block's attention that is always zero.
fn with_dead_channel(block: usize, channel: usize) -> Decoder<QuantLinear> {
    let mut model = tiny();
    let norm = model.blocks[block].norm_mut(NormPlace::PreAttention).unwrap();
    let weight = norm.weight.take().unwrap();
    norm.weight = Some(weight.map(|weight| weight.slice_fill(channel..channel + 1, 0.0)));
    model
}

#[test]
fn dead_channels_cost_nothing() {
    let windows = windows(24);
    let last = |method: Method| {
        let model = with_dead_channel(1, 5);
        let attacher = attacher(&model);
        let config = config(method, "affine2:64");
        let (found, report) = Calibrator::new(&config, &windows).with_adapters(&attacher).run(model).unwrap();
        let q_proj = &report.blocks[1].projections[0];
        assert!(q_proj.activation_error_after < q_proj.activation_error_before * 1.001, "{q_proj:?}");
        for (path, weight, factors) in contents(&found) {
            assert!(weight.unwrap().dequantize().iter().all(|value| value.is_finite()), "{path}");
            assert!(factors.iter().flatten().all(|value| value.is_finite()), "{path}");
        }
        let errors = block_errors(&with_dead_channel(1, 5), &found, &held_out()).unwrap();
        errors[3]
    };
    let rtn = last(Method::Rtn(Rounding::MinMax));
    for method in [
        Method::Gptq(GptqConfig::default()),
        Method::Gptq(GptqConfig { act_order: true, ..GptqConfig::default() }),
        Method::ApiqLayer(apiq(4)),
        Method::ApiqBlock(apiq(4)),
    ] {
        let error = last(method.clone());
        assert!(error < 0.9 * rtn, "{method:?}: {error}, rounding {rtn}");
    }
}

#[test]
fn more_budget_helps() {
    let error = |epochs, count| {
        let (model, report) = calibrate(&config(Method::ApiqBlock(apiq(epochs)), "affine2:64"), count);
        for block in &report.blocks {
            assert_eq!(block.losses.len(), epochs);
            assert!(block.losses.windows(2).all(|pair| pair[1] < pair[0] * 1.05), "{:?}", block.losses);
        }
        last_error(&model)
    };
    let errors = [error(1, 6), error(4, 6), error(8, 16)];
    assert!(errors.windows(2).all(|pair| pair[1] < pair[0]), "{errors:?}");
}

#[test]
fn gptq_beats_rounding_and_reports_what_it_did() {
    let methods = [Method::Rtn(Rounding::MinMax), Method::Gptq(GptqConfig::default())];
    let [rtn, gptq] = methods.map(|method| calibrate(&config(method, "affine3:64:int"), 12));
    assert!(last_error(&gptq.0) < last_error(&rtn.0));
    for block in &gptq.1.blocks {
        assert_eq!(block.projections.len(), 7);
        assert!(block.losses.is_empty() && block.activation_error > 0.0 && block.seconds > 0.0);
        for projection in &block.projections {
            assert!(projection.path.starts_with(&format!("model.layers.{}.", block.index)));
            let errors = [projection.weight_error, projection.activation_error_before];
            assert!(errors.iter().all(|error| (0.01..1.5).contains(error)), "{projection:?}");
            assert!(projection.activation_error_after < projection.activation_error_before, "{projection:?}");
            assert!(projection.seconds > 0.0);
        }
    }
    // Rounding is its own yardstick.
    let rounded = rtn.1.blocks.iter().flat_map(|block| &block.projections);
    for projection in rounded {
        let difference = projection.activation_error_after - projection.activation_error_before;
        assert!(difference.abs() < 1e-3 * projection.activation_error_before, "{projection:?}");
    }
}

#[test]
fn factors_make_up_for_the_scaling_and_a_correction_helps() {
    let weight_error = |config: CalibrationConfig| {
        let (_, report) = calibrate(&CalibrationConfig { measured_windows: 0, ..config }, 2);
        report.blocks.iter().flat_map(|block| &block.projections).map(|p| p.weight_error).sum::<f64>() / 28.0
    };
    let rtn = config(Method::Rtn(Rounding::MinMax), "affine2:64");
    let plain = weight_error(rtn.clone());
    let corrected = weight_error(CalibrationConfig { correction: Some(Svd::Exact), ..rtn });
    let one = LoftqConfig { iterations: 1, svd: Svd::Exact, ..LoftqConfig::default() };
    let loftq = weight_error(config(Method::Loftq(one), "affine2:64"));
    let more = weight_error(config(Method::Loftq(LoftqConfig::default()), "affine2:64"));
    let pissa = Method::Pissa { rounding: Rounding::MinMax, svd: Svd::Exact };
    let pissa = weight_error(config(pissa, "affine2:64"));
    // Were the scaling of 1/4 not divided out, hardly anything would be gained.
    assert!(corrected < 0.95 * plain, "{corrected} and {plain}");
    assert!((corrected - loftq).abs() < 1e-6, "{corrected} and {loftq}");
    assert!(more < loftq && pissa < plain, "{more}, {loftq}; {pissa}, {plain}");
}

#[test]
fn the_published_tool_leaves_the_scaling_in() {
    let contents = [true, false].map(|compensate_scaling| {
        let config = LoftqConfig { compensate_scaling, ..LoftqConfig::default() };
        contents(
            &calibrate(
                &CalibrationConfig {
                    measured_windows: 0,
                    ..self::config(Method::Loftq(config), "affine2:64")
                },
                1,
            )
            .0,
        )
    });
    let [ours, published] = &contents;
    for (ours, published) in ours.iter().zip(published) {
        assert_eq!((&ours.1, &ours.2[0]), (&published.1, &published.2[0]));
        // The scaling is 1/4.
        let restored: Vec<f32> = published.2[1].iter().map(|b| 4.0 * b).collect();
        assert!(ours.2[1] == restored && restored.iter().any(|b| *b != 0.0), "{}", ours.0);
    }
}

#[test]
fn the_result_trains_its_factors_only_and_survives_a_peft_folder() {
    let (model, windows) = (tiny(), windows(4));
    let attacher = attacher(&model);
    let config = config(Method::ApiqBlock(apiq(2)), "affine2:64");
    let (model, _) = Calibrator::new(&config, &windows).with_adapters(&attacher).run(model).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let mut adapters = Vec::new();
    for (path, slot) in model.slots() {
        adapters.push((path.to_string(), slot.adapter.clone().unwrap()));
    }
    save_peft(folder.path(), attacher.config(), adapters.iter().map(|(path, lora)| (path.as_str(), lora)))
        .unwrap();
    let base = model.clone().try_map(|_, slot| Ok::<_, std::convert::Infallible>(slot.into_base())).unwrap();
    let stored = PeftFolder::open(folder.path()).unwrap();
    let stored = stored.attacher::<kiln_adapters::Lora>(&base.slot_shapes(), 0).unwrap();
    let loaded = base.try_map(|path, base| stored.attach(path, base)).unwrap();
    assert_eq!(contents(&loaded), contents(&model));

    let training = model.train();
    let tokens = windows.batches_of(1).remove(0);
    let scored = vec![true; 48];
    let targets = Targets { ids: &windows.as_slice()[1], scored: &scored };
    let mut gradients = GradientsAccumulator::new();
    let options = DriverOptions::default();
    loss_and_gradients(&training, &tokens, targets, &options, &mut gradients).unwrap();
    // A and B of 28 projections.
    assert_eq!(gradients.grads().len(), 56);
}

#[test]
fn plans_mix_widths_grids_dense_projections_and_slots_without_adapters() {
    let scheme = |text: &str| text.parse::<Scheme>().unwrap();
    let schemes = Plan::uniform(scheme("affine3:32"))
        .with_override("q_proj", scheme("dense"))
        .unwrap()
        .with_override("fc1", scheme("affine2:32:sym:f16"))
        .unwrap()
        .with_override(r"layers\.1\.fc2", scheme("affine4:col"))
        .unwrap();
    let ids: Vec<u32> = ids("shift_test_moby").iter().map(|id| id % 256).collect();
    let windows = Windows::random(&ids, 24, 5, 1).unwrap();
    for method in [
        Method::ApiqBlock(ApiqConfig { augmented: true, ..apiq(12) }),
        Method::ApiqLayer(apiq(6)),
        Method::Gptq(GptqConfig { act_order: true, ..GptqConfig::default() }),
    ] {
        let (_, model) = dense("tiny/opt-f32");
        let adapters =
            kiln_adapters::AdapterConfig::lora(4, 4.0).with_targets(["v_proj", "fc1"]).with_seed(1);
        let attacher = kiln_adapters::LoraAttacher::new(&adapters, &model.slot_shapes()).unwrap();
        let before = model.clone();
        let config = CalibrationConfig::new(method, schemes.clone());
        let (found, report) = Calibrator::new(&config, &windows).with_adapters(&attacher).run(model).unwrap();
        let mut kinds = Vec::new();
        for (path, slot) in found.slots() {
            let kind = match &slot.base {
                QuantLinear::Packed(linear) => linear.weight.scheme().to_string(),
                QuantLinear::Dense(_) => "dense".into(),
            };
            kinds.push(kind);
            let adapted = path.ends_with("v_proj") || path.ends_with("fc1");
            assert_eq!(slot.adapter.is_some(), adapted, "{path}");
        }
        assert_eq!((kinds[0].as_str(), kinds[5].as_str()), ("dense", "affine3:32"));
        assert_eq!((kinds[6].as_str(), kinds[11].as_str()), ("dense", "affine4:col"));
        // The two symmetric grids differ; ApiQ's needs its offsets.
        let symmetric = if matches!(config.method, Method::Gptq(_)) {
            "affine2:32:sym:f16"
        } else {
            "affine2:32:int:f16"
        };
        assert_eq!(kinds[4], symmetric);
        let errors = block_errors(&before, &found, &windows).unwrap();
        let reported: Vec<f64> = report.blocks.iter().map(|block| block.activation_error).collect();
        for (found, reported) in errors.iter().zip(&reported) {
            assert!((found - reported).abs() < 1e-4 * reported, "{errors:?} {reported:?}");
        }
    }
}
