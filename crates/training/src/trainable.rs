//! A model's trainable parameters, by path.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, TensorData},
};

/// A parameter in host memory, with the id under which the optimizer knows it.
#[derive(Debug, Clone)]
pub(crate) struct Parameter {
    pub id: u64,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A parameter's name: the fields on the way to it. Variants of enums, which begin with a capital letter, are left out,
/// so that a checkpoint fits whether or not an architecture or a kind of adapter is a run-time choice.
pub(crate) fn stable_name<S: AsRef<str>>(path: &[S]) -> String {
    let fields = path.iter().map(AsRef::as_ref);
    let fields = fields.filter(|part| !part.starts_with(|first: char| first.is_ascii_uppercase()));
    fields.collect::<Vec<_>>().join(".")
}

/// Number of values of all parameters that require gradients.
pub(crate) fn count<M: Module>(model: &M) -> usize {
    struct Count(usize);
    impl ModuleVisitor for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            self.0 += if tensor.is_require_grad() { tensor.shape().num_elements() } else { 0 };
        }
    }
    let mut count = Count(0);
    model.visit(&mut count);
    count.0
}

/// Copies all parameters that require gradients.
pub(crate) fn collect<M: Module>(model: &M) -> BTreeMap<String, Parameter> {
    struct Collect {
        path: Vec<String>,
        found: BTreeMap<String, Parameter>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let tensor = param.val();
            if tensor.is_require_grad() {
                let shape = tensor.dims().to_vec();
                let data = tensor.inner().into_data().convert::<f32>();
                let values = data.iter::<f32>().collect();
                self.found.insert(stable_name(&self.path), Parameter { id: param.id.val(), shape, values });
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut collect = Collect { path: Vec::new(), found: BTreeMap::new() };
    model.visit(&mut collect);
    collect.found
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
