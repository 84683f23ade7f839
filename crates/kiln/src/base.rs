//! A language model with all that belongs to it: tokenizer, chat template, checkpoint.

use std::{collections::BTreeMap, fmt, ops::ControlFlow, path::Path, sync::Arc};

use burn::tensor::Device;
use kiln_adapters::AdapterConfig;
use kiln_distributed::Sharing;
use kiln_models::{
    CausalLm, Checkpoint, Decoder, Finish, GenerateOptions, LoadOptions, LoadReport, Tables, Tokenizer,
    chat::{ChatTemplate, Message, TemplateContext},
    export::{ExportReport, Fallback, GgufOptions, export_gguf, save_model},
    generate_with,
};
use kiln_quant_core::{
    Compute, OwnTables, Plan, QuantLinear, QuantScheme, Scheme, Slots, TrainedParts, files::whole_folder,
    with_settled_parts, with_trained_parts,
};
use kiln_training::{
    DataOptions, Dataset, DatasetLoss, ModelTokenizer, Observer, Preview, RunOptions, RunReport, Trainer,
    TrainerConfig, evaluate,
};

use crate::{
    Error, FineTune, FineTuned, Result, Tuned,
    stop_texts::StopTexts,
    tuned::{Files, linears_identity},
};

/// A language model as its checkpoint has it, or quantized on the way, with tokenizer and chat template.
///
/// Everything here is over one model type, [`Decoder`], and compiled with this crate: a program that uses it doesn't
/// compile the models again.
///
/// ```
/// use kiln::prelude::*;
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// let base = Base::open(folder)?.with_bits(4).load()?;
/// println!("{}", base.report().storage);
/// println!("{}", base.generate("The Congress", 8)?);
/// # Ok::<(), kiln::Error>(())
/// ```
pub struct Base {
    model: Decoder<QuantLinear>,
    language: Arc<Language>,
    report: LoadReport,
    sharing: Sharing,
}

/// An open checkpoint, and how its model is to be loaded.
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `bits`, `scheme`, `schemes` | as stored | weight format of the blocks' linears |
/// | `tables` | as stored | what becomes of embedding and head |
/// | `device` | the CPU, or Burn's choice where that isn't compiled in | where to compute |
/// | `compute` | what suits the device best | what operands of products are rounded to |
/// | `chat_template` | the checkpoint's | how conversations become text |
/// | `template_context` | empty | what templates may ask for besides: the date, tools, options of the model |
#[must_use = "`load` makes the model"]
pub struct OpenBase {
    checkpoint: Checkpoint,
    format: Format,
    tables: Option<Tables>,
    device: Option<Device>,
    compute: Option<Compute>,
    template: Option<String>,
    context: TemplateContext,
}

/// Weight format of the blocks' linears.
enum Format {
    AsStored,
    Bits(u32),
    Uniform(Scheme),
    Planned(Plan<Scheme>),
}

/// What texts and conversations need besides a model.
pub(crate) struct Language {
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    template: Option<Arc<ChatTemplate>>,
    context: TemplateContext,
}

impl OpenBase {
    /// Packs the blocks' linears to `bits` bits (2 to 6, or 8) in groups of 64 inputs, as they are read.
    pub fn with_bits(mut self, bits: u32) -> Self {
        self.format = Format::Bits(bits);
        self
    }

    /// Gives all linears of the blocks one format: `"nf4:64:double".parse()?`.
    pub fn with_scheme(mut self, scheme: Scheme) -> Self {
        self.format = Format::Uniform(scheme);
        self
    }

    /// Gives each linear of the blocks its format, by path.
    pub fn with_schemes(mut self, schemes: Plan<Scheme>) -> Self {
        self.format = Format::Planned(schemes);
        self
    }

    /// Sets what becomes of embedding and head. Without it they stay as stored, or become dense with
    /// [`Scheme::Dense`]. Packed ones become dense where they are trained whole (`modules_to_save`) or get rows for more tokens.
    ///
    /// ```
    /// use kiln::{models::Tables, prelude::*};
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
    /// let base = Base::open(folder)?.with_bits(4).with_tables(Tables::Packed("affine8:64:f16".parse()?)).load()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_tables(mut self, tables: Tables) -> Self {
        self.tables = Some(tables);
        self
    }

    /// Sets where to compute.
    pub fn with_device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Sets what operands of products are rounded to.
    pub fn with_compute(mut self, compute: Compute) -> Self {
        self.compute = Some(compute);
        self
    }

    /// Sets what the chat template may ask for besides the conversation, in training and generation alike. Many templates
    /// print the date; Kiln reads no clock, so [`TemplateContext::now`] says what it is.
    pub fn with_template_context(mut self, context: TemplateContext) -> Self {
        self.context = context;
        self
    }

    /// Sets the chat template, as Jinja, in place of the checkpoint's own, if it has any.
    pub fn with_chat_template(mut self, template: impl Into<String>) -> Self {
        self.template = Some(template.into());
        self
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Reads tokenizer, chat template and model. Peak memory is the loaded model and one dense tensor.
    ///
    /// # Errors
    /// Another number of bits, a missing tokenizer, and as [`Checkpoint::load`].
    pub fn load(self) -> Result<Base> {
        let options = match self.format {
            Format::AsStored => LoadOptions::default(),
            Format::Bits(bits @ (2..=6 | 8)) => {
                LoadOptions::uniform(Scheme::Packed(QuantScheme::affine(bits, 64)))
            }
            Format::Bits(other) => return Err(Error::argument("bits", "2 to 6, or 8", other)),
            Format::Uniform(scheme) => LoadOptions::uniform(scheme),
            Format::Planned(schemes) => LoadOptions::planned(schemes),
        };
        let options = options.with_compute(self.compute);
        let options = match self.tables {
            Some(tables) => options.with_tables(tables),
            None => options,
        };
        let (model, report) = self.checkpoint.load(&options, &self.device.unwrap_or_else(default_device))?;
        let tokenizer = self.checkpoint.tokenizer()?;
        let template = match self.template {
            Some(template) => Some(ChatTemplate::new(&template)?),
            None => self.checkpoint.chat_template()?,
        };
        let (checkpoint, context) = (self.checkpoint, self.context);
        let template = template.map(Arc::new);
        let language = Arc::new(Language { checkpoint, tokenizer, template, context });
        Ok(Base { model, language, report, sharing: Sharing::default() })
    }
}

fn default_device() -> Device {
    #[cfg(feature = "flex")]
    return Device::flex();
    #[cfg(not(feature = "flex"))]
    Device::default()
}

impl Base {
    /// Opens a folder with `config.json` and safetensors, or a `.gguf` file. Nothing is downloaded.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<OpenBase> {
        Ok(OpenBase {
            checkpoint: Checkpoint::open(path)?,
            format: Format::AsStored,
            tables: None,
            device: None,
            compute: None,
            template: None,
            context: TemplateContext::default(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Decoder<QuantLinear> {
        &self.model
    }

    /// The model alone.
    pub fn into_model(self) -> Decoder<QuantLinear> {
        self.model
    }

    /// The same with another model of the same tokenizer, such as a calibrated or pruned one.
    #[must_use]
    pub fn with_model(&self, model: Decoder<QuantLinear>) -> Self {
        Self { sharing: self.sharing.clone(), ..Self::of(model, self.language.clone()) }
    }

    /// Shares the calibrations and prunings of this model, and of what `prune` and [`with_model`](Self::with_model) make of it,
    /// with other ranks, which run the same program and end up with the same model. What comes out depends on the number of
    /// parts in `sharing`, as sums do in their last bits, and not on how many ranks there are.
    ///
    /// Fine-tunes are shared by [`FineTune::with_ranks`].
    #[must_use]
    pub fn with_sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Who shares calibrations and prunings; by default one rank.
    pub fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    pub(crate) fn of(model: Decoder<QuantLinear>, language: Arc<Language>) -> Self {
        Self { model, language, report: LoadReport::default(), sharing: Sharing::default() }
    }

    /// Whether tokens were added that the checkpoint has no rows for.
    pub(crate) fn has_grown(&self) -> bool {
        self.language.is_grown(self.model.vocab_size())
    }

    pub(crate) fn language(&self) -> Arc<Language> {
        self.language.clone()
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.language.checkpoint
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        self.language.tokenizer()
    }

    /// What was loaded: bytes by tensor, and notes that a person may want to see. Empty for a model that was made of
    /// another.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    /// The model with further tokens: their rows of embedding and head, which become dense where they must grow, are the mean
    /// of the others. A fine-tune trains them by
    /// [`with_trainable_tokens`](kiln_adapters::AdapterConfig::with_trainable_tokens) of the ids that come back, or whole
    /// tables by [`with_modules_to_save`](kiln_adapters::AdapterConfig::with_modules_to_save); what it saves has the tokenizer
    /// beside it, and the tables, so that [`load_adapters`](Self::load_adapters) and PEFT find them.
    ///
    /// `special`: tokens that aren't text, such as marks of roles.
    ///
    /// ```
    /// use kiln::prelude::*;
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
    /// let base = Base::open(folder)?.with_bits(4).load()?;
    /// let (base, ids) = base.with_added_tokens(&["<|call|>", "<|result|>"], true)?;
    /// let adapters = AdapterConfig::lora(4, 8.0).with_trainable_tokens(ids);
    /// # let _ = adapters;
    /// # Ok::<(), kiln::Error>(())
    /// ```
    ///
    /// # Errors
    /// A token that is empty, there already or named twice.
    pub fn with_added_tokens<S: AsRef<str>>(&self, tokens: &[S], special: bool) -> Result<(Self, Vec<u32>)> {
        let (tokenizer, ids) = self.language.tokenizer.with_added_tokens(tokens, special)?;
        let needed = ids.iter().max().map_or(0, |id| *id as usize + 1);
        let mut model = self.model.clone();
        // Tables are often padded beyond the tokenizer.
        if let Some(tables) = model.token_tables().filter(|tables| needed > tables.vocab_size) {
            let own = OwnTables { embedding: true, head: !tables.tied, tied: tables.tied };
            model = model.with_own_tables(own, needed);
        }
        Ok((Self::of(model, self.language.with_tokenizer(tokenizer)), ids))
    }

    /// Options for data of this model: at most `seq_len` tokens an example, the model's end of text after texts and
    /// completions.
    pub fn data_options(&self, seq_len: usize) -> DataOptions {
        let options = DataOptions::new(seq_len, self.model.vocab_size());
        match self.tokenizer().special().eos.first() {
            Some(eos) => options.with_eos(*eos),
            None => options,
        }
    }

    /// Reads training data: a text (`.txt`), ids (`.u16le`), or rows of any [`Form`](kiln_training::Form) (`.jsonl`,
    /// `.json`, `.parquet`), as [`Dataset::open`] says, in examples of at most `seq_len` tokens. [`Dataset::report`] tells what became of the rows.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn data(&self, path: impl AsRef<Path>, seq_len: usize) -> Result<Dataset> {
        self.data_with(path, &self.data_options(seq_len))
    }

    /// As [`data`](Self::data), with all options.
    ///
    /// # Errors
    /// As [`Dataset::open`].
    pub fn data_with(&self, path: impl AsRef<Path>, options: &DataOptions) -> Result<Dataset> {
        Ok(Dataset::open(path, &self.language.text(), options)?)
    }

    /// As [`data_with`](Self::data_with), for sets larger than memory: the tokens are kept in a nameless file in `folder`
    /// ([`Dataset::open_on_disk`]).
    ///
    /// # Errors
    /// As [`Dataset::open_on_disk`].
    pub fn data_on_disk(
        &self,
        path: impl AsRef<Path>,
        options: &DataOptions,
        folder: impl AsRef<Path>,
    ) -> Result<Dataset> {
        Ok(Dataset::open_on_disk(path, &self.language.text(), options, folder)?)
    }

    /// An example as text, with what is learned of it marked.
    ///
    /// # Errors
    /// An example that can't be read.
    ///
    /// # Panics
    /// If there is no such example.
    pub fn preview(&self, data: &Dataset, index: usize) -> Result<Preview> {
        let decode =
            |ids: &[u32]| self.tokenizer().decode(ids, false).unwrap_or_else(|error| format!("<{error}>"));
        Ok(data.preview(index, decode)?)
    }

    /// Trains the scales of the packed weights, or scales and offsets, and nothing else: the result is a packed model of the
    /// same size in bytes, but for scales in f32, with nothing to merge (PEQA, Kim et al. 2023). `observer` hears of the run.
    ///
    /// # Errors
    /// A model without packed linears, and those of a fine-tune.
    pub fn tune_scales(
        &self,
        parts: TrainedParts,
        data: impl Into<Arc<Dataset>>,
        trainer: TrainerConfig,
        run: &RunOptions,
        observer: &mut impl Observer<Decoder<QuantLinear>>,
    ) -> Result<(Self, RunReport)> {
        self.scales_trainer(parts, data.into(), trainer)
            .and_then(|trainer| self.tuned(trainer, run, observer))
    }

    /// As [`tune_scales`](Self::tune_scales), going on from the checkpoint in `folder`.
    ///
    /// # Errors
    /// As [`tune_scales`](Self::tune_scales), and a checkpoint of another run.
    pub fn resume_scales(
        &self,
        parts: TrainedParts,
        data: impl Into<Arc<Dataset>>,
        trainer: TrainerConfig,
        run: &RunOptions,
        observer: &mut impl Observer<Decoder<QuantLinear>>,
        folder: impl AsRef<Path>,
    ) -> Result<(Self, RunReport)> {
        let trainer = self.scales_trainer(parts, data.into(), trainer)?;
        self.tuned(trainer.resumed(folder)?, run, observer)
    }

    fn scales_trainer(
        &self,
        parts: TrainedParts,
        data: Arc<Dataset>,
        trainer: TrainerConfig,
    ) -> Result<Trainer<Decoder<QuantLinear>>> {
        let model = with_trained_parts(self.model.clone(), parts, None)?;
        let mut identity = BTreeMap::from([("trained".to_owned(), format!("{parts:?}"))]);
        identity.extend(linears_identity(self.model.slots().into_iter().map(|(_, linear)| linear)));
        identity.extend(self.language.identity()?);
        Ok(Trainer::new(model, data, trainer)?.with_identity(identity))
    }

    fn tuned(
        &self,
        mut trainer: Trainer<Decoder<QuantLinear>>,
        run: &RunOptions,
        observer: &mut impl Observer<Decoder<QuantLinear>>,
    ) -> Result<(Self, RunReport)> {
        let report = trainer.run_with(run, observer)?;
        let model = with_settled_parts(trainer.into_best_model())?;
        Ok((Self::of(model, self.language.clone()), report))
    }

    /// A fine-tune of new adapters on `data`, still to be run. The base stays as it is.
    pub fn finetune(&self, adapters: AdapterConfig, data: impl Into<Arc<Dataset>>) -> FineTune<'_> {
        FineTune::new(self, adapters, data.into())
    }

    /// The model with the adapters of a folder, PEFT's or Kiln's own, and the tokenizer in it, if that has more tokens than
    /// this one.
    ///
    /// # Errors
    /// As [`Tuned::load`].
    pub fn load_adapters(&self, folder: impl AsRef<Path>) -> Result<FineTuned> {
        let tuned = Tuned::load(self.model.clone(), &folder)?;
        let folder = whole_folder(folder.as_ref());
        if !folder.join("tokenizer.json").exists() {
            return Ok(FineTuned::new(tuned, self.language.clone(), None));
        }
        let tokenizer = Tokenizer::from_folder(folder)?;
        let (most, known) = (tokenizer.vocab_size(), tuned.model().vocab_size());
        if most > known && most > self.tokenizer().vocab_size() {
            let expected = format!("at most {known} tokens in the folder's tokenizer.json, as the model has");
            return Err(Error::argument("tokenizer", &expected, most));
        }
        let language = match most > self.tokenizer().vocab_size() {
            true => self.language.with_tokenizer(tokenizer),
            false => self.language.clone(),
        };
        Ok(FineTuned::new(tuned, language, None))
    }

    /// The mean loss on the rows of a data set.
    ///
    /// # Errors
    /// Data that doesn't fit the model.
    pub fn evaluate(&self, data: &Dataset) -> Result<DatasetLoss> {
        self.language.evaluate(&self.model, data)
    }

    /// The continuation of `prompt`. `options` may be the number of tokens; the model's own ends of text end it.
    ///
    /// # Errors
    /// As [`kiln_models::generate`].
    pub fn generate(&self, prompt: &str, options: impl Into<GenerateOptions>) -> Result<String> {
        self.language.generate(&self.model, prompt, options.into(), &mut |_| ControlFlow::Continue(()))
    }

    /// As [`generate`](Self::generate); `on_text` gets the text as it comes, and may end it.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn generate_with(
        &self,
        prompt: &str,
        options: impl Into<GenerateOptions>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        self.language.generate(&self.model, prompt, options.into(), on_text)
    }

    /// The assistant's answer to a conversation, in the model's own template.
    ///
    /// # Errors
    /// A model without a chat template, a conversation that the template refuses, and as [`generate`](Self::generate).
    pub fn chat(&self, messages: &[Message], options: impl Into<GenerateOptions>) -> Result<String> {
        self.language.chat(&self.model, messages, options.into(), &mut |_| ControlFlow::Continue(()))
    }

    /// As [`chat`](Self::chat); `on_text` gets the text as it comes, and may end it.
    ///
    /// # Errors
    /// As [`chat`](Self::chat).
    pub fn chat_with(
        &self,
        messages: &[Message],
        options: impl Into<GenerateOptions>,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        self.language.chat(&self.model, messages, options.into(), on_text)
    }

    /// Writes the model as Kiln's own folder, exactly as it is, with its tokenizer; [`open`](Self::open) reads it.
    ///
    /// # Errors
    /// As [`save_model`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<ExportReport> {
        Ok(save_model(&self.model, &self.language.checkpoint, folder)?)
    }

    /// Writes the model as a `.gguf` file with its tokenizer. Weights that no block type holds become dense; the report
    /// says of each tensor what rounding it cost.
    ///
    /// # Errors
    /// As [`export_gguf`].
    pub fn export_gguf(&self, path: impl AsRef<Path>) -> Result<ExportReport> {
        self.language.export_gguf(&self.model, path.as_ref())
    }
}

/// The path says enough.
impl fmt::Debug for OpenBase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OpenBase").field("path", &self.checkpoint.path()).finish_non_exhaustive()
    }
}

/// The path says enough.
impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Base").field("path", &self.checkpoint().path()).finish_non_exhaustive()
    }
}

impl Language {
    pub(crate) fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The same with another tokenizer, one with further tokens.
    fn with_tokenizer(&self, tokenizer: Tokenizer) -> Arc<Self> {
        let checkpoint = self.checkpoint.with_tokenizer(tokenizer.clone());
        Arc::new(Self {
            checkpoint,
            tokenizer,
            template: self.template.clone(),
            context: self.context.clone(),
        })
    }

    /// The tokenizer's files, if tokens were added to it.
    pub(crate) fn added_tokens(&self) -> Result<Files> {
        match self.checkpoint.own_tokenizer() {
            Some(tokenizer) => Ok(tokenizer.files()?),
            None => Ok(Vec::new()),
        }
    }

    /// Whether a model of so many tokens has more than the checkpoint's.
    pub(crate) fn is_grown(&self, vocab_size: usize) -> bool {
        vocab_size > self.checkpoint.config().vocab_size
    }

    /// What a resumed run must have the same: tokenizer and template, by their hashes.
    pub(crate) fn identity(&self) -> Result<BTreeMap<String, String>> {
        let template = self.template.as_deref().map_or("none", ChatTemplate::fingerprint);
        Ok(BTreeMap::from([
            ("tokenizer".to_owned(), self.tokenizer.fingerprint()?),
            ("chat template".to_owned(), template.to_owned()),
        ]))
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    fn text(&self) -> ModelTokenizer<'_> {
        ModelTokenizer::new(&self.tokenizer, self.template.as_deref(), self.context.clone())
    }

    pub(crate) fn evaluate<M: CausalLm>(&self, model: &M, data: &Dataset) -> Result<DatasetLoss> {
        const ROWS: usize = 4;
        Ok(evaluate(model, data, ROWS)?)
    }

    pub(crate) fn generate<M: CausalLm>(
        &self,
        model: &M,
        prompt: &str,
        options: GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        self.answer(model, &self.tokenizer.encode(prompt, true)?, options, on_text)
    }

    pub(crate) fn chat<M: CausalLm>(
        &self,
        model: &M,
        messages: &[Message],
        options: GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        let prompt = self.text().prompt(messages);
        let prompt = prompt
            .map_err(|reason| Error::argument("messages", "a conversation that can be rendered", reason))?;
        self.answer(model, &prompt, options, on_text)
    }

    fn answer<M: CausalLm>(
        &self,
        model: &M,
        prompt: &[u32],
        mut options: GenerateOptions,
        on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<String> {
        if options.stop.is_empty() {
            options.stop.clone_from(&self.tokenizer.special().eos);
        }
        let (mut stream, mut failed) = (self.tokenizer.decode_stream(true), None);
        let mut stops = StopTexts::new(options.stop_texts.clone());
        let generation = generate_with(model, prompt, &options, &mut |id| {
            let piece = match stream.push(id) {
                Ok(piece) => piece,
                Err(error) => {
                    failed = Some(error);
                    return ControlFlow::Break(());
                }
            };
            let text = stops.push(&piece);
            let flow = if text.is_empty() { ControlFlow::Continue(()) } else { on_text(text) };
            if stops.is_found() { ControlFlow::Break(()) } else { flow }
        })?;
        if let Some(error) = failed {
            return Err(error.into());
        }
        if stops.is_found() {
            return Ok(stops.into_text());
        }
        let rest = stops.rest();
        if !rest.is_empty() && generation.finish != Finish::Cancelled {
            let _ = on_text(rest);
        }
        Ok(self.tokenizer.decode(&generation.ids, true)?)
    }

    pub(crate) fn export_gguf(&self, model: &Decoder<QuantLinear>, path: &Path) -> Result<ExportReport> {
        let options = GgufOptions { fallback: Fallback::Dense, ..GgufOptions::default() };
        Ok(export_gguf(model, &self.checkpoint, path, &options)?)
    }
}
