//! Reference values of other programs.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

use crate::testdata;

/// A small safetensors file of reference values, read whole.
#[derive(Debug)]
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
