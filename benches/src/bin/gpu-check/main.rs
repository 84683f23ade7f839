//! What a GPU does with Kiln: is it right, how fast are the kernels beside what the device can do, how fast is a step.
//!
//! `cargo run --release -p kiln-benches --features vulkan --bin gpu-check -- --device vulkan`
//!
//! Models are synthetic: the shapes of published ones with random weights, so that nothing has to be carried. Each part
//! can be run alone, so that one that hangs costs no other; `scripts/gpu-check.sh` does so.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

mod kernels;
#[cfg(feature = "cube")]
mod launches;
mod operations;
mod step;
mod synthetic;

use std::{error::Error, process::ExitCode};

use burn::tensor::{Device, Distribution, Tensor};
use clap::{Parser, ValueEnum};
use kiln::quant::{Compute, DeviceLimits};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Where to compute.
    #[arg(long, value_enum, default_value = "flex")]
    device: DeviceName,
    /// What operands of products are rounded to; what suits the device best if left out.
    #[arg(long)]
    compute: Option<Compute>,
    /// Parts to run, all if left out.
    #[arg(long, value_enum, value_delimiter = ',')]
    part: Vec<Part>,
    /// The model of steps and decoding.
    #[arg(long, value_enum, default_value = "llama-1b")]
    model: synthetic::Model,
    /// Rows and tokens of a row of the steps, as 2x2048.
    #[arg(long, value_delimiter = ',', default_value = "1x512,2x2048")]
    batch: Vec<String>,
    /// Share of the adapters' input that is dropped.
    #[arg(long, default_value_t = 0.0)]
    dropout: f64,
    /// Says which kernels take the time of a step.
    #[arg(long)]
    profile: bool,
    /// Rows of logits held at once.
    #[arg(long, default_value_t = 1024)]
    logit_rows: usize,
    /// What the steps compute again, none or block; both, one after the other, if left out.
    #[arg(long)]
    recompute: Option<String>,
    /// Timed steps, after one that is not.
    #[arg(long, default_value_t = 3)]
    steps: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Every operation and its gradients beside the CPU's.
    Operations,
    /// Kernels beside what they must at least move or multiply.
    Kernels,
    /// Training steps.
    Step,
    /// Tokens one after the other.
    Decode,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DeviceName {
    Flex,
    Wgpu,
    Vulkan,
    Cuda,
}

fn open(name: DeviceName) -> Result<Device> {
    match name {
        #[cfg(feature = "flex")]
        DeviceName::Flex => Ok(Device::flex()),
        #[cfg(feature = "wgpu")]
        DeviceName::Wgpu => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        DeviceName::Vulkan => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        DeviceName::Cuda => Ok(Device::cuda(0)),
        #[allow(unreachable_patterns)] // with every feature on
        _ => Err("built without this device: add its feature to the command".into()),
    }
}

fn random<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

fn run(options: &Options) -> Result<()> {
    let device = open(options.device)?;
    let limits = DeviceLimits::of(&device);
    let compute = options.compute.unwrap_or_else(|| Compute::best(&device)).check(&device)?;
    println!("{limits}");
    println!("operands of products: {compute}\n");
    let wanted = |part| options.part.is_empty() || options.part.contains(&part);
    if wanted(Part::Operations) {
        operations::run(&device, compute)?;
    }
    if wanted(Part::Kernels) {
        kernels::run(&device, compute)?;
    }
    if wanted(Part::Step) {
        step::train(&device, compute, options)?;
    }
    if wanted(Part::Decode) {
        step::decode(&device, compute, options)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
