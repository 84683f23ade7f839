//! bitsandbytes' 4-bit weights.

use std::path::Path;

use kiln_quant_core::{
    Codebook, DOUBLE_BLOCK, DoubleScales, PackedWeight, QuantLinear, QuantScheme, ScaleType, Scales, Scheme,
    Value, packing::unpack_column,
};
use serde_json::json;

use super::{
    ExportOptions, ExportReport, Fallback, FloatType, Format,
    config::config_json,
    folder::{Converted, Data, FolderExport, Part},
    item::{self, Host, Item},
    report::Written,
};
use crate::{Checkpoint, Decoder, Result, Slots, config::TensorRole, source::transposed};

/// Values under one scale that bitsandbytes has kernels for.
const BLOCKS: std::ops::RangeInclusive<usize> = 64..=4096;

/// Writes `model` as bitsandbytes saves it: NF4 and FP4 weights code by code, scales in f32 or double-quantized as the
/// model has them. All values stay as they are. Embedding and head are written dense in `options.float`.
///
/// Held are groups of 64 to 4096 inputs (a power of two) that divide the row.
///
/// # Errors
/// As [`export_hf`](super::export_hf), and [`Error::Export`](crate::Error::Export) naming a packed linear that bitsandbytes can't hold, unless
/// `options.fallback` writes it dense.
pub fn export_bitsandbytes(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let items = item::items(model)?;
    let mut config = config_json(model.config(), source.special_tokens(), options.float)?;
    let (mut schemes, mut dense) = (Vec::new(), vec!["lm_head".to_owned()]);
    for item in items.iter().filter(|item| item.role == TensorRole::Linear) {
        match check(item) {
            Err(error) if options.fallback == Fallback::Refuse => return Err(error),
            Ok(Some(scheme)) => schemes.push(scheme),
            _ => dense.push(item.path.clone()),
        }
    }
    // Linears too, where transformers has them; routers that are none there are passed over by it.
    let plain = model.matrices().into_iter().map(|(name, _)| name.trim_end_matches(".weight").to_owned());
    dense.extend(plain.chain(model.dense_slots()));
    if let Some((codebook, _)) = schemes.first() {
        let double = schemes.iter().any(|(_, scheme)| scheme.scales == ScaleType::Double);
        config.insert("quantization_config".into(), quantization(*codebook, double, &dense, options.float));
    }
    let export = FolderExport {
        folder: folder.as_ref(),
        source,
        items: &items,
        config,
        metadata: "pt",
        max_shard_bytes: options.max_shard_bytes,
        json: Vec::new(),
    };
    export.write(|item, host| match host {
        Host::Packed(weight) if item.role == TensorRole::Linear => match check(item) {
            Ok(Some((codebook, _))) => packed(item, weight, codebook, options.float),
            Ok(None) => Converted::dense(Format::BitsAndBytes, item, host, options.float),
            Err(error) => Converted::fallback(Format::BitsAndBytes, item, host, options.float, &error),
        },
        host => Converted::dense(Format::BitsAndBytes, item, host, options.float),
    })
}

/// The codebook of a linear that can be written; `None` for a dense one.
fn check(item: &Item) -> Result<Option<(Codebook, QuantScheme)>> {
    let Scheme::Packed(scheme) = item.scheme() else { return Ok(None) };
    let refuse =
        |expected: String| Err(Format::BitsAndBytes.refuse(&item.name(), expected, scheme.to_string()));
    let codebook = match scheme.value {
        Value::Codebook(codebook @ (Codebook::Nf4 | Codebook::Fp4)) => codebook,
        _ => return refuse("NF4 or FP4".into()),
    };
    if scheme.scales.integer_bits().is_some() {
        return refuse("scales as floats, or double-quantized".into());
    }
    let d_input = item.shape()[1];
    let inputs = scheme.block.inputs_of(d_input);
    let fits = BLOCKS.contains(&inputs) && inputs.is_power_of_two() && d_input.is_multiple_of(inputs);
    if fits && scheme.block.outputs == 1 && !item.is_permuted() {
        Ok(Some((codebook, scheme)))
    } else {
        refuse(format!(
            "groups of 64, 128, .. or 4096 inputs in their own order, which divide a row of {d_input}"
        ))
    }
}

fn quantization(codebook: Codebook, double: bool, dense: &[String], float: FloatType) -> serde_json::Value {
    json!({
        "quant_method": "bitsandbytes",
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": codebook.name(),
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": float.name(),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_enable_fp32_cpu_offload": false,
    })
}

fn packed(item: &Item, weight: &PackedWeight, codebook: Codebook, float: FloatType) -> Result<Converted> {
    let name = item.name();
    let (d_input, d_output) = (weight.d_input, weight.d_output);
    let block = weight.scheme.block.inputs_of(d_input);
    let mut state = json!({
        "quant_type": codebook.name(),
        "blocksize": block,
        "dtype": float.name(),
        "shape": [d_output, d_input],
    });
    let part =
        |suffix: &str, shape: Vec<usize>, data: Data| Part { name: format!("{name}{suffix}"), shape, data };
    let floats = |values: Vec<f32>| Data::Float(FloatType::F32, values);
    let bytes = codes(weight);
    let mut parts = vec![
        part("", vec![bytes.len(), 1], Data::U8(bytes)),
        part(".quant_map", vec![codebook.levels().len()], floats(codebook.levels().to_vec())),
    ];
    let scales = match &weight.scales {
        Scales::Super(_) => unreachable!("`check` refuses the scheme"),
        Scales::Plain(scales) => {
            // Flat order: the blocks of a row follow each other.
            let absmax = transposed(scales, d_input / block, d_output);
            parts.push(part(".absmax", vec![absmax.len()], floats(absmax)));
            "float32"
        }
        Scales::Double(DoubleScales { codes, nested, offset }) => {
            parts.push(part(".absmax", vec![codes.len()], Data::U8(codes.clone())));
            parts.push(part(".nested_absmax", vec![nested.len()], floats(nested.clone())));
            parts.push(part(".nested_quant_map", vec![256], floats(nested_map())));
            state["nested_blocksize"] = json!(DOUBLE_BLOCK);
            state["nested_dtype"] = json!("float32");
            state["nested_offset"] = json!(f64::from(*offset));
            "double-quantized"
        }
    };
    let state = state.to_string().into_bytes();
    parts.push(part(
        &format!(".quant_state.bitsandbytes__{}", codebook.name()),
        vec![state.len()],
        Data::U8(state),
    ));
    let stored = format!("{}, blocks of {block}, {scales}", codebook.name());
    Ok(Converted { parts, stored, written: Written::Same, note: None })
}

/// Two codes a byte over the flattened rows, the first in the high nibble.
fn codes(weight: &PackedWeight) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(weight.d_input * weight.d_output / 2);
    let mut row = vec![0; weight.d_input];
    for output in 0..weight.d_output {
        unpack_column(&weight.codes, weight.d_output, 4, output, &mut row);
        // Rows are whole blocks, so their length is even.
        bytes.extend(row.as_chunks::<2>().0.iter().map(|[first, second]| first << 4 | second));
    }
    bytes
}

/// The levels that [`DoubleScales`] implies.
fn nested_map() -> Vec<f32> {
    DoubleScales { codes: (0..=255).collect(), nested: vec![1.0], offset: 0.0 }.decode()
}
