//! AWQ's weights in the layout of its matrix-matrix kernels, as AutoAWQ writes them.
//!
//! A linear `P` is `P.qweight` `[in, out / 8]` (eight outputs a word), `P.qzeros` `[groups, out / 8]` in the same order,
//! and `P.scales` `[groups, out]`. A weight is `scale * (code - zero)`; zeros are stored as they are.

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::CodePacker,
};

use super::{
    gptq::{matrix, read_words},
    json::Fields,
    shards::SafetensorsSet,
};
use crate::Result;

/// Tensors beside `P.qweight`.
pub(super) const COMPANIONS: [&str; 2] = [".qzeros", ".scales"];
const BITS: u32 = 4;
/// Codes of a word.
const LANES: usize = 8;
/// Nibble `i` of a word, from the lowest, is output `ORDER[i]` of its eight.
const ORDER: [usize; LANES] = [0, 2, 4, 6, 1, 3, 5, 7];
const MAX_GROUP: usize = 1 << 24;

/// `quantization_config` of an AWQ folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AwqConfig {
    /// Inputs of a group; `None` is the whole column.
    pub group_size: Option<usize>,
}

/// Reads `quantization_config`.
pub(super) fn config(fields: &Fields<'_>) -> Result<AwqConfig> {
    fields.know(&[
        "backend",
        "do_fuse",
        "exllama_config",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "modules_to_not_convert",
        "quant_method",
    ]);
    if fields.size("bits", 64)? != Some(BITS as usize) {
        return Err(fields.unsupported("bits", "4"));
    }
    fields.refuse_unless("zero_point", true)?;
    if !matches!(fields.str("version")?, None | Some("gemm" | "GEMM")) {
        return Err(fields.unsupported("version", "gemm"));
    }
    let group_size = match fields.get("group_size").and_then(serde_json::Value::as_i64) {
        Some(-1) => None,
        _ => Some(fields.required_size("group_size", MAX_GROUP)?),
    };
    Ok(AwqConfig { group_size })
}

/// Reads the linear `module`. As with GPTQ, scales and offsets are kept in f32 so that nothing is rounded.
pub(super) fn weight(tensors: &SafetensorsSet, module: &str, config: &AwqConfig) -> Result<PackedWeight> {
    let names = [".qweight", ".scales", ".qzeros"].map(|part| format!("{module}{part}"));
    let [codes_name, scales_name, zeros_name] = &names;
    let [d_input, words] = matrix(tensors, codes_name)?;
    let [groups, d_output] = matrix(tensors, scales_name)?;
    let check = |name: &str, expected: [usize; 2], found: [usize; 2]| match expected == found {
        true => Ok(()),
        false => Err(tensors.wrong(name, format!("{expected:?}"), format!("{found:?}"))),
    };
    check(codes_name, [d_input, d_output.div_ceil(LANES)], [d_input, words])?;
    if !d_output.is_multiple_of(LANES) {
        return Err(tensors.wrong(scales_name, "outputs in multiples of 8", d_output.to_string()));
    }
    check(zeros_name, [groups, words], matrix(tensors, zeros_name)?)?;
    let inputs = config.group_size.unwrap_or(d_input).min(d_input);
    if d_input.div_ceil(inputs) != groups {
        let expected = format!("{} groups of {inputs} inputs", d_input.div_ceil(inputs));
        return Err(tensors.wrong(scales_name, expected, format!("{groups} groups")));
    }
    let scales = tensors.read_f32(scales_name)?.values;
    tensors.check_finite(scales_name, &scales)?;
    let zeros = unpack(&read_words(tensors, zeros_name)?);
    let offsets = scales.iter().zip(&zeros).map(|(scale, &zero)| -(scale * f32::from(zero))).collect();
    let by_input = unpack(&read_words(tensors, codes_name)?);
    let mut packer = CodePacker::new(d_input, d_output, BITS);
    let mut column = vec![0; d_input];
    for output in 0..d_output {
        for (input, code) in column.iter_mut().enumerate() {
            *code = by_input[input * d_output + output];
        }
        packer.set_column(output, &column);
    }
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits: BITS, grid: Grid::Integer },
            block: Block { outputs: 1, inputs: config.group_size.map(|_| inputs) },
            scales: ScaleType::F32,
        },
        d_input,
        d_output,
        codes: packer.into_words(),
        scales: Scales::Plain(scales),
        offsets: Some(offsets),
        input_order: None,
    };
    packed.validate(module)?;
    Ok(packed)
}

/// Words of eight codes each, which [`unpack`] reads.
pub(crate) fn pack(codes: &[u8]) -> Vec<u32> {
    let word = |codes: &[u8; LANES]| {
        let nibbles = ORDER.into_iter().enumerate();
        nibbles.map(|(nibble, output)| u32::from(codes[output]) << (BITS * nibble as u32)).sum()
    };
    codes.as_chunks::<LANES>().0.iter().map(word).collect()
}

/// The codes of words that hold eight outputs each, outputs in their own order.
fn unpack(words: &[u32]) -> Vec<u8> {
    let mut codes = vec![0; words.len() * LANES];
    for (word, codes) in words.iter().zip(codes.as_chunks_mut::<LANES>().0) {
        for (nibble, output) in ORDER.into_iter().enumerate() {
            codes[output] = (word >> (BITS * nibble as u32) & 15) as u8;
        }
    }
    codes
}
