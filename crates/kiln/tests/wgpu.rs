//! One pipeline on a GPU, or on software Vulkan, against Flex: load to 4 bits, attach LoRA, train, evaluate.
//!
//! Without a Vulkan adapter, or the feature `wgpu`, the test says so and passes, unless `KILN_REQUIRE_VULKAN=1`.

use std::sync::Arc;

use burn::tensor::Device;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    eval::WindowedPerplexity,
    models::{Checkpoint, LoadOptions, Recompute},
    quant::Scheme,
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};
use kiln_testkit::vulkan;

/// Losses of three steps and the perplexity after them.
fn pipeline(device: &Device, recompute: Recompute) -> Vec<f64> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap());
    let (model, _) = Checkpoint::open(folder).unwrap().load(&options, device).unwrap();
    let model = Tuned::attach(model, &AdapterConfig::lora(4, 8.0).with_seed(3)).unwrap().into_model();
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
    let Some(vulkan) = vulkan() else { return };
    let expected = pipeline(&Device::flex(), Recompute::None);
    assert!(expected[2] < expected[0], "the loss falls: {expected:?}");
    let found = pipeline(&vulkan.device, Recompute::Block);
    for (found, expected) in found.iter().zip(&expected) {
        // AdamW's first steps magnify rounding.
        assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    }
}
