//! Whole folders: those of the fixtures, and small ones made of fixture tensors.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;

mod checkpoints;
mod configs;
mod quantized;

fn testdata(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata")).join(name)
}

/// A configuration that every test may change.
fn tiny_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    })
}

/// `base` with the keys of `changes` set.
fn with(mut base: Value, changes: Value) -> Value {
    base.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    base
}

/// Writes a folder with one safetensors file.
fn folder(config: &Value, tensors: &[(&str, RawTensor)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let (start, end) = (data.len(), data.len() + tensor.bytes.len());
        header.insert(
            (*name).into(),
            json!({"dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end]}),
        );
        data.extend(&tensor.bytes);
    }
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    folder
}

fn u8s(bytes: impl Into<Vec<u8>>) -> RawTensor {
    let bytes = bytes.into();
    RawTensor { dtype: Dtype::U8, shape: vec![bytes.len()], bytes }
}

fn f32s(values: &[f32]) -> RawTensor {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    RawTensor { dtype: Dtype::F32, shape: vec![values.len()], bytes }
}

fn i32s(shape: &[usize], values: impl IntoIterator<Item = u32>) -> RawTensor {
    let bytes: Vec<u8> = values.into_iter().flat_map(u32::to_le_bytes).collect();
    assert_eq!(bytes.len(), 4 * shape.iter().product::<usize>());
    RawTensor { dtype: Dtype::I32, shape: shape.into(), bytes }
}

fn packed(folder: &HfFolder, module: &str) -> PackedWeight {
    match folder.weight(module).unwrap() {
        StoredWeight::Packed(packed) => packed,
        StoredWeight::Dense(_) => panic!("{module} is dense"),
    }
}

/// The message of an error, which must hold every part.
#[track_caller]
fn assert_error<T: std::fmt::Debug>(result: Result<T>, parts: &[&str]) {
    let message = result.unwrap_err().to_string();
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}
