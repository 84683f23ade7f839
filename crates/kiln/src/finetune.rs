//! The recipe: attach, train, evaluate, keep the best; then save, merge, export.

use std::{
    convert::Infallible,
    fmt,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use kiln_adapters::{AdapterConfig, AnyAdapter};
use kiln_distributed::{Alone, agreed};
use kiln_eval::{Report, Task, TaskData};
use kiln_models::{
    CausalLm, Decoder, GenerateOptions, Recompute,
    chat::Message,
    config::{ModelConfig, TensorRole, TensorShape},
    export::{ExportReport, LoraFactors, export_gguf_lora},
    memory::{Halves, ProcessConstants, Step, Work, estimate},
};
use kiln_quant_core::{
    DeviceLimits, QuantLinear, Slots, TableUpdates,
    files::{OutputFolder, whole_folder},
    trained_values,
};
use kiln_training::{
    BatchOptions, Communicator, Dataset, DatasetLoss, Evaluation, Event, Figure, Observer, RunOptions,
    RunReport, ScheduleKind, Trainer, TrainerConfig,
};

use crate::{
    AdaptedModel, Base, Error, Result, Tuned,
    base::Language,
    task_score::{self, TaskScore},
};

/// A fine-tune that is still to be run: new adapters on a [`Base`] ([`Base::finetune`]) or those that are there already
/// ([`FineTuned::finetune`]), and how they are trained.
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `epochs` or `steps` | 1 epoch | how long; the one set last counts |
/// | `batch` | 4 | rows of a micro-batch, or all [`BatchOptions`] |
/// | `lr`, `warmup`, `schedule` | 3e-4, 0, constant | the learning rate |
/// | `recompute` | none on the CPU, blocks elsewhere | memory for time |
/// | `trainer` | as these say | every option of the trainer at once |
/// | `held_out`, `patience` | none | data whose loss is measured on the way, and how long it may fail to fall |
/// | `tasks` | none | questions that the model is asked on the way; their answers are the score where nothing is held out |
/// | `checkpoints`, `resume` | none | a folder for `last` and `best`, and whether to go on from `last` if it is there |
/// | `keep` | 0 | so many of the newest checkpoints stay beside `last` |
/// | `metrics` | none | a folder for the figures of every step: JSON lines, and TensorBoard's event files |
/// | `reference` | the model as the run begins | what answers are compared with, or the teacher of a distillation |
/// | `known_answers` | none | a file that keeps what the reference thinks of the data |
/// | `memory_limit` | none | bytes that the process may take; a run that is expected to take more is refused, with what would help |
/// | `ranks` | none | processes or threads that share each step's micro-batches |
/// | `devices` | none | further devices on which replicas in this process do |
/// | `samples` | none | prompts that are continued after every measurement |
/// | `on_event` | silent | hears every step and evaluation; [`ControlFlow::Break`] stops the run |
///
/// ```
/// use std::ops::ControlFlow;
/// use kiln::prelude::*;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let text = format!("{folder}/text/shift_test_moby.u16le");
/// let base = Base::open(folder)?.with_bits(4).load()?;
/// # let options = base.data_options(32);
/// # let ids = std::fs::read(&text).unwrap()[..1024].chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect();
/// # let data = kiln::training::Dataset::from_ids(ids, &options)?;
/// # /*
/// let data = base.data("chat.jsonl", 512)?;
/// # */
/// let (train, held_out) = data.split(0.2, 0)?;
/// let tuned = base
///     .finetune(AdapterConfig::lora(4, 8.0).with_dropout(0.05), train)
///     .with_steps(4)
///     .with_held_out(held_out, 2)
///     .with_patience(2)
///     .on_event(|event| {
///         println!("{event}");
///         ControlFlow::Continue(())
///     })
///     .run()?;
/// println!("{}", tuned.generate("The whale", 8)?);
/// # Ok::<(), kiln::Error>(())
/// ```
#[must_use = "`run` trains"]
pub struct FineTune<'a> {
    start: Start<'a>,
    data: Arc<Dataset>,
    length: Length,
    trainer: TrainerConfig,
    options: RunOptions,
    resume: bool,
    reference: Option<&'a Base>,
    known_answers: Option<PathBuf>,
    memory_limit: Option<u64>,
    ranks: Option<Arc<dyn Communicator>>,
    devices: Vec<Device>,
    tasks: Option<TaskScore>,
    samples: Vec<String>,
    sampling: GenerateOptions,
    on_event: OnEvent<'a>,
}

/// What hears of a run.
type OnEvent<'a> = Box<dyn FnMut(&Event<'_>) -> ControlFlow<()> + 'a>;

/// What is trained.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
enum Start<'a> {
    New(&'a Base, AdapterConfig),
    GoingOn(&'a FineTuned),
}

#[derive(Debug, Clone, Copy)]
enum Length {
    Steps(u64),
    Epochs(u64),
}

impl<'a> FineTune<'a> {
    pub(crate) fn new(base: &'a Base, adapters: AdapterConfig, data: Arc<Dataset>) -> Self {
        Self::of(Start::New(base, adapters), data)
    }

    fn of(start: Start<'a>, data: Arc<Dataset>) -> Self {
        const ROWS: usize = 4;
        let devices = match &start {
            Start::New(base, _) => base.model().devices(),
            Start::GoingOn(tuned) => tuned.model().devices(),
        };
        // A GPU's memory is what ends first.
        let bounded = devices.iter().any(|device| DeviceLimits::of(device).largest_tensor.is_some());
        let recompute = if bounded { Recompute::Block } else { Recompute::None };
        Self {
            start,
            data,
            length: Length::Epochs(1),
            trainer: TrainerConfig::new(1, ROWS).with_recompute(recompute),
            options: RunOptions::new(),
            resume: false,
            reference: None,
            known_answers: None,
            memory_limit: None,
            ranks: None,
            devices: Vec::new(),
            tasks: None,
            samples: Vec::new(),
            sampling: GenerateOptions::new(32),
            on_event: Box::new(|_| ControlFlow::Continue(())),
        }
    }

    /// Trains for `epochs` passes over the data.
    pub fn with_epochs(mut self, epochs: u64) -> Self {
        self.length = Length::Epochs(epochs);
        self
    }

    /// Trains for `steps` steps.
    pub fn with_steps(mut self, steps: u64) -> Self {
        self.length = Length::Steps(steps);
        self
    }

    /// Sets the rows of a micro-batch, or all options of the batches.
    pub fn with_batch(mut self, batch: impl Into<BatchOptions>) -> Self {
        self.trainer.batch = batch.into();
        self
    }

    /// Sets the peak learning rate.
    pub fn with_lr(mut self, lr: f64) -> Self {
        self.trainer.lr = lr;
        self
    }

    /// Sets the steps of linear warm-up.
    pub fn with_warmup(mut self, warmup: u64) -> Self {
        self.trainer.warmup = warmup;
        self
    }

    /// Sets what follows the warm-up.
    pub fn with_schedule(mut self, schedule: ScheduleKind) -> Self {
        self.trainer.schedule = schedule;
        self
    }

    /// Sets what the backward pass computes again to save memory.
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.trainer.recompute = recompute;
        self
    }

    /// Sets all options of the trainer, its steps included.
    pub fn with_trainer(mut self, trainer: TrainerConfig) -> Self {
        self.length = Length::Steps(trainer.steps);
        self.trainer = trainer;
        self
    }

    /// Measures the loss on `held_out` after every `every` steps and at the end; the model that comes back is the best.
    pub fn with_held_out(mut self, held_out: impl Into<Arc<Dataset>>, every: u64) -> Self {
        self.options = self.options.with_held_out(held_out, every);
        self
    }

    /// Asks the model `tasks` after every `every` steps and at the end, as `how` says; [`Event::Figure`] tells what was found, and
    /// it is written with the other figures. Without held-out data it is the score that decides which model comes back: the mean over
    /// tasks of what their first metric lacks of 1 (an accuracy's rate of errors), or of that metric where less is better. A run
    /// that goes on needs the same tasks. With held-out data the loss decides; of two numbers of steps the one set last counts. Each
    /// of several ranks asks for itself.
    ///
    /// ```
    /// use kiln::{eval::{Evaluation, Task, TaskData}, prelude::*};
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
    /// # let text = format!("{folder}/text/shift_test_moby.u16le");
    /// # let base = Base::open(folder)?.with_bits(4).load()?;
    /// # let ids = std::fs::read(&text).unwrap()[..1024].chunks(2).map(|b| u16::from_le_bytes([b[0], b[1]]).into()).collect();
    /// # let data = kiln::training::Dataset::from_ids(ids, &base.data_options(32))?;
    /// let question = r#"{"goal": "To make ice,", "sol1": "freeze water", "sol2": "burn wood", "label": 0}"#;
    /// let row = serde_json::from_str(question).unwrap();
    /// let data_of_task = TaskData { evaluated: vec![row], fewshot: vec![] };
    /// let tuned = base
    ///     .finetune(AdapterConfig::lora(4, 8.0), data)
    ///     .with_steps(2)
    ///     .with_tasks([(Task::builtin("piqa")?, data_of_task)], Evaluation::new(), 2)
    ///     .run()?;
    /// assert!([0.0, 1.0].contains(&tuned.report().unwrap().evaluations[0].score));
    /// # Ok::<(), kiln::Error>(())
    /// ```
    pub fn with_tasks(
        mut self,
        tasks: impl Into<Arc<[(Task, TaskData)]>>,
        how: kiln_eval::Evaluation,
        every: u64,
    ) -> Self {
        self.tasks = Some(TaskScore::new(tasks.into(), how));
        self.options = self.options.with_evaluations(every);
        self
    }

    /// Ends the run when so many measurements in a row were no better than the best.
    pub fn with_patience(mut self, patience: u64) -> Self {
        self.options = self.options.with_patience(patience);
        self
    }

    /// Writes checkpoints into `folder`: `last` every `every` steps (0: at the end only), `best` whenever there is one.
    pub fn with_checkpoints(mut self, folder: impl Into<PathBuf>, every: u64) -> Self {
        self.options = self.options.with_folder(folder).with_save_every(every);
        self
    }

    /// As [`with_checkpoints`](Self::with_checkpoints), in a folder that the caller has claimed and holds beyond the run.
    pub fn with_claimed(mut self, folder: impl Into<Arc<OutputFolder>>, every: u64) -> Self {
        self.options = self.options.with_claimed(folder).with_save_every(every);
        self
    }

    /// Keeps so many of the newest checkpoints beside `last`.
    pub fn with_keep(mut self, keep: usize) -> Self {
        self.options = self.options.with_keep(keep);
        self
    }

    /// Writes the figures of every step and measurement into `folder`.
    pub fn with_metrics(mut self, folder: impl Into<PathBuf>) -> Self {
        self.options = self.options.with_metrics(folder);
        self
    }

    /// Compares answers with what `reference` thinks of them, or imitates it: [`Trainer::with_reference`].
    pub fn with_reference(mut self, reference: &'a Base) -> Self {
        self.reference = Some(reference);
        self
    }

    /// Asks the reference about all of the data before the first step, or reads from `file` what was found before:
    /// [`Trainer::with_known_answers`].
    pub fn with_known_answers(mut self, file: impl Into<PathBuf>) -> Self {
        self.known_answers = Some(file.into());
        self
    }

    /// Refuses a run that is expected to take more than so many bytes, before the first step: by
    /// [`memory::estimate`](kiln_models::memory::estimate), of a process on the CPU, of LoRA on all linears of the adapters'
    /// rank, whatever the adapters, and of gradients and averages of what is trained besides. A reference counts in full, also where it shares its weights with the model.
    pub fn with_memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// Shares the work with other ranks, which run the same program: [`Trainer::with_ranks`]. Rank 0 writes, hears and says
    /// whether to go on; all come back with the same parameters.
    pub fn with_ranks(mut self, ranks: Arc<dyn Communicator>) -> Self {
        self.ranks = Some(ranks);
        self
    }

    /// Shares the work with replicas of the model on further devices: [`Trainer::with_devices`].
    pub fn with_devices(mut self, devices: impl Into<Vec<Device>>) -> Self {
        self.devices = devices.into();
        self
    }

    /// Continues `prompts` after every measurement; [`Event::Sample`] tells how.
    pub fn with_samples<T: Into<String>>(
        mut self,
        prompts: impl IntoIterator<Item = T>,
        options: impl Into<GenerateOptions>,
    ) -> Self {
        (self.samples, self.sampling) = (prompts.into_iter().map(Into::into).collect(), options.into());
        self
    }

    /// Goes on from `last` in the folder of the checkpoints, if it is there.
    pub fn with_resume(mut self) -> Self {
        self.resume = true;
        self
    }

    /// Hears every step, evaluation and checkpoint, and may stop the run.
    pub fn on_event(mut self, on_event: impl FnMut(&Event<'_>) -> ControlFlow<()> + 'a) -> Self {
        self.on_event = Box::new(on_event);
        self
    }

    /// Trains. What comes back has the parameters of the best evaluation, or the last ones without evaluations.
    ///
    /// # Errors
    /// Adapters, options or data that don't fit the model or one another; a checkpoint of another run; training that
    /// diverges; files that can't be written.
    pub fn run(mut self) -> Result<FineTuned> {
        let ranks = self.ranks.take().unwrap_or_else(|| Arc::new(Alone));
        let Prepared { mut trainer, adapters, language } = agreed(&*ranks, self.prepare(ranks.size()))?;
        if let Some(file) = &self.known_answers {
            trainer = trainer.with_known_answers_on(&*ranks, file)?;
        }
        let rows = self.trainer.batch.batch;
        let Self { options, resume, devices, tasks, samples, sampling, on_event, .. } = self;
        let last = options.folder.as_ref().map(|folder| folder.join("last"));
        let mut goes_on = last.as_ref().is_some_and(|last| resume && whole_folder(last).exists());
        if ranks.size() > 1 {
            ranks.same(&[("folder of checkpoints".into(), last.is_some().to_string())].into())?;
            trainer = trainer.with_ranks(ranks.clone())?;
            // Others may not see the folder.
            goes_on = ranks.broadcast(vec![u8::from(goes_on)])? == [1];
        } else if !devices.is_empty() {
            trainer = trainer.with_devices(&devices)?;
        }
        if let Some(last) = last.filter(|_| goes_on) {
            trainer = trainer.resumed(last)?;
        }
        let mut listener =
            Listener { language: language.clone(), tasks, rows, asked: None, samples, sampling, on_event };
        let report = trainer.run_with(&options, &mut listener)?;
        let tuned = Tuned::from_parts(trainer.into_best_model(), adapters);
        Ok(FineTuned::new(tuned, language, Some(report)))
    }

    /// A trainer of this rank alone, before the first step.
    fn prepare(&self, ranks: usize) -> Result<Prepared> {
        if ranks > 1 && !self.devices.is_empty() {
            let expected = format!("none, beside {ranks} ranks: a rank for each device");
            return Err(Error::argument("devices", expected, self.devices.len()));
        }
        let config = self.trainer.clone();
        let config = match self.length {
            Length::Steps(steps) => config.with_steps(steps),
            Length::Epochs(epochs) => config.with_epochs(&self.data, epochs)?,
        };
        let (tuned, language) = match &self.start {
            Start::New(base, adapters) => {
                let mut adapters = adapters.clone();
                adapters.save_tables |= base.has_grown();
                (Tuned::attach(base.model().clone(), &adapters)?, base.language())
            }
            Start::GoingOn(tuned) => (tuned.tuned.clone(), tuned.language.clone()),
        };
        if !self.samples.is_empty() && self.options.evaluate_every == 0 {
            let expected = "held-out data: prompts are continued after its measurements";
            return Err(Error::argument("samples", expected, "none"));
        }
        if let Some(limit) = self.memory_limit {
            check_memory(limit, &tuned, tuned.model().config(), &config, &self.data, self.reference)?;
        }
        let mut identity = tuned.identity();
        if let Some(tasks) = &self.tasks {
            tasks.check(tuned.model(), language.tokenizer())?;
            if self.options.evaluate_every == 0 {
                return Err(Error::argument("evaluate_every", "at least 1, for the tasks", 0));
            }
            if self.options.held_out.is_none() {
                identity.insert("tasks".to_owned(), tasks.identity());
            }
        }
        if self.options.folder.is_some() || ranks > 1 {
            identity.extend(language.identity()?);
        }
        let (model, adapters) = tuned.into_parts();
        let mut trainer = Trainer::new(model, self.data.clone(), config)?.with_identity(identity);
        if let Some(reference) = self.reference {
            trainer = trainer.with_reference(reference.model().clone())?;
        }
        Ok(Prepared { trainer, adapters, language })
    }
}

/// What a run is made of.
struct Prepared {
    trainer: Trainer<AdaptedModel>,
    adapters: AdapterConfig,
    language: Arc<Language>,
}

/// Whether a step is expected to fit into `limit` bytes.
fn check_memory(
    limit: u64,
    tuned: &Tuned<Decoder<QuantLinear>>,
    model: &ModelConfig,
    config: &TrainerConfig,
    data: &Dataset,
    reference: Option<&Base>,
) -> Result<()> {
    let bytes_of = |found: usize, linear: &QuantLinear| found + linear.storage_bytes();
    let weights = tuned.model().slots().iter().map(|(_, slot)| &slot.base).fold(0, bytes_of);
    // Of what is trained outside the slots a gradient and two averages.
    let in_slots: usize = tuned.adapters().iter().map(|(_, adapter)| trained_values(adapter)).sum();
    let outside = 12 * trained_values(tuned.model()).saturating_sub(in_slots) as u64;
    // What stands outside the slots is taken to be dense: embeddings and head.
    let tables = model.tensors().into_iter();
    let tables = tables.filter(|tensor| matches!(tensor.role, TensorRole::Embedding | TensorRole::Head));
    let values =
        |tensor: TensorShape| tensor.shape.iter().fold(1usize, |all, size| all.saturating_mul(*size));
    let tables = tables.map(values).fold(0usize, usize::saturating_add);
    let of_reference =
        |base: &Base| base.model().slots().iter().map(|(_, slot)| *slot).fold(4 * tables, bytes_of);
    let beside = reference.map_or(0, of_reference);
    let (rank, seq_len) = (tuned.config().rank, data.options().seq_len);
    // Both answers of a pair have a row; a batch that is too large is refused elsewhere.
    let sides = if data.is_pairs() { 2 } else { 1 };
    let now = Step {
        batch: config.batch.batch.min(u32::MAX as usize) * sides,
        seq_len,
        recompute: config.recompute,
        logit_rows: config.logit_rows,
        halves: Halves::of(tuned.model()),
    };
    let needed = |step: Step| {
        let work = Work::lora(model, rank, &step);
        let live = estimate(model, weights + 4 * tables, &work, &step).peak_rss(&ProcessConstants::CPU);
        live as u64 + beside as u64 + outside
    };
    if needed(now) <= limit {
        return Ok(());
    }
    let recomputed = Step { recompute: Recompute::Block, ..now };
    let one = Step { batch: sides, ..recomputed };
    let ways = [
        ("recompute: Block", recomputed),
        ("recompute: Block and a batch of 1 (accumulate more)", one),
        ("recompute: Block, a batch of 1 and half the length", Step { seq_len: seq_len / 2, ..one }),
    ];
    let mega = |bytes: u64| bytes.div_ceil(1_000_000);
    let help = match ways.into_iter().find(|(_, step)| needed(*step) <= limit) {
        Some((way, step)) => format!("{way} would take {} MB", mega(needed(step))),
        None => "fewer bits, a smaller model or more memory would help".into(),
    };
    let expected = format!("at least {} MB for this step; {help}", mega(needed(now)));
    Err(Error::argument("memory_limit", expected, format!("{} MB", mega(limit))))
}

/// Hears of a run, asks the model tasks, and continues prompts after measurements.
struct Listener<'a> {
    language: Arc<Language>,
    tasks: Option<TaskScore>,
    /// Rows of a forward pass of tasks.
    rows: usize,
    /// What the model said when it was scored.
    asked: Option<Report>,
    samples: Vec<String>,
    sampling: GenerateOptions,
    on_event: OnEvent<'a>,
}

impl Observer<AdaptedModel> for Listener<'_> {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        (self.on_event)(event)
    }

    fn score(
        &mut self,
        model: &AdaptedModel,
        _: u64,
    ) -> std::result::Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        let Some(tasks) = &self.tasks else { return Ok(None) };
        let report = tasks.report(model, self.language.tokenizer(), self.rows)?;
        let score = tasks.mean_miss(&report);
        self.asked = Some(report);
        Ok(Some(score))
    }

    fn figures(
        &mut self,
        model: &AdaptedModel,
        _: &Evaluation,
    ) -> std::result::Result<Vec<Figure>, Box<dyn std::error::Error + Send + Sync>> {
        let Some(tasks) = &self.tasks else { return Ok(Vec::new()) };
        let report = match self.asked.take() {
            Some(report) => report,
            None => tasks.report(model, self.language.tokenizer(), self.rows)?,
        };
        Ok(task_score::figures(&report))
    }

    fn inspect(
        &mut self,
        model: &AdaptedModel,
        _: &Evaluation,
    ) -> std::result::Result<ControlFlow<()>, Box<dyn std::error::Error + Send + Sync>> {
        let mut flow = ControlFlow::Continue(());
        for prompt in &self.samples {
            let mut silent = |_: &str| ControlFlow::Continue(());
            let text = self.language.generate(model, prompt, self.sampling.clone(), &mut silent)?;
            if (self.on_event)(&Event::Sample { prompt, text: &text }).is_break() {
                flow = ControlFlow::Break(());
            }
        }
        Ok(flow)
    }
}

/// The data and the callback are large; the rest says what is run.
impl fmt::Debug for FineTune<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, length, trainer, resume, .. } = self;
        let mut s = f.debug_struct("FineTune");
        s.field("start", start).field("length", length);
        s.field("trainer", trainer).field("resume", resume).finish_non_exhaustive()
    }
}

/// A language model with its adapters, tokenizer and chat template: what a [`FineTune`] gives, or
/// [`Base::load_adapters`].
pub struct FineTuned {
    tuned: Tuned<Decoder<QuantLinear>>,
    language: Arc<Language>,
    report: Option<RunReport>,
}

impl FineTuned {
    pub(crate) fn new(
        tuned: Tuned<Decoder<QuantLinear>>,
        language: Arc<Language>,
        report: Option<RunReport>,
    ) -> Self {
        let grown = language.is_grown(tuned.model().vocab_size());
        let (model, mut adapters) = tuned.into_parts();
        // A folder without the tables of more tokens could not be used.
        adapters.save_tables |= grown;
        Self { tuned: Tuned::from_parts(model, adapters), language, report }
    }

    /// Losses, evaluations and the end of the run that trained it; `None` of loaded adapters.
    pub fn report(&self) -> Option<&RunReport> {
        self.report.as_ref()
    }

    /// Model and adapters, for what isn't here: requantizing, the fingerprint of the base.
    pub fn tuned(&self) -> &Tuned<Decoder<QuantLinear>> {
        &self.tuned
    }

    /// Model and adapters alone.
    pub fn into_tuned(self) -> Tuned<Decoder<QuantLinear>> {
        self.tuned
    }

    /// The model.
    pub fn model(&self) -> &AdaptedModel {
        self.tuned.model()
    }

    /// A fine-tune of these adapters on `data`, still to be run. What is here stays as it is.
    pub fn finetune(&self, data: impl Into<Arc<Dataset>>) -> FineTune<'_> {
        FineTune::of(Start::GoingOn(self), data.into())
    }

    /// The model without its adapters: the base that they belong to, calibrated or split as they started. What was trained
    /// whole stays as it is now.
    pub fn without_adapters(&self) -> Base {
        let bare = self.model().clone().try_map(|_, slot| Ok::<_, Infallible>(slot.into_base()));
        match bare {
            Ok(model) => Base::of(model.with_table_updates(TableUpdates::default()), self.language.clone()),
            Err(never) => match never {},
        }
    }

    /// Writes the adapters as Kiln's own folder, tied to its base: [`Tuned::save`]; with the tokenizer, if tokens were
    /// added to it.
    ///
    /// # Errors
    /// As [`Tuned::save`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.tuned.save_with(folder.as_ref(), self.language.added_tokens()?)
    }

    /// Writes the adapters as a PEFT folder: [`Tuned::save_peft`]; with the tokenizer, if tokens were added to it.
    ///
    /// # Errors
    /// As [`Tuned::save_peft`].
    pub fn save_peft(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.tuned.save_peft_with(folder.as_ref(), self.language.added_tokens()?)
    }

    /// The mean loss on the rows of a data set.
    ///
    /// # Errors
    /// Data that doesn't fit the model.
    pub fn evaluate(&self, data: &Dataset) -> Result<DatasetLoss> {
        self.language.evaluate(self.model(), data)
    }

    /// As [`Base::generate`].
    ///
    /// # Errors
    /// As [`Base::generate`].
    pub fn generate(&self, prompt: &str, options: impl Into<GenerateOptions>) -> Result<String> {
        self.generate_with(prompt, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Base::generate_with`].
    ///
    /// # Errors
    /// As [`Base::generate`].
    pub fn generate_with(
        &self,
        prompt: &str,
        options: impl Into<GenerateOptions>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        self.language.generate(self.model(), prompt, options.into(), on_text)
    }

    /// As [`Base::chat`].
    ///
    /// # Errors
    /// As [`Base::chat`].
    pub fn chat(&self, messages: &[Message], options: impl Into<GenerateOptions>) -> Result<String> {
        self.chat_with(messages, options, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`Base::chat_with`].
    ///
    /// # Errors
    /// As [`Base::chat`].
    pub fn chat_with(
        &self,
        messages: &[Message],
        options: impl Into<GenerateOptions>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        self.language.chat(self.model(), messages, options.into(), on_text)
    }

    /// The model with its adapters in dense weights, whatever the adapters: [`Tuned::merge_dense`].
    pub fn merge_dense(&self) -> Base {
        Base::of(self.tuned.clone().merge_dense(), self.language.clone())
    }

    /// The model with its adapters in the packed weights, codes untouched, where the adapters allow it:
    /// [`Tuned::merge_packed`].
    ///
    /// # Errors
    /// As [`Tuned::merge_packed`].
    pub fn merge_packed(&self) -> Result<Base> {
        Ok(Base::of(self.tuned.clone().merge_packed()?, self.language.clone()))
    }

    /// Merges into dense weights and writes the model as a `.gguf` file with its tokenizer: merged linears in F16, the rest
    /// as packed as it is. The report says of each tensor what rounding it cost.
    ///
    /// # Errors
    /// As [`Base::export_gguf`].
    pub fn export_gguf(&self, path: impl AsRef<Path>) -> Result<ExportReport> {
        self.merge_dense().export_gguf(path)
    }

    /// Writes LoRA adapters as a GGUF file of type `adapter`, for the same base.
    ///
    /// # Errors
    /// Adapters of another kind, and as [`export_gguf_lora`].
    pub fn export_gguf_lora(&self, path: impl AsRef<Path>) -> Result<()> {
        let host = |path: &str, tensor: Tensor<2>| -> Result<Vec<f32>> {
            tensor
                .transpose()
                .try_into_vec_as()
                .map_err(|error| Error::argument(path, "adapters on a device that can be read", error))
        };
        let config = self.tuned.config();
        let updates = self.model().table_updates().is_some_and(|updates| !updates.is_empty());
        if updates || config.save_tables || !config.modules_to_save.is_empty() {
            let expected = "adapters of linears in blocks only, which are what such a file holds";
            return Err(Error::argument("modules_to_save", expected, "trained embedding, head or norms"));
        }
        let mut found = Vec::new();
        for (path, adapter) in self.tuned.adapters() {
            let AnyAdapter::Lora(lora) = adapter else {
                return Err(Error::argument(path, "LoRA, the only kind that GGUF has", "another adapter"));
            };
            let (a, b) = (host(&path, lora.lora_a.val())?, host(&path, lora.lora_b.val())?);
            found.push((path, lora.rank(), lora.scaling() as f32, a, b));
        }
        let factors: Vec<LoraFactors<'_>> = found
            .iter()
            .map(|(path, rank, scale, a, b)| LoraFactors { path, rank: *rank, a, b, scale: *scale })
            .collect();
        Ok(export_gguf_lora(path, self.language.checkpoint().config(), &factors)?)
    }
}

/// The weights are many; the configuration says what they are.
impl fmt::Debug for FineTuned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut s = f.debug_struct("FineTuned");
        s.field("config", self.tuned.config()).field("report", &self.report).finish_non_exhaustive()
    }
}
