//! Trains QA-HiRA on a packed base, merges it without touching a code, and writes files that other tools open.
//!
//! Without arguments: the embedded model at 4 bits in groups of 64 inputs, with scales and offsets in f16.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use clap::Parser;
use kiln::{
    Tuned,
    adapters::{AdapterConfig, QaHira},
    models::{
        CausalLm, Checkpoint, Decoder, LoadOptions, Slots, TokenBatch,
        export::{ExportOptions, Fallback, FloatType, GgufOptions, export_gguf, export_mlx, verify_export},
    },
    quant::{
        QuantLinear, ScaleType, Scales, Scheme, Value,
        files::{NewFolder, OutputFolder},
    },
    training::{RunOptions, Trainer, TrainerConfig},
};
use kiln_examples::{
    Bar, DeviceName, ModelArgs, Result, check_outputs, open_data, say, testdata, write_json,
};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    #[arg(long, default_value_t = 20)]
    steps: u64,
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// How far the weights move at a step, over the learning rate: alpha / (rank · pool).
    #[arg(long, default_value_t = 0.5)]
    reach: f64,
    #[arg(long, default_value_t = 4)]
    batch: usize,
    #[arg(long, default_value_t = 128)]
    seq_len: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// .txt, .jsonl or .u16le; the embedded model's shifted text if left out.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Gets model.gguf and mlx/.
    #[arg(long, default_value = "target/kiln-export")]
    out: PathBuf,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// QA-HiRA whose tiles are the base's blocks.
fn config(scheme: Scheme, reach: f64, seed: u64) -> Result<AdapterConfig> {
    let Scheme::Packed(packed) = scheme else {
        return Err("a dense base has nothing to merge into: choose an affine --scheme".into());
    };
    let (Value::Affine { .. }, Some(inputs)) = (packed.value, packed.block.inputs) else {
        return Err(format!("{packed}: exact merges need affine codes in groups of inputs").into());
    };
    let method = QaHira::for_tiles(packed.block.outputs, inputs);
    Ok(AdapterConfig::qa_hira(method, reach * inputs as f64).with_seed(seed))
}

fn logits<M: CausalLm>(model: &M, ids: &[u32]) -> Result<Vec<f32>> {
    let logits = model.forward(&model.context(&TokenBatch::new(&[ids.to_vec()])?, None)?);
    Ok(logits.try_into_vec_as()?)
}

/// `‖a - b‖`.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>().sqrt()
}

fn norm(a: &[f32]) -> f64 {
    a.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>().sqrt()
}

/// The words of all codes, path by path.
fn codes(model: &Decoder<QuantLinear>) -> Result<Vec<u32>> {
    let mut weights = Vec::new();
    for (_, slot) in model.slots() {
        if let QuantLinear::Packed(linear) = slot {
            weights.push(linear.weight.to_host());
        }
    }
    let mut words = Vec::new();
    for weight in weights {
        words.extend(weight?.codes);
    }
    Ok(words)
}

/// The dense values of the blocks' linears, with scales and offsets rounded to f16, in which the files hold them.
fn rounded(model: &Decoder<QuantLinear>) -> Result<BTreeMap<String, Vec<f32>>> {
    let mut weights = Vec::new();
    for (path, slot) in model.slots() {
        if let QuantLinear::Packed(linear) = slot {
            weights.push((path.to_owned(), linear.weight.to_host()));
        }
    }
    let round =
        |values: &mut Vec<f32>| values.iter_mut().for_each(|value| *value = ScaleType::F16.round(*value));
    let mut dense = BTreeMap::new();
    for (path, weight) in weights {
        let mut weight = weight?;
        if let Scales::Plain(scales) = &mut weight.scales {
            round(scales);
        }
        weight.offsets.iter_mut().for_each(round);
        dense.insert(path, weight.dequantize());
    }
    Ok(dense)
}

/// The largest difference between the packed linears of a file, read again, and `expected`.
fn file_difference(path: &Path, expected: &BTreeMap<String, Vec<f32>>) -> Result<f32> {
    let (model, _) = Checkpoint::open(path)?.load(&LoadOptions::default(), &DeviceName::flex().open()?)?;
    // What the format couldn't hold packed was written dense, as its report says.
    let found = rounded(&model)?;
    let pairs = found.iter().filter_map(|(path, values)| Some(values.iter().zip(expected.get(path)?)));
    Ok(pairs.flatten().map(|(a, b)| (a - b).abs()).fold(0.0, f32::max))
}

fn run(mut options: Options) -> Result<()> {
    let scheme = *options.model.scheme.get_or_insert("affine4:64:f16".parse::<Scheme>()?);
    let out = OutputFolder::claim(&options.out)?;
    let (gguf, mlx) = (out.path().join("model.gguf"), out.path().join("mlx"));
    check_outputs([&Some(gguf.clone()), &options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let (base, _) = options.model.load(&checkpoint)?;
    let prompt = checkpoint
        .tokenizer()?
        .encode("The whale rose slowly out of the cold grey sea, and the men", true)?;
    let (base_logits, base_codes) = (logits(&base, &prompt)?, codes(&base)?);

    let text =
        options.data.clone().unwrap_or_else(|| testdata("models/tiny-llama/text/shift_train_moby.txt"));
    let dataset = open_data(&text, &checkpoint, options.seq_len, base.vocab_size())?;

    let tuned = Tuned::attach(base, &config(scheme, options.reach, options.seed)?)?;
    let (model, adapters) = tuned.into_parts();
    let recipe = TrainerConfig::new(options.steps, options.batch).with_lr(options.lr);
    let mut trainer = Trainer::new(model, Arc::new(dataset), recipe)?;
    let mut bar = Bar::new(options.steps)?;
    trainer.run_with(&RunOptions::new(), &mut bar)?;
    bar.finish("nothing was written")?;
    let tuned = Tuned::<Decoder<QuantLinear>>::from_parts(trainer.into_model(), adapters);

    let adapted = logits(tuned.model(), &prompt)?;
    let merged = tuned.merge_packed()?;
    let merged_logits = logits(&merged, &prompt)?;
    let shift = distance(&adapted, &base_logits);
    let adapter_shift = shift / norm(&base_logits);
    let merge_error = distance(&merged_logits, &adapted) / shift;
    let codes_changed =
        codes(&merged)?.iter().zip(&base_codes).filter(|(after, before)| after != before).count();
    say!("the adapter moves the logits by {adapter_shift:.4}; merging loses {merge_error:.1e} of that");
    say!("changed words of codes: {codes_changed} of {}", base_codes.len());

    let gguf_options = GgufOptions { fallback: Fallback::Dense, ..GgufOptions::default() };
    let gguf_report = export_gguf(&merged, &checkpoint, &gguf, &gguf_options)?;
    let mlx_options = ExportOptions::new(FloatType::F16).with_fallback(Fallback::Dense);
    // What is there is replaced when the new one is whole.
    let new = NewFolder::replacing(&mlx, &["model.safetensors", "model.safetensors.index.json"])?;
    let mut mlx_report = export_mlx(&merged, &checkpoint, new.path(), &mlx_options)?;
    new.commit()?;
    mlx_report.path.clone_from(&mlx);
    for report in [&gguf_report, &mlx_report] {
        let lossy = report.lossy().count();
        say!("{}: {} bytes, {lossy} tensors rounded", report.path.display(), report.bytes);
        report.notes.iter().for_each(|note| say!("note: {note}"));
    }
    let gguf_shift = verify_export(&gguf, &merged, &prompt)?;
    let mlx_shift = verify_export(&mlx, &merged, &prompt)?;
    say!("reloaded: logits move by {:.1e} (GGUF), {:.1e} (MLX)", gguf_shift.relative, mlx_shift.relative);
    let expected = rounded(&merged)?;
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "adapter_shift": adapter_shift,
            "merge_error": merge_error,
            "codes_changed": codes_changed,
            "gguf_weight_max_difference": file_difference(&gguf, &expected)?,
            "mlx_weight_max_difference": file_difference(&mlx, &expected)?,
            "f16_logit_shift": gguf_shift.relative.max(mlx_shift.relative),
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
