//! Options of the recipe: preferences, teachers, samples, limits; scales of packed weights.

use std::{ops::ControlFlow, path::Path};

use kiln::{
    Base,
    adapters::AdapterConfig,
    models::GenerateOptions,
    quant::{Projection, QuantLinear, Slots, TrainedParts},
    training::{
        DataOptions, Dataset, Distillation, Event, Example, OptimizerKind, PreferenceLoss, RunOptions,
        TokenLoss, TrainerConfig,
    },
};
use kiln_testkit::{read, testdata};

fn base(bits: u32) -> Base {
    Base::open(testdata("models/tiny-llama")).unwrap().with_bits(bits).load().unwrap()
}

/// Windows of 32 tokens of a text that the model was not trained on.
fn text(base: &Base, windows: usize) -> Dataset {
    let bytes = std::fs::read(testdata("models/tiny-llama/text/shift_test_moby.u16le")).unwrap();
    let ids = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]).into());
    Dataset::from_ids(ids.take(32 * windows).collect(), &base.data_options(32)).unwrap()
}

fn lora() -> AdapterConfig {
    AdapterConfig::lora(4, 8.0).with_seed(5)
}

/// PEQA: the codes stay, the scales move, the loss falls, and the result is saved and read again as it is.
#[test]
fn scales_alone_learn() {
    let base = base(3);
    let data = text(&base, 24);
    let config = || TrainerConfig::new(12, 8).with_lr(1e-4);
    for parts in [TrainedParts::Scales, TrainedParts::ScalesAndOffsets] {
        let (tuned, report) =
            base.tune_scales(parts, data.clone(), config(), &RunOptions::new(), &mut ()).unwrap();
        let (first, last) = (report.steps[0].loss, base_loss(&tuned, &data));
        assert!(last < first - 0.05, "{parts:?}: {first} {last}");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuned");
        tuned.save(&path).unwrap();
        let again = Base::open(&path).unwrap().load().unwrap();
        for (((name, before), (_, after)), (_, again)) in
            base.model().slots().into_iter().zip(tuned.model().slots()).zip(again.model().slots())
        {
            let (QuantLinear::Packed(before), QuantLinear::Packed(after)) = (before, after) else {
                panic!("{name} isn't packed")
            };
            let codes = |linear: &kiln::quant::PackedLinear| linear.weight.to_host().unwrap().codes;
            assert_eq!(codes(before), codes(after), "{name}");
            assert_ne!(
                read(before.weight.effective_scales()),
                read(after.weight.effective_scales()),
                "{name}"
            );
            assert_eq!(read(after.weight.dequantize()), read(again.weight()), "{name}");
        }
    }
}

fn base_loss(base: &Base, data: &Dataset) -> f64 {
    base.evaluate(data).unwrap().nll
}

/// The same from a checkpoint, bit for bit, with averages in 8 bits.
#[test]
fn scales_go_on_from_a_checkpoint() {
    let base = base(3);
    let data = std::sync::Arc::new(text(&base, 24));
    let config = || TrainerConfig::new(6, 4).with_lr(1e-4).with_optimizer(OptimizerKind::AdamW8Bit);
    let tune = |run: &RunOptions, stop: u64| {
        let mut listens = |event: &Event<'_>| match event {
            Event::Step(report) if report.step + 1 == stop => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        };
        base.tune_scales(TrainedParts::Scales, data.clone(), config(), run, &mut listens).unwrap()
    };
    let (whole, _) = tune(&RunOptions::new(), 0);
    let folder = tempfile::tempdir().unwrap();
    let run = RunOptions::new().with_folder(folder.path());
    tune(&run, 3);
    let (second, report) = base
        .resume_scales(
            TrainedParts::Scales,
            data.clone(),
            config(),
            &run,
            &mut (),
            folder.path().join("last"),
        )
        .unwrap();
    assert_eq!(report.steps.len(), 3);
    for ((name, a), (_, b)) in whole.model().slots().into_iter().zip(second.model().slots()) {
        assert_eq!(read(a.weight()), read(b.weight()), "{name}");
    }
}

/// A student at 2 bits comes nearer to its teacher's distribution than by the text alone.
#[test]
fn a_teacher_is_imitated() {
    let (teacher, student) = (Base::open(testdata("models/tiny-llama")).unwrap().load().unwrap(), base(2));
    let data = text(&student, 24);
    let run = |loss: TokenLoss| {
        let trainer = TrainerConfig::new(15, 8).with_lr(3e-3).with_loss(loss);
        let tuning = student.finetune(lora(), data.clone()).with_trainer(trainer);
        let tuning = if loss == TokenLoss::new() { tuning } else { tuning.with_reference(&teacher) };
        tuning.run().unwrap()
    };
    let imitating = TokenLoss::new().with_distillation(Distillation { weight: 1.0, temperature: 1.0 });
    let (plain, imitating) = (run(TokenLoss::new()), run(imitating));
    let ids: Vec<u32> = data.example(1).unwrap().ids.clone();
    let tokens = kiln::models::TokenBatch::new(&[ids]).unwrap();
    let probabilities = |model: &dyn Fn() -> kiln::burn::tensor::Tensor<3>| {
        read(kiln::burn::tensor::activation::log_softmax(model(), 2))
    };
    use kiln::models::CausalLm;
    let of_teacher =
        probabilities(&|| teacher.model().forward(&teacher.model().context(&tokens, None).unwrap()));
    let distance = |tuned: &kiln::FineTuned| {
        let found = probabilities(&|| tuned.model().forward(&tuned.model().context(&tokens, None).unwrap()));
        of_teacher.iter().zip(&found).map(|(t, s)| f64::from(t.exp() * (t - s))).sum::<f64>()
    };
    assert!(distance(&imitating) < 0.9 * distance(&plain), "{} {}", distance(&imitating), distance(&plain));
}

fn pairs(base: &Base) -> Dataset {
    let answer = |prompt: &str, text: &str| {
        let ids = |text: &str| base.tokenizer().encode(text, false).unwrap();
        Example::answer(&ids(prompt), &ids(text))
    };
    let nouns = ["house", "nation", "war", "people", "law", "year", "world", "court"];
    let pairs = nouns.map(|noun| {
        let prompt = format!("Tell me about the {noun}:");
        [answer(&prompt, &format!(" The {noun} is good.")), answer(&prompt, " No.")]
    });
    Dataset::from_pairs(pairs, &DataOptions::new(48, base.data_options(48).vocab_size)).unwrap()
}

#[test]
fn preferences_are_learned_and_figures_are_written() {
    let base = base(4);
    let folder = tempfile::tempdir().unwrap();
    let mut samples = Vec::new();
    let trainer = TrainerConfig::new(10, 4).with_lr(1e-3).with_preference(PreferenceLoss::dpo());
    let tuned = base
        .finetune(lora(), pairs(&base))
        .with_trainer(trainer)
        .with_held_out(pairs(&base), 5)
        .with_known_answers(folder.path().join("reference.json"))
        .with_metrics(folder.path().join("figures"))
        .with_samples(["The nation"], GenerateOptions::new(4).with_stop_texts(["\n"]))
        .on_event(|event| {
            if let Event::Sample { prompt, text } = event {
                samples.push(format!("{prompt}{text}"));
            }
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    let report = tuned.report().unwrap();
    assert!((report.steps[0].loss - 2.0f64.ln()).abs() < 1e-6);
    let last = report.evaluations.last().unwrap();
    assert!(last.score < 0.6 && last.preference.unwrap().accuracy.unwrap() == 1.0, "{last:?}");
    assert_eq!(samples.len(), 2);
    assert!(samples.iter().all(|sample| sample.starts_with("The nation") && !sample.contains('\n')));
    let has = |path: &str| Path::exists(&folder.path().join(path));
    assert!(has("reference.json") && has("figures/metrics.jsonl"));
}

#[test]
fn runs_that_can_not_fit_are_refused_with_what_would_help() {
    let base = base(4);
    let run = |bytes| {
        let tuning = base.finetune(lora(), text(&base, 8)).with_steps(1).with_batch(8);
        tuning.with_memory_limit(bytes).run().map(drop)
    };
    assert!(run(1 << 30).is_ok());
    // What the refusal of nearly nothing says that it needs, less a tenth of what depends on the step.
    let error = run(1 << 20).unwrap_err().to_string();
    assert!(error.starts_with("memory_limit: expected at least ") && error.contains("fewer bits"), "{error}");
    let needed: u64 = error.split_whitespace().nth(4).unwrap().parse().unwrap();
    let error = run((needed - needed / 10) * 1_000_000).unwrap_err().to_string();
    assert!(error.contains("recompute: Block") && error.contains("would take"), "{error}");
    assert!(run((needed + 1) * 1_000_000).is_ok());
}

#[test]
fn what_is_learned_can_be_looked_at() {
    let base = base(4);
    let preview = base.preview(&pairs(&base), 0).unwrap();
    assert_eq!(preview.to_string(), "Tell me about the house:⟦ The house is good.⟧");
}
