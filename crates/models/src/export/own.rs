//! Kiln's own model folder.

use std::{collections::BTreeMap, fs, path::Path};

use kiln_quant_core::{QuantLinear, Scheme, files::NewFolder, packed_file::PackedFile};
use serde_json::{Map, Value, json};

use super::{
    ExportReport, ExportRow, FloatType, Format,
    config::{classifier_json, config_json},
    folder::write_json,
    item::{self, Host, Item},
    tokenizer_files,
};
use crate::{
    Checkpoint, Classifier, Decoder, Error, Result,
    hf::{FINGERPRINT, PACKED_WEIGHTS},
};

/// Saves `model` as it is, bit for bit: a folder with `config.json` (Hugging Face's keys, and `quantization_config` with
/// `quant_method` "kiln" and a version), packed weights and dense tensors in `model.safetensors`
/// ([`PackedFile`], which carries a version, the schemes and a fingerprint), and the tokenizer files of `source`.
/// [`Checkpoint::open`] opens it.
///
/// Dense tensors are stored in 16 bits where that loses nothing, as of a model whose checkpoint had 16. Memory needed
/// beside the model is one tensor. `folder` must be new or empty; it appears only when all is written.
///
/// # Errors
/// [`Error::Argument`] for a folder that holds files or values that are not finite; [`Error::Export`] for a
/// configuration that can't be expressed; [`Error::Io`].
///
/// # Example
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, LoadOptions, export::{save_model, verify_export}};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let folder = tempfile::tempdir()?;
/// # let folder = folder.path().join("saved");
/// let checkpoint = Checkpoint::open(path)?;
/// let (model, _) = checkpoint.load(&LoadOptions::uniform("nf4:64:double".parse()?).in_f32(), &Device::flex())?;
/// save_model(&model, &checkpoint, &folder)?;
/// assert_eq!(verify_export(&folder, &model, &[1, 2, 3])?.max, 0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn save_model(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
) -> Result<ExportReport> {
    let config = config_json(model.config(), source.special_tokens(), FloatType::F32)?;
    save(&item::items_as(model, false)?, config, source, folder.as_ref())
}

/// As [`save_model`], a classifier with its score head; `labels` as in
/// [`export_hf_classifier`](super::export_hf_classifier). [`Checkpoint::load_classifier`] reads it.
///
/// # Errors
/// As [`save_model`], and another number of names than of outputs, or two equal ones.
pub fn save_classifier(
    model: &Classifier<Decoder<QuantLinear>>,
    labels: &[String],
    source: &Checkpoint,
    folder: impl AsRef<Path>,
) -> Result<ExportReport> {
    let config = classifier_json(model, labels, source.special_tokens(), FloatType::F32)?;
    let items = item::of_classifier(item::items_as(&model.model, false)?, model);
    save(&items, config, source, folder.as_ref())
}

fn save(
    items: &[Item],
    mut config: Map<String, Value>,
    source: &Checkpoint,
    folder: &Path,
) -> Result<ExportReport> {
    let fresh = NewFolder::at_new_place(folder)?;
    let path = fresh.path().join(PACKED_WEIGHTS);
    write_weights(&path, items)?;
    let written = PackedFile::open(&path)?;
    let fingerprint = written.whole_fingerprint();
    let quantization = json!({"quant_method": "kiln", "version": 1, (FINGERPRINT): fingerprint});
    config.insert("quantization_config".into(), quantization);
    write_json(&fresh.path().join("config.json"), &Value::Object(config))?;
    let notes = tokenizer_files::write(source, fresh.path())?;
    let bytes = fs::metadata(&path).map_err(Error::io(&path))?.len();
    let rows = items.iter().map(|item| row(item, &written)).collect::<Result<_>>()?;
    fresh.commit()?;
    Ok(ExportReport { path: folder.into(), rows, bytes, notes })
}

fn write_weights(path: &Path, items: &[Item]) -> Result<()> {
    let (mut packed, mut dense) = (Vec::new(), Vec::new());
    let mut by_name = BTreeMap::new();
    for item in items {
        let shape = item.shape();
        let name = match item.scheme() {
            Scheme::Packed(scheme) => {
                packed.push((item.path.clone(), scheme, shape[1], shape[0]));
                item.path.clone()
            }
            Scheme::Dense => {
                dense.push((item.name(), shape));
                item.name()
            }
        };
        by_name.insert(name, item);
    }
    let wrong = |name: &str| Format::Kiln.refuse(name, "a tensor that stays what it is", "another kind");
    PackedFile::save_streamed(
        path,
        packed,
        dense,
        |path| match by_name[path].host()? {
            Host::Packed(weight) => Ok(weight),
            Host::Dense(_) => Err(wrong(path)),
        },
        |name| match by_name[name].host()? {
            Host::Dense(tensor) => Ok(tensor.values),
            Host::Packed(_) => Err(wrong(name)),
        },
        &BTreeMap::new(),
    )
}

fn row(item: &Item, written: &PackedFile) -> Result<ExportRow> {
    let bytes = match item.scheme() {
        Scheme::Packed(scheme) => {
            let shape = item.shape();
            scheme.storage_bytes(shape[1], shape[0]) as u64
        }
        Scheme::Dense => written.describe(&item.name())?.1,
    };
    Ok(ExportRow {
        name: item.name(),
        stored: item.scheme().to_string(),
        bytes,
        max_difference: 0.0,
        relative_difference: 0.0,
    })
}
