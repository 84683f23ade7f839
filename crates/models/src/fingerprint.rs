//! Which model something was made for.

use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{Int, Tensor},
};
use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// SHA-256 over paths, shapes and values of all parameters of a model, in its order: 64 hexadecimal digits.
///
/// Floats are compared as f32, so that it doesn't depend on the device. One tensor at a time is copied to the host.
///
/// # Errors
/// A device that can't be read.
pub fn fingerprint<M: Module>(model: &M) -> Result<String> {
    let mut hash = Hash { path: Vec::new(), sha: Sha256::new(), problem: None };
    model.visit(&mut hash);
    match hash.problem {
        Some(found) => {
            let expected = "parameters that can be read from the device".into();
            Err(Error::Argument { name: "model".into(), expected, found })
        }
        None => Ok(hash.sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
    }
}

struct Hash {
    path: Vec<String>,
    sha: Sha256,
    problem: Option<String>,
}

impl Hash {
    fn head(&mut self, shape: &[usize]) {
        self.sha.update(format!("{}{shape:?}\n", self.path.join(".")));
    }
}

impl ModuleVisitor for Hash {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val().inner();
        self.head(&tensor.dims());
        match tensor.try_into_data() {
            Ok(data) => {
                let values: Vec<u8> =
                    data.convert::<f32>().iter::<f32>().flat_map(f32::to_le_bytes).collect();
                self.sha.update(values);
            }
            Err(error) => self.problem = Some(format!("{}: {error}", self.path.join("."))),
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        self.head(&tensor.dims());
        match tensor.try_into_data() {
            Ok(data) => {
                let values: Vec<u8> = data.iter::<i64>().flat_map(i64::to_le_bytes).collect();
                self.sha.update(values);
            }
            Err(error) => self.problem = Some(format!("{}: {error}", self.path.join("."))),
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}
