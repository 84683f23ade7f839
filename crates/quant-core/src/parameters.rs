//! A module's parameters, by path.

use std::fmt;

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{Int, Tensor},
};

use sha2::{Digest, Sha256};

use crate::{Error, Result, hash::hex, ints_to_host, to_host};

/// A parameter's values in host memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub enum HostValues {
    /// Of any float type.
    Floats(Vec<f32>),
    /// Whole numbers: codes, orders.
    Ints(Vec<i64>),
}

/// Whether a segment of a parameter's path names an enum's variant or a model's own type, and no field: it begins with a capital
/// letter and has no underscore, as fields that checkpoints name like `A_log` have.
pub fn is_variant(segment: &str) -> bool {
    segment.starts_with(|first: char| first.is_ascii_uppercase()) && !segment.contains('_')
}

/// A parameter's name: the fields on the way to it. Variants of enums, which begin with a capital letter, are left out,
/// so that a checkpoint fits whether or not an architecture or a kind of adapter is a run-time choice.
pub fn stable_name<S: AsRef<str>>(path: &[S]) -> String {
    let fields = path.iter().map(AsRef::as_ref);
    let fields = fields.filter(|part| !is_variant(part));
    fields.collect::<Vec<_>>().join(".")
}

/// One parameter of a module, as [`for_each_parameter`] shows it.
pub struct Parameter<'a> {
    /// Names of the modules that it stands in, then its own.
    pub path: &'a [String],
    /// Under which optimizers know it.
    pub id: ParamId,
    /// Its sizes.
    pub shape: Vec<usize>,
    /// Whether it requires gradients.
    pub trained: bool,
    read: &'a dyn Fn(&str) -> Result<HostValues>,
}

impl fmt::Debug for Parameter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Parameter")
            .field("path", &self.path)
            .field("shape", &self.shape)
            .field("trained", &self.trained)
            .finish_non_exhaustive()
    }
}

impl Parameter<'_> {
    /// The path with dots.
    pub fn name(&self) -> String {
        self.path.join(".")
    }

    /// How many values it has.
    pub fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Copies the values.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn values(&self) -> Result<HostValues> {
        (self.read)(&self.name())
    }
}

/// Shows all parameters of `module`, floats and whole numbers, in its order; nothing is copied unless `f` asks for it.
///
/// ```
/// use burn::{nn::LinearConfig, tensor::Device};
/// use kiln_quant_core::{HostValues, for_each_parameter};
/// let linear = LinearConfig::new(3, 2).init(&Device::flex());
/// let mut found = Vec::new();
/// for_each_parameter(&linear, |parameter| {
///     let HostValues::Floats(values) = parameter.values()? else { panic!("floats") };
///     found.push((parameter.name(), parameter.shape, values.len()));
///     Ok::<_, kiln_quant_core::Error>(())
/// })?;
/// assert_eq!(found, [("weight".to_string(), vec![3, 2], 6), ("bias".to_string(), vec![2], 2)]);
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
///
/// # Errors
/// The first error of `f`.
pub fn for_each_parameter<M: Module, E>(
    module: &M,
    f: impl FnMut(Parameter) -> Result<(), E>,
) -> Result<(), E> {
    let mut visit = Visit { path: Vec::new(), f, result: Ok(()) };
    module.visit(&mut visit);
    visit.result
}

/// How many values of `module` are trained.
pub fn trained_values<M: Module>(module: &M) -> usize {
    let mut count = 0;
    let counted: Result<(), std::convert::Infallible> = for_each_parameter(module, |parameter| {
        count += if parameter.trained { parameter.count() } else { 0 };
        Ok(())
    });
    let Ok(()) = counted;
    count
}

/// SHA-256 of the parameters that `is_wanted`, by path. Every value is read, one tensor at a time.
///
/// # Errors
/// A device that can't be read.
pub fn fingerprint<M: Module>(model: &M, is_wanted: impl Fn(&Parameter<'_>) -> bool) -> Result<String> {
    let mut hash = Sha256::new();
    for_each_parameter(model, |parameter| {
        if !is_wanted(&parameter) {
            return Ok(());
        }
        hash.update(format!("{} {:?}\n", stable_name(parameter.path), parameter.shape));
        match parameter.values()? {
            HostValues::Floats(values) => update(&mut hash, &values, f32::to_le_bytes),
            HostValues::Ints(values) => update(&mut hash, &values, i64::to_le_bytes),
        }
        Ok::<_, Error>(())
    })?;
    Ok(hex(hash.finalize()))
}

fn update<T: Copy, const N: usize>(hash: &mut Sha256, values: &[T], bytes: fn(T) -> [u8; N]) {
    const AT_ONCE: usize = 4096;
    for values in values.chunks(AT_ONCE) {
        hash.update(values.iter().flat_map(|value| bytes(*value)).collect::<Vec<u8>>());
    }
}

struct Visit<F, E> {
    path: Vec<String>,
    f: F,
    result: Result<(), E>,
}

impl<E, F: FnMut(Parameter) -> Result<(), E>> Visit<F, E> {
    fn show(
        &mut self,
        id: ParamId,
        shape: Vec<usize>,
        trained: bool,
        read: &dyn Fn(&str) -> Result<HostValues>,
    ) {
        if self.result.is_ok() {
            self.result = (self.f)(Parameter { path: &self.path, id, shape, trained, read });
        }
    }
}

impl<E, F: FnMut(Parameter) -> Result<(), E>> ModuleVisitor for Visit<F, E> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.val();
        let read = |name: &str| Ok(HostValues::Floats(to_host(name, tensor.clone().inner())?));
        self.show(param.id, tensor.dims().to_vec(), tensor.is_require_grad(), &read);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        let read = |name: &str| Ok(HostValues::Ints(ints_to_host(name, tensor.clone())?));
        self.show(param.id, tensor.dims().to_vec(), false, &read);
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_told_from_fields() {
        for variant in ["Dense", "Qwen35", "Lora"] {
            assert!(is_variant(variant), "{variant}");
        }
        for field in ["weight", "A_log", "0", ""] {
            assert!(!is_variant(field), "{field}");
        }
    }
}
