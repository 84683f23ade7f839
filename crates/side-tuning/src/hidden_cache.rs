//! The backbone's states on disk: they never change, so that one run of the backbone serves all epochs.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use burn::tensor::{Device, Tensor, TensorData};
use kiln_models::{Context, fingerprint};
use kiln_quant_core::{
    hash::hex,
    ints_to_host,
    safetensors_file::{NewTensor, SafetensorsFile, Values, write_safetensors},
    to_host,
};
use sha2::{Digest, Sha256};

use crate::{Backbone, Error, Result, SideTuned};

/// Changes with the layout of the files.
const VERSION: &str = "1";
/// The backbone's last state, where the states themselves aren't stored.
const TOP: &str = "top";

/// In what type states are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StatePrecision {
    /// Exactly.
    F32,
    /// Rounded, in half the space. States with outliers beyond 65504 become infinite.
    F16,
    /// Rounded, in half the space.
    Bf16,
}

impl StatePrecision {
    fn bytes(self) -> u64 {
        if self == Self::F32 { 4 } else { 2 }
    }

    fn values(self, values: &[f32]) -> Values<'_> {
        match self {
            Self::F32 => Values::F32(values),
            Self::F16 => Values::F16(values),
            Self::Bf16 => Values::Bf16(values),
        }
    }
}

/// How a [`HiddenCache`] fared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HiddenCacheReport {
    /// Passes that were served from the disk.
    pub hits: u64,
    /// Passes that ran the backbone.
    pub misses: u64,
    /// Bytes of the folder's files.
    pub bytes: u64,
    /// The last file that couldn't be read or written. It costs time, not correctness.
    pub problem: Option<String>,
}

/// States of a backbone, a file a row of tokens, in a folder that may serve several runs and several backbones.
///
/// A file is named by the SHA-256 of the backbone's [`fingerprint`], the kind of features, and the row's ids, positions
/// and segments. It holds what the side network reads: `(blocks + 1) * width` values a token, pooled ones where the
/// downsampling is a pool. Nothing more is written once the folder holds `limit_bytes`; nothing is ever deleted.
#[derive(Debug)]
pub struct HiddenCache {
    folder: PathBuf,
    limit_bytes: u64,
    precision: StatePrecision,
    /// What every key begins with.
    prefix: String,
    /// Values of a token in a state, and in the last one if it is stored apart.
    widths: [usize; 2],
    report: Mutex<HiddenCacheReport>,
}

/// Rows of a batch, with the names of the files that they should have.
pub(crate) struct Missing(Vec<(usize, String)>);

/// What a cache knows of a batch.
pub(crate) enum Lookup {
    Stored(StoredRows),
    Missing(Missing),
}

impl HiddenCache {
    /// A cache in `folder`, which is created if missing, for the backbone and the downsampling of `model`.
    ///
    /// # Errors
    /// The operating system's refusal; rotary positions with dynamic scaling, under which a row's states depend on the
    /// other rows of the batch.
    pub fn open<M: Backbone>(
        model: &SideTuned<M>,
        folder: impl Into<PathBuf>,
        limit_bytes: u64,
        precision: StatePrecision,
    ) -> Result<Self> {
        use kiln_models::config::RopeScaling;
        let (folder, backbone, config) = (folder.into(), model.backbone().model_config(), model.config());
        if backbone.rope.iter().any(|rope| matches!(rope.scaling, RopeScaling::Dynamic { .. })) {
            return Err(Error::argument("rope_scaling", "one that doesn't depend on the batch", "dynamic"));
        }
        fs::create_dir_all(&folder).map_err(Error::io(&folder))?;
        let mut bytes = 0;
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder))? {
            bytes += entry.and_then(|entry| entry.metadata()).map_err(Error::io(&folder))?.len();
        }
        let width = backbone.hidden_size;
        let pooled = config.downsample.is_pool();
        let top = if pooled { width } else { 0 };
        let kind =
            if pooled { format!("{:?}{}", config.downsample, config.reduction) } else { "states".into() };
        let prefix = format!("{VERSION} {kind} {precision:?} {}\n", fingerprint(model.backbone())?);
        let widths = [if pooled { model.side.width() } else { width }, top];
        let report = Mutex::new(HiddenCacheReport { bytes, ..Default::default() });
        Ok(Self { folder, limit_bytes, precision, prefix, widths, report })
    }

    /// How it fared so far.
    pub fn report(&self) -> HiddenCacheReport {
        self.with_report(|report| report.clone())
    }

    fn with_report<T>(&self, f: impl FnOnce(&mut HiddenCacheReport) -> T) -> T {
        // Counters are right whatever another thread was doing when it panicked.
        f(&mut self.report.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(format!("{key}.safetensors"))
    }

    fn keys(&self, context: &Context) -> Result<Vec<String>> {
        let (length, segments) = (context.length(), context.segments());
        let ids = ints_to_host("ids", context.ids.clone())?;
        let positions = ints_to_host("positions", context.positions.clone())?;
        let rows = ids.chunks(length).zip(positions.chunks(length)).zip(segments.chunks(length));
        let key = |((ids, positions), segments): ((&[i64], &[i64]), &[u32])| {
            let mut sha = Sha256::new();
            sha.update(&self.prefix);
            sha.update((length as u64).to_le_bytes());
            for values in [ids, positions] {
                values.iter().for_each(|value| sha.update(value.to_le_bytes()));
            }
            segments.iter().for_each(|segment| sha.update(segment.to_le_bytes()));
            hex(sha.finalize())
        };
        Ok(rows.map(key).collect())
    }

    pub(crate) fn look_up(&self, context: &Context, blocks: usize) -> Lookup {
        let keys = match self.keys(context) {
            Ok(keys) => keys,
            Err(error) => {
                self.with_report(|report| report.problem = Some(error.to_string()));
                return Lookup::Missing(Missing(Vec::new()));
            }
        };
        let (mut files, mut missing) = (Vec::new(), Vec::new());
        for (row, key) in keys.into_iter().enumerate() {
            match self.open_row(&key, context.length(), blocks) {
                Some(file) => files.push(file),
                None => missing.push((row, key)),
            }
        }
        if missing.is_empty() {
            self.with_report(|report| report.hits += 1);
            let ([width, top], length) = (self.widths, context.length());
            Lookup::Stored(StoredRows { files, length, width, top, blocks })
        } else {
            self.with_report(|report| report.misses += 1);
            Lookup::Missing(Missing(missing))
        }
    }

    /// The row's file, if there is one that holds what it should.
    fn open_row(&self, key: &str, length: usize, blocks: usize) -> Option<SafetensorsFile> {
        let path = self.path(key);
        if !path.exists() {
            return None;
        }
        let shapes = (0..=blocks).map(|state| (state.to_string(), self.widths[0]));
        let top = (self.widths[1] > 0).then(|| (TOP.to_string(), self.widths[1]));
        let checked = SafetensorsFile::open(&path).map_err(Error::from).and_then(|file| {
            for (name, width) in shapes.chain(top) {
                let found = file.describe(&name)?.1.to_vec();
                if found != [length, width] {
                    return Err(Error::file(
                        &path,
                        &name,
                        format!("{:?}", [length, width]),
                        format!("{found:?}"),
                    ));
                }
            }
            Ok(file)
        });
        match checked {
            Ok(file) => Some(file),
            Err(error) => {
                self.with_report(|report| report.problem = Some(error.to_string()));
                None
            }
        }
    }

    /// Writes the rows that aren't there, as long as there is room.
    pub(crate) fn store(&self, missing: &Missing, states: Vec<Tensor<3>>, top: &Tensor<3>) {
        for (row, key) in &missing.0 {
            if let Err(error) = self.store_row(key, *row, &states, top) {
                tracing::warn!(%error, "states were not cached");
                self.with_report(|report| report.problem = Some(error.to_string()));
                return;
            }
        }
    }

    fn store_row(&self, key: &str, row: usize, states: &[Tensor<3>], top: &Tensor<3>) -> Result<()> {
        let apart = (self.widths[1] > 0).then(|| (TOP.to_string(), top));
        let named = states.iter().enumerate().map(|(state, tensor)| (state.to_string(), tensor)).chain(apart);
        let parts = named
            .map(|(name, tensor)| {
                let values = to_host(&name, tensor.clone().inner().narrow(0, row, 1))?;
                Ok((name, tensor.dims(), values))
            })
            .collect::<Result<Vec<_>>>()?;
        let bytes =
            parts.iter().map(|(_, _, values)| values.len() as u64).sum::<u64>() * self.precision.bytes();
        let reserved = self.with_report(|report| {
            let total = report.bytes.saturating_add(bytes);
            (total <= self.limit_bytes).then(|| report.bytes = total).is_some()
        });
        if !reserved {
            return Ok(());
        }
        let tensors: Vec<NewTensor<'_>> = parts
            .iter()
            .map(|(name, [_, length, width], values)| NewTensor {
                name: name.clone(),
                shape: vec![*length, *width],
                values: self.precision.values(values),
            })
            .collect();
        Ok(write_safetensors(&self.path(key), &tensors, &BTreeMap::new())?)
    }
}

/// Open files of all rows of a batch; states are read one at a time.
pub(crate) struct StoredRows {
    files: Vec<SafetensorsFile>,
    length: usize,
    width: usize,
    top: usize,
    blocks: usize,
}

impl StoredRows {
    /// Features of state `state`, `[batch, length, width]`.
    pub(crate) fn state(&self, state: usize, device: &Device) -> Result<Tensor<3>> {
        self.read(&state.to_string(), self.width, device)
    }

    /// The backbone's last state.
    pub(crate) fn top(&self, device: &Device) -> Result<Tensor<3>> {
        if self.top > 0 { self.read(TOP, self.top, device) } else { self.state(self.blocks, device) }
    }

    fn read(&self, name: &str, width: usize, device: &Device) -> Result<Tensor<3>> {
        let mut values = Vec::with_capacity(self.files.len() * self.length * width);
        for file in &self.files {
            values.extend(file.read_f32(name)?.1);
        }
        Ok(Tensor::from_data(TensorData::new(values, [self.files.len(), self.length, width]), device))
    }
}
