//! A run on disk: `state.json`, `trainable.safetensors`, `optimizer.bpk`, in a folder that changes as a whole. The state
//! holds SHA-256 hashes of the other two and of itself.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
};

use burn::{optim::OptimizerRecord, tensor::Bytes};
use burn_pack::Reader;
use kiln_distributed::{Communicator, agreed};
use kiln_quant_core::{
    files::{NewFolder, whole_folder, write_atomically},
    hash::hex,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::{
    Cursor, Error, OptimizerKind, Result, ScheduleKind, TrainerConfig, optim::Optimizers, ranks::by_first,
    trainable::Parameter,
};

/// Version of the folder's layout.
pub(crate) const VERSION: u32 = 2;

const STATE: &str = "state.json";
const TENSORS: &str = "trainable.safetensors";
const OPTIMIZER: &str = "optimizer.bpk";

/// The record of a part of the optimizers: of the parameters in no group, or of a group.
fn optimizer_file(part: usize) -> String {
    match part {
        0 => OPTIMIZER.into(),
        group => format!("optimizer-{group}.bpk"),
    }
}
/// Metadata key of the parameters' ids in [`TENSORS`].
const IDS: &str = "kiln.parameter_ids";

/// Key of the rows' longest length in what must be the same.
pub(crate) const SEQ_LEN: &str = "seq_len";

/// Key of the state's own hash in [`STATE`].
const DIGEST: &str = "digest";

/// Everything that isn't a tensor.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub version: u32,
    pub step: u64,
    /// Steps that were passed over.
    pub skipped: u64,
    pub best: Option<f64>,
    /// The step of `best`.
    pub best_step: Option<u64>,
    pub cursor: Cursor,
    pub config: TrainerConfig,
    /// Fingerprint of the data set.
    pub data: String,
    /// What the model is besides its trained parameters.
    pub model: BTreeMap<String, String>,
    /// Hashes of the other files, by name.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
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
    whole_folder(folder).join(STATE).is_file()
}

/// The checkpoint in `folder` and that in `best` beside it, as rank 0 has them, in a folder of their own, under the names
/// `last` and `best`; none at rank 0 itself.
pub(crate) fn from_first(ranks: &dyn Communicator, folder: &Path) -> Result<Option<TempDir>> {
    if ranks.size() == 1 {
        return Ok(None);
    }
    let files = by_first(ranks, || {
        let mut files = Vec::new();
        for (name, folder) in [("last", folder), ("best", &folder.with_file_name("best"))] {
            files.extend(own_files(folder)?.into_iter().map(|path| (name, path)));
        }
        Ok(files)
    })?;
    let is_first = files.is_some();
    let files = files.unwrap_or_default();
    let base = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let names: Vec<String> = files.iter().map(|(name, path)| format!("{name}/{}", base(path))).collect();
    let names = ranks.broadcast(names.join("\n").into_bytes())?;
    let copy = match is_first {
        true => Ok(None),
        false => tempfile::tempdir().map(Some).map_err(Error::io("a temporary folder")),
    };
    let copy = agreed(ranks, copy)?;
    for (index, name) in String::from_utf8_lossy(&names).lines().enumerate() {
        let read = by_first(ranks, || fs::read(&files[index].1).map_err(Error::io(&files[index].1)))?;
        let bytes = ranks.broadcast(read.unwrap_or_default())?;
        let write = |copy: &TempDir| {
            let Some((place, file)) =
                name.split_once('/').filter(|(place, file)| is_place(place) && is_own(file))
            else {
                return Err(wrong(folder, name, "a file of a checkpoint", "another"));
            };
            let folder = copy.path().join(place);
            fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
            let path = folder.join(file);
            fs::write(&path, &bytes).map_err(Error::io(&path))
        };
        agreed(ranks, copy.as_ref().map_or(Ok(()), write))?;
    }
    Ok(copy)
}

fn is_place(name: &str) -> bool {
    ["last", "best"].contains(&name)
}

/// Whether a file in a checkpoint's folder is the checkpoint's.
fn is_own(name: &str) -> bool {
    let part = name.strip_prefix("optimizer").and_then(|rest| rest.strip_suffix(".bpk"));
    let is_part = |part: &str| {
        part.is_empty()
            || part.strip_prefix('-').is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    name == STATE || name == TENSORS || part.is_some_and(is_part)
}

/// The files of the checkpoint in `folder`, none if there is none.
fn own_files(folder: &Path) -> Result<Vec<PathBuf>> {
    if !exists(folder) {
        return Ok(Vec::new());
    }
    let folder = whole_folder(folder);
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let path = entry.map_err(Error::io(&folder))?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(is_own) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Deletes a checkpoint: its own files, and the folder, if nothing else is in it. The state goes first, without which there
/// is no checkpoint.
pub(crate) fn delete(folder: &Path) -> Result<()> {
    let remove = |path: &Path| fs::remove_file(path).map_err(Error::io(path));
    remove(&folder.join(STATE))?;
    let mut others = false;
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        match path.file_name().and_then(|name| name.to_str()) {
            Some(name) if is_own(name) => remove(&path)?,
            _ => others = true,
        }
    }
    if others { Ok(()) } else { fs::remove_dir(folder).map_err(Error::io(folder)) }
}

/// A checkpoint that fits the run.
pub(crate) struct Saved {
    pub state: State,
    pub parameters: BTreeMap<String, Parameter>,
}

fn wrong(path: &Path, field: &str, expected: impl ToString, found: impl ToString) -> Error {
    Error::File {
        path: path.to_path_buf(),
        field: field.into(),
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

/// Writes a checkpoint. What can't be loaded again, which is what isn't finite, isn't saved.
pub(crate) fn save(
    folder: &Path,
    mut state: State,
    parameters: &BTreeMap<String, Parameter>,
    optimizers: &Optimizers,
) -> Result<()> {
    for (name, parameter) in parameters {
        if let Some(value) = parameter.values.iter().find(|value| !value.is_finite()) {
            let (step, quantity) = (state.step, format!("the parameter {name}"));
            return Err(Error::Diverged { step, quantity, value: f64::from(*value), checkpoint: None });
        }
    }
    let records: Vec<String> = (0..optimizers.len()).map(optimizer_file).collect();
    let own: Vec<&str> = [STATE, TENSORS].into_iter().chain(records.iter().map(String::as_str)).collect();
    let new = NewFolder::replacing(folder, &own)?;
    let write = |name: &str, bytes: &[u8]| {
        write_atomically(&new.path().join(name), |file| std::io::Write::write_all(file, bytes))
    };
    let tensors = tensors(&folder.join(TENSORS), parameters)?;
    let mut add = |name: &str, bytes: &[u8]| {
        state.files.insert(name.into(), hex(Sha256::digest(bytes)));
        write(name, bytes)
    };
    add(TENSORS, &tensors)?;
    for (part, name) in records.iter().enumerate() {
        let record = optimizers.part(part).into_bytes();
        add(name, &record.map_err(|e| wrong(&folder.join(name), "record", "a record", e))?)?;
    }
    let no_json = |error| wrong(&folder.join(STATE), "state", "JSON", error);
    // As it will read: a number's text is what is hashed.
    let text = serde_json::to_vec(&state).map_err(no_json)?;
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(no_json)?;
    json[DIGEST] = digest(&json).into();
    write(STATE, &serde_json::to_vec_pretty(&json).map_err(no_json)?)?;
    Ok(new.commit()?)
}

/// The hash of a state without its own.
fn digest(json: &serde_json::Value) -> String {
    hex(Sha256::digest(json.to_string()))
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

/// A file of the checkpoint, which must be the one that the state was written with.
fn read(folder: &Path, name: &str, state: &State) -> Result<Vec<u8>> {
    let path = folder.join(name);
    let bytes = fs::read(&path).map_err(Error::io(&path))?;
    let found = hex(Sha256::digest(&bytes));
    match state.files.get(name) {
        Some(expected) if *expected == found => Ok(bytes),
        expected => {
            let expected = expected.map_or("a file that state.json knows", String::as_str);
            Err(wrong(
                &path,
                "SHA-256",
                expected,
                format!("{found}: it was changed, or is of another checkpoint"),
            ))
        }
    }
}

/// Reads a checkpoint and checks it against the run that is to go on.
pub(crate) fn load(folder: &Path, run: &Run<'_>) -> Result<Saved> {
    let folder = whole_folder(folder);
    let path = folder.join(STATE);
    let text = fs::read(&path).map_err(Error::io(&path))?;
    let mut json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| wrong(&path, "file", "JSON", error))?;
    if json["version"] != VERSION {
        return Err(wrong(&path, "version", VERSION, &json["version"]));
    }
    let recorded = json.as_object_mut().and_then(|json| json.remove(DIGEST)).unwrap_or_default();
    if recorded != digest(&json) {
        return Err(wrong(&path, DIGEST, "that of the content", format!("{recorded}: the file was changed")));
    }
    let state: State =
        serde_json::from_value(json).map_err(|error| wrong(&path, "state", "a checkpoint's state", error))?;
    same_config(&path, run.config, &state)?;
    if state.data != run.data {
        return Err(wrong(&path, "data", format!("the data set {}", run.data), &state.data));
    }
    let names: BTreeSet<&String> = run.identity.keys().chain(state.model.keys()).collect();
    for name in names {
        let text = |of: &BTreeMap<String, String>| of.get(name).map_or("nothing", |text| text).to_owned();
        let (expected, found) = (text(run.identity), text(&state.model));
        // Earlier versions didn't record it.
        let is_older = name == SEQ_LEN && !state.model.contains_key(name);
        if expected != found && !is_older {
            return Err(wrong(&path, &format!("model.{name}"), expected, found));
        }
    }
    let bytes = read(&folder, TENSORS, &state)?;
    let parameters = parameters(&folder.join(TENSORS), &bytes, run.fresh)?;
    Ok(Saved { state, parameters })
}

/// Names the first option that differs. More steps are no difference where no learning rate depends on their number.
fn same_config(path: &Path, expected: &TrainerConfig, state: &State) -> Result<()> {
    let mut found = state.config.clone();
    if found.steps != expected.steps {
        let schedules = expected.groups.iter().filter_map(|group| group.schedule);
        if schedules.chain([expected.schedule]).any(ScheduleKind::depends_on_total) {
            let expected = format!("{}, since a schedule depends on it", expected.steps);
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

fn parameters(
    path: &Path,
    bytes: &[u8],
    fresh: &BTreeMap<String, Parameter>,
) -> Result<BTreeMap<String, Parameter>> {
    let not_safetensors = |error| wrong(path, "header", "a safetensors file", error);
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
    let ids = metadata.metadata().as_ref().and_then(|entries| entries.get(IDS));
    let ids = ids.ok_or_else(|| wrong(path, IDS, "ids of all tensors", "none"))?;
    let ids: BTreeMap<String, u64> =
        serde_json::from_str(ids).map_err(|error| wrong(path, IDS, "a map from names to ids", error))?;
    let file = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
    if let Some(name) = file.names().into_iter().find(|name| !fresh.contains_key(*name)) {
        return Err(wrong(path, name, "only tensors that this model trains", "this one"));
    }
    let mut seen = BTreeSet::new();
    if let Some((name, id)) = ids.iter().find(|(_, id)| !seen.insert(**id)) {
        return Err(wrong(path, IDS, format!("an id of its own for {name}"), format!("{id}, another's")));
    }
    fresh
        .iter()
        .map(|(name, expected)| {
            let view = file.tensor(name).map_err(|_| wrong(path, name, "a tensor", "none"))?;
            let found = format!("{:?} {:?}", view.dtype(), view.shape());
            let wanted = format!("{:?} {:?}", Dtype::F32, expected.shape);
            if found != wanted {
                return Err(wrong(path, name, wanted, found));
            }
            let id = *ids.get(name).ok_or_else(|| wrong(path, IDS, format!("an id of {name}"), "none"))?;
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

/// Reads the optimizers' states: those of the saved parameters and no others, in the shapes that `kind` has, where it is
/// known.
pub(crate) fn load_optimizers(
    folder: &Path,
    saved: &Saved,
    kind: Option<OptimizerKind>,
    optimizers: &mut Optimizers,
) -> Result<()> {
    let folder = whole_folder(folder);
    for part in 0..optimizers.len() {
        let name = optimizer_file(part);
        let path = folder.join(&name);
        let bytes = Bytes::from_bytes_vec(read(&folder, &name, &saved.state)?).shared();
        let parameters = saved.parameters.values().filter(|parameter| optimizers.owns(part, parameter.id));
        let shapes: BTreeMap<u64, &[usize]> = parameters.map(|p| (p.id, &p.shape[..])).collect();
        optimizers.try_map_part(part, |optimizer| {
            // A file that fits its hash was written by a save; whoever makes both up must get an error all the same.
            let loaded = std::panic::catch_unwind(AssertUnwindSafe(|| {
                check_states(&path, bytes.clone(), kind, &shapes)?;
                let record = OptimizerRecord::from_bytes(bytes).map_err(|error| unreadable(&path, error))?;
                Ok(optimizer.load_record(record))
            }));
            loaded.unwrap_or_else(|_| Err(unreadable(&path, "one that Burn can't read")))
        })?;
    }
    Ok(())
}

fn unreadable(path: &Path, found: impl ToString) -> Error {
    wrong(path, "record", "an optimizer's record", found)
}

/// A state has the id of a saved parameter, and the type and shape that go with it.
fn check_states(
    path: &Path,
    bytes: Bytes,
    kind: Option<OptimizerKind>,
    shapes: &BTreeMap<u64, &[usize]>,
) -> Result<()> {
    let tensors = Reader::from_bytes(bytes).and_then(Reader::into_tensors);
    for tensor in tensors.map_err(|error| unreadable(path, error))? {
        let shape = tensor.param_id.and_then(|id| shapes.get(&id));
        // After the parameter's id.
        let name = tensor.name.split_once('.').map_or(tensor.name.as_str(), |(_, name)| name);
        let found = format!("{:?} {:?}", tensor.dtype, tensor.shape.as_slice());
        let expected = match (shape, kind) {
            (Some(_), None) => continue,
            (Some(shape), Some(kind)) => kind.state_tensor(name, shape),
            (None, _) => None,
        };
        let expected = expected
            .map_or("a state of a saved parameter".into(), |(dtype, shape)| format!("{dtype:?} {shape:?}"));
        if expected != found {
            return Err(wrong(path, &tensor.name, expected, found));
        }
    }
    Ok(())
}
