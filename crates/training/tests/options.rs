//! Every option of data, losses and optimizers goes on from a checkpoint bit for bit, with another number of ranks too.

use std::{collections::BTreeMap, sync::Arc};

use burn::{module::Module, tensor::Device};
use kiln_adapters::{AdapterConfig, LoraAttacher};
use kiln_models::{Decoder, Slots};
use kiln_quant_core::{QuantLinear, for_each_parameter};
use kiln_training::{
    BatchOptions, DataOptions, Dataset, Distillation, Example, OptimizerKind, ParameterGroup, PreferenceLoss,
    RunOptions, ScheduleKind, TokenLoss, Trainer, TrainerConfig, with_trained,
};

use crate::ranks::on_ranks;
use crate::trainer::{LoraModel, base, documents, losses, parameters};

/// Of rank 64, so that factors are large enough for 8-bit averages.
fn model() -> LoraModel {
    let model = base("tiny/llama-tied-f32-sharded", Some("affine4:32"));
    let config = AdapterConfig::lora(64, 64.0).with_dropout(0.2).with_seed(5);
    let attacher = LoraAttacher::new(&config, &model.slot_shapes()).unwrap();
    model.try_map(|path, base| attacher.attach(path, base)).unwrap()
}

fn sequence(seed: u32, length: u32) -> Vec<u32> {
    (0..length).map(|k| (seed * 31 + k * k * 3 + k) % 256).collect()
}

fn answers(seed: u32) -> [Example; 2] {
    let prompt = sequence(seed, 4);
    [7 + seed % 3, 5 + seed % 4].map(|length| Example::answer(&prompt, &sequence(seed + length, length)))
}

fn options() -> DataOptions {
    DataOptions::new(32, 256)
}

fn pairs() -> Arc<Dataset> {
    Dataset::from_pairs((0..9).map(answers), &options()).unwrap().into()
}

fn labelled() -> Arc<Dataset> {
    let examples = (0..9).flat_map(|seed| {
        let [good, bad] = answers(seed);
        [good.with_label(true), bad.with_label(false)]
    });
    Dataset::from_examples(examples, &options()).unwrap().into()
}

fn mixture() -> Arc<Dataset> {
    let weighted = (0..5).map(|seed| Example::all_scored(sequence(seed, 20)).with_weight(1.0 + seed as f32));
    let few = Dataset::from_examples(weighted, &options()).unwrap();
    let many = Dataset::from_ids(sequence(3, 31 * 32), &options()).unwrap();
    Dataset::mixture([(few, 1.0), (many, 2.0)]).unwrap().into()
}

fn config() -> TrainerConfig {
    TrainerConfig::new(6, BatchOptions::new(2).with_seed(9)).with_lr(5e-3).with_warmup(2).with_accumulate(2)
}

/// Steps whole, and in two halves with a checkpoint between them, of which two ranks share the first; both must be the same.
fn check(what: &str, data: &Arc<Dataset>, config: &TrainerConfig) {
    let make = || {
        let trainer = Trainer::new(model(), data.clone(), config.clone()).unwrap();
        match config.loss.distillation {
            Some(_) => trainer.with_reference(base("tiny/llama-tied-f32-sharded", None)).unwrap(),
            None => trainer,
        }
    };
    let mut whole = make();
    let expected = whole.run(&RunOptions::new()).unwrap().steps;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last");
    let mut first = make().with_devices(&[Device::flex()]).unwrap();
    let mut found: Vec<_> = (0..3).map(|_| first.step().unwrap()).collect();
    first.save(&path).unwrap();
    drop(first);
    let mut second = make().resumed(&path).unwrap();
    found.extend(second.run(&RunOptions::new()).unwrap().steps);
    assert_eq!(losses(&found), losses(&expected), "{what}");
    assert_eq!(parameters(second.model()), parameters(whole.model()), "{what}");
    assert_ne!(expected[0].loss, expected[5].loss, "{what}: nothing is learned");
}

#[test]
fn token_losses_noise_and_groups_resume_bit_for_bit() {
    let data = documents();
    let smooth = TokenLoss::new().with_label_smoothing(0.1).with_z_loss(1e-3);
    check("smoothing", &data, &config().with_loss(smooth));
    check("noise", &data, &config().with_neftune(5.0));
    let distilled = TokenLoss::new().with_distillation(Distillation::default());
    check("distillation", &data, &config().with_loss(distilled));
    let plus = ParameterGroup::new("lora_b").unwrap().with_lr_factor(16.0).with_weight_decay(0.1);
    let falling = ScheduleKind::Linear { final_ratio: 0.0 };
    let first = ParameterGroup::new(r"layers\.0\..*").unwrap().with_schedule(falling);
    check("groups", &data, &config().with_group(plus).with_group(first));
}

#[test]
fn optimizers_resume_bit_for_bit() {
    let data = documents();
    for kind in [OptimizerKind::AdamW8Bit, OptimizerKind::Lion, OptimizerKind::Sgd { momentum: 0.9 }] {
        check(&format!("{kind:?}"), &data, &config().with_optimizer(kind).with_lr(1e-3));
    }
}

#[test]
fn preferences_resume_bit_for_bit() {
    check("dpo", &pairs(), &config().with_preference(PreferenceLoss::dpo()));
    check("orpo", &pairs(), &config().with_preference(PreferenceLoss::Orpo { beta: 0.1 }));
    check("kto", &labelled(), &config().with_preference(PreferenceLoss::kto()));
}

#[test]
fn mixtures_and_sorted_rows_resume_bit_for_bit() {
    check("mixture", &mixture(), &config());
    let sorted = BatchOptions::new(2).with_seed(9).with_group_by_length(true);
    check("sorted", &documents(), &config().with_batch(sorted));
}

/// Nine pairs in batches of two: the last is short, and ranks have unequally many.
#[test]
fn ranks_share_what_a_reference_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let dpo = || config().with_preference(PreferenceLoss::dpo());
    let fresh = || Trainer::new(model(), pairs(), dpo()).unwrap();
    let alone = folder.path().join("alone.json");
    let mut expected = fresh().with_known_answers(&alone).unwrap();
    let expected = losses(&expected.run(&RunOptions::new()).unwrap().steps);
    for count in [1, 2, 3] {
        // A folder that the first rank alone has.
        let own = folder.path().join(count.to_string());
        std::fs::create_dir(&own).unwrap();
        let place =
            |rank: usize| if rank == 0 { own.join("known.json") } else { own.join("none/known.json") };
        for _ in ["asked", "read"] {
            let found = on_ranks(count, |ranks| {
                let known = fresh().with_known_answers_on(&*ranks, place(ranks.rank())).unwrap();
                // Steps have two micro-batches.
                (count < 3)
                    .then(|| losses(&known.with_ranks(ranks).unwrap().run(&RunOptions::new()).unwrap().steps))
            });
            assert!(found.into_iter().flatten().all(|found| found == expected), "{count} ranks");
            assert_eq!(std::fs::read(place(0)).unwrap(), std::fs::read(&alone).unwrap(), "{count} ranks");
            assert!(!own.join("none").exists());
        }
    }
    // A rank with other data, and a file of other data, are errors of all.
    let fewer = || Dataset::from_pairs((0..8).map(answers), &options()).unwrap();
    let refused = |data: &(dyn Fn(usize) -> Arc<Dataset> + Sync), file: &str| {
        let path = folder.path().join(file);
        let found = on_ranks(2, |ranks| {
            let trainer = Trainer::new(model(), data(ranks.rank()), dpo()).unwrap();
            trainer.with_known_answers_on(&*ranks, &path).err().map(|error| error.to_string())
        });
        found.into_iter().map(|error| error.expect("an error")).collect::<Vec<_>>()
    };
    let other = |rank: usize| if rank == 1 { fewer().into() } else { pairs() };
    let errors = refused(&other, "new.json");
    assert!(errors.iter().all(|error| error.contains("data")), "{errors:?}");
    let errors = refused(&|_| fewer().into(), "alone.json");
    assert!(errors.iter().all(|error| error.contains("fingerprints")), "{errors:?}");
}

/// What decides a run and isn't among the trainer's options is in the checkpoint all the same.
#[test]
fn runs_of_another_length_or_of_other_answers_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let [last, known] = ["last", "known.json"].map(|name| folder.path().join(name));
    let dpo = || config().with_preference(PreferenceLoss::dpo());
    let fresh = || Trainer::new(model(), pairs(), dpo()).unwrap();
    fresh().with_known_answers(&known).unwrap().save(&last).unwrap();
    let error = fresh().resumed(&last).unwrap_err().to_string();
    assert!(error.contains("model.known answers: expected nothing"), "{error}");
    assert!(fresh().with_known_answers(&known).unwrap().resumed(&last).is_ok());
    let longer = |length| {
        let examples = (0..9).map(|seed| Example::all_scored(sequence(seed, 20)));
        let data = Dataset::from_examples(examples, &DataOptions::new(length, 256)).unwrap();
        Trainer::new(model(), data.into(), config()).unwrap()
    };
    longer(32).save(&last).unwrap();
    let error = longer(64).resumed(&last).unwrap_err().to_string();
    assert!(error.contains("model.seq_len: expected 64, found 32"), "{error}");
    // More steps are another run where any rate depends on their number.
    let falling = |steps| {
        let group =
            ParameterGroup::new("lora_b").unwrap().with_schedule(ScheduleKind::Linear { final_ratio: 0.0 });
        Trainer::new(model(), documents(), config().with_steps(steps).with_group(group)).unwrap()
    };
    falling(6).save(&last).unwrap();
    let error = falling(60).resumed(&last).unwrap_err().to_string();
    assert!(error.contains("config.steps"), "{error}");
    let inverse = |steps| {
        let config = config().with_steps(steps).with_schedule(ScheduleKind::InverseSqrt { timescale: 5 });
        Trainer::new(model(), documents(), config).unwrap()
    };
    inverse(6).save(&last).unwrap();
    assert!(inverse(60).resumed(&last).is_ok());
}

#[test]
fn eight_bits_learn_as_well_as_thirty_two() {
    let last = |kind| {
        let config = config().with_steps(30).with_optimizer(kind);
        let steps =
            Trainer::new(model(), documents(), config).unwrap().run(&RunOptions::new()).unwrap().steps;
        let first = steps[0].loss;
        (first, steps[25..].iter().map(|step| step.loss).sum::<f64>() / 5.0)
    };
    let ((first, full), (_, small)) = (last(OptimizerKind::AdamW), last(OptimizerKind::AdamW8Bit));
    assert!(full < 0.8 * first, "{first} {full}");
    assert!((small - full).abs() < 0.05 * (first - full), "{first} {full} {small}");
}

/// BitFit: biases and norms move, nothing else does, and a 4-bit base learns from that.
#[test]
fn parameters_are_trained_by_their_paths() {
    let patterns = ["bias", ".*norm.*"].map(|pattern| pattern.parse().unwrap());
    let base = base("tiny/opt-f32", Some("affine4:32"));
    let before = with_trained(base.clone(), &patterns).unwrap().train();
    let mut trainer = Trainer::new(before.clone(), documents(), config().with_lr(2e-2)).unwrap();
    let steps = trainer.run(&RunOptions::new()).unwrap().steps;
    assert!(steps[5].loss < steps[0].loss - 0.05, "{} {}", steps[0].loss, steps[5].loss);
    let values = |model: &Decoder<QuantLinear>| {
        let mut found = BTreeMap::new();
        for_each_parameter(model, |parameter| {
            found.insert(parameter.name(), parameter.values()?);
            Ok::<_, kiln_quant_core::Error>(())
        })
        .unwrap();
        found
    };
    let (before, after) = (values(&base), values(&trainer.into_model()));
    let moved: Vec<&String> =
        before.iter().filter(|(path, values)| after[*path] != **values).map(|(path, _)| path).collect();
    assert!(
        moved.len() > 10 && moved.iter().all(|path| path.contains("norm") || path.ends_with("bias")),
        "{moved:?}"
    );
    let error = with_trained(base, &["lora_a".parse().unwrap()]).unwrap_err().to_string();
    assert!(error.starts_with("pattern lora_a: expected a parameter"), "{error}");
}

#[test]
fn groups_without_parameters_are_refused() {
    let group = ParameterGroup::new("lora_c").unwrap();
    let error = Trainer::new(model(), documents(), config().with_group(group)).unwrap_err().to_string();
    assert!(error.starts_with("group lora_c: expected trained parameters"), "{error}");
    let none = ParameterGroup::new(".*").unwrap().with_lr_factor(0.0);
    let error = Trainer::new(model(), documents(), config().with_group(none)).unwrap_err().to_string();
    assert!(error.contains("lr_factor"), "{error}");
}

/// The group's rate is what its factor says: one step of gradient descent is as much longer.
#[test]
fn a_group_steps_at_its_own_rate() {
    let step = |config: TrainerConfig| {
        let config =
            config.with_optimizer(OptimizerKind::Sgd { momentum: 0.0 }).with_warmup(0).with_clip(None);
        let mut trainer = Trainer::new(model(), documents(), config).unwrap();
        let before = parameters(trainer.model());
        trainer.step().unwrap();
        let after = parameters(trainer.model());
        let change = |(a, b): (&Vec<f32>, &Vec<f32>)| {
            a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>().sqrt()
        };
        before.iter().zip(&after).map(change).collect::<Vec<f64>>()
    };
    let plain = step(config());
    let faster = step(config().with_group(ParameterGroup::new("lora_b").unwrap().with_lr_factor(16.0)));
    let mut ratios: Vec<i64> =
        plain.iter().zip(&faster).filter(|(a, _)| **a > 1e-6).map(|(a, b)| (b / a).round() as i64).collect();
    ratios.dedup();
    assert_eq!(ratios, [16], "only B has a gradient at first");
}
