//! Packed linears and LoRA in a Burn module of your own: a small classifier, not a language model.
//!
//! It is trained dense on one task, packed to 4 bits, and then adapted to a shifted task through LoRA alone.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::process::ExitCode;

use burn::{
    module::Module,
    nn::{LayerNorm, LayerNormConfig, LinearConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData, activation::relu},
};
use clap::Parser;
use kiln::{
    Tuned,
    adapters::AdapterConfig,
    quant::{Projection, QuantLinear, QuantScheme, Slots, fused, slots},
};
use kiln_examples::{DeviceName, Result, say};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Where to compute.
    #[arg(long, default_value = "flex")]
    device: DeviceName,
}

/// Any module can be generic over what stands in its slots.
#[derive(Module, Debug)]
struct Classifier<P: Projection> {
    hidden: P,
    norm: LayerNorm,
    output: P,
}

slots!(Classifier { slot hidden, keep norm, slot output });

const INPUTS: usize = 64;
const HIDDEN: usize = 128;
const CLASSES: usize = 8;

impl<P: Projection> Classifier<P> {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(relu(self.norm.forward(self.hidden.forward(x))))
    }
}

/// Points around `CLASSES` centres; `shift` rotates the coordinates, so that an old model misreads the new points.
fn points(seed: u64, shift: usize, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    const COUNT: usize = 512;
    let mut state = seed;
    let mut random = || {
        // A 64-bit linear congruential generator is good enough for scattered points.
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let labels: Vec<i64> = (0..COUNT).map(|i| (i % CLASSES) as i64).collect();
    let values: Vec<f32> = labels
        .iter()
        .flat_map(|&label| {
            let centre = (label as usize * 8 + shift) % INPUTS;
            (0..INPUTS)
                .map(|i| if (i + INPUTS - centre) % INPUTS < 8 { 1.0 } else { 0.0 })
                .collect::<Vec<f32>>()
        })
        .map(|value| value + 0.8 * random())
        .collect();
    let x = Tensor::from_data(TensorData::new(values, [COUNT, INPUTS]), device);
    (x, Tensor::from_data(TensorData::new(labels, [COUNT]), device))
}

fn accuracy<P: Projection>(model: &Classifier<P>, (x, labels): (Tensor<2>, Tensor<1, Int>)) -> f32 {
    let found = model.valid().forward(x).argmax(1).squeeze_dim::<1>(1);
    found.equal(labels).float().mean().into_scalar()
}

fn train<P: Projection>(model: Classifier<P>, shift: usize, device: &Device) -> Classifier<P> {
    let mut model = model.train();
    let mut optimizer = AdamWConfig::new().init();
    for step in 0..60 {
        let (x, labels) = points(step, shift, device);
        let loss = fused::cross_entropy(model.forward(Tensor::from_inner(x)), labels).mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    model
}

fn run(options: Options) -> Result<()> {
    let device = options.device.open()?;
    device.seed(7);
    let dense = Classifier {
        hidden: LinearConfig::new(INPUTS, HIDDEN).init(&device),
        norm: LayerNormConfig::new(HIDDEN).init(&device),
        output: LinearConfig::new(HIDDEN, CLASSES).init(&device),
    };
    let dense = train(dense, 0, &device).valid();
    say!("dense: accuracy {:.3}", accuracy(&dense, points(1000, 0, &device)));

    let scheme: QuantScheme = "affine4:32".parse()?;
    say!("hidden: {:.2} bits per weight", scheme.bits_per_weight(INPUTS, HIDDEN));
    let packed = dense.try_map(|name, linear| QuantLinear::pack(name, linear, &scheme))?;
    say!("packed: accuracy {:.3}", accuracy(&packed, points(1000, 0, &device)));
    say!("packed, shifted task: accuracy {:.3}", accuracy(&packed, points(1000, 4, &device)));

    // Attaching freezes what stands outside the adapters, here the norm: a folder of adapters would not hold it.
    let tuned = Tuned::attach(packed.clone(), &AdapterConfig::lora(4, 8.0))?;
    let tuned = tuned.map_model(|model| train(model, 4, &device).valid());
    let folder = std::env::temp_dir().join(format!("kiln-example-05-{}", std::process::id()));
    tuned.save(&folder)?;
    let adapted = Tuned::load(packed, &folder)?.into_model();
    std::fs::remove_dir_all(&folder)?;
    say!("adapted, shifted task: accuracy {:.3}", accuracy(&adapted, points(1000, 4, &device)));
    Ok(())
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
