//! Initial values: functions of (seed, path) only.

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use kiln_models::{
    Norm,
    families::{NormKind, VectorRole},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use sha2::{Digest, Sha256};

/// Makes trained parts. Linears are uniform within `1 / sqrt(d_input)`, weights and biases: PyTorch's defaults, and also
/// what its Kaiming rule with a = sqrt(5) gives.
pub(crate) struct Init {
    pub seed: u64,
    pub device: Device,
}

impl Init {
    fn uniform<const D: usize>(&self, path: &str, d_input: usize, shape: [usize; D]) -> Param<Tensor<D>> {
        let mut hash = Sha256::new();
        hash.update(self.seed.to_le_bytes());
        hash.update(path);
        let mut rng = ChaCha8Rng::from_seed(hash.finalize().into());
        let bound = (d_input as f64).powf(-0.5);
        // In steps of 2^-23 of the bound.
        let unit = |rng: &mut ChaCha8Rng| f64::from(rng.next_u32() >> 8) / f64::from(1 << 23) - 1.0;
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| (unit(&mut rng) * bound) as f32).collect();
        self.param(values, shape)
    }

    fn param<const D: usize>(&self, values: Vec<f32>, shape: [usize; D]) -> Param<Tensor<D>> {
        Param::from_tensor(Tensor::from_data(TensorData::new(values, shape), &self.device))
    }

    pub(crate) fn linear(&self, path: &str, [d_input, d_output]: [usize; 2], bias: bool) -> Linear {
        Linear {
            weight: self.uniform(&format!("{path}.weight"), d_input, [d_input, d_output]),
            bias: bias.then(|| self.uniform(&format!("{path}.bias"), d_input, [d_output])),
        }
    }

    /// A linear that gives zero until it is trained.
    pub(crate) fn zero_linear(&self, [d_input, d_output]: [usize; 2]) -> Linear {
        Linear {
            weight: self.param(vec![0.0; d_input * d_output], [d_input, d_output]),
            bias: Some(self.full(d_output, 0.0)),
        }
    }

    pub(crate) fn full(&self, size: usize, value: f64) -> Param<Tensor<1>> {
        self.param(vec![value as f32; size], [size])
    }

    /// Numbers that training may change where their role says so.
    pub(crate) fn vector(&self, size: usize, role: VectorRole) -> Param<Tensor<1>> {
        let values = self.full(size, vector_start(role));
        if role.is_trained() { values } else { values.set_require_grad(false) }
    }

    /// A norm that leaves its input's scale alone: gains of 1.
    pub(crate) fn norm(&self, kind: NormKind, width: usize, eps: f64, affine: bool) -> Norm {
        let gain = if kind == NormKind::RmsOnePlus { 0.0 } else { 1.0 };
        Norm {
            weight: affine.then(|| self.full(width, gain)),
            bias: (affine && kind == NormKind::Layer).then(|| self.full(width, 0.0)),
            eps,
            kind,
        }
    }
}

/// What xIELU's parameters begin with in transformers: `alpha_p` and `alpha_n` whose softplus are 0.8 and 0.8 - beta.
fn vector_start(role: VectorRole) -> f64 {
    let before_softplus = |y: f64| y.exp_m1().ln();
    match role {
        VectorRole::XieluPositive => before_softplus(0.8),
        VectorRole::XieluNegative => before_softplus(0.8 - XIELU_BETA),
        VectorRole::XieluBeta => XIELU_BETA,
        VectorRole::XieluEps => -1e-6,
        VectorRole::RouterBias | VectorRole::Sinks => 0.0,
        VectorRole::DeltaConvolution | VectorRole::DeltaLogRate | VectorRole::DeltaTimeBias => 0.0,
        VectorRole::RouterScale
        | VectorRole::ExpertScales
        | VectorRole::LayerScalar
        | VectorRole::DeltaNorm => 1.0,
    }
}

const XIELU_BETA: f64 = 0.5;

#[cfg(test)]
mod tests {
    use kiln_testkit::read;

    use super::*;

    #[test]
    fn values_are_bounded_and_depend_on_seed_and_path() {
        let init = |seed| Init { seed, device: Device::flex() };
        let values = |seed, path| read(init(seed).linear(path, [100, 40], true).weight.val());
        let first = values(1, "a");
        assert_eq!(first, values(1, "a"));
        assert_ne!(first, values(2, "a"));
        assert_ne!(first, values(1, "b"));
        // Uniform within 1 / sqrt(100): variance 0.01 / 3.
        let largest = first.iter().fold(0f32, |max, v| max.max(v.abs()));
        assert!(largest <= 0.1 && largest > 0.099, "{largest}");
        let variance = first.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 4000.0;
        assert!((variance * 300.0 - 1.0).abs() < 0.06, "{variance}");
    }
}
