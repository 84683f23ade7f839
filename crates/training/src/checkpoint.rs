//! A run on disk: `state.json`, `trainable.safetensors`, `optimizer.bpk`, in a folder that is written beside its place
//! and then renamed.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use burn::optim::ModuleOptimizer;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    Cursor, Error, Result, ScheduleKind, TrainerConfig,
    trainable::{self, Parameter},
};

/// Version of the folder's layout.
pub(crate) const VERSION: u32 = 1;

const STATE: &str = "state.json";
const TENSORS: &str = "trainable.safetensors";
const OPTIMIZER: &str = "optimizer.bpk";
/// Metadata key of the parameters' ids in [`TENSORS`].
const IDS: &str = "kiln.parameter_ids";

/// Everything that isn't a tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub version: u32,
    pub step: u64,
    pub best: Option<f64>,
    /// The step of `best`; checkpoints of earlier versions don't say it.
    #[serde(default)]
    pub best_step: Option<u64>,
    pub cursor: Cursor,
    pub config: TrainerConfig,
    /// Fingerprint of the data set.
    pub data: String,
    /// What the model is besides its trained parameters; empty in checkpoints of earlier versions.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub model: BTreeMap<String, String>,
}

/// The run that is to go on.
pub(crate) struct Run<'a> {
    pub config: &'a TrainerConfig,
    pub data: &'a str,
    pub identity: &'a BTreeMap<String, String>,
    pub fresh: &'a BTreeMap<String, Parameter>,
}

/// Whether there is a checkpoint in `folder`.
pub(crate) fn exists(folder: &Path) -> bool {
    find(folder).join(STATE).is_file()
}

/// A checkpoint that fits the run.
pub(crate) struct Saved {
    pub state: State,
    pub parameters: BTreeMap<String, Parameter>,
}

fn sibling(folder: &Path, suffix: &str) -> PathBuf {
    let mut name = folder.file_name().unwrap_or_default().to_os_string();
    name.push(suffix);
    folder.with_file_name(name)
}

fn wrong(path: &Path, field: &str, expected: impl ToString, found: impl ToString) -> Error {
    Error::File {
        path: path.to_path_buf(),
        field: field.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

pub(crate) fn save(
    folder: &Path,
    state: &State,
    parameters: BTreeMap<String, Parameter>,
    optimizer: &ModuleOptimizer,
) -> Result<()> {
    let (fresh, old) = (sibling(folder, ".new"), sibling(folder, ".old"));
    let remove = |path: &Path| match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    };
    remove(&fresh)?;
    fs::create_dir_all(&fresh).map_err(Error::io(&fresh))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = fresh.join(name);
        let written = fs::File::create(&path).and_then(|mut file| {
            std::io::Write::write_all(&mut file, bytes)?;
            file.sync_all()
        });
        written.map_err(Error::io(path))
    };
    let json = serde_json::to_vec_pretty(state).map_err(|e| wrong(&fresh.join(STATE), "state", "JSON", e))?;
    write(STATE, &json)?;
    write(TENSORS, &tensors(&fresh.join(TENSORS), &parameters)?)?;
    let bytes = optimizer.into_bytes().map_err(|e| wrong(&fresh.join(OPTIMIZER), "record", "a record", e))?;
    write(OPTIMIZER, &bytes)?;
    remove(&old)?;
    if folder.exists() {
        fs::rename(folder, &old).map_err(Error::io(folder))?;
    }
    fs::rename(&fresh, folder).map_err(Error::io(folder))?;
    remove(&old)
}

fn tensors(path: &Path, parameters: &BTreeMap<String, Parameter>) -> Result<Vec<u8>> {
    let ids: BTreeMap<&str, u64> = parameters.iter().map(|(name, p)| (name.as_str(), p.id)).collect();
    let ids = serde_json::to_string(&ids).map_err(|error| wrong(path, IDS, "JSON", error))?;
    let bytes: Vec<Vec<u8>> = parameters
        .values()
        .map(|p| p.values.iter().flat_map(|value| value.to_le_bytes()).collect())
        .collect();
    let views = parameters
        .iter()
        .zip(&bytes)
        .map(|((name, p), bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, p.shape.clone(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| wrong(path, "tensors", "consistent shapes", error))?;
    safetensors::serialize(views, Some(HashMap::from([(IDS.to_string(), ids)])))
        .map_err(|error| wrong(path, "tensors", "a safetensors file", error))
}

/// The folder, or what an interrupted save left in its stead.
fn find(folder: &Path) -> PathBuf {
    let old = sibling(folder, ".old");
    if !folder.exists() && old.exists() { old } else { folder.to_path_buf() }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io(path))
}

/// Reads a checkpoint and checks it against the run that is to go on.
pub(crate) fn load(folder: &Path, run: &Run<'_>) -> Result<Saved> {
    let folder = find(folder);
    let path = folder.join(STATE);
    let json: serde_json::Value =
        serde_json::from_slice(&read(&path)?).map_err(|error| wrong(&path, "file", "JSON", error))?;
    if json["version"] != VERSION {
        return Err(wrong(&path, "version", VERSION, &json["version"]));
    }
    let state: State =
        serde_json::from_value(json).map_err(|error| wrong(&path, "state", "a checkpoint's state", error))?;
    same_config(&path, run.config, &state)?;
    if state.data != run.data {
        return Err(wrong(&path, "data", format!("the data set {}", run.data), &state.data));
    }
    for (name, expected) in run.identity {
        if let Some(found) = state.model.get(name).filter(|found| *found != expected) {
            return Err(wrong(&path, &format!("model.{name}"), expected, found));
        }
    }
    let parameters = parameters(&folder.join(TENSORS), run.fresh)?;
    Ok(Saved { state, parameters })
}

/// Names the first option that differs. More steps are no difference where no learning rate depends on their number.
fn same_config(path: &Path, expected: &TrainerConfig, state: &State) -> Result<()> {
    let mut found = state.config.clone();
    if found.steps != expected.steps {
        if found.schedule != ScheduleKind::Constant {
            let expected = format!("{}, since the schedule depends on it", expected.steps);
            return Err(wrong(path, "config.steps", expected, found.steps));
        }
        if state.step > expected.steps {
            let expected = format!("at most {}, the steps of this run", expected.steps);
            return Err(wrong(path, "step", expected, state.step));
        }
        found.steps = expected.steps;
    }
    let json = |config: &TrainerConfig| {
        serde_json::to_value(config).map_err(|error| wrong(path, "config", "serialisable options", error))
    };
    let (expected, found) = (json(expected)?, json(&found)?);
    let Some(expected) = expected.as_object() else { return Ok(()) };
    for (key, expected) in expected {
        if *expected != found[key] {
            return Err(wrong(path, &format!("config.{key}"), expected, &found[key]));
        }
    }
    Ok(())
}

fn parameters(path: &Path, fresh: &BTreeMap<String, Parameter>) -> Result<BTreeMap<String, Parameter>> {
    let bytes = read(path)?;
    let not_safetensors = |error| wrong(path, "header", "a safetensors file", error);
    let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(not_safetensors)?;
    let ids = metadata.metadata().as_ref().and_then(|entries| entries.get(IDS));
    let ids = ids.ok_or_else(|| wrong(path, IDS, "ids of all tensors", "none"))?;
    let ids: BTreeMap<String, u64> =
        serde_json::from_str(ids).map_err(|error| wrong(path, IDS, "a map from names to ids", error))?;
    let file = SafeTensors::deserialize(&bytes).map_err(not_safetensors)?;
    // Earlier versions wrote variants of enums into the names.
    let stored: BTreeMap<String, &str> = file
        .names()
        .into_iter()
        .map(|name| (trainable::stable_name(&name.split('.').collect::<Vec<_>>()), name))
        .collect();
    if let Some((_, name)) = stored.iter().find(|(name, _)| !fresh.contains_key(*name)) {
        return Err(wrong(path, name, "only tensors that this model trains", "this one"));
    }
    fresh
        .iter()
        .map(|(name, expected)| {
            let missing = || wrong(path, name, "a tensor", "none");
            let in_file = *stored.get(name).ok_or_else(missing)?;
            let view = file.tensor(in_file).map_err(|_| missing())?;
            let found = format!("{:?} {:?}", view.dtype(), view.shape());
            let wanted = format!("{:?} {:?}", Dtype::F32, expected.shape);
            if found != wanted {
                return Err(wrong(path, name, wanted, found));
            }
            let id = *ids.get(in_file).ok_or_else(|| wrong(path, IDS, format!("an id of {name}"), "none"))?;
            let values: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
                .collect();
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                return Err(wrong(path, name, "finite values", value));
            }
            Ok((name.clone(), Parameter { id, shape: expected.shape.clone(), values }))
        })
        .collect()
}

/// Reads the optimizer's averages into `optimizer`.
pub(crate) fn load_optimizer(folder: &Path, optimizer: ModuleOptimizer) -> Result<ModuleOptimizer> {
    let path = find(folder).join(OPTIMIZER);
    let bytes = burn::tensor::Bytes::from_bytes_vec(read(&path)?);
    // Burn panics on a record without parameter ids; a damaged file must be an error.
    let loaded = std::panic::catch_unwind(AssertUnwindSafe(|| optimizer.from_bytes(bytes)));
    let refused = |found: String| wrong(&path, "record", "an optimizer's record", found);
    loaded
        .map_err(|_| refused("one that Burn can't read".into()))?
        .map_err(|error| refused(error.to_string()))
}
