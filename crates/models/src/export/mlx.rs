//! MLX's affine quantization, as mlx-lm opens it.
//!
//! A linear `P` is `P.weight` U32 `[out, in * bits / 32]` (a row of codes is one bit stream, low bits first),
//! `P.scales` and `P.biases` `[out, in / group]`; a weight is `scale * code + bias`.

use std::{collections::BTreeMap, path::Path};

use kiln_quant_core::{Block, Grid, PackedWeight, QuantLinear, QuantScheme, ScaleType, Scales, Value};
use serde_json::{Map, json};

use super::{
    ExportOptions, ExportReport, Fallback, FloatType, Format,
    config::config_json,
    folder::{Converted, Data, FolderExport, Part},
    item::{self, Groups, Host, Item, rounded},
    report::Written,
};
use crate::{Checkpoint, Decoder, Result, config::TensorRole, source::transposed};

/// The groups that MLX has, larger ones first: they need fewer scales.
const GROUPS: [usize; 3] = [128, 64, 32];

/// Writes `model` as MLX's affine safetensors: codes as they are, scales and offsets rounded to `options.float`. With
/// [`FloatType::F32`] every affine weight in row groups stays exact; so it does in the type its scales have already.
/// Groups and widths that differ from most stand in `quantization` by path.
///
/// Held exactly are 2, 3, 4, 5, 6 and 8 bits in groups of a multiple of 32 inputs that divide the row into groups of 32, 64
/// or 128 (larger ones are cut, with scales repeated). Codebooks, smaller groups and act-order are not.
///
/// # Errors
/// As [`export_hf`](super::export_hf), and [`Error::Export`](crate::Error::Export) naming a packed weight that MLX can't hold, unless
/// `options.fallback` writes it dense.
pub fn export_mlx(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let items = item::items(model)?;
    let mut config = config_json(model.config(), source.special_tokens(), options.float)?;
    quantization(&items, options.fallback, &mut config)?;
    let export = FolderExport {
        folder: folder.as_ref(),
        source,
        items: &items,
        config,
        metadata: "mlx",
        max_shard_bytes: options.max_shard_bytes,
        json: Vec::new(),
    };
    export.write(|item, host| match host {
        Host::Dense(_) => Converted::dense(Format::Mlx, item, host, options.float),
        Host::Packed(weight) => match layout(item) {
            Ok(Some(layout)) => packed(item, weight, layout, options.float),
            Ok(None) => Converted::dense(Format::Mlx, item, host, options.float),
            Err(error) => Converted::fallback(Format::Mlx, item, host, options.float, &error),
        },
    })
}

/// Bits and group of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Layout {
    bits: u32,
    group: usize,
}

/// How MLX holds a tensor; `None` for dense ones.
fn layout(item: &Item) -> Result<Option<Layout>> {
    let kiln_quant_core::Scheme::Packed(scheme) = item.scheme() else { return Ok(None) };
    let refuse = |expected: &str, found: String| Err(Format::Mlx.refuse(&item.name(), expected, found));
    let Value::Affine { bits, .. } = scheme.value else {
        return refuse("affine codes", scheme.to_string());
    };
    if item.is_permuted() {
        return refuse("inputs in their own order", "act-order".into());
    }
    let d_input = item.shape()[1];
    let inputs = scheme.block.inputs_of(d_input);
    let fits = |group: &usize| {
        d_input.is_multiple_of(*group) && (inputs.is_multiple_of(*group) || inputs >= d_input)
    };
    match GROUPS.into_iter().find(fits) {
        Some(group) => Ok(Some(Layout { bits, group })),
        None => refuse(
            "groups of a multiple of 32 inputs, and rows of whole ones",
            format!("{scheme} with rows of {d_input}"),
        ),
    }
}

/// Writes `quantization` and its copy, `quantization_config`.
fn quantization(
    items: &[Item],
    fallback: Fallback,
    config: &mut Map<String, serde_json::Value>,
) -> Result<()> {
    let mut layouts = BTreeMap::new();
    for item in items.iter().filter(|item| item.role != TensorRole::Plain) {
        let layout = match layout(item) {
            Err(error) if fallback == Fallback::Refuse => return Err(error),
            layout => layout.unwrap_or(None),
        };
        layouts.insert(&item.path, layout);
    }
    let mut counts: BTreeMap<Layout, usize> = BTreeMap::new();
    for layout in layouts.values().flatten() {
        *counts.entry(*layout).or_default() += 1;
    }
    let Some((&usual, _)) = counts.iter().max_by_key(|(_, count)| **count) else { return Ok(()) };
    let mut quantization = Map::new();
    quantization.insert("group_size".into(), json!(usual.group));
    quantization.insert("bits".into(), json!(usual.bits));
    quantization.insert("mode".into(), json!("affine"));
    for (path, layout) in layouts {
        let value = match layout {
            Some(layout) if layout == usual => continue,
            Some(Layout { bits, group }) => json!({"group_size": group, "bits": bits}),
            None => json!(false),
        };
        quantization.insert(path.clone(), value);
    }
    config.insert("quantization".into(), quantization.clone().into());
    config.insert("quantization_config".into(), quantization.into());
    Ok(())
}

fn packed(item: &Item, weight: &PackedWeight, layout: Layout, float: FloatType) -> Result<Converted> {
    let Layout { bits, group } = layout;
    let (d_input, d_output) = (weight.d_input, weight.d_output);
    let groups = Groups::of(weight, group);
    let scales = rounded(Format::Mlx, &format!("{}.scales", item.path), &groups.scales, float)?;
    let biases = match groups.offsets {
        Some(offsets) => offsets,
        // The centre of a symmetric grid, for the scale as it is stored: a power of two times it.
        None => scales.iter().map(|scale| -scale * f32::from(1u8 << (bits - 1))).collect(),
    };
    let biases = rounded(Format::Mlx, &format!("{}.biases", item.path), &biases, float)?;
    let rows = d_input / group;
    let float_part = |name: &str, values: &[f32]| Part {
        name: format!("{}.{name}", item.path),
        shape: vec![d_output, rows],
        data: Data::Float(float, transposed(values, rows, d_output)),
    };
    let words = weight.codes.len() / d_output;
    let codes = Part {
        name: item.name(),
        shape: vec![d_output, words],
        data: Data::U32(transposed(&weight.codes, words, d_output)),
    };
    let parts = vec![codes, float_part("scales", &scales), float_part("biases", &biases)];
    let written = PackedWeight {
        scheme: QuantScheme {
            value: Value::Affine { bits, grid: Grid::Float },
            block: Block::group(group),
            scales: ScaleType::F32,
        },
        d_input,
        d_output,
        codes: weight.codes.clone(),
        scales: Scales::Plain(scales),
        offsets: Some(biases),
        input_order: None,
    };
    let stored = format!("{bits} bits, groups of {group}, {}", float.name());
    Ok(Converted { parts, stored, written: Written::Packed(written), note: None })
}
