//! A model that stands on the CPU and on a GPU, or on software Vulkan, against the same on the CPU alone.
//!
//! Without a Vulkan adapter, or the feature `wgpu`, the tests say so and pass, unless `KILN_REQUIRE_VULKAN=1`.

use std::{collections::BTreeMap, sync::Arc};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Int, Tensor},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, InitLoraWeights, Method},
    models::{
        CausalLm, Checkpoint, Decoder, DriverOptions, GenerateOptions, LoadOptions, Place, Placement,
        Recompute, Targets, TokenBatch, generate, loss_and_gradients,
    },
    quant::{QuantLinear, Scheme},
    training::{DataOptions, Dataset, RunOptions, Trainer, TrainerConfig, evaluate},
};
use kiln_testkit::{read, relative_difference, testdata, vulkan};

fn options() -> LoadOptions<'static> {
    LoadOptions::uniform("affine4:32".parse::<Scheme>().unwrap()).in_f32()
}

fn checkpoint(folder: &str) -> Checkpoint {
    Checkpoint::open(testdata(folder)).unwrap()
}

/// The first and last parts on the CPU, those between them on the other; of an untied model the head is there too.
fn placed(folder: &str, other: &Device) -> Decoder<QuantLinear> {
    let (checkpoint, cpu) = (checkpoint(folder), Device::flex());
    let config = checkpoint.config();
    let (blocks, head) = (config.num_hidden_layers, if config.tie_word_embeddings { &cpu } else { other });
    let placement = Placement::new(&cpu, [(0..1, &cpu), (1..blocks, other)], head).unwrap();
    let model = checkpoint.load_placed(&options(), &placement).unwrap().0;
    assert_eq!(model.placement(), Some(&placement));
    model
}

fn whole(folder: &str) -> Decoder<QuantLinear> {
    checkpoint(folder).load(&options(), &Device::flex()).unwrap().0
}

fn ids(count: u32, vocabulary: u32) -> Vec<u32> {
    (0..count).map(|i| (i * i * 7 + i * 3 + 5) % vocabulary).collect()
}

/// Loss and all gradients of one pass over packed rows with dropout.
fn gradients(
    model: Decoder<QuantLinear>,
    recompute: Recompute,
    head_is_trained: bool,
) -> (f64, Vec<Vec<f32>>) {
    struct Collect<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.extend(self.0.get::<D>(param.id).map(read));
        }
    }
    // B is drawn, too, so that A has gradients; the embedding's update goes back through all blocks.
    let method = Method::Lora { init: InitLoraWeights::Random };
    let adapters = AdapterConfig::lora(4, 8.0).with_seed(3).with_dropout(0.3).with_method(method);
    let adapters = match head_is_trained {
        true => adapters.with_targets(["q_proj", "down_proj", "lm_head"]),
        false => adapters.with_trainable_tokens([5, 15, 33]),
    };
    let vocabulary = model.vocab_size() as u32;
    let model = Tuned::attach(model, &adapters).unwrap().into_model().train();
    model.at(Place { step: 5, micro_batch: 1, training: true });
    let mut tokens = TokenBatch::masked(ids(48, vocabulary), vec![1; 48], 2, 24).unwrap();
    for place in 10..24 {
        tokens.segments[place] = 2;
        tokens.positions[place] -= 10;
    }
    let (targets, scored) = (ids(48, vocabulary), vec![true; 48]);
    let targets = Targets { ids: &targets, scored: &scored };
    let router_loss = model.config().experts.map(|_| 0.2);
    let options = DriverOptions { recompute, logit_rows: 20, router_loss, ..DriverOptions::default() };
    let mut found = GradientsAccumulator::new();
    let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut found).unwrap();
    let found = found.grads();
    let mut collect = Collect(&found, Vec::new());
    model.visit(&mut collect);
    (loss, collect.1)
}

#[test]
fn losses_and_gradients_are_those_of_one_device() {
    let Some(vulkan) = vulkan() else { return };
    // Tied and untied heads, windows, learned positions, a last norm without weights, experts with a loss of their own, keys that
    // blocks elsewhere share, recurrent blocks.
    let folders = [
        "models/tiny-llama",
        "tiny/mistral-swa8-f32",
        "tiny/gemma3-text-f32",
        "tiny/opt-f32",
        "arch/nanochat",
        "arch/qwen3_moe",
        "arch/gemma4_text-shared",
        "arch/qwen3_5_text",
    ];
    for folder in folders {
        for recompute in [Recompute::None, Recompute::Block] {
            // LoRA on an untied head, which stands on the other device.
            let trains_head = folder == "tiny/mistral-swa8-f32" && recompute == Recompute::Block;
            let (expected_loss, expected) = gradients(whole(folder), recompute, trains_head);
            let (loss, found) = gradients(placed(folder, &vulkan.device), recompute, trains_head);
            assert!(
                (loss / expected_loss - 1.0).abs() < 1e-5,
                "{folder}, {recompute:?}: {loss} {expected_loss}"
            );
            assert_eq!(found.len(), expected.len());
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let off = relative_difference(found, expected);
                assert!(off < 1e-4, "{folder}, {recompute:?}, gradient {index}: {off}");
            }
        }
    }
}

fn trained(model: Decoder<QuantLinear>) -> (Vec<f64>, Vec<u32>) {
    let vocabulary = model.vocab_size();
    let model = Tuned::attach(model, &AdapterConfig::lora(4, 8.0).with_seed(3)).unwrap().into_model();
    let data = Dataset::from_ids(ids(240, vocabulary as u32), &DataOptions::new(24, vocabulary)).unwrap();
    let data = Arc::new(data);
    let make = || Trainer::new(model.clone(), data.clone(), TrainerConfig::new(4, 2).with_lr(1e-2)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut first = make();
    let mut losses: Vec<f64> = (0..2).map(|_| first.step().unwrap().loss).collect();
    first.save(&last).unwrap();
    // What a checkpoint holds goes back to where it was.
    let mut second = make().resumed(&last).unwrap();
    losses.extend(second.run(&RunOptions::new()).unwrap().steps.iter().map(|step| step.loss));
    losses.push(evaluate(second.model(), &data, 2).unwrap().nll);
    let prompt = ids(9, vocabulary as u32);
    let generated = generate(&second.into_model(), &prompt, &GenerateOptions::new(12)).unwrap();
    (losses, generated.ids)
}

#[test]
fn training_goes_on_and_generates_as_on_one_device() {
    let Some(vulkan) = vulkan() else { return };
    for folder in ["models/tiny-llama", "tiny/llama-untied-f16"] {
        let (expected, expected_ids) = trained(whole(folder));
        let (found, found_ids) = trained(placed(folder, &vulkan.device));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-4, "{folder}: {found} {expected}");
        }
        assert_eq!(found_ids, expected_ids, "{folder}");
    }
    // Cached keys that a block on the other device attends to.
    let folder = "arch/gemma4_text-shared";
    let [expected, found] = [whole(folder), placed(folder, &vulkan.device)]
        .map(|model| generate(&model, &ids(9, 96), &GenerateOptions::new(12)).unwrap().ids);
    assert_eq!(found, expected);
}

/// Bytes of a model's tensors on each device.
fn measured(model: &Decoder<QuantLinear>) -> BTreeMap<String, usize> {
    struct Count(BTreeMap<String, usize>);
    impl Count {
        fn add(&mut self, device: &Device, bytes: usize) {
            *self.0.entry(format!("{device:?}")).or_default() += bytes;
        }
    }
    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            self.add(&value.device(), value.dtype().size() * value.dims().iter().product::<usize>());
        }
        fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
            let value = param.val();
            self.add(&value.device(), value.dtype().size() * value.dims().iter().product::<usize>());
        }
    }
    let mut count = Count(BTreeMap::new());
    model.visit(&mut count);
    count.0
}

#[test]
fn bytes_on_each_device_are_as_predicted() {
    let Some(vulkan) = vulkan() else { return };
    let devices = [Device::flex(), vulkan.device.clone()];
    for folder in ["models/tiny-llama", "tiny/llama-untied-f16", "tiny/opt-f32", "tiny/gemma3-text-f32"] {
        for scheme in ["affine4:32", "affine3:32", "dense"] {
            let options = LoadOptions::uniform(scheme.parse::<Scheme>().unwrap()).in_f32();
            let checkpoint = checkpoint(folder);
            let placement = checkpoint.balanced(&options, &devices).unwrap();
            assert_eq!(placement.devices().len(), 2, "{folder}");
            let predicted =
                placement.bytes(checkpoint.config(), &checkpoint.predicted_storage(&options).unwrap());
            let before = in_use(&vulkan.device);
            let (model, report) = checkpoint.load_placed(&options, &placement).unwrap();
            let used = in_use(&vulkan.device) - before;
            assert_eq!(
                placement.bytes(checkpoint.config(), &report.storage),
                predicted,
                "{folder}, {scheme}"
            );
            let predicted: BTreeMap<String, usize> =
                predicted.into_iter().map(|(device, bytes)| (format!("{device:?}"), bytes)).collect();
            assert_eq!(measured(&model), predicted, "{folder}, {scheme}");
            // By the pool's own accounting, where a launch before may still hold what it was told.
            let there = predicted[&format!("{:?}", vulkan.device)] as u64;
            println!("{folder}, {scheme}: {there} bytes predicted on the GPU, {used} in use");
            assert!((there..there + 1024).contains(&used), "{folder}, {scheme}: {there}, {used}");
        }
    }
}

/// Bytes of tensors on a GPU, as its pools count them.
fn in_use(device: &Device) -> u64 {
    device.sync().unwrap();
    device.memory_pool_usage().unwrap().bytes_in_use
}

#[test]
fn placements_that_do_not_fit_are_refused() {
    let Some(vulkan) = vulkan() else { return };
    let (cpu, other) = (Device::flex(), &vulkan.device);
    let error = |folder: &str, blocks: usize, head: &Device| {
        let placement = Placement::new(&cpu, [(0..blocks, &cpu)], head).unwrap();
        checkpoint(folder).load_placed(&options(), &placement).unwrap_err().to_string()
    };
    assert_eq!(error("models/tiny-llama", 3, &cpu), "placement: expected the model's 4 blocks, found 3");
    let apart = error("models/tiny-llama", 4, other);
    assert!(
        apart.starts_with("placement: expected embedding and head on one device, being one matrix"),
        "{apart}"
    );
}

#[test]
#[cfg(all(feature = "calibration", feature = "pruning", feature = "side-tuning"))]
fn what_can_not_work_across_devices_says_so() {
    use kiln::{
        calibration::{CalibrationConfig, Calibrator, GptqConfig, Method},
        models::Windows,
        pruning::{BlockPruning, Criterion, CutOptions},
        quant::Plan,
        side_tuning::{SideConfig, SideTuned},
    };

    let Some(vulkan) = vulkan() else { return };
    let model = || placed("models/tiny-llama", &vulkan.device);
    let windows = Windows::leading(&ids(64, 2048), 16, 2).unwrap();
    let config = CalibrationConfig::new(
        Method::Gptq(GptqConfig::default()),
        Plan::uniform("affine4:32".parse().unwrap()),
    );
    let pruning = BlockPruning::new(Criterion::L2, 0.25);
    let errors = [
        ("side tuning", SideTuned::new(model(), &SideConfig::qst(), 0).unwrap_err().to_string()),
        ("calibration", Calibrator::new(&config, &windows).run(model()).unwrap_err().to_string()),
        ("pruning", pruning.prune(model(), None, &CutOptions::default()).unwrap_err().to_string()),
    ];
    for (what, error) in errors {
        let expected = format!("model: expected all of it on one device, for {what}, found parts on");
        assert!(error.starts_with(&expected), "{error}");
    }
}

#[test]
#[cfg(feature = "wgpu")]
fn devices_that_are_not_there_are_refused_by_name() {
    use burn::tensor::DeviceKind;

    let Some(_vulkan) = vulkan() else { return };
    let (cpu, absent) = (Device::flex(), Device::wgpu(DeviceKind::DiscreteGpu(99)));
    let placement = Placement::new(&cpu, [(0..2, &cpu), (2..4, &absent)], &cpu).unwrap();
    let error = checkpoint("models/tiny-llama").load_placed(&options(), &placement).unwrap_err().to_string();
    assert!(error.contains("expected one that is there") && error.contains("99"), "{error}");
    let model = Tuned::attach(whole("models/tiny-llama"), &AdapterConfig::lora(4, 8.0)).unwrap().into_model();
    let data = Dataset::from_ids(ids(240, 2048), &DataOptions::new(24, 2048)).unwrap();
    let trainer = Trainer::new(model, data.into(), TrainerConfig::new(4, 2).with_accumulate(2)).unwrap();
    let error = trainer.with_devices(&[absent]).unwrap_err().to_string();
    assert!(error.contains("expected one that is there"), "{error}");
}

/// What stays as the file has it: packed by Kiln and by llama.cpp, in 16 bits, unpacked because it is asked for.
#[test]
fn weights_that_stay_as_stored_are_predicted() {
    use kiln::models::{Tables, export::save_model};

    let device = Device::flex();
    let folder = tempfile::tempdir().unwrap();
    let packed = folder.path().join("packed");
    save_model(&whole("tiny/llama-untied-f16"), &checkpoint("tiny/llama-untied-f16"), &packed).unwrap();
    let cases = [
        (packed.clone(), LoadOptions::default().in_f32(), 0.03),
        (packed, LoadOptions::uniform(Scheme::Dense).in_f32(), 0.0),
        // Its zero points, of 4 bits in the file, become floats.
        (testdata("tiny/llama-untied-gptq4-v1"), LoadOptions::default().in_f32(), 0.06),
        (testdata("tiny/llama-untied-f16"), LoadOptions::default().in_f32(), 0.0),
        (testdata("tiny/llama-untied-f16"), LoadOptions::default().in_f32().with_tables(Tables::Dense), 0.0),
        (testdata("arch/gpt_oss"), LoadOptions::default().in_f32(), 0.03),
    ];
    for (path, options, bound) in cases {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let predicted = checkpoint.predicted_storage(&options).unwrap().total_bytes() as f64;
        let found = checkpoint.load(&options, &device).unwrap().1.storage.total_bytes() as f64;
        assert!((predicted / found - 1.0).abs() <= bound, "{}: {predicted} {found}", path.display());
    }
}

/// Moving a model brings all of it to one device again.
#[test]
fn a_placed_model_that_is_moved_is_in_one_place() {
    let Some(vulkan) = vulkan() else { return };
    let model = placed("models/tiny-llama", &vulkan.device).fork(&Device::flex());
    assert!(model.placement().is_none() && model.devices().len() == 1);
    let tokens = TokenBatch::new(&[ids(12, 2048)]).unwrap();
    let logits = |model: &Decoder<QuantLinear>| read(model.forward(&model.context(&tokens, None).unwrap()));
    assert_eq!(logits(&model), logits(&whole("models/tiny-llama")));
}
