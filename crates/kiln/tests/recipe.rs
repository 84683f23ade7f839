//! The front door: load, attach, train, evaluate, stop, save, reload, generate, merge, export, on the embedded model.

use std::{ops::ControlFlow, path::Path};

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, LinearConfig},
    tensor::{Device, Tensor},
};
use kiln::{
    Base, FineTuned, Tuned,
    adapters::{AdapterConfig, AnyAdapter, InitLoraWeights, Method, Pooling, QaLora},
    models::chat::Message,
    quant::{Compute, Projection, QuantLinear, Slots, slots, trained_values},
    training::{Dataset, Event, RunEnd},
};
use kiln_testkit::{read, testdata};

const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                        {% if add_generation_prompt %}assistant: {% endif %}";

fn base(bits: u32) -> Base {
    let open = Base::open(testdata("models/tiny-llama")).unwrap();
    open.with_bits(bits).with_chat_template(TEMPLATE).load().unwrap()
}

/// Some text that the model was not trained on.
fn text(base: &Base) -> Dataset {
    let bytes = std::fs::read(testdata("models/tiny-llama/text/shift_test_moby.u16le")).unwrap();
    let ids = bytes[..2048].chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]).into());
    Dataset::from_ids(ids.collect(), &base.data_options(32)).unwrap()
}

fn lora(dropout: f64) -> AdapterConfig {
    AdapterConfig::lora(4, 8.0).with_dropout(dropout).with_seed(5)
}

fn losses(tuned: &FineTuned) -> Vec<u64> {
    tuned.report().unwrap().steps.iter().map(|step| step.loss.to_bits()).collect()
}

#[test]
fn dropout_changes_training_and_is_repeated_by_a_resumed_run() {
    let base = base(4);
    let data = std::sync::Arc::new(text(&base));
    let run = |dropout| base.finetune(lora(dropout), data.clone()).with_steps(6).with_lr(5e-3).run().unwrap();
    let (whole, without) = (run(0.5), run(0.0));
    // LoRA's B starts at zero, so the first step sees no mask.
    assert_eq!(losses(&whole)[0], losses(&without)[0]);
    assert!(losses(&whole)[1..].iter().zip(&losses(&without)[1..]).all(|(a, b)| a != b));

    let folder = tempfile::tempdir().unwrap();
    let part = |stop: u64| {
        base.finetune(lora(0.5), data.clone())
            .with_steps(6)
            .with_lr(5e-3)
            .with_checkpoints(folder.path(), 0)
            .with_resume()
            .on_event(move |event| match event {
                Event::Step(report) if report.step + 1 == stop => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            })
            .run()
            .unwrap()
    };
    let (first, second) = (part(3), part(6));
    assert_eq!([losses(&first), losses(&second)].concat(), losses(&whole));
    assert_eq!(first.report().unwrap().end, RunEnd::Stopped);
    let values = |tuned: &FineTuned| -> Vec<Vec<f32>> {
        let adapters = tuned.tuned().adapters().into_iter();
        adapters.map(|(_, adapter)| read(adapter.as_lora().unwrap().lora_b.val())).collect()
    };
    assert_eq!(values(&second), values(&whole));
}

/// Each circumstance that decides a run's numbers, changed alone.
#[test]
fn a_run_under_other_circumstances_is_refused_by_name() {
    let four = base(4);
    let folder = tempfile::tempdir().unwrap();
    let run = |base: &Base, adapters: AdapterConfig, folder: &Path| {
        let run = base.finetune(adapters, text(base)).with_steps(1);
        run.with_checkpoints(folder, 0).with_resume().run()
    };
    run(&four, lora(0.1), folder.path()).unwrap();
    assert!(run(&four, lora(0.1), folder.path()).is_ok());
    let changed = |change: &dyn Fn(&mut AdapterConfig)| {
        let mut config = lora(0.1);
        change(&mut config);
        config
    };
    let open = || Base::open(testdata("models/tiny-llama")).unwrap();
    let dense = open().with_chat_template(TEMPLATE).load().unwrap();
    let other_template = open().with_bits(4).with_chat_template("{{ messages[0].content }}").load().unwrap();
    let compute = if four.model().compute() == Compute::F32 { Compute::Bf16 } else { Compute::F32 };
    let other_compute = open().with_bits(4).with_chat_template(TEMPLATE).with_compute(compute).load();
    let mut other_weights = four.model().clone();
    let gains = other_weights.final_norm.weight.take().unwrap();
    other_weights.final_norm.weight = Some(gains.map(|gains| gains.mul_scalar(1.001)));
    let same = || four.with_model(four.model().clone());
    let pissa = Method::Lora { init: InitLoraWeights::Pissa { iterations: None } };
    let olora = Method::Lora { init: InitLoraWeights::Olora };
    let mut cases = vec![
        (same(), changed(&|config| config.alpha = 64.0), "model.adapters.alpha: expected 64, found 8"),
        (same(), changed(&|config| config.seed = 7), "model.adapters.seed: expected 7, found 5"),
        (same(), changed(&|config| config.dropout = 0.5), "model.adapters.dropout: expected 0.5, found 0.1"),
        (
            same(),
            changed(&|config| config.rslora = true),
            "model.adapters.rslora: expected true, found false",
        ),
        (same(), changed(&|config| config.method = pissa), "model.adapters.method: expected"),
        (same(), changed(&|config| config.method = olora), "model.adapters.method: expected"),
        (base(2), lora(0.1), "model.base.linears: expected 28 of affine2:64, found 28 of affine4:64"),
        (dense, lora(0.1), "model.base.linears: expected 28 of dense, found 28 of affine4:64"),
        (four.with_model(other_weights), lora(0.1), "model.frozen parameters: expected"),
        (other_template, lora(0.1), "model.chat template: expected"),
    ];
    if let Ok(base) = other_compute {
        cases.push((base, lora(0.1), "model.compute: expected"));
    }
    for (base, adapters, name) in cases {
        let error = run(&base, adapters, folder.path()).map(drop).unwrap_err();
        assert!(error.is_file() && error.to_string().contains(name), "{error}");
    }

    let pooled = |pooling| AdapterConfig::new(Method::QaLora(QaLora { pool: 32, pooling }), 4, 8.0);
    let folder = tempfile::tempdir().unwrap();
    run(&four, pooled(Pooling::Average), folder.path()).unwrap();
    let error = run(&four, pooled(Pooling::Sum), folder.path()).map(drop).unwrap_err().to_string();
    assert!(error.contains("model.adapters.method: expected"), "{error}");
}

#[test]
fn a_chat_is_tuned_stopped_saved_reloaded_merged_and_exported() {
    let base = base(4);
    let folder = tempfile::tempdir().unwrap();
    let chat = folder.path().join("chat.jsonl");
    let row = |role: &str, i: usize| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "Bill {i}?"}}, {{"role": "{role}", "content": "The President signs {i}."}}]}}"#
        )
    };
    let rows: Vec<String> = (0..12).map(|i| row(if i == 4 { "asistant" } else { "assistant" }, i)).collect();
    std::fs::write(&chat, rows.join("\n")).unwrap();
    let data = base.data(&chat, 64).unwrap();
    assert!(data.report().to_string().contains("row in line 5 was left out"), "{}", data.report());
    let (train, held_out) = data.split(0.25, 0).unwrap();
    let held_out = std::sync::Arc::new(held_out);
    let before = base.evaluate(&held_out).unwrap();

    let mut lines = Vec::new();
    let tuned = base
        .finetune(lora(0.05), train)
        .with_epochs(4)
        .with_batch(2)
        .with_lr(5e-3)
        .with_held_out(held_out.clone(), 3)
        .with_patience(2)
        .on_event(|event| {
            lines.push(event.to_string());
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    assert!(lines.iter().any(|line| line.contains("steps: score")), "{lines:?}");
    let after = tuned.evaluate(&held_out).unwrap();
    assert!(after.nll < before.nll - 0.5, "{before:?} {after:?}");
    let best = tuned.report().unwrap().evaluations.iter().map(|e| e.score).fold(f64::INFINITY, f64::min);
    assert!((after.nll - best).abs() < 1e-5, "the best model comes back: {best} {after:?}");

    let question = [Message::new("user", "Bill 4?")];
    let answer = tuned.chat(&question, 12).unwrap();
    let adapter = folder.path().join("adapter");
    tuned.save_peft(&adapter).unwrap();
    let reloaded = base.load_adapters(&adapter).unwrap();
    assert_eq!(reloaded.chat(&question, 12).unwrap(), answer);
    assert_ne!(base.chat(&question, 12).unwrap(), answer);
    let mut streamed = String::new();
    let whole = reloaded.chat_with(&question, 12, &mut |text| {
        streamed.push_str(text);
        ControlFlow::Continue(())
    });
    assert_eq!(whole.unwrap().trim_end_matches(char::REPLACEMENT_CHARACTER), streamed);

    let gguf = folder.path().join("merged.gguf");
    let report = tuned.export_gguf(&gguf).unwrap();
    assert!(report.lossy().count() > 0, "merged weights are rounded to F16, and the report says so");
    let exported = Base::open(&gguf).unwrap().with_chat_template(TEMPLATE).load().unwrap();
    let loss = exported.evaluate(&held_out).unwrap();
    assert!((loss.nll / after.nll - 1.0).abs() < 1e-2, "{loss:?} {after:?}");
    tuned.export_gguf_lora(folder.path().join("lora.gguf")).unwrap();
    let error = tuned.merge_packed().unwrap_err();
    assert!(error.is_argument() && error.to_string().contains("LoRA"), "{error}");
}

/// The whole chain: a smaller model, bits where they count, a calibrated start, and a fine-tune of it.
#[test]
#[cfg(feature = "mixq-search")]
fn the_stages_follow_one_another() {
    use kiln::{
        calibration::{CalibrationConfig, LoftqConfig, Method},
        mixq::Choices,
        pruning::{BlockPruning, Criterion},
        quant::Plan,
    };
    let base = Base::open(testdata("models/tiny-llama")).unwrap().load().unwrap();
    let data = std::sync::Arc::new(text(&base));
    let windows = data.windows(2).unwrap();
    let (pruned, report) = base.prune(&BlockPruning::new(Criterion::L2, 0.25), None).unwrap();
    assert!(report.parameters_after < report.parameters_before);
    let choices = Choices::new(["affine4:32".parse().unwrap(), "affine8:32".parse().unwrap()]);
    let found = pruned.search(&choices, &windows, 4).unwrap();
    let mixed = pruned.with_plan(&found.front.points[0].plan).unwrap();
    let tuned = mixed.finetune(lora(0.0), data.clone()).with_steps(2).run().unwrap();
    assert!(tuned.evaluate(&data).unwrap().nll.is_finite());

    let config = CalibrationConfig::new(
        Method::Loftq(LoftqConfig::default()),
        Plan::uniform("affine2:32".parse().unwrap()),
    );
    let start = base.calibrate(lora(0.0), &config, &windows).unwrap();
    let repaired = start.evaluate(&data).unwrap().nll;
    assert_ne!(
        repaired,
        start.without_adapters().evaluate(&data).unwrap().nll,
        "the adapters start with something"
    );
    let tuned = start.finetune(data.clone()).with_steps(6).with_lr(5e-3).run().unwrap();
    assert!(tuned.evaluate(&data).unwrap().nll < repaired);
    let folder = tempfile::tempdir().unwrap();
    let (whole, adapter) = (folder.path().join("base"), folder.path().join("adapter"));
    tuned.without_adapters().save(&whole).unwrap();
    tuned.save(&adapter).unwrap();
    // A stage's new weights are computed with as the old ones were.
    assert_eq!(mixed.model().slots()[0].1.compute(), base.model().compute());
    assert_eq!(tuned.model().slots()[0].1.compute(), base.model().compute());
    let again = Base::open(&whole).unwrap().load().unwrap().load_adapters(&adapter).unwrap();
    assert_eq!(again.evaluate(&data).unwrap(), tuned.evaluate(&data).unwrap());
}

/// DoRA starts where the calibrated LoRA is; other adapters start on a base that a method quantized without them.
#[test]
#[cfg(feature = "calibration")]
fn every_adapter_has_a_calibrated_start() {
    use kiln::{
        adapters::QaHira,
        calibration::{CalibrationConfig, GptqConfig, LoftqConfig, Method as Calibration},
        quant::Plan,
    };
    let base = Base::open(testdata("models/tiny-llama")).unwrap().with_scheme("dense".parse().unwrap());
    let base = base.with_compute(Compute::F32).load().unwrap();
    let data = std::sync::Arc::new(text(&base));
    let windows = data.windows(2).unwrap();
    let config = |method| CalibrationConfig::new(method, Plan::uniform("affine2:32".parse().unwrap()));
    let loftq = config(Calibration::Loftq(LoftqConfig::default()));
    let loss = |tuned: &FineTuned| tuned.evaluate(&data).unwrap().nll;
    let of_lora = base.calibrate(lora(0.0), &loftq, &windows).unwrap();
    let dora = AdapterConfig::dora(4, 8.0).with_seed(5);
    let of_dora = base.calibrate(dora, &loftq, &windows).unwrap();
    assert!((loss(&of_lora) - loss(&of_dora)).abs() < 1e-5, "{} {}", loss(&of_lora), loss(&of_dora));
    let tuned = of_dora.finetune(data.clone()).with_steps(6).with_lr(5e-3).run().unwrap();
    assert!(loss(&tuned) < loss(&of_dora));

    let gptq = config(Calibration::Gptq(GptqConfig::default()));
    let plain = base.calibrate(lora(0.0), &gptq, &windows).unwrap();
    let hira = AdapterConfig::new(Method::QaHira(QaHira::for_tiles(1, 32)), 1, 32.0);
    let start = base.calibrate(hira.clone(), &gptq, &windows).unwrap();
    // Both start at GPTQ's base.
    assert_eq!(loss(&start), loss(&plain));
    let tuned = start.finetune(data.clone()).with_steps(6).with_lr(1e-2).run().unwrap();
    assert!(loss(&tuned) < loss(&start));
    let merged = tuned.merge_packed().unwrap().evaluate(&data).unwrap().nll;
    assert!((merged - loss(&tuned)).abs() < 1e-4, "{merged} {}", loss(&tuned));
    let error = base.calibrate(hira, &loftq, &windows).unwrap_err();
    assert!(error.is_argument() && error.to_string().contains("adapters"), "{error}");
}

#[test]
fn errors_tell_their_kind_and_what_was_expected() {
    let error = Base::open("HuggingFaceTB/SmolLM2-135M").unwrap_err();
    assert!(error.is_io() && error.as_io().is_some() && error.to_string().contains("nothing is downloaded"));
    let error = Base::open(testdata("models/tiny-llama")).unwrap().with_bits(7).load().unwrap_err();
    assert!(error.is_argument(), "{error}");
    let base = base(4);
    let error = base.finetune(AdapterConfig::lora(4, 8.0).with_targets(["qproj"]), text(&base)).run();
    let error = error.unwrap_err();
    assert!(error.is_argument() && error.to_string().starts_with("targets"), "{error}");
    let error = base.generate("a", 600).unwrap_err();
    assert!(error.to_string().contains("max_new_tokens"), "{error}");
    assert!(error.downcast_ref::<kiln::models::Error>().is_some());
}

/// Not a language model.
#[derive(Module, Debug)]
struct Encoder<P: Projection> {
    layers: Vec<P>,
    norm: LayerNorm,
}

slots!(Encoder { slots layers, keep norm });

#[derive(Module, Debug)]
struct Scorer<P: Projection> {
    encoder: Encoder<P>,
    heads: Vec<Encoder<P>>,
    output: P,
}

slots!(Scorer { module encoder, modules heads, slot output });

#[test]
fn a_module_of_ones_own_is_packed_adapted_and_merged() {
    let device = Device::flex();
    let linear = |d_output| LinearConfig::new(32, d_output).init(&device);
    let encoder = |layers: usize| Encoder {
        layers: (0..layers).map(|_| linear(32)).collect(),
        norm: LayerNormConfig::new(32).init(&device),
    };
    let model = Scorer { encoder: encoder(2), heads: vec![encoder(1), encoder(1)], output: linear(4) };
    let packed =
        model.try_map(|path, linear| QuantLinear::pack(path, linear, &"affine4:32".parse()?)).unwrap();
    let paths: Vec<String> = packed.slot_shapes().into_iter().map(|(path, _)| path).collect();
    let expected = ["encoder.layers.0", "encoder.layers.1", "heads.0.layers.0", "heads.1.layers.0", "output"];
    assert_eq!(paths, expected);

    let config = AdapterConfig::lora(2, 4.0).with_targets(["layers.0", "output"]);
    let tuned = Tuned::attach(packed.clone(), &config).unwrap();
    let parts = tuned.adapters();
    assert_eq!(parts.len(), 4);
    // What stands outside the adapters is frozen: a folder of adapters would not hold it.
    assert_eq!(trained_values(&tuned.model().clone().train()), 3 * 2 * (32 + 32) + 2 * (32 + 4));

    let moved = tuned.map_model(|model| {
        let moved = model.try_map(|_, mut slot| {
            if let Some(AnyAdapter::Lora(lora)) = &mut slot.adapter {
                lora.lora_b = lora.lora_b.clone().map(|b| b + 0.25);
            }
            Ok::<_, std::convert::Infallible>(slot)
        });
        moved.unwrap()
    });
    let x = Tensor::<2>::ones([3, 32], &device);
    let forward = |slot: &kiln::AdaptedLinear| read(slot.forward(x.clone()));
    let expected: Vec<Vec<f32>> = moved.model().slots().into_iter().map(|(_, slot)| forward(slot)).collect();
    let folder = tempfile::tempdir().unwrap();
    moved.save(&folder).unwrap();
    let loaded = Tuned::load(packed, &folder).unwrap();
    let found: Vec<Vec<f32>> = loaded.model().slots().into_iter().map(|(_, slot)| forward(slot)).collect();
    assert_eq!(found, expected);
    let merged: Scorer<QuantLinear> = loaded.merge_dense();
    for ((path, slot), expected) in merged.slots().into_iter().zip(&expected) {
        let found = read(slot.forward(x.clone()));
        let largest = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(largest < 1e-4, "{path}: {largest}");
    }
}

#[test]
fn tasks_score_a_run_as_they_score_its_model_afterwards() {
    use kiln::eval::{DataFolder, Evaluation, Metric, ModelScorer, Task};
    let base = base(4);
    let how = Evaluation::new().with_limit(24).with_resamples(0);
    let quiz = || {
        ["quiz_letters", "quiz_words"].map(|name| {
            let task = Task::from_file(testdata("eval/quiz").join(name).with_extension("json")).unwrap();
            let data = DataFolder::new(testdata("eval")).load(&task, how.shots_of(&task)).unwrap();
            (task, data)
        })
    };
    let (train, held_out) = text(&base).split(0.2, 0).unwrap();
    let run = |train: Dataset| base.finetune(lora(0.0), train).with_steps(4).with_lr(2e-2);
    let folder = tempfile::tempdir().unwrap();
    let mut told = Vec::new();
    let tuned = run(train.clone())
        .with_tasks(quiz(), how.clone(), 2)
        .with_checkpoints(folder.path(), 0)
        .on_event(|event| {
            if let Event::Figure { steps, name, value } = event {
                told.push((*steps, (*name).to_owned(), *value));
            }
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    // The model that comes back is the best one, and asked on its own it says the same.
    let evaluations = &tuned.report().unwrap().evaluations;
    let best = evaluations.iter().rev().find(|evaluation| evaluation.is_best).unwrap();
    let scorer = ModelScorer::new(tuned.model(), base.tokenizer()).unwrap();
    let report = how.evaluate(&scorer, &quiz()).unwrap();
    let misses = report.tasks.iter().map(|task| 1.0 - task.metric(Metric::Acc).unwrap().value);
    assert!((best.score - misses.sum::<f64>() / 2.0).abs() < 1e-12, "{best:?}, {report}");
    assert!(folder.path().join("best").is_dir());
    for task in &report.tasks {
        for found in &task.metrics {
            let expected = (best.steps, format!("{} {}", task.task, found.metric), found.value);
            assert!(told.contains(&expected), "{expected:?} among {told:?}");
        }
    }
    assert_eq!(evaluations.iter().map(|evaluation| evaluation.steps).collect::<Vec<_>>(), [2, 4]);

    // Beside held-out data the loss decides, and tasks are only told.
    let mut figures = 0;
    let with_loss = run(train.clone())
        .with_held_out(held_out, 4)
        .with_tasks(quiz(), how.clone(), 4)
        .on_event(|event| {
            figures += usize::from(matches!(event, Event::Figure { .. }));
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    assert!(figures > 0 && with_loss.report().unwrap().evaluations[0].score > 1.0);

    let refused = |how: Evaluation, every| {
        run(train.clone()).with_tasks(quiz(), how, every).run().err().unwrap().to_string()
    };
    let log = folder.path().join("log.jsonl");
    assert!(refused(how.clone().with_samples(log), 2).contains("a log is of one model"));
    assert!(refused(how.clone(), 0).contains("evaluate_every"));
    assert!(refused(how.clone().with_shots(100_000), 2).contains("quiz_letters"));
    let none = run(train.clone()).with_tasks([], how.clone(), 2).run().err().unwrap().to_string();
    assert!(none.contains("tasks: expected at least one"), "{none}");
}
