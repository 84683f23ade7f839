//! The loop: micro-batches to gradients to a step of AdamW.

use std::{
    collections::BTreeMap,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Instant,
};

use burn::optim::{GradientsAccumulator, ModuleOptimizer};
use kiln_models::{CausalLm, DriverOptions, PendingLoss, Place, Recompute, queue_gradients};
use kiln_quant_core::trained_values;
use serde::{Deserialize, Serialize};

use crate::{
    Batch, BatchOptions, Batches, Dataset, Error, Evaluation, Event, Observer, Result, RunEnd, RunOptions,
    RunReport, Schedule, ScheduleKind, adamw, batch, checkpoint, evaluate,
    gradients::{scale, squares},
    trainable::{self, Parameter},
};

/// How to train. Everything that decides the numbers is here or in the data's options; a checkpoint refuses to go on
/// under another configuration, but for more `steps` where the learning rate doesn't depend on them.
///
/// | name | default | purpose | range |
/// | --- | --- | --- | --- |
/// | `steps` | required | optimizer steps | at least 1 |
/// | `batch` | required | rows of a micro-batch, their order and packing | |
/// | `accumulate` | 1 | micro-batches of a step | at least 1 |
/// | `lr` | 3e-4 | peak learning rate | above 0 |
/// | `warmup` | 0 | steps of linear warm-up | |
/// | `schedule` | constant | what follows the warm-up | |
/// | `clip` | 1 | largest global norm of the gradient; `None` leaves it | above 0 |
/// | `weight_decay` | 0 | decoupled decay | at least 0 |
/// | `betas` | 0.9, 0.999 | AdamW's averages | 0 to 1 |
/// | `eps` | 1e-8 | AdamW's division | above 0 |
/// | `recompute` | none | what the backward pass computes again | |
/// | `logit_rows` | 256 | rows of logits held at once | at least 1 |
/// | `max_skipped` | 0 | steps that are passed over because loss or gradient isn't finite, before that ends the run | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainerConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Rows of a micro-batch, their order and packing.
    pub batch: BatchOptions,
    /// Micro-batches of a step.
    pub accumulate: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// What follows the warm-up.
    pub schedule: ScheduleKind,
    /// Largest global norm of the gradient.
    pub clip: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// AdamW's averages.
    pub betas: [f32; 2],
    /// Added to AdamW's divisor.
    pub eps: f32,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Rows of logits held at once.
    pub logit_rows: usize,
    /// Steps of a run that may be passed over because loss or gradient isn't finite.
    pub max_skipped: u64,
}

impl TrainerConfig {
    /// `steps` steps of one micro-batch each, other options at their defaults. `batch` may be the number of rows.
    pub fn new(steps: u64, batch: impl Into<BatchOptions>) -> Self {
        Self {
            steps,
            batch: batch.into(),
            accumulate: 1,
            lr: 3e-4,
            warmup: 0,
            schedule: ScheduleKind::Constant,
            clip: Some(1.0),
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            recompute: Recompute::None,
            logit_rows: 256,
            max_skipped: 0,
        }
    }

    /// Sets `steps`.
    #[must_use]
    pub fn with_steps(mut self, steps: u64) -> Self {
        self.steps = steps;
        self
    }

    /// Sets `steps` to those of `epochs` passes over `dataset`, the last step filled up from the next pass; to be called
    /// after `batch` and `accumulate` are set.
    ///
    /// # Errors
    /// [`Error::Argument`] for batch options that don't fit the data.
    pub fn with_epochs(mut self, dataset: &Dataset, epochs: u64) -> Result<Self> {
        let rows_of_a_step = (self.batch.batch as u64).saturating_mul(self.accumulate as u64).max(1);
        self.steps = batch::rows_in(dataset, &self.batch, epochs)?.div_ceil(rows_of_a_step);
        Ok(self)
    }

    /// Sets `accumulate`.
    #[must_use]
    pub fn with_accumulate(mut self, accumulate: usize) -> Self {
        self.accumulate = accumulate;
        self
    }

    /// Sets `lr`.
    #[must_use]
    pub fn with_lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Sets `warmup`.
    #[must_use]
    pub fn with_warmup(mut self, warmup: u64) -> Self {
        self.warmup = warmup;
        self
    }

    /// Sets `max_skipped`.
    #[must_use]
    pub fn with_max_skipped(mut self, max_skipped: u64) -> Self {
        self.max_skipped = max_skipped;
        self
    }

    /// Sets `schedule`.
    #[must_use]
    pub fn with_schedule(mut self, schedule: ScheduleKind) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets `clip`.
    #[must_use]
    pub fn with_clip(mut self, clip: Option<f64>) -> Self {
        self.clip = clip;
        self
    }

    /// Sets `weight_decay`.
    #[must_use]
    pub fn with_weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets `betas`.
    #[must_use]
    pub fn with_betas(mut self, betas: [f32; 2]) -> Self {
        self.betas = betas;
        self
    }

    /// Sets `eps`.
    #[must_use]
    pub fn with_eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    /// Sets `recompute`.
    #[must_use]
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// Sets `logit_rows`.
    #[must_use]
    pub fn with_logit_rows(mut self, logit_rows: usize) -> Self {
        self.logit_rows = logit_rows;
        self
    }

    fn check(&self) -> Result<Schedule> {
        let fail = |name: &str, expected: &str, found: String| {
            Err(Error::Argument { name: name.into(), expected: expected.into(), found })
        };
        let counts = [
            ("steps", self.steps),
            ("accumulate", self.accumulate as u64),
            ("logit_rows", self.logit_rows as u64),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return fail(name, "at least 1", "0".into());
        }
        if let Some(clip) = self.clip
            && !(clip.is_finite() && clip > 0.0)
        {
            return fail("clip", "a finite number above 0", clip.to_string());
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return fail("weight_decay", "a finite number, at least 0", self.weight_decay.to_string());
        }
        if self.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return fail("betas", "numbers from 0 to below 1", format!("{:?}", self.betas));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return fail("eps", "a finite number above 0", self.eps.to_string());
        }
        Schedule::new(self.lr, self.warmup, self.steps, self.schedule)
    }
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepReport {
    /// The step, counted from 0.
    pub step: u64,
    /// Mean negative log-likelihood of the scored targets before the step, in nats.
    pub loss: f64,
    /// Global norm of the gradient of that mean, before clipping.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Scored targets.
    pub targets: usize,
    /// Tokens that went through the model, padding included.
    pub tokens: usize,
    /// Wall-clock time.
    pub seconds: f64,
    /// Whether nothing was learned because loss or gradient, of which one is then not a number here, wasn't finite.
    pub skipped: bool,
}

/// Trains whatever requires gradients in a model.
///
/// It can be driven by an embedding program, a [`step`](Self::step) at a time, or [`run`](Self::run) to the end. Before
/// every pass it tells the model where training stands ([`CausalLm::at`]), which is all that adapters' dropout needs.
pub struct Trainer<M: CausalLm> {
    /// Always there between calls; taken while the optimizer makes a new one.
    model: Option<M>,
    optimizer: ModuleOptimizer,
    config: TrainerConfig,
    schedule: Schedule,
    batches: Batches,
    dataset: Arc<Dataset>,
    step: u64,
    skipped: u64,
    best: Option<Best>,
    /// What the model is besides its trained parameters, by name.
    identity: BTreeMap<String, String>,
    /// Hash of the frozen parameters, once it was asked for.
    frozen: OnceLock<String>,
    /// The last checkpoint that was written or read.
    checkpoint: Option<PathBuf>,
}

/// The best evaluation so far.
#[derive(Debug, Clone)]
struct Best {
    score: f64,
    step: u64,
    parameters: BTreeMap<String, Parameter>,
}

/// Why a step has no gradients.
enum Failure {
    /// A number of the report.
    NotFinite(StepReport),
    Other(Error),
}

impl<E: Into<Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// The trained parts are many; what a run is made of is few.
impl<M: CausalLm> std::fmt::Debug for Trainer<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { config, step, .. } = self;
        f.debug_struct("Trainer").field("config", config).field("step", step).finish_non_exhaustive()
    }
}

impl<M: CausalLm> Trainer<M> {
    /// A run from its beginning.
    ///
    /// # Errors
    /// Options out of range, data that doesn't fit them, rows longer than the model has positions, or a model without
    /// trainable parameters.
    pub fn new(model: M, dataset: Arc<Dataset>, config: TrainerConfig) -> Result<Self> {
        let schedule = config.check()?;
        let model = trainable::widened(model.train());
        if trained_values(&model) == 0 {
            return Err(Error::Argument {
                name: "model".into(),
                expected: "parameters that require gradients".into(),
                found: "none: attach an adapter, or unfreeze the model".into(),
            });
        }
        let (length, limit) = (dataset.options().seq_len, model.max_positions());
        if length > limit {
            return Err(Error::Argument {
                name: "seq_len".into(),
                expected: format!("at most {limit}, the model's positions"),
                found: length.to_string(),
            });
        }
        Ok(Self {
            model: Some(model),
            optimizer: adamw::optimizer(&config),
            batches: Batches::new(dataset.clone(), config.batch.clone())?,
            config,
            schedule,
            dataset,
            step: 0,
            skipped: 0,
            best: None,
            identity: BTreeMap::new(),
            frozen: OnceLock::new(),
            checkpoint: None,
        })
    }

    /// Records in checkpoints what the model is besides its parameters: name and value of whatever must be the same when a
    /// run goes on, such as the adapters' configuration. To be called before [`resumed`](Self::resumed), which compares
    /// them. The frozen parameters are compared in any case, by a hash that is made at the first checkpoint, at a gigabyte a
    /// second or so.
    #[must_use]
    pub fn with_identity(mut self, identity: BTreeMap<String, String>) -> Self {
        self.identity = identity;
        self
    }

    /// The training model.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("a model between calls")
    }

    /// The model after the last step, without autodiff.
    pub fn into_model(self) -> M {
        self.model().valid()
    }

    /// The model after the step with the lowest score, without autodiff; that after the last step where nothing was
    /// evaluated.
    pub fn into_best_model(mut self) -> M {
        match (self.model.take(), self.best.take()) {
            (Some(model), Some(best)) => trainable::restore(model, best.parameters).valid(),
            (model, _) => model.expect("a model between calls").valid(),
        }
    }

    /// The configuration.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The lowest score of an evaluation so far.
    pub fn best(&self) -> Option<f64> {
        self.best.as_ref().map(|best| best.score)
    }

    /// Steps that were passed over because loss or gradient wasn't finite.
    pub fn steps_skipped(&self) -> u64 {
        self.skipped
    }

    /// Number of values that are trained.
    pub fn trained_values(&self) -> usize {
        trained_values(self.model())
    }

    /// One optimizer step over [`TrainerConfig::accumulate`] micro-batches.
    ///
    /// # Errors
    /// [`Error::Diverged`] if loss or gradient is not finite, more often than [`TrainerConfig::max_skipped`] allows, and
    /// errors of the data; the model is then as before.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let before = self.batches.cursor();
        let mut report = match self.gradients() {
            Ok((gradients, report)) => {
                let model = self.model.take().expect("a model between calls");
                self.model = Some(self.optimizer.step(report.learning_rate, model, gradients));
                report
            }
            Err(Failure::NotFinite(report)) if self.skipped < self.config.max_skipped => {
                self.skipped += 1;
                tracing::warn!(step = report.step, "loss or gradient isn't finite: nothing is learned");
                report
            }
            Err(failure) => {
                self.batches = Batches::resume(self.dataset.clone(), self.config.batch.clone(), before)?;
                return Err(self.error(failure));
            }
        };
        self.step += 1;
        report.seconds = start.elapsed().as_secs_f64();
        tracing::debug!(step = report.step, loss = report.loss, "step");
        Ok(report)
    }

    fn error(&self, failure: Failure) -> Error {
        match failure {
            Failure::Other(error) => error,
            Failure::NotFinite(StepReport { step, loss, grad_norm, .. }) => {
                let (quantity, value) = match loss.is_finite() {
                    true => ("the gradient's norm", grad_norm),
                    false => ("the loss", loss),
                };
                let checkpoint = self.checkpoint.clone();
                Error::Diverged { step, quantity: quantity.into(), value, checkpoint }
            }
        }
    }

    /// The clipped mean gradient of the next micro-batches.
    fn gradients(&mut self) -> std::result::Result<(burn::optim::GradientsParams, StepReport), Failure> {
        let options = DriverOptions { recompute: self.config.recompute, logit_rows: self.config.logit_rows };
        let micro_batches: Vec<Batch> = self.batches.by_ref().take(self.config.accumulate).collect();
        let targets: usize = micro_batches.iter().map(Batch::target_count).sum();
        let tokens = micro_batches.iter().map(|batch| batch.tokens.ids.len()).sum();
        let model = self.model.as_ref().expect("a model between calls");
        let (mut sums, mut losses) = (GradientsAccumulator::new(), Vec::new());
        for (index, batch) in micro_batches.iter().enumerate() {
            if batch.target_count() == 0 {
                continue;
            }
            model.at(Place { step: self.step, micro_batch: index as u64, training: true });
            losses.push(queue_gradients(model, &batch.tokens, batch.as_targets(), &options, &mut sums)?);
        }
        model.at(Place { step: self.step, micro_batch: 0, training: false });
        // Sums of sums, divided once: k micro-batches are one batch, however their tokens are spread.
        let gradients = sums.grads();
        // The one time that the device is waited for.
        let (nll, squares) = PendingLoss::read_all(losses, squares(model, &gradients))?;
        let loss = nll / targets as f64;
        let norm = squares.into_iter().map(f64::from).sum::<f64>().sqrt() / targets as f64;
        let is_finite = loss.is_finite() && norm.is_finite();
        let report = StepReport {
            step: self.step,
            loss,
            grad_norm: norm,
            learning_rate: self.schedule.lr(self.step),
            targets,
            tokens,
            seconds: 0.0,
            skipped: !is_finite,
        };
        if !is_finite {
            return Err(Failure::NotFinite(report));
        }
        // As torch's `clip_grad_norm_`.
        let clip = self.config.clip.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
        Ok((scale(model, gradients, clip / targets as f64), report))
    }

    /// Steps until the end, evaluating and saving on the way as `options` says.
    ///
    /// # Errors
    /// As [`step`](Self::step), and whatever evaluation or saving meet.
    pub fn run(&mut self, options: &RunOptions) -> Result<RunReport> {
        self.run_with(options, &mut ())
    }

    /// As [`run`](Self::run); `observer` hears what happens, may score the model itself, and may stop the run.
    ///
    /// # Errors
    /// As [`run`](Self::run), and [`Error::Observer`] for what the observer's score meets.
    pub fn run_with(&mut self, options: &RunOptions, observer: &mut impl Observer<M>) -> Result<RunReport> {
        let _claim = options.claim()?;
        let mut report = RunReport { steps: Vec::new(), evaluations: Vec::new(), end: RunEnd::Completed };
        let every = |steps: u64, every: u64| every != 0 && steps.is_multiple_of(every);
        while self.step < self.config.steps {
            let step = self.step()?;
            let mut stopped = observer.on_event(&Event::Step(&step)).is_break();
            report.steps.push(step);
            let is_last = self.step == self.config.steps;
            let is_due = every(self.step, options.evaluate_every) || (is_last && options.evaluate_every != 0);
            let mut tired = false;
            if is_due && let Some(evaluation) = self.evaluate(options, observer)? {
                stopped |= observer.on_event(&Event::Evaluation(&evaluation)).is_break();
                report.evaluations.push(evaluation);
                if evaluation.is_best {
                    stopped |= self.save_below(options, "best", observer)?.is_break();
                }
                tired = self.is_tired(options);
            }
            if stopped || tired || is_last || every(self.step, options.save_every) {
                stopped |= self.save_below(options, "last", observer)?.is_break() && !is_last;
            }
            if stopped || tired || is_last {
                report.end = match (stopped, tired) {
                    (true, _) => RunEnd::Stopped,
                    (false, true) => RunEnd::Patience,
                    (false, false) => RunEnd::Completed,
                };
                break;
            }
        }
        Ok(report)
    }

    /// The score of the model as it is; the best one's parameters are kept.
    fn evaluate(
        &mut self,
        options: &RunOptions,
        observer: &mut impl Observer<M>,
    ) -> Result<Option<Evaluation>> {
        let score = match &options.held_out {
            Some(dataset) => Some(evaluate(self.model(), dataset, self.config.batch.batch)?.nll),
            None => observer.score(self.model(), self.step).map_err(Error::Observer)?,
        };
        let Some(score) = score else { return Ok(None) };
        let is_best = score.is_finite() && self.best.as_ref().is_none_or(|best| score < best.score);
        if is_best {
            self.best = Some(Best { score, step: self.step, parameters: trainable::collect(self.model())? });
        }
        Ok(Some(Evaluation { steps: self.step, score, is_best }))
    }

    /// Whether as many evaluations as patience allows went by without a better score.
    fn is_tired(&self, options: &RunOptions) -> bool {
        let (Some(patience), Some(best)) = (options.patience, &self.best) else { return false };
        (self.step - best.step) / options.evaluate_every.max(1) >= patience.max(1)
    }

    fn save_below(
        &mut self,
        options: &RunOptions,
        name: &str,
        observer: &mut impl Observer<M>,
    ) -> Result<ControlFlow<()>> {
        let Some(folder) = &options.folder else { return Ok(ControlFlow::Continue(())) };
        let folder = folder.join(name);
        self.save(&folder)?;
        self.checkpoint = Some(folder.clone());
        Ok(observer.on_event(&Event::Checkpoint(&folder)))
    }

    /// Writes trainable tensors, optimizer, step, data cursor and configuration; `folder` is replaced as a whole.
    ///
    /// # Errors
    /// [`Error::Io`] and the like, another process that writes there, and [`Error::Diverged`] for parameters that aren't
    /// finite; what stood in `folder` before is then still there.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let state = checkpoint::State {
            version: checkpoint::VERSION,
            step: self.step,
            skipped: self.skipped,
            best: self.best(),
            best_step: self.best.as_ref().map(|best| best.step),
            cursor: self.batches.cursor(),
            config: self.config.clone(),
            data: self.dataset.fingerprint(),
            model: self.whole_identity()?,
            files: BTreeMap::new(),
        };
        let parameters = trainable::collect(self.model())?;
        checkpoint::save(folder.as_ref(), state, &parameters, &self.optimizer).map_err(|error| match error {
            Error::Diverged { step, quantity, value, .. } => {
                Error::Diverged { step, quantity, value, checkpoint: self.checkpoint.clone() }
            }
            other => other,
        })
    }

    /// What must be the same when the run goes on.
    fn whole_identity(&self) -> Result<BTreeMap<String, String>> {
        let mut identity = self.identity.clone();
        let frozen = match self.frozen.get() {
            Some(frozen) => frozen.clone(),
            None => {
                let found = trainable::frozen_fingerprint(self.model())?;
                self.frozen.get_or_init(|| found).clone()
            }
        };
        identity.insert("frozen parameters".into(), frozen);
        Ok(identity)
    }

    /// A run that goes on from a checkpoint: [`new`](Self::new), then [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// Those of the two.
    pub fn resume(
        model: M,
        dataset: Arc<Dataset>,
        config: TrainerConfig,
        folder: impl AsRef<Path>,
    ) -> Result<Self> {
        Self::new(model, dataset, config)?.resumed(folder)
    }

    /// Goes on from a checkpoint: the following steps are, on the CPU, those that the saved run would have made, bit for
    /// bit. With a constant learning rate after the warm-up, the run may have more steps than the saved one.
    ///
    /// The trainer is made as it was for the saved run: same base, same adapters. The best parameters so far come from
    /// `best` beside `folder`, if it is there.
    ///
    /// # Errors
    /// A checkpoint that is incomplete, or of another configuration, data set, model or
    /// [identity](Self::with_identity): the first difference is named.
    pub fn resumed(mut self, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let fresh = trainable::collect(self.model())?;
        let identity = self.whole_identity()?;
        let run = checkpoint::Run {
            config: &self.config,
            data: &self.dataset.fingerprint(),
            identity: &identity,
            fresh: &fresh,
        };
        let saved = checkpoint::load(folder, &run)?;
        let beside = folder.with_file_name("best");
        self.best = match (saved.state.best, saved.state.best_step) {
            (Some(score), Some(step)) if step == saved.state.step => {
                Some(Best { score, step, parameters: saved.parameters.clone() })
            }
            (Some(score), Some(step)) if checkpoint::exists(&beside) => {
                let best = checkpoint::load(&beside, &run)?;
                // A killed run may have found a better one since; it will find it again.
                (best.state.step == step).then_some(Best { score, step, parameters: best.parameters })
            }
            _ => None,
        };
        self.optimizer = checkpoint::load_optimizer(folder, &saved, adamw::optimizer(&self.config))?;
        self.model = self.model.take().map(|model| trainable::restore(model, saved.parameters));
        self.batches = Batches::resume(self.dataset.clone(), self.config.batch.clone(), saved.state.cursor)?;
        (self.step, self.skipped) = (saved.state.step, saved.state.skipped);
        self.checkpoint = Some(folder.into());
        Ok(self)
    }
}
