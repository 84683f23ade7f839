//! Logits of given token ids, for comparing with other programs; in f32 unless `--compute` says otherwise.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{collections::HashMap, path::PathBuf, process::ExitCode};

use clap::Parser;
use kiln::{
    models::{CausalLm, TokenBatch},
    quant::{Compute, files::write_atomically},
};
use kiln_examples::{ComputeName, ModelArgs, Result, check_outputs, say};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// A safetensors file with `input_ids` (I32 or I64, [batch, length]) and optionally `attention_mask`. Without it, a
    /// short text of the embedded model.
    #[arg(long)]
    ids: Option<PathBuf>,
    /// Where `logits` (F32, [batch, length, vocabulary]) go.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn integers(file: &SafeTensors, name: &str) -> Result<(Vec<u32>, [usize; 2])> {
    let view = file.tensor(name)?;
    let shape: [usize; 2] = view
        .shape()
        .try_into()
        .map_err(|_| format!("{name}: expected [batch, length], found {:?}", view.shape()))?;
    let values: Vec<i64> = match view.dtype() {
        Dtype::I64 => view
            .data()
            .chunks_exact(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap_or_default()))
            .collect(),
        Dtype::I32 => view
            .data()
            .chunks_exact(4)
            .map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap_or_default())))
            .collect(),
        other => return Err(format!("{name}: expected I32 or I64, found {other:?}").into()),
    };
    let values = values.into_iter().map(u32::try_from).collect::<std::result::Result<_, _>>()?;
    Ok((values, shape))
}

fn run(mut options: Options) -> Result<()> {
    options.model.compute.get_or_insert(ComputeName(Some(Compute::F32)));
    check_outputs([&options.out])?;
    let checkpoint = options.model.checkpoint()?;
    let tokens = match &options.ids {
        Some(path) => {
            let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
            let file = SafeTensors::deserialize(&bytes)?;
            let (ids, [batch, length]) = integers(&file, "input_ids")?;
            let mask = match file.tensor("attention_mask") {
                Ok(_) => integers(&file, "attention_mask")?.0,
                Err(_) => vec![1; ids.len()],
            };
            TokenBatch::masked(ids, mask, batch, length)?
        }
        None => {
            TokenBatch::new(&[checkpoint.tokenizer()?.encode("The President shall have power to", true)?])?
        }
    };
    let (model, _) = options.model.load_adapted(&checkpoint)?;
    if let Some(id) = tokens.ids.iter().find(|id| **id as usize >= model.vocab_size()) {
        return Err(format!("input_ids: expected ids below {}, found {id}", model.vocab_size()).into());
    }
    let logits = model.forward(&model.context(&tokens, None)?);
    let shape = logits.dims();
    let values: Vec<f32> = logits.into_data().convert::<f32>().iter::<f32>().collect();
    say!("logits {shape:?}, the first: {:?}", &values[..values.len().min(4)]);
    if let Some(path) = &options.out {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F32, shape.to_vec(), &bytes)?;
        let metadata = Some(HashMap::from([("format".to_string(), "pt".to_string())]));
        let file = safetensors::serialize([("logits", view)], metadata)?;
        write_atomically(path, |writer| std::io::Write::write_all(writer, &file))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
