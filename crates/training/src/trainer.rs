//! The loop: micro-batches to gradients to a step of AdamW.

use std::{ops::ControlFlow, path::PathBuf, sync::Arc, time::Instant};

use burn::optim::{AdamWConfig, GradientsAccumulator, ModuleOptimizer};
use kiln_models::{CausalLm, DriverOptions, Place, Recompute, Targets, TokenBatch, loss_and_gradients};
use kiln_quant_core::trained_values;
use serde::{Deserialize, Serialize};

use crate::{
    Batch, BatchOptions, Batches, Dataset, Error, Result, Schedule, ScheduleKind, checkpoint,
    gradients::{global_norm, scale},
    trainable,
};

/// How to train. Everything that decides the numbers is here or in the data's options; a checkpoint refuses to go on
/// under another configuration.
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
}

impl TrainerConfig {
    /// `steps` steps of one micro-batch each, other options at their defaults.
    pub fn new(steps: u64, batch: BatchOptions) -> Self {
        Self {
            steps,
            batch,
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
        }
    }

    fn check(&self) -> Result<Schedule> {
        let fail = |name: &str, expected: &str, found: String| {
            Err(Error::Argument { name: name.into(), expected: expected.into(), found })
        };
        if self.accumulate == 0 || self.steps == 0 || self.logit_rows == 0 {
            let found = format!("{}, {} and {}", self.steps, self.accumulate, self.logit_rows);
            return fail("steps, accumulate, logit_rows", "at least 1 each", found);
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

    fn optimizer(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_beta_1(self.betas[0])
            .with_beta_2(self.betas[1])
            .with_epsilon(self.eps)
            .with_weight_decay(self.weight_decay)
            .init()
    }
}

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
}

/// Hears what happens, evaluates, and may stop the run. All methods have empty defaults.
pub trait Observer<M> {
    /// After every step; [`ControlFlow::Break`] ends the run.
    fn on_step(&mut self, _report: &StepReport) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    /// A score of the model on held-out data, lower is better; asked for every [`RunOptions::evaluate_every`] steps.
    ///
    /// # Errors
    /// Whatever evaluation meets; it ends the run.
    fn evaluate(&mut self, _model: &M, _steps: u64) -> Result<Option<f64>> {
        Ok(None)
    }

    /// After a checkpoint was written.
    fn on_checkpoint(&mut self, _folder: &std::path::Path) {}
}

impl<M> Observer<M> for () {}

/// When [`Trainer::run`] evaluates and saves.
#[derive(Debug, Clone, Default)]
pub struct RunOptions {
    /// Steps between evaluations; 0 never evaluates.
    pub evaluate_every: u64,
    /// Steps between checkpoints; 0 saves only at the end.
    pub save_every: u64,
    /// Where checkpoints go: `last` and, with evaluation, `best` below it. `None` saves nothing.
    pub folder: Option<PathBuf>,
}

/// Trains whatever requires gradients in a model.
///
/// It can be driven by an embedding program, a [`step`](Self::step) at a time, or [`run`](Self::run) to the end.
pub struct Trainer<M: CausalLm> {
    /// Always there between calls; taken while the optimizer makes a new one.
    model: Option<M>,
    optimizer: ModuleOptimizer,
    config: TrainerConfig,
    schedule: Schedule,
    batches: Batches,
    dataset: Arc<Dataset>,
    step: u64,
    best: Option<f64>,
}

impl<M: CausalLm> Trainer<M> {
    /// A run from its beginning.
    ///
    /// # Errors
    /// Options out of range, data that doesn't fit them, rows longer than the model has positions, or a model without
    /// trainable parameters.
    pub fn new(model: M, dataset: Arc<Dataset>, config: TrainerConfig) -> Result<Self> {
        let schedule = config.check()?;
        let model = model.train();
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
            optimizer: config.optimizer(),
            batches: Batches::new(dataset.clone(), config.batch.clone())?,
            config,
            schedule,
            dataset,
            step: 0,
            best: None,
        })
    }

    /// The training model.
    pub fn model(&self) -> &M {
        self.model.as_ref().expect("a model between calls")
    }

    /// The trained model, without autodiff.
    pub fn into_model(self) -> M {
        self.model().valid()
    }

    /// The configuration.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// Steps done.
    pub fn steps_done(&self) -> u64 {
        self.step
    }

    /// The lowest score that [`Observer::evaluate`] gave.
    pub fn best(&self) -> Option<f64> {
        self.best
    }

    /// One optimizer step over [`TrainerConfig::accumulate`] micro-batches.
    ///
    /// # Errors
    /// [`Error::Diverged`] if loss or gradient is not finite, and errors of the data; the model is then as before.
    pub fn step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let before = self.batches.cursor();
        match self.gradients() {
            Ok((gradients, mut report)) => {
                let model = self.model.take().expect("a model between calls");
                self.model = Some(self.optimizer.step(report.learning_rate, model, gradients));
                self.step += 1;
                report.seconds = start.elapsed().as_secs_f64();
                tracing::debug!(step = report.step, loss = report.loss, "step");
                Ok(report)
            }
            Err(error) => {
                self.batches = Batches::resume(self.dataset.clone(), self.config.batch.clone(), before)?;
                Err(error)
            }
        }
    }

    /// The clipped mean gradient of the next micro-batches.
    fn gradients(&mut self) -> Result<(burn::optim::GradientsParams, StepReport)> {
        let options = DriverOptions { recompute: self.config.recompute, logit_rows: self.config.logit_rows };
        let micro_batches: Vec<Batch> = self.batches.by_ref().take(self.config.accumulate).collect();
        let targets: usize = micro_batches.iter().map(Batch::target_count).sum();
        let tokens = micro_batches.iter().map(|batch| batch.input_ids.len()).sum();
        let model = self.model.as_ref().expect("a model between calls");
        let (mut sums, mut nll) = (GradientsAccumulator::new(), 0.0);
        for (index, batch) in micro_batches.into_iter().enumerate() {
            if batch.target_count() == 0 {
                continue;
            }
            model.at(Place { step: self.step, micro_batch: index as u64, training: true });
            let (tokens, targets, scored) = parts(batch);
            let targets = Targets { ids: &targets, scored: &scored };
            nll += loss_and_gradients(model, &tokens, targets, &options, &mut sums)?;
        }
        model.at(Place { step: self.step, micro_batch: 0, training: false });
        // Sums of sums, divided once: k micro-batches are one batch, however their tokens are spread.
        let loss = nll / targets as f64;
        let gradients = sums.grads();
        let norm = global_norm(model, &gradients) / targets as f64;
        for (quantity, value) in [("loss", loss), ("gradient norm", norm)] {
            if !value.is_finite() {
                return Err(Error::Diverged { step: self.step, quantity, value });
            }
        }
        // As torch's `clip_grad_norm_`.
        let clip = self.config.clip.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
        let gradients = scale(model, gradients, clip / targets as f64);
        let report = StepReport {
            step: self.step,
            loss,
            grad_norm: norm,
            learning_rate: self.schedule.lr(self.step),
            targets,
            tokens,
            seconds: 0.0,
        };
        Ok((gradients, report))
    }

    /// Steps until the end, evaluating and saving on the way.
    ///
    /// Returns the reports of the steps done by this call; fewer than asked for if the observer stopped the run.
    ///
    /// # Errors
    /// As [`step`](Self::step), and whatever evaluation or saving meet.
    pub fn run(&mut self, options: &RunOptions, observer: &mut impl Observer<M>) -> Result<Vec<StepReport>> {
        let mut reports = Vec::new();
        let every = |steps: u64, every: u64| every != 0 && steps.is_multiple_of(every);
        while self.step < self.config.steps {
            let report = self.step()?;
            let stop = observer.on_step(&report).is_break();
            reports.push(report);
            let last = stop || self.step == self.config.steps;
            if every(self.step, options.evaluate_every)
                && let Some(score) = observer.evaluate(self.model(), self.step)?
                && self.best.is_none_or(|best| score < best)
            {
                self.best = Some(score);
                self.save_below(options, "best", observer)?;
            }
            if last || every(self.step, options.save_every) {
                self.save_below(options, "last", observer)?;
            }
            if stop {
                break;
            }
        }
        Ok(reports)
    }

    fn save_below(&self, options: &RunOptions, name: &str, observer: &mut impl Observer<M>) -> Result<()> {
        if let Some(folder) = &options.folder {
            let folder = folder.join(name);
            self.save(&folder)?;
            observer.on_checkpoint(&folder);
        }
        Ok(())
    }

    /// Writes trainable tensors, optimizer, step, data cursor and configuration; `folder` is replaced as a whole.
    ///
    /// # Errors
    /// [`Error::Io`] and the like; what stood in `folder` before is then still there.
    pub fn save(&self, folder: &std::path::Path) -> Result<()> {
        let state = checkpoint::State {
            version: checkpoint::VERSION,
            step: self.step,
            best: self.best,
            cursor: self.batches.cursor(),
            config: self.config.clone(),
            data: self.dataset.fingerprint(),
        };
        checkpoint::save(folder, &state, trainable::collect(self.model())?, &self.optimizer)
    }

    /// Goes on from a checkpoint: the following steps are, on the CPU, those that the saved run would have made, bit for
    /// bit.
    ///
    /// `model` is made as it was for [`new`](Self::new): same base, same adapters.
    ///
    /// # Errors
    /// A checkpoint that is incomplete, or of another configuration, data set or model: the first difference is named.
    pub fn resume(
        model: M,
        dataset: Arc<Dataset>,
        config: TrainerConfig,
        folder: &std::path::Path,
    ) -> Result<Self> {
        let mut trainer = Self::new(model, dataset, config)?;
        let fresh = trainable::collect(trainer.model())?;
        let saved = checkpoint::load(folder, &trainer.config, &trainer.dataset.fingerprint(), &fresh)?;
        trainer.optimizer = checkpoint::load_optimizer(folder, trainer.config.optimizer())?;
        trainer.model = trainer.model.take().map(|model| trainable::restore(model, saved.parameters));
        trainer.batches =
            Batches::resume(trainer.dataset.clone(), trainer.config.batch.clone(), saved.state.cursor)?;
        (trainer.step, trainer.best) = (saved.state.step, saved.state.best);
        Ok(trainer)
    }
}

/// A batch as the model and the loss take it.
fn parts(batch: Batch) -> (TokenBatch, Vec<u32>, Vec<bool>) {
    let tokens = TokenBatch {
        ids: batch.input_ids,
        positions: batch.positions,
        segments: batch.segments,
        batch: batch.batch,
        length: batch.seq_len,
    };
    (tokens, batch.targets, batch.weights)
}
