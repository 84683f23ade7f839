//! What the workspace's tests share: seeded values, comparisons, files of `testdata`, devices, processes of their own, and
//! what every projection must do.
//!
//! It knows `kiln-quant-core` only, so that the tests of every other crate can use it. A battery stands here if several
//! crates have something to put through it, and otherwise beside the trait that it is about.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests say what they skip and measure")]

mod battery;
mod device;
mod files;
mod golden;
mod process;
mod ranks;

pub use battery::check_projection;
pub use device::{Vulkan, launches, vulkan};
pub use files::{ids, smollm2, testdata, tiny, u16le};
pub use golden::Golden;
pub use process::{figures_of, peak, peak_of, report, resident, task};
pub use ranks::on_ranks;

use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Says that a test can't be done on this machine, and why.
pub fn skipped(why: &str) {
    println!("skipped: {why}");
}

/// Uniform values in -1..1.
pub fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// [`values`] as a tensor.
pub fn tensor<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values(seed, shape.iter().product()), shape), device)
}

/// 1 where `dropped` is false, 0 where it is true.
pub fn kept(dropped: &[bool], shape: [usize; 2], device: &Device) -> Tensor<2> {
    let kept: Vec<f32> = dropped.iter().map(|dropped| f32::from(u8::from(!dropped))).collect();
    Tensor::from_data(TensorData::new(kept, shape), device)
}

/// A tensor's values.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec().expect("f32 values")
}

/// The largest absolute difference.
pub fn max_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "lengths");
    found.iter().zip(expected).map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() }).fold(0.0, |max, d| {
        // A NaN must not pass.
        if d.is_nan() { f32::INFINITY } else { d.max(max) }
    })
}

/// `‖found - expected‖ / ‖expected‖`.
pub fn relative_difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len(), "lengths");
    let square = |x: f64| x * x;
    let difference: f64 =
        found.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let norm: f64 = expected.iter().map(|b| square(f64::from(*b))).sum();
    if norm == 0.0 { difference.sqrt() } else { (difference / norm).sqrt() }
}

/// Panics unless all values agree to `tolerance`, absolutely.
#[track_caller]
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    let difference = max_difference(found, expected);
    assert!(difference <= tolerance, "{what}: largest difference {difference:e}, allowed {tolerance:e}");
}
