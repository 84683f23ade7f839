//! GGUF files, as llama.cpp opens them.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use half::{bf16, f16};
use kiln_quant_core::{
    Block, Grid, HostQuantizer, MinMax, PackedWeight, QuantLinear, QuantScheme, ScaleType, Scales, Value,
    packing::unpack_column,
};
use rayon::prelude::*;

use super::{
    ExportReport, ExportRow, Fallback, FloatType, Format, gguf_tokenizer,
    item::{self, Groups, Host, Item, rounded},
    report::{Written, difference},
};
use crate::{
    Checkpoint, Decoder, Result,
    config::{AttentionScale, ModelConfig, QueryTemperature, RopeScaling, TensorRole},
    families::{ByBlock, Family, FusedRows, GgufArchitecture, Part},
    gguf::{
        Array, BlockType, Blocks, Parts, Value as Key, by_block, layers, llama3_factors,
        names::{Heads, Names, ROPE_FACTORS, RowOrder},
        qwen3_5,
        writer::{self, NewTensor},
    },
    hf::sorted_codes,
};

/// Weights in a block of the simple types.
const BLOCK: usize = 32;

/// How a GGUF file is written.
///
/// | option | default | purpose |
/// | --- | --- | --- |
/// | `dense` | F16 | type of dense linears, head and embedding: F32, F16, BF16 or Q8_0 (where rows are whole blocks of 32, else F16) |
/// | `fallback` | refuse | packed weights that no block type holds; dense ones are written as `dense` says |
/// | `tokenizer` | true | whether the tokenizer goes into the file |
/// | `name` | none | `general.name` |
/// | `max_part_bytes` | none | data of a file; more is split into files whose names end in `-00001-of-00005.gguf` |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufOptions {
    /// Type of dense linears, head and embedding.
    pub dense: BlockType,
    /// What happens to packed weights that no block type holds.
    pub fallback: Fallback,
    /// Whether the tokenizer goes into the file.
    pub tokenizer: bool,
    /// `general.name`.
    pub name: Option<String>,
    /// Data of a file at most, but for a tensor larger than that.
    pub max_part_bytes: Option<u64>,
}

impl Default for GgufOptions {
    fn default() -> Self {
        Self {
            dense: BlockType::F16,
            fallback: Fallback::Refuse,
            tokenizer: true,
            name: None,
            max_part_bytes: None,
        }
    }
}

/// Writes `model` as a GGUF file of version 3, or several if `options` limit their size, with hyperparameters and the tokenizer of `source`.
///
/// Codes are repacked, never requantized. A weight of a scheme that is a block type's ([`BlockType::packed_scheme`]) is
/// written as that type, so that what came from a GGUF file goes back block by block, bit for bit. Of the others,
/// symmetric codes of 2 to 4 bits (and integer grids of 4 bits around 8) become Q4_0, others of 2 to 4 bits Q4_1, those
/// of 5 bits Q5_0 and Q5_1, symmetric ones of 8 bits Q8_0: scales and offsets are rounded to f16 and repeated for every 32
/// inputs; the report says what that rounding costs. Norms and biases are f32. Rows of q and k get the order that the
/// architecture `llama` has.
///
/// The architecture is the family's own, or `llama` for a model whose biases its family's files don't have. A window that all
/// blocks have is written for Kiln's reader; other readers may not know it for every architecture, and then see beyond it.
///
/// # Errors
/// [`Error::Export`](crate::Error::Export) naming a packed weight that no block type holds (NF4 and the like, float
/// offsets at 8 bits, blocks of other than a multiple of 32 inputs, act-order) unless `options.fallback` writes it dense; a scale beyond f16's range; OPT,
/// blocks of different widths and windows that differ by block otherwise than the architecture has them (Gemma 4's files say them of
/// each block), dynamic rotary scaling; a tokenizer that can't be
/// expressed. [`Error::Argument`](crate::Error::Argument), [`Error::Io`](crate::Error::Io). `path` is then as it was before.
///
/// # Example
/// ```
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, LoadOptions, export::{GgufOptions, export_gguf, verify_export}};
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let folder = tempfile::tempdir()?;
/// # let file = folder.path().join("model.gguf");
/// let checkpoint = Checkpoint::open(path)?;
/// let (model, _) = checkpoint.load(&LoadOptions::uniform("affine4:32:f16".parse()?).in_f32(), &Device::flex())?;
/// let report = export_gguf(&model, &checkpoint, &file, &GgufOptions::default())?;
/// assert!(report.rows.iter().all(|row| row.stored != "Q4_1" || row.is_exact()));
/// assert!(verify_export(&file, &model, &[1, 2, 3])?.relative < 1e-3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn export_gguf(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    path: impl AsRef<Path>,
    options: &GgufOptions,
) -> Result<ExportReport> {
    let path = path.as_ref();
    check_options(options)?;
    let config = model.config();
    let names = names(config)?;
    let family = names.family;
    let items = item::items_as(model, false)?;
    let writer = Exporter { config, names, options };
    let mut report = ExportReport { path: path.into(), rows: Vec::new(), bytes: 0, notes: Vec::new() };
    let (mut tensors, mut stacks, mut kinds) = (Vec::new(), Vec::new(), BTreeMap::new());
    let mut numbers: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for item in &items {
        let host = item.host()?;
        if let Some(key) = names.key_of(&item.name()) {
            // In the order of the blocks.
            numbers.entry(key).or_default().extend(host.dense().into_iter().map(f64::from));
            let (stored, max_difference, relative_difference) = (format!("key {key}"), 0.0, 0.0);
            report.rows.push(ExportRow {
                name: item.name(),
                stored,
                bytes: 4,
                max_difference,
                relative_difference,
            });
            continue;
        }
        let converted = writer.convert(item, &host)?;
        let (max_difference, relative_difference) = difference(&host, &converted.written);
        let mut shape = item.shape();
        if let Some(axis) = names.flat_axis(&item.name()) {
            shape.remove(axis);
        }
        let tensor = NewTensor { name: gguf_name(names, item)?, shape, kind: converted.kind };
        let (name, stored) = (item.name(), converted.kind.name().to_owned());
        let bytes = tensor.bytes().unwrap_or(0) as u64;
        report.rows.push(ExportRow { name, stored, bytes, max_difference, relative_difference });
        report.notes.extend(converted.note);
        if item.role == TensorRole::Linear {
            *kinds.entry(converted.kind.id()).or_insert(0) += 1;
        }
        add(&mut tensors, &mut stacks, tensor, item)?;
    }
    let usual = kinds.iter().max_by_key(|(_, count)| **count).map_or(0, |(id, _)| *id);
    let mut keys = keys(config, family, usual, options)?;
    let numbers =
        numbers.into_iter().map(|(key, numbers)| (key.to_owned(), Key::Array(Array::Float(numbers))));
    keys.extend(numbers);
    if let Some(kind) = by_blocks(family)
        && !by_block::expresses(kind, &keys, architecture(family), config)?
    {
        let expected = "a model that the architecture's keys describe";
        return Err(refuse("config", expected, format!("{config:?}")));
    }
    if options.tokenizer {
        keys.extend(gguf_tokenizer::keys(source, config.vocab_size, &mut report.notes)?);
    }
    let factors = rope_factors(config);
    if let Some(factors) = &factors {
        let shape = vec![factors.len()];
        tensors.push(NewTensor { name: ROPE_FACTORS.into(), shape, kind: BlockType::F32 });
    }
    let data = |index: usize| match stacks.get(index) {
        Some(items) => {
            let each = items.iter().map(|item: &&Item| Ok(writer.convert(item, &item.host()?)?.bytes));
            Ok(each.collect::<Result<Vec<_>>>()?.concat())
        }
        None => Ok(floats(factors.as_deref().unwrap_or_default(), BlockType::F32)),
    };
    (report.path, report.bytes) = writer::write_parts(path, options.max_part_bytes, &keys, &tensors, data)?;
    Ok(report)
}

/// Adds a tensor and what it is made of: experts of one kind follow each other in one.
fn add<'a>(
    tensors: &mut Vec<NewTensor>,
    stacks: &mut Vec<Vec<&'a Item>>,
    tensor: NewTensor,
    item: &'a Item,
) -> Result<()> {
    let Some(place) = tensors.iter().position(|other| other.name == tensor.name) else {
        let is_expert = tensor.name.ends_with("_exps.weight") || tensor.name.ends_with("_exps.bias");
        let shape = if is_expert { [&[1], &tensor.shape[..]].concat() } else { tensor.shape };
        tensors.push(NewTensor { shape, ..tensor });
        stacks.push(vec![item]);
        return Ok(());
    };
    let stack = &mut tensors[place];
    if stack.kind != tensor.kind {
        let expected = format!("{}, as the experts before it", stack.kind.name());
        return Err(refuse(&item.name(), expected, tensor.kind.name()));
    }
    stack.shape[0] += 1;
    stacks[place].push(item);
    Ok(())
}

fn refuse(name: &str, expected: impl Into<String>, found: impl Into<String>) -> crate::Error {
    Format::Gguf.refuse(name, expected, found)
}

fn check_options(options: &GgufOptions) -> Result<()> {
    use BlockType::{Bf16, F16, F32, Q8_0};
    if matches!(options.dense, F32 | F16 | Bf16 | Q8_0) {
        return Ok(());
    }
    Err(refuse("GgufOptions.dense", "F32, F16, BF16 or Q8_0", options.dense.name()))
}

fn gguf_name(names: Names, item: &Item) -> Result<String> {
    let name = item.name();
    names
        .gguf(&name)
        .ok_or_else(|| refuse(&name, format!("a tensor of the family {:?}", names.family), "another"))
}

/// The names of the family whose GGUF architecture computes what `config` says, in llama.cpp too: the model's own, or `llama`,
/// which takes any biases, where those of the model aren't its family's.
pub(super) fn names(config: &ModelConfig) -> Result<Names> {
    let own = config.family;
    if own.gguf.is_none() {
        return Err(refuse("architecture", Family::gguf_names(), own.model_type));
    }
    let expert = config.common_shape().expert_width;
    if let Some(found) =
        config.layer_shapes.iter().map(|shape| shape.expert_width).find(|width| *width != expert)
    {
        return Err(refuse(
            "config.layer_shapes",
            format!("experts of {expert} channels"),
            found.to_string(),
        ));
    }
    if let Some(kind) = by_blocks(own) {
        if kind == ByBlock::Qwen3_5 && !qwen3_5::is_readable(config) {
            let found = format!("{:?}", config.delta_net);
            return Err(refuse("config.delta_net", "values as wide as keys", found));
        }
        return Ok(Names { family: own, kind: 0 });
    }
    if !config.layer_shapes.is_empty() {
        return Err(refuse("config.layer_shapes", "blocks of one width", "blocks that differ"));
    }
    let family = match Family::by_gguf("llama", false, false) {
        _ if own.own_biases(config.biases) == config.biases => own,
        Some(llama) if own.blocks == llama.blocks => llama,
        _ => return Err(refuse("biases", "none beside norms on q and k", format!("{:?}", config.biases))),
    };
    let kind = config.block_kinds.first().copied().unwrap_or(0);
    let names = Names { family, kind };
    let is_named = |part: &Part| match part {
        Part::Vector(vector) if vector.role.gguf_key().is_some() => true,
        part => !part.gguf().is_empty(),
    };
    if config.block_kinds.iter().any(|other| *other != kind) || !family.blocks[kind].iter().all(is_named) {
        let expected = "blocks of one kind, which the architecture has names for";
        return Err(refuse("config.block_kinds", expected, format!("{:?}", config.block_kinds)));
    }
    check_expressible(&ModelConfig { family, ..config.clone() }, kind)?;
    Ok(names)
}

/// Refuses what these files have no key for and their readers take for granted.
fn check_expressible(config: &ModelConfig, kind: usize) -> Result<()> {
    let class = &config.family.class;
    let gguf = config.family.gguf.unwrap_or(GgufArchitecture::PLAIN);
    let usual = |what: &str, expected: String, found: String| match expected == found {
        true => Ok(()),
        false => Err(refuse(&format!("config.{what}"), expected, found)),
    };
    let embedding = match (class.multipliers.embedding, class.scales_embedding) {
        ("", true) => (config.hidden_size as f64).sqrt(),
        ("", false) => 1.0,
        _ => config.embedding_multiplier,
    };
    usual("embedding_multiplier", embedding.to_string(), config.embedding_multiplier.to_string())?;
    let factor = |key: &str, value: f64| if key.is_empty() { 1.0 } else { value };
    let residual = factor(class.multipliers.residual, config.residual_multiplier);
    usual("residual_multiplier", residual.to_string(), config.residual_multiplier.to_string())?;
    let logits = match class.multipliers.logits {
        Some(_) => config.logit_multiplier,
        None => factor(class.multipliers.logits_divisor, config.logit_multiplier),
    };
    usual("logit_multiplier", logits.to_string(), config.logit_multiplier.to_string())?;
    let scale = match config.attention_scale {
        AttentionScale::Factor(_) if !class.multipliers.attention.is_empty() => config.attention_scale,
        _ => layers::scale(config),
    };
    usual("attention_scale", format!("{scale:?}"), format!("{:?}", config.attention_scale))?;
    let window = config.layer_attention.iter().find_map(|layer| layer.sliding_window);
    let layers = layers::attention(config, window);
    usual("layer_attention", format!("{layers:?}"), format!("{:?}", config.layer_attention))?;
    let parallel = if gguf.parallel_key { config.parallel } else { gguf.parallel_kinds.contains(&kind) };
    usual("parallel", parallel.to_string(), config.parallel.to_string())?;
    usual("alibi", f64::from(u8::from(gguf.alibi)).to_string(), config.alibi.to_string())?;
    usual("activation", format!("{:?}", class.activations[0].1), format!("{:?}", config.activation))?;
    let tied = class.scales_embedding || gguf.always_tied || config.tie_word_embeddings;
    usual("tie_word_embeddings", tied.to_string(), config.tie_word_embeddings.to_string())?;
    if let Some(experts) = &config.experts {
        usual("experts.normalise", gguf.normalises.to_string(), experts.normalise.to_string())?;
        let clamped = layers::clamped(config.family);
        usual("experts.clamped", format!("{clamped:?}"), format!("{:?}", experts.clamped))?;
    }
    if let [_, sliding, ..] = config.rope.as_slice() {
        usual("rope[1].scaling", "Default".into(), format!("{:?}", sliding.scaling))?;
    }
    let temperature = config.query_temperature.filter(|_| gguf.temperature).and_then(|found| {
        let RopeScaling::Yarn { original_max_position_embeddings, .. } = config.rope.first()?.scaling else {
            return None;
        };
        Some(QueryTemperature { original_max_position_embeddings, ..found })
    });
    let none = [
        ("query_temperature", config.query_temperature.is_none_or(|found| Some(found) == temperature)),
        ("qkv_clip", config.qkv_clip.is_none()),
        ("projections", config.embedding_width.is_none()),
    ];
    match none.into_iter().find(|(_, none)| !none) {
        Some((what, _)) => Err(refuse(&format!("config.{what}"), "none", "one")),
        None => Ok(()),
    }
}

fn by_blocks(family: &Family) -> Option<ByBlock> {
    family.gguf.and_then(|gguf| gguf.by_block)
}

/// A GGUF architecture's name.
pub(super) fn architecture(family: &Family) -> &'static str {
    family.gguf.map_or("", |gguf| gguf.name)
}

/// A tensor as the file holds it.
struct Converted {
    kind: BlockType,
    bytes: Vec<u8>,
    written: Written,
    note: Option<String>,
}

struct Exporter<'a> {
    config: &'a ModelConfig,
    names: Names,
    options: &'a GgufOptions,
}

impl Exporter<'_> {
    fn convert(&self, item: &Item, host: &Host) -> Result<Converted> {
        let order = row_order(self.names, self.config, &item.name());
        let columns = column_order(self.names, self.config, &item.name());
        let (order, columns) = (order.as_deref(), columns.as_deref());
        let converted = match host {
            Host::Dense(_) => self.dense(item, host, order, columns)?,
            Host::Packed(weight) => {
                let moved = in_columns(&item.name(), weight, columns);
                match moved.and_then(|weight| packed(item, &weight, order)) {
                    Ok(converted) => converted,
                    Err(error) if self.options.fallback == Fallback::Refuse => return Err(error),
                    Err(error) => {
                        let mut converted = self.dense(item, host, order, columns)?;
                        converted.note = Some(format!("written {}: {error}", converted.kind.name()));
                        converted
                    }
                }
            }
        };
        Ok(match columns {
            Some(columns) => Converted { written: converted.written.with_columns(columns), ..converted },
            None => converted,
        })
    }

    /// `written` has the columns in the file's order.
    fn dense(
        &self,
        item: &Item,
        host: &Host,
        order: Option<&[usize]>,
        columns: Option<&[usize]>,
    ) -> Result<Converted> {
        let (name, shape) = (item.name(), item.shape());
        let width = shape.last().copied().unwrap_or(1);
        let kind = match self.options.dense {
            _ if item.role == TensorRole::Plain => BlockType::F32,
            BlockType::Q8_0 if !width.is_multiple_of(BLOCK) => BlockType::F16,
            kind => kind,
        };
        let mut values = host.dense();
        if let Some(columns) = columns {
            let rows = values.chunks_exact(width);
            values = rows.flat_map(|row| columns.iter().map(|column| row[*column])).collect();
        }
        if self.names.is_less_exponential(&name) {
            values.iter_mut().for_each(|value| *value = -value.exp());
        }
        if kind == BlockType::Q8_0 {
            let scheme = QuantScheme { block: Block::group(BLOCK), ..symmetric(8) };
            let packed = MinMax.quantize(&name, &values, width, values.len() / width, &scheme)?;
            return encoded(&name, packed, kind, order);
        }
        let float = match kind {
            BlockType::F16 => FloatType::F16,
            BlockType::Bf16 => FloatType::Bf16,
            _ => FloatType::F32,
        };
        let mut values = rounded(Format::Gguf, &name, &values, float)?;
        if self.names.has_one_added(&name) {
            // As gains; what is read back has lost the bits that 1 takes.
            values.iter_mut().for_each(|value| *value += 1.0);
            let bytes = floats(&values, kind);
            values.iter_mut().for_each(|value| *value -= 1.0);
            return Ok(Converted { kind, bytes, written: Written::Dense(values), note: None });
        }
        let bytes = match order {
            // The rows of a bias are single values.
            Some(order) => {
                let width = values.len() / order.len();
                let rows = order.iter().flat_map(|&row| &values[row * width..][..width]);
                floats(&rows.copied().collect::<Vec<_>>(), kind)
            }
            None => floats(&values, kind),
        };
        if self.names.is_less_exponential(&name) {
            values.iter_mut().for_each(|value| *value = (-*value).ln());
        }
        Ok(Converted { kind, bytes, written: Written::Dense(values), note: None })
    }
}

fn symmetric(bits: u32) -> QuantScheme {
    QuantScheme {
        value: Value::Affine { bits, grid: Grid::Symmetric },
        block: Block::group(BLOCK),
        scales: ScaleType::F16,
    }
}

/// Hugging Face's row for each row of the file, where they differ.
pub(super) fn row_order(names: Names, config: &ModelConfig, name: &str) -> Option<Vec<usize>> {
    let (queries, keys) = (config.num_attention_heads, config.num_key_value_heads);
    let heads = match names.order(name)? {
        RowOrder::Concatenated => {
            return Some(FusedRows::Grouped.rows(queries, keys, config.head_dim).concat());
        }
        RowOrder::Tiled(tiles) => return qwen3_5::tiled(tiles, config.delta_net.as_ref()?),
        RowOrder::Interleaved(Heads::Query) => queries,
        RowOrder::Interleaved(Heads::Key) => keys,
    };
    let half = config.head_dim / 2;
    let within = |row: usize| row % 2 * half + row / 2;
    Some((0..heads * config.head_dim).map(|row| row - row % (2 * half) + within(row % (2 * half))).collect())
}

/// The checkpoint's column for each column of the file, where they differ.
pub(super) fn column_order(names: Names, config: &ModelConfig, name: &str) -> Option<Vec<usize>> {
    qwen3_5::tiled(names.column_order(name)?, config.delta_net.as_ref()?)
}

/// A packed weight with its inputs in the file's order, for which its groups are moved, if they must be, as a whole.
fn in_columns<'a>(
    name: &str,
    weight: &'a PackedWeight,
    columns: Option<&[usize]>,
) -> Result<Cow<'a, PackedWeight>> {
    match (columns, &weight.input_order) {
        (None, None) => Ok(Cow::Borrowed(weight)),
        (Some(columns), Some(own)) if columns.iter().zip(own).all(|(a, b)| *a == *b as usize) => {
            Ok(Cow::Owned(PackedWeight { input_order: None, ..weight.clone() }))
        }
        (Some(columns), None) => {
            let moved = moved(weight, columns);
            let found = || refuse(name, "groups within a delta net's heads", weight.scheme.to_string());
            moved.map(Cow::Owned).ok_or_else(found)
        }
        (_, Some(_)) => Err(refuse(name, "inputs in their own order", "act-order")),
    }
}

/// `weight` with input `columns[j]` as its `j`-th; `None` if that would split a group, or groups that share a scale.
fn moved(weight: &PackedWeight, columns: &[usize]) -> Option<PackedWeight> {
    let PackedWeight { scheme, d_input, d_output, .. } = *weight;
    let size = scheme.block.inputs_of(d_input);
    let group = |chunk: &[usize]| {
        let group = chunk[0] / size;
        chunk.iter().all(|column| column / size == group).then_some(group)
    };
    let groups: Vec<usize> = columns.chunks(size).map(group).collect::<Option<_>>()?;
    let Scales::Plain(scales) = &weight.scales else { return None };
    let [_, width] = scheme.scale_shape(d_input, d_output);
    let rows =
        |values: &Vec<f32>| groups.iter().flat_map(|row| &values[row * width..][..width]).copied().collect();
    let order: Vec<u32> = columns.iter().map(|column| *column as u32).collect();
    Some(PackedWeight {
        codes: sorted_codes(&weight.codes, [d_input, d_output], scheme.bits(), Some(&order)),
        scales: Scales::Plain(rows(scales)),
        offsets: weight.offsets.as_ref().map(rows),
        ..weight.clone()
    })
}

/// A weight in blocks of `kind`, whose scales lie as the type's do.
fn encoded(name: &str, weight: PackedWeight, kind: BlockType, order: Option<&[usize]>) -> Result<Converted> {
    let expected = || refuse(name, format!("numbers that {} holds", kind.name()), "others");
    let bytes = encode(&weight, kind, order).ok_or_else(expected)?;
    Ok(Converted { kind, bytes, written: Written::Packed(weight), note: None })
}

/// A packed weight in the block type that holds it: as it is where it came from a file of that type or could have, else
/// with scales and offsets for every 32 inputs.
fn packed(item: &Item, weight: &PackedWeight, order: Option<&[usize]>) -> Result<Converted> {
    let name = item.name();
    let PackedWeight { scheme, d_input, d_output, .. } = *weight;
    let inputs = scheme.block.inputs_of(d_input);
    let own = BlockType::of_scheme(&scheme).filter(|kind| d_input.is_multiple_of(kind.weights()));
    if let Some((kind, bytes)) = own.and_then(|kind| Some((kind, encode(weight, kind, order)?))) {
        return Ok(Converted { kind, bytes, written: Written::Packed(weight.clone()), note: None });
    }
    if !d_input.is_multiple_of(BLOCK) || !(inputs.is_multiple_of(BLOCK) || inputs >= d_input) {
        let found = format!("{scheme} with rows of {d_input}");
        return Err(refuse(&name, "groups and rows of a multiple of 32 inputs", found));
    }
    let (kind, grid) = match scheme.value {
        Value::Affine { bits: 8, grid: Grid::Symmetric } => (BlockType::Q8_0, Grid::Symmetric),
        Value::Affine { bits: 2..=4, grid: Grid::Symmetric } => (BlockType::Q4_0, Grid::Symmetric),
        Value::Affine { bits: 5, grid: Grid::Symmetric } => (BlockType::Q5_0, Grid::Symmetric),
        Value::Affine { bits: 4, grid: Grid::Integer } if is_centred(weight) => {
            (BlockType::Q4_0, Grid::Symmetric)
        }
        Value::Affine { bits: 2..=4, .. } => (BlockType::Q4_1, Grid::Float),
        Value::Affine { bits: 5, .. } => (BlockType::Q5_1, Grid::Float),
        _ => {
            let expected = "affine codes of 2 to 5 bits, symmetric ones of 8, or a type of the format";
            return Err(refuse(&name, expected, scheme.to_string()));
        }
    };
    let groups = Groups::of(weight, BLOCK);
    let half = |part: &str, values: &[f32]| {
        rounded(Format::Gguf, &format!("{}.{part}", item.path), values, FloatType::F16)
    };
    let scales = half("scales", &groups.scales)?;
    let offsets = groups.offsets.filter(|_| grid == Grid::Float);
    let offsets = offsets.map(|offsets| half("offsets", &offsets)).transpose()?;
    let value = Value::Affine { bits: scheme.bits(), grid };
    let rounded = PackedWeight {
        scheme: QuantScheme { value, block: Block::group(BLOCK), scales: ScaleType::F16 },
        d_input,
        d_output,
        codes: weight.codes.clone(),
        scales: Scales::Plain(scales),
        offsets,
        input_order: None,
    };
    encoded(&name, rounded, kind, order)
}

/// Whether every zero point of a 4-bit weight is 8.
fn is_centred(weight: &PackedWeight) -> bool {
    let scales = weight.effective_scales();
    let offsets = weight.effective_offsets().unwrap_or_default();
    scales.iter().zip(&offsets).all(|(scale, offset)| *offset == -(scale * 8.0))
}

/// The blocks of a weight whose scales lie as the type's do, rows in the file's order; `None` if a number doesn't fit.
fn encode(weight: &PackedWeight, kind: BlockType, order: Option<&[usize]>) -> Option<Vec<u8>> {
    let (d_output, bits) = (weight.d_output, weight.scheme.bits());
    let blocks = Blocks::new(kind)?;
    // Small codes of a symmetric grid move to the middle of the larger one.
    let shift = if kind == BlockType::Q4_0 { 8 - (1u8 << (bits - 1)) } else { 0 };
    let row_bytes = weight.d_input / kind.weights() * kind.bytes();
    let mut bytes = vec![0; row_bytes * d_output];
    let rows = bytes.par_chunks_exact_mut(row_bytes).enumerate();
    rows.map_init(
        || (vec![0; weight.d_input], blocks.parts()),
        |(codes, parts), (row, bytes)| {
            let output = order.map_or(row, |order| order[row]);
            unpack_column(&weight.codes, d_output, bits, output, codes);
            let blocks_of_row = bytes.chunks_exact_mut(kind.bytes()).zip(codes.chunks_exact(kind.weights()));
            for (index, (block, codes)) in blocks_of_row.enumerate() {
                parts.codes.iter_mut().zip(codes).for_each(|(into, code)| *into = code + shift);
                numbers(weight, index, output, parts);
                blocks.put_together(parts, block)?;
            }
            Some(())
        },
    )
    .collect::<Option<()>>()?;
    Some(bytes)
}

/// Scales and offsets of the `index`-th block of an output.
fn numbers(weight: &PackedWeight, index: usize, output: usize, parts: &mut Parts) {
    let at = index * weight.d_output + output;
    match (&weight.scales, weight.scheme.super_layout(weight.d_input, weight.d_output)) {
        (Scales::Super(both), Some(layout)) => {
            let first = index * layout.blocks;
            for (row, integer) in (first..).zip(&mut parts.scales) {
                *integer = both.scales.get(&layout, row, output);
            }
            parts.scale = both.scales.factors[at];
            if let Some(offsets) = &both.offsets {
                for (row, integer) in (first..).zip(&mut parts.offsets) {
                    *integer = offsets.get(&layout, row, output);
                }
                parts.offset = offsets.factors[at];
            }
        }
        (Scales::Plain(scales), _) => {
            parts.scale = scales[at];
            parts.offset = weight.offsets.as_ref().map_or(0.0, |offsets| offsets[at]);
        }
        // No type of the format has double-quantized scales.
        _ => parts.scale = f32::NAN,
    }
}

fn floats(values: &[f32], kind: BlockType) -> Vec<u8> {
    match kind {
        BlockType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        BlockType::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
    }
}

/// `general.*` and `<architecture>.*`; `usual` is the type of most linears.
fn keys(
    config: &ModelConfig,
    family: &Family,
    usual: u32,
    options: &GgufOptions,
) -> Result<Vec<(String, Key)>> {
    let text = |text: &str| Key::String(text.into());
    let count = |count: usize| Key::Uint(count as u64);
    let float = |value: f64| Key::F32(value as f32);
    // llama.cpp's numbers for "mostly of this type".
    let file_type = match usual {
        id if id == BlockType::F16.id() => 1,
        id if id == BlockType::Q4_0.id() => 2,
        id if id == BlockType::Q4_1.id() => 3,
        id if id == BlockType::Q8_0.id() => 7,
        id if id == BlockType::Q5_0.id() => 8,
        id if id == BlockType::Q5_1.id() => 9,
        id if id == BlockType::Q2K.id() => 10,
        id if id == BlockType::Q3K.id() => 12,
        id if id == BlockType::Q4K.id() => 15,
        id if id == BlockType::Q5K.id() => 17,
        id if id == BlockType::Q6K.id() => 18,
        id if id == BlockType::Iq4Nl.id() => 25,
        id if id == BlockType::Iq4Xs.id() => 30,
        id if id == BlockType::Bf16.id() => 32,
        id if id == BlockType::Mxfp4.id() => 38,
        _ => 0,
    };
    let mut keys = vec![
        ("general.architecture".to_owned(), text(architecture(family))),
        ("general.type".to_owned(), text("model")),
        ("general.file_type".to_owned(), Key::Uint(file_type)),
        ("general.quantization_version".to_owned(), Key::Uint(2)),
    ];
    if let Some(name) = &options.name {
        keys.push(("general.name".to_owned(), text(name)));
    }
    let mut own = vec![
        ("block_count", count(config.num_hidden_layers)),
        ("context_length", count(config.max_position_embeddings)),
        ("embedding_length", count(config.hidden_size)),
        ("feed_forward_length", count(config.intermediate_size)),
        ("attention.head_count", count(config.num_attention_heads)),
        ("attention.head_count_kv", count(config.num_key_value_heads)),
        ("attention.key_length", count(config.head_dim)),
        ("attention.value_length", count(config.head_dim)),
        (
            match family.norm.centres() {
                true => "attention.layer_norm_epsilon",
                false => "attention.layer_norm_rms_epsilon",
            },
            float(config.norm_eps),
        ),
        ("vocab_size", count(config.vocab_size)),
    ];
    if let Some(rope) = config.rope.first() {
        own.push(("rope.dimension_count", count(rope.rotated(config.head_dim))));
        own.push(("rope.freq_base", float(rope.stretched_theta(config.head_dim))));
        own.extend(rope_keys(&rope.scaling, family.gguf.is_none_or(|gguf| gguf.rounds_yarn))?);
    }
    if let Some(experts) = &config.experts {
        own.push(("expert_count", count(experts.count)));
        own.push(("expert_used_count", count(experts.per_token)));
        own.push(("expert_feed_forward_length", count(experts.width)));
        if experts.shared_width > 0 {
            own.push(("expert_shared_feed_forward_length", count(experts.shared_width)));
        }
    }
    let window = config.layer_attention.iter().find_map(|layer| layer.sliding_window);
    own.extend(window.map(|window| ("attention.sliding_window", count(window))));
    if let [_, sliding, ..] = config.rope.as_slice() {
        own.push(("rope.freq_base_swa", float(sliding.theta)));
    }
    let temperature = config.query_temperature.map(|temperature| temperature.beta);
    own.extend(temperature.map(|beta| ("attention.temperature_scale", float(beta))));
    if family.gguf.is_some_and(|gguf| gguf.parallel_key) {
        own.push(("use_parallel_residual", Key::Bool(config.parallel)));
    }
    let multipliers = &family.class.multipliers;
    let mut add = |known: bool, key, value: Option<f64>| {
        own.extend(value.filter(|_| known).map(|value| (key, float(value))));
    };
    add(!multipliers.embedding.is_empty(), "embedding_scale", Some(config.embedding_multiplier));
    add(!multipliers.residual.is_empty(), "residual_scale", Some(config.residual_multiplier));
    add(!multipliers.logits_divisor.is_empty(), "logit_scale", Some(1.0 / config.logit_multiplier));
    add(multipliers.logits.is_some(), "logit_scale", Some(config.logit_multiplier));
    add(multipliers.attention_softcap.is_some(), "attn_logit_softcapping", config.attention_softcap);
    add(multipliers.logit_softcap.is_some(), "final_logit_softcapping", config.logit_softcap);
    if let AttentionScale::Factor(factor) = config.attention_scale {
        add(!multipliers.attention.is_empty(), "attention.scale", Some(factor));
    }
    if let Some(kind) = by_blocks(family) {
        let of_blocks = by_block::keys(kind, config);
        own.retain(|(key, _)| of_blocks.iter().all(|(other, _)| other != key));
        own.extend(of_blocks);
    }
    keys.extend(own.into_iter().map(|(key, value)| (format!("{}.{key}", architecture(family)), value)));
    Ok(keys)
}

fn rope_keys(scaling: &RopeScaling, rounds_yarn: bool) -> Result<Vec<(&'static str, Key)>> {
    let text = |text: &str| Key::String(text.into());
    let float = |value: f64| Key::F32(value as f32);
    Ok(match *scaling {
        // The latter is in the base of the frequencies.
        RopeScaling::Default | RopeScaling::Alpha { .. } => vec![],
        // Its channels are told by a tensor.
        RopeScaling::Proportional { factor: 1.0 } => vec![],
        RopeScaling::Linear { factor } => {
            vec![("rope.scaling.type", text("linear")), ("rope.scaling.factor", float(factor))]
        }
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            beta_fast,
            beta_slow,
            attention_factor,
            truncate,
        } if truncate == rounds_yarn => {
            // The key holds a factor on the paper's own sharpening.
            let sharpening = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
            vec![
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", float(factor)),
                ("rope.scaling.original_context_length", Key::Uint(original_max_position_embeddings as u64)),
                ("rope.scaling.attn_factor", float(attention_factor / sharpening)),
                ("rope.scaling.yarn_beta_fast", float(beta_fast)),
                ("rope.scaling.yarn_beta_slow", float(beta_slow)),
            ]
        }
        // Beside the tensor of factors; other readers don't ask for it.
        RopeScaling::Llama3 { original_max_position_embeddings, .. } => {
            vec![("rope.scaling.original_context_length", Key::Uint(original_max_position_embeddings as u64))]
        }
        RopeScaling::Yarn { .. }
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Proportional { .. }
        | RopeScaling::LongRope { .. } => {
            let expected = "default, linear, llama3, or yarn with rounded borders";
            return Err(refuse("config.rope.scaling", expected, format!("{scaling:?}")));
        }
    })
}

/// What LLaMA 3's scaling divides the frequencies by: a tensor, not a weight.
fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    if let Some(kind) = by_blocks(config.family) {
        return by_block::rope_factors(kind, config);
    }
    let rope = config.rope.first()?;
    let RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } =
        rope.scaling
    else {
        return None;
    };
    let frequencies = [factor, low_freq_factor, high_freq_factor];
    Some(llama3_factors(rope.theta, config.head_dim, original_max_position_embeddings, frequencies))
}

#[cfg(test)]
mod tests {
    use kiln_testkit::values;

    use super::*;

    #[test]
    fn groups_of_inputs_move_as_a_whole() {
        let weight = MinMax.quantize("w", &values(5, 64 * 3), 64, 3, &"affine4:16".parse().unwrap()).unwrap();
        // Groups 2, 0, 3, 1, the inputs of one in another order.
        let columns: Vec<usize> = (32..48).rev().chain(0..16).chain(48..64).chain(16..32).collect();
        let found = moved(&weight, &columns).unwrap();
        found.validate("w").unwrap();
        let dense = weight.dequantize();
        let rows = dense.chunks_exact(64).flat_map(|row| columns.iter().map(|column| row[*column]));
        assert_eq!(found.dequantize(), rows.collect::<Vec<_>>());
        // Parts of two groups can't have one scale.
        let split: Vec<usize> = (8..64).chain(0..8).collect();
        assert!(moved(&weight, &split).is_none());
    }
}
