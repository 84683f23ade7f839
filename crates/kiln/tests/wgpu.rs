//! One pipeline on a GPU, or on software Vulkan, against Flex: load to 4 bits, attach LoRA, train, evaluate.
//!
//! Without a Vulkan adapter the test says so and passes, unless `KILN_REQUIRE_VULKAN=1`.

use std::{ops::ControlFlow, sync::Arc};

use burn::tensor::{Device, wgpu::WgpuBackend};
use kiln::{
    adapters::{PeftConfig, TargetModules},
    eval::WindowedPerplexity,
    models::{Checkpoint, LoadOptions, Recompute},
    quant::Scheme,
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};

/// Losses of three steps and the perplexity after them.
fn pipeline(device: &Device, recompute: Recompute) -> Vec<f64> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap());
    let (model, _) = Checkpoint::open(folder).unwrap().load(&options, device).unwrap();
    let config = PeftConfig::new(4, 8.0, TargetModules::AllLinear);
    let (model, _) = kiln::attach_lora(model, &config, 3).unwrap();
    let ids: Vec<u32> = (0..160u32).map(|i| (i * i * 7 + i) % 256).collect();
    let dataset = Dataset::from_ids(ids.clone(), &DataOptions::new(16, 256)).unwrap();
    let mut config = TrainerConfig::new(3, BatchOptions::new(2));
    (config.lr, config.recompute) = (1e-2, recompute);
    let mut trainer = Trainer::new(model, Arc::new(dataset), config).unwrap();
    let mut figures: Vec<f64> = (0..3).map(|_| trainer.step().unwrap().loss).collect();
    let protocol = WindowedPerplexity::new(16).with_max_windows(2);
    let found = protocol.evaluate(&trainer.into_model(), &ids).unwrap();
    figures.push(found.nll);
    figures
}

#[test]
fn training_on_a_gpu_gives_the_losses_of_the_cpu() {
    let device = match Device::wgpu_options().graphics_api(WgpuBackend::Vulkan).init() {
        Ok(device) => device,
        Err(error) => {
            let required = std::env::var("KILN_REQUIRE_VULKAN").is_ok_and(|value| value == "1");
            assert!(!required, "KILN_REQUIRE_VULKAN=1, but {error}");
            println!("skipped: {error}");
            return;
        }
    };
    let expected = pipeline(&Device::flex(), Recompute::None);
    assert!(expected[2] < expected[0], "the loss falls: {expected:?}");
    let found = pipeline(&device, Recompute::Block);
    for (found, expected) in found.iter().zip(&expected) {
        // AdamW's first steps magnify rounding.
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    }
}
