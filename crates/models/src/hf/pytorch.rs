//! PyTorch's own files (`pytorch_model.bin`): pickles, read by Burn's reader, which knows tensors and containers and calls
//! nothing that a file names.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use kiln_quant_core::safetensors_file::{Dtype, RawTensor};
use pytorch_reader::{DType, PytorchReader, Tensor};

use crate::{Error, Result};

/// One open file: its names are there, its tensors are read when asked for.
#[derive(Debug)]
pub(super) struct PytorchFile {
    path: PathBuf,
    tensors: BTreeMap<String, (Dtype, Tensor)>,
}

impl PytorchFile {
    pub(super) fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let wrong = |field: &str, expected: &str, found: String| Error::File {
            path: path.clone(),
            field: field.into(),
            expected: expected.into(),
            found,
        };
        // The library is outside code beside untrusted files.
        let opened = catch_unwind(AssertUnwindSafe(|| PytorchReader::new(&path)));
        let reader = opened
            .map_err(|_| wrong("pickle", "a checkpoint of tensors", "one that can't be read".into()))?
            .map_err(|error| wrong("pickle", "a checkpoint of tensors", error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in reader.into_tensors() {
            let dtype = dtype(tensor.dtype());
            tensors.insert(name, (dtype, tensor));
        }
        Ok(Self { path, tensors })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    fn wrong(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::File {
            path: self.path.clone(),
            field: name.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    fn tensor(&self, name: &str) -> Result<&(Dtype, Tensor)> {
        self.tensors.get(name).ok_or_else(|| self.wrong(name, "a tensor", "none of that name"))
    }

    pub(super) fn describe(&self, name: &str) -> Result<(Dtype, &[usize])> {
        self.tensor(name).map(|(dtype, tensor)| (*dtype, tensor.shape()))
    }

    pub(super) fn read(&self, name: &str) -> Result<RawTensor> {
        let (dtype, tensor) = self.tensor(name)?;
        let bytes = catch_unwind(AssertUnwindSafe(|| tensor.read()))
            .map_err(|_| self.wrong(name, "the tensor's bytes", "what can't be read"))?
            .map_err(|error| self.wrong(name, "the tensor's bytes", error.to_string()))?;
        Ok(RawTensor { dtype: *dtype, shape: tensor.shape().to_vec(), bytes })
    }

    /// As f32, of any float type.
    pub(super) fn read_f32(&self, name: &str) -> Result<(Vec<usize>, Vec<f32>)> {
        let tensor = self.read(name)?;
        let values = match tensor.dtype {
            Dtype::F32 => decode(&tensor.bytes, f32::from_le_bytes),
            Dtype::F16 => decode(&tensor.bytes, |bytes| half::f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => decode(&tensor.bytes, |bytes| half::bf16::from_le_bytes(bytes).to_f32()),
            Dtype::F64 => decode(&tensor.bytes, |bytes| f64::from_le_bytes(bytes) as f32),
            other => return Err(self.wrong(name, "type F32, F16, BF16 or F64", other.to_string())),
        };
        Ok((tensor.shape, values))
    }
}

fn decode<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|bytes| value(*bytes)).collect()
}

fn dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool => Dtype::BOOL,
    }
}
