//! Folders of safetensors: filled beside their place, tensor by tensor, and renamed.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    path::Path,
};

use kiln_quant_core::{
    files::NewFolder,
    safetensors_file::{Dtype, TensorPlan, Values, stream_safetensors},
    write_atomically,
};
use serde_json::{Map, Value, json};

use super::{
    FloatType, Format,
    item::{Host, Item, rounded},
    report::{ExportReport, ExportRow, Written, difference},
    tokenizer_files,
};
use crate::{Checkpoint, Error, Result};

/// Writes a JSON file.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text =
        serde_json::to_string_pretty(value).map_err(|error| Error::io(path)(std::io::Error::other(error)))?;
    Ok(write_atomically(path, |file| std::io::Write::write_all(file, text.as_bytes()))?)
}

/// A tensor of a file.
pub(super) struct Part {
    pub name: String,
    pub shape: Vec<usize>,
    pub data: Data,
}

/// The values of a [`Part`].
pub(super) enum Data {
    U8(Vec<u8>),
    U32(Vec<u32>),
    /// The words' bits as signed integers.
    I32(Vec<u32>),
    Float(FloatType, Vec<f32>),
}

impl Data {
    fn dtype(&self) -> Dtype {
        match self {
            Self::U8(_) => Dtype::U8,
            Self::U32(_) => Dtype::U32,
            Self::I32(_) => Dtype::I32,
            Self::Float(float, _) => float.dtype(),
        }
    }

    fn values(&self) -> Values<'_> {
        match self {
            Self::U8(values) => Values::U8(values),
            Self::U32(values) => Values::U32(values),
            Self::I32(values) => Values::I32(values),
            Self::Float(FloatType::F32, values) => Values::F32(values),
            Self::Float(FloatType::F16, values) => Values::F16(values),
            Self::Float(FloatType::Bf16, values) => Values::Bf16(values),
        }
    }
}

/// A tensor of the model as a format holds it.
pub(super) struct Converted {
    pub parts: Vec<Part>,
    /// For the report.
    pub stored: String,
    pub written: Written,
    pub note: Option<String>,
}

impl Converted {
    /// One dense tensor, rounded to `float`.
    pub(crate) fn dense(format: Format, item: &Item, host: &Host, float: FloatType) -> Result<Self> {
        let name = item.name();
        let values = rounded(format, &name, &host.dense(), float)?;
        let part = Part { name, shape: item.shape(), data: Data::Float(float, values.clone()) };
        let stored = float.name().into();
        Ok(Self { parts: vec![part], stored, written: Written::Dense(values), note: None })
    }

    /// [`Self::dense`] for a packed weight that the format can't hold, for `reason`.
    pub(crate) fn fallback(
        format: Format,
        item: &Item,
        host: &Host,
        float: FloatType,
        reason: &Error,
    ) -> Result<Self> {
        let mut converted = Self::dense(format, item, host, float)?;
        converted.note = Some(format!("written dense: {reason}"));
        Ok(converted)
    }
}

/// What is to be written where.
pub(super) struct FolderExport<'a> {
    pub folder: &'a Path,
    /// Where tokenizer files come from.
    pub source: &'a Checkpoint,
    pub items: &'a [Item],
    pub config: Map<String, Value>,
    /// `format` of the files' metadata.
    pub metadata: &'a str,
    pub max_shard_bytes: u64,
    /// Further JSON files.
    pub json: Vec<(&'a str, Value)>,
}

impl FolderExport<'_> {
    /// Writes the folder with the tensors that `convert` makes.
    pub(crate) fn write(self, convert: impl Fn(&Item, &Host) -> Result<Converted>) -> Result<ExportReport> {
        let folder = NewFolder::at_new_place(self.folder)?;
        let mut report =
            ExportReport { path: self.folder.into(), rows: Vec::new(), bytes: 0, notes: Vec::new() };
        let mut plans = Vec::new();
        for item in self.items {
            let host = item.host()?;
            let converted = convert(item, &host)?;
            let plan = plan(&converted.parts);
            let (max_difference, relative_difference) = difference(&host, &converted.written);
            let bytes = plan.iter().map(|tensor| tensor.bytes().unwrap_or(usize::MAX) as u64).sum();
            let (name, stored) = (item.name(), converted.stored);
            report.rows.push(ExportRow { name, stored, bytes, max_difference, relative_difference });
            report.notes.extend(converted.note);
            plans.push((bytes, plan));
        }
        self.write_shards(&folder, plans, &mut report, convert)?;
        write_json(&folder.path().join("config.json"), &Value::Object(self.config))?;
        for (name, value) in &self.json {
            write_json(&folder.path().join(name), value)?;
        }
        report.notes.extend(tokenizer_files::write(self.source, folder.path())?);
        folder.commit()?;
        Ok(report)
    }

    fn write_shards(
        &self,
        folder: &NewFolder,
        plans: Vec<(u64, Vec<TensorPlan>)>,
        report: &mut ExportReport,
        convert: impl Fn(&Item, &Host) -> Result<Converted>,
    ) -> Result<()> {
        let mut shards: Vec<(u64, Vec<(usize, TensorPlan)>)> = Vec::new();
        for (index, (bytes, plan)) in plans.into_iter().enumerate() {
            match shards.last_mut() {
                Some((size, shard)) if *size + bytes <= self.max_shard_bytes => {
                    *size += bytes;
                    shard.extend(plan.into_iter().map(|tensor| (index, tensor)));
                }
                _ => shards.push((bytes, plan.into_iter().map(|tensor| (index, tensor)).collect())),
            }
        }
        let (count, total) = (shards.len(), shards.iter().map(|(bytes, _)| bytes).sum::<u64>());
        let mut weight_map = BTreeMap::new();
        for (number, (_, shard)) in shards.into_iter().enumerate() {
            let file = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let path = folder.path().join(&file);
            let owners: BTreeMap<String, usize> =
                shard.iter().map(|(item, tensor)| (tensor.name.clone(), *item)).collect();
            for name in owners.keys() {
                weight_map.insert(name.clone(), file.clone());
            }
            let plan = shard.into_iter().map(|(_, tensor)| tensor).collect();
            self.write_shard(&path, plan, &owners, &convert)?;
            report.bytes += fs::metadata(&path).map_err(Error::io(&path))?.len();
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
            write_json(&folder.path().join("model.safetensors.index.json"), &index)?;
        }
        Ok(())
    }

    fn write_shard(
        &self,
        path: &Path,
        plan: Vec<TensorPlan>,
        owners: &BTreeMap<String, usize>,
        convert: impl Fn(&Item, &Host) -> Result<Converted>,
    ) -> Result<()> {
        let metadata = BTreeMap::from([("format".to_owned(), self.metadata.to_owned())]);
        // Parts of one tensor often follow each other: the last converted one is kept.
        let mut last: BTreeMap<usize, Vec<Part>> = BTreeMap::new();
        stream_safetensors(path, plan, &metadata, |tensor, put| {
            let index = owners[&tensor.name];
            if !last.contains_key(&index) {
                last.clear();
            }
            let parts = match last.entry(index) {
                Entry::Occupied(entry) => entry.into_mut(),
                Entry::Vacant(entry) => {
                    let item = &self.items[index];
                    entry.insert(convert(item, &item.host()?)?.parts)
                }
            };
            let part = parts.iter().find(|part| part.name == tensor.name);
            part.map_or(Ok(()), |part| put(&part.data.values()))
        })
    }
}

fn plan(parts: &[Part]) -> Vec<TensorPlan> {
    let plan = |part: &Part| TensorPlan {
        name: part.name.clone(),
        dtype: part.data.dtype(),
        shape: part.shape.clone(),
    };
    parts.iter().map(plan).collect()
}
