//! The options of a run.

use kiln_models::{DriverOptions, Recompute, TokenLoss};
use kiln_quant_core::PathPattern;
use serde::{Deserialize, Serialize};

use crate::{
    BatchOptions, Dataset, Error, OptimizerKind, PreferenceLoss, Result, Schedule, ScheduleKind, batch,
    error::Problem,
};

/// Parameters that are trained at their own rate.
///
/// LoRA+ is a group of `.*lora_b` with a factor of 16 (Hayou et al. 2024).
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `pattern` | required | whose paths ([`PathPattern`]), such as `lora_b`, or `layers\\.0\\..*` |
/// | `lr_factor` | 1 | what the run's rate is multiplied by; above 0 |
/// | `weight_decay` | the run's | |
/// | `schedule` | the run's | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ParameterGroup {
    /// Whose paths.
    pub pattern: PathPattern,
    /// What the run's rate is multiplied by.
    pub lr_factor: f64,
    /// Decoupled weight decay; the run's if left out.
    pub weight_decay: Option<f32>,
    /// What follows the warm-up; as the run's if left out.
    pub schedule: Option<ScheduleKind>,
}

impl ParameterGroup {
    /// The parameters of `pattern`, for the time being like all others.
    ///
    /// # Errors
    /// [`kiln_quant_core::Error::Pattern`] for a pattern that is no regular expression.
    pub fn new(pattern: &str) -> kiln_quant_core::Result<Self> {
        let pattern = PathPattern::new(pattern)?;
        Ok(Self { pattern, lr_factor: 1.0, weight_decay: None, schedule: None })
    }

    /// Sets `lr_factor`.
    #[must_use]
    pub fn with_lr_factor(mut self, lr_factor: f64) -> Self {
        self.lr_factor = lr_factor;
        self
    }

    /// Sets `weight_decay`.
    #[must_use]
    pub fn with_weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = Some(weight_decay);
        self
    }

    /// Sets `schedule`.
    #[must_use]
    pub fn with_schedule(mut self, schedule: ScheduleKind) -> Self {
        self.schedule = Some(schedule);
        self
    }

    fn check(&self) -> Result<()> {
        let fail = |name: &str, expected: &str, found: String| {
            Err(Problem::new(format!("group {}: {name}", self.pattern), expected, found).argument())
        };
        if !(self.lr_factor.is_finite() && self.lr_factor > 0.0) {
            return fail("lr_factor", "a finite number above 0", self.lr_factor.to_string());
        }
        match self.weight_decay {
            Some(decay) if !(decay.is_finite() && decay >= 0.0) => {
                fail("weight_decay", "a finite number, at least 0", decay.to_string())
            }
            _ => Ok(()),
        }
    }
}

/// How to train. Everything that decides the numbers is here or in the data's options; a checkpoint refuses to go on
/// under another configuration, but for more `steps` where the learning rate doesn't depend on them.
///
/// | name | default | purpose | range |
/// | --- | --- | --- | --- |
/// | `steps` | required | optimizer steps | at least 1 |
/// | `batch` | required | rows of a micro-batch, their order and packing | |
/// | `accumulate` | 1 | micro-batches of a step, of all ranks together; their gradients are added in pairs, which holds a sum for each power of two | at least 1 |
/// | `lr` | 3e-4 | peak learning rate | above 0 |
/// | `warmup` | 0 | steps of linear warm-up | |
/// | `schedule` | constant | what follows the warm-up | |
/// | `clip` | 1 | largest global norm of the gradient; `None` leaves it | above 0 |
/// | `weight_decay` | 0 | decoupled decay | at least 0 |
/// | `betas` | 0.9, 0.999 | averages of AdamW and Lion | 0 to 1 |
/// | `eps` | 1e-8 | AdamW's division | above 0 |
/// | `recompute` | none | what the backward pass computes again | |
/// | `logit_rows` | 128 | rows of logits held at once | at least 1 |
/// | `loss` | cross-entropy | the loss of a token: label smoothing, z-loss, distillation from a teacher ([`Trainer::with_reference`](crate::Trainer::with_reference)) | |
/// | `preference` | none | the loss of whole answers, in place of `loss` | |
/// | `neftune` | none | α of the noise on embeddings ([`EmbeddingNoise`](kiln_models::EmbeddingNoise)) | above 0 |
/// | `router_loss` | none | coefficient of the load-balancing loss of mixtures of experts ([`DriverOptions::router_loss`](kiln_models::DriverOptions::router_loss)); not with `preference` | at least 0 |
/// | `optimizer` | AdamW | | |
/// | `groups` | none | parameters with their own rate, decay or schedule | |
/// | `max_skipped` | 0 | steps that are passed over because loss or gradient isn't finite, before that ends the run | |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct TrainerConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Rows of a micro-batch, their order and packing.
    pub batch: BatchOptions,
    /// Micro-batches of a step, of all ranks together.
    pub accumulate: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// What follows the warm-up.
    pub schedule: ScheduleKind,
    /// Largest global norm of the gradient.
    pub clip: Option<f64>,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// AdamW's averages.
    pub betas: [f32; 2],
    /// Added to AdamW's divisor.
    pub eps: f32,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Rows of logits held at once.
    pub logit_rows: usize,
    /// The loss of a token.
    #[serde(default)]
    pub loss: TokenLoss,
    /// The loss of whole answers, in place of `loss`.
    #[serde(default)]
    pub preference: Option<PreferenceLoss>,
    /// α of the noise on embeddings.
    #[serde(default)]
    pub neftune: Option<f64>,
    /// Coefficient of the load-balancing loss of mixtures of experts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_loss: Option<f64>,
    /// What makes steps of gradients.
    #[serde(default)]
    pub optimizer: OptimizerKind,
    /// Parameters with their own rate, decay or schedule; of several that match, the last counts.
    #[serde(default)]
    pub groups: Vec<ParameterGroup>,
    /// Steps of a run that may be passed over because loss or gradient isn't finite.
    pub max_skipped: u64,
}

impl TrainerConfig {
    /// `steps` steps of one micro-batch each, other options at their defaults. `batch` may be the number of rows.
    pub fn new(steps: u64, batch: impl Into<BatchOptions>) -> Self {
        Self {
            steps,
            batch: batch.into(),
            accumulate: 1,
            lr: 3e-4,
            warmup: 0,
            schedule: ScheduleKind::Constant,
            clip: Some(1.0),
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            recompute: Recompute::None,
            logit_rows: DriverOptions::default().logit_rows,
            loss: TokenLoss::default(),
            preference: None,
            neftune: None,
            router_loss: None,
            optimizer: OptimizerKind::default(),
            groups: Vec::new(),
            max_skipped: 0,
        }
    }

    /// Sets `steps`.
    #[must_use]
    pub fn with_steps(mut self, steps: u64) -> Self {
        self.steps = steps;
        self
    }

    /// Sets `steps` to those of `epochs` passes over `dataset`, the last step filled up from the next pass; to be called
    /// after `batch` and `accumulate` are set.
    ///
    /// # Errors
    /// [`Error::Argument`] for batch options that don't fit the data.
    pub fn with_epochs(mut self, dataset: &Dataset, epochs: u64) -> Result<Self> {
        let rows_of_a_step = (self.batch.batch as u64).saturating_mul(self.accumulate as u64).max(1);
        self.steps = batch::rows_in(dataset, &self.batch, epochs)?.div_ceil(rows_of_a_step);
        Ok(self)
    }

    /// Sets `batch`.
    #[must_use]
    pub fn with_batch(mut self, batch: impl Into<BatchOptions>) -> Self {
        self.batch = batch.into();
        self
    }

    /// Sets `accumulate`.
    #[must_use]
    pub fn with_accumulate(mut self, accumulate: usize) -> Self {
        self.accumulate = accumulate;
        self
    }

    /// Sets `lr`.
    #[must_use]
    pub fn with_lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Sets `warmup`.
    #[must_use]
    pub fn with_warmup(mut self, warmup: u64) -> Self {
        self.warmup = warmup;
        self
    }

    /// Sets `max_skipped`.
    #[must_use]
    pub fn with_max_skipped(mut self, max_skipped: u64) -> Self {
        self.max_skipped = max_skipped;
        self
    }

    /// Sets `schedule`.
    #[must_use]
    pub fn with_schedule(mut self, schedule: ScheduleKind) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets `clip`.
    #[must_use]
    pub fn with_clip(mut self, clip: Option<f64>) -> Self {
        self.clip = clip;
        self
    }

    /// Sets `weight_decay`.
    #[must_use]
    pub fn with_weight_decay(mut self, weight_decay: f32) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets `betas`.
    #[must_use]
    pub fn with_betas(mut self, betas: [f32; 2]) -> Self {
        self.betas = betas;
        self
    }

    /// Sets `eps`.
    #[must_use]
    pub fn with_eps(mut self, eps: f32) -> Self {
        self.eps = eps;
        self
    }

    /// Sets `recompute`.
    #[must_use]
    pub fn with_recompute(mut self, recompute: Recompute) -> Self {
        self.recompute = recompute;
        self
    }

    /// Sets `logit_rows`.
    #[must_use]
    pub fn with_logit_rows(mut self, logit_rows: usize) -> Self {
        self.logit_rows = logit_rows;
        self
    }

    /// Sets `loss`.
    #[must_use]
    pub fn with_loss(mut self, loss: TokenLoss) -> Self {
        self.loss = loss;
        self
    }

    /// Sets `preference`.
    #[must_use]
    pub fn with_preference(mut self, preference: PreferenceLoss) -> Self {
        self.preference = Some(preference);
        self
    }

    /// Sets `neftune`.
    #[must_use]
    pub fn with_neftune(mut self, alpha: f64) -> Self {
        self.neftune = Some(alpha);
        self
    }

    /// Sets `router_loss`.
    #[must_use]
    pub fn with_router_loss(mut self, coefficient: f64) -> Self {
        self.router_loss = Some(coefficient);
        self
    }

    /// Sets `optimizer`.
    #[must_use]
    pub fn with_optimizer(mut self, optimizer: OptimizerKind) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// Adds a group.
    #[must_use]
    pub fn with_group(mut self, group: ParameterGroup) -> Self {
        self.groups.push(group);
        self
    }

    pub(crate) fn check(&self) -> Result<Schedule> {
        let fail = |name: &str, expected: &str, found: String| {
            Err(Error::Argument { name: name.into(), expected: expected.into(), found })
        };
        let counts = [
            ("steps", self.steps),
            ("accumulate", self.accumulate as u64),
            ("logit_rows", self.logit_rows as u64),
        ];
        if let Some((name, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return fail(name, "at least 1", "0".into());
        }
        if let Some(clip) = self.clip
            && !(clip.is_finite() && clip > 0.0)
        {
            return fail("clip", "a finite number above 0", clip.to_string());
        }
        if !(self.weight_decay.is_finite() && self.weight_decay >= 0.0) {
            return fail("weight_decay", "a finite number, at least 0", self.weight_decay.to_string());
        }
        if self.betas.iter().any(|beta| !(0.0..1.0).contains(beta)) {
            return fail("betas", "numbers from 0 to below 1", format!("{:?}", self.betas));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return fail("eps", "a finite number above 0", self.eps.to_string());
        }
        if let Some(alpha) = self.neftune
            && !(alpha.is_finite() && alpha > 0.0)
        {
            return fail("neftune", "a finite number above 0", alpha.to_string());
        }
        if let Some(coefficient) = self.router_loss {
            if !(coefficient.is_finite() && coefficient >= 0.0) {
                return fail("router_loss", "a finite number of at least 0", coefficient.to_string());
            }
            if self.preference.is_some() {
                return fail("router_loss", "a loss of tokens beside it", "one of whole answers".into());
            }
        }
        self.loss.check()?;
        self.optimizer.check()?;
        for group in &self.groups {
            group.check()?;
        }
        match &self.preference {
            Some(_) if self.loss != TokenLoss::default() => {
                return fail(
                    "loss",
                    "the default beside a loss of whole answers",
                    format!("{:?}", self.loss),
                );
            }
            Some(preference) => preference.check()?,
            None => {}
        }
        self.schedule_of(None)
    }

    /// The schedule of a group's parameters, or of those in none.
    pub(crate) fn schedule_of(&self, group: Option<&ParameterGroup>) -> Result<Schedule> {
        let lr = group.map_or(1.0, |group| group.lr_factor) * self.lr;
        let kind = group.and_then(|group| group.schedule).unwrap_or(self.schedule);
        Schedule::new(lr, self.warmup, self.steps, kind)
    }
}
