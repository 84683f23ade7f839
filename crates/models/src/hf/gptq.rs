//! GPTQ's weights, as AutoGPTQ and GPTQModel write them.
//!
//! A linear `P` is `P.qweight` `[in * bits / 32, out]` (codes packed along the input, Kiln's own layout), `P.scales`
//! `[groups, out]`, `P.qzeros` `[groups, out * bits / 32]` (zero points packed along the output) and `P.g_idx` `[in]`,
//! the group of each input. A weight is `scale * (code - zero)`.
//!
//! Bits are taken from the shapes and groups from `g_idx`; the configuration only has to agree. So the regular
//! expressions of `dynamic`, which may hold look-arounds, need no evaluation: an excluded module (`-:`) has a plain
//! `P.weight`, an overridden one has other shapes.

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value,
    packing::{CodePacker, code_rows, unpack_column},
    safetensors_file::Dtype,
};

use super::{gcd, json::Fields, shards::SafetensorsSet};
use crate::Result;

/// Tensors beside `P.qweight`.
pub(super) const COMPANIONS: [&str; 3] = [".qzeros", ".scales", ".g_idx"];
const MAX_GROUP: usize = 1 << 24;
const WIDTHS: [usize; 4] = [2, 3, 4, 8];

/// How zero points are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ZeroFormat {
    /// `zero - 1`, reduced to the code's width (`checkpoint_format` "gptq").
    V1,
    /// As they are ("gptq_v2").
    V2,
}

/// `quantization_config` of a GPTQ folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GptqConfig {
    /// Width of the codes: 2, 3, 4 or 8.
    pub bits: u32,
    /// Inputs of a group; `None` is the whole column.
    pub group_size: Option<usize>,
    /// Whether groups may be scattered over the inputs.
    pub desc_act: bool,
    /// Whether the grid is centred: every zero point is `2^(bits - 1)`.
    pub sym: bool,
    /// Format of the zero points: stated, guessed, or set by
    /// [`HfFolder::with_gptq_zeros`](super::HfFolder::with_gptq_zeros). Always there once a folder is open.
    pub zeros: Option<ZeroFormat>,
    /// Modules with other bits or groups (`dynamic`).
    pub overrides: Vec<GptqOverride>,
}

/// Bits and groups of the modules that match a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GptqOverride {
    /// Regular expression, as the file has it.
    pub pattern: String,
    /// Width of the codes.
    pub bits: u32,
    /// Inputs of a group; `None` is the whole column.
    pub group_size: Option<usize>,
}

/// Reads `quantization_config` or `quantize_config.json`.
pub(super) fn config(fields: &Fields<'_>) -> Result<GptqConfig> {
    fields.know(&[
        "act_group_aware",
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_auto_increment",
        "damp_percent",
        "dataset",
        "disable_exllama",
        "exllama_config",
        "lm_head",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "mse",
        "pad_token_id",
        "quant_method",
        "quantizer",
        "static_groups",
        "sym",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        "use_exllama",
        "use_exllama_v2",
    ]);
    fields.refuse_unless("pack_dtype", "int32")?;
    fields.refuse_unless("is_marlin_format", false)?;
    // A low-rank correction that belongs to the weights.
    if fields.get("adapter").is_some() {
        return Err(fields.unsupported("adapter", "null"));
    }
    let key = if fields.get("checkpoint_format").is_some() { "checkpoint_format" } else { "format" };
    fields.know(&["format"]);
    let zeros = match fields.str(key)? {
        None => None,
        Some("gptq") => Some(ZeroFormat::V1),
        Some("gptq_v2") => Some(ZeroFormat::V2),
        _ => return Err(fields.unsupported(key, "gptq, gptq_v2")),
    };
    let bits = bits(fields)?.ok_or_else(|| fields.wrong("bits", "2, 3, 4 or 8"))?;
    let group_size = group_size(fields)?
        .ok_or_else(|| fields.wrong("group_size", "a number of inputs, or -1 for the whole column"))?;
    Ok(GptqConfig {
        bits,
        group_size: group_size.inputs(),
        desc_act: fields.bool("desc_act")?.unwrap_or(false),
        sym: fields.bool("sym")?.unwrap_or(false),
        zeros,
        overrides: overrides(fields, bits, group_size)?,
    })
}

fn bits(fields: &Fields<'_>) -> Result<Option<u32>> {
    match fields.size("bits", 64)? {
        Some(bits) if WIDTHS.contains(&bits) => Ok(Some(bits as u32)),
        Some(_) => Err(fields.unsupported("bits", "2, 3, 4, 8")),
        None => Ok(None),
    }
}

/// `group_size` as given.
#[derive(Clone, Copy)]
enum GroupSize {
    Inputs(usize),
    Column,
}

impl GroupSize {
    fn inputs(self) -> Option<usize> {
        match self {
            Self::Inputs(inputs) => Some(inputs),
            Self::Column => None,
        }
    }
}

fn group_size(fields: &Fields<'_>) -> Result<Option<GroupSize>> {
    match fields.get("group_size").and_then(serde_json::Value::as_i64) {
        Some(-1) => Ok(Some(GroupSize::Column)),
        _ => Ok(fields.size("group_size", MAX_GROUP)?.map(GroupSize::Inputs)),
    }
}

fn overrides(fields: &Fields<'_>, bits: u32, group_size: GroupSize) -> Result<Vec<GptqOverride>> {
    let Some(dynamic) = fields.object("dynamic")? else { return Ok(Vec::new()) };
    let mut overrides = Vec::new();
    for pattern in dynamic.keys().filter(|pattern| !pattern.starts_with("-:")) {
        let Some(inner) = dynamic.object(pattern)? else { continue };
        overrides.push(GptqOverride {
            pattern: pattern.strip_prefix("+:").unwrap_or(pattern).into(),
            bits: self::bits(&inner)?.unwrap_or(bits),
            group_size: self::group_size(&inner)?.unwrap_or(group_size).inputs(),
        });
    }
    Ok(overrides)
}

/// How the zeros of `module` are stored, seen by themselves: a symmetric quantizer's zero is `2^(bits - 1)` everywhere, so
/// where just that is stored, it is stored as it is, and where one less is, less one. `None` where they say nothing.
pub(super) fn seen_zeros(
    tensors: &SafetensorsSet,
    module: &str,
    config: &GptqConfig,
) -> Result<Option<ZeroFormat>> {
    let layout = Layout::read(tensors, module, config)?;
    let zeros = layout.stored_zeros(tensors, module)?;
    let centre = 1 << (layout.bits - 1);
    let are = |zero| !zeros.is_empty() && zeros.iter().all(|found| *found == zero);
    Ok(match (are(centre), are(centre - 1)) {
        (true, _) => Some(ZeroFormat::V2),
        (_, true) => Some(ZeroFormat::V1),
        _ => None,
    })
}

/// Reads the linear `module`.
///
/// Scales are stored as f16, but `-scale * zero` may need 19 bits of mantissa; kept in f32, scales and offsets give
/// `scale * (code - zero)` without any rounding. Scattered groups are sorted (stable), with the order of the inputs
/// kept; groups of unequal sizes become blocks of their greatest common divisor, with scales repeated.
pub(super) fn weight(tensors: &SafetensorsSet, module: &str, config: &GptqConfig) -> Result<PackedWeight> {
    let layout = Layout::read(tensors, module, config)?;
    let grouping = layout.grouping(tensors, module, config)?;
    let (bits, d_input, d_output) = (layout.bits, layout.d_input, layout.d_output);
    let scales_name = format!("{module}.scales");
    let stored_scales = tensors.read_f32(&scales_name)?.values;
    tensors.check_finite(&scales_name, &stored_scales)?;
    let zeros = layout.zeros(tensors, module, config.zeros.unwrap_or(ZeroFormat::V1))?;
    let (mut scales, mut offsets) = (Vec::new(), Vec::new());
    for &group in &grouping.block_groups {
        let row = group * d_output..(group + 1) * d_output;
        scales.extend_from_slice(&stored_scales[row.clone()]);
        let products = stored_scales[row.clone()].iter().zip(&zeros[row]);
        offsets.extend(products.map(|(scale, &zero)| -(scale * f32::from(zero))));
    }
    let words = read_words(tensors, &format!("{module}.qweight"))?;
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits, grid: Grid::Integer },
            block: Block { outputs: 1, inputs: grouping.block_inputs },
            scales: ScaleType::F32,
        },
        d_input,
        d_output,
        codes: layout.codes(words, grouping.input_order.as_deref()),
        scales: Scales::Plain(scales),
        offsets: Some(offsets),
        input_order: grouping.input_order,
    };
    packed.validate(module)?;
    Ok(packed)
}

/// Sizes of a linear, checked against the shapes of all its tensors.
struct Layout {
    bits: u32,
    d_input: usize,
    d_output: usize,
    groups: usize,
}

impl Layout {
    fn read(tensors: &SafetensorsSet, module: &str, config: &GptqConfig) -> Result<Self> {
        let [rows, d_output] = matrix(tensors, &format!("{module}.qweight"))?;
        let [groups, scale_columns] = matrix(tensors, &format!("{module}.scales"))?;
        let zeros_name = format!("{module}.qzeros");
        let [zero_rows, zero_columns] = matrix(tensors, &zeros_name)?;
        if scale_columns != d_output {
            let found = format!("[{groups}, {scale_columns}]");
            return Err(tensors.wrong(&format!("{module}.scales"), format!("[groups, {d_output}]"), found));
        }
        let index_length = match index_name(tensors, module)? {
            Some(name) => Some(tensors.describe(&name)?.1[0]),
            None => None,
        };
        let widths: Vec<u32> =
            std::iter::once(config.bits).chain(config.overrides.iter().map(|other| other.bits)).collect();
        let fitting = widths.iter().find_map(|&bits| {
            let d_input = index_length.unwrap_or(rows * 32 / bits as usize);
            let fits =
                holds(rows, d_input, bits) && holds(zero_columns, d_output, bits) && zero_rows == groups;
            fits.then_some((bits, d_input))
        });
        let Some((bits, d_input)) = fitting else {
            let inputs = index_length.map_or("the".into(), |length| format!("{length}"));
            return Err(tensors.wrong(
                &zeros_name,
                format!("[{groups}, {d_output} * bits / 32], with {inputs} inputs in {rows} rows of qweight, bits in {widths:?}"),
                format!("[{zero_rows}, {zero_columns}]"),
            ));
        };
        Ok(Self { bits, d_input, d_output, groups })
    }

    /// The groups of the inputs, from `g_idx` or, without it, from the configuration.
    fn grouping(&self, tensors: &SafetensorsSet, module: &str, config: &GptqConfig) -> Result<Grouping> {
        let mut sizes =
            std::iter::once(config.group_size).chain(config.overrides.iter().map(|o| o.group_size));
        let inputs_of = |size: Option<usize>| size.unwrap_or(self.d_input);
        let Some(size) = sizes.find(|&size| self.d_input.div_ceil(inputs_of(size)) == self.groups) else {
            let expected = match config.group_size {
                Some(size) => format!("{} groups of {size} inputs", self.d_input.div_ceil(size)),
                None => "one group".into(),
            };
            return Err(tensors.wrong(
                &format!("{module}.scales"),
                expected,
                format!("{} groups", self.groups),
            ));
        };
        let Some(name) = index_name(tensors, module)? else {
            if config.desc_act {
                return Err(tensors.wrong(
                    &format!("{module}.g_idx"),
                    "a tensor, as desc_act is true",
                    "none",
                ));
            }
            let index: Vec<u32> = (0..self.d_input).map(|input| (input / inputs_of(size)) as u32).collect();
            return Ok(Grouping::new(&index, self.groups));
        };
        let index = read_words(tensors, &name)?;
        if let Some(wrong) = index.iter().find(|&&group| group as usize >= self.groups) {
            return Err(tensors.wrong(
                &name,
                format!("groups in 0..{}", self.groups),
                (*wrong as i32).to_string(),
            ));
        }
        Ok(Grouping::new(&index, self.groups))
    }

    /// Zero points `[groups, out]` as stored.
    fn stored_zeros(&self, tensors: &SafetensorsSet, module: &str) -> Result<Vec<u8>> {
        let words = read_words(tensors, &format!("{module}.qzeros"))?;
        let mut zeros = vec![0; self.groups * self.d_output];
        let rows = words.chunks_exact(words.len() / self.groups);
        for (words, row) in rows.zip(zeros.chunks_exact_mut(self.d_output)) {
            // One row is one bit stream, as a column of codes is.
            unpack_column(words, 1, self.bits, 0, row);
        }
        Ok(zeros)
    }

    /// Zero points `[groups, out]`. A stored `2^bits - 1` of version 1 is a zero of 0: readers that mask after adding
    /// 1 agree, and writers that mask make it.
    fn zeros(&self, tensors: &SafetensorsSet, module: &str, format: ZeroFormat) -> Result<Vec<u8>> {
        let mut zeros = self.stored_zeros(tensors, module)?;
        if format == ZeroFormat::V1 {
            let mask = u8::MAX >> (8 - self.bits);
            zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(1) & mask);
        }
        Ok(zeros)
    }

    /// The codes in Kiln's layout: the file's, unless inputs change places or the last run is incomplete.
    fn codes(&self, words: Vec<u32>, order: Option<&[u32]>) -> Vec<u32> {
        let whole = self.d_input.is_multiple_of(32)
            && words.len() == code_rows(self.d_input, self.bits) * self.d_output;
        if order.is_none() && whole {
            return words;
        }
        sorted_codes(&words, [self.d_input, self.d_output], self.bits, order)
    }
}

/// Codes with their inputs in another order, packed again.
pub(crate) fn sorted_codes(
    words: &[u32],
    [d_input, d_output]: [usize; 2],
    bits: u32,
    order: Option<&[u32]>,
) -> Vec<u32> {
    let mut packer = CodePacker::new(d_input, d_output, bits);
    let (mut column, mut sorted) = (vec![0; d_input], vec![0; d_input]);
    for output in 0..d_output {
        unpack_column(words, d_output, bits, output, &mut column);
        match order {
            None => sorted.copy_from_slice(&column),
            Some(order) => {
                sorted.iter_mut().zip(order).for_each(|(code, &input)| *code = column[input as usize]);
            }
        }
        packer.set_column(output, &sorted);
    }
    packer.into_words()
}

/// How inputs are cut into blocks.
#[derive(Debug, PartialEq)]
pub(super) struct Grouping {
    /// Inputs of a block; `None` is the whole column.
    pub block_inputs: Option<usize>,
    /// The group of each block.
    pub block_groups: Vec<usize>,
    /// The inputs sorted by group, unless they are already.
    pub input_order: Option<Vec<u32>>,
}

impl Grouping {
    /// From the group of each input; every one is below `groups`.
    pub(crate) fn new(index: &[u32], groups: usize) -> Self {
        let mut order: Vec<u32> = (0..index.len() as u32).collect();
        order.sort_by_key(|&input| index[input as usize]);
        let mut counts = vec![0usize; groups];
        index.iter().for_each(|&group| counts[group as usize] += 1);
        let used: Vec<(usize, usize)> =
            counts.into_iter().enumerate().filter(|&(_, count)| count > 0).collect();
        // Every border between groups must be one between blocks; the last block of the column may be short.
        let borders = used.iter().rev().skip(1).map(|&(_, count)| count);
        let block_inputs = borders.reduce(gcd);
        let block_groups = used.iter().flat_map(|&(group, count)| {
            std::iter::repeat_n(group, block_inputs.map_or(1, |inputs| count.div_ceil(inputs)))
        });
        let block_groups = block_groups.collect();
        let sorted = order.is_sorted();
        Self { block_inputs, block_groups, input_order: (!sorted).then_some(order) }
    }
}

/// Whether `words` 32-bit words are what `count` codes take, in whole runs of 32 codes or not.
fn holds(words: usize, count: usize, bits: u32) -> bool {
    let exact = (count as u128 * u128::from(bits)).div_ceil(32);
    words as u128 == exact || words as u128 == count.div_ceil(32) as u128 * u128::from(bits)
}

/// The shape of a matrix that isn't empty.
pub(super) fn matrix(tensors: &SafetensorsSet, name: &str) -> Result<[usize; 2]> {
    match tensors.describe(name)?.1 {
        &[rows, columns] if rows > 0 && columns > 0 => Ok([rows, columns]),
        shape => Err(tensors.wrong(name, "two sizes above 0", format!("{shape:?}"))),
    }
}

/// The name of the module's group index, if it has one; some writers leave it empty.
fn index_name(tensors: &SafetensorsSet, module: &str) -> Result<Option<String>> {
    let name = format!("{module}.g_idx");
    if !tensors.contains(&name) {
        return Ok(None);
    }
    match tensors.describe(&name)?.1 {
        [0] => Ok(None),
        [_] => Ok(Some(name)),
        shape => Err(tensors.wrong(&name, "one size", format!("{shape:?}"))),
    }
}

/// A tensor of 32-bit integers.
pub(super) fn read_words(tensors: &SafetensorsSet, name: &str) -> Result<Vec<u32>> {
    let (dtype, _) = tensors.describe(name)?;
    if !matches!(dtype, Dtype::I32 | Dtype::U32) {
        return Err(tensors.wrong(name, "type I32", format!("type {dtype}")));
    }
    let bytes = tensors.read(name)?.bytes;
    Ok(bytes.as_chunks().0.iter().map(|&word| u32::from_le_bytes(word)).collect())
}
