//! ApiQ and LoftQ on a GPU, or on software Vulkan, against Flex.
//!
//! Without a Vulkan adapter, or the feature `wgpu`, the test says so and passes, unless `KILN_REQUIRE_VULKAN=1`.

use burn::tensor::Device;
use kiln_adapters::{AdapterConfig, LoraAttacher};
use kiln_calibration::{CalibrationConfig, Calibrator, LoftqConfig, Method};
use kiln_models::{Checkpoint, LoadOptions, Slots, Windows};
use kiln_quant_core::Scheme;
use kiln_testkit::{relative_difference, testdata, vulkan};

use crate::setup::*;

/// What a calibration of the tiny LLaMA decides on a device.
fn calibrated(config: &CalibrationConfig, device: &Device) -> Vec<Contents> {
    let checkpoint = Checkpoint::open(testdata("tiny/llama-tied-f32-sharded")).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::uniform(Scheme::Dense).in_f32(), device).unwrap();
    let adapters = AdapterConfig::lora(4, 8.0).with_seed(3);
    let attacher = LoraAttacher::new(&adapters, &model.slot_shapes()).unwrap();
    let windows = (0..2).map(|k| (0..12).map(|i| (i * i * 7 + k * 31) % 256).collect()).collect();
    let windows = Windows::new(windows).unwrap();
    let (model, _) = Calibrator::new(config, &windows).with_adapters(&attacher).run(model).unwrap();
    contents(&model)
}

#[test]
fn twenty_steps_of_apiq_and_loftq_are_those_of_the_cpu() {
    let Some(vulkan) = vulkan() else { return };
    // Two windows, ten epochs: twenty steps on each of two blocks. AdamW's first steps magnify rounding.
    for (method, tolerance) in [
        (Method::ApiqBlock(apiq(10)), 1e-2),
        (Method::Loftq(LoftqConfig { iterations: 2, ..LoftqConfig::default() }), 1e-4),
    ] {
        let mut config = config(method, "affine2:32");
        config.measured_windows = 1;
        let (expected, found) = (calibrated(&config, &Device::flex()), calibrated(&config, &vulkan.device));
        for ((path, expected, factors), (_, weight, found_factors)) in expected.iter().zip(&found) {
            let dense =
                |weight: &Option<kiln_quant_core::PackedWeight>| weight.as_ref().unwrap().dequantize();
            // A code on a border may fall on either side.
            let difference = relative_difference(&dense(weight), &dense(expected));
            assert!(difference < 0.05, "{path}: weights differ by {difference}");
            for (found, expected) in found_factors.iter().zip(factors) {
                let difference = relative_difference(found, expected);
                assert!(difference < tolerance, "{path}: factors differ by {difference}");
            }
        }
    }
}
