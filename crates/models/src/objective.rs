//! What a pass of training makes small: a loss of each scored place, and how much each counts.

use burn::tensor::{Int, Tensor, activation};
use kiln_quant_core::{
    fused,
    random::{Purpose, generator},
};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{CausalLm, Error, Place, Result, Targets, TokenBatch, placement::moved};

/// The loss of one scored place: cross-entropy, and what may be added to it.
///
/// With the student's logits `s`, the target `y`, `lse` = log Σ exp(s) and `v` ids:
///
/// `(1 - w) ((1 - ε) (lse - s_y) + ε (lse - Σ s / v)) + z lse² + w T² KL(softmax(t / T) ‖ softmax(s / T))`
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `label_smoothing` | 0 | ε: share of the target's probability that is spread over all ids, as torch's `cross_entropy` | 0 to below 1 |
/// | `z_loss` | 0 | z: keeps logits from drifting (PaLM, section 5) | at least 0 |
/// | `distillation` | none | w and T: how much a teacher's logits `t` count (Hinton et al. 2015) | |
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
#[non_exhaustive]
pub struct TokenLoss {
    /// Share of the target's probability that is spread over all ids.
    pub label_smoothing: f64,
    /// Factor of the squared logarithm of the sum of exponentials.
    pub z_loss: f64,
    /// How a teacher counts.
    pub distillation: Option<Distillation>,
}

/// How much a teacher's distribution counts beside the target.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distillation {
    /// Share of the teacher, above 0, at most 1; the target has the rest.
    pub weight: f64,
    /// Divisor of both sides' logits, above 0.
    pub temperature: f64,
}

impl Default for Distillation {
    /// Half the loss, at temperature 2.
    fn default() -> Self {
        Self { weight: 0.5, temperature: 2.0 }
    }
}

impl TokenLoss {
    /// Cross-entropy and nothing else.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets `label_smoothing`.
    #[must_use]
    pub fn with_label_smoothing(mut self, label_smoothing: f64) -> Self {
        self.label_smoothing = label_smoothing;
        self
    }

    /// Sets `z_loss`.
    #[must_use]
    pub fn with_z_loss(mut self, z_loss: f64) -> Self {
        self.z_loss = z_loss;
        self
    }

    /// Sets `distillation`.
    #[must_use]
    pub fn with_distillation(mut self, distillation: Distillation) -> Self {
        self.distillation = Some(distillation);
        self
    }

    /// Whether all options are in their ranges.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first that isn't.
    pub fn check(&self) -> Result<()> {
        let fail = |name: &str, expected: &str, found: f64| {
            let (name, expected) = (name.to_owned(), expected.to_owned());
            Err(Error::Argument { name, expected, found: found.to_string() })
        };
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return fail("label_smoothing", "a number from 0 to below 1", self.label_smoothing);
        }
        if !(self.z_loss.is_finite() && self.z_loss >= 0.0) {
            return fail("z_loss", "a finite number, at least 0", self.z_loss);
        }
        match self.distillation {
            Some(Distillation { weight, .. }) if !(weight > 0.0 && weight <= 1.0) => {
                fail("distillation.weight", "a number above 0, at most 1", weight)
            }
            Some(Distillation { temperature, .. }) if !(temperature.is_finite() && temperature > 0.0) => {
                fail("distillation.temperature", "a finite number above 0", temperature)
            }
            _ => Ok(()),
        }
    }

    /// Losses `[rows]` of logits `[rows, vocabulary]`.
    pub(crate) fn of(
        &self,
        logits: Tensor<2>,
        targets: Tensor<1, Int>,
        teacher: Option<Tensor<2>>,
    ) -> Tensor<1> {
        if *self == Self::default() {
            // Logits that nobody else holds become their gradient in place.
            return fused::cross_entropy(logits, targets);
        }
        let mut loss = fused::cross_entropy(logits.clone(), targets);
        let has_log_sum = self.label_smoothing != 0.0 || self.z_loss != 0.0;
        let log_sum = has_log_sum.then(|| log_sum_exp(logits.clone()));
        if let Some(log_sum) = log_sum.clone().filter(|_| self.label_smoothing != 0.0) {
            let mean = logits.clone().mean_dim(1).squeeze_dim::<1>(1);
            let spread = (log_sum - mean).mul_scalar(self.label_smoothing);
            loss = loss.mul_scalar(1.0 - self.label_smoothing) + spread;
        }
        if let (Some(Distillation { weight, temperature }), Some(teacher)) = (self.distillation, teacher) {
            let teacher = activation::log_softmax(teacher.div_scalar(temperature), 1);
            let student = activation::log_softmax(logits.div_scalar(temperature), 1);
            let share = teacher.clone().exp();
            let divergence = ((teacher - student) * share).sum_dim(1).squeeze_dim::<1>(1);
            loss = loss.mul_scalar(1.0 - weight) + divergence.mul_scalar(weight * temperature * temperature);
        }
        if let Some(log_sum) = log_sum.filter(|_| self.z_loss != 0.0) {
            loss = loss + log_sum.square().mul_scalar(self.z_loss);
        }
        loss
    }
}

/// `[rows, n]` → `[rows]`.
fn log_sum_exp(x: Tensor<2>) -> Tensor<1> {
    let largest = x.clone().detach().max_dim(1);
    ((x - largest.clone()).exp().sum_dim(1).log() + largest).squeeze_dim(1)
}

/// A teacher's logits of one batch, made for a few places at a time.
pub struct Teacher<'a> {
    logits: Box<dyn Fn(Tensor<1, Int>) -> Tensor<2> + 'a>,
}

impl<'a> Teacher<'a> {
    /// Runs `model` over the blocks; its head runs where logits are asked for. No gradient is recorded.
    ///
    /// # Errors
    /// As [`CausalLm::context`].
    pub fn new<M: CausalLm + 'a>(model: &M, tokens: &TokenBatch) -> Result<Self> {
        let model = model.valid();
        let x = model.residual(&model.context(tokens, None)?, None);
        let [batch, length, width] = x.dims();
        let rows = x.reshape([batch * length, width]);
        // The teacher may be on another device than whoever asks.
        let logits = move |places: Tensor<1, Int>| {
            let (device, places) = (places.device(), places.to_device(&rows.device()));
            moved(model.lm_head(model.final_norm(rows.clone().select(0, places))), &device)
        };
        Ok(Self { logits: Box::new(logits) })
    }

    /// Logits `[places, vocabulary]`, without a graph.
    pub(crate) fn logits(&self, places: Tensor<1, Int>) -> Tensor<2> {
        (self.logits)(places)
    }
}

/// The rows of the batch are many.
impl std::fmt::Debug for Teacher<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teacher").finish_non_exhaustive()
    }
}

/// Gets the negative log-likelihoods of the scored places, in their order, and gives as many factors.
pub type Weigh<'a> = dyn FnMut(&[f32]) -> Result<Vec<f32>> + 'a;

/// How much each scored place counts.
#[derive(Default)]
pub enum Weights<'a> {
    /// All alike.
    #[default]
    Equal,
    /// A factor for each place of the batch, `[batch * length]`; ignored where not scored.
    Given(&'a [f32]),
    /// Factors that depend on the likelihoods of all: losses of whole answers, whose gradient with respect to a place's
    /// negative log-likelihood the function returns. Costs one more pass through the head.
    Computed(&'a mut Weigh<'a>),
}

impl std::fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Equal => "Equal",
            Self::Given(_) => "Given",
            Self::Computed(_) => "Computed",
        })
    }
}

/// What a pass makes small: the sum of the scored places' losses, each times its weight.
#[derive(Debug)]
pub struct Objective<'a> {
    /// What the model should have said.
    pub targets: Targets<'a>,
    /// How much each place counts.
    pub weights: Weights<'a>,
    /// Who is imitated, where [`TokenLoss::distillation`] says so.
    pub teacher: Option<Teacher<'a>>,
    /// Of a model of one output the numbers that it should give, for each place of the batch, `[batch * length]`; ignored where
    /// not scored. The loss of a place is then the squared difference, and nothing else.
    pub numbers: Option<&'a [f32]>,
}

/// All places alike.
impl<'a> From<Targets<'a>> for Objective<'a> {
    fn from(targets: Targets<'a>) -> Self {
        Self { targets, weights: Weights::Equal, teacher: None, numbers: None }
    }
}

/// Noise on what the first block gets (NEFTune, Jain et al. 2023): uniform in ±α / √(n d) for an example of n tokens in a
/// model of width d; the same wherever it is made for the same place of a run.
///
/// transformers takes the padded row's length for n; here padding changes nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EmbeddingNoise {
    /// α, above 0; the paper has 5, 10 and 15.
    pub alpha: f64,
    /// Seed of the noise.
    pub seed: u64,
    /// Where training stands.
    pub place: Place,
}

impl EmbeddingNoise {
    /// `x` `[batch, length, width]` with noise on the tokens of `tokens`, padding excepted.
    ///
    /// Behind the first `hidden_width` channels nothing is added.
    pub(crate) fn add(&self, x: Tensor<3>, hidden_width: Option<usize>, tokens: &TokenBatch) -> Tensor<3> {
        if let Some(width) = hidden_width {
            let behind = x.clone().narrow(2, width, x.dims()[2] - width);
            return Tensor::cat(vec![self.add(x.narrow(2, 0, width), None, tokens), behind], 2);
        }
        let [batch, length, width] = x.dims();
        let Place { step, micro_batch, .. } = self.place;
        let mut random = generator(Purpose::Noise, self.seed, 0, step, micro_batch);
        let mut noise = Vec::with_capacity(batch * length * width);
        for row in tokens.segments.chunks_exact(length) {
            for part in row.chunk_by(|a, b| a == b) {
                let amplitude = match part[0] {
                    0 => 0.0,
                    _ => self.alpha / ((part.len() * width) as f64).sqrt(),
                };
                // In ±1, in steps of 2⁻²³.
                let unit = |_| f64::from(random.next_u32() >> 8) / f64::from(1 << 23) - 1.0;
                noise.extend((0..part.len() * width).map(unit).map(|unit| (unit * amplitude) as f32));
            }
        }
        let device = x.device();
        x + Tensor::<1>::from_data(noise.as_slice(), &device).reshape([batch, length, width])
    }
}
