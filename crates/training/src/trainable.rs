//! A model's trainable parameters, by path.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{DType, FloatDType, Tensor, TensorData},
};
use kiln_quant_core::{HostValues, PathPattern, for_each_parameter, stable_name};

use crate::{Result, error::Problem};

/// A parameter in host memory, with the id under which the optimizer knows it.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    pub id: u64,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// The model with the parameters that require gradients whose paths match a pattern, and all others as they are: biases
/// (`bias`) and norms for BitFit, a head, an embedding. Paths are those of the module: of Kiln's models the
/// checkpoint's, such as `model.layers.0.input_layernorm.weight`.
///
/// ```
/// # use burn::{nn::{Linear, LinearConfig}, module::Module, tensor::Device};
/// let model = LinearConfig::new(4, 3).init(&Device::flex()).freeze();
/// let model = kiln_training::with_trained(model, &["bias".parse()?])?.train();
/// assert!(model.bias.unwrap().is_require_grad() && !model.weight.is_require_grad());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::Argument`](crate::Error::Argument) for a pattern that no parameter of floating-point numbers matches.
pub fn with_trained<M: Module>(model: M, patterns: &[PathPattern]) -> Result<M> {
    struct Train<'a> {
        path: Vec<String>,
        patterns: &'a [PathPattern],
        matched: Vec<bool>,
    }
    impl ModuleMapper for Train<'_> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let path = stable_name(&self.path);
            let mut found = false;
            for (pattern, matched) in self.patterns.iter().zip(&mut self.matched) {
                let matches = pattern.matches(&path);
                *matched |= matches;
                found |= matches;
            }
            if found { param.set_require_grad(true) } else { param }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut train = Train { path: Vec::new(), patterns, matched: vec![false; patterns.len()] };
    let model = model.map(&mut train);
    match train.matched.iter().position(|matched| !matched) {
        Some(index) => {
            let expected = "a parameter of floating-point numbers that matches";
            Err(Problem::new(format!("pattern {}", patterns[index]), expected, "none").argument())
        }
        None => Ok(model),
    }
}

/// Copies all parameters that require gradients.
///
/// # Errors
/// A device that can't be read.
pub(crate) fn collect<M: Module>(model: &M) -> Result<BTreeMap<String, Parameter>> {
    let mut found = BTreeMap::new();
    for_each_parameter(model, |parameter| {
        if !parameter.trained {
            return Ok(());
        }
        if let HostValues::Floats(values) = parameter.values()? {
            let (name, id) = (stable_name(parameter.path), parameter.id.val());
            found.insert(name, Parameter { id, shape: parameter.shape, values });
        }
        Ok::<_, kiln_models::Error>(())
    })?;
    Ok(found)
}

/// Widens trained parameters that are kept in 16 bits: a step is smaller than their rounding.
pub(crate) fn widened<M: Module>(model: M) -> M {
    struct Widen;
    impl ModuleMapper for Widen {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let value = param.val();
            if !value.is_require_grad() || value.dtype().size() >= DType::F32.size() {
                return param;
            }
            let (id, tensor, mapper) = param.consume();
            Param::from_mapped_value(id, tensor.cast(FloatDType::F32).detach().require_grad(), mapper)
        }
    }
    model.map(&mut Widen)
}

/// Puts parameters back, values and ids; `parameters` must have the paths and shapes that [`collect`] finds.
pub(crate) fn restore<M: Module>(model: M, parameters: BTreeMap<String, Parameter>) -> M {
    struct Restore {
        path: Vec<String>,
        parameters: BTreeMap<String, Parameter>,
    }
    impl ModuleMapper for Restore {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(saved) = self.parameters.remove(&stable_name(&self.path)) else { return param };
            let (_, tensor, mapper) = param.consume();
            let data = TensorData::new(saved.values, saved.shape);
            let tensor = Tensor::from_data(data, &tensor.device()).require_grad();
            Param::from_mapped_value(ParamId::from(saved.id), tensor, mapper)
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    model.map(&mut Restore { path: Vec::new(), parameters })
}
