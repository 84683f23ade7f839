//! Kiln's own adapter folders, for every method: `kiln_adapter.json` and `kiln_adapter.safetensors`.
//!
//! The first holds `version` (1), `method` (its name, with the options of those that pool), `lora` (PEFT's keys: rank,
//! alpha, selection, `use_dora`, initialisation)
//! and `base_fingerprint` (of the packed base that the adapters were trained on, or null). Unknown keys are errors. The
//! second holds `PATH.A` `[rank, d_input / pool]`, `PATH.B` `[d_output / repeat, rank]`, `PATH.H`
//! `[d_output / repeat, d_input / pool]` and `PATH.magnitude` `[d_output]`, of what is trained outside the slots `PATH.A`
//! and `PATH.B` of embedding and head, `PATH.rows` of some tokens `[tokens, width]` and whole parameters by their names in
//! checkpoints, where PATH is the module's name in the
//! checkpoint, in the papers' orientation. The first holds the SHA-256 of the second (`weights_sha256`).

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
};

use kiln_quant_core::{
    Slots, files::whole_folder, hash::sha256_of, safetensors_file::SafetensorsFile, write_atomically,
};
use serde::{Deserialize, Serialize};

use crate::{
    AdapterConfig, AdapterKind, AnyAdapter, Attacher, InitLoraWeights, Method, OutsideTensors, PeftConfig,
    QBara, QaBlora, QaHira, QaLora,
    error::{Error, Result},
    json_fields::Problem,
    outline::Outline,
    peft_config::in_file,
    stacked::Stacked,
    store::{self, Layout},
};

/// The name of the configuration in an own adapter folder.
pub const KILN_CONFIG_FILE: &str = "kiln_adapter.json";

/// The name of the file of weights in an own adapter folder.
pub const KILN_WEIGHTS_FILE: &str = "kiln_adapter.safetensors";

const VERSION: u32 = 1;

/// The largest configuration that is read, in bytes.
const MAX_BYTES: u64 = 16 << 20;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    version: u32,
    method: StoredMethod,
    /// Must be there, null or not: a missing key is no statement.
    #[serde(deserialize_with = "Option::deserialize")]
    base_fingerprint: Option<String>,
    lora: serde_json::Map<String, serde_json::Value>,
    /// SHA-256 of the file of weights; folders of earlier versions don't have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights_sha256: Option<String>,
}

/// A method as the file names it; what else belongs to LoRA and DoRA is among PEFT's keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum StoredMethod {
    Lora,
    QBara(QBara),
    QaLora(QaLora),
    QaHira(QaHira),
    QaBlora(QaBlora),
}

impl From<Method> for StoredMethod {
    fn from(method: Method) -> Self {
        match method {
            Method::Lora { .. } | Method::Dora { .. } => Self::Lora,
            Method::QBara(numbers) => Self::QBara(numbers),
            Method::QaLora(numbers) => Self::QaLora(numbers),
            Method::QaHira(numbers) => Self::QaHira(numbers),
            Method::QaBlora(numbers) => Self::QaBlora(numbers),
        }
    }
}

impl StoredMethod {
    /// The method, together with PEFT's keys, which may contradict it.
    fn with_keys(self, lora: &PeftConfig) -> std::result::Result<Method, Problem> {
        if let Some(parameter) = lora.target_parameters.first() {
            return Err(Problem::new("target_parameters", "none", format!("\"{parameter}\"")));
        }
        if lora.use_qalora {
            return Err(Problem::new("use_qalora", "false; the method says it", true));
        }
        let method = match self {
            Self::Lora => return Ok(lora.adapter().method),
            Self::QBara(numbers) => Method::QBara(numbers),
            Self::QaLora(numbers) => Method::QaLora(numbers),
            Self::QaHira(numbers) => Method::QaHira(numbers),
            Self::QaBlora(numbers) => Method::QaBlora(numbers),
        };
        if lora.use_dora {
            return Err(Problem::new("use_dora", format!("false for {}", method.name()), true));
        }
        match lora.init_lora_weights {
            InitLoraWeights::Kaiming => Ok(method),
            other => Err(Problem::new("init_lora_weights", format!("true for {}", method.name()), other)),
        }
    }
}

/// An own adapter folder on disk, open.
///
/// ```no_run
/// # fn example(slot_shapes: Vec<(String, [usize; 2])>, fingerprint: &str) -> Result<(), kiln_adapters::Error> {
/// use kiln_adapters::{AdapterFolder, AnyAdapter};
/// let folder = AdapterFolder::open("my-adapter")?;
/// folder.check_base(Some(fingerprint))?;
/// let attacher = folder.attacher::<AnyAdapter>(&slot_shapes, 42)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct AdapterFolder {
    config: AdapterConfig,
    base_fingerprint: Option<String>,
    config_path: PathBuf,
    weights: SafetensorsFile,
}

impl AdapterFolder {
    /// Reads the configuration in `folder` and the weights' header.
    ///
    /// # Errors
    /// A file that is missing or isn't what its name says, another version, and a configuration with unknown keys or
    /// values out of range.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = whole_folder(folder.as_ref());
        let config_path = folder.join(KILN_CONFIG_FILE);
        let mut text = Vec::new();
        let file = File::open(&config_path).map_err(Error::io(&config_path))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::io(&config_path))?;
        let wrong = |field: &str, expected: &str, found: String| {
            Err(Problem::new(field, expected, found).in_file(&config_path))
        };
        if text.len() as u64 > MAX_BYTES {
            return wrong("size", &format!("at most {MAX_BYTES} bytes"), "more".into());
        }
        // The version first: another one may have other keys.
        let version = serde_json::from_slice::<serde_json::Value>(&text);
        let version = version.as_ref().ok().and_then(|value| value.get("version"));
        if let Some(version) = version.filter(|version| version.as_u64() != Some(VERSION.into())) {
            return wrong("version", &VERSION.to_string(), version.to_string());
        }
        let description: Description = match serde_json::from_slice(&text) {
            Ok(description) => description,
            Err(error) => {
                let expected = "version, method, base_fingerprint and lora";
                return wrong("configuration", expected, error.to_string());
            }
        };
        let Description { method, base_fingerprint, lora, weights_sha256, .. } = description;
        let digit = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
        if let Some(found) = &base_fingerprint
            && (found.len() != 64 || !found.as_bytes().iter().all(digit))
        {
            return wrong(
                "base_fingerprint",
                "64 lower-case hexadecimal digits or null",
                format!("{found:?}"),
            );
        }
        let lora =
            PeftConfig::from_json(serde_json::Value::Object(lora).to_string().as_bytes(), &config_path)?;
        if let Some(key) = lora.unknown_keys.first() {
            return wrong(&format!("lora.{key}"), "a key of version 1", "an unknown one".into());
        }
        lora.supported(&config_path)?;
        let method = method.with_keys(&lora).map_err(|problem| problem.in_file(&config_path))?;
        let config = AdapterConfig { method, ..lora.adapter() };
        config.validate().map_err(|error| in_file(error, &config_path))?;
        let weights = folder.join(KILN_WEIGHTS_FILE);
        if let Some(expected) = weights_sha256 {
            let found = sha256_of(&weights)?;
            if found != expected {
                let expected = format!("{found}, that of {KILN_WEIGHTS_FILE}");
                return wrong(
                    "weights_sha256",
                    &expected,
                    "another: the weights were changed, or are another adapter's".into(),
                );
            }
        }
        let weights = SafetensorsFile::open(weights)?;
        Ok(Self { config, base_fingerprint, config_path, weights })
    }

    /// The configuration.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The fingerprint of the packed base that the adapters were trained on, if one is recorded.
    pub fn base_fingerprint(&self) -> Option<&str> {
        self.base_fingerprint.as_deref()
    }

    /// Refuses another base than the one that the adapters were trained on: `found` is the fingerprint of the model's
    /// packed weights, `None` without such. Adapters without a recorded base fit any.
    ///
    /// # Errors
    /// [`Error::File`] naming `base_fingerprint`.
    pub fn check_base(&self, found: Option<&str>) -> Result<()> {
        match &self.base_fingerprint {
            Some(expected) if found != Some(expected) => {
                let found = found.unwrap_or("a base without packed weights");
                Err(Problem::new("base_fingerprint", expected, found).in_file(&self.config_path))
            }
            _ => Ok(()),
        }
    }

    /// Reads the adapters for `model`, with what they train outside its slots: as
    /// [`PeftFolder::attacher_for`](crate::PeftFolder::attacher_for).
    ///
    /// # Errors
    /// As [`attacher`](Self::attacher), and modules that are trained whole and aren't there.
    pub fn attacher_for<A: AdapterKind, M: Slots>(&self, model: &M, seed: u64) -> Result<Attacher<A>> {
        self.attacher_of(&Outline::of(model), seed)
    }

    /// Reads the adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. `seed` decides
    /// the dropout of further training.
    ///
    /// # Errors
    /// Another kind than `A`; a configuration that selects none of `slots` or has an entry without effect; a size that
    /// doesn't divide a selected layer's; a selected module that lacks a tensor, or has one of another shape or type;
    /// values that aren't finite; a tensor that no selected module uses.
    pub fn attacher<A: AdapterKind>(&self, slots: &[(String, [usize; 2])], seed: u64) -> Result<Attacher<A>> {
        self.attacher_of(&slots.into(), seed)
    }

    fn attacher_of<A: AdapterKind>(&self, outline: &Outline, seed: u64) -> Result<Attacher<A>> {
        let at = |error| in_file(error, &self.config_path);
        A::accept(&self.config).map_err(at)?;
        let config = self.config.clone().with_seed(seed);
        let targets = config.select(outline).and_then(crate::Targets::require_all).map_err(at)?;
        let (parts, outside) = store::read(
            &self.weights,
            &config,
            &targets,
            outline,
            Stacked::default(),
            Layout::Kiln,
            KILN_CONFIG_FILE,
        )
        .map_err(at)?;
        Ok(Attacher::stored(config, targets, parts, outside))
    }
}

/// Writes `adapters`, by the paths of their modules, and the `config` that they were made with as an own folder, which is
/// created if missing. `base_fingerprint` is that of the model's packed weights
/// ([`kiln_quant_core::packed_file::fingerprint`]), `None` without such.
///
/// The folder is written beside its place and renamed: an earlier adapter in it, of either kind, goes as a whole, other files
/// stay.
///
/// # Errors
/// An adapter that `config` doesn't select, or of another kind, rank, scaling, pooling or size, because the folder could
/// then not be loaded again; two adapters of one path; values that aren't finite; the operating system's errors.
pub fn save_adapters<'a, S: AsRef<str>, A: AdapterKind + 'a>(
    folder: impl AsRef<Path>,
    config: &AdapterConfig,
    base_fingerprint: Option<&str>,
    adapters: impl IntoIterator<Item = (S, &'a A)>,
) -> Result<()> {
    save(folder.as_ref(), config, base_fingerprint, &store::collect(adapters), &OutsideTensors::default())
}

/// As [`save_adapters`], with what the adapters train outside a model's slots.
///
/// # Errors
/// As [`save_adapters`].
pub fn save_adapters_with<'a, S: AsRef<str>, A: AdapterKind + 'a>(
    folder: impl AsRef<Path>,
    config: &AdapterConfig,
    base_fingerprint: Option<&str>,
    adapters: impl IntoIterator<Item = (S, &'a A)>,
    outside: &OutsideTensors,
) -> Result<()> {
    save(folder.as_ref(), config, base_fingerprint, &store::collect(adapters), outside)
}

fn save(
    folder: &Path,
    config: &AdapterConfig,
    base_fingerprint: Option<&str>,
    adapters: &[(String, AnyAdapter)],
    outside: &OutsideTensors,
) -> Result<()> {
    let config_path = folder.join(KILN_CONFIG_FILE);
    let lora = config.peft_keys();
    lora.supported(&config_path)?;
    store::check_adapters(config, adapters, outside, Layout::Kiln)?;
    let new = store::new_folder(folder, outside)?;
    let weights = new.path().join(KILN_WEIGHTS_FILE);
    store::write(&weights, adapters, Vec::new(), outside, Layout::Kiln, &BTreeMap::new())?;
    let serde_json::Value::Object(lora) = lora.to_json() else {
        return Err(Problem::new("lora", "an object", "another value").argument());
    };
    let description = Description {
        version: VERSION,
        method: config.method.into(),
        base_fingerprint: base_fingerprint.map(Into::into),
        lora,
        weights_sha256: Some(sha256_of(&weights)?),
    };
    let text = serde_json::to_vec_pretty(&description)
        .map_err(|error| Error::io(&config_path)(std::io::Error::other(error)))?;
    write_atomically(&new.path().join(KILN_CONFIG_FILE), |file| file.write_all(&text))?;
    Ok(new.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::InitH;

    #[test]
    fn methods_are_named_objects_without_unknown_keys() {
        let methods = [
            (StoredMethod::Lora, r#""lora""#),
            (StoredMethod::QBara(QBara { lambda: 2 }), r#"{"q-bara":{"lambda":2}}"#),
            (StoredMethod::QaLora(QaLora::default()), r#"{"qa-lora":{"pool":32,"pooling":"average"}}"#),
            (
                StoredMethod::QaHira(QaHira { pool: 4, repeat: 8, init: InitH::Kaiming }),
                r#"{"qa-hira":{"pool":4,"repeat":8,"init":"kaiming"}}"#,
            ),
            (
                StoredMethod::QaBlora(QaBlora { pool: 4, repeat: 2, rank: Some(3) }),
                r#"{"qa-blora":{"pool":4,"repeat":2,"rank":3}}"#,
            ),
        ];
        for (method, text) in methods {
            assert_eq!(serde_json::to_string(&method).unwrap(), text);
            assert_eq!(serde_json::from_str::<StoredMethod>(text).unwrap(), method);
        }
        for bad in [
            r#"{"q-bara":{"lambda":2,"mu":3}}"#,
            r#"{"q-bara":{}}"#,
            r#"{"q-bara":{"lambda":-2}}"#,
            r#"{"qa-lora":{"pool":4}}"#,
            r#"{"qa-lora":{"pool":4,"pooling":"median"}}"#,
            r#""hira""#,
        ] {
            assert!(serde_json::from_str::<StoredMethod>(bad).is_err(), "{bad}");
        }
    }
}
