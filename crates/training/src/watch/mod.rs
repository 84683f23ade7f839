//! What a run writes down of itself: JSON lines for programs, event files for TensorBoard.

mod tensorboard;

use std::{
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
};

use kiln_quant_core::files::write_atomically;
use serde::Serialize;
use serde_json::{Value, json};

use self::tensorboard::EventFile;
use crate::{Error, Evaluation, Event, PreferenceReport, Result, StepReport};

/// The file of JSON lines.
const LINES: &str = "metrics.jsonl";

/// Writes what happens in a run into a folder.
///
/// `metrics.jsonl` has a line for each step and each evaluation: a [`StepReport`] or an [`Evaluation`] with the key `event`
/// (`step`, `evaluation`); and for each further figure (`figure`: `steps`, `name`, `value`). An event file has the same figures
/// for TensorBoard, under `train/` and `held_out/`, an observer's score as `score`, further ones under their names, by the number of steps done. A run that goes on goes on in the same lines; of steps that it does again, the earlier lines are taken out.
/// The lines of another run are kept beside, as `metrics-<number>.jsonl`.
#[derive(Debug)]
pub(crate) struct Metrics {
    lines: File,
    events: EventFile,
    folder: PathBuf,
    /// The tag of scores.
    score: &'static str,
}

impl Metrics {
    /// Opens the files of a run of which `steps` are done; its score is the loss on what is `held_out`, or its observer's.
    pub(crate) fn open(folder: &Path, steps: u64, held_out: bool) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let path = folder.join(LINES);
        match steps {
            0 => put_aside(folder, &path)?,
            _ => keep_lines(&path, steps)?,
        }
        let lines = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path))?;
        let events = EventFile::create(folder, steps).map_err(Error::io(folder))?;
        let score = if held_out { "held_out/loss" } else { "score" };
        Ok(Self { lines, events, folder: folder.into(), score })
    }

    /// Writes an event down.
    pub(crate) fn write(&mut self, event: &Event<'_>) -> Result<()> {
        let written = match event {
            Event::Step(report) => self.line("step", report).and_then(|()| self.step(report)),
            Event::Evaluation(evaluation) => {
                self.line("evaluation", evaluation).and_then(|()| self.evaluation(evaluation))
            }
            Event::Figure { steps, name, value } => {
                let line = json!({ "steps": steps, "name": name, "value": value });
                self.line("figure", &line).and_then(|()| self.events.scalars(*steps, &[(name, *value)]))
            }
            _ => Ok(()),
        };
        written.map_err(Error::io(&self.folder))
    }

    fn line(&mut self, event: &str, report: &impl Serialize) -> std::io::Result<()> {
        let mut line = json!({ "event": event });
        if let (Some(line), Value::Object(fields)) = (line.as_object_mut(), serde_json::to_value(report)?) {
            line.extend(fields);
        }
        // At once, so that a run that is killed leaves whole lines.
        self.lines.write_all(format!("{line}\n").as_bytes())
    }

    fn step(&mut self, report: &StepReport) -> std::io::Result<()> {
        let mut scalars = vec![
            ("train/loss", report.loss),
            ("train/grad_norm", report.grad_norm),
            ("train/learning_rate", report.learning_rate),
            ("train/tokens_per_second", report.tokens as f64 / report.seconds),
        ];
        let tags = ["train/reward_chosen", "train/reward_rejected", "train/accuracy"];
        scalars.extend(of_preference(tags, report.preference));
        self.events.scalars(report.step + 1, &scalars)
    }

    fn evaluation(&mut self, evaluation: &Evaluation) -> std::io::Result<()> {
        let mut scalars = vec![(self.score, evaluation.score)];
        let tags = ["held_out/reward_chosen", "held_out/reward_rejected", "held_out/accuracy"];
        scalars.extend(of_preference(tags, evaluation.preference));
        self.events.scalars(evaluation.steps, &scalars)
    }
}

fn of_preference(
    tags: [&'static str; 3],
    report: Option<PreferenceReport>,
) -> impl Iterator<Item = (&'static str, f64)> {
    let values = report.map_or([None; 3], |report| [report.chosen, report.rejected, report.accuracy]);
    tags.into_iter().zip(values).filter_map(|(tag, value)| Some((tag, value?)))
}

/// Gives the lines of another run a name of their own.
fn put_aside(folder: &Path, path: &Path) -> Result<()> {
    if path.metadata().map_or(0, |metadata| metadata.len()) == 0 {
        return Ok(());
    }
    let name = |number: u32| folder.join(format!("metrics-{number}.jsonl"));
    let free = (1..).map(name).find(|name| !name.exists());
    free.map_or(Ok(()), |name| std::fs::rename(path, name).map_err(Error::io(path)))
}

/// Takes out what a run wrote after `steps` steps, and what it didn't write to the end.
fn keep_lines(path: &Path, steps: u64) -> Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let is_kept = |line: &[u8]| {
        let line: Value = serde_json::from_slice(line).unwrap_or_default();
        let done = line["steps"].as_u64().or_else(|| line["step"].as_u64().map(|step| step + 1));
        done.is_some_and(|done| done <= steps)
    };
    write_atomically(path, |to| {
        for line in BufReader::new(file).split(b'\n') {
            let line = line?;
            if is_kept(&line) {
                to.write_all(&line)?;
                to.write_all(b"\n")?;
            }
        }
        Ok(())
    })?;
    Ok(())
}
