//! MLX's affine weights, as mlx-lm writes them.
//!
//! A linear or embedding `P` is `P.weight` U32 `[out, in * bits / 32]` (a row of codes is one bit stream, low bits
//! first), `P.scales` and `P.biases` `[out, in / group]`. A weight is `scale * code + bias`. Bits and group stand in
//! `quantization` of `config.json`, for all modules or by path.

use std::collections::BTreeMap;

use kiln_quant_core::{
    Block, Grid, PackedWeight, QuantScheme, ScaleType, Scales, Value, packing::RUN, safetensors_file::Dtype,
};

use super::{gptq::matrix, json::Fields, shards::SafetensorsSet};
use crate::{Result, source::transposed};

/// Tensors beside `P.weight`.
pub(super) const COMPANIONS: [&str; 2] = [".scales", ".biases"];
const MAX_GROUP: usize = 1 << 24;

/// `quantization` of an MLX folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlxConfig {
    /// Bits and group of modules that aren't named.
    pub default: MlxLayout,
    /// Those of modules that are; `None` is dense.
    pub overrides: BTreeMap<String, Option<MlxLayout>>,
}

/// Bits and group of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MlxLayout {
    /// Width of the codes: 2, 3, 4, 5, 6 or 8.
    pub bits: u32,
    /// Inputs of a group, a multiple of 32.
    pub group_size: usize,
}

/// Reads `quantization`.
pub(super) fn config(fields: &Fields<'_>) -> Result<MlxConfig> {
    const OWN: [&str; 3] = ["group_size", "bits", "mode"];
    let default = layout(fields)?;
    let mut overrides = BTreeMap::new();
    for path in fields.keys().filter(|key| !OWN.contains(key)) {
        let layout = match fields.get(path) {
            Some(serde_json::Value::Bool(quantized)) => quantized.then_some(default),
            _ => match fields.object(path)? {
                Some(inner) => Some(layout(&inner)?),
                None => None,
            },
        };
        overrides.insert(path.to_owned(), layout);
    }
    Ok(MlxConfig { default, overrides })
}

fn layout(fields: &Fields<'_>) -> Result<MlxLayout> {
    fields.refuse_unless("mode", "affine")?;
    let bits = match fields.required_size("bits", 64)? {
        bits @ (2 | 3 | 4 | 5 | 6 | 8) => bits as u32,
        _ => return Err(fields.unsupported("bits", "2, 3, 4, 5, 6, 8")),
    };
    let group_size = fields.required_size("group_size", MAX_GROUP)?;
    if !group_size.is_multiple_of(RUN) {
        return Err(fields.unsupported("group_size", "32, 64, 128"));
    }
    Ok(MlxLayout { bits, group_size })
}

/// Reads the weight of `module`.
pub(super) fn weight(tensors: &SafetensorsSet, module: &str, config: &MlxConfig) -> Result<PackedWeight> {
    let names = [".weight", ".scales", ".biases"].map(|part| format!("{module}{part}"));
    let [codes_name, scales_name, biases_name] = &names;
    let layout = config.overrides.get(module).copied().unwrap_or(Some(config.default));
    let Some(MlxLayout { bits, group_size }) = layout else {
        return Err(tensors.wrong(scales_name, "none, as quantization says false", "a tensor"));
    };
    let [d_output, words] = matrix(tensors, codes_name)?;
    let [rows, groups] = matrix(tensors, scales_name)?;
    let inputs = groups.checked_mul(group_size);
    let expected = inputs.and_then(|inputs| (inputs / RUN).checked_mul(bits as usize));
    if expected != Some(words) || rows != d_output {
        let expected =
            format!("[{d_output}, inputs / {group_size}] beside {words} words of {bits}-bit codes");
        return Err(tensors.wrong(scales_name, expected, format!("[{rows}, {groups}]")));
    }
    let biases_shape = matrix(tensors, biases_name)?;
    let (kind, biases_kind) = (tensors.describe(scales_name)?.0, tensors.describe(biases_name)?.0);
    if biases_shape != [rows, groups] || biases_kind != kind {
        let found = format!("{biases_kind} {biases_shape:?}");
        return Err(tensors.wrong(biases_name, format!("{kind} [{rows}, {groups}]"), found));
    }
    let scale_type = match kind {
        Dtype::F32 => ScaleType::F32,
        Dtype::F16 => ScaleType::F16,
        Dtype::BF16 => ScaleType::Bf16,
        other => return Err(tensors.wrong(scales_name, "F32, F16 or BF16", other.to_string())),
    };
    let floats = |name: &str| -> Result<Vec<f32>> {
        let values = tensors.read_f32(name)?.values;
        tensors.check_finite(name, &values)?;
        Ok(transposed(&values, rows, groups))
    };
    let packed = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits, grid: Grid::Float },
            block: Block::group(group_size),
            scales: scale_type,
        },
        d_input: groups * group_size,
        d_output,
        codes: transposed(&tensors.read_u32(codes_name)?, d_output, words),
        scales: Scales::Plain(floats(scales_name)?),
        offsets: Some(floats(biases_name)?),
        input_order: None,
    };
    packed.validate(module)?;
    Ok(packed)
}
