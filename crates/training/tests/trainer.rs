//! The trainer against torch's loss curves, and its own promises: accumulation, recomputation, exact resume.

use std::{collections::BTreeMap, ops::ControlFlow, path::Path, sync::Arc};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Device, Tensor},
};
use kiln_adapters::{Adapted, DropoutClock, Lora, LoraAttacher, PeftConfig, PeftFolder, TargetModules};
use kiln_models::{AnyModel, CausalLm, Checkpoint, LoadOptions, Recompute, Slots};
use kiln_quant_core::{QuantLinear, Scheme};
use kiln_testkit::{Golden, max_difference, testdata};
use kiln_training::{
    BatchOptions, DataOptions, Dataset, Error, Example, Observer, Order, RunOptions, StepReport, Trainer,
    TrainerConfig,
};

type LoraModel = AnyModel<Adapted<QuantLinear, Lora>>;

fn base(folder: &str, scheme: Option<&str>) -> AnyModel<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(folder)).unwrap();
    let options = match scheme {
        Some(scheme) => LoadOptions::uniform(scheme.parse::<Scheme>().unwrap()),
        None => LoadOptions::default(),
    };
    checkpoint.load(&options, &Device::flex()).unwrap().0
}

/// The rows of a training fixture, in its order.
fn fixture(path: &str) -> (Golden, Arc<Dataset>, TrainerConfig) {
    let golden = Golden::open(path);
    let [steps, batch, length] = golden.shape("input_ids").try_into().unwrap();
    let rows = golden.ints("input_ids");
    let examples =
        rows.chunks(length).map(|row| Example::all_scored(row.iter().map(|&id| id as u32).collect()));
    let dataset = Dataset::from_examples(examples, &DataOptions::new(length, 256)).unwrap();
    let mut options = BatchOptions::new(batch);
    options.order = Order::Consecutive;
    let mut config = TrainerConfig::new(steps as u64, options);
    config.clip = None;
    (golden, Arc::new(dataset), config)
}

fn compare(golden: &Golden, reports: &[StepReport]) {
    let losses: Vec<f32> = reports.iter().map(|report| report.loss as f32).collect();
    let norms: Vec<f32> = reports.iter().map(|report| report.grad_norm as f32).collect();
    let (expected, expected_norms) = (golden.floats("losses"), golden.floats("grad_norms"));
    // AdamW's first steps magnify rounding, hence the bounds that the fixture's README gives.
    assert!(max_difference(&losses[..2], &expected[..2]) < 2e-5, "{losses:?} {expected:?}");
    assert!(max_difference(&losses, &expected) < 1e-3, "{losses:?} {expected:?}");
    for (found, expected) in norms.iter().zip(&expected_norms) {
        assert!((found / expected - 1.0).abs() < 1e-2, "{norms:?} {expected_norms:?}");
    }
}

#[test]
fn lora_with_adamw_follows_torch() {
    let (golden, dataset, mut config) = fixture("training/tiny_lora_adamw_10steps.safetensors");
    (config.lr, config.weight_decay) = (1e-2, 0.01);
    let model = base("tiny/llama-tied-f32-sharded", None);
    let folder = PeftFolder::open(testdata("peft/tiny-lora-r8-all")).unwrap();
    let attacher = folder.attacher(&model.slot_shapes(), 0).unwrap();
    let model = model.try_map(|path, base| attacher.attach(path, base)).unwrap();
    let mut trainer = Trainer::new(model, dataset, config).unwrap();
    let reports = trainer.run(&RunOptions::default(), &mut ()).unwrap();
    compare(&golden, &reports);
    trainer.into_model().for_each_slot(|path, slot| {
        let lora = slot.adapter.as_ref().unwrap();
        for (name, factor) in [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)] {
            let name = format!("final.base_model.model.{path}.{name}.default.weight");
            let found = kiln_testkit::read(factor.val().transpose());
            assert!(max_difference(&found, &golden.floats(&name)) < 2e-3, "{name}");
        }
    });
}

#[test]
fn full_training_with_clipping_follows_torch() {
    let (golden, dataset, mut config) = fixture("training/tiny_full_adamw_6steps.safetensors");
    (config.lr, config.weight_decay, config.clip) = (3e-3, 0.1, Some(1.0));
    for recompute in [Recompute::None, Recompute::Block] {
        config.recompute = recompute;
        let model = base("tiny/llama-untied-bf16", None).unfreeze();
        let mut trainer = Trainer::new(model, dataset.clone(), config.clone()).unwrap();
        compare(&golden, &trainer.run(&RunOptions::default(), &mut ()).unwrap());
    }
}

/// A 4-bit tiny model with LoRA and dropout, and the clock that the trainer sets.
fn dropout_model() -> (LoraModel, DropoutClock) {
    let model = base("tiny/llama-tied-f32-sharded", Some("affine4:32"));
    let mut config = PeftConfig::new(4, 8.0, TargetModules::AllLinear);
    config.lora_dropout = 0.2;
    let attacher = LoraAttacher::new(&config, &model.slot_shapes(), 5).unwrap();
    let clock = attacher.clock().clone();
    (model.try_map(|path, base| attacher.attach(path, base)).unwrap(), clock)
}

/// Documents of different lengths, packed and shuffled.
fn documents() -> Arc<Dataset> {
    let examples = (0..23u32).map(|i| {
        let ids: Vec<u32> = (0..5 + i * 7 % 17).map(|k| (i * 31 + k * k * 3) % 256).collect();
        let scored = (0..ids.len()).map(|k| k > 2 || i % 3 == 0).collect();
        Example { ids, scored }
    });
    Arc::new(Dataset::from_examples(examples, &DataOptions::new(32, 256)).unwrap())
}

fn config(batch: usize, accumulate: usize) -> TrainerConfig {
    let mut options = BatchOptions::new(batch);
    (options.packing, options.seed) = (true, 9);
    let mut config = TrainerConfig::new(6, options);
    (config.accumulate, config.lr, config.warmup) = (accumulate, 5e-3, 2);
    config
}

fn with_clock(trainer: Trainer<LoraModel>, clock: DropoutClock) -> Trainer<LoraModel> {
    trainer.with_clock(move |place| {
        clock.set(place.step, place.micro_batch);
        clock.train(place.training);
    })
}

fn trainer(config: TrainerConfig) -> Trainer<LoraModel> {
    let (model, clock) = dropout_model();
    with_clock(Trainer::new(model, documents(), config).unwrap(), clock)
}

fn losses(reports: &[StepReport]) -> Vec<u64> {
    reports.iter().map(|report| report.loss.to_bits()).collect()
}

/// Values of all trainable parameters.
fn parameters<M: Module>(model: &M) -> Vec<Vec<f32>> {
    struct Collect(Vec<Vec<f32>>);
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if param.val().is_require_grad() {
                self.0.push(kiln_testkit::read(param.val().inner()));
            }
        }
    }
    let mut collect = Collect(Vec::new());
    model.visit(&mut collect);
    collect.0
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    let mut whole = trainer(config(2, 3));
    let expected = whole.run(&RunOptions::default(), &mut ()).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let options =
        RunOptions { save_every: 2, folder: Some(folder.path().to_path_buf()), ..RunOptions::default() };
    // Killed after three steps: the last checkpoint is that of the second, and the third is inside what is lost.
    struct Kill;
    impl Observer<LoraModel> for Kill {
        fn on_step(&mut self, report: &StepReport) -> ControlFlow<()> {
            assert!(report.step < 3, "killed");
            ControlFlow::Continue(())
        }
    }
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = trainer(config(2, 3)).run(&options, &mut Kill);
    }));
    assert!(killed.is_err());

    let (model, clock) = dropout_model();
    let resumed = Trainer::resume(model, documents(), config(2, 3), &folder.path().join("last")).unwrap();
    let mut resumed = with_clock(resumed, clock);
    assert_eq!(resumed.steps_done(), 2);
    let reports = resumed.run(&RunOptions::default(), &mut ()).unwrap();
    assert_eq!(losses(&reports), losses(&expected[2..]));
    assert_eq!(parameters(resumed.model()), parameters(whole.model()));
}

#[test]
fn micro_batches_add_up_to_one_batch() {
    let run = |batch, accumulate| {
        let mut config = config(batch, accumulate);
        (config.steps, config.clip) = (1, None);
        // Without dropout: its masks are drawn for each micro-batch.
        let (model, clock) = dropout_model();
        clock.train(false);
        let mut trainer = Trainer::new(model, documents(), config).unwrap();
        trainer.step().unwrap()
    };
    let whole = run(6, 1);
    for (batch, accumulate) in [(3, 2), (2, 3), (1, 6)] {
        let parts = run(batch, accumulate);
        assert_eq!(parts.targets, whole.targets);
        assert!((parts.loss / whole.loss - 1.0).abs() < 1e-6, "{} {}", parts.loss, whole.loss);
        assert!(
            (parts.grad_norm / whole.grad_norm - 1.0).abs() < 1e-5,
            "{} {}",
            parts.grad_norm,
            whole.grad_norm
        );
    }
}

#[test]
fn recomputation_sees_the_same_dropout() {
    let run = |recompute| {
        let mut config = config(2, 2);
        config.recompute = recompute;
        let mut trainer = trainer(config);
        let reports: Vec<StepReport> = (0..3).map(|_| trainer.step().unwrap()).collect();
        (reports, parameters(trainer.model()))
    };
    let (plain, plain_parameters) = run(Recompute::None);
    let (again, again_parameters) = run(Recompute::Block);
    for (a, b) in plain.iter().zip(&again) {
        assert!((a.loss / b.loss - 1.0).abs() < 1e-6 && (a.grad_norm / b.grad_norm - 1.0).abs() < 1e-5);
    }
    for (a, b) in plain_parameters.iter().zip(&again_parameters) {
        assert!(max_difference(a, b) < 1e-4);
    }
}

#[test]
fn checkpoints_of_other_runs_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut first = trainer(config(2, 1));
    first.step().unwrap();
    first.save(&last).unwrap();
    let resume = |config: TrainerConfig, dataset| {
        Trainer::resume(dropout_model().0, dataset, config, &last).map(|_| ()).unwrap_err().to_string()
    };
    let mut other = config(2, 1);
    other.lr = 1e-4;
    assert!(resume(other, documents()).contains("config.lr"));
    let ids = (0..600u32).map(|i| i % 256).collect();
    let dataset = Dataset::from_ids(ids, &DataOptions::new(32, 256)).unwrap();
    assert!(resume(config(2, 1), Arc::new(dataset)).contains("state.json: data"));

    let damage = |file: &str, bytes: &[u8]| {
        let path = last.join(file);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let message = resume(config(2, 1), documents());
        std::fs::write(&path, whole).unwrap();
        assert!(message.contains(file), "{message}");
    };
    damage("state.json", b"{");
    damage("trainable.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\x7f");
    damage("optimizer.bpk", b"nothing");
    assert!(Trainer::resume(dropout_model().0, documents(), config(2, 1), &last).is_ok());
}

#[test]
fn a_full_disk_leaves_the_old_checkpoint() {
    // A file where the folder's parent should be stands for any refusal of the operating system.
    let folder = tempfile::tempdir().unwrap();
    let (last, blocked) = (folder.path().join("last"), folder.path().join("last.new"));
    let mut trainer = trainer(config(2, 1));
    trainer.save(&last).unwrap();
    trainer.step().unwrap();
    std::fs::write(&blocked, b"in the way").unwrap();
    assert!(matches!(trainer.save(&last), Err(Error::Io { .. })));
    let saved = std::fs::read_to_string(Path::new(&last).join("state.json")).unwrap();
    let state: BTreeMap<String, serde_json::Value> = serde_json::from_str(&saved).unwrap();
    assert_eq!(state["step"], 0);
}

#[test]
fn divergence_changes_nothing() {
    let mut config = config(2, 1);
    config.lr = 1e-3;
    let mut model = base("tiny/llama-untied-bf16", None).unfreeze();
    // A norm gain of 1e30 overflows the logits.
    let gains = model.final_norm.weight.take().unwrap();
    model.final_norm.weight = Some(gains.map(|w| w.mul_scalar(1e38).mul_scalar(1e38)));
    let mut trainer = Trainer::new(model, documents(), config).unwrap();
    let before = parameters(trainer.model());
    assert!(matches!(trainer.step(), Err(Error::Diverged { step: 0, .. })));
    let same = |a: &[Vec<f32>], b: &[Vec<f32>]| {
        a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits())
    };
    assert!(same(&parameters(trainer.model()), &before));
    assert_eq!(trainer.steps_done(), 0);
}

#[test]
fn rows_longer_than_the_model_are_refused() {
    let model = base("tiny/llama-untied-bf16", None).unfreeze();
    let limit = model.max_positions();
    let ids = (0..4 * limit as u32).map(|id| id % 256).collect();
    let dataset = Dataset::from_ids(ids, &DataOptions::new(limit + 1, 256)).unwrap();
    let error = Trainer::new(model, Arc::new(dataset), config(1, 1)).map(|_| ()).unwrap_err();
    assert!(error.to_string().starts_with("seq_len: expected at most"), "{error}");
}

#[test]
fn a_model_without_trainable_parameters_is_refused() {
    let model = base("tiny/llama-untied-bf16", None);
    assert!(matches!(Trainer::new(model, documents(), config(1, 1)), Err(Error::Argument { .. })));
}
