//! AWQ's files, in the layout of its matrix-matrix kernels (`gemm`).

use std::{collections::BTreeMap, path::Path};

use kiln_quant_core::{PackedWeight, QuantLinear, Scheme, Slots, Value, packing::unpack_column};
use serde_json::json;

use super::{
    ExportOptions, ExportReport, Fallback, FloatType, Format,
    config::config_json,
    folder::{Converted, Data, FolderExport, Part},
    integers::Integers,
    item::{self, Host, Item},
    report::Written,
};
use crate::{Checkpoint, Decoder, Result, config::TensorRole, hf::pack_awq};

/// Writes `model` as AWQ's programs do: 4-bit codes as they are, scales in f16, offsets as integer zero points.
///
/// What integer zeros cost is told as [`export_gptq`](super::export_gptq) tells it. A file has one group size: the most usual one;
/// weights in groups that are a multiple of it have their scales repeated. Embedding and head are written dense.
///
/// # Errors
/// As [`export_hf`](super::export_hf), and [`Error::Export`](crate::Error::Export) naming a packed linear that AWQ can't hold (other than affine codes of
/// 4 bits, groups that aren't a multiple of the usual one, outputs that are no multiple of 8, act-order), unless
/// `options.fallback` writes it dense.
pub fn export_awq(
    model: &Decoder<QuantLinear>,
    source: &Checkpoint,
    folder: impl AsRef<Path>,
    options: &ExportOptions,
) -> Result<ExportReport> {
    let items = item::items(model)?;
    let mut config = config_json(model.config(), source.special_tokens(), options.float)?;
    let linears = || items.iter().filter(|item| item.role == TensorRole::Linear);
    let group = usual_group(linears());
    // Routers are linears too, to readers.
    let mut dense: Vec<String> = model.dense_slots().into_iter().collect();
    for item in linears() {
        match check(item, group) {
            Ok(true) => {}
            Err(error) if options.fallback == Fallback::Refuse => return Err(error),
            Ok(false) | Err(_) => dense.push(item.path.clone()),
        }
    }
    if let Some(group) = group {
        // Readers look for these within a linear's path.
        dense.sort_unstable();
        let quantization = json!({
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": group.map_or(json!(-1), |group| json!(group)),
            "zero_point": true,
            "modules_to_not_convert": (!dense.is_empty()).then_some(dense),
        });
        config.insert("quantization_config".into(), quantization);
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
        Host::Packed(weight) if item.role == TensorRole::Linear => match check(item, group) {
            Ok(_) => packed(item, weight, group.flatten()),
            Err(error) => Converted::fallback(Format::Awq, item, host, options.float, &error),
        },
        host => Converted::dense(Format::Awq, item, host, options.float),
    })
}

const BITS: u32 = 4;
/// Outputs of a word.
const LANES: usize = 8;

/// Inputs of a group of a packed linear, `None` being the whole column; none if AWQ can't hold it in any groups.
fn group_of(item: &Item) -> Option<Option<usize>> {
    match item.scheme() {
        Scheme::Packed(scheme) if holds(item).is_ok() => {
            Some(scheme.block.inputs.filter(|inputs| *inputs < item.shape()[1]))
        }
        _ => None,
    }
}

/// The group size that most of those linears have; `None` if there are none.
fn usual_group<'a>(items: impl Iterator<Item = &'a Item>) -> Option<Option<usize>> {
    let mut counts = BTreeMap::new();
    for group in items.filter_map(group_of) {
        *counts.entry(group).or_insert(0) += 1;
    }
    // Of as many the smaller one, which larger ones may be made of.
    let most =
        |(group, count): &(Option<usize>, usize)| (*count, std::cmp::Reverse(group.unwrap_or(usize::MAX)));
    counts.into_iter().max_by_key(most).map(|(group, _)| group)
}

/// Fails for what AWQ can't hold of a packed linear, whatever its groups.
fn holds(item: &Item) -> Result<()> {
    let Scheme::Packed(scheme) = item.scheme() else { return Ok(()) };
    let refuse = |expected: &str, found: String| Err(Format::Awq.refuse(&item.name(), expected, found));
    if !matches!(scheme.value, Value::Affine { bits: BITS, .. }) {
        return refuse("affine codes of 4 bits", scheme.to_string());
    }
    if item.is_permuted() {
        return refuse("inputs in their own order", "act-order".into());
    }
    match item.shape().first() {
        Some(outputs) if !outputs.is_multiple_of(LANES) => {
            refuse("outputs in multiples of 8", outputs.to_string())
        }
        _ => Ok(()),
    }
}

/// Whether a linear is packed and can be written so.
fn check(item: &Item, usual: Option<Option<usize>>) -> Result<bool> {
    holds(item)?;
    let (Scheme::Packed(scheme), Some(usual)) = (item.scheme(), usual) else { return Ok(false) };
    let refuse = |expected: String, found: String| Err(Format::Awq.refuse(&item.name(), expected, found));
    let [_, inputs] = item.shape()[..] else { return Ok(false) };
    let own = scheme.block.inputs_of(inputs).min(inputs);
    match usual {
        Some(group) if !own.is_multiple_of(group) || !inputs.is_multiple_of(group) => {
            refuse(format!("groups and inputs of a multiple of {group}"), format!("{own} of {inputs}"))
        }
        None if own < inputs => refuse("one group an output".into(), format!("groups of {own}")),
        _ => Ok(true),
    }
}

fn packed(item: &Item, weight: &PackedWeight, usual: Option<usize>) -> Result<Converted> {
    let (d_input, d_output) = (weight.d_input, weight.d_output);
    let group = usual.unwrap_or(d_input);
    let integers = Integers::of(Format::Awq, item, weight, group)?;
    let mut by_input = vec![0; d_input * d_output];
    let mut column = vec![0; d_input];
    for output in 0..d_output {
        unpack_column(&integers.codes, d_output, BITS, output, &mut column);
        for (input, code) in column.iter().enumerate() {
            by_input[input * d_output + output] = *code;
        }
    }
    let (groups, words) = (d_input / group, d_output / LANES);
    let part = |name: &str, shape: [usize; 2], data: Data| Part {
        name: format!("{}.{name}", item.path),
        shape: shape.into(),
        data,
    };
    let parts = vec![
        part("qweight", [d_input, words], Data::I32(pack_awq(&by_input))),
        part("qzeros", [groups, words], Data::I32(pack_awq(&integers.zeros))),
        part("scales", [groups, d_output], Data::Float(FloatType::F16, integers.scales.clone())),
    ];
    let (note, stored) = (integers.note(item), format!("4 bits, groups of {group}, integer zeros"));
    Ok(Converted { parts, stored, written: Written::Packed(integers.into_weight(weight, group)), note })
}
