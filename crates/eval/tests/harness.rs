//! The embedded model against what lm-evaluation-harness 0.4.13 found with transformers, on tasks of our own and on its
//! own tasks with made-up rows (`testdata/eval/lm_eval_*reference.json`, written by `scripts/compare-lm-eval.py`).

use burn::tensor::Device;
use kiln_eval::{
    DataFolder, Evaluation, ModelScorer, Response, Sample, Score, Task, TaskData, TaskReport, read_samples,
};
use kiln_models::{Checkpoint, Decoder, LoadOptions, Tokenizer};
use kiln_quant_core::QuantLinear;
use kiln_testkit::testdata;
use serde_json::Value;

/// Of a log-likelihood; two correct implementations in f32 differ by about 1e-4 in a sum over a text.
const TOLERANCE: f64 = 1e-3;

fn load() -> (Decoder<QuantLinear>, Tokenizer) {
    let checkpoint = Checkpoint::open(testdata("models/tiny-llama")).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    (model, checkpoint.tokenizer().unwrap())
}

fn runs(file: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(testdata(file)).unwrap();
    let reference: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(reference["resamples"], 1000);
    reference["runs"].as_array().unwrap().clone()
}

fn task(name: &str, shots: usize) -> (Task, TaskData) {
    let task = Task::from_file(testdata(&format!("eval/quiz/{name}.json"))).unwrap();
    let data = DataFolder::new("").load(&task, shots).unwrap();
    (task, data)
}

/// A built-in task with rows of our own.
fn builtin(name: &str, shots: usize) -> (Task, TaskData) {
    let task = Task::builtin(name).unwrap();
    let data = DataFolder::new(testdata("eval/builtin")).load(&task, shots).unwrap();
    (task, data)
}

/// The report and the log of a task.
fn evaluate(
    scorer: &ModelScorer<Decoder<QuantLinear>>,
    task: (Task, TaskData),
    evaluation: &Evaluation,
) -> (TaskReport, Vec<Sample>) {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("samples.jsonl");
    let tasks = [task];
    let report = evaluation.clone().with_samples(&log).evaluate(scorer, &tasks).unwrap();
    let mut samples = read_samples(&log).unwrap();
    samples.sort_by_key(|sample| sample.document);
    (report.tasks.into_iter().next().unwrap(), samples)
}

fn assert_answers(run: &Value, samples: &[Sample]) {
    let responses: Vec<&Response> = samples.iter().flat_map(|sample| &sample.responses).collect();
    let name = format!("{} with {} examples", run["task"], run["shots"]);
    if let Some(texts) = run["texts"].as_array() {
        assert_eq!(responses.len(), texts.len(), "{name}");
        for (index, (found, expected)) in responses.iter().zip(texts).enumerate() {
            assert_eq!(
                found,
                &&Response::Text(expected.as_str().unwrap().into()),
                "{name}, document {index}"
            );
        }
        return;
    }
    let expected = run["ll"].as_array().unwrap();
    let greedy = run["greedy"].as_str().unwrap_or_default();
    assert_eq!(responses.len(), expected.len(), "{name}");
    for (index, (found, expected)) in responses.into_iter().zip(expected).enumerate() {
        let expected = expected.as_f64().unwrap();
        let ll = match found {
            Response::Pair(ll, found) => {
                assert_eq!(*found, &greedy[index..=index] == "1", "{name}, answer {index}: greedy");
                *ll
            }
            Response::Rolling(ll) => *ll,
            other => panic!("{name}: {other:?}"),
        };
        assert!((ll - expected).abs() <= TOLERANCE, "{name}, answer {index}: {ll}, expected {expected}");
    }
}

fn assert_figures(run: &Value, report: &TaskReport) {
    let name = format!("{} with {} examples", run["task"], run["shots"]);
    assert_eq!(report.requests, run["requests"].as_str().unwrap(), "{name}: request texts");
    assert_eq!(report.documents as u64, run["documents"].as_u64().unwrap(), "{name}");
    let results = run["results"].as_object().unwrap();
    assert_eq!(results.len(), report.metrics.len(), "{name}");
    for found in &report.metrics {
        let metric = serde_json::to_value(found.metric).unwrap();
        let key = format!("{},{}", metric.as_str().unwrap(), found.filter);
        let near = |found: f64, expected: f64, part: &str| {
            // A mean of zeros and ones is exact; a perplexity has the log-likelihoods' tolerance.
            let tolerance =
                if found.fract() == 0.0 || found < 1.0 { 1e-9 } else { TOLERANCE * expected.abs() };
            assert!(
                (found - expected).abs() <= tolerance,
                "{name}, {key}, {part}: {found}, expected {expected}"
            );
        };
        near(found.value, results[&key][0].as_f64().unwrap(), "value");
        match (found.stderr, results[&key][1].as_f64()) {
            (Some(found), Some(expected)) => near(found, expected, "standard error"),
            (found, expected) => assert_eq!(found, expected, "{name}, {key}"),
        }
        let Some(expected) = run["scores"][&key].as_str() else { continue };
        let digits = found.scores.iter().map(|score| match score {
            Score::Number(value) => {
                if *value == 1.0 {
                    '1'
                } else {
                    '0'
                }
            }
            pair => panic!("{pair:?}"),
        });
        assert_eq!(digits.collect::<String>(), expected, "{name}, {key}: scores by document");
    }
}

fn assert_tokens(scorer: &ModelScorer<Decoder<QuantLinear>>, run: &Value, samples: &[Sample]) {
    let expected: Vec<[Vec<u32>; 2]> = serde_json::from_value(run["tokens"].clone()).unwrap();
    for ((context, continuation), [context_ids, continuation_ids]) in
        samples[0].requests.pairs().iter().zip(expected)
    {
        let (mut input, targets) = scorer.tokenize_pair(context, continuation).unwrap();
        input.extend(targets.last());
        assert_eq!(targets, continuation_ids, "{context:?} {continuation:?}");
        assert_eq!(input, [context_ids, continuation_ids].concat());
    }
}

/// How many different runs of the reference were repeated.
fn repeat(file: &str, task: impl Fn(&str, usize) -> (Task, TaskData)) -> usize {
    let (model, tokenizer) = load();
    let scorer = ModelScorer::new(&model, &tokenizer).unwrap().with_batch(16).unwrap();
    let mut forms = std::collections::BTreeSet::new();
    for run in &runs(file) {
        let (name, shots) = (run["task"].as_str().unwrap(), run["shots"].as_u64().unwrap() as usize);
        let limit = run["documents"].as_u64().unwrap() as usize;
        let evaluation = Evaluation::new().with_shots(shots).with_limit(limit).with_resamples(1000);
        let (report, samples) = evaluate(&scorer, task(name, shots), &evaluation);
        assert_answers(run, &samples);
        assert_figures(run, &report);
        assert_tokens(&scorer, run, &samples);
        forms.insert((name.to_owned(), shots));
    }
    forms.len()
}

#[test]
fn every_answer_and_figure_equals_the_harness() {
    assert_eq!(repeat("eval/lm_eval_reference.json", task), 13);
}

#[test]
fn built_in_tasks_equal_the_harness_own_descriptions() {
    assert_eq!(repeat("eval/lm_eval_builtin_reference.json", builtin), 39);
}

#[test]
fn batches_and_shared_beginnings_change_answers_by_rounding_only() {
    let (model, tokenizer) = load();
    let one = ModelScorer::new(&model, &tokenizer).unwrap();
    let many = ModelScorer::new(&model, &tokenizer).unwrap().with_batch(7).unwrap();
    let evaluation = Evaluation::new().with_limit(20).with_shots(1);
    for name in ["quiz_letters", "quiz_words", "quiz_partial", "quiz_last_word"] {
        let (_, mut alone) = evaluate(&one, task(name, 1), &evaluation);
        let (_, together) = evaluate(&many, task(name, 1), &evaluation);
        for (alone, together) in alone.iter_mut().zip(together) {
            for (left, right) in alone.responses.iter().zip(&together.responses) {
                let (Response::Pair(left, _), Response::Pair(right, _)) = (left, right) else {
                    panic!("{name}")
                };
                assert!((left - right).abs() < TOLERANCE, "{name}: {left} {right}");
            }
        }
    }
    // Sharing saves most of the tokens: four choices, one question.
    let tokens = |scorer: &ModelScorer<_>, name| {
        let before = kiln_eval::Scorer::tokens(scorer);
        evaluate(scorer, task(name, 2), &Evaluation::new().with_limit(20).with_shots(2));
        kiln_eval::Scorer::tokens(scorer) - before
    };
    let whole: usize = {
        let tasks = [task("quiz_words", 2)];
        let documents = tasks[0].0.prepare(&tasks[0].1, 2, Some(20), 1234).unwrap();
        let pairs = documents.iter().flat_map(|document| document.requests.pairs());
        pairs.map(|(context, continuation)| one.tokenize_pair(context, continuation).unwrap().0.len()).sum()
    };
    assert!(tokens(&many, "quiz_words") * 3 < whole as u64);
}

#[test]
fn what_does_not_fit_is_cut_from_the_left_or_refused() {
    let (model, tokenizer) = load();
    let scorer = ModelScorer::new(&model, &tokenizer).unwrap().with_max_length(12).unwrap();
    let (context, continuation) =
        ("The President of the United States shall have the power to", " veto a bill");
    let (input, targets) = scorer.tokenize_pair(context, continuation).unwrap();
    let whole = tokenizer.encode(&format!("{context}{continuation}"), true).unwrap();
    assert!(whole.len() > 13);
    assert_eq!(input, whole[whole.len() - 13..whole.len() - 1]);
    assert_eq!(targets, whole[whole.len() - targets.len()..]);
    // Whitespace goes to the word that follows.
    let moved = scorer.tokenize_pair("The President \n", "shall").unwrap();
    assert_eq!(moved, scorer.tokenize_pair("The President", " \nshall").unwrap());
    // No context: the end-of-text token, which is this tokenizer's BOS, stands for it.
    assert_eq!(scorer.tokenize_pair("", "The").unwrap().0, [0]);
    assert_eq!(
        scorer.tokenize_pair("", "<|endoftext|>The").unwrap(),
        scorer.tokenize_pair("", "The").unwrap()
    );
    for (context, continuation, part) in [
        ("The", "", "continuation: expected at least one token"),
        ("", "", "continuation: expected at least one token"),
        ("", "<|endoftext|>", "continuation: expected at least one token"),
        (" \n", "a", "context: expected at least one token"),
        ("The", &" President".repeat(13), "at most 12 tokens, the window, found 13 tokens"),
    ] {
        let error = scorer.tokenize_pair(context, continuation).unwrap_err().to_string();
        assert!(error.contains(part), "{context:?} {continuation:?}: {error}");
    }
    assert!(ModelScorer::new(&model, &tokenizer).unwrap().with_max_length(513).is_err());
    assert!(ModelScorer::new(&model, &tokenizer).unwrap().with_max_length(0).is_err());
    assert!(ModelScorer::new(&model, &tokenizer).unwrap().with_batch(0).is_err());
    assert!(ModelScorer::new(&model, &tokenizer).unwrap().with_prefix(2048).is_err());
}

#[test]
fn a_document_that_does_not_fit_is_named() {
    let (model, tokenizer) = load();
    let scorer = ModelScorer::new(&model, &tokenizer).unwrap().with_max_length(8).unwrap();
    let row = serde_json::json!({"goal": "a", "sol1": "b", "sol2": "shall not ".repeat(20), "label": 0});
    let fine = serde_json::json!({"goal": "a", "sol1": "b", "sol2": "c", "label": 0});
    let evaluated = [fine, row].map(|row| row.as_object().unwrap().clone()).to_vec();
    let tasks = [(Task::builtin("piqa").unwrap(), TaskData { evaluated, fewshot: vec![] })];
    let error = Evaluation::new().evaluate(&scorer, &tasks).unwrap_err().to_string();
    assert!(
        error.contains("task piqa, evaluated document 1: choice 1, continuation: expected at most 8 tokens"),
        "{error}"
    );
    let task = task("quiz_generate", 0);
    let error = Evaluation::new().with_limit(1).evaluate(&scorer, &[task]).unwrap_err().to_string();
    assert!(error.contains("quiz_generate, evaluated document 0: max_gen_toks"), "{error}");
}
