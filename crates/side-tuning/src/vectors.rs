//! Reading of the method's reference vectors, for unit tests.

use burn::{
    module::Param,
    tensor::{Device, Tensor, TensorData},
};
use kiln_testkit::testdata;
use serde_json::Value;

pub(crate) fn open(name: &str) -> Value {
    let text = std::fs::read(testdata("vectors").join(name)).unwrap();
    serde_json::from_slice(&text).unwrap()
}

/// All numbers of nested lists, in order.
pub(crate) fn floats(value: &Value) -> Vec<f32> {
    match value {
        Value::Array(items) => items.iter().flat_map(floats).collect(),
        number => vec![number.as_f64().expect("a number") as f32],
    }
}

fn length(value: &Value) -> usize {
    value.as_array().map_or(1, Vec::len)
}

pub(crate) fn tensor2(value: &Value, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(floats(value), [length(value), length(&value[0])]), device)
}

pub(crate) fn tensor3(value: &Value, device: &Device) -> Tensor<3> {
    let shape = [length(value), length(&value[0]), length(&value[0][0])];
    Tensor::from_data(TensorData::new(floats(value), shape), device)
}

/// A trained weight `[d_input, d_output]` of a matrix `[d_output, d_input]`.
pub(crate) fn matrix(value: &Value, device: &Device) -> Param<Tensor<2>> {
    let weight = tensor2(value, device).transpose();
    // Burn's linear takes what the optimizer would see: a contiguous weight.
    let shape = weight.dims();
    Param::from_tensor(Tensor::from_data(TensorData::new(kiln_testkit::read(weight), shape), device))
}

pub(crate) fn vector(value: &Value, device: &Device) -> Param<Tensor<1>> {
    Param::from_tensor(Tensor::from_data(floats(value).as_slice(), device))
}
