//! Side networks on disk: `side_config.json` and `side_model.safetensors`, without the backbone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write,
    path::Path,
};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, TensorData},
};
use kiln_quant_core::{
    HostValues, Parameter,
    files::{NewFolder, whole_folder},
    for_each_parameter,
    hash::sha256_of,
    safetensors_file::{Dtype, NewTensor, SafetensorsFile, Values, write_safetensors},
    write_atomically,
};
use serde::{Deserialize, Serialize};

use kiln_models::fingerprint;

use crate::{Backbone, Error, Result, SideConfig, SideTuned};

/// The configuration's file in a side network's folder.
pub const CONFIG_FILE: &str = "side_config.json";
/// The weights' file in a side network's folder.
pub const WEIGHTS_FILE: &str = "side_model.safetensors";
const VERSION: u32 = 1;

/// What [`CONFIG_FILE`] holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Folder {
    version: u32,
    /// [`fingerprint`] of the backbone.
    backbone: String,
    /// Of a classifier.
    labels: Option<usize>,
    side: SideConfig,
    /// SHA-256 of the file of weights; folders of earlier versions don't have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights_sha256: Option<String>,
}

/// A side network's configuration, read from its folder.
pub(crate) struct Opened {
    pub config: SideConfig,
    pub labels: Option<usize>,
}

fn tensor_name(path: &[String]) -> String {
    // The segments of enum variants say nothing that the configuration doesn't.
    let fields = path.iter().filter(|name| !kiln_quant_core::is_variant(name));
    fields.map(String::as_str).collect::<Vec<_>>().join(".")
}

/// `[rows, columns]` to `[columns, rows]`.
fn transpose(values: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// A parameter's sizes as files have them: matrices `[d_output, d_input]`.
fn stored_shape(parameter: &Parameter) -> Vec<usize> {
    parameter.shape.iter().rev().copied().collect()
}

/// Puts values from a file in a module's parameters.
struct Restore {
    path: Vec<String>,
    values: BTreeMap<String, Vec<f32>>,
}

impl ModuleMapper for Restore {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(mut values) = self.values.remove(&tensor_name(&self.path)) else { return param };
        param.map(|tensor| {
            let shape = tensor.dims();
            if let [rows, columns] = shape[..] {
                values = transpose(&values, [columns, rows]);
            }
            let requires = tensor.is_require_grad();
            let data = TensorData::new(std::mem::take(&mut values), shape);
            Tensor::from_data(data, &tensor.device()).set_require_grad(requires)
        })
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// Writes the trained part `module` of a model with `backbone`.
pub(crate) fn save<B: Module, M: Module>(
    folder: &Path,
    backbone: &B,
    config: &SideConfig,
    labels: Option<usize>,
    module: &M,
) -> Result<()> {
    let mut parts = Vec::new();
    for_each_parameter(module, |parameter| {
        let name = tensor_name(parameter.path);
        let HostValues::Floats(values) = parameter.values()? else {
            return Err(Error::argument(&name, "float values", "whole numbers"));
        };
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::argument(&name, "finite values", value));
        }
        let values = match parameter.shape[..] {
            [rows, columns] => transpose(&values, [rows, columns]),
            _ => values,
        };
        parts.push((name, stored_shape(&parameter), values));
        Ok(())
    })?;
    parts.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<NewTensor<'_>> = parts
        .iter()
        .map(|(name, shape, values)| NewTensor {
            name: name.clone(),
            shape: shape.clone(),
            values: Values::F32(values),
        })
        .collect();
    let new = NewFolder::replacing(folder, &[CONFIG_FILE, WEIGHTS_FILE])?;
    let weights = new.path().join(WEIGHTS_FILE);
    write_safetensors(&weights, &tensors, &BTreeMap::new())?;
    let content = Folder {
        version: VERSION,
        backbone: fingerprint(backbone)?,
        labels,
        side: config.clone(),
        weights_sha256: Some(sha256_of(&weights)?),
    };
    let path = folder.join(CONFIG_FILE);
    let json = serde_json::to_vec_pretty(&content)
        .map_err(|error| Error::file(&path, "content", "serialisable options", error))?;
    write_atomically(&new.path().join(CONFIG_FILE), |file| file.write_all(&json))?;
    Ok(new.commit()?)
}

/// Reads the configuration of a folder, and checks that it belongs to `backbone`.
pub(crate) fn open<B: Module>(folder: &Path, backbone: &B) -> Result<Opened> {
    let path = whole_folder(folder).join(CONFIG_FILE);
    let text = fs::read(&path).map_err(Error::io(&path))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| Error::file(&path, "file", "JSON", error))?;
    let version = json.get("version").unwrap_or(&serde_json::Value::Null);
    if *version != VERSION {
        return Err(Error::file(&path, "version", VERSION.to_string(), version));
    }
    let content: Folder = serde_json::from_value(json)
        .map_err(|error| Error::file(&path, "content", "a side network's configuration", error))?;
    if let Some(expected) = &content.weights_sha256 {
        let found = sha256_of(&whole_folder(folder).join(WEIGHTS_FILE))?;
        if found != *expected {
            let expected = format!("{found}, that of {WEIGHTS_FILE}");
            let found = "another: the weights were changed, or are another network's";
            return Err(Error::file(&path, "weights_sha256", expected, found));
        }
    }
    let found = fingerprint(backbone)?;
    if content.backbone != found {
        let expected = format!("the base that the side network was trained on, {}", content.backbone);
        return Err(Error::file(&path, "backbone", expected, format!("a base with fingerprint {found}")));
    }
    Ok(Opened { config: content.side, labels: content.labels })
}

/// Fills `module`, made by the folder's configuration, with the folder's weights.
pub(crate) fn restore<M: Module>(folder: &Path, module: M) -> Result<M> {
    let file = SafetensorsFile::open(whole_folder(folder).join(WEIGHTS_FILE))?;
    let mut expected = BTreeMap::new();
    for_each_parameter(&module, |parameter| {
        expected.insert(tensor_name(parameter.path), stored_shape(&parameter));
        Ok::<_, Error>(())
    })?;
    let names: BTreeSet<&str> = file.names().collect();
    if let Some(name) = names.iter().find(|name| !expected.contains_key(**name)) {
        return Err(file.wrong(name, "only tensors that the configuration asks for", "this one").into());
    }
    let mut values = BTreeMap::new();
    for (name, shape) in &expected {
        let wanted = format!("F32 {shape:?}");
        if !names.contains(name.as_str()) {
            return Err(file.wrong(name, wanted, "no such tensor").into());
        }
        match file.describe(name)? {
            (Dtype::F32, found) if found == shape => {}
            (dtype, found) => return Err(file.wrong(name, wanted, format!("{dtype} {found:?}")).into()),
        }
        let (_, read) = file.read_f32(name)?;
        if let Some(value) = read.iter().find(|value| !value.is_finite()) {
            return Err(file.wrong(name, "finite values", value.to_string()).into());
        }
        values.insert(name.clone(), read);
    }
    Ok(module.map(&mut Restore { path: Vec::new(), values }))
}

impl<M: Backbone> SideTuned<M> {
    /// Writes the side network alone into `folder`, which is created if missing: `side_config.json` and
    /// `side_model.safetensors`, each whole or not at all.
    ///
    /// Matrices are stored `[d_output, d_input]`, all values as F32. The configuration holds the [`fingerprint`] of the
    /// backbone.
    ///
    /// # Errors
    /// Values that aren't finite; the operating system's refusal.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        save(folder.as_ref(), self.backbone(), self.config(), None, &self.side)
    }

    /// Puts the side network in `folder` beside the backbone that it was trained with.
    ///
    /// # Errors
    /// Files that are missing or damaged, unknown keys, another version, another backbone, or a classifier's folder.
    pub fn load(backbone: M, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let opened = open(folder, &backbone)?;
        if let Some(labels) = opened.labels {
            let path = folder.join(CONFIG_FILE);
            return Err(Error::file(&path, "labels", "none, for a language model", labels));
        }
        let mut model = Self::new(backbone, &opened.config, 0)?;
        model.side = restore(folder, model.side)?;
        Ok(model)
    }
}
