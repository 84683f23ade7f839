//! Training steps and decoding of a synthetic model.

use std::{sync::Arc, time::Instant};

use burn::tensor::Device;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    models::{GenerateOptions, Recompute, generate},
    quant::Compute,
    training::{BatchOptions, DataOptions, Dataset, Trainer, TrainerConfig},
};

use crate::{Options, Result};

/// Memory of the device's pools, where it says so.
fn memory(device: &Device) -> String {
    match device.memory_pool_usage() {
        Some(usage) => format!(
            "{:.2} GB in use, {:.2} GB reserved",
            usage.bytes_in_use as f64 / 1e9,
            usage.bytes_reserved as f64 / 1e9
        ),
        None => "memory unknown".into(),
    }
}

pub(crate) fn train(device: &Device, compute: Compute, options: &Options) -> Result<()> {
    for batch in &options.batch {
        let (rows, length) = batch.split_once('x').ok_or("expected a batch as 2x2048")?;
        let (rows, length): (usize, usize) = (rows.parse()?, length.parse()?);
        for recompute in [Recompute::Block, Recompute::None] {
            let name = format!("{recompute:?}").to_lowercase();
            if options.recompute.as_ref().is_some_and(|wanted| *wanted != name) {
                continue;
            }
            let start = Instant::now();
            let model = options.model.build(device, compute)?;
            let vocabulary = model.config().vocab_size;
            device.sync().map_err(|error| format!("{error:?}"))?;
            println!(
                "{batch}, recompute {recompute:?}: built in {:.1} s, {}",
                start.elapsed().as_secs_f64(),
                memory(device)
            );
            let adapters = AdapterConfig::lora(16, 16.0).with_dropout(options.dropout);
            let tuned = Tuned::attach(model, &adapters)?;
            let count = rows * length * (options.steps + 4) + 1;
            let ids = (0..count as u32).map(|i| i.wrapping_mul(7919) % vocabulary as u32).collect();
            let dataset = Arc::new(Dataset::from_ids(ids, &DataOptions::new(length, vocabulary))?);
            let config = TrainerConfig::new(options.steps as u64 + 3, BatchOptions::new(rows))
                .with_recompute(recompute)
                .with_logit_rows(options.logit_rows);
            let mut trainer = Trainer::new(tuned.into_model(), dataset, config)?;
            let start = Instant::now();
            let first = trainer.step()?;
            device.sync().map_err(|error| format!("{error:?}"))?;
            println!("  first step {:.2} s, loss {:.4}", start.elapsed().as_secs_f64(), first.loss);
            let start = Instant::now();
            for _ in 0..options.steps {
                trainer.step()?;
            }
            device.sync().map_err(|error| format!("{error:?}"))?;
            let seconds = start.elapsed().as_secs_f64() / options.steps as f64;
            println!(
                "  step {:.1} ms, {:.0} tokens/s, {}",
                seconds * 1e3,
                (rows * length) as f64 / seconds,
                memory(device)
            );
            #[cfg(feature = "cube")]
            {
                let (step, launches) = crate::launches::count(|| trainer.step());
                step?;
                println!("  {launches} launches");
                if options.profile {
                    crate::launches::profile(|| trainer.step())?;
                }
            }
        }
    }
    println!();
    Ok(())
}

pub(crate) fn decode(device: &Device, compute: Compute, options: &Options) -> Result<()> {
    let model = options.model.build(device, compute)?;
    let prompt: Vec<u32> = (1..33).collect();
    for tokens in [8, 64] {
        let start = Instant::now();
        let generation = generate(&model, &prompt, &GenerateOptions::new(tokens))?;
        let seconds = start.elapsed().as_secs_f64();
        println!("decoded {} tokens at {:.1} tokens/s", generation.ids.len(), tokens as f64 / seconds);
    }
    Ok(())
}
