//! The trainer against torch's loss curves, and its own promises: accumulation, recomputation, exact resume.

use std::{ops::ControlFlow, sync::Arc};

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Device, Tensor},
};
use kiln_adapters::{Adapted, AdapterConfig, Lora, LoraAttacher, PeftFolder};
use kiln_models::{CausalLm, Checkpoint, Decoder, LoadOptions, Recompute, Slots, TokenBatch};
use kiln_quant_core::{Compute, QuantLinear, Scheme};
use kiln_testkit::{Golden, max_difference, testdata};
use kiln_training::{
    BatchOptions, Batches, DataOptions, Dataset, Error, Event, Example, Observer, Order, Place, RunEnd,
    RunOptions, ScheduleKind, StepReport, Trainer, TrainerConfig, evaluate,
};

pub(crate) type LoraModel = Decoder<Adapted<QuantLinear, Lora>>;

pub(crate) fn base(folder: &str, scheme: Option<&str>) -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(folder)).unwrap();
    let options = match scheme {
        Some(scheme) => LoadOptions::uniform(scheme.parse::<Scheme>().unwrap()).in_f32(),
        None => LoadOptions::default().in_f32(),
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
    let attacher = folder.attacher::<Lora>(&model.slot_shapes(), 0).unwrap();
    let model = model.try_map(|path, base| attacher.attach(path, base)).unwrap();
    let mut trainer = Trainer::new(model, dataset, config).unwrap();
    let reports = trainer.run(&RunOptions::new()).unwrap().steps;
    compare(&golden, &reports);
    for (path, slot) in trainer.into_model().slots() {
        let lora = slot.adapter.as_ref().unwrap();
        for (name, factor) in [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)] {
            let name = format!("final.base_model.model.{path}.{name}.default.weight");
            let found = kiln_testkit::read(factor.val().transpose());
            assert!(max_difference(&found, &golden.floats(&name)) < 2e-3, "{name}");
        }
    }
}

#[test]
fn full_training_with_clipping_follows_torch() {
    let (golden, dataset, mut config) = fixture("training/tiny_full_adamw_6steps.safetensors");
    (config.lr, config.weight_decay, config.clip) = (3e-3, 0.1, Some(1.0));
    for recompute in [Recompute::None, Recompute::Block] {
        config.recompute = recompute;
        let model = base("tiny/llama-untied-bf16", None).unfreeze();
        let mut trainer = Trainer::new(model, dataset.clone(), config.clone()).unwrap();
        compare(&golden, &trainer.run(&RunOptions::new()).unwrap().steps);
    }
}

/// A 4-bit tiny model with LoRA and dropout.
pub(crate) fn lora_model(dropout: f64) -> LoraModel {
    lora_model_in(Compute::F32, dropout)
}

pub(crate) fn lora_model_in(compute: Compute, dropout: f64) -> LoraModel {
    let model = base("tiny/llama-tied-f32-sharded", Some("affine4:32")).with_compute(compute).unwrap();
    let config = AdapterConfig::lora(4, 8.0).with_dropout(dropout).with_seed(5);
    let attacher = LoraAttacher::new(&config, &model.slot_shapes()).unwrap();
    model.try_map(|path, base| attacher.attach(path, base)).unwrap()
}

pub(crate) fn dropout_model() -> LoraModel {
    lora_model(0.2)
}

/// Documents of different lengths, packed and shuffled.
pub(crate) fn documents() -> Arc<Dataset> {
    let examples = (0..23u32).map(|i| {
        let ids: Vec<u32> = (0..5 + i * 7 % 17).map(|k| (i * 31 + k * k * 3) % 256).collect();
        let scored = (0..ids.len()).map(|k| k > 2 || i % 3 == 0).collect();
        Example::new(ids, scored)
    });
    Arc::new(Dataset::from_examples(examples, &DataOptions::new(32, 256)).unwrap())
}

pub(crate) fn config(batch: usize, accumulate: usize) -> TrainerConfig {
    let mut options = BatchOptions::new(batch);
    (options.packing, options.seed) = (true, 9);
    let mut config = TrainerConfig::new(6, options);
    (config.accumulate, config.lr, config.warmup) = (accumulate, 5e-3, 2);
    config
}

pub(crate) fn trainer(config: TrainerConfig) -> Trainer<LoraModel> {
    Trainer::new(dropout_model(), documents(), config).unwrap()
}

pub(crate) fn losses(reports: &[StepReport]) -> Vec<u64> {
    reports.iter().map(|report| report.loss.to_bits()).collect()
}

/// Values of all trainable parameters.
pub(crate) fn parameters<M: Module>(model: &M) -> Vec<Vec<f32>> {
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
    let expected = whole.run(&RunOptions::new()).unwrap().steps;

    let folder = tempfile::tempdir().unwrap();
    let options = RunOptions::new().with_save_every(2).with_folder(folder.path());
    // Killed after three steps: the last checkpoint is that of the second, and the third is inside what is lost.
    let mut kill = |event: &Event| {
        assert!(!matches!(event, Event::Step(report) if report.step >= 3), "killed");
        ControlFlow::Continue(())
    };
    let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = trainer(config(2, 3)).run_with(&options, &mut kill);
    }));
    assert!(killed.is_err());

    let last = folder.path().join("last");
    let mut resumed = Trainer::resume(dropout_model(), documents(), config(2, 3), &last).unwrap();
    assert_eq!(resumed.steps_done(), 2);
    let reports = resumed.run(&RunOptions::new()).unwrap().steps;
    assert_eq!(losses(&reports), losses(&expected[2..]));
    assert_eq!(parameters(resumed.model()), parameters(whole.model()));
}

#[test]
fn dropout_takes_part_in_training_and_not_in_evaluation() {
    let tokens = TokenBatch::new(&[(0..16).collect()]).unwrap();
    let logits = |model: &LoraModel| {
        let model = model.valid();
        kiln_testkit::read(model.forward(&model.context(&tokens, None).unwrap()))
    };
    let run = |dropout| {
        let mut trainer = Trainer::new(lora_model(dropout), documents(), config(2, 1)).unwrap();
        let losses = losses(&trainer.run(&RunOptions::new()).unwrap().steps);
        (losses, trainer.into_model())
    };
    let (plain, dropped) = (run(0.0), run(0.5));
    // LoRA's B starts at zero, and so does the rate in the warm-up: the third step is the first to see a mask.
    assert_eq!(plain.0[..2], dropped.0[..2]);
    assert!(plain.0[2..].iter().zip(&dropped.0[2..]).all(|(a, b)| a != b));
    for (model, drops) in [(plain.1, false), (dropped.1, true)] {
        let between_steps = logits(&model);
        model.at(Place { step: 9, micro_batch: 0, training: true });
        assert_eq!(logits(&model) != between_steps, drops);
    }
}

/// Every fourth document is held out.
fn parts() -> (Arc<Dataset>, Arc<Dataset>) {
    let documents = Arc::unwrap_or_clone(documents());
    let (train, held_out) = documents.split(0.25, 1).unwrap();
    (Arc::new(train), Arc::new(held_out))
}

#[test]
fn the_loss_on_held_out_rows_is_the_mean_over_their_learned_tokens() {
    let (_, held_out) = parts();
    let model = dropout_model();
    let found = evaluate(&model, &held_out, 4).unwrap();
    let mut sum = 0.0;
    for example in held_out.examples() {
        let example = example.unwrap();
        let logits = model.forward(
            &model.context(&TokenBatch::new(std::slice::from_ref(&example.ids)).unwrap(), None).unwrap(),
        );
        let rows: Vec<f32> = kiln_testkit::read(logits);
        for (place, row) in rows.chunks(256).enumerate().take(example.ids.len() - 1) {
            if example.scored[place + 1] {
                let total: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
                sum += total.ln() - f64::from(row[example.ids[place + 1] as usize]);
            }
        }
    }
    assert_eq!(found.tokens, held_out.report().targets);
    assert!((found.nll / (sum / found.tokens as f64) - 1.0).abs() < 1e-6, "{found:?}");
    // Rows are seen alone: padding beside them moves sums by rounding only.
    let alone = evaluate(&model, &held_out, 1).unwrap();
    assert!((found.nll / alone.nll - 1.0).abs() < 1e-6, "{found:?} {alone:?}");
}

/// Scores from a list, one an evaluation.
struct Scores(Vec<f64>);

impl Observer<LoraModel> for Scores {
    fn score(
        &mut self,
        _: &LoraModel,
        _: u64,
    ) -> Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        Ok((!self.0.is_empty()).then(|| self.0.remove(0)))
    }
}

#[test]
fn patience_ends_a_run_and_the_best_model_comes_back() {
    let mut best = trainer(config(2, 1));
    best.step().unwrap();
    best.step().unwrap();
    let options = RunOptions::new().with_evaluations(1).with_patience(3);
    let mut run = trainer(config(2, 1));
    let report = run.run_with(&options, &mut Scores(vec![3.0, 2.0, 2.5, 2.0, 2.1, 1.0])).unwrap();
    assert_eq!((report.steps.len(), report.end), (5, RunEnd::Patience));
    assert_eq!(report.evaluations.iter().filter(|evaluation| evaluation.is_best).count(), 2);
    assert_eq!(run.best(), Some(2.0));
    let trained = |model: LoraModel| parameters(&model.train());
    assert_ne!(trained(run.model().valid()), trained(best.model().valid()));
    assert_eq!(trained(run.into_best_model()), trained(best.into_model()));
}

#[test]
fn a_resumed_run_knows_its_best_model() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        RunOptions::new().with_evaluations(1).with_save_every(1).with_folder(folder.path()).with_patience(3);
    let scores = || vec![2.0, 1.0, 1.5, 1.6, 1.7, 0.5];
    let mut whole = trainer(config(2, 1));
    assert_eq!(whole.run_with(&options, &mut Scores(scores())).unwrap().end, RunEnd::Patience);

    let mut first = trainer(config(2, 1));
    let mut steps = 0;
    struct Stop<'a>(Scores, &'a mut u64);
    impl Observer<LoraModel> for Stop<'_> {
        fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
            *self.1 += u64::from(matches!(event, Event::Step(_)));
            if *self.1 == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        fn score(
            &mut self,
            model: &LoraModel,
            steps: u64,
        ) -> Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
            self.0.score(model, steps)
        }
    }
    let report = first.run_with(&options, &mut Stop(Scores(scores()), &mut steps)).unwrap();
    assert_eq!((report.steps.len(), report.end), (3, RunEnd::Stopped));
    let last = folder.path().join("last");
    let mut resumed = Trainer::resume(dropout_model(), documents(), config(2, 1), last).unwrap();
    assert_eq!(resumed.best(), Some(1.0));
    let report = resumed.run_with(&options, &mut Scores(scores()[3..].to_vec())).unwrap();
    assert_eq!((report.steps.len(), report.end), (2, RunEnd::Patience));
    let trained = |model: LoraModel| parameters(&model.train());
    assert_eq!(trained(resumed.into_best_model()), trained(whole.into_best_model()));
}

#[test]
fn held_out_data_is_scored_on_the_way_and_at_the_end() {
    let (train, held_out) = parts();
    let mut trainer = Trainer::new(dropout_model(), train, config(2, 1)).unwrap();
    let report = trainer.run(&RunOptions::new().with_held_out(held_out.clone(), 4)).unwrap();
    let steps: Vec<u64> = report.evaluations.iter().map(|evaluation| evaluation.steps).collect();
    assert_eq!((steps, report.end), (vec![4, 6], RunEnd::Completed));
    let last = evaluate(trainer.model(), &held_out, 2).unwrap();
    assert_eq!(report.evaluations[1].score, last.nll);
}

#[test]
fn an_evaluation_may_stop_the_run_and_its_errors_are_the_callers_own() {
    let mut stop = |event: &Event| match event {
        Event::Evaluation(_) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let (train, held_out) = parts();
    let mut run = Trainer::new(dropout_model(), train, config(2, 1)).unwrap();
    let report = run.run_with(&RunOptions::new().with_held_out(held_out, 2), &mut stop).unwrap();
    assert_eq!((report.steps.len(), report.end), (2, RunEnd::Stopped));

    struct Broken;
    impl<M> Observer<M> for Broken {
        fn score(&mut self, _: &M, _: u64) -> Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
            Err("the judge is ill".into())
        }
    }
    let error = trainer(config(2, 1)).run_with(&RunOptions::new().with_evaluations(1), &mut Broken);
    let error = error.unwrap_err();
    assert!(matches!(&error, Error::Observer(_)) && error.to_string() == "the judge is ill", "{error}");
}

#[test]
fn a_run_with_a_constant_rate_can_be_made_longer() {
    let folder = tempfile::tempdir().unwrap();
    let steps = |steps| config(2, 1).with_steps(steps);
    let mut whole = trainer(steps(6));
    let expected = whole.run(&RunOptions::new()).unwrap().steps;
    trainer(steps(4)).run(&RunOptions::new().with_folder(folder.path())).unwrap();
    let last = folder.path().join("last");
    let mut longer = Trainer::resume(dropout_model(), documents(), steps(6), &last).unwrap();
    assert_eq!(losses(&longer.run(&RunOptions::new()).unwrap().steps), losses(&expected[4..]));
    let shorter = Trainer::resume(dropout_model(), documents(), steps(3), &last).unwrap_err();
    assert!(shorter.to_string().contains("step: expected at most 3"), "{shorter}");
    let linear = |count| steps(count).with_schedule(ScheduleKind::Linear { final_ratio: 0.1 });
    trainer(linear(4)).run(&RunOptions::new().with_folder(folder.path())).unwrap();
    let error = Trainer::resume(dropout_model(), documents(), linear(6), &last).unwrap_err().to_string();
    assert!(error.contains("config.steps: expected 6, since a schedule depends on it, found 4"), "{error}");
}

/// A model whose adapters' kind is a run-time choice goes on from a checkpoint of one whose kind isn't.
#[test]
fn a_checkpoint_fits_adapters_of_any_kind() {
    let folder = tempfile::tempdir().unwrap();
    let last = folder.path().join("last");
    let mut whole = trainer(config(2, 1));
    whole.step().unwrap();
    whole.save(&last).unwrap();
    let any = dropout_model().try_map(|_, slot| Ok::<_, std::convert::Infallible>(slot.into_any())).unwrap();
    let mut resumed = Trainer::resume(any, documents(), config(2, 1), &last).unwrap();
    for _ in 1..6 {
        assert_eq!(resumed.step().unwrap().loss.to_bits(), whole.step().unwrap().loss.to_bits());
    }
}

#[test]
fn epochs_are_counted_in_steps() {
    let data = documents();
    let config = config(4, 2).with_epochs(&data, 3).unwrap();
    let mut batches = Batches::new(data.clone(), config.batch.clone()).unwrap();
    let mut steps = 0;
    while batches.cursor().epoch < 3 {
        batches.by_ref().take(2).for_each(drop);
        steps += 1;
    }
    // The last batch may have touched the fourth epoch, or have ended the third exactly.
    assert!(config.steps == steps || config.steps + 1 == steps, "{} {steps}", config.steps);
    let unpacked = TrainerConfig::new(1, 4).with_epochs(&data, 2).unwrap();
    assert_eq!(unpacked.steps, (2 * data.len() as u64).div_ceil(4));
}

#[test]
fn micro_batches_add_up_to_one_batch() {
    let run = |batch, accumulate| {
        let mut config = config(batch, accumulate);
        (config.steps, config.clip) = (1, None);
        // Without dropout: its masks are drawn for each micro-batch.
        let mut trainer = Trainer::new(lora_model(0.0), documents(), config).unwrap();
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

/// As with transformers, each micro-batch has a load-balancing loss; its share of the step's is that of its targets.
#[test]
fn the_load_balancing_loss_of_micro_batches_counts_by_their_targets() {
    const COEFFICIENT: f64 = 0.4;
    let ids: Vec<u32> = (0..40).map(|i| (i * i * 7 + i * 3 + 5) % 96).collect();
    // Four rows, of which some learn less.
    let examples = ids.chunks(10).zip([0, 4, 7, 2]).map(|(row, unlearned)| {
        let mut example = Example::all_scored(row.to_vec());
        example.scored[..unlearned].fill(false);
        example
    });
    let data = Dataset::from_examples(examples, &DataOptions::new(10, 96)).unwrap();
    let step = |batch: usize, accumulate: usize, coefficient: Option<f64>, skip: u64| {
        let mut options = BatchOptions::new(batch);
        options.order = Order::Consecutive;
        let mut config = TrainerConfig::new(skip + 1, options);
        (config.accumulate, config.lr, config.weight_decay) = (accumulate, 1e-12, 0.0);
        config.router_loss = coefficient;
        let model = base("arch/mixtral", None).unfreeze();
        let mut trainer = Trainer::new(model, Arc::new(data.clone()), config).unwrap();
        trainer.run(&RunOptions::new()).unwrap().steps.pop().unwrap()
    };
    let together = step(2, 2, Some(COEFFICIENT), 0);
    let [first, second] = [0, 1].map(|skip| step(2, 1, Some(COEFFICIENT), skip));
    let [plain_first, plain_second] = [0, 1].map(|skip| step(2, 1, None, skip));
    assert!(first.loss - plain_first.loss > 0.5 * COEFFICIENT, "{} {}", first.loss, plain_first.loss);
    assert!(second.loss - plain_second.loss > 0.5 * COEFFICIENT, "{} {}", second.loss, plain_second.loss);
    assert_ne!(first.targets, second.targets);
    let sum = first.loss * first.targets as f64 + second.loss * second.targets as f64;
    let expected = sum / (first.targets + second.targets) as f64;
    assert!((together.loss / expected - 1.0).abs() < 1e-6, "{} {expected}", together.loss);
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
fn divergence_changes_nothing() {
    let config_of = |max_skipped| config(2, 1).with_lr(1e-3).with_max_skipped(max_skipped);
    let mut model = base("tiny/llama-untied-bf16", None).unfreeze();
    // A norm gain of 1e30 overflows the logits.
    let gains = model.final_norm.weight.take().unwrap();
    model.final_norm.weight = Some(gains.map(|w| w.mul_scalar(1e38).mul_scalar(1e38)));
    let mut trainer = Trainer::new(model, documents(), config_of(0)).unwrap();
    let before = parameters(trainer.model());
    assert!(matches!(trainer.step(), Err(Error::Diverged { step: 0, .. })));
    let same = |a: &[Vec<f32>], b: &[Vec<f32>]| {
        a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits())
    };
    assert!(same(&parameters(trainer.model()), &before));
    assert_eq!(trainer.steps_done(), 0);

    // Passed over as often as the options say.
    let mut trainer = Trainer::new(trainer.into_model().train(), documents(), config_of(2)).unwrap();
    for step in 0..2 {
        let report = trainer.step().unwrap();
        assert!(report.skipped && report.step == step && !report.loss.is_finite(), "{report:?}");
    }
    assert!(matches!(trainer.step(), Err(Error::Diverged { step: 2, .. })));
    assert_eq!((trainer.steps_done(), trainer.steps_skipped()), (2, 2));
    assert!(same(&parameters(trainer.model()), &before));
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

/// The processor's bf16, where it has it.
fn bf16() -> Option<Compute> {
    Some(Compute::Bf16).filter(|compute| compute.is_native(&Device::flex()))
}

#[test]
fn bf16_runs_are_repeated_and_resumed_to_the_same_bits_and_stay_close_to_f32() {
    let Some(compute) = bf16() else {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    };
    let model = || lora_model_in(compute, 0.2);
    let run = |model| {
        let mut trainer = Trainer::new(model, documents(), config(2, 2)).unwrap();
        let reports = trainer.run(&RunOptions::new()).unwrap().steps;
        (losses(&reports), parameters(trainer.model()))
    };
    let whole = run(model());
    assert_eq!(run(model()), whole);

    let folder = tempfile::tempdir().unwrap();
    let mut first = Trainer::new(model(), documents(), config(2, 2)).unwrap();
    for _ in 0..3 {
        first.step().unwrap();
    }
    first.save(folder.path().join("last")).unwrap();
    let mut resumed =
        Trainer::resume(model(), documents(), config(2, 2), folder.path().join("last")).unwrap();
    let reports = resumed.run(&RunOptions::new()).unwrap().steps;
    assert_eq!(losses(&reports), whole.0[3..]);
    assert_eq!(parameters(resumed.model()), whole.1);

    let exact = run(dropout_model());
    assert_ne!(exact.0, whole.0, "operands were rounded");
    for (found, exact) in whole.0.iter().zip(&exact.0) {
        let (found, exact) = (f64::from_bits(*found), f64::from_bits(*exact));
        assert!((found - exact).abs() < 0.01, "{found} and {exact}");
    }
}

#[test]
fn weights_kept_in_16_bits_are_trained_in_f32() {
    let Some(compute) = bf16() else {
        kiln_testkit::skipped("this processor doesn't multiply bf16");
        return;
    };
    let (golden, dataset, mut config) = fixture("training/tiny_full_adamw_6steps.safetensors");
    (config.lr, config.weight_decay, config.clip) = (3e-3, 0.1, Some(1.0));
    let checkpoint = Checkpoint::open(testdata("tiny/llama-untied-bf16")).unwrap();
    let options = LoadOptions::default().with_compute(Some(compute));
    let (model, report) = checkpoint.load(&options, &Device::flex()).unwrap();
    assert!(
        report
            .storage
            .rows
            .iter()
            .filter(|row| row.shape.len() == 2)
            .all(|row| { row.bytes == 2 * row.shape.iter().product::<usize>() })
    );
    let mut trainer = Trainer::new(model.unfreeze(), dataset, config).unwrap();
    let reports = trainer.run(&RunOptions::new()).unwrap().steps;
    // Operands are still rounded to bf16; the weights themselves are not.
    for (report, expected) in reports.iter().zip(golden.floats("losses")) {
        assert!((report.loss - f64::from(expected)).abs() < 0.02, "{} and {expected}", report.loss);
    }
    for (path, slot) in trainer.into_model().slots() {
        let QuantLinear::Dense(linear) = slot else { panic!("{path} is packed") };
        assert_eq!(linear.weight.val().dtype(), DType::F32, "{path}");
    }
}
