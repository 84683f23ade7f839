//! AdamW with one pass over each parameter where there is a kernel for it.

use burn::{
    optim::{
        AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, LearningRate, ModuleOptimizer, Optimizer,
        RecordState, StateSink, StateSource, join_path,
    },
    tensor::{Device, Tensor, TensorData},
};
use kiln_quant_core::fused::{self, AdamWStep};

use super::factor;
use crate::TrainerConfig;

/// Burn's AdamW, its state and its records; on GPUs the dozen operations of a parameter's step are one.
#[derive(Clone)]
pub(super) struct FusedAdamW {
    plain: AdamW,
    betas: [f32; 2],
    eps: f32,
    weight_decay: f32,
}

impl FusedAdamW {
    pub(super) fn new(config: &TrainerConfig, weight_decay: f32) -> Self {
        let plain = AdamWConfig::new()
            .with_beta_1(config.betas[0])
            .with_beta_2(config.betas[1])
            .with_epsilon(config.eps)
            .with_weight_decay(weight_decay)
            .build();
        Self { plain, betas: config.betas, eps: config.eps, weight_decay }
    }
}

/// The optimizer of a run.
pub(super) fn optimizer(config: &TrainerConfig, weight_decay: f32) -> ModuleOptimizer {
    ModuleOptimizer::from(FusedAdamW::new(config, weight_decay))
}

/// The averages of a parameter's gradient and of its square.
///
/// Burn reads records onto its default device, which needn't be there. So what a checkpoint holds stays in host memory
/// until the first step says where the parameter is. Records are those of Burn's [`AdamWState`].
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "nearly all are placed")]
pub(super) enum Averages<const D: usize> {
    Stored { time: usize, moment_1: TensorData, moment_2: TensorData },
    Placed(AdaptiveMomentumState<D>),
}

impl<const D: usize> Averages<D> {
    fn placed(self, device: &Device) -> AdaptiveMomentumState<D> {
        match self {
            Self::Placed(momentum) => momentum.to_device(device),
            Self::Stored { time, moment_1, moment_2 } => {
                let [moment_1, moment_2] = [moment_1, moment_2].map(|data| Tensor::from_data(data, device));
                AdaptiveMomentumState::new(time, moment_1, moment_2)
            }
        }
    }
}

/// Where a record holds the averages of the parameter `prefix`.
fn path(prefix: &str) -> String {
    join_path(prefix, "momentum")
}

impl<const D: usize> RecordState for Averages<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        match self {
            Self::Placed(momentum) => AdamWState::new(momentum.clone()).state_flatten(prefix, out),
            Self::Stored { time, moment_1, moment_2 } => {
                out.push_scalar(&path(prefix), "time", (*time).into());
                out.push_tensor(&path(prefix), "moment_1", moment_1.clone());
                out.push_tensor(&path(prefix), "moment_2", moment_2.clone());
            }
        }
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, _: &Device) -> Option<Self> {
        let path = path(prefix);
        let time = source.take_scalar(&path, "time")?.try_into().ok()?;
        let [moment_1, moment_2] = ["moment_1", "moment_2"]
            .map(|name| source.take_tensor(&path, name).filter(|data| data.shape().num_dims() == D));
        Some(Self::Stored { time, moment_1: moment_1?, moment_2: moment_2? })
    }
}

impl Optimizer for FusedAdamW {
    type State<const D: usize> = Averages<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let momentum = state.map(|averages| averages.placed(&parameter.device()));
        if !fused::has_adamw(&parameter) {
            let (parameter, state) = self.plain.step(lr, parameter, gradient, momentum.map(AdamWState::new));
            return (parameter, state.map(|state| Averages::Placed(state.momentum)));
        }
        let time = momentum.as_ref().map_or(0, |momentum| momentum.time) + 1;
        let step = AdamWStep {
            lr: lr as f32,
            betas: self.betas,
            corrections: self.betas.map(|beta| 1.0 - beta.powi(time as i32)),
            eps: self.eps,
            decay: (1.0 - lr * f64::from(self.weight_decay)) as f32,
            factor: factor::of_step() as f32,
        };
        // Moved, so that they are written in place.
        let averages = match momentum {
            Some(momentum) => [momentum.moment_1, momentum.moment_2],
            None => [gradient.zeros_like(), gradient.zeros_like()],
        };
        let [parameter, moment_1, moment_2] = fused::adamw(parameter, gradient, averages, step);
        (parameter, Some(Averages::Placed(AdaptiveMomentumState::new(time, moment_1, moment_2))))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        Averages::Placed(state.placed(device))
    }
}

#[cfg(test)]
mod tests {
    use burn::{
        nn::{Linear, LinearConfig},
        optim::GradientsParams,
        tensor::Bytes,
    };
    use kiln_testkit::{read, tensor};

    use super::*;
    use crate::BatchOptions;

    fn step(optimizer: &mut ModuleOptimizer, model: Linear, seed: u64) -> Linear {
        let device = Device::flex().autodiff();
        let loss = model.forward(tensor::<2>(seed, [5, 6], &device)).square().sum();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        optimizer.step(0.1, model, gradients)
    }

    /// Records of checkpoints written before the state was Kiln's own are read, and the other way round.
    #[test]
    fn records_are_those_of_burns_adamw_and_stay_so_before_the_first_step() {
        let config = TrainerConfig::new(3, BatchOptions::new(1)).with_weight_decay(0.1);
        let plain =
            || AdamWConfig::new().with_epsilon(config.eps).with_weight_decay(config.weight_decay).init();
        let model = LinearConfig::new(6, 4).init(&Device::flex().autodiff());
        let (mut burns, mut ours) = (plain(), optimizer(&config, 0.1));
        let (mut expected, mut found) = (model.clone(), model);
        for seed in 0..2 {
            expected = step(&mut burns, expected, seed);
            found = step(&mut ours, found, seed);
        }
        assert_eq!(read(found.weight.val()), read(expected.weight.val()));
        // Parameters stand in a record in any order, so records are compared by what the next step does with them.
        let reread = |optimizer: ModuleOptimizer, record: &ModuleOptimizer| {
            let bytes = record.into_bytes().unwrap().to_vec();
            optimizer.from_bytes(Bytes::from_bytes_vec(bytes)).unwrap()
        };
        let from_burn = reread(optimizer(&config, 0.1), &burns);
        let to_burn = reread(plain(), &from_burn);
        let from_ours = reread(plain(), &ours);
        let next = read(step(&mut burns, expected.clone(), 7).weight.val());
        for mut other in [from_burn, to_burn, from_ours] {
            assert_eq!(read(step(&mut other, expected.clone(), 7).weight.val()), next);
        }
    }
}
