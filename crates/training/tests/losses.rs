//! Losses, their gradients and runs beside TRL's and torch's.

use std::sync::Arc;

use burn::tensor::Device;
use kiln_adapters::{Adapted, Lora, PeftFolder};
use kiln_models::{Checkpoint, Decoder, LoadOptions, Recompute, Slots};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, assert_close, read, testdata};
use kiln_training::{
    BatchOptions, DataOptions, Dataset, Distillation, Example, OptimizerKind, Order, PreferenceLoss,
    RunOptions, StepReport, TokenLoss, Trainer, TrainerConfig,
};
use serde_json::Value;

type Model = Decoder<Adapted<QuantLinear, Lora>>;

const BASE: &str = "tiny/llama-tied-f32-sharded";

fn base() -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(BASE)).unwrap();
    checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

fn with_adapters(folder: impl AsRef<std::path::Path>) -> Model {
    let base = base();
    let attacher =
        PeftFolder::open(folder.as_ref()).unwrap().attacher::<Lora>(&base.slot_shapes(), 0).unwrap();
    base.try_map(|path, slot| attacher.attach(path, slot)).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata(name)).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Chosen and rejected.
fn pairs(value: &Value) -> Vec<[Example; 2]> {
    let side = |pair: &Value, side: &str| Example::answer(&ids(&pair["prompt"]), &ids(&pair[side]));
    value.as_array().unwrap().iter().map(|pair| [side(pair, "chosen"), side(pair, "rejected")]).collect()
}

fn options() -> DataOptions {
    DataOptions::new(64, 256)
}

/// One step of gradient descent at rate 1, whose change is the gradient.
fn one_step(
    data: Dataset,
    rows: usize,
    accumulate: usize,
    change: impl Fn(TrainerConfig) -> TrainerConfig,
) -> (StepReport, Model) {
    let batch = BatchOptions::new(rows).with_order(Order::Consecutive);
    let config = TrainerConfig::new(1, batch).with_accumulate(accumulate).with_lr(1.0).with_clip(None);
    let config = change(config.with_optimizer(OptimizerKind::Sgd { momentum: 0.0 }));
    let asks =
        config.loss.distillation.is_some() || config.preference.is_some_and(|loss| loss.has_reference());
    let mut trainer =
        Trainer::new(with_adapters(testdata("peft/tiny-lora-r8-all")), Arc::new(data), config).unwrap();
    if asks {
        trainer = trainer.with_reference(base()).unwrap();
    }
    let report = trainer.step().unwrap();
    (report, trainer.into_model())
}

/// Compares loss, gradient and norm with those of the fixture.
fn compare(name: &str, (report, after): &(StepReport, Model)) {
    let (fixture, golden) = (json("training/losses.json"), Golden::open("training/losses.safetensors"));
    let expected = &fixture["losses"][name];
    let loss = expected["loss_f64"].as_f64().unwrap();
    assert!((report.loss - loss).abs() <= 1e-5 * loss.abs().max(1.0), "{name}: {} {loss}", report.loss);
    let norms = expected["grad_norms"].as_object().unwrap().values();
    let norm = norms.map(|norm| norm.as_f64().unwrap().powi(2)).sum::<f64>().sqrt();
    assert!((report.grad_norm - norm).abs() < 1e-5 * norm, "{name}: norm {} {norm}", report.grad_norm);
    let before = with_adapters(testdata("peft/tiny-lora-r8-all"));
    for ((path, before), (_, after)) in before.slots().into_iter().zip(after.slots()) {
        let (before, after) = (before.adapter.as_ref().unwrap(), after.adapter.as_ref().unwrap());
        for (factor, before, after) in
            [("A", &before.lora_a, &after.lora_a), ("B", &before.lora_b, &after.lora_b)]
        {
            let tensor = format!("{name}.base_model.model.{path}.lora_{factor}.default.weight");
            if !golden.contains(&tensor) {
                continue;
            }
            let found = read((before.val() - after.val()).transpose());
            let expected = golden.floats(&tensor);
            let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            // The subtraction is rounded where the parameters are.
            assert_close(&tensor, &found, &expected, 1e-5 * largest + 1e-7);
        }
    }
}

#[test]
fn preference_losses_and_gradients_equal_trl() {
    use PreferenceLoss::*;
    let fixture = json("training/losses.json");
    let cases = [
        ("dpo", PreferenceLoss::dpo()),
        ("dpo_smoothed", Dpo { beta: 0.1, label_smoothing: 0.2 }),
        ("dpo_hinge", Hinge { beta: 0.1 }),
        ("ipo", Ipo { beta: 0.1 }),
        ("simpo", SimPo { beta: 2.0, margin: 1.0 }),
        ("orpo_completion", Orpo { beta: 0.1 }),
    ];
    for (name, loss) in cases {
        // However the pairs are spread over micro-batches.
        for (rows, accumulate) in [(4, 1), (1, 4), (2, 2)] {
            let data = Dataset::from_pairs(pairs(&fixture["pairs"]), &options()).unwrap();
            compare(name, &one_step(data, rows, accumulate, |config| config.with_preference(loss)));
        }
    }
    let data = Dataset::from_pairs(pairs(&fixture["pairs"]), &options()).unwrap();
    let recomputed = |config: TrainerConfig| {
        config.with_preference(PreferenceLoss::dpo()).with_recompute(Recompute::Block)
    };
    compare("dpo", &one_step(data, 4, 1, recomputed));
}

#[test]
fn kto_and_its_divergence_equal_trl() {
    let fixture = json("training/losses.json");
    let labelled = pairs(&fixture["pairs"])
        .into_iter()
        .flat_map(|[chosen, rejected]| [chosen.with_label(true), rejected.with_label(false)]);
    let data = Dataset::from_examples(labelled, &options()).unwrap();
    let loss = PreferenceLoss::Kto { beta: 0.1, desirable: 1.0, undesirable: 1.5 };
    compare("kto", &one_step(data, 8, 1, |config| config.with_preference(loss)));
}

/// Seven answers leave one alone in batches of 2 and of 3, which would be compared with itself.
#[test]
fn no_held_out_answer_is_alone() {
    let fixture = json("training/losses.json");
    let labelled = |count: usize| {
        let examples = pairs(&fixture["pairs"]).into_iter().flatten().zip([true, false].into_iter().cycle());
        let examples = examples.map(|(example, label)| example.with_label(label)).take(count);
        Dataset::from_examples(examples, &options()).unwrap()
    };
    let loss = PreferenceLoss::kto();
    let score = |rows: usize| {
        let config = TrainerConfig::new(1, rows).with_preference(loss).with_lr(1e-12);
        let model = with_adapters(testdata("peft/tiny-lora-r8-all"));
        let trainer = Trainer::new(model, labelled(8).into(), config).unwrap();
        let run = RunOptions::new().with_held_out(labelled(7), 1);
        trainer.with_reference(base()).unwrap().run(&run).unwrap().evaluations[0].score
    };
    // 2, 3 and 6 leave one; 4 leaves three, as does what 2 and 3 become.
    assert_eq!(score(2).to_bits(), score(4).to_bits());
    assert_eq!(score(3).to_bits(), score(4).to_bits());
}

#[test]
fn token_losses_and_gradients_equal_torch() {
    let fixture = json("training/losses.json");
    let half = Distillation { weight: 0.5, temperature: 2.0 };
    let cases = [
        ("ce", TokenLoss::new()),
        ("ce_smoothed", TokenLoss::new().with_label_smoothing(0.1)),
        ("ce_z", TokenLoss::new().with_z_loss(0.01)),
        ("distill", TokenLoss::new().with_distillation(half)),
    ];
    for (name, loss) in cases {
        for (rows, accumulate) in [(4, 1), (1, 4)] {
            let chosen = pairs(&fixture["pairs"]).into_iter().map(|[chosen, _]| chosen);
            let data = Dataset::from_examples(chosen, &options()).unwrap();
            compare(name, &one_step(data, rows, accumulate, |config| config.with_loss(loss)));
        }
    }
}

/// A weight counts as if the example were there so often.
#[test]
fn a_weight_of_two_is_two_rows() {
    let fixture = json("training/losses.json");
    let chosen: Vec<Example> = pairs(&fixture["pairs"]).into_iter().map(|[chosen, _]| chosen).collect();
    let twice = chosen.iter().chain([&chosen[1]]).cloned();
    let weighted =
        chosen.iter().enumerate().map(|(i, e)| e.clone().with_weight(if i == 1 { 2.0 } else { 1.0 }));
    let run = |examples: Vec<Example>| {
        let rows = examples.len();
        one_step(Dataset::from_examples(examples, &options()).unwrap(), rows, 1, |config| config)
    };
    let ((twice, two), (weighted, one)) = (run(twice.collect()), run(weighted.collect()));
    assert!((twice.loss - weighted.loss).abs() < 1e-6);
    for ((path, two), (_, one)) in two.slots().into_iter().zip(one.slots()) {
        let value = |slot: &Adapted<QuantLinear, Lora>| read(slot.adapter.as_ref().unwrap().lora_b.val());
        assert_close(&path, &value(one), &value(two), 1e-6);
    }
}

/// The score of held-out pairs doesn't depend on how they fall into batches, and a weight of two is the pair twice.
#[test]
fn held_out_preferences_are_one_mean() {
    let fixture = json("training/losses.json");
    let pairs = || pairs(&fixture["pairs"]);
    let score = |held_out: Vec<[Example; 2]>, rows: usize, loss: PreferenceLoss| {
        let data = Dataset::from_pairs(pairs(), &options()).unwrap();
        let config = TrainerConfig::new(1, rows).with_preference(loss).with_lr(1e-12);
        let model = with_adapters(testdata("peft/tiny-lora-r8-all"));
        let mut trainer = Trainer::new(model, data.into(), config).unwrap();
        if loss.has_reference() {
            trainer = trainer.with_reference(base()).unwrap();
        }
        let held_out = Dataset::from_pairs(held_out, &options()).unwrap();
        let run = RunOptions::new().with_held_out(held_out, 1);
        trainer.run(&run).unwrap().evaluations[0].score
    };
    let twice: Vec<[Example; 2]> = pairs().into_iter().chain([pairs().remove(1)]).collect();
    let weighted = || {
        let weigh = |(index, pair): (usize, [Example; 2])| {
            pair.map(|side| side.with_weight(if index == 1 { 2.0 } else { 1.0 }))
        };
        pairs().into_iter().enumerate().map(weigh).collect::<Vec<_>>()
    };
    for loss in [PreferenceLoss::dpo(), PreferenceLoss::Orpo { beta: 0.1 }] {
        let whole = score(pairs(), 4, loss);
        for rows in [1, 3] {
            let found = score(pairs(), rows, loss);
            assert!((found - whole).abs() < 1e-5, "{loss:?} {rows}: {found} {whole}");
        }
        let (twice, weighted) = (score(twice.clone(), 4, loss), score(weighted(), 4, loss));
        assert!((twice - weighted).abs() < 1e-5, "{loss:?}: {twice} {weighted}");
    }
}

/// Pairs of the fixture's first three steps, which come again and again.
fn dpo_pairs(fixture: &Value) -> Vec<[Example; 2]> {
    fixture["steps"].as_array().unwrap()[..3].iter().flat_map(|step| pairs(&step["pairs"])).collect()
}

#[test]
fn ten_steps_of_dpo_are_those_of_trl() {
    let fixture = json("training/dpo_10steps.json");
    let folder = tempfile::tempdir().unwrap();
    let config = testdata("peft/tiny-lora-r8-all/adapter_config.json");
    std::fs::copy(config, folder.path().join("adapter_config.json")).unwrap();
    let start = testdata("training/dpo_10steps.safetensors");
    std::fs::copy(start, folder.path().join("adapter_model.safetensors")).unwrap();
    for cached in [false, true] {
        let data = Dataset::from_pairs(dpo_pairs(&fixture), &options()).unwrap();
        let batch = BatchOptions::new(2).with_order(Order::Consecutive);
        let config = TrainerConfig::new(10, batch).with_lr(1e-3).with_clip(None);
        let config = config.with_preference(PreferenceLoss::dpo());
        let mut trainer = Trainer::new(with_adapters(folder.path()), data.into(), config).unwrap();
        if cached {
            trainer = trainer.with_known_answers(folder.path().join("reference.json")).unwrap();
        }
        let found = trainer.run(&RunOptions::new()).unwrap().steps;
        for (found, expected) in found.iter().zip(fixture["steps"].as_array().unwrap()) {
            let expected = |name: &str| expected["trl"][name].as_f64().unwrap();
            let close = |what: &str, found: f64| {
                let expected = expected(what);
                assert!((found - expected).abs() < 1e-5, "{what}: {found} {expected}");
            };
            close("loss", found.loss);
            let preference = found.preference.unwrap();
            close("rewards/chosen", preference.chosen.unwrap());
            close("rewards/rejected", preference.rejected.unwrap());
        }
        assert_eq!(found.last().unwrap().preference.unwrap().accuracy, Some(1.0));
        for (path, slot) in trainer.into_model().slots() {
            let lora = slot.adapter.as_ref().unwrap();
            for (name, factor) in [("lora_A", &lora.lora_a), ("lora_B", &lora.lora_b)] {
                let name = format!("base_model.model.{path}.{name}.weight");
                let expected = fixture["final_norms"][&name].as_f64().unwrap();
                let found = read(factor.val()).iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
                assert!((found - expected).abs() < 1e-4 * expected, "{name}: {found} {expected}");
            }
        }
    }
}

#[test]
fn data_and_losses_that_do_not_fit_are_refused() {
    let fixture = json("training/losses.json");
    let pairs = || pairs(&fixture["pairs"]);
    let of_pairs = || Dataset::from_pairs(pairs(), &options()).unwrap();
    let plain = || Dataset::from_examples(pairs().concat(), &options()).unwrap();
    let model = || with_adapters(testdata("peft/tiny-lora-r8-all"));
    let config = || TrainerConfig::new(1, 2);
    let dpo = || config().with_preference(PreferenceLoss::dpo());
    let refused = |data: Dataset, config: TrainerConfig| {
        Trainer::new(model(), data.into(), config).expect_err("an error").to_string()
    };
    assert!(refused(of_pairs(), config()).starts_with("data: expected examples"));
    let labelled = || {
        let examples = pairs().concat().into_iter().zip([true, false].into_iter().cycle());
        Dataset::from_examples(examples.map(|(example, label)| example.with_label(label)), &options())
            .unwrap()
    };
    assert!(refused(labelled(), config()).starts_with("data: expected examples without labels"));
    let kto = |rows| TrainerConfig::new(1, rows).with_preference(PreferenceLoss::kto());
    assert!(refused(labelled(), kto(1)).starts_with("batch: expected at least 2 answers"));
    let two_labels = pairs().into_iter().map(|pair| pair.map(|side| side.with_label(true)));
    let error = Dataset::from_pairs(two_labels, &options()).unwrap_err().to_string();
    assert!(error.starts_with("label:"), "{error}");
    // Held-out data of another form is refused before the first step.
    let mut trainer = Trainer::new(model(), of_pairs().into(), dpo()).unwrap();
    let error = trainer.run(&RunOptions::new().with_held_out(plain(), 1)).unwrap_err().to_string();
    assert!(error.starts_with("data: expected pairs") && trainer.steps_done() == 0, "{error}");
    assert!(refused(plain(), dpo()).starts_with("data: expected pairs"));
    assert!(
        refused(plain(), config().with_preference(PreferenceLoss::kto())).contains("answers with labels")
    );
    assert!(refused(of_pairs(), dpo().with_loss(TokenLoss::new().with_z_loss(1.0))).starts_with("loss:"));
    let packed = dpo().with_batch(BatchOptions::new(2).with_packing(true));
    assert!(refused(of_pairs(), packed).starts_with("packing:"));
    let labels = [pairs().concat()[0].clone().with_label(true), pairs().concat()[1].clone()];
    let error = Dataset::from_examples(labels, &options()).unwrap_err().to_string();
    assert!(error.starts_with("label:"), "{error}");
    // Nobody is asked, or nobody is there.
    let trainer = Trainer::new(model(), plain().into(), config()).unwrap();
    assert!(trainer.with_reference(base()).unwrap_err().to_string().starts_with("reference:"));
    let distilled = config().with_loss(TokenLoss::new().with_distillation(Distillation::default()));
    let mut trainer = Trainer::new(model(), plain().into(), distilled).unwrap();
    assert!(trainer.step().unwrap_err().to_string().contains("a teacher"));
    // A file of another data set's answers.
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("reference.json");
    let trainer = Trainer::new(model(), of_pairs().into(), dpo()).unwrap();
    trainer.with_known_answers(&file).unwrap();
    let fewer = Dataset::from_pairs(pairs().into_iter().take(2), &options()).unwrap();
    let trainer = Trainer::new(model(), fewer.into(), dpo()).unwrap();
    assert!(trainer.with_known_answers(&file).unwrap_err().to_string().contains("fingerprints"));
}
