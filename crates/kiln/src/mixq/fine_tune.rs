//! A short fine-tune of the quantized model, and its score on held-out text.

use std::{ops::ControlFlow, sync::Arc};

use kiln_adapters::AdapterConfig;
use kiln_calibration::{CalibrationConfig, Method};
use kiln_distributed::Sharing;
use kiln_eval::WindowedPerplexity;
use kiln_mixq_search::Plan;
use kiln_models::{CausalLm, Decoder, Windows};
use kiln_quant_core::QuantLinear;
use kiln_training::{Dataset, Event, Observer, RunOptions, Trainer, TrainerConfig};

use super::{adapters, apply::check_kinds, attach, schemes};
use crate::{AdaptedModel, Error, Result, stages::calibrated};

/// How a plan is fine-tuned and scored: LoRA on the quantized model, then its loss on held-out text.
#[derive(Debug, Clone)]
pub struct FineTune {
    train: Arc<Dataset>,
    held_out: Vec<u32>,
    window: usize,
    trainer: TrainerConfig,
    adapters: AdapterConfig,
    start: Option<(Method, Windows)>,
    evaluate_every: u64,
}

/// What a fine-tune ended with.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Outcome {
    /// Mean negative log-likelihood of the held-out tokens, in nats; NaN if training diverged.
    pub loss: f64,
    /// Training loss of the last step.
    pub train_loss: f64,
    /// Steps done: fewer than asked for where it was stopped.
    pub steps: u64,
}

impl Outcome {
    const NOTHING: Self = Self { loss: f64::NAN, train_loss: f64::NAN, steps: 0 };
}

impl FineTune {
    /// Trains on `train` as `trainer` says, but for its steps and seed, which every measurement sets (the warm-up is at
    /// most a tenth of the steps), and scores `held_out` in windows of `window` tokens.
    ///
    /// # Errors
    /// [`Error::is_argument`] for held-out text of less than a window.
    pub fn new(
        train: Arc<Dataset>,
        held_out: Vec<u32>,
        window: usize,
        mut trainer: TrainerConfig,
        adapters: AdapterConfig,
    ) -> Result<Self> {
        if window < 2 || held_out.len() < window {
            let found = format!("{} tokens in windows of {window}", held_out.len());
            return Err(Error::argument("held-out text", "at least one window of 2 tokens or more", found));
        }
        // Every measurement's own; not part of what tells fine-tunes apart.
        (trainer.steps, trainer.batch.seed) = (1, 0);
        Ok(Self { train, held_out, window, trainer, adapters, start: None, evaluate_every: 0 })
    }

    /// Codes and adapters start from a calibration on these windows (LoftQ, ApiQ) rather than from rounding and LoRA's
    /// own start.
    #[must_use]
    pub fn with_start(mut self, method: Method, windows: Windows) -> Self {
        self.start = Some((method, windows));
        self
    }

    /// Scores on the way every so many steps, so that hopeless plans can be stopped; 0 never does.
    #[must_use]
    pub fn with_evaluations(mut self, every: u64) -> Self {
        self.evaluate_every = every;
        self
    }

    /// Fine-tunes and scores a plan. `original` is the model before quantization, `quantized` the plan's.
    ///
    /// `keep_going` hears of steps and held-out loss on the way and may end the run.
    ///
    /// # Errors
    /// Adapters that don't fit, a calibration that fails, data that doesn't fit the model. Training that diverges is a
    /// result.
    pub fn run(
        &self,
        original: &Decoder<QuantLinear>,
        quantized: Decoder<QuantLinear>,
        plan: &Plan,
        steps: u64,
        seed: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<Outcome> {
        let (trainer, outcome) = self.tuned(original, quantized, plan, steps, seed, keep_going)?;
        match trainer {
            Some(trainer) if self.evaluate_every == 0 => {
                Ok(Outcome { loss: self.score(trainer.model())?, ..outcome })
            }
            _ => Ok(outcome),
        }
    }

    /// Fine-tunes a plan; without the model where training diverged.
    pub(super) fn tuned(
        &self,
        original: &Decoder<QuantLinear>,
        quantized: Decoder<QuantLinear>,
        plan: &Plan,
        steps: u64,
        seed: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<(Option<Trainer<AdaptedModel>>, Outcome)> {
        let base = self.adapters.clone().with_seed(seed);
        let Some((method, windows)) = &self.start else {
            return self.tune(attach(quantized, plan, &base)?, steps, seed, keep_going);
        };
        check_kinds(plan, &base)?;
        drop(quantized);
        let mut calibration = CalibrationConfig::new(method.clone(), schemes(plan)?);
        calibration.measured_windows = 0;
        let model =
            calibrated(original.clone(), &adapters(plan, &base), &calibration, windows, &Sharing::default())?;
        self.tune(model, steps, seed, keep_going)
    }

    fn tune(
        &self,
        model: AdaptedModel,
        steps: u64,
        seed: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<(Option<Trainer<AdaptedModel>>, Outcome)> {
        let mut config = self.trainer.clone();
        (config.steps, config.batch.seed) = (steps, seed);
        config.warmup = config.warmup.min(steps / 10);
        let mut trainer = Trainer::new(model, self.train.clone(), config)?;
        let mut listener = Listener { fine_tune: self, steps, keep_going, outcome: Outcome::NOTHING };
        let options = RunOptions::new().with_evaluations(self.evaluate_every);
        match trainer.run_with(&options, &mut listener) {
            Ok(_) => {}
            Err(kiln_training::Error::Diverged { .. }) => return Ok((None, listener.outcome)),
            Err(error) => return Err(error.into()),
        }
        let outcome = listener.outcome;
        Ok((Some(trainer), outcome))
    }

    /// The held-out loss; NaN where the model gives no number.
    fn score<M: CausalLm>(&self, model: &M) -> Result<f64, kiln_eval::Error> {
        let protocol = WindowedPerplexity::new(self.window).with_batch(4);
        match protocol.evaluate(&model.valid(), &self.held_out) {
            Ok(found) => Ok(found.nll),
            Err(kiln_eval::Error::NotFinite { .. }) => Ok(f64::NAN),
            Err(error) => Err(error),
        }
    }

    /// Everything that decides a score but plan, steps and seed.
    pub(super) fn describe(&self) -> String {
        let Self { train, held_out, window, trainer, adapters, start, evaluate_every } = self;
        // Data that can't be read is no data that was described before.
        let data = train.fingerprint().unwrap_or_else(|error| error.to_string());
        // Under PEFT's names, where it knows the method: what logs of earlier versions hold.
        let adapters = match adapters.to_peft() {
            Ok(peft) => peft.to_json().to_string(),
            Err(_) => format!("{adapters:?}"),
        };
        let trainer = without_later_options(format!("{trainer:?}"));
        format!("{data} {held_out:?} {window} {trainer} {adapters} {start:?} {evaluate_every}")
    }
}

/// A trainer's description without the options that came later, where they are at their defaults: logs of earlier versions
/// don't have them.
fn without_later_options(mut trainer: String) -> String {
    let TrainerConfig { loss, preference, neftune, router_loss, optimizer, groups, batch, .. } =
        TrainerConfig::new(1, 1);
    let later = [
        format!("loss: {loss:?}, "),
        format!("preference: {preference:?}, "),
        format!("neftune: {neftune:?}, "),
        format!("router_loss: {router_loss:?}, "),
        format!("optimizer: {optimizer:?}, "),
        format!("groups: {groups:?}, "),
        format!("group_by_length: {:?}, ", batch.group_by_length),
    ];
    for option in later {
        trainer = trainer.replace(&option, "");
    }
    trainer
}

/// Scores on the way, and asks whether to go on.
struct Listener<'a> {
    fine_tune: &'a FineTune,
    steps: u64,
    keep_going: &'a mut dyn FnMut(u64, f64) -> bool,
    outcome: Outcome,
}

impl<M: CausalLm> Observer<M> for Listener<'_> {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        match event {
            Event::Step(report) => {
                (self.outcome.train_loss, self.outcome.steps) = (report.loss, report.step + 1);
            }
            Event::Evaluation(evaluation) => {
                self.outcome.loss = evaluation.score;
                let is_last = evaluation.steps == self.steps;
                if !is_last && !(self.keep_going)(evaluation.steps, evaluation.score) {
                    return ControlFlow::Break(());
                }
            }
            _ => {}
        }
        ControlFlow::Continue(())
    }

    fn score(&mut self, model: &M, _: u64) -> Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(Some(self.fine_tune.score(model)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `TrainerConfig`'s `Debug` was before it had losses, optimizers and groups.
    #[test]
    fn descriptions_are_those_of_earlier_logs() {
        let config = TrainerConfig::new(7, 2).with_logit_rows(256);
        let found = without_later_options(format!("{config:?}"));
        let expected = "TrainerConfig { steps: 7, batch: BatchOptions { batch: 2, packing: false, order: Shuffled, seed: 0, \
                        pad_id: 0 }, accumulate: 1, lr: 0.0003, warmup: 0, schedule: Constant, clip: Some(1.0), \
                        weight_decay: 0.0, betas: [0.9, 0.999], eps: 1e-8, recompute: None, logit_rows: 256, \
                        max_skipped: 0 }";
        assert_eq!(found, expected);
    }
}
