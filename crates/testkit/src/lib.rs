//! What the workspace's tests share: seeded values, comparisons, golden files, devices.

use std::{collections::BTreeMap, path::PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::{Dtype, SafeTensors};

/// Uniform values in -1..1.
pub fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| (rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// [`values`] as a tensor.
pub fn tensor<const D: usize>(seed: u64, shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values(seed, shape.iter().product()), shape), device)
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

/// A path below the repository's `testdata`.
pub fn testdata(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata")).join(path)
}

/// A small safetensors file of reference values, read whole.
pub struct Golden(BTreeMap<String, (Vec<usize>, Vec<f64>)>);

impl Golden {
    /// Reads `testdata/path`.
    pub fn open(path: &str) -> Self {
        let bytes = std::fs::read(testdata(path)).unwrap_or_else(|error| panic!("testdata/{path}: {error}"));
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let data = view.data();
            let values: Vec<f64> = match view.dtype() {
                Dtype::F32 => chunks(data, |b| f64::from(f32::from_le_bytes(b))),
                Dtype::F64 => chunks(data, f64::from_le_bytes),
                Dtype::F16 => chunks(data, |b| half::f16::from_le_bytes(b).to_f64()),
                Dtype::BF16 => chunks(data, |b| half::bf16::from_le_bytes(b).to_f64()),
                Dtype::I64 => chunks(data, |b| i64::from_le_bytes(b) as f64),
                Dtype::I32 => chunks(data, |b| f64::from(i32::from_le_bytes(b))),
                Dtype::U8 => data.iter().map(|b| f64::from(*b)).collect(),
                other => panic!("{name}: {other:?}"),
            };
            (name, (view.shape().to_vec(), values))
        });
        Self(tensors.collect())
    }

    /// Whether the file holds `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// A tensor's sizes.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.entry(name).0
    }

    /// A tensor's values in f32.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        self.entry(name).1.iter().map(|value| *value as f32).collect()
    }

    /// A tensor's values as integers.
    pub fn ints(&self, name: &str) -> Vec<i64> {
        self.entry(name).1.iter().map(|value| *value as i64).collect()
    }

    fn entry(&self, name: &str) -> &(Vec<usize>, Vec<f64>) {
        self.0.get(name).unwrap_or_else(|| panic!("no \"{name}\" among {:?}", self.0.keys()))
    }
}

fn chunks<const N: usize>(data: &[u8], f: impl Fn([u8; N]) -> f64) -> Vec<f64> {
    data.chunks_exact(N).map(|chunk| f(chunk.try_into().expect("chunks of N"))).collect()
}
