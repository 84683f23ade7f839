//! A short fine-tune of the quantized model, and its score on held-out text.

use std::{ops::ControlFlow, sync::Arc};

use kiln_adapters::{DropoutClock, LoraAttacher, PeftConfig};
use kiln_calibration::{CalibrationConfig, Calibrator, Method};
use kiln_eval::WindowedPerplexity;
use kiln_mixq_search::Plan;
use kiln_models::{AnyModel, CausalLm, Slots};
use kiln_quant_core::QuantLinear;
use kiln_training::{Dataset, Trainer, TrainerConfig};

use super::{Error, Result, attach, peft, schemes};

/// How a plan is fine-tuned and scored: LoRA on the quantized model, then its loss on held-out text.
#[derive(Debug, Clone)]
pub struct FineTune {
    train: Arc<Dataset>,
    held_out: Vec<u32>,
    window: usize,
    trainer: TrainerConfig,
    peft: PeftConfig,
    start: Option<(Method, Vec<Vec<u32>>)>,
    evaluate_every: u64,
}

/// What a fine-tune ended with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tuned {
    /// Mean negative log-likelihood of the held-out tokens, in nats; NaN if training diverged.
    pub loss: f64,
    /// Training loss of the last step.
    pub train_loss: f64,
    /// Steps done: fewer than asked for where it was stopped.
    pub steps: u64,
}

impl FineTune {
    /// Trains on `train` as `trainer` says, but for its steps and seed, which every measurement sets (the warm-up is at
    /// most a tenth of the steps), and scores `held_out` in windows of `window` tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for held-out text of less than a window.
    pub fn new(
        train: Arc<Dataset>,
        held_out: Vec<u32>,
        window: usize,
        mut trainer: TrainerConfig,
        peft: PeftConfig,
    ) -> Result<Self> {
        if window < 2 || held_out.len() < window {
            let found = format!("{} tokens in windows of {window}", held_out.len());
            return Err(Error::argument("held-out text", "at least one window of 2 tokens or more", found));
        }
        // Every measurement's own; not part of what tells fine-tunes apart.
        (trainer.steps, trainer.batch.seed) = (1, 0);
        Ok(Self { train, held_out, window, trainer, peft, start: None, evaluate_every: 0 })
    }

    /// Codes and adapters start from a calibration on these windows (LoftQ, ApiQ) rather than from rounding and LoRA's
    /// own start.
    #[must_use]
    pub fn with_start(mut self, method: Method, windows: Vec<Vec<u32>>) -> Self {
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
        original: &AnyModel<QuantLinear>,
        quantized: AnyModel<QuantLinear>,
        plan: &Plan,
        steps: u64,
        seed: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<Tuned> {
        let Some((method, windows)) = &self.start else {
            let (model, clocks) = attach(quantized, plan, &self.peft, seed)?;
            return self.tune(model, clocks, steps, seed, keep_going);
        };
        if let Some((path, _)) = plan.iter().find(|(_, s)| s.adapter.as_deref().is_some_and(|a| a != "lora"))
        {
            return Err(Error::argument(path, "adapter lora, for a calibrated start", "another"));
        }
        drop(quantized);
        let config = peft(plan, &self.peft);
        let attacher = LoraAttacher::new(&config, &original.slot_shapes(), seed)?;
        let mut calibration = CalibrationConfig::new(method.clone(), schemes(plan)?);
        calibration.measured_windows = 0;
        let (model, _) = Calibrator::new(&calibration, windows)
            .with_adapters(&attacher)
            .run(original.clone(), &mut |_| ControlFlow::Continue(()))?;
        self.tune(model, vec![attacher.clock().clone()], steps, seed, keep_going)
    }

    fn tune<M: CausalLm>(
        &self,
        model: M,
        clocks: Vec<DropoutClock>,
        steps: u64,
        seed: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<Tuned> {
        let mut config = self.trainer.clone();
        (config.steps, config.batch.seed) = (steps, seed);
        config.warmup = config.warmup.min(steps / 10);
        let set = clocks.clone();
        let mut trainer = Trainer::new(model, self.train.clone(), config)?.with_clock(move |place| {
            for clock in &set {
                clock.set(place.step, place.micro_batch);
                clock.train(place.training);
            }
        });
        let mut tuned = Tuned { loss: f64::NAN, train_loss: f64::NAN, steps: 0 };
        for step in 1..=steps {
            match trainer.step() {
                Ok(report) => (tuned.train_loss, tuned.steps) = (report.loss, step),
                Err(kiln_training::Error::Diverged { .. }) => return Ok(tuned),
                Err(error) => return Err(error.into()),
            }
            if step < steps && self.evaluate_every > 0 && step.is_multiple_of(self.evaluate_every) {
                tuned.loss = self.score(trainer.model(), &clocks)?;
                if !keep_going(step, tuned.loss) {
                    return Ok(tuned);
                }
            }
        }
        tuned.loss = self.score(trainer.model(), &clocks)?;
        Ok(tuned)
    }

    /// The held-out loss; NaN where the model gives no number.
    fn score<M: CausalLm>(&self, model: &M, clocks: &[DropoutClock]) -> Result<f64> {
        clocks.iter().for_each(|clock| clock.train(false));
        let protocol = WindowedPerplexity::new(self.window).with_batch(4);
        match protocol.evaluate(&model.valid(), &self.held_out) {
            Ok(found) => Ok(found.nll),
            Err(kiln_eval::Error::NotFinite { .. }) => Ok(f64::NAN),
            Err(error) => Err(error.into()),
        }
    }

    /// Everything that decides a score but plan, steps and seed.
    pub(super) fn describe(&self) -> String {
        let Self { train, held_out, window, trainer, peft, start, evaluate_every } = self;
        let data = train.fingerprint();
        format!("{data} {held_out:?} {window} {trainer:?} {} {start:?} {evaluate_every}", peft.to_json())
    }
}
