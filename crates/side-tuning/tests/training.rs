//! Training, evaluation and generation with side-tuned models.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::Tensor,
};
use kiln_models::fingerprint;
use kiln_models::{CausalLm, GenerateOptions, KvCache, Recompute, Targets, TokenBatch, generate, token_nll};
use kiln_quant_core::trained_values;
use kiln_side_tuning::{Downsample, Error, GateShape, HeadMix, Share, SideConfig, SideTuned};
use kiln_testkit::{assert_close, max_difference, read, testdata};
use kiln_training::{RunOptions, Trainer};

use crate::common::{Base, embedded, first_row, load, next_token_gradients, text, trainer_config};

const IDS: [u32; 12] = [5, 900, 17, 33, 2000, 8, 8, 450, 1023, 77, 6, 300];

fn tokens(ids: &[u32]) -> TokenBatch {
    TokenBatch::new(&[ids.to_vec()]).unwrap()
}

fn logits<M: CausalLm>(model: &M, ids: &[u32]) -> Vec<f32> {
    read(model.forward(&model.context(&tokens(ids), None).unwrap()))
}

#[test]
fn only_additive_and_raw_mixes_start_at_the_backbone() {
    let base = embedded();
    let expected = logits(&base, &IDS);
    for (mix, starts_there) in [
        (HeadMix::Raw { init: 1.0 }, true),
        (HeadMix::Additive, true),
        (HeadMix::Sigmoid { init: 1.0, share: Share::Backbone }, false),
        (HeadMix::SideOnly, false),
    ] {
        let config = SideConfig::qst().with_mix(mix, GateShape::Scalar);
        let model = SideTuned::new(base.clone(), &config, 3).unwrap();
        assert_eq!(logits(&model, &IDS) == expected, starts_there, "{mix:?}");
        let side: f64 = next_token_gradients(&model.train(), &IDS, Recompute::None)
            .1
            .iter()
            .filter(|(name, _)| *name != "side.mix.alpha")
            .flat_map(|(_, values)| values)
            .map(|value| f64::from(value.abs()))
            .sum();
        // At alpha 1 nothing but alpha has a gradient; an additive mix has one in the upsampling.
        let expected_zero = mix == HeadMix::Raw { init: 1.0 };
        assert_eq!(side == 0.0, expected_zero, "{mix:?} {side}");
    }
}

#[test]
fn training_learns_and_leaves_the_backbone_as_it_was() {
    let base = embedded();
    let before = fingerprint(&base).unwrap();
    let held_out = |model: &SideTuned<Base>| {
        let row = first_row(64);
        let targets: Vec<u32> = row[1..].iter().copied().chain([0]).collect();
        let scored: Vec<bool> = (0..row.len()).map(|place| place + 1 < row.len()).collect();
        let targets = Targets { ids: &targets, scored: &scored };
        let nll = token_nll(model, &tokens(&row), targets).unwrap();
        nll.iter().sum::<f32>() / nll.len() as f32
    };
    for (config, drop) in [
        (SideConfig::qst(), 0.02),
        (SideConfig::qst().with_mix(HeadMix::Additive, GateShape::Scalar), 0.1),
        (SideConfig::qst().with_downsample(Downsample::AvgPool), 0.02),
    ] {
        let model = SideTuned::new(base.clone(), &config, 3).unwrap();
        let start = held_out(&model);
        let mut trainer = Trainer::new(model, text(64), trainer_config(30, 4)).unwrap();
        let reports = trainer.run(&RunOptions::new()).unwrap().steps;
        assert!(reports.iter().all(|report| report.loss.is_finite()));
        let counts = config.parameter_counts(base.config()).unwrap();
        assert_eq!(trained_values(trainer.model()), counts.total());
        assert_plain(trainer.model().backbone());
        let model = trainer.into_model();
        let end = held_out(&model);
        assert!(end < start - drop, "{config:?}: {start} to {end}");
        assert_eq!(fingerprint(model.backbone()).unwrap(), before);
    }
}

/// Fails if a parameter is on an autodiff device.
fn assert_plain<M: Module>(model: &M) {
    struct Plain;
    impl ModuleVisitor for Plain {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            assert!(!param.val().is_autodiff());
        }
    }
    model.visit(&mut Plain);
}

#[test]
fn the_side_gets_gradients_after_one_step_of_adamw() {
    let model = SideTuned::new(embedded(), &SideConfig::qst(), 3).unwrap();
    let mut trainer = Trainer::new(model, text(64), trainer_config(2, 2)).unwrap();
    trainer.step().unwrap();
    let (_, gradients) = next_token_gradients(trainer.model(), &IDS, Recompute::None);
    let first = &gradients["side.downsample.0.down.weight"];
    assert!(first.iter().any(|value| *value != 0.0));
}

#[test]
fn a_resumed_run_goes_on_bit_for_bit() {
    let model = || SideTuned::new(embedded(), &SideConfig::qst(), 3).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(model(), text(64), trainer_config(4, 2)).unwrap();
    trainer.step().unwrap();
    trainer.step().unwrap();
    trainer.save(folder.path().join("last")).unwrap();
    let resumed = Trainer::resume(model(), text(64), trainer_config(4, 2), folder.path().join("last"));
    let mut resumed = resumed.unwrap();
    for _ in 0..2 {
        let (expected, found) = (trainer.step().unwrap(), resumed.step().unwrap());
        assert_eq!(found.loss.to_bits(), expected.loss.to_bits());
        assert_eq!(found.grad_norm.to_bits(), expected.grad_norm.to_bits());
    }
}

#[test]
fn recomputation_changes_nothing() {
    for config in
        [SideConfig::qst(), SideConfig::lst(), SideConfig::qst().with_downsample(Downsample::MaxPool)]
    {
        let run = |recompute| {
            let model = SideTuned::new(embedded(), &config, 3).unwrap();
            let mut options = trainer_config(3, 2);
            options.recompute = recompute;
            let mut trainer = Trainer::new(model, text(64), options).unwrap();
            trainer.run(&RunOptions::new()).unwrap().steps
        };
        for (plain, again) in run(Recompute::None).iter().zip(run(Recompute::Block)) {
            assert!((plain.loss / again.loss - 1.0).abs() < 1e-6, "{config:?} {plain:?} {again:?}");
            assert!((plain.grad_norm / again.grad_norm - 1.0).abs() < 1e-4, "{config:?} {plain:?} {again:?}");
        }
    }
}

#[test]
fn generation_equals_the_batch_forward() {
    let opt = load(testdata("tiny/opt-f32"), None);
    let opt_ids: Vec<u32> = IDS.iter().map(|id| id % 256).collect();
    let sides = |config: SideConfig| {
        let config = config.with_mix(HeadMix::Raw { init: 0.4 }, GateShape::Vector);
        SideTuned::new(embedded(), &config, 3).unwrap()
    };
    check_generation(&sides(SideConfig::qst()), &IDS);
    check_generation(&sides(SideConfig::qst().with_heads(3).with_downsample(Downsample::AvgPool)), &IDS);
    check_generation(&SideTuned::new(embedded(), &SideConfig::lst(), 3).unwrap(), &IDS);
    check_generation(&SideTuned::new(opt, &SideConfig::lst(), 3).unwrap(), &opt_ids);
}

fn check_generation<M: CausalLm>(model: &M, ids: &[u32]) {
    let vocabulary = model.vocab_size();
    let whole = logits(model, ids);
    // A prompt of five tokens, then one at a time.
    let mut cache = KvCache::new();
    let mut rows = Vec::new();
    for part in [&ids[..5]].into_iter().chain(ids[5..].chunks(1)) {
        let batch = TokenBatch::continuing(part.to_vec(), cache.length() as u32);
        let context = model.context(&batch, Some(&cache)).unwrap();
        let x = model.residual(&context, Some(&mut cache));
        rows.extend(read(model.lm_head(model.final_norm(x))));
    }
    assert_eq!(cache.length(), ids.len());
    assert_close("logits", &rows, &whole, 2e-4);
    let mut prompt = ids.to_vec();
    let options = GenerateOptions::new(5);
    let found = generate(model, &prompt, &options).unwrap().ids;
    for id in found {
        let row = logits(model, &prompt);
        let last = &row[(prompt.len() - 1) * vocabulary..];
        let best = last.iter().copied().fold(f32::MIN, f32::max);
        assert!(best - last[id as usize] < 2e-4);
        prompt.push(id);
    }
}

#[test]
fn padding_and_packing_do_not_leak() {
    let config = SideConfig::qst().with_mix(HeadMix::Raw { init: 0.4 }, GateShape::Scalar);
    let model = SideTuned::new(embedded(), &config, 3).unwrap();
    let alone = logits(&model, &IDS);
    let ids = [vec![1, 1, 1], IDS.to_vec()].concat();
    let mask = [vec![0; 3], vec![1; 12]].concat();
    let batch = TokenBatch::masked(ids, mask, 1, 15).unwrap();
    let padded = read(model.forward(&model.context(&batch, None).unwrap()));
    assert!(max_difference(&padded[3 * 2048..], &alone) < 2e-4);
}

#[test]
fn reductions_that_do_not_fit_are_refused_with_those_that_do() {
    let refuse = |config: SideConfig| match SideTuned::new(embedded(), &config, 0) {
        Err(Error::Argument { name, expected, found }) => (name, expected, found),
        other => panic!("{:?}", other.map(|_| ())),
    };
    // Width 192, six heads of 32: a side head has 32 / reduction channels, an even number.
    let (name, expected, found) = refuse(SideConfig::qst().with_reduction(5));
    assert_eq!((name.as_str(), found.as_str()), ("reduction", "5"));
    assert!(expected.ends_with(": 1, 2, 4, 8, 16") && expected.contains("192"), "{expected}");
    // 192 / 32 leaves six heads of one channel, which rotary positions can't turn.
    let (_, expected, _) = refuse(SideConfig::qst().with_reduction(32));
    assert!(expected.contains("even"), "{expected}");
    assert!(SideTuned::new(embedded(), &SideConfig::qst().with_reduction(32).with_heads(3), 0).is_ok());
    assert_eq!(refuse(SideConfig::qst().with_reduction(0)).0, "reduction");
    assert_eq!(refuse(SideConfig::qst().with_heads(5)).0, "reduction");
    assert_eq!(refuse(SideConfig::qst().with_heads(0)).0, "reduction");
    assert_eq!(refuse(SideConfig::qst().with_rank(0)).0, "rank");
    assert_eq!(refuse(SideConfig::qst().with_rank(usize::MAX)).0, "rank");
    assert_eq!(refuse(SideConfig::qst().with_gate(GateShape::Scalar, f64::NAN)).0, "gate");
    let mix = HeadMix::Raw { init: f64::INFINITY };
    assert_eq!(refuse(SideConfig::qst().with_mix(mix, GateShape::Scalar)).0, "mix");
    // OPT has no rotary positions: heads of one channel will do.
    let opt = load(testdata("tiny/opt-f32"), None);
    assert!(SideTuned::new(opt, &SideConfig::qst().with_rank(4), 0).is_ok());
}
