//! GPTQ's files, format 2: zero points as they are.

use std::{collections::BTreeMap, path::Path};

use kiln_quant_core::{
    Grid, PackedWeight, QuantLinear, Scheme, Value,
    packing::{CodePacker, unpack_column},
};
use serde_json::{Map, json};

use super::{
    ExportOptions, ExportReport, Fallback, FloatType, Format,
    config::config_json,
    folder::{Converted, Data, FolderExport, Part},
    integers::Integers,
    item::{self, Host, Item},
    report::Written,
};
use crate::{Checkpoint, Decoder, Result, config::TensorRole};

/// Writes `model` in GPTQ's format 2: the codes as they are, scales in f16, offsets as integer zero points.
///
/// GPTQ holds no float offset: `offset = -scale * zero` with `zero` an integer of the code's width. Grids with integer
/// zeros and symmetric ones stay exact where f16 holds their scales; of others the nearest zero is taken, and the
/// report's differences say what that costs, with a note for each tensor. A group of one value (scale 0) becomes scale
/// `-offset` and zero 1. Embedding and head are written dense, as GPTQ's tools expect them.
///
/// # Errors
/// As [`export_hf`](super::export_hf), and [`Error::Export`](crate::Error::Export) naming a packed linear that GPTQ can't hold (a codebook, or sizes
/// that are no multiples of 32), unless `options.fallback` writes it dense.
pub fn export_gptq(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let items = item::items(model)?;
    let mut config = config_json(model.config(), source.special_tokens(), options.float)?;
    let quantization = quantization(&items, options.fallback)?;
    let json = quantization.iter().map(|config| ("quantize_config.json", json!(config))).collect();
    if let Some(quantization) = quantization {
        config.insert("quantization_config".into(), quantization.into());
    }
    let export = FolderExport {
        folder: folder.as_ref(),
        source,
        items: &items,
        config,
        metadata: "pt",
        max_shard_bytes: options.max_shard_bytes,
        json,
    };
    export.write(|item, host| match host {
        Host::Packed(weight) if item.role == TensorRole::Linear => match check(item) {
            Ok(_) => packed(item, weight),
            Err(error) => Converted::fallback(Format::Gptq, item, host, options.float, &error),
        },
        host => Converted::dense(Format::Gptq, item, host, options.float),
    })
}

/// Bits and group (`None` is the whole column) of a linear that can be written; `None` for a dense one.
fn check(item: &Item) -> Result<Option<(u32, Option<usize>)>> {
    let Scheme::Packed(scheme) = item.scheme() else { return Ok(None) };
    let refuse = |expected: &str, found: String| Err(Format::Gptq.refuse(&item.name(), expected, found));
    let Value::Affine { bits, .. } = scheme.value else {
        return refuse("affine codes", scheme.to_string());
    };
    if ![2, 3, 4, 8].contains(&bits) {
        return refuse("codes of 2, 3, 4 or 8 bits", scheme.to_string());
    }
    let shape = item.shape();
    if shape.iter().any(|size| !size.is_multiple_of(32)) {
        return refuse(
            "inputs and outputs in multiples of 32",
            format!("{} inputs, {} outputs", shape[1], shape[0]),
        );
    }
    Ok(Some((bits, scheme.block.inputs.filter(|inputs| *inputs < shape[1]))))
}

/// `quantization_config`; `None` if nothing is packed.
fn quantization(items: &[Item], fallback: Fallback) -> Result<Option<Map<String, serde_json::Value>>> {
    let mut layouts = BTreeMap::new();
    let mut symmetric = true;
    for item in items.iter().filter(|item| item.role == TensorRole::Linear) {
        let layout = match check(item) {
            Err(error) if fallback == Fallback::Refuse => return Err(error),
            layout => layout.unwrap_or(None),
        };
        if let (Some(_), Scheme::Packed(scheme)) = (layout, item.scheme()) {
            symmetric &= matches!(scheme.value, Value::Affine { grid: Grid::Symmetric, .. });
        }
        layouts.insert(&item.path, layout);
    }
    let mut counts = BTreeMap::new();
    for layout in layouts.values().flatten() {
        *counts.entry(*layout).or_insert(0) += 1;
    }
    let Some((&usual, _)) = counts.iter().max_by_key(|(_, count)| **count) else { return Ok(None) };
    let group = |group: Option<usize>| group.map_or(json!(-1), |group| json!(group));
    let mut dynamic = Map::new();
    for (path, layout) in layouts {
        // Keys are regular expressions.
        let path = path.replace('.', "\\.");
        match layout {
            Some(layout) if layout == usual => {}
            Some((bits, inputs)) => {
                dynamic.insert(format!("+:^{path}$"), json!({"bits": bits, "group_size": group(inputs)}));
            }
            None => {
                dynamic.insert(format!("-:^{path}$"), json!({}));
            }
        }
    }
    let config = json!({
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": usual.0,
        "group_size": group(usual.1),
        "desc_act": items.iter().any(Item::is_permuted),
        "sym": symmetric,
        "lm_head": false,
        "pack_dtype": "int32",
        "dynamic": dynamic,
    });
    Ok(config.as_object().cloned())
}

fn packed(item: &Item, weight: &PackedWeight) -> Result<Converted> {
    let (d_input, d_output, bits) = (weight.d_input, weight.d_output, weight.scheme.bits());
    let group = weight.scheme.block.inputs_of(d_input).min(d_input);
    let integers = Integers::of(Format::Gptq, item, weight, group)?;
    let rows = d_input.div_ceil(group);
    let words_of = |count: usize| count / 32 * bits as usize;
    let name = |part: &str| format!("{}.{part}", item.path);
    let order = weight.input_order.as_deref();
    let mut g_idx = vec![0; d_input];
    for row in 0..d_input {
        g_idx[order.map_or(row, |order| order[row] as usize)] = (row / group) as u32;
    }
    let parts = vec![
        Part {
            name: name("qweight"),
            shape: vec![words_of(d_input), d_output],
            data: Data::I32(in_own_order(&integers.codes, weight)),
        },
        Part {
            name: name("qzeros"),
            shape: vec![rows, words_of(d_output)],
            data: Data::I32(pack_rows(&integers.zeros, d_output, bits)),
        },
        Part {
            name: name("scales"),
            shape: vec![rows, d_output],
            data: Data::Float(FloatType::F16, integers.scales.clone()),
        },
        Part { name: name("g_idx"), shape: vec![d_input], data: Data::I32(g_idx) },
    ];
    let note = integers.note(item);
    let stored = format!("{bits} bits, groups of {group}, integer zeros");
    let written = integers.into_weight(weight, group);
    Ok(Converted { parts, stored, written: Written::Packed(written), note })
}

/// The words with inputs in their own order.
fn in_own_order(codes: &[u32], weight: &PackedWeight) -> Vec<u32> {
    let Some(order) = &weight.input_order else { return codes.to_vec() };
    let (d_input, d_output, bits) = (weight.d_input, weight.d_output, weight.scheme.bits());
    let mut packer = CodePacker::new(d_input, d_output, bits);
    let (mut sorted, mut column) = (vec![0; d_input], vec![0; d_input]);
    for output in 0..d_output {
        unpack_column(codes, d_output, bits, output, &mut sorted);
        for (code, &input) in sorted.iter().zip(order) {
            column[input as usize] = *code;
        }
        packer.set_column(output, &column);
    }
    packer.into_words()
}

/// Each row of `[rows, width]` as one bit stream, low bits first.
fn pack_rows(values: &[u8], width: usize, bits: u32) -> Vec<u32> {
    let pack = |row: &[u8]| {
        let mut packer = CodePacker::new(width, 1, bits);
        packer.set_column(0, row);
        packer.into_words()
    };
    values.chunks_exact(width).flat_map(pack).collect()
}
