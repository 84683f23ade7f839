//! What an interrupted calibration leaves, and how it goes on.
//!
//! `block-00003.safetensors` is a [`PackedFile`] of the block's packed weights with their biases, LoRA factors
//! (`<path>.lora_a`, `<path>.lora_b`, as in memory) and norms, with the run's fingerprint, those of the original
//! projections and norms and of all dense values, and the block's report in its metadata. `streams.bin` is a line of JSON
//! and the two residual streams before the next block, as f32. It is replaced after the block's file was written, so it
//! alone says how far the run came.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::{
    module::Param,
    tensor::{Device, Tensor},
};
use kiln_adapters::Lora;
use kiln_quant_core::{
    PackedWeight, QuantLinear, Scheme, files::OutputFolder, hash::Fnv1a, packed_file::PackedFile, to_host,
    write_atomically,
};
use serde::{Deserialize, Serialize};

use crate::{
    BlockReport, Error, Result,
    block::Place,
    station::Slot,
    stream::{Store, Stream},
    values::tensor,
};

const RUN_KEY: &str = "calibration.run";
const REPORT_KEY: &str = "calibration.report";
/// Longest header line of `streams.bin`.
const MAX_HEADER: u64 = 1 << 12;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    run: String,
    /// Blocks that are finished.
    blocks: usize,
    windows: usize,
    rows: usize,
    width: usize,
    /// Fingerprint of the streams.
    streams: String,
}

fn original_key(path: &str) -> String {
    format!("calibration.original.{path}")
}

fn bias_name(path: &str) -> String {
    format!("{path}.bias")
}

fn dense_key(name: &str) -> String {
    format!("calibration.dense.{name}")
}

fn of_streams(streams: [&Stream; 2]) -> Result<String> {
    let mut hash = Fnv1a::default();
    for stream in streams {
        for window in 0..stream.len() {
            hash.update_values(&stream.get(window)?);
        }
    }
    Ok(hash.text())
}

pub(crate) fn fingerprint(values: &[f32]) -> String {
    let mut hash = Fnv1a::default();
    hash.update_values(values);
    hash.text()
}

/// A norm's parameter in host memory.
pub(crate) struct Norm {
    /// Its name in the checkpoint.
    pub(crate) name: String,
    pub(crate) values: Vec<f32>,
}

/// The folder of one run.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    /// This run's alone.
    claimed: Arc<OutputFolder>,
    run: String,
}

/// The two streams before the next block, and how many are finished.
pub(crate) struct Resumed {
    pub(crate) blocks: usize,
    pub(crate) streams: [Stream; 2],
}

impl Folder {
    /// `run` tells this run's results from others'.
    pub(crate) fn new(path: &Path, run: String) -> Result<Self> {
        Ok(Self { claimed: Arc::new(OutputFolder::claim(path)?), run })
    }

    /// What tells this run's results from others'.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// The file of a finished block.
    pub(crate) fn block(&self, index: usize) -> PathBuf {
        self.claimed.path().join(format!("block-{index:05}.safetensors"))
    }

    fn streams(&self) -> PathBuf {
        self.claimed.path().join("streams.bin")
    }

    /// Saves a finished block, then the streams behind it.
    pub(crate) fn save(
        &self,
        slots: &[(String, Slot)],
        norms: &[Norm],
        originals: &[(String, String)],
        report: &BlockReport,
        streams: [&Stream; 2],
    ) -> Result<()> {
        let report_text = serde_json::to_string(report).expect("a report of numbers and names");
        let mut metadata =
            BTreeMap::from([(RUN_KEY.into(), self.run.clone()), (REPORT_KEY.into(), report_text)]);
        metadata.extend(originals.iter().map(|(path, hash)| (original_key(path), hash.clone())));
        let slots = slots.iter().map(|(path, slot)| (path.as_str(), slot));
        SavedSlots::save(&self.block(report.index), slots, norms, metadata)?;
        self.save_streams(report.index + 1, streams)
    }

    fn save_streams(&self, blocks: usize, streams: [&Stream; 2]) -> Result<()> {
        let (path, [rows, width]) = (self.streams(), streams[0].shape());
        let (run, windows, streams_hash) = (self.run.clone(), streams[0].len(), of_streams(streams)?);
        let header = Header { run, blocks, windows, rows, width, streams: streams_hash };
        let header = serde_json::to_string(&header).expect("a header of numbers and names");
        let mut failed = None;
        let written = write_atomically(&path, |file| {
            writeln!(file, "{header}")?;
            for stream in streams {
                if let Err(error) = stream.write(file, &path) {
                    failed = Some(error);
                    return Err(std::io::ErrorKind::Other.into());
                }
            }
            Ok(())
        });
        match failed {
            // The reason, rather than that writing was given up.
            Some(error) => Err(error),
            None => Ok(written?),
        }
    }

    /// The streams of an interrupted run; `None` if there is none yet.
    pub(crate) fn resume(&self, store: &Store, windows: usize, shape: [usize; 2]) -> Result<Option<Resumed>> {
        let path = self.streams();
        let file = match File::open(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(Error::io(&path))?,
        };
        let length = file.metadata().map_err(Error::io(&path))?.len();
        let mut file = BufReader::new(file);
        let mut line = String::new();
        let read = (&mut file).take(MAX_HEADER).read_line(&mut line).map_err(Error::io(&path))?;
        let wrong = |field: &str, expected: String, found: String| Error::File {
            path: path.clone(),
            field: field.into(),
            expected,
            found,
        };
        let header: Header = serde_json::from_str(&line)
            .map_err(|error| wrong("header", "a line of JSON".into(), error.to_string()))?;
        let expected =
            Header { run: self.run.clone(), windows, rows: shape[0], width: shape[1], ..header.clone() };
        if header != expected {
            let same = "this run's: the same model, windows, adapters and options".to_string();
            return Err(wrong("header", same, format!("another run's, {}", line.trim_end())));
        }
        let values = 2 * windows * shape[0] * shape[1] * 4;
        if length != (read + values) as u64 {
            return Err(wrong("length", format!("{} bytes", read + values), length.to_string()));
        }
        let x = Stream::read(store, shape, windows, &mut file, &path)?;
        let quantized = Stream::read(store, shape, windows, &mut file, &path)?;
        let found = of_streams([&x, &quantized])?;
        if found != header.streams {
            return Err(wrong("streams", format!("fingerprint {}", header.streams), found));
        }
        Ok(Some(Resumed { blocks: header.blocks, streams: [x, quantized] }))
    }
}

/// Solved projections in a file: those of a finished block with its norms, or some on their way to another rank.
pub(crate) struct SavedSlots {
    path: PathBuf,
    file: PackedFile,
}

impl SavedSlots {
    /// Writes packed weights with their biases, factors and norms.
    pub(crate) fn save<'s>(
        to: &Path,
        slots: impl IntoIterator<Item = (&'s str, &'s Slot)>,
        norms: &[Norm],
        mut metadata: BTreeMap<String, String>,
    ) -> Result<()> {
        let mut packed: Vec<(&str, PackedWeight)> = Vec::new();
        let mut dense: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
        for (path, slot) in slots {
            if let QuantLinear::Packed(linear) = &slot.base {
                packed.push((path, linear.weight.to_host()?));
                if let Some(bias) = &linear.bias {
                    dense.push((bias_name(path), bias.val().dims().into(), to_host(path, bias.val())?));
                }
            }
            if let Some(lora) = &slot.adapter {
                for (name, factor) in [("lora_a", &lora.lora_a), ("lora_b", &lora.lora_b)] {
                    let values = to_host(path, factor.val())?;
                    dense.push((format!("{path}.{name}"), factor.val().dims().into(), values));
                }
            }
        }
        dense.extend(
            norms.iter().map(|norm| (norm.name.clone(), vec![norm.values.len()], norm.values.clone())),
        );
        metadata.extend(dense.iter().map(|(name, _, values)| (dense_key(name), fingerprint(values))));
        PackedFile::save(
            to,
            packed.iter().map(|(path, weight)| (*path, weight)),
            dense.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..])),
            &metadata,
        )?;
        Ok(())
    }

    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = PackedFile::open(path)?;
        file.verify()?;
        Ok(Self { path: path.into(), file })
    }

    /// What a finished block's file says of it, if it is of `run`, where that is known.
    pub(crate) fn report(&self, run: Option<&str>) -> Result<BlockReport> {
        let metadata = |key: &str| self.file.metadata().get(key).map_or("", String::as_str);
        let wrong = |field: &str, expected: &str, found: String| Error::File {
            path: self.path.clone(),
            field: field.into(),
            expected: expected.into(),
            found,
        };
        if run.is_some_and(|run| run != metadata(RUN_KEY)) {
            return Err(wrong(RUN_KEY, "this run's", format!("{:?}", metadata(RUN_KEY))));
        }
        serde_json::from_str(metadata(REPORT_KEY))
            .map_err(|error| wrong(REPORT_KEY, "the block's report", error.to_string()))
    }

    /// What stands in a projection's slot.
    pub(crate) fn slot(&self, place: &Place, device: &Device) -> Result<Slot> {
        if place.scheme == Scheme::Dense {
            return Ok(place.dense());
        }
        let adapter = place.adapter.clone().map(|lora| self.factors(&place.path, lora)).transpose()?;
        Ok(place.packed(&self.packed(&place.path, place.shape)?, adapter, device))
    }

    /// The packed weight of a projection of the given shape `[d_input, d_output]`.
    fn packed(&self, path: &str, shape: [usize; 2]) -> Result<PackedWeight> {
        let packed = self.file.packed(path)?;
        let found = [packed.d_input, packed.d_output];
        if found == shape {
            Ok(packed)
        } else {
            Err(self.wrong(path, format!("{shape:?}"), format!("{found:?}")))
        }
    }

    /// Fails unless the block was made from this original projection or norm.
    pub(crate) fn check_original(&self, path: &str, found: &str) -> Result<()> {
        match self.file.metadata().get(&original_key(path)) {
            Some(expected) if expected == found => Ok(()),
            expected => Err(Error::File {
                path: self.path.clone(),
                field: original_key(path),
                expected: format!("{found}, the model's"),
                found: format!("{expected:?}"),
            }),
        }
    }

    /// `lora` with the factors of a projection.
    fn factors(&self, path: &str, mut lora: Lora) -> Result<Lora> {
        for (name, factor) in [("lora_a", &mut lora.lora_a), ("lora_b", &mut lora.lora_b)] {
            let current = factor.val();
            let values = self.dense(&format!("{path}.{name}"), &current.dims())?;
            *factor =
                Param::from_tensor(tensor(values, current.dims(), &current.device().without_autodiff()));
        }
        Ok(lora)
    }

    /// `bias` with the values of a projection's.
    pub(crate) fn bias(&self, path: &str, bias: Param<Tensor<1>>) -> Result<Param<Tensor<1>>> {
        let current = bias.val();
        let values = self.dense(&bias_name(path), &current.dims())?;
        Ok(bias.map(|old| tensor(values, old.dims(), &current.device())))
    }

    /// The values of a norm of the given width.
    pub(crate) fn norm(&self, name: &str, width: usize) -> Result<Vec<f32>> {
        self.dense(name, &[width])
    }

    fn dense(&self, name: &str, expected: &[usize]) -> Result<Vec<f32>> {
        let (shape, values) = self.file.dense(name)?;
        if shape != expected {
            return Err(self.wrong(name, format!("{expected:?}"), format!("{shape:?}")));
        }
        let (stored, found) = (self.file.metadata().get(&dense_key(name)), fingerprint(&values));
        if stored == Some(&found) {
            return Ok(values);
        }
        Err(Error::File {
            path: self.path.clone(),
            field: name.into(),
            expected: format!("fingerprint {stored:?}"),
            found,
        })
    }

    fn wrong(&self, field: &str, expected: String, found: String) -> Error {
        Error::File {
            path: self.path.clone(),
            field: field.into(),
            expected: format!("shape {expected}, as in the model"),
            found,
        }
    }
}
