//! Errors of single projections' outputs, from second moments of their inputs.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{module::Module, tensor::Tensor};
use kiln_models::{AnyModel, CausalLm, Slots, TokenBatch};
use kiln_quant_core::{Projection, QuantLinear};

use super::{Error, Result, kl::check_windows, variants::host};

/// `X^T X` of every projection's inputs in the original model.
///
/// # Memory
/// Four bytes for each pair of inputs of each projection.
#[derive(Debug, Clone)]
pub struct Moments {
    sums: HashMap<String, Tensor<2>>,
}

impl Moments {
    /// Runs the original on windows of equal length, one at a time.
    ///
    /// # Errors
    /// [`Error::is_argument`] for windows that don't fit the model.
    pub fn measure(original: &AnyModel<QuantLinear>, windows: &[Vec<u32>]) -> Result<Self> {
        check_windows(original, windows)?;
        let sums = Sums::default();
        let model = original
            .clone()
            .try_map(|path, base| Ok::<_, Error>(Listener { base, path: path.into(), sums: sums.clone() }))?;
        for window in windows {
            let tokens = TokenBatch::new(std::slice::from_ref(window))?;
            model.residual(&model.context(&tokens, None), None);
        }
        let sums = std::mem::take(&mut *sums.lock());
        Ok(Self { sums })
    }

    /// `|| X (W - Q) ||² / || X W ||²` of a projection, in squared Frobenius norms.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a path that the model lacks.
    pub fn relative_error(&self, path: &str, original: &QuantLinear, quantized: &QuantLinear) -> Result<f64> {
        let sum = self.sums.get(path).ok_or_else(|| Error::argument(path, "a measured linear", "none"))?;
        let energy = |weight: Tensor<2>| -> Result<f64> {
            let products = (sum.clone().matmul(weight.clone()) * weight).sum_dim(0);
            Ok(host(path, products)?.into_iter().map(f64::from).sum())
        };
        let weight = original.weight();
        let (error, signal) = (energy(weight.clone() - quantized.weight())?, energy(weight)?);
        Ok(if signal > 0.0 { error.max(0.0) / signal } else { 0.0 })
    }
}

#[derive(Debug, Clone, Default)]
struct Sums(Arc<Mutex<HashMap<String, Tensor<2>>>>);

impl Sums {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Tensor<2>>> {
        // The map is whole between any two statements, so a panic elsewhere doesn't spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A linear that adds up the products of its inputs.
#[derive(Module, Debug)]
struct Listener {
    base: QuantLinear,
    #[module(skip)]
    path: String,
    #[module(skip)]
    sums: Sums,
}

impl Projection for Listener {
    fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let sizes = x.dims();
        let rows: Tensor<2> = x.clone().reshape([sizes[..D - 1].iter().product::<usize>(), sizes[D - 1]]);
        let product = rows.clone().transpose().matmul(rows);
        let mut sums = self.sums.lock();
        let sum = match sums.remove(&self.path) {
            Some(sum) => sum + product,
            None => product,
        };
        sums.insert(self.path.clone(), sum);
        drop(sums);
        self.base.forward(x)
    }

    fn weight(&self) -> Tensor<2> {
        self.base.weight()
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.base.bias()
    }

    fn shape(&self) -> [usize; 2] {
        self.base.shape()
    }
}
