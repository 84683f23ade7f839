//! Times one training step of a model with LoRA on a packed base, beside the f32 matrix product of the same process.
//!
//! `cargo run --release -p kiln-benches --bin train-step -- MODEL [scheme] [none|block] [batch] [length] [steps] [compute]`
//!
//! The scheme is one of Kiln's, `stored`, or `burn-qlora` for Burn's own `apply_qlora` on the dense model.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{error::Error, sync::Arc, time::Instant};

use burn::{
    module::Module,
    tensor::{Device, Distribution, Tensor},
};
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    models::{CausalLm, Checkpoint, Decoder, LoadOptions, Recompute},
    quant::{QuantLinear, Scheme},
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument = |index: usize, default: &str| arguments.get(index).cloned().unwrap_or(default.into());
    let number = |index: usize, default: &str| argument(index, default).parse::<usize>();
    let model = arguments.first().ok_or("expected a model folder or .gguf file")?;
    let (scheme, recompute) = (argument(1, "stored"), argument(2, "none"));
    let (batch, length, steps) = (number(3, "4")?, number(4, "256")?, number(5, "5")?);
    let device = Device::flex();

    let checkpoint = Checkpoint::open(model)?;
    let mut options = match scheme.as_str() {
        "stored" => LoadOptions::default(),
        "burn-qlora" => LoadOptions::uniform(Scheme::Dense),
        scheme => LoadOptions::uniform(scheme.parse::<Scheme>()?),
    };
    options.compute = arguments.get(6).map(|compute| compute.parse()).transpose()?;
    let (model, report) = checkpoint.load(&options, &device)?;
    let parameters = report.storage.total_values();
    let loaded = peak_rss();
    let vocabulary = model.vocab_size();
    let ids = (0..(batch * length * (steps + 3)) as u32).map(|i| i * 7919 % vocabulary as u32).collect();
    let dataset = Arc::new(Dataset::from_ids(ids, &DataOptions::new(length, vocabulary))?);
    let mut options = TrainerConfig::new(steps as u64 + 1, BatchOptions::new(batch));
    options.recompute = match recompute.as_str() {
        "none" => Recompute::None,
        "block" => Recompute::Block,
        other => return Err(format!("expected none or block, found {other}").into()),
    };
    let step = if scheme == "burn-qlora" {
        time_steps(Trainer::new(burn_qlora(model)?, dataset, options)?, steps)?
    } else {
        let tuned = Tuned::attach(model, &AdapterConfig::lora(16, 16.0))?;
        time_steps(Trainer::new(tuned.into_model(), dataset, options)?, steps)?
    };
    let peak = peak_rss();

    let a = Tensor::<2>::random([512, 576], Distribution::Normal(0.0, 1.0), &device);
    let b = Tensor::<2>::random([576, 1536], Distribution::Normal(0.0, 1.0), &device);
    let mut times: Vec<f64> = (0..23)
        .map(|_| {
            let start = Instant::now();
            let c = a.clone().matmul(b.clone());
            std::hint::black_box(&c);
            start.elapsed().as_secs_f64()
        })
        .skip(3)
        .collect();
    let rate = 2.0 * 512.0 * 576.0 * 1536.0 / median(&mut times);
    let tokens = (batch * length) as f64;
    let passes = if recompute == "block" { 6.0 } else { 4.0 };
    let flops = passes * parameters as f64 * tokens / step;
    println!("parameters {parameters}, loaded at a peak of {:.0} MB", loaded / 1e6);
    println!("step {step:.3} s, {:.0} tokens/s, peak {:.0} MB", tokens / step, peak / 1e6);
    println!("model {:.1} GFLOP/s, matmul {:.1} GFLOP/s, ratio {:.3}", flops / 1e9, rate / 1e9, flops / rate);
    Ok(())
}

/// Median seconds of a step; the first one, which grows buffers, is left out.
fn time_steps<M: CausalLm>(mut trainer: Trainer<M>, steps: usize) -> Result<f64, Box<dyn Error>> {
    trainer.step()?;
    let mut seconds = Vec::new();
    for _ in 0..steps {
        seconds.push(trainer.step()?.seconds);
    }
    Ok(median(&mut seconds))
}

/// Burn's own QLoRA on the blocks' linears: 4 bits in blocks of 64, rank 16.
fn burn_qlora(model: Decoder<QuantLinear>) -> Result<Decoder<QuantLinear>, Box<dyn Error>> {
    use burn::{
        module::{Lora, ParamGroup, QLora, Quantizer},
        tensor::quantization::{Calibration, QuantScheme, QuantStore, QuantValue, ScaleDtype},
    };
    let group = ParamGroup::from_regex(r"layers\..*_proj\..*weight$").map_err(|e| format!("{e:?}"))?;
    let scheme = QuantScheme::default()
        .with_value(QuantValue::Q4F)
        .with_store(QuantStore::Native)
        .per_block([64], ScaleDtype::F32);
    let lora = Lora::new(16, 16.0).set_param_group(group.clone());
    let mut quantizer = Quantizer::new(Calibration::MinMax, scheme);
    quantizer.set_param_group(group);
    Ok(model.apply_qlora(QLora::new(lora, quantizer)))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The process's largest resident size so far, in bytes (Linux).
fn peak_rss() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|n| n.parse::<f64>().ok());
    kilobytes.map_or(f64::NAN, |kilobytes| kilobytes * 1024.0)
}
