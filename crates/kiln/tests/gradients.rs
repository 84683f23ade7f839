//! Gradients by the paths of parameters.

use std::collections::BTreeMap;

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::Tensor,
};
use kiln_testkit::read;

/// Shapes and values, row-major, of all gradients.
pub(crate) fn of<M: Module>(
    model: &M,
    gradients: &GradientsParams,
) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let mut found = Found { path: Vec::new(), gradients, found: BTreeMap::new() };
    model.visit(&mut found);
    found.found
}

/// `values` `[rows, columns]` as `[columns, rows]`.
pub(crate) fn transposed_from(shape: &[usize], values: &[f32]) -> Vec<f32> {
    let columns = shape[1];
    let column = |column| (0..shape[0]).map(move |row| row * columns + column);
    (0..columns).flat_map(column).map(|index| values[index]).collect()
}

struct Found<'a> {
    path: Vec<String>,
    gradients: &'a GradientsParams,
    found: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl ModuleVisitor for Found<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let path = self.path.iter().filter(|part| !kiln::quant::is_variant(part));
            let path = path.map(String::as_str).collect::<Vec<_>>().join(".");
            self.found.insert(path, (gradient.dims().to_vec(), read(gradient)));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
