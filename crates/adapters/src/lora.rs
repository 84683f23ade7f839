//! Low-rank adapters.

use burn::{
    module::{Module, Param},
    tensor::Tensor,
};
use kiln_quant_core::{
    Place, Projection,
    fused::{self, LowRankSpec},
    random::{Purpose, generator, normal, path_hash, uniform},
};
use rand_chacha::ChaCha8Rng;

use crate::{Adapter, Dropout, InitLoraWeights};

/// [LoRA](https://arxiv.org/abs/2106.09685): `y = base(x) + scaling · dropout(x) · A · B`, A and B trained in f32.
///
/// With scaling alpha / √r in place of alpha / r it is [rank-stabilised LoRA](https://arxiv.org/abs/2312.03732).
///
/// A has the shape `[d_input, r]` and B `[r, d_output]`, both transposed against PEFT's files. Merges into a dense
/// weight: `W + scaling · A · B`.
///
/// # Memory
/// Beside the base's output, a forward pass makes one more tensor of that size for a moment, and tensors of `r`
/// columns; for the backward pass the graph keeps the latter and `x`. Dropout makes one copy of `x` for a moment.
#[derive(Module, Debug)]
pub struct Lora {
    /// A, `[d_input, r]`.
    pub lora_a: Param<Tensor<2>>,
    /// B, `[r, d_output]`.
    pub lora_b: Param<Tensor<2>>,
    #[module(skip)]
    scaling: f64,
    dropout: Dropout,
}

impl Lora {
    /// An adapter of A `[d_input, r]` and B `[r, d_output]`, which require gradients.
    ///
    /// # Panics
    /// If A and B differ in r.
    pub fn new(lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f64, dropout: Dropout) -> Self {
        let (a, b) = (lora_a.dims(), lora_b.dims());
        assert_eq!(a[1], b[0], "A {a:?} and B {b:?} differ in rank");
        Self { lora_a: Param::from_tensor(lora_a), lora_b: Param::from_tensor(lora_b), scaling, dropout }
    }

    /// The rank r.
    pub fn rank(&self) -> usize {
        self.shape()[1]
    }

    /// The factor of A · B.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    pub(crate) fn into_dropout(self) -> Dropout {
        self.dropout
    }

    /// `[d_input, d_output]` of the base.
    pub fn base_shape(&self) -> [usize; 2] {
        [self.shape()[0], self.lora_b.lazy_shape().dims::<2>()[1]]
    }

    /// The adapter of twice the rank that does on the untouched base what `self` does on the base that `initial` was
    /// taken from: A and `initial`'s A side by side, B over `initial`'s B negated. `initial` are the values before
    /// training, made by PiSSA or OLoRA.
    ///
    /// Exact where that base is dense; where it was quantized again, its new quantization error is left out. Saved
    /// with twice the rank *and* twice the alpha, so that the scaling stays.
    ///
    /// # Panics
    /// If the two differ in shape or scaling.
    #[must_use]
    pub fn relative_to(&self, initial: &Self) -> Self {
        let described = |lora: &Self| (lora.base_shape(), lora.rank(), lora.scaling);
        assert_eq!(described(self), described(initial), "shape, rank and scaling");
        let a = Tensor::cat(vec![self.lora_a.val(), initial.lora_a.val()], 1);
        let b = Tensor::cat(vec![self.lora_b.val(), initial.lora_b.val().neg()], 0);
        Self::new(a, b, self.scaling, self.dropout.clone())
    }

    /// A and B, and what is to be done with them now.
    fn update<P: Projection>(&self, base: &P) -> ([Tensor<2>; 2], LowRankSpec) {
        let drops = self.dropout.drops();
        let compensation = if drops.is_some() { self.dropout.compensation() } else { 1.0 };
        let factor = (self.scaling * compensation) as f32;
        let update = LowRankSpec { factor, drops, compute: base.compute() };
        ([self.lora_a.val(), self.lora_b.val()], update)
    }

    /// `[d_input, r]`, also known while the parameter is not initialised yet.
    fn shape(&self) -> [usize; 2] {
        self.lora_a.lazy_shape().dims()
    }
}

impl Adapter for Lora {
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        let ([a, b], update) = self.update(base);
        fused::low_rank(y, x, a, b, update)
    }

    fn forward_rows<P: Projection>(&self, base: &P, x: Tensor<2>) -> Tensor<2> {
        let ([a, b], update) = self.update(base);
        base.forward_low_rank(x, a, b, update)
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        let weight = base.weight();
        let update = self.lora_a.val().mul_scalar(self.scaling).matmul(self.lora_b.val());
        let dtype = weight.dtype();
        weight + update.cast(dtype)
    }

    fn takes_operands(&self) -> bool {
        true
    }

    fn at(&self, place: Place) {
        self.dropout.at(place);
    }
}

/// Values of A `[d_input, r]` and B `[r, d_output]` before training, as PEFT's rules draw them: a function of `seed`
/// and `path` only. `None` for rules that aren't implemented.
pub(crate) fn initial_values(
    rule: InitLoraWeights,
    [d_input, d_output]: [usize; 2],
    r: usize,
    seed: u64,
    path: &str,
) -> Option<[Vec<f32>; 2]> {
    let mut rng = generator(Purpose::Initialization, seed, path_hash(path), 0, 0);
    // torch's `kaiming_uniform_` with a = √5: a bound of 1 / √(number of inputs).
    let kaiming =
        |rng: &mut ChaCha8Rng, inputs: usize, count| uniform(rng, (inputs as f64).sqrt().recip(), count);
    let (a, b) = (d_input * r, r * d_output);
    match rule {
        InitLoraWeights::Kaiming => Some([kaiming(&mut rng, d_input, a), vec![0.0; b]]),
        InitLoraWeights::Random => Some([kaiming(&mut rng, d_input, a), kaiming(&mut rng, r, b)]),
        InitLoraWeights::Gaussian => Some([normal(&mut rng, (r as f64).recip(), a), vec![0.0; b]]),
        InitLoraWeights::Orthogonal | InitLoraWeights::Pissa { .. } | InitLoraWeights::Olora => None,
    }
}

#[cfg(test)]
mod tests {
    use burn::{
        nn::{Linear, LinearConfig},
        optim::GradientsParams,
        tensor::Device,
    };
    use kiln_testkit::{kept, read, relative_difference, tensor};

    use super::*;
    use crate::Adapted;

    fn adapted(dropout: Dropout, device: &Device) -> Adapted<Linear, Lora> {
        let base = LinearConfig::new(24, 10).init(device);
        let lora = Lora::new(tensor(1, [24, 4], device), tensor(2, [4, 10], device), 1.5, dropout);
        Adapted::new(base, Some(lora))
    }

    fn training(step: u64, micro_batch: u64) -> Place {
        Place { step, micro_batch, training: true }
    }

    #[test]
    fn dropout_acts_on_the_adapter_only_and_is_compensated() {
        let (device, dropout) = (Device::flex(), Dropout::new(0.4, "up", 11));
        let layer = adapted(dropout.clone(), &device);
        layer.at(training(0, 0));
        let x = tensor(3, [6, 24], &device);
        let kept = kept(&dropout.drops().unwrap().mask(144), [6, 24], &device);
        let lora = layer.adapter.as_ref().unwrap();
        let expected = layer.base.forward(x.clone())
            + ((x.clone() * kept / 0.6).matmul(lora.lora_a.val()).matmul(lora.lora_b.val()) * 1.5);
        assert!(relative_difference(&read(layer.forward(x.clone())), &read(expected)) < 1e-6);
        layer.at(Place { training: false, ..training(0, 0) });
        let y = x.clone().matmul(layer.weight()) + layer.bias().unwrap().unsqueeze();
        assert!(relative_difference(&read(layer.forward(x)), &read(y)) < 1e-6);
    }

    #[test]
    fn a_block_computed_again_without_and_with_a_graph_drops_the_same() {
        let device = Device::flex();
        let model = adapted(Dropout::new(0.4, "up", 11), &device).train();
        model.at(training(5, 2));
        let x = tensor::<2>(3, [6, 24], &device);
        let plain = read(model.valid().forward(x.clone()));
        model.at(training(5, 3));
        assert_ne!(read(model.valid().forward(x.clone())), plain);
        model.at(training(5, 2));
        assert_eq!(read(model.forward(x)), plain);
    }

    #[test]
    fn gradients_under_dropout_are_those_of_the_masked_input() {
        let (device, dropout) = (Device::flex(), Dropout::new(0.4, "up", 11));
        let model = adapted(dropout.clone(), &device).train();
        model.at(training(0, 0));
        let x = tensor::<2>(3, [6, 24], &device);
        let dy = tensor::<2>(4, [6, 10], &device);
        let gradients = (model.forward(x.clone()) * dy.clone()).sum().backward();
        let lora = model.adapter.as_ref().unwrap();
        let kept = kept(&dropout.drops().unwrap().mask(144), [6, 24], &device);
        let (x, factor) = (x * kept, 1.5 / 0.6);
        let b = lora.lora_b.val().inner();
        let expected_a = x.clone().transpose().matmul(dy.clone().matmul(b.transpose())) * factor;
        let expected_b = x.matmul(lora.lora_a.val().inner()).transpose().matmul(dy) * factor;
        let a = read(lora.lora_a.grad(&gradients).unwrap());
        assert!(relative_difference(&a, &read(expected_a)) < 1e-6);
        let b = read(lora.lora_b.grad(&gradients).unwrap());
        assert!(relative_difference(&b, &read(expected_b)) < 1e-6);
        assert_eq!(GradientsParams::from_grads(gradients, &model).len(), 2);
    }

    #[test]
    fn initial_values_follow_their_rule() {
        let values = |rule| initial_values(rule, [100, 50], 40, 1, "q_proj").unwrap();
        let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let square =
            |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        let largest = |values: &[f32]| values.iter().fold(0f32, |max, v| max.max(v.abs()));

        let [a, b] = values(InitLoraWeights::Kaiming);
        assert_eq!((a.len(), b), (4000, vec![0.0; 2000]));
        // Uniform in ±1/√100: variance 0.01 / 3.
        assert!(largest(&a) <= 0.1 && largest(&a) > 0.099, "{}", largest(&a));
        assert!(mean(&a).abs() < 4e-3 && (square(&a) * 300.0 - 1.0).abs() < 0.06);

        let [_, b] = values(InitLoraWeights::Random);
        let bound = 40f32.sqrt().recip();
        assert!(largest(&b) <= bound && largest(&b) > 0.99 * bound);

        let [a, b] = values(InitLoraWeights::Gaussian);
        assert_eq!(b, vec![0.0; 2000]);
        // Deviation 1 / 40; three of a thousand values lie beyond three deviations.
        assert!(mean(&a).abs() < 1.6e-3 && (square(&a) * 1600.0 - 1.0).abs() < 0.09);
        let far = a.iter().filter(|v| v.abs() > 3.0 / 40.0).count();
        assert!((2..25).contains(&far), "{far}");

        assert_eq!(initial_values(InitLoraWeights::Orthogonal, [100, 50], 40, 1, "q_proj"), None);
    }

    #[test]
    fn initial_values_depend_on_seed_and_path() {
        let values = |seed, path| initial_values(InitLoraWeights::Kaiming, [8, 8], 2, seed, path);
        assert_eq!(values(1, "layers.0.q_proj"), values(1, "layers.0.q_proj"));
        assert_ne!(values(1, "layers.0.q_proj"), values(2, "layers.0.q_proj"));
        assert_ne!(values(1, "layers.0.q_proj"), values(1, "layers.1.q_proj"));
    }

    #[test]
    #[should_panic(expected = "differ in rank")]
    fn factors_of_different_rank_are_refused() {
        let device = Device::flex();
        let dropout = Dropout::new(0.0, "up", 0);
        let _ = Lora::new(tensor(1, [24, 4], &device), tensor(2, [5, 10], &device), 1.0, dropout);
    }
}
