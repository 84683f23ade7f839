//! The loop: micro-batches to gradients to a step.

mod replicas;

use std::{
    collections::BTreeMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Instant,
};

use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use kiln_distributed::{Alone, Communicator, PairwiseSum, agreed, share, sum};
use kiln_models::{
    CausalLm, DriverOptions, EmbeddingNoise, Objective, PendingLoss, Place, TokenLoss, Weights,
    queue_gradients,
};
use kiln_quant_core::{fingerprint, hash::hex, trained_values};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    Batch, Batches, Dataset, Error, Evaluation, Event, Figure, Observer, ParameterGroup, PreferenceLoss,
    PreferenceReport, Result, RunEnd, RunOptions, RunReport, Schedule, TrainerConfig, checkpoint,
    error::Problem,
    evaluate::{check_values, evaluate_on},
    gradients::{added, flat_length, flattened, squares, unflattened},
    in_order,
    optim::{MakeOptimizer, Optimizers},
    preference::{self, Answer, Outcome, Rewards, Totals},
    ranks::{Ranks, by_first, check_accumulate, gathered, in_turn, same},
    reference::{self, Reference},
    trainable::{self, Parameter},
    watch::Metrics,
};

/// What one step did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepReport {
    /// The step, counted from 0.
    pub step: u64,
    /// The loss before the step, in nats: the weighted mean over scored targets, or, of preferences, over pairs or answers.
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
    /// Of it, of several ranks, what was spent on exchanging gradients and losses, waiting for slower ranks included.
    #[serde(default)]
    pub exchange_seconds: f64,
    /// Whether nothing was learned because loss or gradient, of which one is then not a number here, wasn't finite.
    pub skipped: bool,
    /// How answers stood, where the loss is one of preferences.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceReport>,
}

/// Trains whatever requires gradients in a model.
///
/// It can be driven by an embedding program, a [`step`](Self::step) at a time, or [`run`](Self::run) to the end. Before
/// every pass it tells the model where training stands ([`CausalLm::at`]), which is all that adapters' dropout needs.
pub struct Trainer<M: CausalLm> {
    /// Always there between calls; taken while the optimizer makes a new one.
    model: Option<M>,
    optimizers: Optimizers,
    /// The caller's own optimizer: its name, and what makes it.
    own_optimizer: Option<(String, Arc<MakeOptimizer>)>,
    config: TrainerConfig,
    schedule: Schedule,
    /// What answers are compared with, or who is imitated.
    reference: Option<Box<dyn Reference>>,
    /// The reference's log-probabilities of all examples, if they are known.
    known_answers: Option<Vec<f64>>,
    batches: Batches,
    dataset: Arc<Dataset>,
    step: u64,
    skipped: u64,
    best: Option<Best>,
    /// What the model is besides its trained parameters, by name.
    identity: BTreeMap<String, String>,
    /// Hash of the frozen parameters, once it was asked for.
    frozen: OnceLock<String>,
    /// Hash of the reference, likewise.
    reference_hash: OnceLock<String>,
    /// The last checkpoint that was written or read.
    checkpoint: Option<PathBuf>,
    /// Who shares the work.
    ranks: Ranks,
    /// Further ranks, which run in threads of this process.
    replicas: Vec<Trainer<M>>,
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
        check_length("seq_len", &dataset, &model)?;
        check_form(&dataset, config.preference.as_ref(), config.batch.batch)?;
        check_values(&dataset, &model)?;
        if model.labels() == Some(1) && config.loss != TokenLoss::default() {
            let expected = "no options, of a regression: its loss is the squared error";
            return Err(Problem::new("loss", expected, format!("{:?}", config.loss)).argument());
        }
        let has_reference = config.preference.is_some_and(|loss| loss.has_reference());
        let reference = has_reference.then(|| Box::new(model.valid()) as Box<dyn Reference>);
        Ok(Self {
            optimizers: Optimizers::new(&model, &config, None)?,
            own_optimizer: None,
            model: Some(model),
            batches: Batches::new(dataset.clone(), config.batch.clone())?,
            config,
            schedule,
            reference,
            known_answers: None,
            dataset,
            step: 0,
            skipped: 0,
            best: None,
            identity: BTreeMap::new(),
            frozen: OnceLock::new(),
            reference_hash: OnceLock::new(),
            checkpoint: None,
            ranks: Arc::new(Alone),
            replicas: Vec::new(),
        })
    }

    /// The model that answers are compared with, in place of the one that the run begins with; or the teacher of a
    /// distillation. It isn't trained; what it shares with the trained model is there once.
    ///
    /// # Errors
    /// [`Error::Argument`] for a loss that asks nobody, and for another vocabulary.
    pub fn with_reference(mut self, reference: impl CausalLm) -> Result<Self> {
        self.check_unshared("reference")?;
        let asks = self.config.preference.is_some_and(|loss| loss.has_reference())
            || self.config.loss.distillation.is_some();
        if !asks {
            return Err(Problem::new("reference", "none: this loss asks nobody", "a model").argument());
        }
        let (expected, found) = (self.model().vocab_size(), reference.vocab_size());
        if expected != found {
            return Err(
                Problem::new("reference", format!("a vocabulary of {expected} ids"), found).argument()
            );
        }
        if self.model().labels() != reference.labels() {
            let expected = match self.model().labels() {
                Some(labels) => format!("a classifier of {labels} labels"),
                None => "a language model".to_owned(),
            };
            return Err(Problem::new("reference", expected, "another kind of model").argument());
        }
        self.reference = Some(Box::new(reference.valid()));
        (self.known_answers, self.reference_hash) = (None, OnceLock::new());
        Ok(self)
    }

    /// Asks the reference about all of the data now, or reads from the file `path` what was found before; further steps
    /// don't run it. The file is of one data set and one reference. To be called after
    /// [`with_identity`](Self::with_identity), whose `compute` it records, and before [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// A loss without a reference, or one that compares answers to other prompts (KTO); a file of other data, or of another
    /// reference; files that can't be read or written.
    pub fn with_known_answers(self, path: impl AsRef<Path>) -> Result<Self> {
        self.with_known_answers_on(&Alone, path)
    }

    /// As [`with_known_answers`](Self::with_known_answers), the batches that the reference is asked about dealt to `ranks`, which
    /// all have the same reference and data: the same answers on all of them, to the last bit those of one. The file is
    /// rank 0's, and the others need see no such place.
    ///
    /// To be called before [`with_ranks`](Self::with_ranks).
    ///
    /// # Errors
    /// As [`with_known_answers`](Self::with_known_answers), of any of the ranks; another reference or data set on one of them.
    pub fn with_known_answers_on(mut self, ranks: &dyn Communicator, path: impl AsRef<Path>) -> Result<Self> {
        let asked = || {
            self.check_unshared("known answers")?;
            let wanted = self.config.preference.filter(|loss| loss.has_reference() && !loss.is_of_labels());
            let (Some(reference), Some(_)) = (self.reference.as_deref(), wanted) else {
                let expected = "a loss of pairs with a reference";
                let found = format!("{:?}", self.config.preference);
                return Err(Problem::new("preference", expected, found).argument());
            };
            Ok(reference)
        };
        let reference = agreed(ranks, asked())?;
        let rows = self.config.batch.batch;
        let compute = self.identity.get("compute").map_or("unknown", String::as_str);
        let known = reference::cached(ranks, reference, &self.dataset, rows, compute, path.as_ref())?;
        self.known_answers = Some(known);
        Ok(self)
    }

    /// Steps by an optimizer of the caller's in place of [`TrainerConfig::optimizer`]: any of Burn's. `make` gets the group
    /// whose parameters it is for; `name` says what it is and with which options, and is compared when a run goes on. To be
    /// called before [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// Those of the configuration's groups.
    pub fn with_optimizer(
        mut self,
        name: impl Into<String>,
        make: impl Fn(Option<&ParameterGroup>) -> ModuleOptimizer + Send + Sync + 'static,
    ) -> Result<Self> {
        self.check_unshared("optimizer")?;
        self.optimizers = Optimizers::new(self.model(), &self.config, Some(&make))?;
        self.own_optimizer = Some((name.into(), Arc::new(make)));
        Ok(self)
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

    /// Shares the micro-batches of each step, evaluations on held-out data and what is compared with references among
    /// `ranks`, each of which runs this program with the same model, data and options. Rank 0 writes checkpoints and figures,
    /// and its observer's answers count. Losses and parameters are, on devices of one kind, those of one rank, bit for bit,
    /// and a run may go on with another number of ranks: [`TrainerConfig::accumulate`] counts the micro-batches of all.
    ///
    /// To be called after the other `with_` methods, and before [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// Micro-batches that can't be dealt out evenly; a rank with another version, model, data set or other options, named with
    /// what differs; ranks that have ended.
    pub fn with_ranks(mut self, ranks: Arc<dyn Communicator>) -> Result<Self> {
        let check = || {
            self.check_unshared("ranks")?;
            check_accumulate(self.config.accumulate, ranks.size())
        };
        agreed(&*ranks, check())?;
        same(&*ranks, self.facts())?;
        self.ranks = ranks;
        Ok(self)
    }

    /// Fails for a run that is shared already, whose other ranks would hear nothing of `what`.
    fn check_unshared(&self, what: &str) -> Result<()> {
        match self.ranks.size() {
            1 => Ok(()),
            size => {
                let expected = "a run that isn't shared yet: ranks and devices come last, and one of the two";
                Err(Problem::new(what, expected, format!("{size} ranks")).argument())
            }
        }
    }

    /// What must be the same on all ranks.
    fn facts(&self) -> Result<BTreeMap<String, String>> {
        let mut facts = self.whole_identity()?;
        facts.insert("version".into(), env!("CARGO_PKG_VERSION").into());
        facts.insert("step".into(), self.step.to_string());
        facts.insert("steps that were passed over".into(), self.skipped.to_string());
        facts.insert("place in the data".into(), format!("{:?}", self.batches.cursor()));
        let best = self.best.as_ref().map(|best| (best.step, best.score));
        facts.insert("best evaluation".into(), format!("{best:?}"));
        facts.insert("data".into(), self.dataset.fingerprint()?);
        let trained = fingerprint(self.model(), |parameter| parameter.trained)?;
        facts.insert("trained parameters".into(), trained);
        let config = serde_json::to_value(&self.config)
            .map_err(|error| Problem::new("config", "serialisable options", error).argument())?;
        for (name, value) in config.as_object().into_iter().flatten() {
            facts.insert(format!("config.{name}"), value.to_string());
        }
        Ok(facts)
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
        self.together(Self::own_step, Self::own_step)
    }

    /// A step of this rank, which the others make too.
    fn own_step(&mut self) -> Result<StepReport> {
        let start = Instant::now();
        let before = self.batches.cursor();
        let mut report = match self.gradients() {
            Ok((gradients, factor, report)) => {
                let model = self.model.take().expect("a model between calls");
                self.model = Some(self.optimizers.step(self.step, model, gradients, factor));
                report
            }
            Err(Failure::NotFinite(report)) if self.skipped < self.config.max_skipped => {
                self.skipped += 1;
                tracing::warn!(step = report.step, "loss or gradient isn't finite: nothing is learned");
                report
            }
            Err(failure) => {
                self.model().at(Place { step: self.step, micro_batch: 0, training: false });
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

    /// The gradients of the next micro-batches, what they are to be multiplied by, and what is known of the step.
    fn gradients(&mut self) -> std::result::Result<(GradientsParams, f64, StepReport), Failure> {
        let micro_batches = (0..self.config.accumulate).map(|_| self.batches.next_batch()).collect();
        let micro_batches: Vec<Batch> = agreed(&*self.ranks, micro_batches)?;
        let mine = share(micro_batches.len(), self.ranks.rank(), self.ranks.size());
        let own = match self.config.preference {
            Some(loss) => self.preference_gradients(loss, &micro_batches, mine),
            None => self.token_gradients(&micro_batches, mine),
        };
        let model = self.model();
        model.at(Place { step: self.step, micro_batch: 0, training: false });
        let Shared { figures, gradients, squared_norm, exchange_seconds } = self.shared(own)?;
        let (mut loss, mut rewards) = (0.0, Rewards::default());
        for numbers in &figures {
            loss += numbers[0];
            rewards.add(Rewards::from_numbers(&numbers[1..]));
        }
        let (total, preference) = match self.config.preference {
            Some(loss) => (1.0, Some(rewards.report(!loss.is_of_labels()))),
            None if self.dataset.has_weights() => (micro_batches.iter().map(Batch::total_weight).sum(), None),
            None => (micro_batches.iter().map(Batch::target_count).sum::<usize>() as f64, None),
        };
        loss /= total;
        let norm = squared_norm.sqrt() / total;
        let is_finite = loss.is_finite() && norm.is_finite();
        let report = StepReport {
            step: self.step,
            loss,
            grad_norm: norm,
            learning_rate: self.schedule.lr(self.step),
            targets: micro_batches.iter().map(Batch::target_count).sum(),
            tokens: micro_batches.iter().map(|batch| batch.tokens.ids.len()).sum(),
            seconds: 0.0,
            exchange_seconds,
            skipped: !is_finite,
            preference,
        };
        if !is_finite {
            return Err(Failure::NotFinite(report));
        }
        // As torch's `clip_grad_norm_`.
        let clip = self.config.clip.map_or(1.0, |most| (most / (norm + 1e-6)).min(1.0));
        Ok((gradients, clip / total, report))
    }

    fn driver(&self, place: Place) -> DriverOptions {
        let noise =
            self.config.neftune.map(|alpha| EmbeddingNoise { alpha, seed: self.config.batch.seed, place });
        let TrainerConfig { recompute, logit_rows, loss, router_loss, .. } = self.config;
        DriverOptions { recompute, logit_rows, loss, noise, router_loss }
    }

    /// What all ranks have found, of what this one has.
    fn shared(&self, own: Result<Found>) -> Result<Shared> {
        let model = self.model();
        let sum_of = |squares: Vec<f32>| squares.into_iter().map(f64::from).sum::<f64>();
        if self.ranks.size() == 1 {
            let Found { sums, figures, losses } = own?;
            let gradients = sums.finish(|a, b| added(model, a, b)).unwrap_or_default();
            // The one time that the device is waited for.
            let (losses, squares) = PendingLoss::read_all(losses, squares(model, &gradients))?;
            let figures = with_losses(figures, losses);
            return Ok(Shared { figures, gradients, squared_norm: sum_of(squares), exchange_seconds: 0.0 });
        }
        let own = own.and_then(|found| found.on_host(model, self.step));
        let begin = Instant::now();
        let ((flat, _), all) = gathered(&*self.ranks, own, |(_, figures)| figures.clone())?;
        let mut figures = Vec::with_capacity(self.config.accumulate);
        for (rank, numbers) in all.iter().enumerate() {
            // Whoever makes steps by itself and goes on after an error would add up other micro-batches.
            if numbers[0] != all[0][0] {
                let (name, expected, found) = ("step".into(), all[0][0].to_string(), numbers[0].to_string());
                return Err(kiln_distributed::Error::Different { rank, name, expected, found }.into());
            }
            figures
                .extend(numbers[1..].chunks_exact(FIGURES).map(|of| std::array::from_fn(|index| of[index])));
        }
        let flat = sum(&*self.ranks, flat, self.config.accumulate, flat_length(model))?;
        let exchange_seconds = begin.elapsed().as_secs_f64();
        let gradients = unflattened(model, &flat);
        let squares = PendingLoss::read_all(Vec::new(), squares(model, &gradients));
        let own = squares.map(|(_, squares)| sum_of(squares)).map_err(Error::from);
        // Whether there is a step, and how long, is for one to say.
        let (_, all) = gathered(&*self.ranks, own, |square| vec![*square])?;
        Ok(Shared { figures, gradients, squared_norm: all[0][0], exchange_seconds })
    }

    /// Sums over tokens, to be divided by their number once: k micro-batches are one batch, however their tokens are spread.
    fn token_gradients(&self, micro_batches: &[Batch], mine: Range<usize>) -> Result<Found> {
        let model = self.model();
        let mut found = Found::new(mine.start);
        for index in mine {
            let batch = &micro_batches[index];
            let mut gradients = GradientsAccumulator::new();
            if batch.target_count() == 0 {
                found.push(model, GradientsParams::new(), PendingLoss::default(), [0.0; FIGURES]);
                continue;
            }
            let teacher = match (&self.reference, self.config.loss.distillation) {
                (Some(reference), Some(_)) => Some(reference.teacher(&batch.tokens)?),
                (None, Some(_)) => {
                    let expected = "a teacher for the distillation: `with_reference`";
                    return Err(Problem::new("reference", expected, "none").argument());
                }
                _ => None,
            };
            let weights = batch.weights(&self.dataset);
            let weights = weights.as_deref().map_or(Weights::Equal, Weights::Given);
            let numbers = (model.labels() == Some(1)).then(|| batch.numbers());
            let numbers = numbers.as_deref();
            let objective = Objective { targets: batch.as_targets(), weights, teacher, numbers };
            let place = Place { step: self.step, micro_batch: index as u64, training: true };
            model.at(place);
            let loss = queue_gradients(model, &batch.tokens, objective, &self.driver(place), &mut gradients)?;
            found.push(model, gradients.grads(), loss, [0.0; FIGURES]);
        }
        Ok(found)
    }

    /// Gradients of the mean over the step's pairs or answers.
    fn preference_gradients(
        &self,
        loss: PreferenceLoss,
        micro_batches: &[Batch],
        mine: Range<usize>,
    ) -> Result<Found> {
        let model = self.model();
        let totals = totals(micro_batches.iter(), loss);
        let mut found = Found::new(mine.start);
        for index in mine {
            let batch = &micro_batches[index];
            let mut gradients = GradientsAccumulator::new();
            let comparison = Comparison::new(loss, batch, self)?;
            let mut outcome = Outcome::default();
            let mut weigh = |nll: &[f32]| {
                outcome = comparison.outcome(nll, totals)?;
                let weights = outcome.slopes.iter().zip(&batch.examples);
                Ok(weights
                    .flat_map(|(slope, placed)| std::iter::repeat_n(*slope as f32, placed.targets))
                    .collect())
            };
            let weights = Weights::Computed(&mut weigh);
            let objective = Objective { weights, ..batch.as_targets().into() };
            let place = Place { step: self.step, micro_batch: index as u64, training: true };
            model.at(place);
            queue_gradients(model, &batch.tokens, objective, &self.driver(place), &mut gradients)?;
            found.push(model, gradients.grads(), PendingLoss::default(), outcome.figures());
        }
        Ok(found)
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
        self.together(
            |trainer| trainer.own_run(options, observer),
            |replica| replica.own_run(options, &mut ()),
        )
    }

    /// The run of this rank, which the others make too.
    fn own_run(&mut self, options: &RunOptions, observer: &mut impl Observer<M>) -> Result<RunReport> {
        agreed(&*self.ranks, self.check_run(options))?;
        if self.ranks.size() > 1 {
            let facts =
                options.facts().and_then(|options| Ok(self.facts()?.into_iter().chain(options).collect()));
            same(&*self.ranks, facts)?;
        }
        let _claim = by_first(&*self.ranks, || options.claim())?;
        let mut told = Told { metrics: None, observer, stopped: false };
        if let Some(folder) = options.metrics.as_ref().filter(|_| self.ranks.rank() == 0) {
            told.metrics = told.or_without(Metrics::open(folder, self.step, options.held_out.is_some()));
        }
        let mut report = RunReport { steps: Vec::new(), evaluations: Vec::new(), end: RunEnd::Completed };
        let every = |steps: u64, every: u64| every != 0 && steps.is_multiple_of(every);
        while self.step < self.config.steps {
            told.stopped = false;
            let step = self.own_step()?;
            told.tell(&Event::Step(&step));
            report.steps.push(step);
            let is_last = self.step == self.config.steps;
            let is_due = every(self.step, options.evaluate_every) || (is_last && options.evaluate_every != 0);
            let mut tired = false;
            if is_due && let Some(evaluation) = self.evaluate(options, told.observer)? {
                told.tell(&Event::Evaluation(&evaluation));
                let figures = told.observer.figures(self.model(), &evaluation).map_err(Error::Observer);
                for Figure { name, value } in agreed(&*self.ranks, figures)? {
                    told.tell(&Event::Figure { steps: self.step, name: &name, value });
                }
                let inspected = told.observer.inspect(self.model(), &evaluation).map_err(Error::Observer);
                told.stopped |= agreed(&*self.ranks, inspected)?.is_break();
                report.evaluations.push(evaluation);
                if evaluation.is_best {
                    self.save_below(options, "best", &mut told)?;
                }
                tired = self.is_tired(options);
            }
            let stopped = self.first_says(told.stopped)?;
            if stopped || tired || is_last || every(self.step, options.save_every) {
                if options.keep > 0 {
                    self.save_below(options, &format!("{KEPT}{}", self.step), &mut told)?;
                    by_first(&*self.ranks, || self.delete_older(options))?;
                }
                self.save_below(options, "last", &mut told)?;
            }
            // What the last checkpoint's hearer says of a run that is done has no effect.
            let stopped = if is_last { stopped } else { self.first_says(told.stopped)? };
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

    /// Whether options and data of a run fit one another and the model.
    fn check_run(&self, options: &RunOptions) -> Result<()> {
        options.check()?;
        if let Some(held_out) = &options.held_out {
            check_form(held_out, self.config.preference.as_ref(), self.config.batch.batch)?;
            check_values(held_out, self.model())?;
            check_length("seq_len of the held-out data", held_out, self.model())?;
        }
        Ok(())
    }

    /// What rank 0 says.
    fn first_says(&self, own: bool) -> Result<bool> {
        if self.ranks.size() == 1 {
            return Ok(own);
        }
        Ok(self.ranks.all_gather(vec![u8::from(own)])?[0] == [1])
    }

    /// The score of the model as it is; the best one's parameters are kept.
    fn evaluate(
        &mut self,
        options: &RunOptions,
        observer: &mut impl Observer<M>,
    ) -> Result<Option<Evaluation>> {
        let (mut preference, model) = (None, self.model());
        let score = match (&options.held_out, self.config.preference) {
            (Some(dataset), Some(loss)) => {
                let (score, report) = self.evaluate_preference(dataset, loss)?;
                preference = Some(report);
                Some(score)
            }
            (Some(dataset), None) => {
                Some(evaluate_on(&*self.ranks, model, dataset, self.config.batch.batch)?.nll)
            }
            (None, _) => {
                let own = observer.score(model, self.step).map_err(Error::Observer);
                let (_, scores) = gathered(&*self.ranks, own, |score| score.iter().copied().collect())?;
                scores[0].first().copied()
            }
        };
        let Some(score) = score else { return Ok(None) };
        let is_best = score.is_finite() && self.best.as_ref().is_none_or(|best| score < best.score);
        if is_best {
            let parameters = agreed(&*self.ranks, trainable::collect(self.model()))?;
            self.best = Some(Best { score, step: self.step, parameters });
        }
        Ok(Some(Evaluation { steps: self.step, score, is_best, preference }))
    }

    /// The mean loss over the pairs or answers of `dataset`.
    fn evaluate_preference(
        &self,
        dataset: &Dataset,
        loss: PreferenceLoss,
    ) -> Result<(f64, PreferenceReport)> {
        let rows = self.config.batch.batch;
        // No answer is alone, for it would be compared with itself.
        let lonely = |rows: &usize| loss.is_of_labels() && dataset.units() % rows == 1;
        let rows = (rows..=dataset.units().max(rows)).find(|rows| !lonely(rows)).unwrap_or(rows);
        let own = || {
            let mut all = Totals::default();
            for batch in in_order(dataset, rows, 0)? {
                all.add(totals([&batch?].into_iter(), loss));
            }
            let mine = in_order(dataset, rows, 0)?.skip(self.ranks.rank()).step_by(self.ranks.size());
            let figures = mine.map(|batch| {
                let batch = batch?;
                let comparison = Comparison::with_data(loss, &batch, dataset, self, None)?;
                Ok(comparison.of(reference::log_p(self.model(), &batch)?, all).figures())
            });
            Ok(figures.collect::<Result<Vec<_>>>()?.concat())
        };
        let (_, found) = gathered(&*self.ranks, own(), Vec::clone)?;
        let (mut total, mut rewards) = (0.0, Rewards::default());
        for numbers in in_turn(&found, FIGURES) {
            total += numbers[0];
            rewards.add(Rewards::from_numbers(&numbers[1..]));
        }
        Ok((total, rewards.report(dataset.is_pairs())))
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
        told: &mut Told<'_, impl Observer<M>>,
    ) -> Result<()> {
        let Some(folder) = &options.folder else { return Ok(()) };
        let folder = folder.join(name);
        by_first(&*self.ranks, || self.save(&folder))?;
        self.checkpoint = Some(folder.clone());
        told.tell::<M>(&Event::Checkpoint(&folder));
        Ok(())
    }

    /// Deletes all but the newest of the checkpoints that are kept by their steps.
    fn delete_older(&self, options: &RunOptions) -> Result<()> {
        let Some(folder) = &options.folder else { return Ok(()) };
        let mut kept = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let path = entry.map_err(Error::io(folder))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let steps = name.strip_prefix(KEPT).and_then(|steps| steps.parse::<u64>().ok());
            // Of this run's past: what a longer run left there isn't ours to delete.
            if let Some(steps) = steps.filter(|steps| *steps <= self.step && checkpoint::exists(&path)) {
                kept.push((steps, path));
            }
        }
        kept.sort();
        kept.truncate(kept.len().saturating_sub(options.keep));
        kept.iter().try_for_each(|(_, path)| checkpoint::delete(path))
    }

    /// Writes trainable tensors, optimizer, step, data cursor and configuration; `folder` is replaced as a whole. Of several
    /// ranks each that is asked writes: one is enough.
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
            data: self.dataset.fingerprint()?,
            model: self.whole_identity()?,
            files: BTreeMap::new(),
        };
        let parameters = trainable::collect(self.model())?;
        checkpoint::save(folder.as_ref(), state, &parameters, &self.optimizers).map_err(|error| match error {
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
                let found = fingerprint(self.model(), |parameter| !parameter.trained)?;
                self.frozen.get_or_init(|| found).clone()
            }
        };
        identity.insert("frozen parameters".into(), frozen);
        // Rows are packed and cut by it.
        identity.insert(checkpoint::SEQ_LEN.into(), self.dataset.options().seq_len.to_string());
        if let Some(known) = &self.known_answers {
            let bytes: Vec<u8> = known.iter().flat_map(|log_p| log_p.to_le_bytes()).collect();
            identity.insert("known answers".into(), hex(Sha256::digest(bytes)));
        }
        if let Some(reference) = &self.reference {
            let found = match self.reference_hash.get() {
                Some(found) => found.clone(),
                None => {
                    let found = reference.fingerprint()?;
                    self.reference_hash.get_or_init(|| found).clone()
                }
            };
            identity.insert("reference".into(), found);
        }
        if let Some((name, _)) = &self.own_optimizer {
            identity.insert("optimizer".into(), name.clone());
        }
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
    /// bit. Where no learning rate depends on the number of steps, the run may have more than the saved one.
    ///
    /// The trainer is made as it was for the saved run: same base, same adapters. The best parameters so far come from
    /// `best` beside `folder`, if it is there. Of several ranks the first one reads, and tells the others.
    ///
    /// # Errors
    /// A checkpoint that is incomplete, or of another configuration, data set, model or
    /// [identity](Self::with_identity): the first difference is named.
    pub fn resumed(mut self, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        self.together(|trainer| trainer.go_on(folder), |replica| replica.go_on(folder))?;
        Ok(self)
    }

    /// Goes on from what rank 0 finds in `folder`.
    fn go_on(&mut self, folder: &Path) -> Result<()> {
        let given = checkpoint::from_first(&*self.ranks, folder)?;
        let copy = given.as_ref().map(|given| given.path().join("last"));
        let own = self.go_on_from(copy.as_deref().unwrap_or(folder));
        agreed(&*self.ranks, own)?;
        self.checkpoint = Some(folder.into());
        Ok(())
    }

    fn go_on_from(&mut self, folder: &Path) -> Result<()> {
        let fresh = trainable::collect(self.model())?;
        let identity = self.whole_identity()?;
        let run = checkpoint::Run {
            config: &self.config,
            data: &self.dataset.fingerprint()?,
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
        let kind = self.own_optimizer.is_none().then_some(self.config.optimizer);
        let parameters = saved.parameters.clone();
        self.model = self.model.take().map(|model| trainable::restore(model, parameters));
        let own = self.own_optimizer.as_ref().map(|(_, make)| &**make);
        let mut optimizers = Optimizers::new(self.model(), &self.config, own)?;
        checkpoint::load_optimizers(folder, &saved, kind, &mut optimizers)?;
        self.optimizers = optimizers;
        self.batches = Batches::resume(self.dataset.clone(), self.config.batch.clone(), saved.state.cursor)?;
        (self.step, self.skipped) = (saved.state.step, saved.state.skipped);
        Ok(())
    }
}

/// Checkpoints that stay are named by this and their steps.
const KEPT: &str = "step-";

/// Who hears of a run.
struct Told<'a, O> {
    metrics: Option<Metrics>,
    observer: &'a mut O,
    /// Whether the observer has said that it is enough, since the step began.
    stopped: bool,
}

impl<O> Told<'_, O> {
    fn tell<M>(&mut self, event: &Event<'_>)
    where
        O: Observer<M>,
    {
        if let Some(mut metrics) = self.metrics.take() {
            let written = metrics.write(event);
            self.metrics = self.or_without::<M, _>(written).map(|()| metrics);
        }
        self.stopped |= self.observer.on_event(event).is_break();
    }

    /// What there is, or a warning that the run goes on without figures.
    fn or_without<M, T>(&mut self, found: Result<T>) -> Option<T>
    where
        O: Observer<M>,
    {
        match found {
            Ok(found) => Some(found),
            Err(error) => {
                let text = format!("the run goes on without writing figures: {error}");
                tracing::warn!("{text}");
                self.stopped |= self.observer.on_event(&Event::Warning(&text)).is_break();
                None
            }
        }
    }
}

/// Of a micro-batch its loss, and the numbers of its rewards.
const FIGURES: usize = 1 + Rewards::NUMBERS;

impl Outcome {
    fn figures(&self) -> [f64; FIGURES] {
        let rewards = self.rewards.to_numbers();
        std::array::from_fn(|index| if index == 0 { self.loss } else { rewards[index - 1] })
    }
}

/// What all micro-batches of a step come to.
struct Shared {
    /// Numbers of each, in their order.
    figures: Vec<[f64; FIGURES]>,
    /// The sum of their gradients.
    gradients: GradientsParams,
    /// Of that sum.
    squared_norm: f64,
    /// Spent between ranks.
    exchange_seconds: f64,
}

/// What a rank's micro-batches come to.
struct Found {
    /// Sums of their gradients.
    sums: PairwiseSum<GradientsParams>,
    /// Numbers of each.
    figures: Vec<[f64; FIGURES]>,
    /// Losses of each that are still on the device, to be added to its figures.
    losses: Vec<PendingLoss>,
}

impl Found {
    /// Nothing yet, of the micro-batches from `first` on.
    fn new(first: usize) -> Self {
        Self { sums: PairwiseSum::new(first), figures: Vec::new(), losses: Vec::new() }
    }

    /// The partial sums in host memory, and, after the step's number, the figures of each micro-batch.
    fn on_host<M: CausalLm>(self, model: &M, step: u64) -> Result<(PairwiseSum<Vec<f32>>, Vec<f64>)> {
        let (losses, _) = PendingLoss::read_all(self.losses, Vec::new())?;
        let flat = self.sums.try_map(|gradients| flattened(model, gradients))?;
        let figures = with_losses(self.figures, losses).into_iter().flatten();
        let figures = std::iter::once(step as f64).chain(figures).collect();
        Ok((flat, figures))
    }

    fn push<M: CausalLm>(
        &mut self,
        model: &M,
        gradients: GradientsParams,
        loss: PendingLoss,
        figures: [f64; FIGURES],
    ) {
        self.sums.push(gradients, |a, b| added(model, a, b));
        self.losses.push(loss);
        self.figures.push(figures);
    }
}

/// Figures whose losses were still on the device.
fn with_losses(mut figures: Vec<[f64; FIGURES]>, losses: Vec<f64>) -> Vec<[f64; FIGURES]> {
    figures.iter_mut().zip(losses).for_each(|(figures, loss)| figures[0] += loss);
    figures
}

/// What the losses of these pairs or answers are divided by.
fn totals<'a>(batches: impl Iterator<Item = &'a Batch>, loss: PreferenceLoss) -> Totals {
    let every = if loss.is_of_labels() { 1 } else { 2 };
    let mut totals = Totals::default();
    for placed in batches.flat_map(|batch| batch.examples.iter().step_by(every)) {
        let weight = f64::from(placed.weight);
        totals.add(Totals { units: weight, chosen_tokens: weight * placed.targets as f64 });
    }
    totals
}

/// A micro-batch's answers beside the reference's.
struct Comparison<'a> {
    loss: PreferenceLoss,
    batch: &'a Batch,
    /// Log-probabilities under the reference; zeros where there is none.
    reference: Vec<f64>,
    /// KTO's `z`.
    divergence: f64,
}

impl<'a> Comparison<'a> {
    fn new<M: CausalLm>(loss: PreferenceLoss, batch: &'a Batch, trainer: &Trainer<M>) -> Result<Self> {
        Self::with_data(loss, batch, &trainer.dataset, trainer, trainer.known_answers.as_deref())
    }

    fn with_data<M: CausalLm>(
        loss: PreferenceLoss,
        batch: &'a Batch,
        dataset: &Dataset,
        trainer: &Trainer<M>,
        known: Option<&[f64]>,
    ) -> Result<Self> {
        let asked = trainer.reference.as_deref().filter(|_| loss.has_reference());
        let reference = match (known, asked) {
            (Some(known), _) => batch.examples.iter().map(|placed| known[placed.index]).collect(),
            (None, Some(reference)) => reference.log_p(batch)?,
            (None, None) => vec![0.0; batch.examples.len()],
        };
        let divergence = match asked {
            Some(reference) if loss.is_of_labels() => {
                let mixed = batch.mismatched(dataset)?;
                let before = reference.log_p(&mixed)?;
                let now = reference::log_p(trainer.model(), &mixed)?;
                let sum: f64 = now.iter().zip(&before).map(|(now, before)| now - before).sum();
                (sum / now.len() as f64).max(0.0)
            }
            _ => 0.0,
        };
        Ok(Self { loss, batch, reference, divergence })
    }

    fn outcome(&self, nll: &[f32], totals: Totals) -> kiln_models::Result<Outcome> {
        let counts: Vec<usize> = self.batch.examples.iter().map(|placed| placed.targets).collect();
        let log_p = preference::sums(nll, &counts)?.into_iter().map(|nll| -nll).collect();
        Ok(self.of(log_p, totals))
    }

    fn of(&self, log_p: Vec<f64>, totals: Totals) -> Outcome {
        let answers: Vec<Answer> = log_p
            .into_iter()
            .zip(&self.reference)
            .zip(&self.batch.examples)
            .map(|((log_p, reference), placed)| Answer {
                log_p,
                tokens: placed.targets,
                reference: *reference,
                weight: f64::from(placed.weight),
            })
            .collect();
        if !self.loss.is_of_labels() {
            return self.loss.of_pairs(&answers, totals);
        }
        let labels: Vec<bool> = self.batch.examples.iter().map(|placed| placed.label == Some(true)).collect();
        self.loss.of_labels(&answers, &labels, self.divergence, totals)
    }
}

/// Whether the data has what the loss is of.
fn check_form(dataset: &Dataset, loss: Option<&PreferenceLoss>, rows: usize) -> Result<()> {
    let (found, fits) = match (dataset.is_pairs(), dataset.has_labels()) {
        (true, _) => {
            ("pairs of a chosen and a rejected answer", loss.is_some_and(|loss| !loss.is_of_labels()))
        }
        (false, true) => ("answers with labels", loss.is_some_and(PreferenceLoss::is_of_labels)),
        (false, false) => ("examples without labels", loss.is_none()),
    };
    if !fits {
        let expected = match loss {
            None => "examples without labels, or a preference loss",
            Some(loss) if loss.is_of_labels() => "answers with labels, for this loss",
            Some(_) => "pairs of a chosen and a rejected answer, for this loss",
        };
        return Err(Problem::new("data", expected, found).argument());
    }
    match loss {
        Some(loss) if loss.is_of_labels() && rows.min(dataset.len()) < 2 => {
            let expected = "at least 2 answers, of which each is compared with the other's prompt";
            Err(Problem::new("batch", expected, rows.min(dataset.len())).argument())
        }
        _ => Ok(()),
    }
}

/// Whether the model has positions for the rows.
fn check_length<M: CausalLm>(name: &str, dataset: &Dataset, model: &M) -> Result<()> {
    let (length, limit) = (dataset.options().seq_len, model.max_positions());
    match length > limit {
        true => Err(Problem::new(name, format!("at most {limit}, the model's positions"), length).argument()),
        false => Ok(()),
    }
}
