//! Dense safetensors in Hugging Face's layout.

use std::path::Path;

use kiln_quant_core::QuantLinear;

use super::{
    ExportOptions, ExportReport, Format,
    config::config_json,
    folder::{Converted, FolderExport},
    item,
};
use crate::{Checkpoint, Decoder, Result};

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
    let export = FolderExport {
        folder: folder.as_ref(),
        source,
        items: &item::stacked(item::items(model)?, model.config()),
        config,
        metadata: "pt",
        max_shard_bytes: options.max_shard_bytes,
        json: Vec::new(),
    };
    export.write(|item, host| Converted::dense(Format::HuggingFace, item, host, options.float))
}
