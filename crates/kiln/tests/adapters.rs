//! Adapters of every kind on whole models: trained, merged, saved, loaded, against PEFT where PEFT has them.

use std::{convert::Infallible, sync::Arc};

use burn::{
    module::Module,
    tensor::{Device, Tensor, TensorData, activation::log_softmax},
};
use kiln::{
    Tuned,
    adapters::{
        Adapted, AdapterConfig, AnyAdapter, InitLoraWeights, Method, Pooling, QBara, QaBlora, QaHira, QaLora,
    },
    models::{CausalLm, Checkpoint, Decoder, LoadOptions, Slots, TokenBatch},
    quant::{MinMax, PackedWeight, Plan, Projection, QuantLinear},
    training::{BatchOptions, DataOptions, Dataset, RunOptions, ScheduleKind, Trainer, TrainerConfig},
};
use kiln_testkit::{Golden, assert_close, ids, read, relative_difference, testdata};

/// The references are f32 arithmetic on the stored weights.
const TOLERANCE: f32 = 1e-4;

fn logits<M: CausalLm>(model: &M, ids: &[u32]) -> Tensor<2> {
    model.forward(&model.context(&TokenBatch::new(&[ids.to_vec()]).unwrap(), None).unwrap()).squeeze_dim(0)
}

fn load(path: &str, scheme: Option<&str>) -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(path)).unwrap();
    let options = match scheme {
        Some(scheme) => LoadOptions::uniform(scheme.parse().unwrap()).in_f32(),
        None => LoadOptions::default().in_f32(),
    };
    checkpoint.load(&options, &Device::flex()).unwrap().0
}

#[test]
fn logits_and_gradients_of_a_dora_adapter_equal_peft() {
    let golden = Golden::open("peft/tiny-dora-r4/golden.safetensors");
    let base = load("tiny/llama-untied-bf16", None);
    let tuned = Tuned::load(base, testdata("peft/tiny-dora-r4")).unwrap();
    assert_eq!(tuned.config().method, Method::dora());
    let trained = tuned.model().clone().train();
    let ids: Vec<u32> = golden.ints("p0.ids").into_iter().map(|id| id as u32).collect();
    let found = logits(&trained, &ids);
    assert_close("logits", &read(found.clone()), &golden.floats("p0.logits"), TOLERANCE);
    let targets: Vec<i64> = ids[1..].iter().map(|&id| id.into()).collect();
    let count = targets.len();
    let targets = Tensor::from_data(TensorData::new(targets, [count, 1]), &Device::flex());
    let loss = log_softmax(found.narrow(0, 0, count), 1).gather(1, targets).mean().neg();
    assert_close("loss", &read::<1>(loss.clone()), &golden.floats("p0.loss"), 1e-5);
    let gradients = loss.backward();
    let mut seen = 0;
    for (path, slot) in trained.slots() {
        let Some(AnyAdapter::Dora(dora)) = &slot.adapter else { continue };
        let mut check = |part: &str, found: Vec<f32>| {
            let name = format!("p0.grad.base_model.model.{path}.lora_{part}.default.weight");
            assert_close(&name, &found, &golden.floats(&name), TOLERANCE);
            seen += 1;
        };
        check("A", read(dora.lora_a.grad(&gradients).unwrap().transpose()));
        check("B", read(dora.lora_b.grad(&gradients).unwrap().transpose()));
        check("magnitude_vector", read(dora.magnitude.grad(&gradients).unwrap()));
    }
    assert_eq!(seen, golden.names().filter(|name| name.starts_with("p0.grad.")).count());
    let last = logits(&tuned.merge_dense(), &ids).narrow(0, ids.len() - 1, 1);
    let mut top = read(last);
    top.sort_by(|a, b| b.total_cmp(a));
    let name = "p0.merged_logits_last_top";
    assert_close(name, &top[..16], &golden.floats(name), TOLERANCE);
}

const EMBEDDED: &str = "models/tiny-llama";

fn lora() -> AdapterConfig {
    AdapterConfig::lora(4, 8.0).with_seed(1)
}

type TunedModel = Tuned<Decoder<QuantLinear>>;

/// A few steps on two rows of the embedded model's shifted text, dropout included.
fn train(tuned: TunedModel, steps: u64) -> (TunedModel, Vec<f64>) {
    let (model, adapters) = tuned.into_parts();
    let ids: Vec<u32> = ids("shift_test_moby").into_iter().take(128).collect();
    let data = Dataset::from_ids(ids, &DataOptions::new(64, model.vocab_size())).unwrap();
    let mut config = TrainerConfig::new(steps, BatchOptions::new(2));
    (config.lr, config.warmup, config.schedule) = (3e-3, 0, ScheduleKind::Constant);
    let mut trainer = Trainer::new(model, Arc::new(data), config).unwrap();
    let reports = trainer.run(&RunOptions::new()).unwrap().steps;
    let tuned = Tuned::from_parts(trainer.into_model(), adapters);
    (tuned, reports.iter().map(|report| report.loss).collect())
}

fn packed(model: &Decoder<QuantLinear>) -> Vec<PackedWeight> {
    let mut weights = Vec::new();
    for (path, slot) in model.slots() {
        match slot {
            QuantLinear::Packed(linear) => weights.push(linear.weight.to_host().unwrap()),
            QuantLinear::Dense(_) => panic!("{path} is dense"),
        }
    }
    weights
}

fn prompt() -> Vec<u32> {
    (0..48).map(|i| i * 37 % 2048).collect()
}

/// The bound on exact merges, after training that moved the logits.
#[test]
fn trained_adapters_merge_into_packed_models_without_a_changed_code() {
    let hira = |pool, repeat| Method::QaHira(QaHira::for_tiles(repeat, pool));
    for (scheme, method) in [
        ("affine4:64", hira(64, 1)),
        ("affine3:32:f16", hira(64, 2)),
        ("affine2:8x4", hira(4, 8)),
        ("affine4:32:int", Method::QaLora(QaLora { pool: 32, pooling: Pooling::Sum })),
        ("affine4:8x4:sym", Method::QaBlora(QaBlora { pool: 4, repeat: 8, rank: None })),
        ("affine4:2x2", Method::QBara(QBara { lambda: 2 })),
    ] {
        let base = load(EMBEDDED, Some(scheme));
        let (before, base_logits) = (packed(&base), read(logits(&base, &prompt())));
        let mut config = lora().with_method(method).with_dropout(0.05);
        if let Method::QaHira(QaHira { pool, .. }) = method {
            // So that the weight moves by half the rate.
            config.alpha = 2.0 * pool as f64;
        }
        let tuned = Tuned::attach(base, &config).unwrap();
        assert_eq!(
            read(logits(tuned.model(), &prompt())),
            base_logits,
            "{scheme}: training starts at the base"
        );
        let (tuned, losses) = train(tuned, 6);
        assert!(losses[5] < losses[0] - 0.05, "{scheme}: {losses:?}");
        let adapted = read(logits(tuned.model(), &prompt()));
        let merged_model = tuned.merge_packed().unwrap();
        let merged = read(logits(&merged_model, &prompt()));
        let moved = relative_difference(&adapted, &base_logits);
        let norm = |values: &[f32]| values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let lost = relative_difference(&merged, &adapted) * norm(&adapted) / (moved * norm(&base_logits));
        assert!(moved >= 0.01, "{scheme}: moved {moved}");
        assert!(lost <= 1e-3, "{scheme}: lost {lost}");
        println!("{scheme} {}: logits moved by {moved:.3}, {lost:.1e} of it lost", method.name());
        for (before, after) in before.iter().zip(packed(&merged_model)) {
            assert_eq!(before.codes, after.codes, "{scheme}");
            assert_eq!(before.effective_scales(), after.effective_scales(), "{scheme}");
        }
    }
}

#[test]
fn a_model_that_can_not_take_its_adapters_says_what_would_fit() {
    let config = lora().with_method(Method::QBara(QBara { lambda: 2 }));
    let tuned = Tuned::attach(load(EMBEDDED, Some("affine4:64")), &config).unwrap();
    let error = tuned.merge_packed().unwrap_err();
    assert!(error.is_argument());
    let error = error.to_string();
    let expected = "model.layers.0.self_attn.q_proj.pool: expected a multiple of the 64 inputs of the blocks of \
                    affine4:64 that divides 192: 64, 192, found 2";
    assert_eq!(error, expected);
}

#[test]
fn folders_of_every_method_load_onto_their_base_only() {
    let of = |method| lora().with_method(method);
    for config in [
        lora(),
        of(Method::dora()),
        of(Method::Lora { init: InitLoraWeights::Olora }),
        of(Method::QBara(QBara { lambda: 4 })),
        of(Method::QaLora(QaLora { pool: 64, pooling: Pooling::Average })),
        of(Method::QaHira(QaHira::for_groups(64))),
    ] {
        let base = load(EMBEDDED, Some("affine4:64"));
        let (tuned, _) = train(Tuned::attach(base.clone(), &config).unwrap(), 2);
        let expected = read(logits(tuned.model(), &prompt()));
        let folder = tempfile::tempdir().unwrap();
        tuned.save(&folder).unwrap();
        let loaded = Tuned::load(base.clone(), &folder).unwrap();
        assert_eq!(read(logits(loaded.model(), &prompt())), expected, "{config:?}");
        let error = Tuned::load(load(EMBEDDED, Some("affine4:32")), &folder).unwrap_err();
        assert!(error.is_file() && error.to_string().contains("base_fingerprint"), "{error}");
        let folder = tempfile::tempdir().unwrap();
        if config.to_peft().is_ok() {
            tuned.save_peft(&folder).unwrap();
            let loaded = Tuned::load(base, &folder).unwrap();
            let found = read(logits(loaded.model(), &prompt()));
            assert!(relative_difference(&found, &expected) < 1e-6, "{config:?}");
        } else {
            assert!(tuned.save_peft(&folder).is_err());
        }
    }
}

#[test]
fn adapters_of_one_model_are_switched_and_mixed() {
    let base = load(EMBEDDED, Some("affine4:64"));
    let base_logits = read(logits(&base, &prompt()));
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let hira = lora().with_method(Method::QaHira(QaHira::for_groups(64)));
    let mut alone = Vec::new();
    for (config, folder) in [lora(), hira].iter().zip(&folders) {
        let (tuned, _) = train(Tuned::attach(base.clone(), config).unwrap(), 2);
        alone.push(read(logits(tuned.model(), &prompt())));
        tuned.save(folder).unwrap();
    }
    let named = [("lora", folders[0].path()), ("hira", folders[1].path())];
    let (model, mix) = kiln::load_adapter_set(base, &named).unwrap();
    assert_eq!(read(logits(&model, &prompt())), base_logits);
    for (name, expected) in ["lora", "hira"].iter().zip(&alone) {
        mix.select(name).unwrap();
        assert_eq!(&read(logits(&model, &prompt())), expected, "{name}");
    }
    mix.set(&[("lora", 0.5), ("hira", 0.5)]).unwrap();
    let mixed = read(logits(&model, &prompt()));
    assert!(alone.iter().all(|other| relative_difference(&mixed, other) > 1e-4));
    let other = load(EMBEDDED, Some("affine4:32"));
    assert!(kiln::load_adapter_set(other, &named).unwrap_err().to_string().contains("base_fingerprint"));
}

#[test]
fn requantizing_a_model_reports_every_linear() {
    let base = load(EMBEDDED, Some("affine4:64"));
    let (tuned, _) = train(Tuned::attach(base, &lora()).unwrap(), 2);
    let slots = tuned.model().slot_shapes().len();
    let dense = tuned.clone().merge_dense();
    let schemes = Plan::uniform("affine4:64".parse().unwrap());
    let (requantized, errors) = tuned.requantize(&schemes, &MinMax).unwrap();
    assert_eq!(errors.len(), slots);
    assert!(errors.iter().all(|(_, error)| error.weight.relative > 0.0 && error.output.is_none()));
    assert_eq!(packed(&requantized).len(), slots);
    for (path, slot) in dense.slots() {
        assert!(matches!(slot, QuantLinear::Dense(_)), "{path}");
    }
    for ((path, slot), ((dense_path, dense), (error_path, error))) in
        requantized.slots().into_iter().zip(dense.slots().into_iter().zip(&errors))
    {
        assert_eq!([&dense_path, error_path], [&path; 2]);
        let relative = relative_difference(&read(slot.weight()), &read(dense.weight()));
        assert!((relative / error.weight.relative - 1.0).abs() < 1e-4, "{path}");
    }
    let bare = load(EMBEDDED, Some("affine4:64"))
        .try_map(|_, base| Ok::<_, Infallible>(Adapted::<_, AnyAdapter>::new(base, None)))
        .unwrap();
    let none = TunedModel::from_parts(bare, lora()).requantize(&schemes, &MinMax);
    assert!(none.unwrap().1.is_empty());
}
