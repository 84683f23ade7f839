//! Score heads: against transformers and PEFT, and trained.

use std::{collections::BTreeMap, sync::Arc};

use burn::{module::Module, optim::GradientsAccumulator, tensor::Device};
use kiln::{
    Base, Tuned,
    adapters::AdapterConfig,
    models::{
        Checkpoint, Classifier, Decoder, DriverOptions, LoadOptions, Objective, Recompute, Targets,
        TokenBatch,
        export::{ExportOptions, FloatType, export_hf_classifier, save_classifier},
        loss_and_gradients,
    },
    quant::{Compute, QuantLinear, safetensors_file::SafetensorsFile},
    training::{BatchOptions, Dataset, Form, RunOptions, TokenLoss, Trainer, TrainerConfig, predict},
};
use kiln_testkit::{Golden, assert_close, read, testdata};

use crate::gradients::{self, transposed_from};

type Model = Classifier<Decoder<QuantLinear>>;

fn model(labels: usize) -> Model {
    let checkpoint = Checkpoint::open(testdata("arch/gemma2")).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    Classifier::new(model, labels, 3).unwrap()
}

#[test]
fn scores_losses_and_gradients_are_those_of_transformers_and_peft() {
    for (name, labels) in [("classes", 3), ("number", 1)] {
        let folder = testdata(&format!("peft/classifiers/{name}"));
        let golden = Golden::open(&format!("peft/classifiers/{name}/golden.safetensors"));
        let tuned = Tuned::<Model>::load(model(labels), &folder).unwrap();
        let ids: Vec<u32> = golden.ints("input_ids").into_iter().map(|id| id as u32).collect();
        let lengths: Vec<usize> = golden.ints("lengths").into_iter().map(|length| length as usize).collect();
        let values = golden.floats("values");
        let mask = lengths.iter().flat_map(|length| (0..12).map(move |place| u32::from(place < *length)));
        let tokens = TokenBatch::masked(ids, mask.collect(), 3, 12).unwrap();
        let scores = read(tuned.model().scores(&tokens).unwrap());
        assert_close(name, &scores, &golden.floats("scores"), 1e-5);

        let last = |place: usize| place % 12 + 1 == lengths[place / 12];
        let scored: Vec<bool> = (0..36).map(last).collect();
        let classes: Vec<u32> = (0..36).map(|place| values[place / 12].max(0.0) as u32).collect();
        let numbers: Vec<f32> = (0..36).map(|place| values[place / 12]).collect();
        let trained = tuned.model().clone().train();
        for recompute in [Recompute::None, Recompute::Block] {
            let options = DriverOptions { recompute, logit_rows: 2, ..DriverOptions::default() };
            let mut sums = GradientsAccumulator::new();
            let targets = Targets { ids: &classes, scored: &scored };
            let objective = Objective { numbers: (labels == 1).then_some(&numbers), ..targets.into() };
            let loss = loss_and_gradients(&trained, &tokens, objective, &options, &mut sums).unwrap() / 3.0;
            assert_close(name, &[loss as f32], &golden.floats("loss"), 1e-5);
            let found = gradients::of(&trained, &sums.grads());
            assert_eq!(found.len(), golden.names().filter(|name| name.starts_with("grad.")).count());
            for (path, (shape, values)) in found {
                let values: Vec<f32> = values.iter().map(|value| value / 3.0).collect();
                let module = path.trim_start_matches("model.").trim_end_matches(".weight");
                let peft = match module {
                    "score" => "score.modules_to_save.default.weight".to_owned(),
                    other => {
                        let (module, factor) = other.rsplit_once(".adapter.lora_").unwrap();
                        format!("model.{module}.lora_{}.default.weight", factor.to_uppercase())
                    }
                };
                let name = format!("grad.base_model.model.{peft}");
                assert_close(&name, &transposed_from(&shape, &values), &golden.floats(&name), 1e-5);
            }
        }

        // Saved again, with the same tensors.
        let again = tempfile::tempdir().unwrap();
        let again = again.path().join("adapter");
        tuned.save_peft(&again).unwrap();
        let tensors = |folder: &std::path::Path| {
            let file = SafetensorsFile::open(folder.join("adapter_model.safetensors")).unwrap();
            let names: Vec<String> = file.names().map(str::to_owned).collect();
            names
                .into_iter()
                .map(|name| (name.clone(), file.read_f32(&name).unwrap()))
                .collect::<BTreeMap<_, _>>()
        };
        assert!(tensors(&again) == tensors(&folder), "{name}");
        assert_eq!(tuned.config().metadata.task_type.as_deref(), Some("SEQ_CLS"));
    }
}

/// A folder as transformers writes a classifier: the language model of testdata under the class's name, and `score`.
fn written_classifier(folder: &std::path::Path, class: &str, score: Option<(Vec<usize>, Vec<u8>)>) {
    use safetensors::{Dtype, SafeTensors, tensor::TensorView};
    let from = testdata("arch/gemma2");
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["architectures"] = serde_json::json!([class]);
    config["id2label"] = serde_json::json!({"0": "a", "1": "b", "2": "c"});
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
    let mut tensors = SafeTensors::deserialize(&bytes).unwrap().tensors();
    if let Some((shape, values)) = &score {
        tensors.push(("score.weight".into(), TensorView::new(Dtype::F32, shape.clone(), values).unwrap()));
    }
    safetensors::serialize_to_file(tensors, None, &folder.join("model.safetensors")).unwrap();
}

#[test]
fn classifiers_of_transformers_are_read_with_their_heads() {
    let load = |folder: &std::path::Path| {
        Checkpoint::open(folder).unwrap().load_classifier(&LoadOptions::default().in_f32(), &Device::flex())
    };
    for (name, labels) in [("classes", 3), ("number", 1)] {
        // The head that PEFT saved stands in the folder, and the adapter beside it has factors only.
        let peft = testdata(&format!("peft/classifiers/{name}"));
        let file = SafetensorsFile::open(peft.join("adapter_model.safetensors")).unwrap();
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let (heads, factors): (Vec<String>, Vec<String>) =
            names.into_iter().partition(|name| name.contains("score"));
        let [head] = heads.as_slice() else { panic!("{heads:?}") };
        let bytes = |name: &str| -> (Vec<usize>, Vec<u8>) {
            let (shape, values) = file.read_f32(name).unwrap();
            (shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        };
        let (folder, adapter) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        written_classifier(folder.path(), "Gemma2ForSequenceClassification", Some(bytes(head)));
        let config = std::fs::read_to_string(peft.join("adapter_config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
        config["modules_to_save"] = serde_json::Value::Null;
        std::fs::write(adapter.path().join("adapter_config.json"), config.to_string()).unwrap();
        let factors: Vec<_> = factors.into_iter().map(|name| (bytes(&name), name)).collect();
        let views = factors.iter().map(|((shape, bytes), name)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            (name.as_str(), view.unwrap())
        });
        safetensors::serialize_to_file(views, None, &adapter.path().join("adapter_model.safetensors"))
            .unwrap();

        let (model, report) = load(folder.path()).unwrap();
        assert_eq!((model.outputs(), report.notes.as_slice()), (labels, &[][..]));
        let tuned = Tuned::<Model>::load(model, adapter.path()).unwrap();
        let golden = Golden::open(&format!("peft/classifiers/{name}/golden.safetensors"));
        let ids: Vec<u32> = golden.ints("input_ids").into_iter().map(|id| id as u32).collect();
        let lengths = golden.ints("lengths");
        let mask = lengths.iter().flat_map(|length| (0..12).map(move |place| u32::from(place < *length)));
        let tokens = TokenBatch::masked(ids, mask.collect(), 3, 12).unwrap();
        assert_close(name, &read(tuned.model().scores(&tokens).unwrap()), &golden.floats("scores"), 1e-5);

        // Merged and written whole, it says the same.
        let open = Checkpoint::open(folder.path()).unwrap();
        let merged = tuned.clone().merge_dense();
        for again in written(&merged, &["kind", "cruel", "neither"].map(str::to_owned)[..labels], &open) {
            assert_eq!(again.0, &["kind", "cruel", "neither"][..labels], "{name}");
            let scores = read(again.1.scores(&tokens).unwrap());
            assert_close(name, &scores, &golden.floats("scores"), 1e-5);
        }

        // As a language model it has no head, and says so.
        assert_eq!(open.classifier(), Some("Gemma2ForSequenceClassification"));
        let refused = open.load(&LoadOptions::default(), &Device::flex()).unwrap_err().to_string();
        assert!(refused.contains("Gemma2ForSequenceClassification") && refused.contains("load_classifier"));
    }
    let refused = load(&testdata("arch/gemma2")).unwrap_err().to_string();
    assert!(
        refused.contains("Gemma2ForCausalLM") && refused.contains("sequence classification"),
        "{refused}"
    );
    let folder = tempfile::tempdir().unwrap();
    for (score, part) in [
        (None, "score.weight"),
        (Some((vec![3, 5], vec![0; 60])), "shape"),
        (Some((vec![0, 32], vec![])), "shape"),
        (Some((vec![2], vec![0; 8])), "shape"),
    ] {
        written_classifier(folder.path(), "Gemma2ForSequenceClassification", score);
        let refused = load(folder.path()).unwrap_err().to_string();
        assert!(refused.contains("score.weight") && refused.contains(part), "{refused}");
    }
    written_classifier(folder.path(), "GemmaXForSequenceClassification", None);
    let refused = Checkpoint::open(folder.path()).unwrap_err().to_string();
    assert!(refused.contains("GemmaXForSequenceClassification") && refused.contains("nearest"), "{refused}");
}

/// A classifier as the two kinds of folders keep it: the names of its outputs, and itself.
fn written(model: &Model, labels: &[String], source: &Checkpoint) -> [(Vec<String>, Model); 2] {
    let folder = tempfile::tempdir().unwrap();
    let [dense, own] = ["dense", "own"].map(|name| folder.path().join(name));
    export_hf_classifier(model, labels, source, &dense, &ExportOptions::new(FloatType::F32)).unwrap();
    save_classifier(model, labels, source, &own).unwrap();
    [dense, own].map(|folder| {
        let open = Checkpoint::open(folder).unwrap();
        let (model, report) =
            open.load_classifier(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        assert_eq!(report.notes.as_slice(), &[] as &[String]);
        (open.labels().to_vec(), model)
    })
}

#[test]
fn classifiers_of_all_families_are_written_and_read() {
    let folders = std::fs::read_dir(testdata("arch")).unwrap().map(|entry| entry.unwrap().path());
    let folders: Vec<_> = folders.filter(|path| path.join("config.json").is_file()).collect();
    assert!(folders.len() > 40, "{folders:?}");
    for folder in folders {
        let source = Checkpoint::open(&folder).unwrap();
        let (model, _) = source.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
        let classifier = Classifier::new(model, 2, 3).unwrap();
        let tokens = TokenBatch::new(&[vec![5, 7, 9, 11], vec![8, 6, 4, 2]]).unwrap();
        let expected = read(classifier.scores(&tokens).unwrap());
        for (labels, again) in written(&classifier, &[], &source) {
            assert_eq!(labels, ["LABEL_0", "LABEL_1"]);
            assert_eq!(read(again.scores(&tokens).unwrap()), expected, "{}", folder.display());
        }
    }
}

#[test]
fn names_of_outputs_are_as_many_and_different() {
    let (model, source) = (model(2), Checkpoint::open(testdata("arch/gemma2")).unwrap());
    let folder = tempfile::tempdir().unwrap();
    for labels in [&["a"][..], &["a", "a"], &["a", "b", "c"]] {
        let labels: Vec<String> = labels.iter().map(|label| (*label).to_owned()).collect();
        let refused = save_classifier(&model, &labels, &source, folder.path().join("model")).unwrap_err();
        let refused = refused.to_string();
        assert!(refused.contains("labels") && refused.contains("2 different names"), "{refused}");
    }
    // Names that have gaps or aren't texts are passed over: there is nothing to call the outputs by.
    let score = Some((vec![2, 32], vec![0; 256]));
    written_classifier(folder.path(), "Gemma2ForSequenceClassification", score);
    let path = folder.path().join("config.json");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for names in
        [serde_json::json!({"0": "a", "2": "b"}), serde_json::json!({"0": 7}), serde_json::json!("a")]
    {
        let mut config = config.clone();
        config["id2label"] = names;
        std::fs::write(&path, config.to_string()).unwrap();
        assert!(Checkpoint::open(folder.path()).unwrap().labels().is_empty(), "{config}");
    }
}

fn base() -> Base {
    Base::open(testdata("models/tiny-llama")).unwrap().with_bits(4).with_compute(Compute::F32).load().unwrap()
}

/// Sentences of two kinds, `count` of each, as rows of `form`.
fn rows(count: usize, row: impl Fn(&str, bool, usize) -> String) -> (tempfile::TempDir, std::path::PathBuf) {
    const NAMES: [&str; 6] = ["the captain", "a sailor", "the mate", "the cook", "a boy", "the whale"];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rows.jsonl");
    let lines = (0..2 * count).map(|index| {
        let (name, good) = (NAMES[index / 2 % 6], index % 2 == 0);
        let text = match good {
            true => format!("It was said that {name} was kind and good, number {}.", index / 12),
            false => format!("It was said that {name} was cruel and bad, number {}.", index / 12),
        };
        row(&text, good, index) + "\n"
    });
    std::fs::write(&file, lines.collect::<String>()).unwrap();
    (folder, file)
}

fn config(steps: u64) -> TrainerConfig {
    let mut config = TrainerConfig::new(steps, BatchOptions::new(6).with_seed(4));
    config.lr = 5e-3;
    config
}

fn adapters() -> AdapterConfig {
    AdapterConfig::lora(4, 8.0).with_dropout(0.05).with_seed(2).with_score_head()
}

#[test]
fn classes_are_learned_evaluated_resumed_and_saved() {
    let base = base();
    let (_folder, file) = rows(24, |text, good, _| {
        format!("{{\"sentence\": \"{text}\", \"label\": \"{}\"}}", if good { "kind" } else { "cruel" })
    });
    let data = base.data_with(&file, &base.data_options(48).with_classes(["cruel", "kind"])).unwrap();
    assert!(data.has_values());
    let (train, held_out) = data.split(0.25, 1).unwrap();
    let (train, held_out) = (Arc::new(train), Arc::new(held_out));
    let classifier = Classifier::new(base.model().clone(), 2, 3).unwrap();
    let tuned = Tuned::<Model>::attach(classifier.clone(), &adapters()).unwrap();
    let new = || {
        let model = tuned.model().clone();
        Trainer::new(model, train.clone(), config(24)).unwrap().with_identity(tuned.identity())
    };
    let before = predict(tuned.model(), &held_out, 4).unwrap();
    let mut whole = new();
    let report = whole.run(&RunOptions::new().with_held_out(held_out.clone(), 6)).unwrap();
    let first = report.steps[0].loss;
    assert!((first - std::f64::consts::LN_2).abs() < 0.2, "{first}");
    assert_eq!(report.steps[0].targets, 6);
    let last = report.evaluations.last().unwrap().score;
    let found = predict(whole.model(), &held_out, 5).unwrap();
    assert!(
        found.accuracy() > 0.9 && found.matthews() > 0.8 && found.f1() > 0.9,
        "{found:?}, before {before:?}"
    );
    // The held-out loss is the mean of the scores' own.
    let nll = |(scores, value): (&Vec<f32>, &f32)| {
        let sum: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
        sum.ln() - f64::from(scores[*value as usize])
    };
    let mean: f64 = found.scores.iter().zip(&found.values).map(nll).sum::<f64>() / found.values.len() as f64;
    assert!((mean - last).abs() < 1e-5, "{mean} and {last}");

    let folder = tempfile::tempdir().unwrap();
    let mut cut = new();
    for _ in 0..10 {
        cut.step().unwrap();
    }
    cut.save(folder.path().join("last")).unwrap();
    let mut second = new().resumed(folder.path().join("last")).unwrap();
    let rest = second.run(&RunOptions::new()).unwrap().steps;
    assert!(rest.iter().zip(&report.steps[10..]).all(|(a, b)| a.loss == b.loss), "{rest:?}");
    assert!(predict(second.model(), &held_out, 5).unwrap() == found);

    let trained = Tuned::<Model>::from_parts(whole.into_model(), adapters());
    for (name, save) in [("peft", Tuned::save_peft as fn(&_, _) -> _), ("own", Tuned::save)] {
        let folder = folder.path().join(name);
        save(&trained, folder.clone()).unwrap();
        let again = Tuned::<Model>::load(classifier.clone(), &folder).unwrap();
        assert!(predict(again.model(), &held_out, 5).unwrap() == found, "{name}");
    }
    let merged = predict(&trained.merge_dense(), &held_out, 5).unwrap();
    assert_close("merged", &merged.scores.concat(), &found.scores.concat(), 1e-3);
}

#[test]
fn numbers_are_learned_with_packed_rows_from_disk() {
    let base = base();
    let (folder, file) = rows(24, |text, good, index| {
        format!(
            "{{\"text\": \"{text}\", \"label\": {}}}",
            f64::from(u8::from(good)) * 2.0 - 1.0 + 0.1 * (index % 3) as f64
        )
    });
    let options = base.data_options(48);
    let [kept, on_disk] = [
        base.data_with(&file, &options).unwrap(),
        base.data_on_disk(&file, &options, folder.path()).unwrap(),
    ];
    assert_eq!(kept.fingerprint().unwrap(), on_disk.fingerprint().unwrap());
    let classifier = Classifier::new(base.model().clone(), 1, 3).unwrap();
    let tuned = Tuned::<Model>::attach(classifier, &adapters()).unwrap();
    let losses = |data: Dataset, packing: bool| {
        let mut config = config(30);
        config.batch = BatchOptions::new(3).with_packing(packing);
        let data = Arc::new(data);
        let mut trainer = Trainer::new(tuned.model().clone(), data.clone(), config).unwrap();
        let report = trainer.run(&RunOptions::new().with_held_out(data.clone(), 30)).unwrap();
        (report, predict(trainer.model(), &data, 4).unwrap())
    };
    let (report, found) = losses(on_disk, true);
    assert!(report.steps[0].targets > 3, "several a row: {:?}", report.steps[0]);
    assert!(found.pearson() > 0.9 && found.spearman() > 0.7 && found.squared_error() < 0.3, "{found:?}");
    assert!((found.squared_error() - report.evaluations[0].score).abs() < 1e-5);
    let (_, plain) = losses(kept, false);
    assert!(plain.pearson() > 0.8, "{plain:?}");
}

#[cfg(feature = "side-tuning")]
#[test]
fn a_side_network_classifies_in_the_same_trainer() {
    use kiln::side_tuning::{SideConfig, load_classifier, save_classifier, side_classifier};
    let base = base();
    let (_folder, file) =
        rows(24, |text, good, _| format!("{{\"text\": \"{text}\", \"label\": {}}}", u8::from(good)));
    let data = Arc::new(base.data(&file, 48).unwrap());
    let model = side_classifier(base.model().clone(), 2, &SideConfig::qst(), 5).unwrap();
    let mut trainer = Trainer::new(model, data.clone(), config(40)).unwrap();
    trainer.run(&RunOptions::new()).unwrap();
    let found = predict(trainer.model(), &data, 8).unwrap();
    assert!(found.accuracy() > 0.9, "{}", found.accuracy());
    let folder = tempfile::tempdir().unwrap();
    save_classifier(&trainer.into_model(), folder.path()).unwrap();
    let again = load_classifier(base.model().clone(), folder.path()).unwrap();
    assert!(predict(&again, &data, 8).unwrap() == found);
}

#[test]
fn data_and_models_that_do_not_fit_are_refused_before_the_first_step() {
    let base = base();
    let (_folder, file) =
        rows(3, |text, _, index| format!("{{\"text\": \"{text}\", \"label\": {}}}", index % 3));
    let (_halves, half) =
        rows(3, |text, _, index| format!("{{\"text\": \"{text}\", \"label\": {}}}", index as f64 + 0.5));
    let classes = Arc::new(base.data(&file, 48).unwrap());
    let numbers = Arc::new(base.data(&half, 48).unwrap());
    let text = Arc::new(base.data_with(&file, &base.data_options(48).with_form(Form::Text)).unwrap());
    assert!(!text.has_values());
    let attach = |labels: usize| {
        let classifier = Classifier::new(base.model().clone(), labels, 3).unwrap();
        Tuned::<Model>::attach(classifier, &adapters()).unwrap().into_model()
    };
    let refused = |labels: usize, data: &Arc<Dataset>, config: TrainerConfig, what: &str| {
        let error = Trainer::new(attach(labels), data.clone(), config).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    refused(2, &classes, config(1), "classes from 0 to 1");
    refused(3, &numbers, config(1), "no classes");
    refused(3, &text, config(1), "texts with classes");
    let smooth = config(1).with_loss(TokenLoss::new().with_label_smoothing(0.1));
    refused(1, &numbers, smooth, "squared error");
    let error = base.finetune(AdapterConfig::lora(4, 8.0), classes.clone()).with_steps(1).run().unwrap_err();
    assert!(error.to_string().contains("Classifier"), "{error}");
    assert!(predict(base.model(), &classes, 4).is_err());
    assert!(Classifier::new(base.model().clone(), 0, 3).is_err());
    // A held-out set of another kind too.
    let mut trainer = Trainer::new(attach(3), classes, config(1)).unwrap();
    assert!(trainer.run(&RunOptions::new().with_held_out(text, 1)).is_err());
    assert_eq!(trainer.steps_done(), 0);
}
