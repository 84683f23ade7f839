//! `adapter_config.json`, the description of a LoRA adapter in a PEFT folder.
//!
//! Source: the files that PEFT 0.21 writes and its `LoraConfig`. Keys fall into three sorts: those that [`PeftConfig`]
//! holds; those that PEFT knows and whose non-default values are refused by name, because they change what the adapter
//! computes ([`UNSUPPORTED`]); and those that say nothing about the computation ([`INFORMATIVE`]). Any other key is
//! unknown to PEFT too, which ignores it with a warning; here such keys are listed in [`PeftConfig::unknown_keys`].

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use kiln_quant_core::write_atomically;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::json_fields::{Fields, Problem, shorten};

/// The name of the file in an adapter folder.
pub const CONFIG_FILE: &str = "adapter_config.json";

/// The largest rank that is accepted, so that a file can't make its reader allocate at will.
pub const MAX_RANK: usize = 1 << 16;

/// The largest configuration that is read, in bytes. Real ones have a few thousand.
const MAX_BYTES: u64 = 16 << 20;

/// The PEFT version whose fields are written.
pub(crate) const PEFT_VERSION: &str = "0.21.2";

/// Which modules get an adapter: `target_modules` and `exclude_modules`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TargetModules {
    /// Module names; `q_proj` also means every name that ends in `.q_proj`.
    Names(Vec<String>),
    /// A regular expression that must match the whole name.
    Pattern(String),
    /// The string `all-linear`: every linear but the output head.
    AllLinear,
}

/// A list of names.
impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

/// A list of names.
impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl TargetModules {
    fn from_value(value: &Value) -> std::result::Result<Option<Self>, String> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if text.eq_ignore_ascii_case("all-linear") => Ok(Some(Self::AllLinear)),
            Value::String(text) => Ok(Some(Self::Pattern(text.clone()))),
            Value::Array(items) => items
                .iter()
                .map(|item| item.as_str().map(str::to_owned).ok_or_else(|| shorten(item)))
                .collect::<std::result::Result<_, _>>()
                .map(|names| Some(Self::Names(names))),
            other => Err(shorten(other)),
        }
    }

    fn to_value(&self) -> Value {
        match self {
            Self::Names(names) => json!(names),
            Self::Pattern(pattern) => json!(pattern),
            Self::AllLinear => json!("all-linear"),
        }
    }
}

/// How A and B were initialised before training. PEFT has others, which are refused by name.
///
/// [`Pissa`](Self::Pissa) and [`Olora`](Self::Olora) move a part of the base's weight into the adapter, so that such an
/// adapter belongs to a base that was changed in the same way, which loading repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum InitLoraWeights {
    /// `true`: A uniform as in Kaiming's rule, B zero.
    #[default]
    Kaiming,
    /// `false`: A and B both random.
    Random,
    /// `"gaussian"`: A normal with deviation 1 / r, B zero.
    Gaussian,
    /// `"orthogonal"`: A and B from one orthogonal matrix. Read, but not made.
    Orthogonal,
    /// `"pissa"`, [PiSSA](https://arxiv.org/abs/2404.02948): the weight's largest singular values.
    Pissa {
        /// `"pissa_niter_N"`: approximated by this many steps from random vectors, which can't be repeated after
        /// loading: such adapters are saved by [`Lora::relative_to`](crate::Lora::relative_to) only.
        iterations: Option<u32>,
    },
    /// `"olora"`, [OLoRA](https://arxiv.org/abs/2406.01775): the weight's QR decomposition.
    Olora,
}

impl InitLoraWeights {
    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Null | Value::Bool(true) => Some(Self::Kaiming),
            Value::Bool(false) => Some(Self::Random),
            Value::String(text) if text == "gaussian" => Some(Self::Gaussian),
            Value::String(text) if text == "orthogonal" => Some(Self::Orthogonal),
            Value::String(text) if text == "pissa" => Some(Self::Pissa { iterations: None }),
            Value::String(text) if text == "olora" => Some(Self::Olora),
            Value::String(text) => {
                let iterations = text.strip_prefix("pissa_niter_")?.parse().ok();
                iterations.map(|iterations| Self::Pissa { iterations: Some(iterations) })
            }
            _ => None,
        }
    }

    /// Whether adapters take a part of the base's weight.
    pub fn changes_base(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    pub(crate) fn to_value(self) -> Value {
        match self {
            Self::Kaiming => json!(true),
            Self::Random => json!(false),
            Self::Gaussian => json!("gaussian"),
            Self::Orthogonal => json!("orthogonal"),
            Self::Pissa { iterations: None } => json!("pissa"),
            Self::Pissa { iterations: Some(iterations) } => json!(format!("pissa_niter_{iterations}")),
            Self::Olora => json!("olora"),
        }
    }
}

/// As PEFT's files write it: `true`, `"pissa"`, ..
impl std::fmt::Display for InitLoraWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.to_value().fmt(f)
    }
}

/// `adapter_config.json` of a PEFT folder. Everywhere else an [`AdapterConfig`](crate::AdapterConfig) says what is
/// trained; the two are made of each other by [`AdapterConfig::from_peft`](crate::AdapterConfig::from_peft) and
/// [`AdapterConfig::to_peft`](crate::AdapterConfig::to_peft).
///
/// | name | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `r` | 8 | rank | 1 to [`MAX_RANK`] |
/// | `lora_alpha` | 8 | numerator of the scaling | finite |
/// | `lora_dropout` | 0 | share of an adapter's inputs dropped in training | 0 to below 1 |
/// | `use_rslora` | false | scaling alpha / √r in place of alpha / r | |
/// | `rank_pattern`, `alpha_pattern` | none | rank and alpha of modules whose name ends in a match of the regular expression; the first pattern wins | as `r`, `lora_alpha` |
/// | `layers_to_transform` | all | numbers of the layers that get adapters | |
///
/// ```
/// use kiln_adapters::{PeftConfig, TargetModules};
///
/// let mut config = PeftConfig::new(16, 16.0, TargetModules::AllLinear);
/// config.rank_pattern = vec![("down_proj".into(), 32)];
/// config.validate()?;
/// assert_eq!(config.to_json()["rank_pattern"]["down_proj"], 32);
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PeftConfig {
    /// Name or folder of the base model.
    pub base_model_name_or_path: Option<String>,
    /// Revision of the base model.
    pub revision: Option<String>,
    /// `CAUSAL_LM` for the models of this project.
    pub task_type: Option<String>,
    /// True in every file that PEFT saves.
    pub inference_mode: bool,
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub lora_alpha: f64,
    /// Share of an adapter's inputs that is dropped in training.
    pub lora_dropout: f64,
    /// Scaling alpha / √r in place of alpha / r ([rank-stabilised LoRA](https://arxiv.org/abs/2312.03732)).
    pub use_rslora: bool,
    /// Weight-decomposed LoRA ([DoRA](https://arxiv.org/abs/2402.09353)).
    pub use_dora: bool,
    /// [QA-LoRA](https://arxiv.org/abs/2309.14717), with PEFT's pooling:
    /// [`AverageTimesGroups`](crate::Pooling::AverageTimesGroups).
    pub use_qalora: bool,
    /// Inputs that QA-LoRA joins; without effect otherwise.
    pub qalora_group_size: usize,
    /// Initialisation before training.
    pub init_lora_weights: InitLoraWeights,
    /// The modules that get adapters.
    pub target_modules: TargetModules,
    /// Parameters of modules that are no linears that get adapters, by the ends of their names: experts in one tensor, routers.
    pub target_parameters: Vec<String>,
    /// The modules that don't, whatever `target_modules` says.
    pub exclude_modules: Option<TargetModules>,
    /// The layers that get adapters; `None` or empty: all.
    pub layers_to_transform: Option<Vec<usize>>,
    /// Regular expressions for the name before the layer's number; empty: any name.
    pub layers_pattern: Vec<String>,
    /// Ranks by regular expression, in the file's order.
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas by regular expression, in the file's order.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Modules that are trained whole, by the ends of their names; empty: none.
    pub modules_to_save: Vec<String>,
    /// Tokens whose rows of the embedding are trained; empty: none.
    pub trainable_token_indices: Vec<u32>,
    /// Whether a head that is the embedding stays it where the embedding is trained whole.
    pub ensure_weight_tying: bool,
    /// The version that wrote the file.
    pub peft_version: Option<String>,
    /// Keys of the file that PEFT doesn't know, in its order; not written.
    pub unknown_keys: Vec<String>,
}

/// Keys of PEFT 0.21 whose value must be its default (the second entry), null, or, where the default is empty, empty.
const UNSUPPORTED: [(&str, &str); 14] = [
    ("alora_invocation_tokens", "null"),
    ("arrow_config", "null"),
    ("bias", "\"none\""),
    ("corda_config", "null"),
    ("eva_config", "null"),
    ("kasa_config", "null"),
    ("layer_replication", "null"),
    ("loftq_config", "{}"),
    ("lora_bias", "false"),
    ("lora_ga_config", "null"),
    ("megatron_config", "null"),
    ("monteclora_config", "null"),
    ("use_bdlora", "null"),
    ("velora_config", "null"),
];

/// Keys of PEFT 0.21 without effect while the keys of [`UNSUPPORTED`] have their defaults, and what is written. How the base's
/// files lay out a weight (`fan_in_fan_out`, GPT-2) changes nothing of the adapter's.
const INFORMATIVE: [(&str, &str); 3] =
    [("auto_mapping", "null"), ("fan_in_fan_out", "false"), ("megatron_core", "\"megatron.core\"")];

/// PEFT's default of `qalora_group_size`.
const QALORA_GROUP_SIZE: usize = 16;

/// A key that PEFT knows and doesn't write: where to do the work, not what to compute.
const RUNTIME: &str = "runtime_config";

impl PeftConfig {
    /// LoRA of rank `r` and scaling `lora_alpha / r` on `target_modules`; everything else as PEFT's defaults.
    pub fn new(r: usize, lora_alpha: f64, target_modules: TargetModules) -> Self {
        Self {
            base_model_name_or_path: None,
            revision: None,
            task_type: Some("CAUSAL_LM".into()),
            inference_mode: true,
            r,
            lora_alpha,
            lora_dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            use_qalora: false,
            qalora_group_size: QALORA_GROUP_SIZE,
            init_lora_weights: InitLoraWeights::default(),
            target_modules,
            target_parameters: Vec::new(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            modules_to_save: Vec::new(),
            trainable_token_indices: Vec::new(),
            ensure_weight_tying: false,
            peft_version: Some(PEFT_VERSION.into()),
            unknown_keys: Vec::new(),
        }
    }

    /// Reads `path` and refuses what is not supported: [`from_json`](Self::from_json), then
    /// [`supported`](Self::supported).
    ///
    /// # Errors
    /// A file that can't be read or is unreasonably large, and the errors of those two.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut text = Vec::new();
        let file = File::open(path).map_err(Error::io(path))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(Error::io(path))?;
        if text.len() as u64 > MAX_BYTES {
            let expected = format!("at most {MAX_BYTES} bytes");
            return Err(Problem::new("size", expected, "more").in_file(path));
        }
        let config = Self::from_json(&text, path)?;
        config.supported(path)?;
        Ok(config)
    }

    /// Parses the file's text; `path` is for messages only.
    ///
    /// # Errors
    /// [`Error::File`] for text that is not a JSON object, a missing `peft_type` or `target_modules`, a value of a
    /// wrong type or out of range; [`Error::Unsupported`] for another kind of adapter and for a key of PEFT's with a
    /// value that isn't implemented.
    pub fn from_json(text: &[u8], path: &Path) -> Result<Self> {
        let map: Map<String, Value> =
            serde_json::from_slice(text).map_err(|error| json_problem(text, &error).in_file(path))?;
        let kind = Fields(&map).string("peft_type").map_err(|problem| problem.in_file(path))?;
        match kind.as_deref() {
            Some("LORA") => {}
            Some(other) => return Err(unsupported(path, "peft_type", &json!(other), "\"LORA\"")),
            None => return Err(Problem::new("peft_type", "\"LORA\"", "nothing").in_file(path)),
        }
        for (key, default) in UNSUPPORTED {
            if let Some(value) = map.get(key).filter(|value| !is_default(value, &constant(default))) {
                return Err(unsupported(path, key, value, default));
            }
        }
        let init = map.get("init_lora_weights").unwrap_or(&Value::Null);
        let Some(init) = InitLoraWeights::from_value(init) else {
            let supported =
                "true, false, \"gaussian\", \"orthogonal\", \"olora\", \"pissa\" and \"pissa_niter_N\"";
            return Err(unsupported(path, "init_lora_weights", init, supported));
        };
        Self::from_fields(&map, init).map_err(|problem| problem.in_file(path))
    }

    fn from_fields(map: &Map<String, Value>, init: InitLoraWeights) -> std::result::Result<Self, Problem> {
        let fields = Fields(map);
        let known = Self::new(1, 1.0, TargetModules::AllLinear).to_json();
        let is_known = |key: &str| key == RUNTIME || known.get(key).is_some();
        let target_parameters = fields.strings("target_parameters")?;
        let config = Self {
            base_model_name_or_path: fields.string("base_model_name_or_path")?,
            revision: fields.string("revision")?,
            task_type: fields.string("task_type")?,
            inference_mode: fields.bool("inference_mode")?,
            r: fields.size("r")?.unwrap_or(8),
            lora_alpha: fields.number("lora_alpha")?.unwrap_or(8.0),
            lora_dropout: fields.number("lora_dropout")?.unwrap_or(0.0),
            use_rslora: fields.bool("use_rslora")?,
            use_dora: fields.bool("use_dora")?,
            use_qalora: fields.bool("use_qalora")?,
            qalora_group_size: fields.size("qalora_group_size")?.unwrap_or(QALORA_GROUP_SIZE),
            init_lora_weights: init,
            target_modules: match modules(map, "target_modules")? {
                Some(modules) => modules,
                None if !target_parameters.is_empty() => TargetModules::Names(Vec::new()),
                None => {
                    return Err(Problem::new("target_modules", "a list of names or a string", "nothing"));
                }
            },
            target_parameters,
            exclude_modules: modules(map, "exclude_modules")?,
            layers_to_transform: fields.sizes("layers_to_transform")?,
            layers_pattern: fields.strings("layers_pattern")?,
            rank_pattern: fields.pattern_sizes("rank_pattern")?,
            alpha_pattern: fields.pattern_numbers("alpha_pattern")?,
            modules_to_save: fields.strings("modules_to_save")?,
            trainable_token_indices: token_ids(map)?,
            ensure_weight_tying: fields.bool("ensure_weight_tying")?,
            peft_version: fields.string("peft_version")?,
            unknown_keys: map.keys().filter(|key| !is_known(key)).cloned().collect(),
        };
        config.problem().map_or(Ok(config), Err)
    }

    /// Refuses what the parser understands and files can't hold or adapters can't compute.
    ///
    /// # Errors
    /// [`Error::Unsupported`] naming the key; `path` is for the message only.
    pub fn supported(&self, path: &Path) -> Result<()> {
        if let InitLoraWeights::Pissa { iterations: Some(_) } = self.init_lora_weights {
            let supported = "\"pissa\", or the adapter relative to its initial values; \
                             the base of random iterations can't be made again";
            return Err(unsupported(
                path,
                "init_lora_weights",
                &self.init_lora_weights.to_value(),
                supported,
            ));
        }
        if self.use_dora && self.use_qalora {
            return Err(unsupported(path, "use_qalora", &json!(true), "false together with use_dora"));
        }
        if self.init_lora_weights.changes_base() && (self.use_dora || self.use_qalora) {
            let supported = "an initialisation that leaves the base as it is, for DoRA and QA-LoRA";
            return Err(unsupported(
                path,
                "init_lora_weights",
                &self.init_lora_weights.to_value(),
                supported,
            ));
        }
        Ok(())
    }

    /// Checks ranges and combinations, which a configuration made in code may violate.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first offending option.
    pub fn validate(&self) -> Result<()> {
        self.problem().map_or(Ok(()), |problem| Err(problem.argument()))
    }

    fn problem(&self) -> Option<Problem> {
        if self.qalora_group_size == 0 {
            return Some(Problem::new("qalora_group_size", "at least 1", 0));
        }
        self.adapter().problem().map(|problem| problem.renamed(peft_key))
    }

    /// Writes every key that PEFT 0.21 writes, sorted, to `path`: to a temporary sibling first, then renamed.
    ///
    /// # Errors
    /// [`validate`](Self::validate)'s, and the operating system's; `path` is then as it was before.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        self.validate()?;
        let text = serde_json::to_vec_pretty(&self.to_json())
            .map_err(|error| Error::io(path)(std::io::Error::other(error)))?;
        Ok(write_atomically(path, |file| file.write_all(&text))?)
    }

    /// The file's content: every key that PEFT 0.21 writes, sorted.
    pub fn to_json(&self) -> Value {
        let layers_pattern = Some(&self.layers_pattern).filter(|patterns| !patterns.is_empty());
        let ranks = self.rank_pattern.iter().map(|(pattern, r)| (pattern.clone(), json!(r)));
        let alphas = self.alpha_pattern.iter().map(|(pattern, alpha)| (pattern.clone(), number(*alpha)));
        let fields = [
            ("peft_type", json!("LORA")),
            ("base_model_name_or_path", json!(self.base_model_name_or_path)),
            ("revision", json!(self.revision)),
            ("task_type", json!(self.task_type)),
            ("inference_mode", json!(self.inference_mode)),
            ("r", json!(self.r)),
            ("lora_alpha", number(self.lora_alpha)),
            ("lora_dropout", json!(self.lora_dropout)),
            ("use_rslora", json!(self.use_rslora)),
            ("use_dora", json!(self.use_dora)),
            ("use_qalora", json!(self.use_qalora)),
            ("qalora_group_size", json!(self.qalora_group_size)),
            ("init_lora_weights", self.init_lora_weights.to_value()),
            ("target_modules", self.target_modules.to_value()),
            ("target_parameters", unless_empty(&self.target_parameters)),
            ("exclude_modules", self.exclude_modules.as_ref().map_or(Value::Null, TargetModules::to_value)),
            ("layers_to_transform", json!(self.layers_to_transform)),
            ("layers_pattern", json!(layers_pattern)),
            ("rank_pattern", Value::Object(ranks.collect())),
            ("alpha_pattern", Value::Object(alphas.collect())),
            ("modules_to_save", unless_empty(&self.modules_to_save)),
            ("trainable_token_indices", unless_empty(&self.trainable_token_indices)),
            ("ensure_weight_tying", json!(self.ensure_weight_tying)),
            ("peft_version", json!(self.peft_version)),
        ];
        let constants = UNSUPPORTED.into_iter().chain(INFORMATIVE).map(|(key, text)| (key, constant(text)));
        let mut map: Map<String, Value> =
            fields.into_iter().chain(constants).map(|(key, value)| (key.to_owned(), value)).collect();
        map.sort_keys();
        Value::Object(map)
    }
}

/// The list, or null in place of an empty one.
fn unless_empty<T: serde::Serialize>(list: &[T]) -> Value {
    if list.is_empty() { Value::Null } else { json!(list) }
}

/// `trainable_token_indices`: a list, or an object that says of which module, which must be the embedding.
fn token_ids(map: &Map<String, Value>) -> std::result::Result<Vec<u32>, Problem> {
    const KEY: &str = "trainable_token_indices";
    let ids = match map.get(KEY) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(modules)) => match modules.iter().next() {
            Some((module, ids)) if modules.len() == 1 && module == "embed_tokens" => ids,
            _ => {
                let found = modules.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(Problem::new(KEY, "ids, those of \"embed_tokens\" alone", found));
            }
        },
        Some(list) => list,
    };
    let expected = "a list of token ids";
    let Value::Array(ids) = ids else { return Err(Problem::new(KEY, expected, shorten(ids))) };
    let id = |id: &Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
    ids.iter().map(|value| id(value).ok_or_else(|| Problem::new(KEY, expected, shorten(value)))).collect()
}

/// PEFT's name of an option of [`AdapterConfig`](crate::AdapterConfig).
fn peft_key(option: &str) -> &str {
    match option {
        "rank" => "r",
        "alpha" => "lora_alpha",
        "dropout" => "lora_dropout",
        "targets" => "target_modules",
        "exclude" => "exclude_modules",
        "layers" => "layers_to_transform",
        "init" => "init_lora_weights",
        "trainable_tokens" => "trainable_token_indices",
        "keep_tied" => "ensure_weight_tying",
        other => other,
    }
}

/// An error about an option as one about the file that holds it, under PEFT's name.
pub(crate) fn in_file(error: Error, path: &Path) -> Error {
    match error {
        Error::Argument { name, expected, found } => {
            Problem::new(peft_key(&name), expected, found).in_file(path)
        }
        other => other,
    }
}

fn modules(map: &Map<String, Value>, key: &str) -> std::result::Result<Option<TargetModules>, Problem> {
    TargetModules::from_value(map.get(key).unwrap_or(&Value::Null))
        .map_err(|found| Problem::new(key, "a list of names or a string", found))
}

fn is_default(value: &Value, default: &Value) -> bool {
    let empty = match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(items) => items.is_empty(),
        _ => false,
    };
    value.is_null() || value == default || (empty && (default.is_null() || default.is_object()))
}

/// A value of the tables above.
fn constant(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or(Value::Null)
}

/// Whole numbers without a fraction, as PEFT writes an integer alpha.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() < EXACT { json!(value as i64) } else { json!(value) }
}

fn unsupported(path: &Path, key: &str, value: &Value, supported: &str) -> Error {
    Error::Unsupported {
        path: path.into(),
        key: key.into(),
        value: shorten(value),
        supported: supported.into(),
    }
}

/// A syntax error with the line that has it, since that line names the key (`"lora_alpha": NaN,`).
fn json_problem(text: &[u8], error: &serde_json::Error) -> Problem {
    let line = error.line().checked_sub(1).and_then(|line| text.split(|byte| *byte == b'\n').nth(line));
    let line: String = String::from_utf8_lossy(line.unwrap_or_default()).trim().chars().take(80).collect();
    Problem::new(format!("line {}", error.line()), "a JSON object", format!("{error}: {line}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PEFT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/peft");
    const MINIMAL: &str = r#"{"peft_type": "LORA", "target_modules": ["q_proj"]}"#;

    fn parse(text: &str) -> Result<PeftConfig> {
        PeftConfig::from_json(text.as_bytes(), Path::new("a.json"))
    }

    /// The minimal file with one key more.
    fn with(key: &str, value: Value) -> Result<PeftConfig> {
        let mut map: Map<String, Value> = serde_json::from_str(MINIMAL).unwrap();
        map.insert(key.into(), value);
        parse(&Value::Object(map).to_string())
    }

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(PEFT).join(name).join(CONFIG_FILE)
    }

    #[test]
    fn files_of_peft_are_read() {
        let config = PeftConfig::read(fixture("tiny-lora-r8-all")).unwrap();
        assert_eq!((config.r, config.lora_alpha, config.lora_dropout), (8, 16.0, 0.0));
        assert_eq!(config.base_model_name_or_path.as_deref(), Some("llama-tied-f32-sharded"));
        assert_eq!(config.peft_version.as_deref(), Some("0.21.2"));
        assert!(config.unknown_keys.is_empty());
        let TargetModules::Names(names) = &config.target_modules else { panic!("{config:?}") };
        assert_eq!(names.len(), 7);
        assert_eq!(PeftConfig::read(fixture("smollm2-lora-r4-qv")).unwrap().r, 4);
    }

    #[test]
    fn what_is_written_is_what_peft_writes() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tiny-lora-r8-all", "smollm2-lora-r4-qv"] {
            let path = folder.path().join(CONFIG_FILE);
            PeftConfig::read(fixture(name)).unwrap().write(&path).unwrap();
            let expected = std::fs::read_to_string(fixture(name)).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), expected, "{name}, byte for byte");
            let ordinary = folder.path().join("ordinary");
            std::fs::write(&ordinary, "").unwrap();
            let permissions = |path| std::fs::metadata(path).unwrap().permissions();
            assert_eq!(permissions(&path), permissions(&ordinary));
        }
    }

    #[test]
    fn dora_and_qalora_are_read_and_not_mixed() {
        assert!(PeftConfig::read(fixture("tiny-dora-r4")).unwrap().use_dora);
        let config = with("use_qalora", json!(true)).unwrap();
        assert_eq!((config.use_qalora, config.qalora_group_size), (true, 16));
        let mut both = config;
        both.use_dora = true;
        assert!(both.supported(Path::new("a.json")).unwrap_err().to_string().contains("use_qalora"));
    }

    #[test]
    fn initialisations_that_change_the_base_are_read() {
        let init = |text: &str| with("init_lora_weights", json!(text)).unwrap();
        assert_eq!(init("olora").init_lora_weights, InitLoraWeights::Olora);
        assert_eq!(init("pissa").init_lora_weights, InitLoraWeights::Pissa { iterations: None });
        let random = init("pissa_niter_4");
        assert_eq!(random.init_lora_weights, InitLoraWeights::Pissa { iterations: Some(4) });
        assert_eq!(random.to_json()["init_lora_weights"], "pissa_niter_4");
        assert!(random.supported(Path::new("a.json")).unwrap_err().to_string().contains("pissa_niter_4"));
        let mut dora = init("pissa");
        dora.use_dora = true;
        assert!(dora.supported(Path::new("a.json")).unwrap_err().to_string().contains("init_lora_weights"));
    }

    #[test]
    fn absent_keys_have_peft_defaults() {
        let config = parse(MINIMAL).unwrap();
        let mut expected = PeftConfig::new(8, 8.0, TargetModules::Names(vec!["q_proj".into()]));
        (expected.task_type, expected.inference_mode, expected.peft_version) = (None, false, None);
        assert_eq!(config, expected);
    }

    #[test]
    fn known_keys_with_values_not_implemented_are_refused_by_name() {
        let values = [
            ("bias", json!("all")),
            ("bias", json!("lora_only")),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 4], [2, 5]])),
            ("loftq_config", json!({"loftq_bits": 4})),
            ("alora_invocation_tokens", json!([1])),
            ("megatron_config", json!({"x": 1})),
            ("use_bdlora", json!({"nblocks": 2})),
            ("arrow_config", json!({"top_k": 1})),
            ("init_lora_weights", json!("pissa_niter_x")),
            ("init_lora_weights", json!("mica")),
            ("init_lora_weights", json!(3)),
            ("peft_type", json!("HIRA")),
        ];
        for (name, value) in values {
            let error = with(name, value).unwrap_err();
            assert!(matches!(&error, Error::Unsupported { key, .. } if key == name), "{name}: {error}");
            assert!(error.to_string().contains("a.json"), "{error}");
        }
        for (key, _) in UNSUPPORTED {
            assert!(with(key, json!("surprise")).is_err(), "{key}");
            assert!(with(key, Value::Null).is_ok(), "{key}");
        }
        assert!(with("modules_to_save", json!([])).unwrap().modules_to_save.is_empty());
    }

    #[test]
    fn wrong_types_and_ranges_name_the_key() {
        let values = [
            ("r", json!(0)),
            ("r", json!(-4)),
            ("r", json!(8.5)),
            ("r", json!("8")),
            ("r", json!(u64::MAX)),
            ("lora_alpha", json!("16")),
            ("lora_alpha", json!([16])),
            ("lora_dropout", json!(1.0)),
            ("lora_dropout", json!(-0.1)),
            ("use_rslora", json!(1)),
            ("use_dora", json!("yes")),
            ("use_qalora", json!(1)),
            ("qalora_group_size", json!(0)),
            ("qalora_group_size", json!(-4)),
            ("target_modules", json!(null)),
            ("target_modules", json!(["q_proj", 3])),
            ("target_modules", json!({"q_proj": 1})),
            ("exclude_modules", json!(7)),
            ("layers_to_transform", json!([-1])),
            ("layers_to_transform", json!("3")),
            ("layers_pattern", json!([1])),
            ("rank_pattern", json!([["q_proj", 4]])),
            ("rank_pattern", json!({"q_proj": 0})),
            ("rank_pattern", json!({"q_proj": "4"})),
            ("alpha_pattern", json!({"q_proj": null})),
            ("modules_to_save", json!([1])),
            ("trainable_token_indices", json!([-1])),
            ("trainable_token_indices", json!([1, 1])),
            ("trainable_token_indices", json!({"lm_head": [1]})),
            ("trainable_token_indices", json!({"embed_tokens": [1], "lm_head": [1]})),
            ("ensure_weight_tying", json!(1)),
            ("base_model_name_or_path", json!(1)),
            ("peft_type", json!(null)),
        ];
        for (name, value) in values {
            let error = with(name, value.clone()).unwrap_err();
            assert!(
                matches!(&error, Error::File { field, .. } if field.starts_with(name)),
                "{name} {value}: {error}"
            );
        }
        assert!(parse(r#"{"peft_type": "LORA"}"#).unwrap_err().to_string().contains("target_modules"));
        assert!(parse("[]").unwrap_err().to_string().contains("JSON object"));
    }

    #[test]
    fn numbers_that_json_lacks_are_errors_that_show_the_key() {
        for bad in ["NaN", "Infinity", "1e999"] {
            let text = MINIMAL.replace("{\"", &format!("{{\n  \"lora_alpha\": {bad},\n\""));
            assert!(parse(&text).unwrap_err().to_string().contains("lora_alpha"), "{bad}");
        }
    }

    #[test]
    fn options_that_exclude_each_other_are_refused() {
        let text = r#"{"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": [1]}"#;
        assert!(parse(text).unwrap_err().to_string().contains("layers_to_transform"));
        assert!(
            with("layers_pattern", json!("layers")).unwrap_err().to_string().contains("layers_to_transform")
        );
    }

    #[test]
    fn unknown_keys_are_listed() {
        let config = with("merge_weights", json!(false)).unwrap();
        assert_eq!(config.unknown_keys, ["merge_weights"]);
    }

    #[test]
    fn a_configuration_made_in_code_is_checked_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONFIG_FILE);
        let config = PeftConfig::new(4, f64::NAN, TargetModules::AllLinear);
        assert!(config.write(&path).unwrap_err().to_string().contains("lora_alpha"));
        assert!(PeftConfig::new(0, 1.0, TargetModules::AllLinear).validate().is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn every_option_survives_writing_and_reading() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CONFIG_FILE);
        let mut config =
            PeftConfig::new(3, 2.5, TargetModules::Names(vec!["v_proj".into(), "q_proj".into()]));
        config.exclude_modules = Some(TargetModules::Pattern(r".*\.0\..*".into()));
        config.layers_to_transform = Some(vec![1, 2]);
        config.layers_pattern = vec!["layers".into()];
        config.rank_pattern = vec![("z".into(), 5), ("a".into(), 6)];
        config.alpha_pattern = vec![("q".into(), 0.125)];
        config.lora_dropout = 0.05;
        config.modules_to_save = vec!["norm".into()];
        config.trainable_token_indices = vec![9, 2];
        config.ensure_weight_tying = true;
        config.use_rslora = true;
        config.init_lora_weights = InitLoraWeights::Gaussian;
        config.write(&path).unwrap();
        assert_eq!(PeftConfig::read(&path).unwrap(), config);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = PeftConfig::read(Path::new("/nowhere/adapter_config.json")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/adapter_config.json"), "{error}");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(|value| json!(value)),
            any::<i64>().prop_map(|value| json!(value)),
            any::<f64>().prop_map(|value| json!(value)),
            ".{0,8}".prop_map(|value| json!(value)),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(|items| json!(items)),
                prop::collection::vec((".{0,6}", inner), 0..4)
                    .prop_map(|items| Value::Object(items.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn any_bytes_give_an_answer(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = PeftConfig::from_json(&text, Path::new("a.json"));
        }

        #[test]
        fn any_value_of_any_key_is_read_or_refused_with_its_name(
            index in any::<prop::sample::Index>(), value in any_json(),
        ) {
            let written = PeftConfig::new(1, 1.0, TargetModules::AllLinear).to_json();
            let key = index.get(&written.as_object().unwrap().keys().collect::<Vec<_>>()).as_str();
            match with(key, value) {
                Ok(config) => prop_assert!(config.validate().is_ok()),
                Err(error) => {
                    let text = error.to_string();
                    prop_assert!(text.contains(key) || text.contains("layers_to_transform"), "{}: {}", key, text);
                }
            }
        }

        #[test]
        fn a_file_cut_anywhere_is_refused(cut in 0usize..1087) {
            let text = std::fs::read(fixture("smollm2-lora-r4-qv")).unwrap();
            prop_assert!(PeftConfig::from_json(&text[..cut.min(text.len() - 1)], Path::new("a.json")).is_err());
        }
    }
}
