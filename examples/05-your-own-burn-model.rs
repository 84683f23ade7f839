//! Packed linears and LoRA in a Burn module of your own: a small classifier, not a language model.
//!
//! It is trained dense on one task, packed to 4 bits, and then adapted to a shifted task through LoRA alone.

use std::process::ExitCode;

use burn::{
    module::Module,
    nn::{Linear, LinearConfig},
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData, activation::relu},
};
use clap::Parser;
use kiln::{
    adapters::{Adapted, Lora, LoraAttacher, PeftConfig, TargetModules},
    quant::{HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantLinear, fused},
};
use kiln_examples::{DeviceName, Result};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Where to compute.
    #[arg(long, value_enum, default_value = "flex")]
    device: DeviceName,
}

/// Any module can be generic over what stands in its slots.
#[derive(Module, Debug)]
struct Classifier<P: Projection> {
    hidden: P,
    output: P,
}

const INPUTS: usize = 64;
const HIDDEN: usize = 128;
const CLASSES: usize = 8;

impl<P: Projection> Classifier<P> {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.output.forward(relu(self.hidden.forward(x)))
    }

    fn map<Q: Projection>(self, mut f: impl FnMut(&str, P) -> Result<Q>) -> Result<Classifier<Q>> {
        Ok(Classifier { hidden: f("hidden", self.hidden)?, output: f("output", self.output)? })
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

/// Packs a trained linear to 4 bits.
fn pack(name: &str, linear: Linear, device: &Device) -> Result<QuantLinear> {
    let [d_input, d_output] = linear.weight.dims();
    // Quantizers take weights as checkpoints store them, an output a row.
    let rows: Vec<f32> = linear.weight.val().transpose().into_data().iter::<f32>().collect();
    let packed = MinMax.quantize(name, &rows, d_input, d_output, &"affine4:32".parse()?)?;
    println!("{name}: {:.2} bits per weight", packed.scheme.bits_per_weight(d_input, d_output));
    Ok(QuantLinear::Packed(PackedLinear {
        weight: PackedTensor::new(&packed, device),
        bias: linear.bias.map(|b| b.no_grad()),
    }))
}

fn run(options: Options) -> Result<()> {
    let device = options.device.open()?;
    device.seed(7);
    let dense = Classifier {
        hidden: LinearConfig::new(INPUTS, HIDDEN).init(&device),
        output: LinearConfig::new(HIDDEN, CLASSES).init(&device),
    };
    let dense = train(dense, 0, &device).valid();
    println!("dense: accuracy {:.3}", accuracy(&dense, points(1000, 0, &device)));

    let packed = dense.map(|name, linear| pack(name, linear, &device))?;
    println!("packed: accuracy {:.3}", accuracy(&packed, points(1000, 0, &device)));
    println!("packed, shifted task: accuracy {:.3}", accuracy(&packed, points(1000, 4, &device)));

    let slots = [("hidden".to_string(), [INPUTS, HIDDEN]), ("output".to_string(), [HIDDEN, CLASSES])];
    let attacher = LoraAttacher::new(
        &PeftConfig::new(4, 8.0, TargetModules::Names(vec!["hidden".into(), "output".into()])),
        &slots,
        0,
    )?;
    let adapted: Classifier<Adapted<QuantLinear, Lora>> =
        packed.map(|name, base| Ok(attacher.attach(name, base)?))?;
    let adapted = train(adapted, 4, &device);
    println!("adapted, shifted task: accuracy {:.3}", accuracy(&adapted, points(1000, 4, &device)));
    Ok(())
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
