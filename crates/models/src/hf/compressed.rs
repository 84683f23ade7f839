//! Weights of compressed-tensors (llm-compressor) in `pack-quantized` layout.
//!
//! A linear `P` is `P.weight_packed` (codes of one output in one bit stream, low bits first, so many words an output as its
//! inputs need), `P.weight_scale` `[out, groups]` (or one of an output, or one in all), `P.weight_shape`, and for
//! asymmetric grids `P.weight_zero_point`, packed along the outputs, and where groups follow activations `P.weight_g_idx`, the
//! group of each input. Codes and zero points are stored plus `2^(bits - 1)`.
//! Source: compressed-tensors' layout.

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::code_rows,
    safetensors_file::Dtype,
};

use super::{
    Quantization,
    fp8::Fp8Config,
    gptq::{Grouping, matrix, read_words, sorted_codes},
    json::Fields,
    shards::SafetensorsSet,
};
use crate::{Result, source::transposed};

/// Behind a linear's name in that of its codes.
pub(super) const CODES: &str = ".weight_packed";
/// Tensors beside the codes.
pub(super) const COMPANIONS: [&str; 4] =
    [".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"];
const WIDTHS: [usize; 6] = [2, 3, 4, 5, 6, 8];

/// `quantization_config` of compressed-tensors: the widths of its groups of modules. Which of them a module has is seen by
/// its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompressedConfig {
    /// Widths of codes, each once.
    pub bits: Vec<u32>,
}

/// Reads `quantization_config`.
pub(super) fn config(fields: &Fields<'_>) -> Result<Quantization> {
    fields.know(&[
        "global_compression_ratio",
        "ignore",
        "quantization_status",
        "version",
        "sparsity_config",
        "transform_config",
    ]);
    fields.refuse_unless("kv_cache_scheme", serde_json::Value::Null)?;
    let format = fields.str("format")?;
    let groups = fields.object("config_groups")?.ok_or_else(|| fields.wrong("config_groups", "an object"))?;
    let mut bits = Vec::new();
    for name in groups.keys() {
        let Some(group) = groups.object(name)? else { continue };
        group.know(&["targets", "format", "output_activations"]);
        let weights = group.object("weights")?.ok_or_else(|| group.wrong("weights", "an object"))?;
        weights.know(&[
            "actorder",
            "block_structure",
            "dynamic",
            "group_size",
            "observer",
            "observer_kwargs",
            "scale_dtype",
            "strategy",
            "symmetric",
            "zp_dtype",
        ]);
        match (format, weights.str("type")?) {
            // Activations would be rounded too; weights are the same.
            (Some("float-quantized"), Some("float")) => {
                group.know(&["input_activations"]);
                if weights.size("num_bits", 64)? != Some(8) {
                    return Err(weights.unsupported("num_bits", "8"));
                }
            }
            (Some("pack-quantized"), Some("int") | None) => {
                group.refuse_unless("input_activations", serde_json::Value::Null)?;
                let width = weights.required_size("num_bits", 64)?;
                if !WIDTHS.contains(&width) {
                    return Err(weights.unsupported("num_bits", "2, 3, 4, 5, 6, 8"));
                }
                if !bits.contains(&(width as u32)) {
                    bits.push(width as u32);
                }
            }
            (Some("pack-quantized" | "float-quantized"), _) => {
                return Err(weights.unsupported("type", "int in pack-quantized, float in float-quantized"));
            }
            _ => return Err(fields.unsupported("format", "pack-quantized, float-quantized")),
        }
    }
    match (format, bits.is_empty()) {
        (Some("float-quantized"), _) => Ok(Quantization::Fp8(Fp8Config::Outputs)),
        (_, false) => Ok(Quantization::CompressedTensors(CompressedConfig { bits })),
        _ => Err(fields.wrong("config_groups", "at least one group")),
    }
}

/// Reads the linear `module`. Scales keep their type where the grid is symmetric; else they and the offsets are f32, so that
/// nothing is rounded.
pub(super) fn weight(
    tensors: &SafetensorsSet,
    module: &str,
    config: &CompressedConfig,
) -> Result<PackedWeight> {
    let name = |part: &str| format!("{module}{part}");
    let (codes_name, scales_name, zeros_name) = (name(CODES), name(COMPANIONS[0]), name(COMPANIONS[2]));
    let [d_output, words] = matrix(tensors, &codes_name)?;
    let shape = shape(tensors, &name(COMPANIONS[1]))?;
    let d_input = shape[1];
    let fits =
        |bits: &&u32| d_input.checked_mul(**bits as usize).is_some_and(|all| all.div_ceil(32) == words);
    let bits = match config.bits.iter().find(fits) {
        Some(bits) if shape[0] == d_output => *bits,
        _ => {
            let expected = format!("{shape:?}, as weight_shape says, in codes of {:?} bits", config.bits);
            return Err(tensors.wrong(&codes_name, expected, format!("[{d_output}, {words}]")));
        }
    };
    let (kind, stored) = tensors.describe(&scales_name)?;
    let groups = match *stored {
        [] | [1] | [1, 1] => 1,
        [rows] if rows == d_output => 1,
        [rows, groups] if rows == d_output && groups > 0 && d_input.is_multiple_of(groups) => groups,
        _ => {
            let expected = format!("[{d_output}, groups of the {d_input} inputs]");
            return Err(tensors.wrong(&scales_name, expected, format!("{stored:?}")));
        }
    };
    let values = tensors.read_f32(&scales_name)?.values;
    tensors.check_finite(&scales_name, &values)?;
    let scales = match values.as_slice() {
        [one] => vec![*one; d_output],
        values => transposed(values, d_output, groups),
    };
    let offsets = if tensors.contains(&zeros_name) {
        let zeros = zero_points(tensors, &zeros_name, [d_output, groups], bits)?;
        Some(scales.iter().zip(zeros).map(|(scale, zero)| -(scale * f32::from(zero))).collect())
    } else {
        None
    };
    let scale_type = match (kind, &offsets) {
        (Dtype::F16, None) => ScaleType::F16,
        (Dtype::BF16, None) => ScaleType::Bf16,
        _ => ScaleType::F32,
    };
    let mut codes = transposed(&read_words(tensors, &codes_name)?, d_output, words);
    codes.resize(code_rows(d_input, bits) * d_output, 0);
    let mut inputs = (groups > 1).then_some(d_input / groups);
    let (mut scales, mut offsets, mut input_order) = (scales, offsets, None);
    let index_name = name(COMPANIONS[3]);
    if tensors.contains(&index_name) {
        let index = read_words(tensors, &index_name)?;
        if index.len() != d_input || index.iter().any(|group| *group as usize >= groups) {
            let expected = format!("for each of {d_input} inputs a group of {groups}");
            return Err(tensors.wrong(&index_name, expected, "others"));
        }
        let grouping = Grouping::new(&index, groups);
        let of_blocks = |values: &[f32]| -> Vec<f32> {
            let rows = grouping.block_groups.iter();
            rows.flat_map(|group| &values[group * d_output..][..d_output]).copied().collect()
        };
        (scales, offsets) = (of_blocks(&scales), offsets.as_deref().map(of_blocks));
        codes = sorted_codes(&codes, [d_input, d_output], bits, grouping.input_order.as_deref());
        (inputs, input_order) = (grouping.block_inputs, grouping.input_order);
    }
    let grid = if offsets.is_some() { Grid::Integer } else { Grid::Symmetric };
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits, grid },
            block: Block { outputs: 1, inputs },
            scales: scale_type,
        },
        d_input,
        d_output,
        codes,
        scales: Scales::Plain(scales),
        offsets,
        input_order,
    };
    packed.validate(module)?;
    Ok(packed)
}

/// The sizes that `P.weight_shape` holds.
fn shape(tensors: &SafetensorsSet, name: &str) -> Result<[usize; 2]> {
    let tensor = tensors.read(name)?;
    let size = match tensor.dtype {
        Dtype::I64 => 8,
        Dtype::I32 => 4,
        other => return Err(tensors.wrong(name, "type I64", format!("type {other}"))),
    };
    let sizes: Vec<usize> = tensor
        .bytes
        .chunks_exact(size)
        .filter_map(|bytes| {
            let mut all = [0; 8];
            all[..size].copy_from_slice(bytes);
            usize::try_from(u64::from_le_bytes(all)).ok()
        })
        .collect();
    match sizes.as_slice() {
        &[outputs, inputs] if outputs > 0 && inputs > 0 => Ok([outputs, inputs]),
        _ => Err(tensors.wrong(name, "two sizes above 0", format!("{sizes:?}"))),
    }
}

/// Zero points `[groups, out]`, plus `2^(bits - 1)` as the codes are.
fn zero_points(
    tensors: &SafetensorsSet,
    name: &str,
    [d_output, groups]: [usize; 2],
    bits: u32,
) -> Result<Vec<u8>> {
    let expected = [(d_output * bits as usize).div_ceil(32), groups];
    let found = matrix(tensors, name)?;
    if found != expected {
        return Err(tensors.wrong(name, format!("{expected:?}"), format!("{found:?}")));
    }
    let words = read_words(tensors, name)?;
    let mut zeros = vec![0; groups * d_output];
    for (group, zeros) in zeros.chunks_exact_mut(d_output).enumerate() {
        for (output, zero) in zeros.iter_mut().enumerate() {
            let bit = output * bits as usize;
            let word = |at: usize| words.get(at * groups + group).copied().map_or(0, u64::from);
            let both = word(bit / 32) | word(bit / 32 + 1) << 32;
            *zero = (both >> (bit % 32) & ((1 << bits) - 1)) as u8;
        }
    }
    Ok(zeros)
}
