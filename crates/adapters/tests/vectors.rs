//! Reading the specification's test vectors.

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use kiln_testkit::testdata;
use serde_json::Value;

/// `testdata/vectors/balanced_rank_NAME.json`.
pub(crate) fn open(name: &str) -> Value {
    let path = testdata("vectors").join(format!("balanced_rank_{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn flatten(value: &Value, into: &mut Vec<f64>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| flatten(item, into)),
        number => into.push(number.as_f64().unwrap()),
    }
}

/// All numbers, row-major.
pub(crate) fn floats(value: &Value) -> Vec<f32> {
    let mut values = Vec::new();
    flatten(value, &mut values);
    values.into_iter().map(|value| value as f32).collect()
}

/// A matrix; of three dimensions the first two are joined.
pub(crate) fn matrix(value: &Value, device: &Device) -> Tensor<2> {
    let values = floats(value);
    let mut last = value;
    while last[0].is_array() {
        last = &last[0];
    }
    let columns = last.as_array().unwrap().len();
    let shape = [values.len() / columns, columns];
    Tensor::from_data(TensorData::new(values, shape), device)
}

pub(crate) fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// A layer with the weight `[d_output, d_input]`.
pub(crate) fn linear(weight: &Value, device: &Device) -> Linear {
    Linear { weight: Param::initialized(ParamId::new(), matrix(weight, device).transpose()), bias: None }
}
