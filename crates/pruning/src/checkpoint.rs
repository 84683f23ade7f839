//! Pruned checkpoints as folders: those of `kiln-models`, and `pruning.json` that tells what stays.

use std::{
    io::{Read, Write},
    path::Path,
};

use burn::tensor::Device;
use kiln_models::{
    Checkpoint, Decoder, LoadOptions, LoadReport,
    config::ModelConfig,
    export::{ExportOptions, ExportReport, export_hf, save_model},
};
use kiln_quant_core::{QuantLinear, files::NewFolder, write_atomically};
use serde::{Deserialize, Serialize};

use crate::{
    Error, PruningReport, Result,
    kept::Kept,
    pad::pad,
    structure::{Group, Structure},
};

/// Name of the file beside `config.json`.
pub const RECORD_FILE: &str = "pruning.json";
/// Longest record that is read; one index takes a few bytes.
const MAX_RECORD_BYTES: u64 = 256 << 20;

/// What a pruned checkpoint remembers of where it came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruningRecord {
    /// Version of this file's format: 1.
    pub version: u32,
    /// The shape before pruning.
    pub original: ModelConfig,
    /// What stays of it.
    pub kept: Kept,
    /// The options, as the caller spells them: criterion, ratios, seed.
    pub options: serde_json::Value,
    /// SHA-256 of the calibration data.
    pub calibration: Option<String>,
    /// The program that wrote it.
    pub tool: String,
}

impl PruningRecord {
    /// The record of one pruning; `options` is the pruning's, e.g. a [`BlockPruning`](crate::BlockPruning).
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the options can't be written as JSON.
    pub fn new(original: ModelConfig, options: &impl Serialize, report: &PruningReport) -> Result<Self> {
        let options = serde_json::to_value(options);
        Ok(Self {
            version: 1,
            original,
            kept: report.kept.clone(),
            options: options.map_err(|error| Error::mismatch("options", "values that JSON holds", error))?,
            calibration: report.calibration.clone(),
            tool: concat!("kiln-pruning ", env!("CARGO_PKG_VERSION")).into(),
        })
    }

    /// The record after a further pruning of what this one left, in the numbering of the first original.
    ///
    /// # Errors
    /// [`Error::Mismatch`] if the report names what isn't left.
    pub fn then(&self, options: &impl Serialize, report: &PruningReport) -> Result<Self> {
        let later = Self::new(self.original.clone(), options, report)?;
        let options = serde_json::json!([self.options, later.options]);
        Ok(Self { kept: self.kept.then(&report.kept)?, options, ..later })
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(RECORD_FILE);
        let fail = |expected: &str, found: String| Error::File {
            path: path.clone(),
            field: "content".into(),
            expected: expected.into(),
            found,
        };
        let io = |error| Error::from(kiln_quant_core::Error::io(&path)(error));
        let mut text = Vec::new();
        let file = std::fs::File::open(&path).map_err(io)?;
        file.take(MAX_RECORD_BYTES + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_RECORD_BYTES {
            return Err(fail(&format!("at most {MAX_RECORD_BYTES} bytes"), "more".into()));
        }
        let record: Self =
            serde_json::from_slice(&text).map_err(|error| fail("a pruning record", error.to_string()))?;
        match record.version {
            1 => Ok(record),
            other => Err(fail("version 1", other.to_string())),
        }
    }
}

/// How a pruned model is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SaveFormat {
    /// Kiln's own folder: packed weights as they are, dense tensors in f32, all bit for bit.
    AsIs,
    /// Dense safetensors in Hugging Face's layout.
    HuggingFace(ExportOptions),
}

/// What was written.
#[derive(Debug, Clone)]
pub struct SavedCheckpoint {
    /// Keys of `config.json` that only Kiln understands; without any, transformers opens the folder.
    pub extensions: Vec<String>,
    /// Tensors and bytes.
    pub report: ExportReport,
}

/// Writes a pruned model, its record, and the tokenizer files of `source`, the checkpoint that it was pruned from.
/// `folder` must be new or empty.
///
/// Where all blocks have the same widths the dense folder is a plain Hugging Face checkpoint. Otherwise `config.json` has
/// `per_layer_config`, a map from a block's index to the widths that differ there, which Kiln reads and transformers
/// doesn't; see the crate's documentation. [`save_padded`] writes a copy for everybody.
///
/// # Errors
/// [`Error::Mismatch`] if the record doesn't fit the model; what [`export_hf`] and [`save_model`] refuse.
pub fn save_pruned(
    model: &Decoder<QuantLinear>,
    record: &PruningRecord,
    source: &Checkpoint,
    format: &SaveFormat,
    folder: &Path,
) -> Result<SavedCheckpoint> {
    check_record(record, model.config())?;
    // The record belongs to the model: one folder appears with both.
    let new = NewFolder::at_new_place(folder)?;
    let report = match format {
        SaveFormat::AsIs => save_model(model, source, new.path())?,
        SaveFormat::HuggingFace(options) => export_hf(model, source, new.path(), options)?,
    };
    let record = serde_json::to_vec(record);
    let record = record.map_err(|error| Error::mismatch("record", "values that JSON holds", error))?;
    write_atomically(&new.path().join(RECORD_FILE), |file| file.write_all(&record))?;
    new.commit()?;
    saved(folder, ExportReport { path: folder.into(), ..report })
}

/// Writes a model pruned in heads and channels at its original shape, dense, zeros where something was removed: it
/// computes the same, saves nothing, and opens wherever the original does.
///
/// # Errors
/// As [`save_pruned`]; [`Error::Mismatch`] if blocks or channels of the residual stream were removed, which leave nothing
/// that needs padding.
pub fn save_padded(
    model: &Decoder<QuantLinear>,
    record: &PruningRecord,
    source: &Checkpoint,
    options: &ExportOptions,
    folder: &Path,
) -> Result<SavedCheckpoint> {
    check_record(record, model.config())?;
    let padded = pad(model.clone(), &record.kept, &record.original)?;
    saved(folder, export_hf(&padded, source, folder, options)?)
}

/// Looks into `config.json` for what transformers doesn't act on.
fn saved(folder: &Path, report: ExportReport) -> Result<SavedCheckpoint> {
    let path = folder.join("config.json");
    let text = std::fs::read(&path).map_err(kiln_quant_core::Error::io(&path))?;
    let config: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|error| Error::mismatch("config.json", "a JSON object", error))?;
    let own = |key: &&str| match *key {
        "quantization_config" => config[*key]["quant_method"] == "kiln",
        // Other architectures of transformers have it.
        "head_dim" => config["model_type"] == "opt" && config.get(*key).is_some(),
        key => config.get(key).is_some(),
    };
    let keys = ["per_layer_config", "kiln", "head_dim", "quantization_config"];
    let extensions = keys.iter().filter(|key| own(key)).map(|key| key.to_string()).collect();
    Ok(SavedCheckpoint { extensions, report })
}

/// Opens a folder that [`save_pruned`] wrote.
///
/// # Errors
/// Whatever the files refuse; [`Error::Mismatch`] if record and configuration disagree.
pub fn load_pruned(
    folder: &Path,
    options: &LoadOptions,
    device: &Device,
) -> Result<(Decoder<QuantLinear>, LoadReport, PruningRecord)> {
    let record = PruningRecord::read(folder)?;
    let checkpoint = Checkpoint::open(folder)?;
    check_record(&record, checkpoint.config())?;
    let (model, report) = checkpoint.load(options, device)?;
    Ok((model, report, record))
}

/// What stays by the record must be what the model has.
fn check_record(record: &PruningRecord, config: &ModelConfig) -> Result<()> {
    let (original, now) = (Structure::of(&record.original), Structure::of(config));
    record.kept.check(&original)?;
    let expected = Structure::of(&record.kept.config(&record.original));
    if expected == now {
        return Ok(());
    }
    let groups = |structure: &Structure| -> Vec<Group> {
        structure.layers.iter().flat_map(|layer| layer.groups.clone()).collect()
    };
    let (groups, found) = (groups(&expected), groups(&now));
    let name = match groups.iter().zip(&found).find(|(a, b)| a != b) {
        Some((group, _)) => format!("record of {}", group.path),
        None => "record".into(),
    };
    let show = |s: &Structure| format!("{} blocks of width {}", s.layers.len(), s.hidden);
    Err(Error::mismatch(name, format!("the model's widths, {}", show(&now)), show(&expected)))
}
