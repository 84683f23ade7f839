//! bitsandbytes' 4-bit weights, and its 8-bit ones.
//!
//! A weight `[out, in]` is flattened row by row and cut into blocks of `blocksize`, which may cross rows; two codes
//! share a byte, the first in the **high** nibble. Beside the bytes `W` stand `W.absmax` (scales; with double
//! quantization 8-bit codes under `W.nested_absmax`), `W.quant_map` (the levels) and
//! `W.quant_state.bitsandbytes__TYPE`, the bytes of a JSON object. Source: bitsandbytes `functional.py`, `QuantState`.

use kiln_quant_core::{
    Block, Codebook, DoubleScales, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value,
    packing::CodePacker, safetensors_file::Dtype,
};
use serde_json::Map;

use super::{Quantization, gcd, gptq::matrix, json::Fields, shards::SafetensorsSet};
use crate::{Error, Result};

/// Between a weight's name and its type in the name of its state.
pub(super) const STATE_INFIX: &str = ".quant_state.bitsandbytes__";
/// Tensors beside a weight, apart from its state.
pub(super) const COMPANIONS: [&str; 4] = [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"];

/// Longest JSON state; real ones have under 200 bytes.
const MAX_STATE_BYTES: usize = 1 << 16;
const MAX_BLOCK: usize = 1 << 20;
/// Codes of 8-bit scales under one nested scale, unless the state says otherwise.
const NESTED_BLOCK: usize = 256;

/// Reads `quantization_config`.
pub(super) fn config(fields: &Fields<'_>) -> Result<Quantization> {
    fields.know(&[
        "_load_in_4bit",
        "_load_in_8bit",
        "bnb_4bit_compute_dtype",
        // The bytes are the same whatever type they are stored as.
        "bnb_4bit_quant_storage",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "llm_int8_skip_modules",
        "llm_int8_threshold",
    ]);
    if fields.bool("load_in_8bit")?.unwrap_or(false) {
        fields.know(&["load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"]);
        return Ok(Quantization::BitsAndBytesInt8);
    }
    fields.refuse_unless("load_in_4bit", true)?;
    let codebook = match fields.str("bnb_4bit_quant_type")? {
        None | Some("fp4") => Codebook::Fp4,
        Some("nf4") => Codebook::Nf4,
        _ => return Err(fields.unsupported("bnb_4bit_quant_type", "nf4, fp4")),
    };
    let double = fields.bool("bnb_4bit_use_double_quant")?.unwrap_or(false);
    Ok(Quantization::BitsAndBytes { codebook, double })
}

/// Tensors beside an 8-bit weight: the largest magnitude of each output, and how the weight is laid out.
pub(super) const INT8_COMPANIONS: [&str; 2] = [".SCB", ".weight_format"];

/// Reads the 8-bit linear `module`: signed codes `[out, in]`, of which 127 stands for `P.SCB`.
pub(super) fn int8_weight(tensors: &SafetensorsSet, module: &str) -> Result<PackedWeight> {
    let (name, scales_name) = (format!("{module}.weight"), format!("{module}{}", INT8_COMPANIONS[0]));
    let [d_output, d_input] = matrix(tensors, &name)?;
    let format = format!("{module}{}", INT8_COMPANIONS[1]);
    if tensors.contains(&format) && tensors.read(&format)?.bytes.iter().any(|byte| *byte != 0) {
        return Err(tensors.wrong(&format, "row-major weights (0)", "another layout"));
    }
    let largest = floats(tensors, &scales_name, d_output)?;
    let bytes = tensors.read(&name)?.bytes;
    let mut packer = CodePacker::new(d_input, d_output, 8);
    for (output, row) in bytes.chunks_exact(d_input).enumerate() {
        // A signed byte plus 128 is the byte with its top bit turned.
        packer.set_column(output, &row.iter().map(|byte| byte ^ 0x80).collect::<Vec<_>>());
    }
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits: 8, grid: Grid::Symmetric },
            block: Block { outputs: 1, inputs: None },
            scales: ScaleType::F32,
        },
        d_input,
        d_output,
        codes: packer.into_words(),
        scales: Scales::Plain(largest.into_iter().map(|largest| largest / 127.0).collect()),
        offsets: None,
        input_order: None,
    };
    packed.validate(&name)?;
    Ok(packed)
}

/// What the JSON state of a weight says.
struct State {
    codebook: Codebook,
    blocksize: usize,
    d_output: usize,
    d_input: usize,
    nested: Option<Nested>,
}

struct Nested {
    blocksize: usize,
    offset: f32,
}

impl State {
    fn read(tensors: &SafetensorsSet, weight: &str) -> Result<Self> {
        let prefix = format!("{weight}{STATE_INFIX}");
        let mut names = tensors.names().filter(|name| name.starts_with(&prefix));
        let name = match (names.next(), names.next()) {
            (Some(name), None) => name,
            (None, _) => return Err(tensors.wrong(weight, format!("{prefix}nf4 or {prefix}fp4"), "neither")),
            (Some(_), Some(second)) => return Err(tensors.wrong(second, "one state of a weight", "two")),
        };
        let (dtype, shape) = tensors.describe(name)?;
        if dtype != Dtype::U8 || shape.len() != 1 || shape[0] > MAX_STATE_BYTES {
            let expected = format!("at most {MAX_STATE_BYTES} bytes of JSON");
            return Err(tensors.wrong(name, expected, format!("{dtype} {shape:?}")));
        }
        let object: Map<String, serde_json::Value> = serde_json::from_slice(&tensors.read(name)?.bytes)
            .map_err(|error| tensors.wrong(name, "a JSON object", error.to_string()))?;
        let fields = Fields::new(tensors.file_of(name)?.path(), &format!("{name}."), &object);
        let state = Self::parse(&fields)?;
        if name.strip_prefix(&prefix) != Some(state.codebook.name()) {
            return Err(fields.wrong("quant_type", "the type in the tensor's name"));
        }
        Ok(state)
    }

    fn parse(fields: &Fields<'_>) -> Result<Self> {
        let codebook = match fields.str("quant_type")? {
            Some("nf4") => Codebook::Nf4,
            Some("fp4") => Codebook::Fp4,
            _ => return Err(fields.unsupported("quant_type", "nf4, fp4")),
        };
        // At most 32 bits each, so that products can't overflow.
        let size = |size: &serde_json::Value| Some(u32::try_from(size.as_u64()?).ok()? as usize);
        let shape: Option<Vec<usize>> =
            fields.get("shape").and_then(|shape| shape.as_array()?.iter().map(size).collect());
        let Some(&[d_output, d_input]) = shape.as_deref() else {
            return Err(fields.wrong("shape", "two sizes, [out, in]"));
        };
        let nested = match fields.f64("nested_offset")? {
            None => None,
            Some(offset) => {
                fields.refuse_unless("nested_dtype", "float32")?;
                let blocksize = block_size(fields, "nested_blocksize")?.unwrap_or(NESTED_BLOCK);
                Some(Nested { blocksize, offset: offset as f32 })
            }
        };
        let blocksize = block_size(fields, "blocksize")?
            .ok_or_else(|| fields.wrong("blocksize", "the size of a block"))?;
        Ok(Self { codebook, blocksize, d_output, d_input, nested })
    }
}

fn block_size(fields: &Fields<'_>, key: &str) -> Result<Option<usize>> {
    match fields.size(key, MAX_BLOCK)? {
        Some(size) if !size.is_power_of_two() => Err(fields.wrong(key, "a power of two")),
        size => Ok(size),
    }
}

/// Reads the weight `weight` (`P.weight`).
///
/// Where rows are whole blocks, blocks are kept, double-quantized scales too. Where blocks cross rows, a block along the
/// input becomes `gcd(blocksize, in)` inputs, the largest piece that lies in one flat block of every row, and scales are
/// repeated; repeated 8-bit scales would have another flat order, so those are decoded to f32.
pub(super) fn weight(tensors: &SafetensorsSet, weight: &str) -> Result<PackedWeight> {
    let state = State::read(tensors, weight)?;
    let (d_output, d_input) = (state.d_output, state.d_input);
    let codes = read_codes(tensors, weight, &state)?;
    check_levels(tensors, weight, state.codebook)?;
    let blocks = (d_output * d_input).div_ceil(state.blocksize);
    let stored = read_scales(tensors, weight, &state, blocks)?;
    let (inputs, scales) = if d_input.is_multiple_of(state.blocksize) {
        let scales = match stored {
            Absmax::Plain(flat) => Scales::Plain(by_block_row(&flat, d_input / state.blocksize, d_output)),
            Absmax::Double(double) => Scales::Double(double),
        };
        (state.blocksize, scales)
    } else {
        let flat = match stored {
            Absmax::Plain(flat) => flat,
            Absmax::Double(double) => double.decode(),
        };
        let inputs = gcd(state.blocksize, d_input);
        let pieces: Vec<f32> = (0..d_output * d_input)
            .step_by(inputs)
            .map(|flat_index| flat[flat_index / state.blocksize])
            .collect();
        (inputs, Scales::Plain(by_block_row(&pieces, d_input / inputs, d_output)))
    };
    let scale_type = match scales {
        Scales::Double(_) => ScaleType::Double,
        _ => ScaleType::F32,
    };
    let scheme = QuantScheme {
        value: Value::Codebook(state.codebook),
        block: Block::group(inputs),
        scales: scale_type,
    };
    let packed = PackedWeight { scheme, d_input, d_output, codes, scales, offsets: None, input_order: None };
    packed.validate(weight)?;
    Ok(packed)
}

/// The nibbles, repacked by output.
fn read_codes(tensors: &SafetensorsSet, weight: &str, state: &State) -> Result<Vec<u32>> {
    let (d_output, d_input) = (state.d_output, state.d_input);
    let (dtype, shape) = tensors.describe(weight)?;
    let bits = shape.iter().product::<usize>() * dtype.bitsize();
    let expected = (d_output as u64 * d_input as u64).div_ceil(2);
    if expected == 0 || bits as u64 / 8 != expected {
        let expected = format!("{expected} bytes, more than none, for a weight of [{d_output}, {d_input}]");
        return Err(tensors.wrong(weight, expected, format!("{dtype} {shape:?}")));
    }
    let bytes = tensors.read(weight)?.bytes;
    let mut packer = CodePacker::new(d_input, d_output, state.codebook.bits());
    let mut row = vec![0; d_input];
    for output in 0..d_output {
        for (flat, code) in (output * d_input..).zip(&mut row) {
            let byte = bytes[flat / 2];
            *code = if flat % 2 == 0 { byte >> 4 } else { byte & 0xF };
        }
        packer.set_column(output, &row);
    }
    Ok(packer.into_words())
}

/// The file's levels must be the codebook's: Kiln stores none.
fn check_levels(tensors: &SafetensorsSet, weight: &str, codebook: Codebook) -> Result<()> {
    let name = format!("{weight}.quant_map");
    let map = floats(tensors, &name, codebook.levels().len())?;
    match map.iter().zip(codebook.levels()).position(|(found, level)| found != level) {
        None => Ok(()),
        Some(code) => Err(Error::Unsupported {
            path: tensors.file_of(&name)?.path().into(),
            field: name,
            found: format!("level {} for code {code}", map[code]),
            supported: format!("{} of the codebook {}", codebook.levels()[code], codebook.name()),
        }),
    }
}

/// One scale per flat block.
enum Absmax {
    Plain(Vec<f32>),
    Double(DoubleScales),
}

fn read_scales(tensors: &SafetensorsSet, weight: &str, state: &State, blocks: usize) -> Result<Absmax> {
    let name = format!("{weight}.absmax");
    let Some(nested) = &state.nested else {
        return Ok(Absmax::Plain(floats(tensors, &name, blocks)?));
    };
    let (dtype, shape) = tensors.describe(&name)?;
    if dtype != Dtype::U8 || shape.iter().product::<usize>() != blocks {
        let found = format!("{dtype} {shape:?}");
        return Err(tensors.wrong(&name, format!("U8 [{blocks}] for double-quantized scales"), found));
    }
    let codes = tensors.read(&name)?.bytes;
    let scales = floats(tensors, &format!("{weight}.nested_absmax"), blocks.div_ceil(nested.blocksize))?;
    let map = floats(tensors, &format!("{weight}.nested_quant_map"), 256)?;
    if nested.blocksize == kiln_quant_core::DOUBLE_BLOCK && map == dynamic_map() {
        return Ok(Absmax::Double(DoubleScales { codes, nested: scales, offset: nested.offset }));
    }
    let decode =
        |(i, code): (usize, &u8)| map[usize::from(*code)] * scales[i / nested.blocksize] + nested.offset;
    Ok(Absmax::Plain(codes.iter().enumerate().map(decode).collect()))
}

/// The map that [`DoubleScales`] implies.
fn dynamic_map() -> Vec<f32> {
    DoubleScales { codes: (0..=255).collect(), nested: vec![1.0], offset: 0.0 }.decode()
}

/// `count` finite values, whatever float type stores them.
fn floats(tensors: &SafetensorsSet, name: &str, count: usize) -> Result<Vec<f32>> {
    let (_, shape) = tensors.describe(name)?;
    if shape.iter().product::<usize>() != count {
        return Err(tensors.wrong(name, format!("{count} values"), format!("{shape:?}")));
    }
    let values = tensors.read_f32(name)?.values;
    tensors.check_finite(name, &values)?;
    Ok(values)
}

/// Scales in flat (output-major) order to `[rows, columns]`, a row per block along the input.
fn by_block_row(flat: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| (0..columns).map(move |column| flat[column * rows + row])).collect()
}
