//! How far gradients computed with operands in bf16 are from those in f32: LoRA of rank 16 on all linears, both factors drawn,
//! one batch of a text.
//!
//! `cargo run --release -p kiln-benches --bin gradient-error -- MODEL TOKENS [scheme] [batch] [length]`; TOKENS is a file of
//! 16-bit ids.
#![allow(clippy::print_stdout, reason = "a program talks to its user")]

use std::{collections::BTreeMap, error::Error};

use burn::{
    module::Module,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Device, Tensor},
};
use kiln::{
    Tuned,
    adapters::{AdapterConfig, InitLoraWeights, Method},
    models::{Checkpoint, DriverOptions, LoadOptions, Recompute, Targets, TokenBatch, loss_and_gradients},
    quant::{Compute, Scheme, for_each_parameter},
};

/// The loss, and the gradient of each factor by its path.
type Found = (f64, BTreeMap<String, Vec<f32>>);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, tokens, ..] = arguments.as_slice() else {
        return Err("expected a model and a file of ids".into());
    };
    let scheme = arguments.get(2).map_or("affine4:64:f16", String::as_str);
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (batch, length) = (number(3, 2)?, number(4, 256)?);
    let bytes = std::fs::read(tokens)?;
    let ids: Vec<u32> = bytes
        .as_chunks::<2>()
        .0
        .iter()
        .map(|id| u32::from(u16::from_le_bytes(*id)))
        .take(batch * length + 1)
        .collect();
    if ids.len() != batch * length + 1 {
        return Err(format!("{tokens}: {} ids, {} needed", ids.len(), batch * length + 1).into());
    }
    let gradients = |compute| gradients(model, scheme, compute, &ids, [batch, length]);
    let (exact, rounded) = (gradients(Compute::F32)?, gradients(Compute::Bf16)?);
    println!("loss {:.6} in f32, {:.6} in bf16", exact.0, rounded.0);
    let mut kinds: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (path, exact) in &exact.1 {
        let rounded = &rounded.1[path];
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>().sqrt();
        let difference = exact.iter().zip(rounded).map(|(a, b)| f64::from(*a) - f64::from(*b));
        let error =
            norm(&mut difference.into_iter()) / norm(&mut exact.iter().map(|value| f64::from(*value)));
        let kind: Vec<&str> = path.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
        kinds.entry(kind.join(".")).or_default().push(error);
    }
    println!("{:>5}  {:>9} {:>9} {:>9}  relative error of", "count", "least", "median", "largest");
    for (kind, mut errors) in kinds {
        errors.sort_by(f64::total_cmp);
        let (least, median, largest) = (errors[0], errors[errors.len() / 2], errors[errors.len() - 1]);
        println!("{:>5}  {least:9.2e} {median:9.2e} {largest:9.2e}  {kind}", errors.len());
    }
    Ok(())
}

fn gradients(
    model: &str,
    scheme: &str,
    compute: Compute,
    ids: &[u32],
    [batch, length]: [usize; 2],
) -> Result<Found, Box<dyn Error>> {
    let device = Device::flex();
    let mut options = LoadOptions::uniform(scheme.parse::<Scheme>()?);
    options.compute = Some(compute);
    let (model, _) = Checkpoint::open(model)?.load(&options, &device)?;
    // Where B is zero A has no gradients; a sixteenth of what PEFT draws hardly moves the loss.
    let method = Method::Lora { init: InitLoraWeights::Random };
    let adapters = AdapterConfig::lora(16, 1.0).with_seed(1).with_method(method);
    let model = Tuned::attach(model, &adapters)?.into_model().train();
    let count = batch * length;
    let tokens = TokenBatch::masked(ids[..count].to_vec(), vec![1; count], batch, length)?;
    let scored = vec![true; count];
    let targets = Targets { ids: &ids[1..], scored: &scored };
    let options = DriverOptions { recompute: Recompute::Block, ..DriverOptions::default() };
    let mut sums = GradientsAccumulator::new();
    let loss = loss_and_gradients(&model, &tokens, targets, &options, &mut sums)? / count as f64;
    let sums: GradientsParams = sums.grads();
    let mut found = BTreeMap::new();
    for_each_parameter(&model, |parameter| {
        let gradient: Option<Tensor<2>> = if parameter.trained { sums.get(parameter.id) } else { None };
        if let Some(gradient) = gradient {
            let values = kiln::quant::to_host(&parameter.name(), gradient)?;
            found.insert(parameter.name(), values);
        }
        Ok::<_, kiln::quant::Error>(())
    })?;
    Ok((loss, found))
}
