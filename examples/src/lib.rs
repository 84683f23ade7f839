//! What the example programs share: how they end, devices, checkpoints, texts, progress, figures.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

mod curve;
mod devices;
#[cfg(doctest)]
mod documents;
mod errors;
mod hub;
mod progress;
mod questions;
mod tasks;

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Args;
use kiln::{
    AdaptedModel, Base,
    eval::{Perplexity, WindowedPerplexity},
    models::{
        CausalLm, Checkpoint, Decoder, LoadOptions, LoadReport, Tokenizer,
        chat::{CivilTime, TemplateContext},
        export::ExportReport,
    },
    quant::{
        Compute, QuantLinear, Scheme,
        files::{NewFolder, check_writable, write_atomically},
    },
    training::{DataOptions, Dataset, ModelTokenizer},
};

pub use curve::write_curve;
pub use devices::DeviceName;
pub use errors::{Result, print_line, program};
pub use hub::model_path;
pub use progress::Bar;
pub use questions::Questions;
pub use tasks::{open_tasks, quiz};

/// How conversations become text where a model has no template of its own. What opens an answer ends in a line break, not in
/// a space: most tokenizers join that with the word behind it, which the model would then see in training only.
pub const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}\n{{ message.content }}{{ eos_token }}\
                            {% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}";

/// Options of every program that loads a model.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A checkpoint folder, a .gguf file, or a name of the Hugging Face hub that is in its cache; the embedded model if left out.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Fetch a model of the hub that isn't in its cache.
    #[arg(long)]
    pub download: bool,
    /// An adapter folder, PEFT's or Kiln's own.
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    /// Scheme of the blocks' linears, e.g. affine4:64 or dense; as stored if left out.
    #[arg(long)]
    pub scheme: Option<Scheme>,
    /// Where to compute: flex, wgpu, vulkan, metal, cuda, rocm or cpu, of several one by its number, as cuda:1.
    #[arg(long, default_value = "flex")]
    pub device: DeviceName,
    /// What operands of products are rounded to: f32, bf16, f16, or auto, what suits the device best; auto if left out.
    #[arg(long)]
    pub compute: Option<ComputeName>,
}

/// Options of the programs that talk to a model.
#[derive(Debug, Args)]
pub struct BaseArgs {
    /// A checkpoint folder, a .gguf file, or a name of the Hugging Face hub that is in its cache; the embedded model at 4 bits
    /// if left out.
    #[arg(long)]
    pub model: Option<PathBuf>,
    /// Fetch a model of the hub that isn't in its cache.
    #[arg(long)]
    pub download: bool,
    /// Scheme of the blocks' linears; as stored if left out.
    #[arg(long)]
    pub scheme: Option<Scheme>,
}

impl BaseArgs {
    /// Loads the model with tokenizer and template: its own, or [`TEMPLATE`].
    ///
    /// # Errors
    /// Whatever the files refuse.
    pub fn load(&self) -> Result<Base> {
        let open = Base::open(model_path(self.model.as_deref(), self.download)?)?;
        let open = match (self.scheme, &self.model) {
            (Some(scheme), _) => open.with_scheme(scheme),
            (None, None) => open.with_bits(4),
            (None, Some(_)) => open,
        };
        let open = open.with_template_context(template_context());
        let open = match open.checkpoint().chat_template()? {
            Some(_) => open,
            None => open.with_chat_template(TEMPLATE),
        };
        Ok(open.load()?)
    }
}

/// `auto`, or a [`Compute`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ComputeName(pub Option<Compute>);

impl FromStr for ComputeName {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self(None)),
            _ => text.parse().map(|compute| Self(Some(compute))).map_err(|error| format!("auto, or {error}")),
        }
    }
}

/// A folder below the repository's `testdata`.
pub fn testdata(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata")).join(path)
}

/// The model that comes with the repository.
pub fn embedded_model() -> PathBuf {
    testdata("models/tiny-llama")
}

impl ModelArgs {
    /// Opens the checkpoint.
    ///
    /// # Errors
    /// Whatever the files refuse.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        Ok(Checkpoint::open(model_path(self.model.as_deref(), self.download)?)?)
    }

    /// Loads the model, without adapters.
    ///
    /// # Errors
    /// Whatever the files refuse.
    pub fn load(&self, checkpoint: &Checkpoint) -> Result<(Decoder<QuantLinear>, LoadReport)> {
        let options = self
            .scheme
            .map(LoadOptions::uniform)
            .unwrap_or_default()
            .with_compute(self.compute.and_then(|name| name.0));
        let (model, report) = checkpoint.load(&options, &self.device.open()?)?;
        for note in &report.notes {
            eprintln!("note: {note}");
        }
        Ok((model, report))
    }

    /// Loads the model with the adapters of `--adapter`, or with empty slots.
    ///
    /// # Errors
    /// Whatever the files refuse.
    pub fn load_adapted(&self, checkpoint: &Checkpoint) -> Result<(AdaptedModel, LoadReport)> {
        use kiln::{adapters::Adapted, models::Slots};
        let (model, report) = self.load(checkpoint)?;
        let model = match &self.adapter {
            Some(folder) => kiln::Tuned::load(model, folder)?.into_model(),
            None => model.try_map(|_, base| Ok::<_, std::convert::Infallible>(Adapted::new(base, None)))?,
        };
        Ok((model, report))
    }
}

/// Writes figures for machines.
///
/// # Errors
/// The operating system's refusal.
pub fn write_json(path: Option<&Path>, figures: &serde_json::Value) -> Result<()> {
    if let Some(path) = path {
        let text = serde_json::to_vec_pretty(figures)?;
        write_atomically(path, |file| std::io::Write::write_all(file, &text))?;
    }
    Ok(())
}

/// Finds out whether the files of these names can be written: before the work.
///
/// # Errors
/// The first that can't.
pub fn check_outputs<'a>(paths: impl IntoIterator<Item = &'a Option<PathBuf>>) -> Result<()> {
    paths.into_iter().flatten().try_for_each(|path| Ok(check_writable(path)?))
}

/// What [`save_model`](kiln::models::export::save_model) writes.
const MODEL_FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// The place of a model's folder below an output folder: nothing is there, or an earlier model of Kiln's own, which isn't the
/// program's input.
///
/// # Errors
/// Another folder that is there.
pub fn model_folder(below: &Path, input: Option<&Path>) -> Result<PathBuf> {
    let folder = below.join("model");
    let wrong = |found: &str| {
        let expected = "expected nothing, or an earlier model of this program";
        Err(format!("{}: {expected}, found {found}", folder.display()).into())
    };
    if !folder.exists() {
        return Ok(folder);
    }
    let input = input.and_then(|input| input.canonicalize().ok());
    if input.is_some() && input == folder.canonicalize().ok() {
        return wrong("the model to begin with");
    }
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap_or_default();
    match config.contains("\"quant_method\": \"kiln\"") {
        true => Ok(folder),
        false => wrong("another folder"),
    }
}

/// Has a model written for `folder`, a [`model_folder`], where it takes the place of an earlier one as a whole.
///
/// # Errors
/// Those of `save`, and the operating system's.
pub fn save_replacing<E: Into<Box<dyn std::error::Error>>>(
    folder: &Path,
    save: impl FnOnce(&Path) -> std::result::Result<ExportReport, E>,
) -> Result<()> {
    let new = NewFolder::replacing(folder, &MODEL_FILES)?;
    save(new.path()).map_err(Into::into)?;
    Ok(new.commit()?)
}

/// Reads little-endian token ids, of 32 bits from a .u32le file, else of 16.
///
/// # Errors
/// The operating system's refusal, or a file that ends within an id.
pub fn read_id_file(path: &Path) -> Result<Vec<u32>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let size = if has_extension(path, "u32le") { 4 } else { 2 };
    if !bytes.len().is_multiple_of(size) {
        let expected = format!("a multiple of {size} bytes");
        return Err(format!("{}: expected {expected}, found {}", path.display(), bytes.len()).into());
    }
    let id = |bytes: &[u8]| bytes.iter().rev().fold(0, |id, byte| id << 8 | u32::from(*byte));
    Ok(bytes.chunks_exact(size).map(id).collect())
}

fn has_extension(path: &Path, wanted: &str) -> bool {
    path.extension().is_some_and(|extension| extension == wanted)
}

/// Token ids of a .u16le or .u32le file, or of any other file's text.
///
/// # Errors
/// The operating system's refusal, or a text that is not UTF-8.
pub fn read_ids(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if has_extension(path, "u16le") || has_extension(path, "u32le") {
        return read_id_file(path);
    }
    let text = std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(tokenizer.encode(&text, false)?)
}

/// The first two thirds of a text's ids, to learn from, and the rest, to evaluate on; held-out text of the embedded
/// model if left out.
///
/// # Errors
/// Those of [`read_ids`].
pub fn split_ids(data: Option<&Path>, tokenizer: &Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let default = testdata("models/tiny-llama/text/indomain_heldout_sotu_2011.u16le");
    let mut ids = read_ids(data.unwrap_or(&default), tokenizer)?;
    let held_out = ids.split_off(ids.len() * 2 / 3);
    Ok((ids, held_out))
}

/// What chat templates may ask for: the time, in UTC.
pub fn template_context() -> TemplateContext {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    TemplateContext {
        now: i64::try_from(seconds).ok().map(CivilTime::from_unix),
        ..TemplateContext::default()
    }
}

/// Examples of at most `seq_len` tokens of a file, by the tokenizer and the chat template of
/// `checkpoint`; what was read, cut, left out or ignored is printed.
///
/// # Errors
/// Whatever the file refuses.
pub fn open_data(path: &Path, checkpoint: &Checkpoint, seq_len: usize, vocab_size: usize) -> Result<Dataset> {
    let tokenizer = checkpoint.tokenizer()?;
    let template = checkpoint.chat_template()?;
    let text = ModelTokenizer::new(&tokenizer, template.as_ref(), template_context());
    let mut options = DataOptions::new(seq_len, vocab_size);
    options.eos = tokenizer.special().eos.first().copied();
    let data = Dataset::open(path, &text, &options)?;
    eprintln!("{}: {}", path.display(), data.report());
    Ok(data)
}

/// Perplexity over windows that don't overlap.
///
/// # Errors
/// Fewer ids than a window.
pub fn perplexity<M: CausalLm>(model: &M, ids: &[u32], window: usize) -> Result<Perplexity> {
    Ok(WindowedPerplexity::new(window).evaluate(&model.valid(), ids)?)
}
