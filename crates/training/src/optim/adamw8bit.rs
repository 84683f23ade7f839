//! AdamW with its averages in 8 bits.

use burn::{
    optim::{LearningRate, ModuleOptimizer, Optimizer, RecordState, StateSink, StateSource},
    tensor::{DType, Device, Tensor, TensorData},
};
use rayon::prelude::*;

use super::{
    adamw::{Averages, FusedAdamW},
    blockwise::{BLOCK, Map, SIGNED, UNSIGNED, quantize},
};
use crate::TrainerConfig;

/// Parameters of fewer values keep their averages in f32, as in bitsandbytes.
const SMALLEST: usize = 4096;

#[derive(Clone)]
struct AdamW8Bit {
    small: FusedAdamW,
    step: Step,
}

/// What a step depends on besides rate and time.
#[derive(Debug, Clone, Copy)]
struct Step {
    betas: [f32; 2],
    eps: f32,
    weight_decay: f32,
}

pub(super) fn optimizer(config: &TrainerConfig, weight_decay: f32) -> ModuleOptimizer {
    let step = Step { betas: config.betas, eps: config.eps, weight_decay };
    ModuleOptimizer::from(AdamW8Bit { small: FusedAdamW::new(config, weight_decay), step })
}

/// Type and shape of a state's tensor for a parameter of `shape`.
pub(super) fn state_tensor(name: &str, shape: &[usize]) -> Option<(DType, Vec<usize>)> {
    let count: usize = shape.iter().product();
    match name {
        "momentum.moment_1" | "momentum.moment_2" if count < SMALLEST => Some((DType::F32, shape.to_vec())),
        "codes_1" | "codes_2" if count >= SMALLEST => Some((DType::U8, vec![count])),
        "absmax_1" | "absmax_2" if count >= SMALLEST => Some((DType::F32, vec![count.div_ceil(BLOCK)])),
        _ => None,
    }
}

/// An average of each value, a byte each and four for each block.
#[derive(Debug, Clone, PartialEq)]
struct Blocks {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Blocks {
    fn zeros(count: usize) -> Self {
        Self { codes: vec![0; count], absmax: vec![0.0; count.div_ceil(BLOCK)] }
    }
}

/// The averages of a parameter's gradient and of its square.
#[derive(Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one for each parameter")]
enum State<const D: usize> {
    Small(Averages<D>),
    Blocks { time: usize, moments: [Blocks; 2] },
}

impl<const D: usize> RecordState for State<D> {
    fn state_flatten(&self, prefix: &str, out: &mut StateSink) {
        match self {
            Self::Small(averages) => averages.state_flatten(prefix, out),
            Self::Blocks { time, moments } => {
                out.push_scalar(prefix, "time", (*time).into());
                for (moment, number) in moments.iter().zip(1..) {
                    let Blocks { codes, absmax } = moment;
                    let codes = TensorData::new(codes.clone(), [codes.len()]);
                    let absmax = TensorData::new(absmax.clone(), [absmax.len()]);
                    out.push_tensor(prefix, &format!("codes_{number}"), codes);
                    out.push_tensor(prefix, &format!("absmax_{number}"), absmax);
                }
            }
        }
    }

    fn state_unflatten(prefix: &str, source: &mut StateSource, device: &Device) -> Option<Self> {
        let Some(time) = source.take_scalar(prefix, "time") else {
            return Averages::state_unflatten(prefix, source, device).map(Self::Small);
        };
        let mut moment = |number: usize| {
            let codes = source.take_tensor(prefix, &format!("codes_{number}"))?.try_into_vec().ok()?;
            let absmax = source.take_tensor(prefix, &format!("absmax_{number}"))?.try_into_vec().ok()?;
            Some(Blocks { codes, absmax })
        };
        let moments = [moment(1)?, moment(2)?];
        Some(Self::Blocks { time: time.try_into().ok()?, moments })
    }
}

impl Optimizer for AdamW8Bit {
    type State<const D: usize> = State<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        parameter: Tensor<D>,
        gradient: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let shape = parameter.shape();
        let count = shape.num_elements();
        let (time, mut moments) = match state {
            None if count >= SMALLEST => (0, [Blocks::zeros(count), Blocks::zeros(count)]),
            Some(State::Blocks { time, moments }) => (time, moments),
            small => {
                let state = small.and_then(|state| match state {
                    State::Small(averages) => Some(averages),
                    State::Blocks { .. } => None,
                });
                let (parameter, state) = self.small.step(lr, parameter, gradient, state);
                return (parameter, state.map(State::Small));
            }
        };
        let device = parameter.device();
        let host = |tensor: Tensor<D>| tensor.try_into_vec_as::<f32>().expect("a device that can be read");
        let (mut values, gradient) = (host(parameter), host(gradient));
        let time = time + 1;
        self.step.run(lr, time, &mut values, &gradient, &mut moments);
        let parameter = Tensor::from_data(TensorData::new(values, shape), &device);
        (parameter, Some(State::Blocks { time, moments }))
    }

    fn to_device<const D: usize>(state: Self::State<D>, device: &Device) -> Self::State<D> {
        match state {
            State::Small(averages) => State::Small(FusedAdamW::to_device(averages, device)),
            blocks => blocks,
        }
    }
}

impl Step {
    /// Changes `values` and `moments`, block by block, in the order of bitsandbytes' kernel: the step is made with the
    /// averages before they are rounded, then the weights decay.
    fn run(self, lr: f64, time: usize, values: &mut [f32], gradient: &[f32], moments: &mut [Blocks; 2]) {
        let [beta_1, beta_2] = self.betas;
        let correction = |beta: f32| 1.0 - beta.powi(time as i32);
        let (size, root) = (correction(beta_1), correction(beta_2).sqrt());
        let (step, eps) = (-(lr as f32) * root / size, root * self.eps);
        let decay = 1.0 - lr as f32 * self.weight_decay;
        let [first, second] = moments;
        let blocks = values.par_chunks_mut(BLOCK).zip(gradient.par_chunks(BLOCK));
        let first = first.codes.par_chunks_mut(BLOCK).zip(&mut first.absmax);
        let second = second.codes.par_chunks_mut(BLOCK).zip(&mut second.absmax);
        blocks.zip(first).zip(second).for_each(|(((values, gradient), (m, m_scale)), (v, v_scale))| {
            let (mut means, mut squares) = ([0.0; BLOCK], [0.0; BLOCK]);
            let known = |map: &Map, code: u8, scale: f32| map[usize::from(code)] * scale;
            for (index, (value, gradient)) in values.iter_mut().zip(gradient).enumerate() {
                let square =
                    known(&UNSIGNED, v[index], *v_scale) * beta_2 + (1.0 - beta_2) * gradient * gradient;
                let mean = known(&SIGNED, m[index], *m_scale) * beta_1 + (1.0 - beta_1) * gradient;
                *value += step * (mean / (square.sqrt() + eps));
                if self.weight_decay > 0.0 {
                    *value *= decay;
                }
                (means[index], squares[index]) = (mean, square);
            }
            let count = values.len();
            *m_scale = quantize(&SIGNED, &means[..count], true, m);
            *v_scale = quantize(&UNSIGNED, &squares[..count], false, v);
        });
    }
}

#[cfg(test)]
mod tests {
    use kiln_testkit::Golden;

    use super::*;

    /// bitsandbytes' kernel in f32; its powers and roots may differ in the last bit, which moves a code that lies between
    /// two by one.
    const DIFFERING_CODES: usize = 3;

    #[test]
    fn codes_are_those_of_bitsandbytes() {
        let golden = Golden::open("training/adamw8bit.safetensors");
        assert_eq!(golden.floats("map.signed"), SIGNED.as_slice());
        assert_eq!(golden.floats("map.unsigned"), UNSIGNED.as_slice());
        let step = Step { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 };
        for (name, every) in [("small", 1), ("large", 4)] {
            let start = golden.floats(&format!("{name}.start"));
            let gradients = golden.floats(&format!("{name}.grads"));
            let (count, blocks) = (start.len(), start.len().div_ceil(BLOCK));
            let (mut values, mut moments) = (start.clone(), [Blocks::zeros(count), Blocks::zeros(count)]);
            for time in 1..=5 {
                step.run(1e-3, time, &mut values, &gradients[(time - 1) * count..time * count], &mut moments);
                let expected = |what: &str, size: usize| {
                    let all = golden.floats(&format!("kernel.{name}.{what}"));
                    all[(time - 1) * size..time * size].to_vec()
                };
                for (moment, number) in moments.iter().zip(1..) {
                    let codes = golden.ints(&format!("kernel.{name}.state{number}"));
                    let codes = &codes[(time - 1) * count..time * count];
                    let apart =
                        moment.codes.iter().zip(codes).map(|(a, b)| (i64::from(*a) - b).unsigned_abs());
                    assert!(apart.clone().all(|apart| apart <= 1), "{name} {time} {number}");
                    assert!(
                        apart.filter(|apart| *apart > 0).count() <= DIFFERING_CODES,
                        "{name} {time} {number}"
                    );
                    let absmax = expected(&format!("absmax{number}"), blocks);
                    for (found, expected) in moment.absmax.iter().zip(absmax) {
                        assert!((found - expected).abs() <= 2.0 * f32::EPSILON * expected, "{name} {time}");
                    }
                }
                let found = values.iter().step_by(every);
                for (found, expected) in found.zip(expected("params", count / every)) {
                    assert!((found - expected).abs() < 1e-6, "{name} {time}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn states_take_a_quarter() {
        let count = 1 << 20;
        let Blocks { codes, absmax } = Blocks::zeros(count);
        let bytes = codes.len() + 4 * absmax.len();
        assert!((bytes as f64) < 0.2542 * (4 * count) as f64, "{bytes}");
    }
}
