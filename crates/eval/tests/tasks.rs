//! Runs of tasks on a stand-in for a model.

use std::{cell::Cell, fs, ops::ControlFlow, path::Path, sync::Arc, thread, time::Duration};

use kiln_distributed::{Communicator, threads};
use kiln_eval::{
    Comparison, Error, Evaluation, GenerateRequest, Group, Metric, OnAnswer, Report, Response, Result,
    Scorer, SharedScorer, SignificanceTest, Task, TaskData, read_samples,
};
use serde_json::{Value, json};

/// Likes short continuations, or long ones; writes what it read.
#[derive(Default)]
struct Stub {
    likes_long: bool,
    asked: Cell<usize>,
    /// The request that it can't answer.
    refuses: Option<usize>,
}

impl Stub {
    fn answer(&self, request: usize, response: Response, on_answer: OnAnswer) -> Result<bool> {
        if self.refuses == Some(request) {
            let (what, expected, found) = ("continuation".into(), "less".into(), "more".into());
            return Err(Error::Request { request, what, expected, found });
        }
        self.asked.set(self.asked.get() + 1);
        Ok(on_answer(request, response)?.is_break())
    }
}

impl Scorer for Stub {
    fn loglikelihood(&self, requests: &[(String, String)], on_answer: OnAnswer) -> Result<()> {
        // From the last to the first: answers may come in any order.
        for (index, (_, continuation)) in requests.iter().enumerate().rev() {
            let length = continuation.chars().count() as f64;
            let ll = if self.likes_long { length - 100.0 } else { -length };
            if self.answer(index, Response::Pair(ll, length < 5.0), on_answer)? {
                break;
            }
        }
        Ok(())
    }

    fn loglikelihood_rolling(&self, requests: &[String], on_answer: OnAnswer) -> Result<()> {
        for (index, text) in requests.iter().enumerate() {
            if self.answer(index, Response::Rolling(-(text.len() as f64)), on_answer)? {
                break;
            }
        }
        Ok(())
    }

    fn generate_until(&self, requests: &[GenerateRequest], on_answer: OnAnswer) -> Result<()> {
        for (index, request) in requests.iter().enumerate() {
            assert_eq!(request.until[0], "Question:");
            if self.answer(index, Response::Text(request.context.clone()), on_answer)? {
                break;
            }
        }
        Ok(())
    }
}

fn rows(rows: Value) -> TaskData {
    let evaluated = rows.as_array().unwrap().iter().map(|row| row.as_object().unwrap().clone()).collect();
    TaskData { evaluated, fewshot: vec![] }
}

/// Six questions; the short answer is right in four of them.
fn piqa() -> (Task, TaskData) {
    let rows_of = (0..6)
        .map(|i| json!({"goal": format!("g{i}"), "sol1": "short", "sol2": "rather long", "label": i / 4}));
    (Task::builtin("piqa").unwrap(), rows(rows_of.collect()))
}

fn lambada() -> (Task, TaskData) {
    (Task::builtin("lambada_openai").unwrap(), rows(json!([{"text": "a b cd"}, {"text": "a b defghi"}])))
}

fn wikitext() -> (Task, TaskData) {
    (Task::builtin("wikitext").unwrap(), rows(json!([{"page": "one two @-@ three"}])))
}

fn gsm8k() -> (Task, TaskData) {
    let row = json!([{"question": "What is #### 12, or 7?", "answer": "It is.\n#### 12"}]);
    (Task::builtin("gsm8k").unwrap(), rows(row))
}

fn all() -> Vec<(Task, TaskData)> {
    vec![piqa(), lambada(), wikitext(), gsm8k()]
}

fn evaluation() -> Evaluation {
    Evaluation::new().with_shots(0).with_resamples(2000).with_model("stub")
}

fn run(evaluation: &Evaluation, stub: &Stub) -> Result<Report> {
    evaluation.evaluate(stub, &all())
}

#[test]
fn figures_of_all_kinds_of_tasks_equal_a_calculation_by_hand() {
    let report = run(&evaluation(), &Stub::default()).unwrap();
    let found = |task: &str, metric| report.task(task).unwrap().metric(metric).unwrap().clone();
    let accuracy = found("piqa", Metric::Acc);
    assert_eq!((accuracy.value, accuracy.filter.as_str()), (4.0 / 6.0, "none"));
    // sqrt(4/3 / 5) / sqrt(6).
    assert!((accuracy.stderr.unwrap() - (4.0f64 / 3.0 / 5.0 / 6.0).sqrt()).abs() < 1e-12);
    // Per character the long one costs less: -12/11 against -6/5.
    assert_eq!(found("piqa", Metric::AccNorm).value, 2.0 / 6.0);
    // " cd" and " defghi".
    assert!((found("lambada_openai", Metric::Perplexity).value - 5f64.exp()).abs() < 1e-9);
    assert_eq!(found("lambada_openai", Metric::Acc).value, 0.5);
    // "one two-three" has 13 bytes; the original has 4 words and 17 bytes.
    assert!((found("wikitext", Metric::WordPerplexity).value - (13f64 / 4.0).exp()).abs() < 1e-9);
    assert!((found("wikitext", Metric::BitsPerByte).value - 13.0 / 17.0 / 2f64.ln()).abs() < 1e-12);
    assert_eq!(found("wikitext", Metric::BitsPerByte).stderr, None);
    let matches = &report.task("gsm8k").unwrap().metrics;
    let matches: Vec<_> = matches.iter().map(|found| (found.filter.as_str(), found.value)).collect();
    // "12," is 12 when commas are ignored; the last number is 7.
    assert_eq!(matches, [("flexible-extract", 0.0), ("strict-match", 1.0)]);
    let table = report.to_markdown();
    assert!(table.contains("| piqa | 0 | 6 | acc | none | ↑ | 0.6667 | ± | 0.2108 |"), "{table}");
    assert!(table.contains("| wikitext | 0 | 1 | bits_per_byte | none | ↓ | 1.1032 | | N/A |"), "{table}");
}

/// The log's lines after the first, in any order.
fn lines(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    let mut lines: Vec<String> = text.lines().skip(1).map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn an_interrupted_run_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, log) = (folder.path().join("whole.jsonl"), folder.path().join("log.jsonl"));
    let expected = run(&evaluation().with_samples(&whole), &Stub::default()).unwrap();
    let (stub, logged) = (Stub::default(), evaluation().with_samples(&log));
    let result = logged.evaluate_with(&stub, &all(), &mut |progress| {
        assert_eq!((progress.total, progress.resumed), (10, 0));
        if progress.documents == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(Error::Interrupted { documents: 4, total: 10 })), "{result:?}");
    assert_eq!(read_samples(&log).unwrap().len(), 4);
    // The machine stopped in the middle of a line.
    let mut bytes = fs::read(&log).unwrap();
    bytes.extend_from_slice(b"{\"task\":\"piqa\",\"shots\":0,\"docum");
    fs::write(&log, bytes).unwrap();
    let before = stub.asked.get();
    let mut heard = Vec::new();
    let report = logged.evaluate_with(&stub, &all(), &mut |progress| {
        heard.push((progress.documents, progress.resumed));
        ControlFlow::Continue(())
    });
    let mut report = report.unwrap();
    assert_eq!(heard.first(), Some(&(5, 4)));
    assert_eq!(heard.last(), Some(&(10, 4)));
    // Left were four documents with two choices each, a text and a generation.
    assert_eq!(stub.asked.get() - before, 10);
    report.documents_per_second = expected.documents_per_second;
    assert_eq!(report, expected);
    assert_eq!(lines(&log), lines(&whole));
    // Once more there is nothing to do.
    let idle = Stub { refuses: Some(0), ..Stub::default() };
    let again = logged.evaluate(&idle, &all()).unwrap();
    assert_eq!((again.tasks, idle.asked.get()), (expected.tasks, 0));
}

#[test]
fn the_log_of_another_run_is_not_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("log.jsonl");
    let logged = evaluation().with_samples(&log);
    run(&logged, &Stub::default()).unwrap();
    let message = |evaluation: &Evaluation, tasks: &[(Task, TaskData)]| {
        evaluation.evaluate(&Stub::default(), tasks).unwrap_err().to_string()
    };
    let other = message(&logged.clone().with_model("another"), &all());
    assert!(other.contains("log.jsonl: line 1") && other.contains("another"), "{other}");
    let mut tasks = vec![piqa()];
    tasks[0].1.evaluated[2]["goal"] = json!("changed");
    let changed = message(&logged, &tasks);
    assert!(changed.contains("task piqa, document 2: expected this run's requests"), "{changed}");
    // Other examples are another run of the task, in the same log.
    let mut tasks = vec![piqa()];
    tasks[0].1.fewshot = tasks[0].1.evaluated.clone();
    let stub = Stub::default();
    logged.clone().with_shots(1).evaluate(&stub, &tasks).unwrap();
    assert_eq!(stub.asked.get(), 12);
    let good = fs::read_to_string(&log).unwrap();
    for (number, line) in [(0, "{}"), (2, "nonsense"), (3, "{\"task\": 1}")] {
        let mut lines: Vec<&str> = good.lines().collect();
        lines[number] = line;
        fs::write(&log, lines.join("\n") + "\n").unwrap();
        let found = message(&logged, &all());
        assert!(found.contains(&format!("log.jsonl: line {}", number + 1)), "{found}");
        assert_eq!(
            fs::read_to_string(&log).unwrap().lines().nth(number),
            Some(line),
            "the log is left alone"
        );
    }
    fs::write(&log, good.replace("[-6.0,false]", "\"text\"")).unwrap();
    assert!(message(&logged, &[piqa()]).contains("answers of the requests' kind"));
}

#[test]
fn bad_options_and_requests_are_errors_that_name_them() {
    let message = |evaluation: &Evaluation, tasks: &[(Task, TaskData)], stub: &Stub| {
        evaluation.evaluate(stub, tasks).unwrap_err().to_string()
    };
    let stub = Stub::default();
    for (found, part) in [
        (message(&evaluation().with_limit(0), &all(), &stub), "Evaluation.limit"),
        (message(&evaluation().with_resamples(1), &all(), &stub), "Evaluation.resamples"),
        (message(&evaluation(), &[], &stub), "tasks: expected at least one"),
        (message(&evaluation(), &[piqa(), piqa()], &stub), "tasks: expected each task once, found piqa"),
        (
            message(&evaluation(), &[(Task::builtin("piqa").unwrap(), TaskData::default())], &stub),
            "task piqa",
        ),
        (message(&evaluation().with_shots(2), &[piqa()], &stub), "few-shot examples"),
        (message(&evaluation().with_samples("/no/folder/log"), &all(), &stub), "/no/folder/log"),
        (
            message(&evaluation(), &all(), &Stub { refuses: Some(5), ..Stub::default() }),
            "task piqa, evaluated document 2: choice 1, continuation: expected less, found more",
        ),
    ] {
        assert!(found.contains(part), "no \"{part}\" in: {found}");
    }
    assert_eq!(stub.asked.get(), 0);
}

#[test]
fn reports_are_read_as_written_and_compared_in_pairs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let mut first = run(&evaluation(), &Stub::default()).unwrap();
    // A quick decimal parser returns this figure's neighbour.
    first.documents_per_second = 104_645.200_447_881_43;
    first.write(&path).unwrap();
    assert_eq!(Report::read(&path).unwrap(), first);
    let second =
        run(&evaluation().with_model("long"), &Stub { likes_long: true, ..Stub::default() }).unwrap();
    let comparison = Comparison::new(&first, &second).unwrap();
    assert_eq!((comparison.first.as_str(), comparison.second.as_str()), ("stub", "long"));
    let accuracy = &comparison.metrics[0];
    assert_eq!((accuracy.metric, accuracy.test), (Metric::Acc, SignificanceTest::Mcnemar));
    assert!((accuracy.difference + 2.0 / 6.0).abs() < 1e-12);
    // 4 lost, 2 gained: 2 * (1 + 6 + 15) / 64.
    assert!((accuracy.p_value - 44.0 / 64.0).abs() < 1e-12);
    // Differences of -1 (4) and +1 (2): variance 16/3 / 5.
    assert!((accuracy.stderr.unwrap() - (16.0f64 / 3.0 / 5.0 / 6.0).sqrt()).abs() < 1e-12);
    let perplexity = comparison.metrics.iter().find(|found| found.metric == Metric::Perplexity).unwrap();
    assert_eq!((perplexity.test, perplexity.stderr), (SignificanceTest::Permutation, None));
    assert!(
        comparison.to_markdown().contains("| piqa | acc | 0.6667 | 0.3333 | -0.3333 | 0.4216 | 0.6875 |")
    );
    // Other documents aren't a pair.
    let limited = run(&evaluation().with_limit(1), &Stub::default()).unwrap();
    let error = Comparison::new(&first, &limited).unwrap_err().to_string();
    assert!(error.contains("task piqa") && error.contains("1 documents"), "{error}");
    fs::write(&path, "{}").unwrap();
    assert!(Report::read(&path).unwrap_err().to_string().contains("report.json"));
}

#[test]
fn groups_have_micro_and_macro_means() {
    let subject = |name: &str, right: &[u8]| {
        let choices = ["a", "b", "c", "d"];
        let row = |answer: &u8| json!({"question": format!("{name} {answer}"), "choices": choices, "answer": answer});
        let mut data = rows(right.iter().map(row).collect());
        // Questions may repeat; rows needn't differ.
        data.fewshot = data.evaluated.clone();
        (Task::builtin(name).unwrap(), data)
    };
    // All choices are equally likely, so the first is chosen.
    let tasks = [subject("mmlu_anatomy", &[0, 0, 0, 1]), subject("mmlu_virology", &[0, 1])];
    let mut report = evaluation().evaluate(&Stub::default(), &tasks).unwrap();
    assert!(report.groups.is_empty());
    let group = |tasks: &[&str]| Group {
        group: "both".into(),
        tasks: tasks.iter().map(|task| (*task).to_owned()).collect(),
    };
    assert!(!report.add_group(&group(&["mmlu_anatomy", "mmlu_astronomy"])));
    assert!(report.add_group(&group(&["mmlu_anatomy", "mmlu_virology"])));
    let found = &report.groups[0];
    assert_eq!((found.micro, found.macro_, found.documents), (4.0 / 6.0, 0.625, 6));
    // Variances 0.75 / 3 and 0.5 / 1 of the scores: (3 * 0.25 + 1 * 0.5) / (6 - 2), by 6 documents.
    assert!((found.micro_stderr.unwrap() - (1.25f64 / 4.0 / 6.0).sqrt()).abs() < 1e-12);
    assert!(report.to_markdown().contains("| both | 0 | 6 | acc, micro | none | ↑ | 0.6667 |"));
}

/// What each of `count` ranks finds, of which the first evaluates.
fn on_ranks<T: Send>(
    count: usize,
    stub: impl Fn(usize) -> Stub + Sync,
    first: impl Fn(&SharedScorer<Stub>) -> Result<T> + Sync,
) -> (Result<T>, Vec<Result<()>>) {
    let (stub, first) = (&stub, &first);
    thread::scope(|scope| {
        let mut ranks = threads(count, Duration::from_secs(60)).into_iter().map(Arc::new);
        let own = ranks.next().unwrap();
        let serve = |rank: Arc<kiln_distributed::Thread>| {
            scope.spawn(move || SharedScorer::new(stub(rank.rank()), rank).serve())
        };
        let others: Vec<_> = ranks.map(serve).collect();
        let scorer = SharedScorer::new(stub(0), own);
        let found = scorer.finish(first(&scorer));
        drop(scorer);
        (found, others.into_iter().map(|other| other.join().unwrap()).collect())
    })
}

#[test]
fn ranks_share_the_requests_of_tasks() {
    let expected = run(&evaluation(), &Stub::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for count in [1, 2, 3, 7] {
        let log = folder.path().join(format!("{count}.jsonl"));
        let evaluation = evaluation().with_samples(&log);
        let (found, others) =
            on_ranks(count, |_| Stub::default(), |scorer| evaluation.evaluate(scorer, &all()));
        let found = found.unwrap();
        assert!(others.iter().all(Result::is_ok), "{others:?}");
        assert_eq!(found.tasks, expected.tasks, "{count} ranks");
        // Gone on from the log nothing is asked again.
        let again = run(&evaluation, &Stub { refuses: Some(0), ..Stub::default() }).unwrap();
        assert_eq!(again.tasks, expected.tasks);
    }
}

#[test]
fn a_request_that_one_rank_refuses_ends_all() {
    let stub = |rank: usize| Stub { refuses: (rank == 1).then_some(0), ..Stub::default() };
    let (found, others) = on_ranks(2, stub, |scorer| evaluation().evaluate(scorer, &all()));
    // The first of the second half of fourteen, which are those of two tasks.
    let expected = "request 7: continuation: expected less, found more";
    assert_eq!(found.unwrap_err().to_string(), format!("rank 1 failed: {expected}"));
    assert_eq!(others[0].as_ref().unwrap_err().to_string(), expected);
}

/// Such as a log that can't be written: the others hear of it.
#[test]
fn what_fails_on_the_first_rank_alone_ends_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = evaluation().with_samples(folder.path().join("no/such/folder.jsonl"));
    let (found, others) = on_ranks(2, |_| Stub::default(), |scorer| nowhere.evaluate(scorer, &all()));
    let own = found.unwrap_err().to_string();
    assert_eq!(others[0].as_ref().unwrap_err().to_string(), format!("rank 0 failed: {own}"));
}
