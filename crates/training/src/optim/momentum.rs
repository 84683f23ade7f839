//! Optimizers with one average: Lion and gradient descent.

use burn::{
    optim::{LearningRate, Optimizer, RecordState, StateSink, StateSource},
    tensor::{Device, Tensor, TensorData},
};

/// An average of gradients. What a checkpoint holds stays in host memory until the first step says where the parameter is, as
/// for AdamW.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "nearly all are placed")]
pub(super) enum Average<const D: usize> {
    Stored(TensorData),
    Placed(Tensor<D>),
}

/// Its name in records.
pub(super) const NAME: &str = "momentum";

impl<const D: usize> Average<D> {
    fn placed(self, device: &Device) -> Tensor<D> {
        match self {
            Self::Stored(data) => Tensor::from_data(data, device),
            Self::Placed(tensor) => tensor.to_device(device),
        }
    }
}

impl<const D: usize> RecordState for Average<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        let data = match self {
            Self::Stored(data) => data.clone(),
            Self::Placed(tensor) => tensor.to_data(),
        };
        out.push_tensor(prefix, NAME, data);
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, _: &Device) -> Option<Self> {
        let data = source.take_tensor(prefix, NAME).filter(|data| data.shape().num_dims() == D)?;
        Some(Self::Stored(data))
    }
}

/// Steps of one length by the sign of an average.
#[derive(Clone)]
pub(super) struct Lion {
    pub betas: [f32; 2],
    pub weight_decay: f32,
}

impl Optimizer for Lion {
    type State<const D: usize> = Average<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let average = match state {
            Some(state) => state.placed(&parameter.device()),
            None => gradient.zeros_like(),
        };
        let mixed = |beta: f32| average.clone() * beta + gradient.clone() * (1.0 - beta);
        let direction = mixed(self.betas[0]).sign();
        let parameter = decayed(parameter, lr, self.weight_decay) - direction * lr;
        (parameter, Some(Average::Placed(mixed(self.betas[1]))))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        Average::Placed(state.placed(device))
    }
}

/// Gradient descent, with a part of the earlier direction.
#[derive(Clone)]
pub(super) struct Sgd {
    pub momentum: f64,
    pub weight_decay: f32,
}

impl Optimizer for Sgd {
    type State<const D: usize> = Average<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let direction = match state {
            Some(state) => state.placed(&parameter.device()) * self.momentum + gradient,
            None => gradient,
        };
        let parameter = decayed(parameter, lr, self.weight_decay) - direction.clone() * lr;
        (parameter, (self.momentum > 0.0).then_some(Average::Placed(direction)))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        Average::Placed(state.placed(device))
    }
}

/// Decoupled decay: of the parameter, not of the gradient.
fn decayed<const D: usize>(parameter: Tensor<D>, lr: LearningRate, weight_decay: f32) -> Tensor<D> {
    match weight_decay > 0.0 {
        true => parameter * (1.0 - lr * f64::from(weight_decay)),
        false => parameter,
    }
}

#[cfg(test)]
mod tests {
    use burn::optim::{LionConfig, SgdConfig, momentum::MomentumConfig};
    use kiln_testkit::{assert_close, read, tensor};

    use super::*;

    /// Three steps of both on the same gradients, the second of ours through a record.
    fn compare<O: Optimizer, R: Optimizer>(what: &str, ours: &O, reference: &R) {
        let device = Device::flex();
        let start = tensor::<2>(1, [5, 6], &device);
        let (mut a, mut b) = ((start.clone(), None), (start, None));
        for seed in 2..5 {
            let gradient = tensor::<2>(seed, [5, 6], &device);
            let state = a.1.map(|state: O::State<2>| {
                let (mut sink, mut source) = (StateSink::default(), StateSource::default());
                state.state_flatten("p", &mut sink);
                sink.tensors.into_iter().for_each(|(name, data)| source.insert_tensor(name, data));
                O::State::<2>::state_unflatten("p", &mut source, &device).unwrap()
            });
            a = ours.step(0.1, a.0, gradient.clone(), state);
            b = reference.step(0.1, b.0, gradient, b.1);
            assert_close(what, &read(a.0.clone()), &read(b.0.clone()), 1e-6);
        }
    }

    #[test]
    fn steps_are_those_of_burns_optimizers() {
        let lion = Lion { betas: [0.9, 0.99], weight_decay: 0.1 };
        compare("Lion", &lion, &LionConfig::new().with_weight_decay(0.1).build());
        let momentum = MomentumConfig::new().with_momentum(0.9).with_dampening(0.0);
        let reference = SgdConfig::new().with_momentum(Some(momentum)).build();
        compare("SGD", &Sgd { momentum: 0.9, weight_decay: 0.0 }, &reference);
    }

    #[test]
    fn decay_is_of_the_parameter() {
        let device = Device::flex();
        let (start, none) = (tensor::<1>(1, [4], &device), Tensor::zeros([4], &device));
        let (after, state) = Sgd { momentum: 0.0, weight_decay: 0.5 }.step(0.1, start.clone(), none, None);
        assert_close("decay", &read(after), &read(start * 0.95), 1e-7);
        assert!(state.is_none(), "nothing is kept without momentum");
    }
}
