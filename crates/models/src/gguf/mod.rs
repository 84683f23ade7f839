//! GGUF files: tensors, configuration, tokenizer and chat template from one file.
//!
//! Read are versions 2 and 3 with the architectures that [families](crate::families) name. Tensors
//! of quantized types become packed weights code by code, without requantizing; float types are read as they are. The
//! file isn't mapped: a tensor's bytes are read when it is asked for, some at a time, so that peak memory is the
//! result plus a small buffer.

mod blocks;
pub(crate) mod by_block;
mod config;
mod gemma4;
mod grids;
mod header;
pub(crate) mod layers;
pub(crate) mod names;
mod numbers;
pub(crate) mod parts;
pub(crate) mod qwen3_5;
mod rope;
#[cfg(test)]
pub(crate) mod test_writer;
#[cfg(test)]
mod tests;
mod tokenizer;
mod value;
mod words;
pub(crate) mod writer;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use kiln_quant_core::{PackedWeight, QuantScheme, packing::CodePacker};
use rayon::prelude::*;

pub use self::{
    blocks::BlockType,
    header::TensorInfo,
    value::{Array, Metadata, Value},
};
pub(crate) use self::{
    blocks::{Blocks, Parts},
    rope::llama3_factors,
    tokenizer::{add_tokens, build as build_tokenizer, kind as token_kind, write_spaces},
    words::{Step, WORDS, Words},
};
use self::{
    names::{Heads, Names, RowOrder, Tiles},
    numbers::Numbers,
};
use crate::{
    Error, Result,
    config::{ModelConfig, SpecialTokens},
    families::{ByBlock, Family, FusedRows, VectorRole},
    hf::config::{MAX_EXPERTS, MAX_LAYERS},
    source::{DenseTensor, Described, StoredWeight, TensorSource},
    tokenizer::Tokenizer,
};

/// Bytes of a tensor that are read at a time, rounded to whole rows (whole heads where rows are interleaved).
const CHUNK: usize = 1 << 20;
/// Experts' matrices of a file: more than any model has, few enough to list.
const MOST_SLICES: usize = 1 << 18;
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// An open GGUF file; tensors go by their Hugging Face names.
///
/// ```no_run
/// use kiln_models::{TensorSource, gguf::Gguf};
/// let file = Gguf::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let config = file.config()?;
/// let query = file.weight("model.layers.0.self_attn.q_proj")?;
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    files: Vec<(PathBuf, Mutex<File>)>,
    metadata: Metadata,
    architecture: String,
    names: Names,
    tensors: BTreeMap<String, TensorInfo>,
    rope_factors: Option<TensorInfo>,
    /// Numbers of blocks that keys hold, by the names of the tensors that they are in checkpoints.
    numbers: BTreeMap<String, DenseTensor>,
    /// Blocks that predict tokens beyond the next, which are left out.
    predictors: usize,
}

impl Gguf {
    /// Reads the header of `path`; of a model in several files (`-00001-of-00005.gguf`), the headers of all, whichever of
    /// them `path` is.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::File`] for a header that contradicts itself or the file's size; [`Error::Unsupported`]
    /// for another version, architecture or tensor type, and for a tensor that models of this architecture don't have.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let parts = parts::open(path)?;
        let metadata = parts.metadata;
        let name = metadata.require("general.architecture", metadata.str("general.architecture")?)?;
        let architecture = name.to_owned();
        let experts = metadata.usize(&format!("{name}.expert_count"))?.is_some_and(|count| count > 0);
        let family = Family::by_gguf(name, false, experts)
            .ok_or_else(|| metadata.unsupported_value("general.architecture", &Family::gguf_names()))?;
        let kind = names::kind_of(family, parts.tensors.iter().map(|tensor| tensor.name.as_str()));
        let names = Names { family, kind };
        if metadata.str("general.type")?.is_some_and(|kind| kind != "model") {
            return Err(metadata.unsupported_value("general.type", "model"));
        }
        metadata.str(CHAT_TEMPLATE)?;
        let keys = config::Keys::new(&metadata, &architecture);
        let (blocks, predictors) = match family.gguf.and_then(|gguf| gguf.by_block) {
            Some(ByBlock::Qwen3_5) => {
                let predictors = metadata.usize(&keys.key(qwen3_5::PREDICTORS))?.unwrap_or(0);
                (qwen3_5::layers(&keys)?, predictors)
            }
            _ => (usize::MAX, 0),
        };
        let (mut tensors, mut rope_factors, mut slices) = (BTreeMap::new(), None, 0);
        for mut tensor in parts.tensors {
            if names::block(&tensor.name).is_some_and(|block| block >= blocks) {
                continue;
            }
            if tensor.name == names::ROPE_FACTORS {
                rope_factors = Some(tensor);
            } else if let Some(name) = names.hugging_face(&tensor.name) {
                if let Some(axis) = names.flat_axis(&name).filter(|axis| tensor.shape.len() == axis + 1) {
                    tensor.shape.insert(axis, 1);
                }
                tensors.insert(name, tensor);
            } else if let (&[count, ref one @ ..], 2 | 3) = (tensor.shape.as_slice(), tensor.shape.len())
                && let Some(names) = names.stacked(&tensor.name, count.min(MAX_EXPERTS))
            {
                slices += count;
                if metadata.usize(&format!("{architecture}.expert_count"))? != Some(count)
                    || count > MAX_EXPERTS
                    || slices > MOST_SLICES
                {
                    let expected = format!(
                        "as many matrices as {architecture}.expert_count says, {MAX_EXPERTS} at most, {MOST_SLICES} in a file"
                    );
                    return Err(metadata.error(&tensor.name, &expected, format!("{:?}", tensor.shape)));
                }
                let of_expert = names.first().map_or(1, Vec::len);
                let mut shape = one.to_vec();
                if !shape[0].is_multiple_of(of_expert) {
                    let expected = format!("rows for {of_expert} matrices of each expert");
                    return Err(metadata.error(&tensor.name, &expected, format!("{:?}", tensor.shape)));
                }
                shape[0] /= of_expert;
                let width = shape.last().copied().unwrap_or(0);
                if !width.is_multiple_of(tensor.kind.weights()) {
                    let expected = format!("rows of whole blocks of {}", tensor.kind.name());
                    return Err(metadata.error(&tensor.name, &expected, format!("rows of {width}")));
                }
                let values: usize = shape.iter().product();
                let bytes = (values / tensor.kind.weights() * tensor.kind.bytes()) as u64;
                for (place, name) in (0..).zip(names.into_iter().flatten()) {
                    let start = tensor.start + place * bytes;
                    tensors.insert(name, TensorInfo { shape: shape.clone(), start, ..tensor.clone() });
                }
            } else {
                let supported = format!("tensors of the architecture {architecture}");
                return Err(metadata.unsupported(&tensor.name, "this tensor", &supported));
            }
        }
        let numbers = numbers(&metadata, &architecture, names)?;
        Ok(Self {
            path: path.into(),
            files: parts.files.into_iter().map(|(path, file)| (path, Mutex::new(file))).collect(),
            metadata,
            architecture,
            names,
            tensors,
            rope_factors,
            numbers,
            predictors,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All keys of the header.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Shape and type of the tensor with this Hugging Face name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The model's shape.
    ///
    /// # Errors
    /// [`Error::File`] for a missing or contradictory value, [`Error::Unsupported`] for one that changes the
    /// mathematics in a way that isn't implemented.
    pub fn config(&self) -> Result<ModelConfig> {
        config::read(self)
    }

    /// The keys of the architecture that [`config`](Self::config) doesn't know, for a load report.
    pub fn unknown_keys(&self) -> Vec<&str> {
        config::unknown_keys(self)
    }

    /// Ids with a meaning. Those beyond the vocabulary mean nothing; [`notes`](Self::notes) tells of them.
    ///
    /// # Errors
    /// [`Error::File`] for a key of another type.
    pub fn special_tokens(&self) -> Result<SpecialTokens> {
        tokenizer::special_tokens(&self.metadata, &mut Vec::new())
    }

    /// What was passed over, for a load report.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        // What can't be read at all is an error elsewhere.
        let _ = tokenizer::special_tokens(&self.metadata, &mut notes);
        let of_tables = self.tensors.values().filter(|tensor| tensor.kind.is_of_table());
        let kinds: BTreeSet<&str> = of_tables.clone().map(|tensor| tensor.kind.name()).collect();
        if !kinds.is_empty() {
            let kinds = kinds.into_iter().collect::<Vec<_>>().join(", ");
            notes.push(format!("{} tensors of {kinds} are read to dense values", of_tables.count()));
        }
        if self.predictors > 0 {
            notes.push(format!("{} blocks that predict further tokens were left out", self.predictors));
        }
        notes
    }

    /// Whether the file describes a tokenizer.
    pub(crate) fn has_tokenizer(&self) -> bool {
        self.metadata.get("tokenizer.ggml.tokens").is_some()
    }

    /// The tokenizer, made from the header.
    ///
    /// # Errors
    /// As [`Tokenizer::from_gguf`].
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        Tokenizer::from_gguf(self)
    }

    /// The chat template, if the file has one.
    pub fn chat_template(&self) -> Option<String> {
        match self.metadata.get(CHAT_TEMPLATE) {
            Some(Value::String(template)) => Some(template.clone()),
            _ => None,
        }
    }

    fn find(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| self.metadata.error(name, "a tensor", "no such tensor".into()))
    }

    fn read_at(&self, part: usize, start: u64, bytes: &mut [u8]) -> Result<()> {
        let (path, file) = &self.files[part];
        // A reader that panicked leaves nothing half-done: every read seeks first.
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(bytes));
        read.map_err(Error::io(path))
    }

    /// The tensor as a matrix of rows of whole blocks, with the order of its rows.
    fn rows(&self, name: &str, tensor: &TensorInfo) -> Result<Rows> {
        let order = self.names.order(name);
        let width = match (order, tensor.shape.len()) {
            // The rows of a bias are single values.
            (Some(_), 1) if tensor.kind.weights() == 1 => 1,
            (Some(_), 1) => {
                return Err(self.metadata.unsupported(
                    &tensor.name,
                    tensor.kind.name(),
                    "F32, F16, BF16 for biases",
                ));
            }
            _ => tensor.width(),
        };
        let count = tensor.len() / width;
        let (mut head_dim, mut places) = (None, None);
        match order {
            Some(RowOrder::Interleaved(heads)) => {
                head_dim = Some(self.head_dim(&tensor.name, heads, count)?)
            }
            Some(RowOrder::Concatenated) => places = Some(self.places(&tensor.name, count)?),
            Some(RowOrder::Tiled(tiles)) => {
                let order = self.tiled(&tensor.name, tiles, count)?;
                places = order.map(|order| inverse(&order));
            }
            None => {}
        }
        let bytes = width / tensor.kind.weights() * tensor.kind.bytes();
        Ok(Rows { count, width, bytes, head_dim, places })
    }

    fn head_dim(&self, name: &str, heads: Heads, rows: usize) -> Result<usize> {
        let (query, key) = config::head_counts(&self.metadata, &self.architecture)?;
        let count = match heads {
            Heads::Query => query,
            Heads::Key => key,
        };
        if !rows.is_multiple_of(2 * count) {
            return Err(self.metadata.error(name, &format!("rows for {count} even heads"), rows.to_string()));
        }
        Ok(rows / count)
    }

    /// For each row of a matrix of queries, keys and values its place in the file, where they follow each other.
    fn places(&self, name: &str, rows: usize) -> Result<Vec<usize>> {
        let (heads, groups) = config::head_counts(&self.metadata, &self.architecture)?;
        let all = heads.saturating_add(groups.saturating_mul(2));
        if !rows.is_multiple_of(all) {
            return Err(self.metadata.error(name, &format!("rows for {all} heads"), rows.to_string()));
        }
        Ok(inverse(&FusedRows::Grouped.rows(heads, groups, rows / all).concat()))
    }

    /// The checkpoint's row, or column, for each of `count` in the file, which value heads of delta nets are in.
    fn tiled(&self, name: &str, tiles: Tiles, count: usize) -> Result<Option<Vec<usize>>> {
        let keys = config::Keys::new(&self.metadata, &self.architecture);
        let delta = qwen3_5::delta_net(&keys)?;
        // Before anything of that size is made.
        let expected = qwen3_5::rows(tiles, &delta);
        if expected != count {
            let expected = format!("{expected} for a delta net's heads");
            return Err(self.metadata.error(name, &expected, count.to_string()));
        }
        Ok(qwen3_5::tiled(tiles, &delta))
    }

    /// The checkpoint's column for each column of the file, if they differ.
    fn columns(&self, name: &str, tensor: &TensorInfo) -> Result<Option<Vec<usize>>> {
        match self.names.column_order(name) {
            Some(tiles) => self.tiled(&tensor.name, tiles, tensor.width()),
            None => Ok(None),
        }
    }

    /// Calls `visit` with the index of the first row and the bytes of some rows, for all rows in turn.
    fn for_chunks(
        &self,
        tensor: &TensorInfo,
        rows: &Rows,
        mut visit: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let step = match rows.places {
            Some(_) => rows.count,
            None => (CHUNK / rows.bytes).max(1).next_multiple_of(rows.head_dim.unwrap_or(1)).min(rows.count),
        };
        let mut buffer = Vec::new();
        if buffer.try_reserve_exact(step * rows.bytes).is_err() {
            let found = format!("{:?}", tensor.shape);
            return Err(self.metadata.error(&tensor.name, "rows that fit into memory", found));
        }
        buffer.resize(step * rows.bytes, 0);
        for first in (0..rows.count).step_by(step) {
            let bytes = &mut buffer[..step.min(rows.count - first) * rows.bytes];
            self.read_at(tensor.part, tensor.start + (first * rows.bytes) as u64, bytes)?;
            visit(first, bytes)?;
        }
        Ok(())
    }

    fn decode(&self, name: &str, tensor: &TensorInfo) -> Result<DenseTensor> {
        let rows = self.rows(name, tensor)?;
        let mut values = Vec::new();
        if values.try_reserve_exact(tensor.len()).is_err() {
            let found = format!("{:?}", tensor.shape);
            return Err(self.metadata.error(&tensor.name, "a tensor that fits into memory", found));
        }
        values.resize(tensor.len(), 0.0);
        self.for_chunks(tensor, &rows, |first, bytes| {
            let chunk = &mut values[first * rows.width..][..bytes.len() / rows.bytes * rows.width];
            chunk.par_chunks_exact_mut(rows.width).enumerate().for_each(|(row, values)| {
                tensor.kind.decode(rows.source(bytes, row), values);
            });
            self.check_finite(&tensor.name, chunk)
        })?;
        if self.names.has_one_added(name) {
            values.iter_mut().for_each(|value| *value -= 1.0);
        }
        if let Some(columns) = self.columns(name, tensor)? {
            let mut file = vec![0.0; rows.width];
            for row in values.chunks_exact_mut(rows.width) {
                file.copy_from_slice(row);
                columns.iter().zip(&file).for_each(|(column, value)| row[*column] = *value);
            }
        }
        if self.names.is_less_exponential(name) {
            if let Some(value) = values.iter().find(|value| **value >= 0.0) {
                return Err(self.metadata.error(&tensor.name, "numbers below 0", value.to_string()));
            }
            values.iter_mut().for_each(|value| *value = (-*value).ln());
        }
        Ok(DenseTensor { shape: tensor.shape.clone(), values })
    }

    fn pack(
        &self,
        name: &str,
        tensor: &TensorInfo,
        scheme: QuantScheme,
        blocks: &Blocks,
    ) -> Result<PackedWeight> {
        let rows = self.rows(name, tensor)?;
        let (d_input, d_output) = (rows.width, rows.count);
        let mut packer = CodePacker::new(d_input, d_output, scheme.bits());
        let mut numbers = Numbers::new(&scheme, d_input, d_output);
        let kind = tensor.kind;
        self.for_chunks(tensor, &rows, |first, bytes| {
            let take_apart = |row: usize| {
                let block = |block: &[u8]| {
                    let mut parts = blocks.parts();
                    blocks.take_apart(block, &mut parts);
                    parts
                };
                rows.source(bytes, row).chunks_exact(kind.bytes()).map(block).collect::<Vec<_>>()
            };
            let taken: Vec<_> = (0..bytes.len() / rows.bytes).into_par_iter().map(take_apart).collect();
            let mut codes = Vec::with_capacity(d_input);
            for (output, row) in (first..).zip(taken) {
                codes.clear();
                for (index, parts) in row.iter().enumerate() {
                    codes.extend_from_slice(&parts.codes);
                    numbers.set(index, output, parts);
                }
                packer.set_column(output, &codes);
            }
            Ok(())
        })?;
        numbers.floats().try_for_each(|values| self.check_finite(&tensor.name, values))?;
        let (scales, offsets) = numbers.into_parts();
        Ok(PackedWeight {
            scheme,
            d_input,
            d_output,
            codes: packer.into_words(),
            scales,
            offsets,
            input_order: self
                .columns(name, tensor)?
                .map(|columns| columns.into_iter().map(|column| column as u32).collect()),
        })
    }

    fn check_finite(&self, name: &str, values: &[f32]) -> Result<()> {
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(self.metadata.error(name, "finite values", value.to_string())),
            None => Ok(()),
        }
    }
}

impl TensorSource for Gguf {
    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name) || self.numbers.contains_key(name)
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().chain(self.numbers.keys()).cloned().collect()
    }

    fn describe(&self, name: &str) -> Result<Described> {
        if let Some(numbers) = self.numbers.get(name) {
            return Ok(Described { shape: Some(numbers.shape.clone()), bytes: 4, dense: true });
        }
        let tensor = self.find(name)?;
        let bytes = tensor.len() / tensor.kind.weights() * tensor.kind.bytes();
        let dense = tensor.kind.packed_scheme().is_none();
        Ok(Described { shape: Some(tensor.shape.clone()), bytes: bytes as u64, dense })
    }

    fn dense(&self, name: &str) -> Result<DenseTensor> {
        if let Some(numbers) = self.numbers.get(name) {
            return Ok(numbers.clone());
        }
        self.decode(name, self.find(name)?)
    }

    fn weight(&self, module: &str) -> Result<StoredWeight> {
        let name = format!("{module}.weight");
        let tensor = self.find(&name)?;
        if tensor.shape.len() != 2 {
            let found = format!("{} of sizes {:?}", tensor.shape.len(), tensor.shape);
            return Err(self.metadata.error(&tensor.name, "2 dimensions", found));
        }
        match (tensor.kind.packed_scheme(), Blocks::new(tensor.kind)) {
            (Some(scheme), Some(blocks)) => {
                self.pack(&name, tensor, scheme, &blocks).map(StoredWeight::Packed)
            }
            _ => self.decode(&name, tensor).map(StoredWeight::Dense),
        }
    }
}

/// What keys hold of blocks: a number for each, or one for all.
fn numbers(metadata: &Metadata, architecture: &str, names: Names) -> Result<BTreeMap<String, DenseTensor>> {
    let mut numbers = BTreeMap::new();
    for (key, vector) in names.keyed() {
        let blocks = metadata.usize(&format!("{architecture}.block_count"))?.unwrap_or(0).min(MAX_LAYERS);
        let values: Vec<f64> = match metadata.get(key) {
            None => continue,
            Some(Value::Array(_)) => metadata.floats(key)?.unwrap_or_default().to_vec(),
            Some(_) => vec![metadata.require(key, metadata.f64(key)?)?; blocks],
        };
        if values.len() != blocks {
            let expected = format!("a number for each of {blocks} blocks");
            return Err(metadata.error(key, &expected, format!("{} numbers", values.len())));
        }
        if let Some(value) = values.iter().find(|value| !(**value as f32).is_finite()) {
            return Err(metadata.error(key, "numbers of 32 bits", value.to_string()));
        }
        let is_scalar = matches!(vector.role, VectorRole::XieluBeta | VectorRole::XieluEps);
        for (index, value) in values.into_iter().enumerate() {
            let shape = if is_scalar { Vec::new() } else { vec![1] };
            let tensor = DenseTensor { shape, values: vec![value as f32] };
            numbers.insert(names.family.path(index, vector.name), tensor);
        }
    }
    Ok(numbers)
}

/// For each row its place, given the row of each place.
fn inverse(order: &[usize]) -> Vec<usize> {
    let mut places = vec![0; order.len()];
    order.iter().enumerate().for_each(|(place, &row)| places[row] = place);
    places
}

/// A tensor as rows of whole blocks.
struct Rows {
    count: usize,
    /// Values in a row.
    width: usize,
    /// Bytes of a row.
    bytes: usize,
    /// Rows of a head, if they are interleaved within it.
    head_dim: Option<usize>,
    /// The place of each row among all, if they stand in another order altogether.
    places: Option<Vec<usize>>,
}

impl Rows {
    /// The bytes of row `row` in Hugging Face's order, out of a chunk of whole heads in the file's order: there the
    /// two halves of a head alternate, so that row `2j + h` is `h * half + j`; or of all rows, in the file's order.
    fn source<'a>(&self, chunk: &'a [u8], row: usize) -> &'a [u8] {
        let row = self.places.as_ref().map_or(row, |places| places[row]);
        let row = self.head_dim.map_or(row, |head_dim| {
            let (half, within) = (head_dim / 2, row % head_dim);
            row - within + within % half * 2 + within / half
        });
        &chunk[row * self.bytes..][..self.bytes]
    }
}
