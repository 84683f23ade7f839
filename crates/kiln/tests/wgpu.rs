//! One pipeline on a GPU, or on software Vulkan, against Flex: load to 4 bits, attach LoRA, train, evaluate.
//!
//! Without a Vulkan adapter, or the feature `wgpu`, the test says so and passes, unless `KILN_REQUIRE_VULKAN=1`.

use std::sync::Arc;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Tensor},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, InitLoraWeights, Method},
    eval::WindowedPerplexity,
    models::{
        CausalLm, Checkpoint, DriverOptions, LoadOptions, Place, Recompute, Tables, Targets, TokenBatch,
        loss_and_gradients,
    },
    quant::{Scheme, TrainedParts, with_trained_parts},
    training::{
        BatchOptions, DataOptions, Dataset, Distillation, Example, OptimizerKind, PreferenceLoss, TokenLoss,
        Trainer, TrainerConfig,
    },
};
use kiln_testkit::{launches, read, relative_difference, smollm2, vulkan};

/// Losses of three steps and the perplexity after them.
fn pipeline(device: &Device, recompute: Recompute) -> Vec<f64> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()).in_f32();
    let (model, _) = Checkpoint::open(folder).unwrap().load(&options, device).unwrap();
    let adapters = AdapterConfig::lora(4, 8.0).with_seed(3).with_dropout(0.2);
    let model = Tuned::attach(model, &adapters).unwrap().into_model();
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
    for recompute in [Recompute::Block, Recompute::None] {
        for (found, expected) in pipeline(&vulkan.device, recompute).iter().zip(&expected) {
            // AdamW's first steps magnify rounding.
            assert!((found / expected - 1.0).abs() < 1e-4, "{recompute:?}: {found} {expected}");
        }
    }
}

/// Losses of three steps each: of preferences with averages in 8 bits, beside a teacher, of scales and offsets.
fn other_losses(device: &Device) -> Vec<f64> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let load =
        |options: LoadOptions| Checkpoint::open(folder).unwrap().load(&options.in_f32(), device).unwrap().0;
    let base = || load(LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()));
    let ids =
        |seed: u32, count: u32| (0..count).map(|i| (i * i * 7 + i + seed * 13) % 256).collect::<Vec<u32>>();
    let options = DataOptions::new(24, 256);
    let pairs =
        (0..4).map(|seed| [6, 9].map(|count| Example::answer(&ids(seed, 5), &ids(seed + count, count))));
    let pairs = Arc::new(Dataset::from_pairs(pairs, &options).unwrap());
    let text = Arc::new(Dataset::from_ids(ids(1, 120), &options).unwrap());
    let config = || TrainerConfig::new(3, 2).with_lr(1e-2);
    let adapted = || {
        // Factors of 4096 values and more.
        Tuned::attach(base(), &AdapterConfig::lora(64, 64.0).with_seed(3)).unwrap().into_model()
    };
    let mut found = Vec::new();
    let dpo = config().with_preference(PreferenceLoss::dpo()).with_optimizer(OptimizerKind::AdamW8Bit);
    let mut trainer = Trainer::new(adapted(), pairs, dpo.with_lr(1e-3)).unwrap();
    found.extend((0..3).map(|_| trainer.step().unwrap().loss));
    let loss = TokenLoss::new().with_label_smoothing(0.1).with_z_loss(1e-3);
    let loss = loss.with_distillation(Distillation::default());
    let trainer = Trainer::new(adapted(), text.clone(), config().with_loss(loss).with_lr(1e-3)).unwrap();
    let mut trainer = trainer.with_reference(load(LoadOptions::default())).unwrap();
    found.extend((0..3).map(|_| trainer.step().unwrap().loss));
    let model = with_trained_parts(base(), TrainedParts::ScalesAndOffsets, None).unwrap();
    let mut trainer = Trainer::new(model, text, config().with_lr(1e-4)).unwrap();
    found.extend((0..3).map(|_| trainer.step().unwrap().loss));
    found
}

#[test]
fn other_losses_and_trained_scales_on_a_gpu_are_those_of_the_cpu() {
    let Some(vulkan) = vulkan() else { return };
    let expected = other_losses(&Device::flex());
    let found = other_losses(&vulkan.device);
    for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
        assert!((found / expected - 1.0).abs() < 1e-4, "{step}: {found} {expected}");
    }
}

/// Loss and all gradients of one pass over two rows of packed documents behind padding, with dropout.
fn gradients(device: &Device, recompute: Recompute, tables: Tables) -> (f64, Vec<Vec<f32>>) {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.extend(self.0.get::<D>(param.id).map(read));
        }
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/mistral-swa8-f32");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()).with_tables(tables).in_f32();
    let (model, _) = Checkpoint::open(folder).unwrap().load(&options, device).unwrap();
    // B is drawn, too, so that A has gradients.
    let method = Method::Lora { init: InitLoraWeights::Random };
    let adapters = AdapterConfig::lora(4, 8.0).with_seed(3).with_dropout(0.3).with_method(method);
    let model = Tuned::attach(model, &adapters).unwrap().into_model().train();
    model.at(Place { step: 5, micro_batch: 1, training: true });
    let ids: Vec<u32> = (0..48).map(|i| (i * 37 + 11) % 256).collect();
    let mut tokens = TokenBatch::masked(ids.clone(), vec![1; 48], 2, 24).unwrap();
    for place in 0..48 {
        tokens.segments[place] = [0, 1, 1, 2][place % 24 / 6];
        tokens.positions[place] = (place % 12) as u32;
    }
    let targets: Vec<u32> = (0..48).map(|place| ids[(place + 1) % 48]).collect();
    let scored: Vec<bool> = (0..48).map(|place| place % 24 >= 6 && place % 5 != 0).collect();
    let mut sums = GradientsAccumulator::new();
    let targets = Targets { ids: &targets, scored: &scored };
    let options = DriverOptions { recompute, logit_rows: 10, ..DriverOptions::default() };
    let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut sums).unwrap();
    let found = sums.grads();
    let mut collect = Collect(&found, Vec::new());
    model.visit(&mut collect);
    (loss, collect.1)
}

#[test]
fn a_pass_on_a_gpu_gives_the_gradients_of_the_cpu() {
    let Some(vulkan) = vulkan() else { return };
    // A packed head's loss is computed a part of the vocabulary at a time there.
    for tables in [Tables::AsStored, Tables::Packed("affine4:32".parse().unwrap())] {
        let (expected_loss, expected) = gradients(&Device::flex(), Recompute::None, tables);
        assert!(expected.len() > 20 && expected.iter().flatten().all(|x| x.is_finite()));
        for recompute in [Recompute::None, Recompute::Block] {
            let (loss, found) = gradients(&vulkan.device, recompute, tables);
            let what = format!("{recompute:?}, {tables:?}");
            assert!((loss / expected_loss - 1.0).abs() < 1e-5, "{what}: {loss} {expected_loss}");
            assert_eq!(found.len(), expected.len());
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let difference = relative_difference(found, expected);
                assert!(difference < 1e-4, "{what}, parameter {i}: {difference:e}");
            }
        }
    }
}

#[test]
fn a_block_of_a_step_takes_a_bounded_number_of_launches() {
    let Some(vulkan) = vulkan() else { return };
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()).in_f32();
    let (model, _) = Checkpoint::open(folder).unwrap().load(&options, &vulkan.device).unwrap();
    let blocks = model.blocks.len();
    let model = Tuned::attach(model, &AdapterConfig::lora(4, 8.0)).unwrap().into_model();
    let ids: Vec<u32> = (0..160u32).map(|i| (i * i * 7 + i) % 256).collect();
    let dataset = Dataset::from_ids(ids, &DataOptions::new(16, 256)).unwrap();
    let mut trainer =
        Trainer::new(model, Arc::new(dataset), TrainerConfig::new(3, BatchOptions::new(2))).unwrap();
    trainer.step().unwrap();
    let (step, launches) = launches(|| trainer.step());
    step.unwrap();
    // Measured: 140 a block, 28 of them the optimizer's.
    assert!(launches <= 145 * blocks, "{launches} launches for {blocks} blocks");
}

/// A trained parameter whose new value found no memory: what is left when an allocation fails in the middle of a step.
struct WithoutMemory(bool);

impl ModuleMapper for WithoutMemory {
    fn map_float<const D: usize>(&mut self, parameter: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !parameter.is_require_grad() || std::mem::replace(&mut self.0, true) {
            return parameter;
        }
        let (id, value, _) = parameter.consume();
        let value = value.inner();
        // More than devices give one tensor.
        let missing = Tensor::<1>::zeros([1_usize << 33], &value.device()).narrow(0, 0, 1).reshape([1; D]);
        Param::initialized(id, Tensor::from_inner(value + missing).require_grad())
    }
}

#[test]
fn memory_that_a_step_does_not_get_is_an_error_and_the_checkpoint_goes_on() {
    let Some(vulkan) = vulkan() else { return };
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/tiny/llama-tied-f32-sharded");
    let options = LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()).in_f32();
    let base = || Checkpoint::open(folder).unwrap().load(&options, &vulkan.device).unwrap().0;
    let model = || Tuned::attach(base(), &AdapterConfig::lora(4, 8.0).with_seed(3)).unwrap().into_model();
    let ids: Vec<u32> = (0..160u32).map(|i| (i * i * 7 + i) % 256).collect();
    let dataset = Arc::new(Dataset::from_ids(ids.clone(), &DataOptions::new(16, 256)).unwrap());
    let config = || TrainerConfig::new(4, 2).with_lr(1e-2);
    let mut whole = Trainer::new(model(), dataset.clone(), config()).unwrap();
    let expected: Vec<f64> = (0..4).map(|_| whole.step().unwrap().loss).collect();

    let run = tempfile::tempdir().unwrap();
    let (kept, lost) = (run.path().join("kept"), run.path().join("lost"));
    let mut trainer = Trainer::new(model(), dataset.clone(), config()).unwrap();
    let mut found: Vec<f64> = (0..2).map(|_| trainer.step().unwrap().loss).collect();
    trainer.save(&kept).unwrap();

    let broken = model().train().map(&mut WithoutMemory(false));
    let protocol = WindowedPerplexity::new(16).with_max_windows(2);
    let error = protocol.evaluate(&broken, &ids).unwrap_err().to_string();
    assert!(error.contains("device"), "{error}");
    let mut trainer = Trainer::new(broken, dataset.clone(), config()).unwrap();
    let error = trainer.step().unwrap_err().to_string();
    assert!(error.contains("losses") && error.contains("device"), "{error}");
    trainer.save(&lost).unwrap_err();
    assert!(!lost.exists(), "nothing was written of it");

    let mut trainer = Trainer::resume(model(), dataset, config(), &kept).unwrap();
    found.extend((0..2).map(|_| trainer.step().unwrap().loss));
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found / expected - 1.0).abs() < 1e-6, "{found} {expected}");
    }
}

/// Of a model larger than the pages of the device's pools.
#[test]
fn a_loaded_model_reserves_what_it_uses() {
    let (Some(vulkan), Some(file)) = (vulkan(), smollm2()) else { return };
    let usage = || {
        vulkan.device.sync().unwrap();
        let usage = vulkan.device.memory_pool_usage().unwrap();
        [usage.bytes_in_use, usage.bytes_reserved]
    };
    vulkan.device.memory_cleanup();
    let before = usage();
    let checkpoint = Checkpoint::open(file).unwrap();
    let options = LoadOptions::uniform("affine4:64:f16".parse::<Scheme>().unwrap());
    let (model, report) = checkpoint.load(&options, &vulkan.device).unwrap();
    let [used, reserved] = [0, 1].map(|i| usage()[i] - before[i]);
    drop(model);
    let stored = report.storage.total_bytes() as u64;
    // One page, of 8 MiB, for what isn't packed and what launches are told; without memory of their own it takes two.
    let page = 9 << 20;
    assert!(used >= stored && reserved < used + page, "{stored} stored, {used} used, {reserved} reserved");
}
