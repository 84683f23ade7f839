//! Kiln's own model folder: Hugging Face's `config.json`, with `quantization_config` naming the method `kiln`, beside a
//! [`PackedFile`].

use std::path::{Path, PathBuf};

use kiln_quant_core::packed_file::PackedFile;

use super::{
    Quantization,
    config::{self, FolderConfig},
    json::{Fields, MAX_CONFIG_BYTES, read_object},
};
use crate::{
    Error, Result,
    config::{ModelConfig, SpecialTokens},
    source::{DenseTensor, Described, StoredWeight, TensorSource},
};

/// The file with the weights.
pub(crate) const PACKED_WEIGHTS: &str = "model.safetensors";
/// Key of `quantization_config`: [`PackedFile::whole_fingerprint`] of the weights.
pub(crate) const FINGERPRINT: &str = "fingerprint";
const METHOD: &str = "kiln";
const VERSION: usize = 1;

/// Reads `quantization_config`: nothing but method, version and what the weights' fingerprints must be, or an error that names
/// it.
pub(super) fn config(fields: &Fields<'_>) -> Result<Quantization> {
    fields.know(&["quant_method", FINGERPRINT]);
    fields.refuse_unless("version", VERSION)?;
    if fields.get("version").is_none() {
        return Err(fields.wrong("version", "the version of the folder"));
    }
    match fields.unknown().first() {
        Some(key) => Err(Error::Unsupported {
            path: fields.path(),
            field: key.clone(),
            found: "this key".into(),
            supported: "quant_method, version, fingerprint".into(),
        }),
        None => Ok(Quantization::Kiln),
    }
}

/// An open folder of Kiln's own, as [`save_model`](crate::export::save_model) writes it.
#[derive(Debug)]
pub struct PackedFolder {
    path: PathBuf,
    config: FolderConfig,
    file: PackedFile,
}

impl PackedFolder {
    /// Whether the configuration of the folder at `path` says that it is one; `false` if it can't be read.
    pub fn is_one(path: &Path) -> bool {
        let Ok(object) = read_object(&path.join("config.json"), MAX_CONFIG_BYTES) else { return false };
        let method = object.get("quantization_config").and_then(|config| config.get("quant_method"));
        method.is_some_and(|method| method == METHOD)
    }

    /// Opens a folder and checks configuration and headers.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Unsupported`] for what is malformed, of another version or not Kiln's;
    /// [`Error::Io`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let config = config::read_folder(&path)?;
        if config.quantization != Quantization::Kiln {
            return Err(Error::Unsupported {
                path: path.join("config.json"),
                field: "quantization_config.quant_method".into(),
                found: "another method".into(),
                supported: METHOD.into(),
            });
        }
        let file = PackedFile::open(path.join(PACKED_WEIGHTS))?;
        let config_path = path.join("config.json");
        let stated = read_object(&config_path, MAX_CONFIG_BYTES)?;
        let stated = stated.get("quantization_config").and_then(|config| config.get(FINGERPRINT));
        let found = file.whole_fingerprint();
        if stated.is_some_and(|stated| *stated != *found) {
            return Err(Error::File {
                path: config_path,
                field: format!("quantization_config.{FINGERPRINT}"),
                expected: format!("{found}, that of {PACKED_WEIGHTS}"),
                found: format!(
                    "{}: the two are of different models",
                    stated.unwrap_or(&serde_json::Value::Null)
                ),
            });
        }
        Ok(Self { path, config, file })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config.model
    }

    /// Ids with a meaning.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.config.special_tokens
    }

    /// The class in `architectures`, if it is one for sequence classification.
    pub fn classifier(&self) -> Option<&str> {
        self.config.classifier.as_deref()
    }

    /// What a classifier's outputs are called.
    pub fn labels(&self) -> &[String] {
        &self.config.labels
    }

    /// Keys of the configuration that Kiln doesn't know.
    pub fn unknown_keys(&self) -> &[String] {
        &self.config.unknown_keys
    }

    /// The weights, with their fingerprint.
    pub fn file(&self) -> &PackedFile {
        &self.file
    }
}

impl TensorSource for PackedFolder {
    fn contains(&self, name: &str) -> bool {
        self.names().iter().any(|other| other == name)
    }

    fn names(&self) -> Vec<String> {
        let public = |name: &str| match self.file.scheme(name) {
            Some(_) => format!("{name}.weight"),
            None => name.to_owned(),
        };
        let mut names: Vec<String> = self.file.names().map(public).collect();
        names.sort();
        names
    }

    fn describe(&self, name: &str) -> Result<Described> {
        let packed = name.strip_suffix(".weight").filter(|module| self.file.scheme(module).is_some());
        let (shape, bytes) = self.file.describe(packed.unwrap_or(name))?;
        Ok(Described { shape: Some(shape), bytes, dense: packed.is_none() })
    }

    fn dense(&self, name: &str) -> Result<DenseTensor> {
        if let Some(module) = name.strip_suffix(".weight")
            && self.file.scheme(module).is_some()
        {
            let weight = self.file.packed(module)?;
            return Ok(DenseTensor {
                shape: vec![weight.d_output, weight.d_input],
                values: weight.dequantize(),
            });
        }
        let (shape, values) = self.file.dense(name)?;
        Ok(DenseTensor { shape, values })
    }

    fn weight(&self, module: &str) -> Result<StoredWeight> {
        match self.file.scheme(module) {
            Some(_) => Ok(StoredWeight::Packed(self.file.packed(module)?)),
            None => self.dense(&format!("{module}.weight")).map(StoredWeight::Dense),
        }
    }
}
