//! Dense safetensors in Hugging Face's layout.

use std::path::Path;

use kiln_quant_core::QuantLinear;
use serde_json::{Map, Value};

use super::{
    ExportOptions, ExportReport, Format,
    config::{classifier_json, config_json},
    folder::{Converted, FolderExport},
    item::{self, Item},
};
use crate::{Checkpoint, Classifier, Decoder, Result, config::ModelConfig};

/// Writes `model` dense, every tensor in `options.float`: `config.json`, one `model.safetensors` or shards with their
/// index, and the tokenizer files of `source`, the checkpoint that the model came from.
///
/// Peak memory is one dense tensor (and its rounded copy) beside the model. `folder` must be new or empty; it appears
/// only when all is written.
///
/// # Errors
/// [`Error::Export`](crate::Error::Export) naming a tensor with a value beyond the float type's range, or a configuration that transformers
/// can't express; [`Error::Argument`](crate::Error::Argument) for a folder that holds files or values that are not finite; [`Error::Io`](crate::Error::Io).
///
/// # Example
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, LoadOptions, export::{ExportOptions, FloatType, export_hf}};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path().join("dense");
/// let checkpoint = Checkpoint::open(path)?;
/// let (model, _) = checkpoint.load(&LoadOptions::uniform("nf4:64".parse()?), &Device::flex())?;
/// let report = export_hf(&model, &checkpoint, &folder, &ExportOptions::new(FloatType::F32))?;
/// assert!(report.is_exact());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn export_hf(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let config = config_json(model.config(), source.special_tokens(), options.float)?;
    write(item::items(model)?, model.config(), config, source, folder.as_ref(), options)
}

/// As [`export_hf`], a classifier with its score head, as transformers' `…ForSequenceClassification`. `labels` are the names
/// of its outputs, `LABEL_0` and so on if there are none; the language model's own head is left out.
///
/// A family whose language model transformers knows may have no such class there; Kiln reads the folder in any case.
/// transformers wants a `pad_token_id` for more than one row, which is `source`'s.
///
/// # Errors
/// As [`export_hf`], and another number of names than of outputs, or two equal ones.
///
/// # Example
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, Classifier, LoadOptions};
/// use kiln_models::export::{ExportOptions, FloatType, export_hf_classifier};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path().join("classifier");
/// let checkpoint = Checkpoint::open(path)?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// let classifier = Classifier::new(model, 2, 0)?;
/// let labels = ["kind", "cruel"].map(str::to_owned);
/// export_hf_classifier(&classifier, &labels, &checkpoint, &folder, &ExportOptions::new(FloatType::F32))?;
/// let again = Checkpoint::open(&folder)?;
/// assert_eq!(again.classifier(), Some("LlamaForSequenceClassification"));
/// assert_eq!(again.labels(), labels);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn export_hf_classifier(
    model: &Classifier<Decoder<QuantLinear>>,
    labels: &[String],
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let config = classifier_json(model, labels, source.special_tokens(), options.float)?;
    let items = item::of_classifier(item::items(&model.model)?, model);
    write(items, model.model.config(), config, source, folder.as_ref(), options)
}

fn write(
    items: Vec<Item>,
    model: &ModelConfig,
    config: Map<String, Value>,
    source: &Checkpoint,
    folder: &Path,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let export = FolderExport {
        folder,
        source,
        items: &item::stacked(items, model),
        config,
        metadata: "pt",
        max_shard_bytes: options.max_shard_bytes,
        json: Vec::new(),
    };
    export.write(|item, host| Converted::dense(Format::HuggingFace, item, host, options.float))
}
