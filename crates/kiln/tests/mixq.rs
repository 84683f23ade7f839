//! Searches over real models: bytes, scores, resuming, memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use burn::{
    module::Param,
    tensor::{Device, Tensor, TensorData},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, LoraAttacher},
    calibration::{CalibrationConfig, Calibrator, GptqConfig, LoftqConfig, Method, Rounding},
    eval::{DataFolder, ModelScorer, Task},
    mixq::{
        Choices, FineTune, Fisher, KlOptions, LogitKl, ModelObjective, Moments, Prunings, TaskScore,
        TrainingShape, Variants, adapters, attach, load_options, schemes, space_of,
    },
    mixq_search::{
        Config, Divergence, Evaluation, Fidelity, Finalists, Granularity, KeepGoing, KlMix, Measure,
        MemoryAxis, Objective, Outcome, Plan, Request, SearchSettings, SearchSpace, TrialLog, search,
    },
    models::{
        CausalLm, Checkpoint, Decoder, LoadOptions, Recompute, Slots, Targets, TokenBatch, Windows,
        families::NormPlace,
        memory::{Halves, ProcessConstants, Step},
        token_nll,
    },
    pruning::{
        BlockPruning, Criterion, CutOptions, LayerRange, PruningRecord, SaveFormat, load_pruned, save_pruned,
    },
    quant::{Projection, QuantLinear, Scheme},
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};
use kiln_testkit::{assert_close, figures_of, ids, peak, read, report, task, testdata};

const EMBEDDED: &str = "models/tiny-llama";

fn scheme(text: &str) -> Scheme {
    text.parse().unwrap()
}

fn choices(schemes: &[&str]) -> Choices {
    Choices::new(schemes.iter().map(|text| scheme(text)))
}

fn load(path: &str) -> (Checkpoint, Decoder<QuantLinear>) {
    let checkpoint = Checkpoint::open(testdata(path)).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    (checkpoint, model)
}

fn text(name: &str) -> Vec<u32> {
    ids(name)
}

fn windows(count: usize, length: usize) -> Windows {
    Windows::leading(&text("shift_test_moby"), length, count).unwrap()
}

/// Plans all over a space, the same each time.
fn some_configs(space: &SearchSpace, count: usize) -> Vec<Config> {
    let pick = |plan: usize, unit: usize| (plan * 7 + unit * (3 + plan) + unit * unit) % space.choices(unit);
    let config = |plan| Config((0..space.units().len()).map(|unit| pick(plan, unit) as u8).collect());
    (0..count).map(config).chain([space.lowest(), space.highest()]).collect()
}

#[test]
fn predicted_bytes_are_the_loaded_models() {
    // Tied and untied, with biases, and weights stored packed.
    for path in [EMBEDDED, "tiny/llama-untied-gptq4-v1", "tiny/opt-f32"] {
        let (checkpoint, model) = load(path);
        let mut choices = choices(&["affine2:64", "affine3:32:f16", "nf4:64:double", "affine8:col", "dense"]);
        choices.frozen = vec![(".*o(ut)?_proj".parse().unwrap(), scheme("affine4:64"))];
        let space = space_of(&model, &choices).unwrap();
        let mut variants = Variants::new(model);
        for config in some_configs(&space, 6) {
            let (plan, predicted) = (space.plan(&config), space.bytes(&config));
            let (loaded, report) =
                checkpoint.load(&load_options(&plan).unwrap().in_f32(), &Device::flex()).unwrap();
            assert_eq!(report.storage.total_bytes() as u64, predicted, "{path} {config:?}");
            assert_eq!(loaded.stored_bytes() as u64, predicted);
            let made = variants.model(&plan).unwrap();
            assert_eq!(made.stored_bytes() as u64, predicted);
            // The searched model is the loaded one, not only as large.
            let ids: Vec<u32> = (0..16).map(|i| i * 29 % 256).collect();
            let logits = |model: &Decoder<QuantLinear>| {
                read(model.forward(
                    &model.context(&TokenBatch::new(std::slice::from_ref(&ids)).unwrap(), None).unwrap(),
                ))
            };
            assert_eq!(logits(&made), logits(&loaded), "{path} {config:?}");
        }
    }
}

#[test]
fn a_pruned_model_is_counted_by_its_own_shapes() {
    let (checkpoint, model) = load(EMBEDDED);
    let mut pruning = BlockPruning::new(Criterion::L2, 0.38);
    pruning.round_to = 8;
    let pruned = pruning.prune(model, None, &CutOptions::default()).unwrap();
    let space = space_of(&pruned.model, &choices(&["affine2:64", "affine4:64", "dense"])).unwrap();
    assert_eq!(space.bytes(&space.highest()), pruned.report.bytes_after as u64);
    let folder = tempfile::tempdir().unwrap();
    let record = PruningRecord::new(checkpoint.config().clone(), &pruning, &pruned.report).unwrap();
    save_pruned(&pruned.model, &record, &checkpoint, &SaveFormat::AsIs, folder.path()).unwrap();
    for config in some_configs(&space, 4) {
        let options = load_options(&space.plan(&config)).unwrap().in_f32();
        let (_, report, _) = load_pruned(folder.path(), &options, &Device::flex()).unwrap();
        assert_eq!(report.storage.total_bytes() as u64, space.bytes(&config), "{config:?}");
    }
}

#[test]
fn ranks_and_adapters_are_counted_and_attached() {
    let (_, model) = load(EMBEDDED);
    let step =
        Step { batch: 1, seq_len: 32, recompute: Recompute::None, logit_rows: 256, halves: Halves::None };
    let mut choices = choices(&["affine4:64"])
        .with_granularity(Granularity::Kind)
        .with_training(TrainingShape { rank: 4, step, process: ProcessConstants::CPU }, MemoryAxis::Static);
    choices.ranks = vec![2, 6];
    choices.adapters = vec!["lora".into(), "dora".into()];
    let space = space_of(&model, &choices).unwrap();
    assert_eq!(space.units()[0].choices.len(), 4);
    let dataset = Arc::new(
        Dataset::from_ids(text("shift_test_moby")[..256].to_vec(), &DataOptions::new(32, 2048)).unwrap(),
    );
    let config = AdapterConfig::lora(4, 8.0);
    for choice in some_configs(&space, 2) {
        let plan = space.plan(&choice);
        let config = adapters(&plan, &config);
        let slots = model.slot_shapes();
        let mut expected = 0;
        for (path, [d_input, d_output]) in &slots {
            let setting = plan.get(path).unwrap();
            let dora = if setting.adapter.as_deref() == Some("dora") { *d_output } else { 0 };
            expected += setting.rank.unwrap() as usize * (d_input + d_output) + dora;
        }
        let report = space.report(&choice);
        assert_eq!(report.adapters, 12 * expected as u64);
        assert!(report.peak > report.total && report.total == report.storage + report.adapters);
        let attacher = kiln::adapters::LoraAttacher::new(&config, &slots).unwrap();
        for (path, _) in &slots {
            let target = attacher.targets().get(path).unwrap();
            assert_eq!(target.r as u32, plan.get(path).unwrap().rank.unwrap(), "{path}");
            assert_eq!(target.scaling, 2.0, "{path}");
        }
    }
    let mut variants = Variants::new(model);
    let tuning =
        FineTune::new(dataset, text("shift_test_moby")[256..512].to_vec(), 32, trainer(), config).unwrap();
    let plan = space.plan(&space.highest());
    let quantized = variants.model(&plan).unwrap();
    let tuned = tuning.run(variants.original(), quantized, &plan, 2, 0, &mut |_, _| true).unwrap();
    assert!(tuned.loss.is_finite() && tuned.steps == 2);
}

fn direct_kl<M: CausalLm>(original: &Decoder<QuantLinear>, quantized: &M, windows: &Windows) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for tokens in windows.batches_of(1) {
        let read = |logits: Tensor<3>| read(logits.flatten::<2>(0, 1));
        let reference = read(original.forward(&original.context(&tokens, None).unwrap()));
        let found = read(quantized.forward(&quantized.context(&tokens, None).unwrap()));
        let vocabulary = original.vocab_size();
        for (reference, found) in reference.chunks(vocabulary).zip(found.chunks(vocabulary)) {
            sum += Divergence::Kl.between(reference, found).unwrap();
            count += 1;
        }
    }
    sum / f64::from(count)
}

#[test]
fn kl_is_that_of_the_logits_and_caches_change_no_bit() {
    let (_, model) = load(EMBEDDED);
    let windows = windows(6, 48);
    let space = space_of(&model, &choices(&["affine2:64", "affine4:64", "dense"])).unwrap();
    let objective =
        |options: KlOptions| ModelObjective::new(Variants::new(model.clone()), &windows, &options).unwrap();
    let mut small = KlOptions::default();
    small.batch_tokens = 96;
    let mut cached = objective(small);
    small.cache_bytes = 0;
    let mut bare = objective(small);
    let tokens = cached.tokens();
    assert_eq!(tokens, 6 * 48);
    let kl = |objective: &mut ModelObjective, config: &Config| {
        objective.kl(&space.plan(config), tokens, &mut |_, _| true).unwrap().score
    };
    assert_eq!(kl(&mut cached, &space.highest()), 0.0, "the original itself");
    let mut last = None;
    for config in some_configs(&space, 5) {
        let (with, without) = (kl(&mut cached, &config), kl(&mut bare, &config));
        assert_eq!(with.to_bits(), without.to_bits(), "{config:?}");
        let quantized = Variants::new(model.clone()).model(&space.plan(&config)).unwrap();
        let expected = direct_kl(&model, &quantized, &windows);
        assert!((with - expected).abs() <= 1e-4 * expected + 1e-7, "{config:?}: {with}, directly {expected}");
        last = Some(with);
    }
    assert_eq!(last, Some(0.0));
    assert!(kl(&mut cached, &space.lowest()) > 0.01);
    // Fewer tokens, in whole batches; and heard on the way.
    let mut heard = Vec::new();
    let lowest = space.plan(&space.lowest());
    let part = cached
        .kl(&lowest, 100, &mut |tokens, kl| {
            heard.push((tokens, kl));
            true
        })
        .unwrap();
    let expected =
        direct_kl(&model, &Variants::new(model.clone()).model(&lowest).unwrap(), &windows.first(4));
    assert_eq!(part.figures["tokens"], 192.0);
    assert!((part.score - expected).abs() < 1e-4 * expected);
    assert_eq!(heard.iter().map(|(tokens, _)| *tokens).collect::<Vec<_>>(), [96]);
    let stopped = cached.kl(&lowest, tokens, &mut |_, _| false).unwrap();
    assert_eq!((stopped.figures["tokens"], stopped.score), (96.0, heard[0].1));
}

/// An objective whose process is killed.
struct Mortal<'a> {
    objective: &'a mut ModelObjective,
    evaluations: usize,
    dies_after: usize,
}

impl Objective for Mortal<'_> {
    fn fingerprint(&self) -> String {
        self.objective.fingerprint()
    }

    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation {
        if self.evaluations == self.dies_after {
            return Err("killed".into());
        }
        self.evaluations += 1;
        self.objective.evaluate(request, keep_going)
    }
}

#[test]
fn a_killed_search_resumes_to_the_same_front() {
    let (_, model) = load(EMBEDDED);
    let space = space_of(&model, &choices(&["affine2:64", "affine3:64", "affine4:64"])).unwrap();
    let mut objective =
        ModelObjective::new(Variants::new(model.clone()), &windows(2, 48), &KlOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let settings = SearchSettings::new(16, Fidelity::kl(96)).with_seed(3);
    let mut run = |name: &str, dies_after: usize| -> (kiln::mixq_search::Result<Outcome>, usize) {
        let fingerprint = objective.fingerprint();
        let mut mortal = Mortal { objective: &mut objective, evaluations: 0, dies_after };
        let mut log = TrialLog::open(folder.path().join(name), &space, &fingerprint).unwrap();
        (search(&space, &mut mortal, &mut log, &KlMix::default(), &settings), mortal.evaluations)
    };
    let whole = run("whole", usize::MAX).0.unwrap();
    assert!(whole.front.points.len() > 2);
    for dies_after in BTreeSet::from([1, 9, whole.trials.len() - 1]) {
        let name = format!("killed after {dies_after}");
        let error = run(&name, dies_after).0.unwrap_err().to_string();
        assert!(error.contains("killed"), "{error}");
        let (resumed, evaluations) = run(&name, usize::MAX);
        assert_eq!(resumed.unwrap().front, whole.front, "{name}");
        assert_eq!(evaluations, whole.trials.len() - dies_after);
    }
    // A log is this model's only.
    let other = Variants::new(Variants::new(model).model(&space.plan(&space.lowest())).unwrap());
    let other = ModelObjective::new(other, &windows(2, 48), &KlOptions::default()).unwrap();
    let error = TrialLog::open(folder.path().join("whole"), &space, &other.fingerprint()).unwrap_err();
    assert!(error.to_string().contains("objective"), "{error}");
}

#[test]
fn what_can_not_be_searched_says_why() {
    let (_, model) = load(EMBEDDED);
    let space = space_of(&model, &choices(&["affine2:64", "affine4:64"])).unwrap();
    let mut objective =
        ModelObjective::new(Variants::new(model.clone()), &windows(1, 32), &KlOptions::default()).unwrap();
    let mut try_search = |settings: &SearchSettings| {
        let mut log = TrialLog::in_memory(&space);
        search(&space, &mut objective, &mut log, &KlMix::default(), settings).unwrap_err().to_string()
    };
    let smallest = space.smallest();
    let error = try_search(&SearchSettings::new(4, Fidelity::kl(32)).with_max_bytes(smallest - 1));
    assert!(error.contains(&format!("smallest possible plan takes {smallest} bytes")), "{error}");
    let error = try_search(&SearchSettings::new(4, Fidelity::kl(33)));
    assert!(error.contains("1 to 32") && error.contains("33"), "{error}");
    let error = try_search(&SearchSettings::new(4, Fidelity::finetune(1)));
    assert!(error.contains("fidelity.measure") && error.contains("Finetune"), "{error}");

    let fail = |choices: &Choices| space_of(&model, choices).unwrap_err().to_string();
    assert!(fail(&choices(&[])).contains("at least one"));
    let mut bad = choices(&["dense"]);
    bad.axis = MemoryAxis::Peak;
    assert!(fail(&bad).contains("Choices.training"));
    bad = choices(&["dense"]);
    bad.adapters = vec!["lora".into()];
    assert!(fail(&bad).contains("Choices.axis"));
    let step =
        Step { batch: 1, seq_len: 32, recompute: Recompute::None, logit_rows: 256, halves: Halves::None };
    let shape = TrainingShape { rank: 4, step, process: ProcessConstants::CPU };
    bad = bad.with_training(shape, MemoryAxis::Peak);
    bad.adapters = vec!["houlsby".into()];
    assert!(fail(&bad).contains("houlsby"));
    bad = choices(&["dense"]);
    bad.frozen = vec![("o_prog".parse().unwrap(), scheme("affine8:64"))];
    assert!(fail(&bad).contains("\"o_prog\", which matches none"));

    let plan: Plan = serde_json::from_str(r#"{"model.layers.0.self_attn.q_proj":"affine4:64"}"#).unwrap();
    let error = Variants::new(model.clone()).model(&plan).unwrap_err().to_string();
    assert!(error.contains("k_proj") && error.contains("none"), "{error}");
    assert!(Windows::new(vec![vec![1]]).is_err());
    for bad in [vec![1; 513], vec![2048, 1]] {
        let windows = Windows::new(vec![bad]).unwrap();
        assert!(LogitKl::new(&model, &windows, &KlOptions::default()).is_err());
    }
    assert!(schemes(&serde_json::from_str(r#"{"a":"affine9:64"}"#).unwrap()).is_err());
    let pruned: Plan = serde_json::from_str(r#"{"a":"affine4:64 prune=0.5"}"#).unwrap();
    assert!(schemes(&pruned).unwrap_err().to_string().contains("prune=0.5"));
    let path = "model.layers.0.self_attn.q_proj";
    let houlsby: Plan = serde_json::from_str(&format!(r#"{{"{path}":"dense adapter=houlsby"}}"#)).unwrap();
    let error = attach(model.clone(), &houlsby, &AdapterConfig::lora(4, 8.0)).unwrap_err().to_string();
    assert!(error.contains(path) && error.contains("houlsby"), "{error}");
    // Scores of KL are the same under every seed, so fresh seeds would only repeat them.
    let settings = SearchSettings::new(4, Fidelity::kl(32)).with_finalists(Finalists::default());
    let log = &mut TrialLog::in_memory(&space);
    let error = search(&space, &mut objective, log, &KlMix::default(), &settings).unwrap_err().to_string();
    assert!(error.contains("Finalists.fidelity") && error.contains("Kl"), "{error}");
    // A log of one model is none of another measurement.
    let log = &mut TrialLog::in_memory(&space);
    let settings = SearchSettings::new(1, Fidelity::kl(32));
    search(&space, &mut objective, log, &KlMix::default(), &settings).unwrap();
    let mut other =
        ModelObjective::new(Variants::new(model.clone()), &windows(2, 32), &KlOptions::default()).unwrap();
    let error = search(&space, &mut other, log, &KlMix::default(), &settings).unwrap_err().to_string();
    assert!(error.contains("objective fingerprint"), "{error}");
}

#[test]
fn output_errors_are_those_of_the_outputs() {
    let (_, model) = load(EMBEDDED);
    let windows = windows(2, 40);
    let moments = Moments::measure(&model, &windows).unwrap();
    let mut variants = Variants::new(model.clone());
    let path = "model.layers.0.self_attn.q_proj";
    let original = variants.projection(path, Scheme::Dense).unwrap();
    for name in ["affine2:64", "affine4:64"] {
        let quantized = variants.projection(path, scheme(name)).unwrap();
        let (mut error, mut signal) = (0.0, 0.0);
        for tokens in windows.batches_of(1) {
            let x = model.embed(&model.context(&tokens, None).unwrap());
            let x = model.blocks[0].norm(NormPlace::PreAttention).unwrap().forward(x);
            let (y, found) = (read(original.forward(x.clone())), read(quantized.forward(x)));
            error += y.iter().zip(&found).map(|(y, found)| f64::from(y - found).powi(2)).sum::<f64>();
            signal += y.iter().map(|y| f64::from(*y).powi(2)).sum::<f64>();
        }
        let found = moments.relative_error(path, &original, &quantized).unwrap();
        assert!(
            (found / (error / signal) - 1.0).abs() < 1e-3,
            "{name}: {found}, directly {}",
            error / signal
        );
    }
    assert_eq!(moments.relative_error(path, &original, &original).unwrap(), 0.0);
}

#[test]
fn fisher_weighs_errors_by_squared_gradients() {
    let (_, model) = load(EMBEDDED);
    let window = windows(1, 40);
    let fisher = Fisher::measure(&model, &window).unwrap();
    let path = "model.layers.1.mlp.down_proj";
    let original = Variants::new(model.clone()).projection(path, Scheme::Dense).unwrap();
    let [d_input, d_output] = original.shape();
    let values = read(original.weight());
    let moved = |index: usize, by: f32| {
        let mut values = values.clone();
        values[index] += by;
        let QuantLinear::Dense(mut linear) = original.clone() else { panic!("dense") };
        let weight = Tensor::<2>::from_data(TensorData::new(values, [d_input, d_output]), &Device::flex());
        linear.weight = Param::from_tensor(weight);
        QuantLinear::Dense(linear)
    };
    let loss = |slot: QuantLinear| {
        let model = model.clone().try_map(|known, kept| {
            Ok::<_, std::convert::Infallible>(if known == path { slot.clone() } else { kept })
        });
        let tokens = window.batches().remove(0);
        let ids: Vec<u32> = window.as_slice()[0][1..].iter().copied().chain([0]).collect();
        let scored: Vec<bool> = (0..40).map(|place| place < 39).collect();
        let nll = token_nll(&model.unwrap(), &tokens, Targets { ids: &ids, scored: &scored }).unwrap();
        nll.into_iter().map(f64::from).sum::<f64>()
    };
    let step = 0.05;
    let mut found = Vec::new();
    let mut expected = Vec::new();
    for index in [3 * d_output + 5, 100 * d_output + 17, 300 * d_output + 90] {
        let slope = (loss(moved(index, step)) - loss(moved(index, -step))) / f64::from(2.0 * step);
        expected.push(slope.abs() as f32);
        let harm = fisher.harm(path, &original, &moved(index, step)).unwrap();
        found.push((2.0 * 39.0 * harm).sqrt() as f32 / step);
    }
    // The slopes are finite differences.
    assert_close("slopes", &found, &expected, 2e-2);
    assert_eq!(fisher.harm(path, &original, &original).unwrap(), 0.0);
}

fn trainer() -> TrainerConfig {
    let mut config = TrainerConfig::new(1, BatchOptions::new(2));
    config.lr = 2e-3;
    config
}

#[test]
fn fine_tunes_repeat_improve_and_stop() {
    let (_, model) = load(EMBEDDED);
    let space = space_of(&model, &choices(&["affine2:64", "affine8:64"])).unwrap();
    let ids = text("shift_test_moby");
    let dataset =
        Arc::new(Dataset::from_ids(ids[..4096].to_vec(), &DataOptions::new(64, model.vocab_size())).unwrap());
    let lora = AdapterConfig::lora(4, 8.0).with_dropout(0.05);
    let tuning = FineTune::new(dataset, ids[8192..8704].to_vec(), 64, trainer(), lora).unwrap();
    let objective = |tuning: &FineTune| {
        ModelObjective::new(Variants::new(model.clone()), &windows(1, 32), &KlOptions::default())
            .unwrap()
            .with_fine_tune(tuning.clone())
    };
    let mut plain = objective(&tuning);
    let loftq = tuning.clone().with_start(Method::Loftq(LoftqConfig::default()), windows(1, 32));
    let mut loftq = objective(&loftq);
    assert_ne!(plain.fingerprint(), loftq.fingerprint());
    let measure = |objective: &mut ModelObjective, config: &Config, steps: u64, seed: u64| {
        let settings = SearchSettings::new(1, Fidelity::finetune(steps)).with_evaluation_seed(seed);
        let mut log = TrialLog::in_memory(&space);
        let one = kiln::mixq_search::search(&space, objective, &mut log, &One(config.clone()), &settings);
        one.unwrap().trials[0].score.unwrap()
    };
    let (lowest, highest) = (space.lowest(), space.highest());
    let few = measure(&mut plain, &lowest, 2, 0);
    assert_eq!(few.to_bits(), measure(&mut plain, &lowest, 2, 0).to_bits());
    assert_ne!(few, measure(&mut plain, &lowest, 2, 1));
    let many = measure(&mut plain, &lowest, 12, 0);
    assert!(many < few - 0.05, "{few} after 2 steps, {many} after 12");
    assert!(measure(&mut plain, &highest, 2, 0) < few - 0.1);
    let corrected = measure(&mut loftq, &lowest, 2, 0);
    assert!(corrected < few, "LoftQ's start: {corrected}, LoRA's {few}");

    let mut variants = Variants::new(model.clone());
    let quantized = variants.model(&space.plan(&lowest)).unwrap();
    let mut heard = Vec::new();
    let tuned = tuning
        .with_evaluations(2)
        .run(&model, quantized, &space.plan(&lowest), 8, 0, &mut |steps, loss| {
            heard.push((steps, loss));
            steps < 4
        })
        .unwrap();
    assert_eq!(heard.iter().map(|(steps, _)| *steps).collect::<Vec<_>>(), [2, 4]);
    assert_eq!((tuned.steps, tuned.loss), heard[1]);
}

#[test]
fn what_fine_tunes_start_from_is_measured() {
    let (_, model) = load(EMBEDDED);
    let (windows, lora) = (windows(2, 48), AdapterConfig::lora(8, 4.0));
    let space = space_of(&model, &choices(&["affine2:64", "nf3:64", "dense"])).unwrap();
    let loftq = Method::Loftq(LoftqConfig::default());
    let plain =
        || ModelObjective::new(Variants::new(model.clone()), &windows, &KlOptions::default()).unwrap();
    let mut started = plain().with_start(loftq.clone(), lora.clone()).unwrap();
    assert_ne!(started.fingerprint(), plain().fingerprint());
    let tokens = started.tokens();
    for config in some_configs(&space, 3).into_iter().chain([space.lowest()]) {
        let plan = space.plan(&config);
        let attacher = LoraAttacher::new(&lora, &model.slot_shapes()).unwrap();
        let calibration = CalibrationConfig::new(loftq.clone(), schemes(&plan).unwrap());
        let calibrator = Calibrator::new(&calibration, &windows).with_adapters(&attacher);
        let (quantized, _) = calibrator.run(model.clone()).unwrap();
        let expected = direct_kl(&model, &quantized, &windows);
        let found = started.kl(&plan, tokens, &mut |_, _| true).unwrap().score;
        assert!(
            (found - expected).abs() <= 1e-4 * expected + 1e-7,
            "{config:?}: {found}, directly {expected}"
        );
        let rounded = plain().kl(&plan, tokens, &mut |_, _| true).unwrap().score;
        assert!(found != rounded || config == space.highest(), "{config:?}: {found}, rounded {rounded}");
    }
    // What was kept of a rounded model isn't what a started one goes on from.
    let plan = space.plan(&space.lowest());
    let mut both = plain();
    let rounded = both.kl(&plan, tokens, &mut |_, _| true).unwrap().score;
    let mut both = both.with_start(loftq.clone(), lora.clone()).unwrap();
    let found = both.kl(&plan, tokens, &mut |_, _| true).unwrap().score;
    assert_eq!(found, started.kl(&plan, tokens, &mut |_, _| true).unwrap().score);
    assert_ne!(found, rounded);
    // A plan's own rank, and kinds of adapters that are not the start's.
    let path = model.slots()[0].0.clone();
    let with = |setting: &str| -> Plan {
        let mut settings: serde_json::Value = serde_json::to_value(&plan).unwrap();
        settings[&path] = setting.into();
        serde_json::from_value(settings).unwrap()
    };
    let ranked = started.kl(&with("affine2:64 rank=32"), tokens, &mut |_, _| true).unwrap().score;
    assert!(ranked != found, "{ranked}");
    let mut error = |plan: &Plan| started.kl(plan, tokens, &mut |_, _| true).unwrap_err().to_string();
    assert!(error(&with("affine2:64 adapter=dora")).contains("adapter lora"));
    let mut more: serde_json::Value = serde_json::to_value(&plan).unwrap();
    more["model.layers.9.mlp.up_proj"] = "affine2:64".into();
    assert!(error(&serde_json::from_value(more).unwrap()).contains("paths of this model"));
    let error = plain().with_start(Method::Gptq(GptqConfig::default()), lora).unwrap_err();
    assert!(error.is_argument() && error.to_string().contains("LoftQ"), "{error}");
    let hira =
        AdapterConfig::new(kiln::adapters::Method::QaHira(kiln::adapters::QaHira::for_tiles(1, 64)), 1, 64.0);
    let error = plain().with_start(loftq, hira).unwrap_err();
    assert!(error.is_argument() && error.to_string().contains("LoRA or DoRA"), "{error}");
}

#[test]
fn plans_are_scored_on_tasks() {
    let (checkpoint, model) = load(EMBEDDED);
    let tokenizer = checkpoint.tokenizer().unwrap();
    let space = space_of(&model, &choices(&["affine2:64", "affine8:64"])).unwrap();
    let letters = || {
        let task = Task::from_file(testdata("eval/letters.json")).unwrap();
        let data = DataFolder::new(testdata("eval")).load(&task, 0).unwrap();
        TaskScore::new(task, data, checkpoint.tokenizer().unwrap()).unwrap()
    };
    let plain =
        || ModelObjective::new(Variants::new(model.clone()), &windows(1, 32), &KlOptions::default()).unwrap();
    let measure = |objective: &mut ModelObjective, amount: u64, seed: u64| {
        let settings = SearchSettings::new(1, Fidelity { measure: Measure::Task, amount });
        let mut log = TrialLog::in_memory(&space);
        let one = One(space.lowest());
        let settings = settings.with_evaluation_seed(seed);
        search(&space, objective, &mut log, &one, &settings).map(|found| found.trials[0].score.unwrap())
    };
    let mut scored = plain().with_task(letters()).unwrap();
    assert_ne!(scored.fingerprint(), plain().fingerprint());
    let quantized = Variants::new(model.clone()).model(&space.plan(&space.lowest())).unwrap();
    let asked = {
        let task = Task::from_file(testdata("eval/letters.json")).unwrap();
        let data = DataFolder::new(testdata("eval")).load(&task, 0).unwrap();
        [(task, data)]
    };
    let mut evaluation = kiln::eval::Evaluation::new().with_shots(0);
    evaluation.limit = Some(60);
    let scorer = ModelScorer::new(&quantized, &tokenizer).unwrap();
    let accuracy = evaluation.evaluate(&scorer, &asked).unwrap().tasks[0].metrics[0].value;
    assert_eq!(measure(&mut scored, 60, 0).unwrap(), 1.0 - accuracy);
    assert_eq!(measure(&mut scored, 60, 1).unwrap(), 1.0 - accuracy, "nothing is drawn");
    let most = Fidelity { measure: Measure::Task, amount: 1000 };
    assert_eq!(scored.rounded(most).amount, 86, "there are no more");
    assert!(measure(&mut plain(), 60, 0).unwrap_err().to_string().contains("a task where one is set"));

    let error = plain().with_task(letters().with_steps(2)).unwrap_err();
    assert!(error.is_argument() && error.to_string().contains("fine-tune"), "{error}");
    let rows: Vec<u32> = text("shift_test_moby")[..2048].to_vec();
    let data = Arc::new(Dataset::from_ids(rows, &DataOptions::new(64, model.vocab_size())).unwrap());
    let held_out = text("shift_test_moby")[8192..8704].to_vec();
    let tuning = FineTune::new(data, held_out, 64, trainer(), AdapterConfig::lora(4, 8.0)).unwrap();
    let mut tuned = plain().with_fine_tune(tuning).with_task(letters().with_steps(4)).unwrap();
    let found = measure(&mut tuned, 60, 0).unwrap();
    assert_eq!(found, measure(&mut tuned, 60, 0).unwrap());
    assert!((0.0..=1.0).contains(&found));
}

/// Measures one plan.
struct One(Config);

impl kiln::mixq_search::SearchMethod for One {
    fn name(&self) -> &'static str {
        "one"
    }

    fn run(&self, session: &mut kiln::mixq_search::Session<'_>) -> kiln::mixq_search::Result<()> {
        session.evaluate(std::slice::from_ref(&self.0)).map(|_| ())
    }
}

#[test]
fn proxies_rank_bits() {
    let (_, model) = load(EMBEDDED);
    let space = space_of(&model, &choices(&["affine2:64", "affine4:64", "dense"])).unwrap();
    let mut objective =
        ModelObjective::new(Variants::new(model), &windows(2, 32), &KlOptions::default()).unwrap();
    for measure in [Measure::ActivationError, Measure::Fisher] {
        let mut log = TrialLog::in_memory(&space);
        let settings = SearchSettings::new(3, Fidelity { measure, amount: 64 });
        let method = kiln::mixq_search::Uniform;
        let found = search(&space, &mut objective, &mut log, &method, &settings).unwrap();
        let scores: Vec<f64> = found.front.points.iter().map(|point| point.score).collect();
        assert_eq!(scores.len(), 3, "{measure:?}: {scores:?}");
        assert!(scores[0] > 10.0 * scores[1] && scores[2] == 0.0, "{measure:?}: {scores:?}");
    }
}

/// Peak resident memory of two LoRA steps on a plan's model, and the prediction on the axis that a search limits. A
/// pruned model keeps its first block whole.
#[cfg(target_os = "linux")]
fn training_peak(recompute: Recompute, pruned: bool) -> (f64, f64) {
    let step = Step { batch: 4, seq_len: 512, recompute, logit_rows: 256, halves: Halves::None };
    let (checkpoint, model) = load(EMBEDDED);
    let folder = tempfile::tempdir().unwrap();
    let model = match pruned {
        false => model,
        true => {
            let mut pruning = BlockPruning::new(Criterion::L2, 0.625);
            (pruning.round_to, pruning.protected) = (8, vec![0]);
            let pruned = pruning.prune(model, None, &CutOptions::default()).unwrap();
            let record = PruningRecord::new(checkpoint.config().clone(), &pruning, &pruned.report).unwrap();
            save_pruned(&pruned.model, &record, &checkpoint, &SaveFormat::AsIs, folder.path()).unwrap();
            pruned.model
        }
    };
    let shape = TrainingShape { rank: 16, step, process: ProcessConstants::CPU };
    let choices = choices(&["affine2:64", "affine4:64", "affine8:64"]).with_training(shape, MemoryAxis::Peak);
    let space = space_of(&model, &choices).unwrap();
    drop(model);
    let config = some_configs(&space, 1)[0].clone();
    let plan = space.plan(&config);
    assert_eq!(space.bytes(&config), space.report(&config).peak);
    let options = load_options(&plan).unwrap().in_f32();
    let model = match pruned {
        false => checkpoint.load(&options, &Device::flex()).unwrap().0,
        true => load_pruned(folder.path(), &options, &Device::flex()).unwrap().0,
    };
    drop(checkpoint);
    let config = adapters(&plan, &AdapterConfig::lora(16, 16.0));
    let model = Tuned::attach(model, &config).unwrap().into_model();
    let ids = (0..8192u32).map(|i| i * 31 % 2048).collect();
    let dataset = Arc::new(Dataset::from_ids(ids, &DataOptions::new(512, 2048)).unwrap());
    let mut training = TrainerConfig::new(2, BatchOptions::new(4));
    training.recompute = recompute;
    let mut trainer = Trainer::new(model, dataset, training).unwrap();
    trainer.step().unwrap();
    trainer.step().unwrap();
    (peak(), space.report(&space.config(&plan).unwrap()).peak as f64)
}

#[test]
#[cfg(target_os = "linux")]
fn the_predicted_training_peak_is_measured() {
    let test = "mixq::the_predicted_training_peak_is_measured";
    if let Some(task) = task() {
        let recompute = if task.contains("block") { Recompute::Block } else { Recompute::None };
        let (measured, predicted) = training_peak(recompute, task.contains("pruned"));
        return report(&[measured, predicted]);
    }
    for task in ["none", "pruned none", "pruned block"] {
        let figures = figures_of(test, task);
        println!("{task}: measured {:.1} MB, predicted {:.1} MB", figures[0] / 1e6, figures[1] / 1e6);
        assert!((figures[1] / figures[0] - 1.0).abs() < 0.15, "{task}: {figures:?}");
    }
}

fn half_of_the_heads() -> BlockPruning {
    let mut pruning = BlockPruning::new(Criterion::L2, 0.0);
    pruning.round_to = 64;
    pruning
}

/// Plans over everything that a space with ratios may choose, and the model that each stands for, by other ways.
#[test]
fn pruning_ratios_are_searched_beside_formats() {
    let (_, model) = load(EMBEDDED);
    let windows = windows(2, 48);
    let ratios = [0.5, 0.25];
    let prunings = || Prunings::new(&model, &half_of_the_heads(), ratios, None).unwrap();
    assert_eq!(prunings().ratios().collect::<Vec<_>>(), [0.0, 0.25, 0.5]);
    let choices =
        choices(&["affine2:64", "affine4:64"]).with_granularity(Granularity::Block).with_prunings(prunings());
    let space = space_of(&model, &choices).unwrap();
    // A fourth of two key heads is none, which is no choice of its own; outer blocks lose nothing.
    let counts: Vec<usize> = (0..space.units().len()).map(|unit| space.choices(unit)).collect();
    assert_eq!(counts, [2, 2, 4, 6, 4, 6, 2, 2]);

    let original = model.clone();
    let mut variants = Variants::new(model.clone()).with_prunings(prunings()).unwrap();
    let objective = || {
        let variants = Variants::new(model.clone()).with_prunings(prunings()).unwrap();
        ModelObjective::new(variants, &windows, &KlOptions::default()).unwrap()
    };
    let (loftq, lora) = (Method::Loftq(LoftqConfig::default()), AdapterConfig::lora(8, 8.0));
    let mut measured = objective();
    let mut started = objective().with_start(loftq.clone(), lora.clone()).unwrap();
    let tokens = measured.tokens();
    for config in some_configs(&space, 5) {
        let plan = space.plan(&config);
        let text: BTreeMap<&str, String> =
            plan.iter().map(|(path, setting)| (path, setting.to_string())).collect();
        // Pruned group by group, then quantized linear by linear.
        let mut pruning = half_of_the_heads();
        let mut schemes = kiln::quant::Plan::uniform(Scheme::Dense);
        for (path, setting) in plan.iter() {
            let group = Granularity::Block.unit(path);
            pruning.ratio = pruning.ratio.with_path(group, setting.prune.unwrap_or(0.0));
            schemes = schemes.with_path(path, scheme(&setting.scheme));
        }
        let cut = pruning.prune(model.clone(), None, &CutOptions::default()).unwrap().model;
        let calibrated = |method: Method| {
            let mut config = CalibrationConfig::new(method, schemes.clone());
            config.measured_windows = 0;
            let attacher = LoraAttacher::new(&lora, &cut.slot_shapes()).unwrap();
            Calibrator::new(&config, &windows).with_adapters(&attacher).run(cut.clone()).unwrap().0
        };
        let quantized = variants.model(&plan).unwrap();
        let expected = calibrated(Method::Rtn(Rounding::MinMax));
        let ids = TokenBatch::new(&[text_of(&windows)]).unwrap();
        let logits = |model: &dyn Fn() -> Tensor<3>| read(model());
        assert_eq!(
            logits(&|| quantized.forward(&quantized.context(&ids, None).unwrap())),
            logits(&|| expected.forward(&expected.context(&ids, None).unwrap())),
            "{text:?}"
        );
        assert_eq!(quantized.stored_bytes() as u64, space.bytes(&config), "{text:?}");
        for (objective, model) in
            [(&mut measured, expected), (&mut started, calibrated(Method::Loftq(LoftqConfig::default())))]
        {
            let found = objective.kl(&plan, tokens, &mut |_, _| true).unwrap().score;
            let expected = direct_kl(&original, &model, &windows);
            assert!((found - expected).abs() <= 1e-4 * expected + 1e-7, "{found}, directly {expected}");
        }
        let (again, plain) = prunings().apply(&plan).unwrap();
        assert_eq!(again.config(), cut.config());
        assert!(load_options(&plain).is_ok() && load_options(&plan).is_err());
    }
    assert_ne!(measured.fingerprint(), started.fingerprint());
    let without = ModelObjective::new(Variants::new(model.clone()), &windows, &KlOptions::default()).unwrap();
    assert_ne!(measured.fingerprint(), without.fingerprint());

    // A search over all of it finds plans that a search for bits alone can't.
    let mut log = TrialLog::in_memory(&space);
    let settings = SearchSettings::new(60, Fidelity::kl(tokens));
    let found = search(&space, &mut measured, &mut log, &KlMix::default(), &settings).unwrap();
    let pruned = |plan: &Plan| plan.iter().any(|(_, setting)| setting.prune.is_some_and(|ratio| ratio > 0.0));
    assert!(found.front.points.iter().any(|point| pruned(&point.plan)), "{:?}", found.front);
}

fn text_of(windows: &Windows) -> Vec<u32> {
    windows.as_slice()[0].clone()
}

fn everywhere() -> BlockPruning {
    BlockPruning { round_to: 1, layers: LayerRange::All, ..half_of_the_heads() }
}

#[test]
fn biases_and_experts_are_counted_as_they_are_cut() {
    for folder in ["tiny/qwen2-tied-f32", "arch/mixtral"] {
        let (_, model) = load(folder);
        let prunings = Prunings::new(&model, &everywhere(), [0.25, 0.5], None).unwrap();
        let choices = choices(&["affine2:8", "affine4:8"]).with_prunings(prunings.clone());
        let space = space_of(&model, &choices).unwrap();
        let mut variants = Variants::new(model).with_prunings(prunings).unwrap();
        let mut pruned = 0;
        for config in some_configs(&space, 8) {
            let plan = space.plan(&config);
            let found = variants.model(&plan).unwrap();
            assert_eq!(found.stored_bytes() as u64, space.bytes(&config), "{folder}: {plan:?}");
            pruned += usize::from(found.config().parameters() < variants.original().config().parameters());
        }
        assert!(pruned > 3, "{folder}: {pruned}");
    }
}

#[test]
fn ratios_that_cannot_be_searched_say_why() {
    let (_, model) = load(EMBEDDED);
    let refused = |pruning: &BlockPruning, ratios: &[f64]| {
        Prunings::new(&model, pruning, ratios.iter().copied(), None).unwrap_err().to_string()
    };
    assert!(refused(&half_of_the_heads(), &[1.0]).contains("not, 1"));
    assert!(refused(&half_of_the_heads(), &[f64::NAN]).contains("not, 1"));
    for change in [
        (|pruning: &mut BlockPruning| pruning.steps = 2) as fn(&mut BlockPruning),
        |pruning| pruning.bias_compensation = true,
        |pruning| pruning.rerun = true,
    ] {
        let mut pruning = half_of_the_heads();
        change(&mut pruning);
        assert!(refused(&pruning, &[0.5]).contains("one step"), "{pruning:?}");
    }
    // Sinks go with heads.
    let sinks = load("arch/gpt_oss").1;
    let error = Prunings::new(&sinks, &everywhere(), [0.5], None).unwrap_err().to_string();
    assert!(error.contains("linears alone"), "{error}");
    let prunings = Prunings::new(&model, &half_of_the_heads(), [0.5], None).unwrap();
    let space = |choices: Choices| space_of(&model, &choices.with_prunings(prunings.clone()));
    let four = || choices(&["affine4:64"]);
    for granularity in [Granularity::Projection, Granularity::Kind] {
        let error = space(four().with_granularity(granularity)).unwrap_err().to_string();
        assert!(error.contains("granularity"), "{error}");
    }
    let mut frozen = four();
    frozen.frozen = vec![(r".*\.v_proj".parse().unwrap(), scheme("affine8:64"))];
    assert!(space(frozen).unwrap_err().to_string().contains("frozen"));
    let layers = space(four()).unwrap();
    let plan = layers.plan(&layers.lowest());
    let path = model.slots()[7].0.clone();
    let with = |ratio: f64, changes: &dyn Fn(&str) -> bool| {
        let plan =
            plan.map(|path, old| if changes(path) { old.clone().with_prune(ratio) } else { old.clone() });
        prunings.apply(&plan).unwrap_err().to_string()
    };
    assert!(with(0.3, &|_| true).contains("0, 0.5"), "{}", with(0.3, &|_| true));
    let one = with(0.0, &|at| at == path);
    assert!(one.contains("the pruning ratio of"), "{one}");
    let other = load("tiny/qwen2-tied-f32").1;
    let error = Variants::new(other).with_prunings(prunings.clone()).unwrap_err().to_string();
    assert!(error.contains("prunings"), "{error}");
    // Errors of activations and of squared gradients compare weights of one shape.
    let mut objective = ModelObjective::new(
        Variants::new(model.clone()).with_prunings(prunings.clone()).unwrap(),
        &windows(1, 16),
        &KlOptions::default(),
    )
    .unwrap();
    let fidelity = Fidelity { measure: Measure::Fisher, amount: 16 };
    let config = layers.lowest();
    let request = Request::new(&config, &plan, fidelity, 0);
    let error = objective.evaluate(&request, &mut |_, _| true).unwrap_err().to_string();
    assert!(error.contains("pruning ratio"), "{error}");
}
