//! Weights in 8-bit floats (E4M3) with scales beside them, read to dense: each block of a weight times its scale.
//!
//! Fine-grained FP8 (`quant_method` "fp8", as DeepSeek-V3 and Qwen 3 publish it) has `P.weight_scale_inv`
//! `[ceil(out / rows), ceil(in / columns)]` beside `P.weight`; compressed-tensors' `float-quantized` has `P.weight_scale` for
//! each output (`[out, 1]`) or for all (`[1]`). Source: transformers' and compressed-tensors' layouts.

use kiln_quant_core::safetensors_file::Dtype;

use super::{gptq::matrix, json::Fields, shards::SafetensorsSet};
use crate::{Result, source::DenseTensor};

const MAX_BLOCK: usize = 1 << 20;
/// What fine-grained files have where they don't say.
const USUAL_BLOCK: usize = 128;

/// How 8-bit floats are scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fp8Config {
    /// A scale for each block of so many outputs and inputs.
    Blocks([usize; 2]),
    /// A scale for each output, or for the whole weight.
    Outputs,
}

impl Fp8Config {
    /// What a scale's name has behind the weight's.
    pub(super) const fn scale(self) -> &'static str {
        match self {
            Self::Blocks(_) => "_scale_inv",
            Self::Outputs => "_scale",
        }
    }
}

/// Reads `quantization_config` of fine-grained FP8.
pub(super) fn config(fields: &Fields<'_>) -> Result<Fp8Config> {
    // Activations are not quantized here.
    fields.know(&["activation_scheme", "fmt", "modules_to_not_convert", "ignored_layers", "scale_fmt"]);
    let Some(block) = fields.get("weight_block_size").filter(|block| !block.is_null()) else {
        return Ok(Fp8Config::Blocks([USUAL_BLOCK; 2]));
    };
    let size = |index: usize| {
        let size = block.get(index).and_then(serde_json::Value::as_u64);
        size.and_then(|size| usize::try_from(size).ok()).filter(|size| (1..=MAX_BLOCK).contains(size))
    };
    match (size(0), size(1), block.get(2)) {
        (Some(rows), Some(columns), None) => Ok(Fp8Config::Blocks([rows, columns])),
        _ => Err(fields.wrong("weight_block_size", "two sizes")),
    }
}

/// Whether `name` is a weight in 8-bit floats.
pub(super) fn is_one(tensors: &SafetensorsSet, name: &str) -> bool {
    name.ends_with(".weight") && tensors.describe(name).is_ok_and(|(dtype, _)| dtype == Dtype::F8_E4M3)
}

/// Reads the weight `name`.
pub(super) fn weight(tensors: &SafetensorsSet, name: &str, config: Fp8Config) -> Result<DenseTensor> {
    let [outputs, inputs] = matrix(tensors, name)?;
    let scale_name = format!("{name}{}", config.scale());
    if !tensors.contains(&scale_name) {
        let expected = "the scales of an 8-bit float, as quantization_config's quant_method (fp8) says";
        return Err(tensors.wrong(&scale_name, expected, "no such tensor"));
    }
    let scales = tensors.read_f32(&scale_name)?;
    tensors.check_finite(&scale_name, &scales.values)?;
    let count = scales.values.len();
    let [rows, columns] = match config {
        Fp8Config::Blocks(block) => block,
        Fp8Config::Outputs if count == 1 => [outputs, inputs],
        Fp8Config::Outputs => [1, inputs],
    };
    let across = inputs.div_ceil(columns);
    let expected = [outputs.div_ceil(rows), across];
    let fits = match config {
        Fp8Config::Blocks(_) => scales.shape == expected,
        Fp8Config::Outputs => count == expected[0],
    };
    if !fits {
        return Err(tensors.wrong(&scale_name, format!("{expected:?}"), format!("{:?}", scales.shape)));
    }
    let bytes = tensors.read(name)?.bytes;
    let floats: [f32; 256] = std::array::from_fn(|byte| e4m3(byte as u8));
    let value = |(at, byte): (usize, &u8)| {
        scales.values[at / inputs / rows * across + at % inputs / columns] * floats[usize::from(*byte)]
    };
    Ok(DenseTensor { shape: vec![outputs, inputs], values: bytes.iter().enumerate().map(value).collect() })
}

/// An 8-bit float: sign, 4 bits of exponent, 3 of mantissa; no infinities. Source: OCP 8-bit Floating Point, E4M3.
fn e4m3(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f32::from(byte & 7));
    let magnitude = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if byte >> 7 == 1 { -magnitude } else { magnitude }
}
