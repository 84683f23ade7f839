//! AWQ's scaling before any method.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor};
use kiln_adapters::LoraAttacher;
use kiln_calibration::{
    AwqConfig, CalibrationConfig, CalibrationReport, Calibrator, Error, GptqConfig, Method, Progress,
    Rounding, block_errors,
};
use kiln_models::{
    Block, CausalLm, Checkpoint, Decoder, LoadOptions, Slots, TokenBatch, Windows,
    export::save_model,
    families::{LinearRole, NormPlace},
};
use kiln_quant_core::{Plan, Projection, QuantLinear, Scheme};
use kiln_testkit::read;

use crate::setup::*;

fn scaled(method: Method, scheme: &str) -> CalibrationConfig {
    CalibrationConfig { scaling: Some(AwqConfig::default()), ..config(method, scheme) }
}

const RTN: Method = Method::Rtn(Rounding::MinMax);

fn calibrate(
    config: &CalibrationConfig,
    model: Decoder<QuantLinear>,
    windows: &Windows,
) -> (Model, CalibrationReport) {
    let attacher = attacher(&model);
    Calibrator::new(config, windows).with_adapters(&attacher).run(model).unwrap()
}

/// The residual stream after each block.
fn hidden(model: &impl CausalLm, window: &[u32]) -> Vec<Vec<f32>> {
    let context =
        model.context(&TokenBatch::new(std::slice::from_ref(&window.to_vec())).unwrap(), None).unwrap();
    model.hidden_states(&context).into_iter().map(read).collect()
}

/// The embedded model with some inputs of each attention and MLP thirty times as large and read by weights a thirtieth
/// as large: the same function.
fn with_outliers() -> Decoder<QuantLinear> {
    let mut model = tiny();
    for block in &mut model.blocks {
        let width = block.linear(LinearRole::Query).unwrap().shape()[0];
        let factors: Vec<f32> = (0..width).map(|i| if i % 16 == 5 { 30.0 } else { 1.0 }).collect();
        let factors = Tensor::<1>::from_floats(factors.as_slice(), &Device::flex());
        for (_, norm) in block.norms_mut() {
            norm.weight = norm.weight.take().map(|weight| weight.map(|weight| weight * factors.clone()));
        }
        use LinearRole::{Gate, Key, Query, Up, Value};
        for reader in [Query, Key, Value, Gate, Up] {
            let QuantLinear::Dense(linear) = block.linear_mut(reader).unwrap() else { panic!("dense") };
            let factors = factors.clone().reshape([width, 1]);
            linear.weight = linear.weight.clone().map(|weight| weight / factors);
        }
    }
    model
}

/// A model of the LLaMA family in which each query head has a copy of the key and value head that it shared.
fn with_own_heads(model: Decoder<QuantLinear>) -> Decoder<QuantLinear> {
    let mut model = model;
    let mut config = model.config().clone();
    let (heads, width) = (config.num_key_value_heads, config.head_dim);
    let copies = config.num_attention_heads / heads;
    config.num_key_value_heads = config.num_attention_heads;
    let copy = |weight: Tensor<2>| {
        let [rows, columns] = weight.dims();
        weight.reshape([rows, heads, 1, width]).repeat_dim(2, copies).reshape([rows, columns * copies])
    };
    for block in &mut model.blocks {
        for role in [LinearRole::Key, LinearRole::Value] {
            let QuantLinear::Dense(linear) = block.linear_mut(role).unwrap() else { panic!("dense") };
            linear.weight = linear.weight.clone().map(copy);
            linear.bias = linear.bias.take().map(|bias| bias.map(|bias| copy(bias.unsqueeze()).squeeze()));
        }
    }
    model.with_config(config).unwrap()
}

#[test]
fn scaling_alone_changes_nothing_in_any_family() {
    for (folder, own_heads) in [
        ("models/tiny-llama", false),
        ("tiny/llama-rope3-headdim24-f32", false),
        ("tiny/mistral-swa8-f32", true),
        ("tiny/qwen2-tied-f32", false),
        ("tiny/qwen2-tied-f32", true),
        ("tiny/qwen3-untied-f32", false),
        ("tiny/opt-f32", false),
        ("tiny/gemma3-text-f32", false),
    ] {
        let load = || if own_heads { with_own_heads(dense(folder).1) } else { dense(folder).1 };
        let original = load();
        let ids: Vec<u32> =
            ids("shift_test_moby").iter().map(|id| id % original.vocab_size() as u32).collect();
        let windows = Windows::random(&ids, 24, 3, 1).unwrap();
        // Hardly any rounding.
        let error = |config: &CalibrationConfig| {
            let (model, report) = calibrate(config, load(), &windows);
            (*block_errors(&original, &model, &windows).unwrap().last().unwrap(), report)
        };
        let (plain, _) = error(&config(RTN, "affine8:8"));
        let (with, report) = error(&scaled(RTN, "affine8:8"));
        assert!(with < 2.0 * plain && plain < 0.02, "{folder}: {with} and {plain}");
        let scalings: Vec<_> = report.blocks.iter().flat_map(|block| &block.scalings).collect();
        assert!(scalings.iter().any(|scaling| scaling.exponent > 0.0), "{folder}: {scalings:?}");
        let sites = if own_heads || folder.contains("opt") { 4 } else { 3 };
        assert_eq!(report.blocks[0].scalings.len(), sites, "{folder}: {scalings:?}");
    }
}

#[test]
fn large_inputs_are_rounded_less_by_every_method() {
    let (windows, held_out) = (windows(12), held_out());
    let plain_model = tiny();
    let errors = |config: &CalibrationConfig| {
        let (model, report) = calibrate(config, with_outliers(), &windows);
        (*block_errors(&plain_model, &model, &held_out).unwrap().last().unwrap(), report)
    };
    let (rtn, _) = errors(&config(RTN, "affine3:64"));
    let (awq, report) = errors(&scaled(RTN, "affine3:64"));
    assert!(awq < 0.7 * rtn, "{awq} and {rtn}");
    for block in &report.blocks {
        let [input, post_attention, _] = &block.scalings[..] else { panic!("{block:?}") };
        for (scaling, norm) in [(input, "input_layernorm"), (post_attention, "post_attention_layernorm")] {
            assert_eq!(scaling.source, format!("model.layers.{}.{norm}.weight", block.index));
            assert!(scaling.error_after < 0.8 * scaling.error_before, "{scaling:?}");
        }
    }
    for method in [Method::Gptq(GptqConfig::default()), Method::ApiqBlock(apiq(4))] {
        let (without, _) = errors(&config(method.clone(), "affine3:64"));
        let (with, _) = errors(&scaled(method.clone(), "affine3:64"));
        assert!(with < without && with < awq, "{method:?}: {with}, {without} without, {awq}");
    }
}

#[test]
fn sites_with_a_projection_that_stays_are_left_alone() {
    let mut config = scaled(RTN, "affine3:64");
    config.schemes = Plan::uniform("affine3:64".parse().unwrap())
        .with_override("k_proj", Scheme::Dense)
        .unwrap()
        .with_override(r"layers\.2\..*up_proj", Scheme::Dense)
        .unwrap();
    let (model, report) = calibrate(&config, with_outliers(), &windows(3));
    let original = with_outliers();
    for (index, (found, original)) in model.blocks.iter().zip(&original.blocks).enumerate() {
        let gains = |block: &Block<_>, place| read(block.norm(place).unwrap().weight.as_ref().unwrap().val());
        let original = |place| read(original.norm(place).unwrap().weight.as_ref().unwrap().val());
        assert_eq!(gains(found, NormPlace::PreAttention), original(NormPlace::PreAttention));
        let same = gains(found, NormPlace::PreMlp) == original(NormPlace::PreMlp);
        assert_eq!(same, index == 2);
        let readers: Vec<&str> =
            report.blocks[index].scalings.iter().flat_map(|site| &site.readers).map(String::as_str).collect();
        assert!(readers.iter().all(|path| !path.contains("q_proj")), "{readers:?}");
        assert_eq!(readers.iter().any(|path| path.contains("down_proj")), index != 2, "{readers:?}");
    }
}

/// Cancels behind the second block and goes on; returns both models and their reports.
fn interrupted(
    config: &CalibrationConfig,
    load: impl Fn() -> Decoder<QuantLinear>,
    windows: &Windows,
    folder: &std::path::Path,
) -> [(Model, CalibrationReport); 2] {
    let attacher = attacher(&load());
    let run = |observer: kiln_calibration::Observer| {
        let calibrator = Calibrator::new(config, windows).with_adapters(&attacher);
        calibrator.with_folder(folder).run_with(load(), observer)
    };
    let result = run(&mut |progress| match progress {
        Progress::Block { report, .. } if report.index == 0 => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert!(matches!(result, Err(Error::Cancelled { blocks: 1, .. })));
    [calibrate(config, load(), windows), run(&mut |_| ControlFlow::Continue(())).unwrap()]
}

#[test]
fn biases_and_both_parameters_of_a_layer_norm_are_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let windows = Windows::random(&(0..200).collect::<Vec<u32>>(), 24, 3, 1).unwrap();
    let load = || dense("tiny/opt-f32").1;
    let [expected, resumed] = interrupted(&scaled(RTN, "affine3:16"), load, &windows, folder.path());
    assert!(expected.1.blocks[0].scalings.iter().all(|scaling| scaling.exponent > 0.0), "{:?}", expected.1);
    assert_eq!(hidden(&resumed.0, &windows.as_slice()[0]), hidden(&expected.0, &windows.as_slice()[0]));
}

#[test]
fn norms_are_resumed_saved_and_compared() {
    let (config, windows) = (scaled(RTN, "affine3:64"), windows(3));
    let folder = tempfile::tempdir().unwrap();
    let [(expected, report), (resumed, again)] = interrupted(&config, with_outliers, &windows, folder.path());
    let streams = hidden(&expected, &windows.as_slice()[0]);
    assert_eq!(hidden(&resumed, &windows.as_slice()[0]), streams);
    assert_eq!(again.blocks[0].scalings, report.blocks[0].scalings);

    // A model that differs in a norm of a finished block only.
    let mut other = with_outliers();
    let norm = other.blocks[2].norm_mut(NormPlace::PreMlp).unwrap();
    norm.weight = norm.weight.take().map(|weight| weight.map(|weight| weight.slice_fill(3..4, 0.5)));
    let attacher: LoraAttacher = attacher(&tiny());
    let calibrator = Calibrator::new(&config, &windows).with_adapters(&attacher).with_folder(folder.path());
    let message = calibrator.run(other).unwrap_err().to_string();
    assert!(message.contains("block-00002.safetensors"), "{message}");
    assert!(message.contains("model.layers.2.post_attention_layernorm.weight"), "{message}");

    // The whole model is saved with its norms, and read back to the same bits.
    let (checkpoint, _) = dense("models/tiny-llama");
    let base = expected.try_map(|_, slot| Ok::<_, std::convert::Infallible>(slot.into_base())).unwrap();
    let saved = folder.path().join("saved");
    save_model(&base, &checkpoint, &saved).unwrap();
    let (loaded, _) =
        Checkpoint::open(&saved).unwrap().load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert_eq!(hidden(&loaded, &windows.as_slice()[0]), streams);
}

#[test]
fn weights_from_the_file_are_scaled_like_those_in_the_slots() {
    let (config, windows) = (scaled(RTN, "affine3:64"), windows(2));
    let (checkpoint, model) = dense("models/tiny-llama");
    let expected = hidden(&calibrate(&config, model, &windows).0, &windows.as_slice()[0]);
    let options = LoadOptions::uniform("affine2:64".parse().unwrap()).in_f32();
    let (skeleton, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    let calibrator = Calibrator::new(&config, &windows).with_weights(checkpoint.source());
    let (model, _) = calibrator.run(skeleton).unwrap();
    assert_eq!(hidden(&model, &windows.as_slice()[0]), expected);
}

#[test]
fn an_empty_grid_is_refused() {
    let mut config = scaled(RTN, "affine3:64");
    config.scaling = Some(AwqConfig { grid: 0 });
    let message = Calibrator::new(&config, &windows(1)).run(tiny()).unwrap_err().to_string();
    assert!(message.contains("AwqConfig.grid"), "{message}");
}
