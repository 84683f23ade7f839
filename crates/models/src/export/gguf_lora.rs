//! LoRA adapters for llama.cpp.

use std::path::Path;

use super::{
    Format,
    gguf::{architecture, column_order, names, row_order},
};
use crate::{
    Error, Result,
    config::ModelConfig,
    gguf::{
        BlockType, Value,
        writer::{self, NewTensor},
    },
};

/// The low-rank update `scale * B A` of one linear, row-major as in PEFT's files.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraFactors<'a> {
    /// The linear's path in the checkpoint.
    pub path: &'a str,
    /// Rank.
    pub rank: usize,
    /// A, `[rank, d_input]`.
    pub a: &'a [f32],
    /// B, `[d_output, rank]`.
    pub b: &'a [f32],
    /// α / r, or α / √r for rank-stabilised ones.
    pub scale: f32,
}

/// Writes a LoRA adapter as a GGUF file of type `adapter` for a base of the shape `config`.
///
/// The file has one α, and its reader scales by α / rank. So each scale is multiplied into B, and α is the rank; where
/// ranks differ it is 0, which readers take for "no scaling". Rows of B for q and k get the order that the
/// architecture `llama` has. Only plain LoRA can be expressed: no DoRA, no biases, no embeddings.
///
/// # Errors
/// [`Error::Export`] naming a linear that the architecture lacks, or of an expert, all of which stand in one tensor, factors that don't fill their shapes or aren't finite;
/// [`Error::Io`]. `path` is then as it was before.
pub fn export_gguf_lora(path: impl AsRef<Path>, config: &ModelConfig, factors: &[LoraFactors]) -> Result<()> {
    let names = names(config)?;
    let refuse =
        |name: &str, expected: String, found: String| Err(Format::Gguf.refuse(name, expected, found));
    let (mut tensors, mut data) = (Vec::new(), Vec::new());
    for LoraFactors { path, rank, a, b, scale } in factors {
        let weight = format!("{path}.weight");
        let name = names.gguf(&weight).filter(|name| name.starts_with("blk."));
        let Some(name) = name else {
            return refuse(path, "a linear of a block".into(), "another name".into());
        };
        if names.is_stacked(&weight) {
            return refuse(path, "a linear with a tensor of its own".into(), format!("a part of {name}"));
        }
        if *rank == 0
            || a.is_empty()
            || b.is_empty()
            || !a.len().is_multiple_of(*rank)
            || !b.len().is_multiple_of(*rank)
        {
            let found = format!("{} and {} values", a.len(), b.len());
            return refuse(path, format!("factors of rank {rank}"), found);
        }
        if let Some(value) = a.iter().chain(*b).chain([scale]).find(|value| !value.is_finite()) {
            return refuse(path, "finite values".into(), value.to_string());
        }
        let mut rows: Vec<&[f32]> = b.chunks_exact(*rank).collect();
        if let Some(order) = row_order(names, config, &weight) {
            if order.len() != rows.len() {
                return refuse(path, format!("{} outputs", order.len()), rows.len().to_string());
            }
            rows = order.iter().map(|&row| rows[row]).collect();
        }
        let mut a = a.to_vec();
        if let Some(columns) = column_order(names, config, &weight) {
            if columns.len() * rank != a.len() {
                return refuse(path, format!("{} inputs", columns.len()), (a.len() / rank).to_string());
            }
            let rows = a.chunks_exact(columns.len());
            a = rows.flat_map(|row| columns.iter().map(|column| row[*column])).collect();
        }
        let scaled: Vec<f32> = rows.iter().flat_map(|row| row.iter().map(|value| scale * value)).collect();
        let mut add = |suffix: &str, shape: [usize; 2], values: Vec<f32>| {
            let name = format!("{name}.{suffix}");
            tensors.push(NewTensor { name, shape: shape.into(), kind: BlockType::F32 });
            data.push(values);
        };
        add("lora_a", [*rank, a.len() / rank], a);
        add("lora_b", [b.len() / rank, *rank], scaled);
    }
    let Some(first) = factors.first() else {
        return refuse("adapter", "at least one linear".into(), "none".into());
    };
    let same = factors.iter().all(|other| other.rank == first.rank);
    let alpha = if same { first.rank as f32 } else { 0.0 };
    let text = |text: &str| Value::String(text.into());
    let keys = [
        ("general.architecture".to_owned(), text(architecture(names.family))),
        ("general.type".to_owned(), text("adapter")),
        ("adapter.type".to_owned(), text("lora")),
        ("adapter.lora.alpha".to_owned(), Value::F32(alpha)),
    ];
    writer::write(path.as_ref(), &keys, &tensors, |index| {
        Ok(data[index].iter().flat_map(|value| value.to_le_bytes()).collect())
    })?;
    Ok::<(), Error>(())
}
