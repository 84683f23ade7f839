//! What a run writes down, keeps and says.

use std::{fs, ops::ControlFlow, path::Path};

use kiln_training::{Evaluation, Event, Figure, Observer, RunOptions};
use serde_json::Value;

use crate::trainer::{LoraModel, config, documents, trainer};

fn lines(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Names of the entries that begin so, sorted.
fn names(folder: &Path, prefix: &str) -> Vec<String> {
    let entries =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut found: Vec<String> = entries.filter(|name| name.starts_with(prefix)).collect();
    found.sort();
    found
}

/// Ends the run with an error at an evaluation.
struct DiesAt(u64);

impl Observer<LoraModel> for DiesAt {
    fn inspect(
        &mut self,
        _: &LoraModel,
        evaluation: &Evaluation,
    ) -> Result<ControlFlow<()>, Box<dyn std::error::Error + Send + Sync>> {
        if evaluation.steps == self.0 { Err("the end".into()) } else { Ok(ControlFlow::Continue(())) }
    }
}

/// A run that died after its last checkpoint and went on has the lines of one that didn't.
#[test]
fn figures_are_those_of_one_run_however_often_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let options = |name: &str| {
        let folder = folder.path().join(name);
        let options = RunOptions::new().with_held_out(documents(), 2).with_save_every(3);
        options.with_metrics(folder.join("figures")).with_folder(folder)
    };
    trainer(config(2, 1)).run(&options("whole")).unwrap();
    let error = trainer(config(2, 1)).run_with(&options("dead"), &mut DiesAt(4)).unwrap_err();
    assert_eq!(error.to_string(), "the end");
    let figures = folder.path().join("dead/figures");
    assert_eq!(lines(&figures).len(), 4 + 2);
    // It was writing.
    let mut file = fs::OpenOptions::new().append(true).open(figures.join("metrics.jsonl")).unwrap();
    std::io::Write::write_all(&mut file, br#"{"event": "step", "st"#).unwrap();
    let resumed = trainer(config(2, 1)).resumed(folder.path().join("dead/last")).unwrap();
    let mut resumed = resumed;
    resumed.run(&options("dead")).unwrap();
    let timeless = |name: &str| {
        let mut lines = lines(&folder.path().join(name).join("figures"));
        lines.iter_mut().filter_map(Value::as_object_mut).for_each(|line| drop(line.remove("seconds")));
        lines
    };
    assert_eq!(timeless("dead"), timeless("whole"));
    let events: Vec<Value> = timeless("whole").iter().map(|line| line["event"].clone()).collect();
    assert_eq!(events.iter().filter(|event| *event == "evaluation").count(), 3);
    assert_eq!(names(&figures, "events.out.tfevents.").len(), 2);
    // Another run in the same place leaves these lines where they can be found.
    trainer(config(2, 1)).run(&RunOptions::new().with_metrics(&figures)).unwrap();
    assert_eq!(names(&figures, "metrics"), ["metrics-1.jsonl", "metrics.jsonl"]);
    assert_eq!(lines(&figures).len(), 6);
}

#[test]
fn the_newest_checkpoints_stay_and_foreign_files_with_them() {
    let folder = tempfile::tempdir().unwrap();
    let mut run = trainer(config(2, 1));
    let note = folder.path().join("step-2/note.txt");
    let mut leaves_a_note = |event: &Event<'_>| {
        if matches!(event, Event::Checkpoint(path) if path.ends_with("step-2")) {
            fs::write(&note, "mine").unwrap();
        }
        ControlFlow::<()>::Continue(())
    };
    fs::create_dir(folder.path().join("step-by-step")).unwrap();
    let options = RunOptions::new().with_folder(folder.path()).with_save_every(1).with_keep(2);
    run.run_with(&options, &mut leaves_a_note).unwrap();
    assert_eq!(names(folder.path(), "step-"), ["step-2", "step-5", "step-6", "step-by-step"]);
    assert_eq!(names(&folder.path().join("step-2"), ""), ["note.txt"]);
    assert!(trainer(config(2, 1)).resumed(folder.path().join("step-5")).is_ok());
}

#[test]
fn figures_that_can_not_be_written_are_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let mut warnings = Vec::new();
    let mut listens = |event: &Event<'_>| {
        if let Event::Warning(text) = event {
            warnings.push((*text).to_owned());
        }
        ControlFlow::<()>::Continue(())
    };
    let options = RunOptions::new().with_metrics(file.join("figures"));
    let report = trainer(config(2, 1)).run_with(&options, &mut listens).unwrap();
    assert_eq!(report.steps.len(), 6, "the run goes on");
    assert!(matches!(warnings.as_slice(), [text] if text.contains("figures")), "{warnings:?}");
}

#[test]
fn options_that_do_nothing_are_refused() {
    let refused = |options: RunOptions| trainer(config(2, 1)).run(&options).unwrap_err().to_string();
    assert!(refused(RunOptions::new().with_patience(2)).starts_with("evaluate_every:"));
    assert!(refused(RunOptions::new().with_held_out(documents(), 0)).starts_with("evaluate_every:"));
    assert!(refused(RunOptions::new().with_keep(1)).starts_with("folder:"));
    assert!(refused(RunOptions::new().with_save_every(1)).starts_with("folder:"));
}

/// Two listeners hear all; either ends the run.
#[test]
fn two_observers_are_one() {
    let (mut a, mut b) = (0, 0);
    let first = |_: &Event<'_>| {
        a += 1;
        ControlFlow::Continue(())
    };
    let second = |_: &Event<'_>| {
        b += 1;
        if b == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = trainer(config(2, 1)).run_with(&RunOptions::new(), &mut (first, second)).unwrap();
    assert_eq!((report.steps.len(), a, b), (3, 3, 3));
}

/// Measures something of its own.
struct Measures(Vec<(u64, String, f64)>);

impl Observer<LoraModel> for Measures {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        if let Event::Figure { steps, name, value } = event {
            self.0.push((*steps, (*name).into(), *value));
        }
        ControlFlow::Continue(())
    }

    fn figures(
        &mut self,
        _: &LoraModel,
        evaluation: &Evaluation,
    ) -> Result<Vec<Figure>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(vec![Figure { name: "quiz acc".into(), value: evaluation.steps as f64 / 8.0 }])
    }
}

#[test]
fn further_figures_are_told_to_all_and_written_with_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let options = RunOptions::new().with_held_out(documents(), 2).with_metrics(folder.path());
    let mut both = (Measures(Vec::new()), Measures(Vec::new()));
    let report = trainer(config(2, 1)).run_with(&options, &mut both).unwrap();
    let steps = report.evaluations.iter().map(|evaluation| evaluation.steps);
    // Each of the two measured, and each heard of both.
    let expected: Vec<_> = steps
        .flat_map(|steps| [(); 2].map(|()| (steps, "quiz acc".to_owned(), steps as f64 / 8.0)))
        .collect();
    assert!(!expected.is_empty() && both.0.0 == expected && both.1.0 == expected, "{:?}", both.0.0);
    let lines = lines(folder.path());
    let figures = lines.iter().filter(|line| line["event"] == "figure");
    let found: Vec<_> = figures
        .map(|line| {
            (
                line["steps"].as_u64().unwrap(),
                line["name"].as_str().unwrap().to_owned(),
                line["value"].as_f64().unwrap(),
            )
        })
        .collect();
    assert_eq!(found, expected);
    let events = names(folder.path(), "events").pop().unwrap();
    let bytes = fs::read(folder.path().join(events)).unwrap();
    assert!(bytes.windows(8).any(|window| window == b"quiz acc"));
}
