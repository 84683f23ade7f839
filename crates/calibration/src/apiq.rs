//! ApiQ's optimisation: clipping logits and LoRA factors together, by gradient through the rounding.

use burn::{
    module::{Module, Param, ParamId},
    nn::Linear,
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Tensor},
};
use kiln_adapters::{Adapted, Lora};
use kiln_quant_core::{DeviceLimits, PackedWeight, QuantLinear, QuantScheme, to_host};
use serde::{Deserialize, Serialize};

use crate::{
    ClippedWeight, Error, Levels, Progress, Result,
    clipping_there::{ClippedTensor, LevelTensors},
    station::Slot,
    values::tensor,
};

/// The distance of outputs from their targets, `[rows, width]` each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ApiqLoss {
    /// `mean((y - t)²)`, as published.
    #[default]
    MeanSquared,
    /// `mean over rows (‖y - t‖² / ‖t‖²)`, ours: all tokens count alike. In many models the first token's residual is
    /// hundreds of times as long as the others'
    /// ([massive activations](https://arxiv.org/abs/2402.17762)) and fills the mean square alone, although the norms of
    /// the next block take lengths away.
    Relative,
}

impl ApiqLoss {
    pub(crate) fn of(self, y: Tensor<2>, target: Tensor<2>) -> Tensor<1> {
        let squares = (y - target.clone()).square();
        match self {
            Self::MeanSquared => squares.mean(),
            // Rows of zeros are fitted as if they were short.
            Self::Relative => (squares.mean_dim(1) / target.square().mean_dim(1).clamp_min(1e-12)).mean(),
        }
    }
}

/// Options of [ApiQ](https://arxiv.org/abs/2402.05147), with the published values as defaults.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `epochs` | 20 | passes over the calibration windows, one window a step | from 1 |
/// | `lr_clipping` | 5e-3 | learning rate of the clipping logits | from 0 |
/// | `lr_lora` | 5e-4 | of the LoRA factors | from 0 |
/// | `final_ratio` | 1 | both rates fall linearly to this part of themselves; 1 is constant, as published | 0 to 1 |
/// | `loss` | mean squared | what is brought down, see [`ApiqLoss`] | |
/// | `weight_decay` | 0.1 | decoupled, of both: on the logits a pull towards clipping | from 0 |
/// | `initial_logit` | 4 | a range starts as its part `S(4) = 0.982`; see below | finite |
/// | `augmented` | false | adds the distance to the original block's output for the *quantized* inputs; on at 2 bits in the published runs; block-wise only | |
/// | `include_zero` | true | extends groups' ranges to zero, see [`ClippingGrid`](crate::ClippingGrid) | |
///
/// The published budget is 128 windows of 2048 tokens: 2560 steps. A step moves a logit by about its learning rate, so within
/// some hundred steps ranges hardly leave the published start; start such runs at 2 bits at about 1 (`S = 0.73`), where
/// rounding errs least, at 3 bits at about 2. AdamW has betas 0.9 and 0.999 and epsilon 1e-8.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ApiqConfig {
    /// Passes over the calibration windows.
    pub epochs: usize,
    /// Learning rate of the clipping logits.
    pub lr_clipping: f64,
    /// Learning rate of the LoRA factors.
    pub lr_lora: f64,
    /// Part of the rates that is left at the end of a block or projection.
    pub final_ratio: f64,
    /// What is brought down.
    pub loss: ApiqLoss,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Where the logits start.
    pub initial_logit: f32,
    /// Whether the original block's output for quantized inputs is a second target.
    pub augmented: bool,
    /// Whether groups' ranges are extended to zero.
    pub include_zero: bool,
}

impl Default for ApiqConfig {
    fn default() -> Self {
        Self {
            epochs: 20,
            lr_clipping: 5e-3,
            lr_lora: 5e-4,
            final_ratio: 1.0,
            loss: ApiqLoss::default(),
            weight_decay: 0.1,
            initial_logit: 4.0,
            augmented: false,
            include_zero: true,
        }
    }
}

impl ApiqConfig {
    /// [OmniQuant](https://arxiv.org/abs/2308.13137)'s values for clipping alone, published for 128 windows: learning rate 1e-2, no
    /// decay, 20 epochs; at 2 bits 40, and the second target.
    pub fn omniquant(bits: u32) -> Self {
        let few = bits <= 2;
        let epochs = if few { 40 } else { 20 };
        Self { epochs, lr_clipping: 1e-2, weight_decay: 0.0, augmented: few, ..Self::default() }
    }

    /// Values for `bits` and the steps that a block gets: `epochs` passes over `windows`.
    ///
    /// From 2,000 steps on these are the published ones. With fewer, clipping starts where rounding errs least at that width,
    /// rates are higher, from 128 steps on they fall, and all tokens count alike ([`ApiqLoss::Relative`]): this project's
    /// own, found on SmolLM2-135M with 64 to 640 steps. The second target is on up to 2 bits, as published.
    pub fn for_budget(bits: u32, windows: usize, epochs: usize) -> Self {
        let published = Self { epochs, augmented: bits <= 2, ..Self::default() };
        let steps = windows.saturating_mul(epochs);
        if steps >= 2000 {
            return published;
        }
        let (initial_logit, lr_lora) = match bits {
            0..=2 => (1.0, 5e-3),
            3 => (2.0, 2e-3),
            _ => (4.0, 2e-3),
        };
        let final_ratio = if steps >= 128 { 0.05 } else { 1.0 };
        let loss = ApiqLoss::Relative;
        Self { lr_clipping: 1e-2, lr_lora, final_ratio, loss, initial_logit, ..published }
    }

    pub(crate) fn check(&self) -> Result<()> {
        let fail = |option: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::argument(format!("ApiqConfig.{option}"), expected, found))
        };
        let rate = |value: f64| value >= 0.0 && value.is_finite();
        if self.epochs == 0 {
            return fail("epochs", "at least 1", &0);
        }
        if !rate(self.lr_clipping) {
            return fail("lr_clipping", "a finite number from 0", &self.lr_clipping);
        }
        if !rate(self.lr_lora) {
            return fail("lr_lora", "a finite number from 0", &self.lr_lora);
        }
        if !(0.0..=1.0).contains(&self.final_ratio) {
            return fail("final_ratio", "a number from 0 to 1", &self.final_ratio);
        }
        if !rate(f64::from(self.weight_decay)) {
            return fail("weight_decay", "a finite number from 0", &self.weight_decay);
        }
        if !self.initial_logit.is_finite() {
            return fail("initial_logit", "a finite number", &self.initial_logit);
        }
        Ok(())
    }

    fn optimizer(&self) -> ModuleOptimizer {
        AdamWConfig::new().with_epsilon(1e-8).with_weight_decay(self.weight_decay).init()
    }
}

/// What is to be brought down.
pub(crate) trait Objective {
    /// Calibration windows.
    fn windows(&self) -> usize;

    /// The loss of one window with `slots` in the layers' places.
    fn loss(&mut self, slots: Vec<Slot>, window: usize) -> Result<Tensor<1>>;
}

/// A layer to be quantized.
pub(crate) struct Layer {
    pub(crate) path: String,
    pub(crate) weight: ClippedWeight,
    pub(crate) bias: Option<Param<Tensor<1>>>,
    pub(crate) scheme: QuantScheme,
    /// Trained where there is one.
    pub(crate) lora: Option<Lora>,
}

/// Clipping logits of one layer, `[groups, d_output]`.
#[derive(Module, Debug)]
struct Clipping {
    gamma: Param<Tensor<2>>,
    beta: Param<Tensor<2>>,
}

/// Levels of a layer in one step. The host takes two passes over the weights where tensor operations take a dozen; on a device
/// with memory of its own these save two ways over the bus.
enum StepLevels<'a> {
    Host(&'a ClippedWeight, Levels),
    There(&'a ClippedTensor, Box<LevelTensors>),
}

impl StepLevels<'_> {
    fn quantize(&self, device: &Device) -> Tensor<2> {
        match self {
            Self::Host(weight, levels) => tensor(weight.quantize(levels), weight.shape(), device),
            Self::There(weight, levels) => weight.quantize(levels),
        }
    }

    fn gradients(&self, path: &str, gradient: Tensor<2>, device: &Device) -> Result<[Tensor<2>; 2]> {
        Ok(match self {
            Self::Host(weight, levels) => {
                let gradients = weight.gradients(levels, &to_host(path, gradient)?);
                gradients.map(|values| tensor(values, weight.groups(), device))
            }
            Self::There(weight, levels) => weight.gradients(levels, gradient),
        })
    }
}

/// Layers under optimisation.
///
/// The dense weights on their grids are leaves of each step's graph. Their gradients go back to the logits by hand
/// ([`ClippedWeight::gradients`]).
pub(crate) struct Apiq<'a> {
    config: &'a ApiqConfig,
    layers: Vec<Layer>,
    /// The layers' weights on a device other than the CPU.
    there: Vec<Option<ClippedTensor>>,
    clippings: Vec<Clipping>,
    loras: Vec<Option<Lora>>,
    clipping_optimizer: ModuleOptimizer,
    lora_optimizer: ModuleOptimizer,
    device: Device,
}

impl<'a> Apiq<'a> {
    pub(crate) fn new(config: &'a ApiqConfig, mut layers: Vec<Layer>, device: &Device) -> Self {
        let device = device.clone().without_autodiff();
        let logits = |layer: &Layer| {
            Param::from_tensor(Tensor::full(layer.weight.groups(), config.initial_logit, &device))
        };
        let clippings: Vec<Clipping> =
            layers.iter().map(|layer| Clipping { gamma: logits(layer), beta: logits(layer) }).collect();
        let loras: Vec<Option<Lora>> = layers.iter_mut().map(|layer| layer.lora.take()).collect();
        let beside = !DeviceLimits::in_host_memory(&device);
        let there =
            layers.iter().map(|layer| beside.then(|| ClippedTensor::new(&layer.weight, &device))).collect();
        Self {
            config,
            there,
            layers,
            clippings: clippings.train(),
            loras: loras.train(),
            clipping_optimizer: config.optimizer(),
            lora_optimizer: config.optimizer(),
            device,
        }
    }

    /// Logits of layer `index`, gamma and beta.
    pub(crate) fn logits(&self, index: usize) -> Result<[Vec<f32>; 2]> {
        let (Clipping { gamma, beta }, path) = (&self.clippings[index], &self.layers[index].path);
        Ok([to_host(path, gamma.val().inner())?, to_host(path, beta.val().inner())?])
    }

    /// One window's loss before the step, which it then makes with `ratio` of the learning rates.
    pub(crate) fn step(&mut self, objective: &mut dyn Objective, window: usize, ratio: f64) -> Result<f64> {
        let levels: Vec<_> = (0..self.layers.len())
            .map(|index| {
                let (clipping, weight) = (&self.clippings[index], &self.layers[index].weight);
                Ok(match &self.there[index] {
                    None => {
                        let [gamma, beta] = self.logits(index)?;
                        StepLevels::Host(weight, weight.levels(&gamma, &beta))
                    }
                    Some(weight) => {
                        let [gamma, beta] = [&clipping.gamma, &clipping.beta].map(|x| x.val().inner());
                        StepLevels::There(weight, Box::new(weight.levels(gamma, beta)))
                    }
                })
            })
            .collect::<Result<_>>()?;
        let mut weights = Vec::new();
        let mut slots = Vec::new();
        for ((layer, levels), lora) in self.layers.iter().zip(&levels).zip(&self.loras) {
            let weight = Tensor::<2>::from_inner(levels.quantize(&self.device)).require_grad();
            weights.push(weight.clone());
            let weight = Param::initialized(ParamId::new(), weight);
            let base = QuantLinear::Dense(Linear { weight, bias: layer.bias.clone() });
            slots.push(Adapted { base, adapter: lora.clone() });
        }
        let loss = objective.loss(slots, window)?;
        let value = f64::from(to_host("loss", loss.clone().inner())?[0]);
        if !value.is_finite() {
            return Ok(value);
        }
        let mut gradients = loss.backward();
        let mut clipping_gradients = GradientsParams::new();
        for (index, (weight, levels)) in weights.into_iter().zip(&levels).enumerate() {
            // A weight that the loss doesn't depend on has none.
            let Some(gradient) = weight.grad_remove(&mut gradients) else { continue };
            let (path, clipping) = (&self.layers[index].path, &self.clippings[index]);
            let [gamma, beta] = levels.gradients(path, gradient, &self.device)?;
            clipping_gradients.register(clipping.gamma.id, gamma);
            clipping_gradients.register(clipping.beta.id, beta);
        }
        let lora_gradients = GradientsParams::from_grads(gradients, &self.loras);
        let clippings = std::mem::take(&mut self.clippings);
        let rate = ratio * self.config.lr_clipping;
        self.clippings = self.clipping_optimizer.step(rate, clippings, clipping_gradients);
        let loras = std::mem::take(&mut self.loras);
        self.loras = self.lora_optimizer.step(ratio * self.config.lr_lora, loras, lora_gradients);
        Ok(value)
    }

    /// All epochs; the mean loss of each. `tell` hears of every step and epoch.
    pub(crate) fn run(
        &mut self,
        block: usize,
        projection: Option<&str>,
        objective: &mut dyn Objective,
        tell: &mut dyn FnMut(Progress) -> Result<()>,
    ) -> Result<Vec<f64>> {
        let mut losses = Vec::new();
        let windows = objective.windows();
        let last = (self.config.epochs * windows).saturating_sub(1).max(1) as f64;
        for epoch in 0..self.config.epochs {
            let mut sum = 0.0;
            for window in 0..windows {
                let progress = (epoch * windows + window) as f64 / last;
                let ratio = 1.0 - (1.0 - self.config.final_ratio) * progress;
                let loss = self.step(objective, window, ratio)?;
                if !loss.is_finite() {
                    let place = projection.map_or_else(|| format!("block {block}"), str::to_string);
                    return Err(Error::Diverged { place, epoch, window, loss });
                }
                sum += loss;
                tell(Progress::Step { block, projection, epoch, window, loss })?;
            }
            losses.push(sum / windows.max(1) as f64);
            tell(Progress::Epoch { block, projection, epoch, loss: losses[epoch] })?;
        }
        Ok(losses)
    }

    /// The packed weights, and the factors outside autodiff.
    pub(crate) fn finish(self) -> Result<Vec<(PackedWeight, Option<Lora>)>> {
        let mut solved = Vec::new();
        for index in 0..self.layers.len() {
            let [gamma, beta] = self.logits(index)?;
            let Layer { path, weight, scheme, .. } = &self.layers[index];
            let packed = weight.pack(path, &weight.levels(&gamma, &beta), scheme)?;
            solved.push((packed, self.loras[index].clone().map(detached)));
        }
        Ok(solved)
    }
}

/// The adapter with its factors as fresh parameters outside autodiff.
fn detached(mut lora: Lora) -> Lora {
    lora.lora_a = Param::from_tensor(lora.lora_a.val().inner());
    lora.lora_b = Param::from_tensor(lora.lora_b.val().inner());
    lora
}

#[cfg(test)]
mod tests;
