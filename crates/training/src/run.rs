//! A run from its first step to its last: what it does on the way, what it tells, and what it ends with.

use std::{
    collections::BTreeMap,
    fmt,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use kiln_quant_core::files::OutputFolder;
use serde::{Deserialize, Serialize};

use crate::{Dataset, PreferenceReport, Result, StepReport, error::Problem};

/// When [`Trainer::run`](crate::Trainer::run) evaluates, saves and gives up.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `evaluate_every` | 0 | steps between evaluations, the last step included; 0 never evaluates | |
/// | `held_out` | none | data whose loss is the score; without it the observer scores | |
/// | `patience` | none | evaluations in a row without a better score after which the run ends | at least 1 |
/// | `save_every` | 0 | steps between checkpoints; 0 saves only at the end | |
/// | `folder` | none | where checkpoints go: `last` and, with evaluations, `best` below it; made and claimed before the first step | |
/// | `keep` | 0 | so many of the newest checkpoints stay beside `last`, as `step-<steps>`; older ones are deleted | |
/// | `metrics` | none | a folder for `metrics.jsonl` (a line for each step, evaluation and further figure) and an event file of the same figures for TensorBoard; where it can't be written, the run goes on without it and says so | |
/// | `claimed` | none | the folder, if the caller has claimed it already | |
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct RunOptions {
    /// Steps between evaluations.
    pub evaluate_every: u64,
    /// Data whose loss is the score.
    pub held_out: Option<Arc<Dataset>>,
    /// Evaluations without a better score after which the run ends.
    pub patience: Option<u64>,
    /// Steps between checkpoints.
    pub save_every: u64,
    /// Where checkpoints go.
    pub folder: Option<PathBuf>,
    /// The folder, if the caller has claimed it already.
    pub claimed: Option<Arc<OutputFolder>>,
    /// Checkpoints that stay beside the last one.
    pub keep: usize,
    /// Where figures go.
    pub metrics: Option<PathBuf>,
}

impl RunOptions {
    /// A run without evaluations and checkpoints.
    pub fn new() -> Self {
        Self::default()
    }

    /// Scores the model by its loss on `held_out` after every `every` steps and at the end.
    #[must_use]
    pub fn with_held_out(mut self, held_out: impl Into<Arc<Dataset>>, every: u64) -> Self {
        (self.held_out, self.evaluate_every) = (Some(held_out.into()), every);
        self
    }

    /// Asks the observer for a score after every `every` steps and at the end.
    #[must_use]
    pub fn with_evaluations(mut self, every: u64) -> Self {
        self.evaluate_every = every;
        self
    }

    /// Sets `patience`.
    #[must_use]
    pub fn with_patience(mut self, patience: u64) -> Self {
        self.patience = Some(patience);
        self
    }

    /// Sets `save_every`.
    #[must_use]
    pub fn with_save_every(mut self, save_every: u64) -> Self {
        self.save_every = save_every;
        self
    }

    /// Sets `keep`.
    #[must_use]
    pub fn with_keep(mut self, keep: usize) -> Self {
        self.keep = keep;
        self
    }

    /// Sets `metrics`.
    #[must_use]
    pub fn with_metrics(mut self, folder: impl Into<PathBuf>) -> Self {
        self.metrics = Some(folder.into());
        self
    }

    /// Sets `folder`.
    #[must_use]
    pub fn with_folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Sets `folder` to one that the caller has claimed, and holds beyond the run.
    #[must_use]
    pub fn with_claimed(mut self, folder: impl Into<Arc<OutputFolder>>) -> Self {
        let claimed = folder.into();
        self.folder = Some(claimed.path().into());
        self.claimed = Some(claimed);
        self
    }

    /// Whether the options make sense together.
    pub(crate) fn check(&self) -> Result<()> {
        let fail = |name: &str, expected: &str| Err(Problem::new(name, expected, "none").argument());
        match self {
            Self { patience: Some(_), evaluate_every: 0, .. } => {
                fail("evaluate_every", "evaluations, for the patience to count")
            }
            Self { held_out: Some(_), evaluate_every: 0, .. } => {
                fail("evaluate_every", "evaluations, for the held-out data")
            }
            Self { folder: None, save_every: 1.., .. } => fail("folder", "a folder for the checkpoints"),
            Self { folder: None, keep: 1.., .. } => fail("folder", "a folder for the checkpoints to keep"),
            _ => Ok(()),
        }
    }

    /// What must be the same on all ranks.
    pub(crate) fn facts(&self) -> Result<BTreeMap<String, String>> {
        let held_out = self.held_out.as_ref().map(|data| data.fingerprint()).transpose()?;
        let facts = [
            ("evaluate_every", self.evaluate_every.to_string()),
            ("patience", format!("{:?}", self.patience)),
            ("save_every", self.save_every.to_string()),
            ("keep", self.keep.to_string()),
            ("held_out", held_out.unwrap_or_default()),
            // Each machine may have its own.
            ("folder", self.folder.is_some().to_string()),
        ];
        Ok(facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// The claim that the run holds itself.
    pub(crate) fn claim(&self) -> Result<Option<OutputFolder>> {
        match (&self.folder, &self.claimed) {
            (Some(folder), None) => Ok(Some(OutputFolder::claim(folder)?)),
            _ => Ok(None),
        }
    }
}

/// A score on the way.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Evaluation {
    /// Steps done before it.
    pub steps: u64,
    /// The score, lower is better: of held-out data the mean loss, in nats per token, or per pair or answer of a preference
    /// loss.
    pub score: f64,
    /// Whether it is the lowest so far.
    pub is_best: bool,
    /// How answers stood, where the score is a loss of preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceReport>,
}

/// Something that an observer measured of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What it is, as metrics name it.
    pub name: String,
    /// The value.
    pub value: f64,
}

/// Something that happened in a run. Its text is a line for a person.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step was done.
    Step(&'a StepReport),
    /// The model was scored.
    Evaluation(&'a Evaluation),
    /// A checkpoint was written into this folder.
    Checkpoint(&'a Path),
    /// Something of the run failed that it can go on without.
    Warning(&'a str),
    /// Something else was measured, after an evaluation; see [`Observer::figures`].
    Figure {
        /// Steps done before it.
        steps: u64,
        /// What it is.
        name: &'a str,
        /// The value.
        value: f64,
    },
    /// What the model made of a prompt, after an evaluation; from observers that generate.
    Sample {
        /// The prompt.
        prompt: &'a str,
        /// How it went on.
        text: &'a str,
    },
}

impl fmt::Display for Event<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(report) => write!(f, "step {}: loss {:.4}", report.step + 1, report.loss),
            Self::Evaluation(Evaluation { steps, score, is_best, .. }) => {
                let best = if *is_best { ", the best so far" } else { "" };
                write!(f, "after {steps} steps: score {score:.4}{best}")
            }
            Self::Checkpoint(folder) => write!(f, "checkpoint written to {}", folder.display()),
            Self::Warning(text) => f.write_str(text),
            Self::Figure { steps, name, value } => write!(f, "after {steps} steps: {name} {value:.4}"),
            Self::Sample { prompt, text } => write!(f, "{prompt} ⟶ {text}"),
        }
    }
}

/// Hears what happens in a run, may score the model, and may stop the run.
///
/// A closure `FnMut(&Event) -> ControlFlow<()>` is an observer too, and `()` one that doesn't listen.
pub trait Observer<M> {
    /// After every step, evaluation, checkpoint and warning; [`ControlFlow::Break`] ends the run after the step.
    fn on_event(&mut self, _event: &Event<'_>) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A score of the model after `steps` steps, lower is better; asked for as [`RunOptions::evaluate_every`] says where
    /// there is no held-out data.
    ///
    /// # Errors
    /// Whatever scoring meets; it ends the run.
    fn score(
        &mut self,
        _model: &M,
        _steps: u64,
    ) -> std::result::Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(None)
    }

    /// After every evaluation: further figures of the model, which all observers are told as [`Event::Figure`], and which are
    /// written with the others.
    ///
    /// # Errors
    /// Whatever measuring meets; it ends the run.
    fn figures(
        &mut self,
        _model: &M,
        _evaluation: &Evaluation,
    ) -> std::result::Result<Vec<Figure>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Vec::new())
    }

    /// After every evaluation: a look at the model, to generate from it. [`ControlFlow::Break`] ends the run.
    ///
    /// # Errors
    /// Whatever that meets; it ends the run.
    fn inspect(
        &mut self,
        _model: &M,
        _evaluation: &Evaluation,
    ) -> std::result::Result<ControlFlow<()>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(ControlFlow::Continue(()))
    }
}

impl<M> Observer<M> for () {}

/// Both hear of everything; a score is the first one's that has one, figures are those of both, and either may end the run.
impl<M, A: Observer<M>, B: Observer<M>> Observer<M> for (A, B) {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        let (first, second) = (self.0.on_event(event), self.1.on_event(event));
        if first.is_break() { first } else { second }
    }

    fn score(
        &mut self,
        model: &M,
        steps: u64,
    ) -> std::result::Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        match self.0.score(model, steps)? {
            Some(score) => Ok(Some(score)),
            None => self.1.score(model, steps),
        }
    }

    fn figures(
        &mut self,
        model: &M,
        evaluation: &Evaluation,
    ) -> std::result::Result<Vec<Figure>, Box<dyn std::error::Error + Send + Sync>> {
        let mut figures = self.0.figures(model, evaluation)?;
        figures.extend(self.1.figures(model, evaluation)?);
        Ok(figures)
    }

    fn inspect(
        &mut self,
        model: &M,
        evaluation: &Evaluation,
    ) -> std::result::Result<ControlFlow<()>, Box<dyn std::error::Error + Send + Sync>> {
        let (first, second) = (self.0.inspect(model, evaluation)?, self.1.inspect(model, evaluation)?);
        Ok(if first.is_break() { first } else { second })
    }
}

impl<M, F: FnMut(&Event<'_>) -> ControlFlow<()>> Observer<M> for F {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        self(event)
    }
}

/// What a run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunReport {
    /// The steps of this call, in their order.
    pub steps: Vec<StepReport>,
    /// The evaluations of this call, in their order.
    pub evaluations: Vec<Evaluation>,
    /// Why there are no more.
    pub end: RunEnd,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RunEnd {
    /// All steps are done.
    Completed,
    /// Patience ran out: no evaluation was better for long enough.
    Patience,
    /// The observer said so.
    Stopped,
}

impl fmt::Display for RunEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Completed => "all steps are done",
            Self::Patience => "the score stopped falling",
            Self::Stopped => "it was stopped",
        })
    }
}
