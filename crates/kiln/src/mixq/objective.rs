//! All measures of one model behind the search's trait.

use std::fmt;

use burn::module::Module;
use kiln_adapters::AdapterConfig;
use kiln_calibration::Method;
use kiln_mixq_search::{
    Evaluation, Fidelity, Granularity, KeepGoing, Measure, Measurement, Objective, Plan, Request,
};
use kiln_models::{CausalLm, Slots, Windows};
use kiln_quant_core::{QuantLinear, Scheme, hash::hex};
use sha2::{Digest, Sha256};

use super::{
    Error, FineTune, Fisher, KlOptions, LogitKl, Moments, Result, TaskScore, Variants, apply::scheme_of,
    starts::Starts,
};

/// Measures plans of one model. What is measured is the request's: see [`Measure`].
///
/// | measure | score | amount |
/// | --- | --- | --- |
/// | KL | [`LogitKl`] | tokens, rounded up to whole batches |
/// | activation error | sum over projections of [`Moments::relative_error`] | tokens, rounded up to whole windows |
/// | Fisher | sum over projections of [`Fisher::harm`] | tokens, rounded up to whole windows |
/// | fine-tune | held-out loss after [`FineTune`] | steps |
/// | task | what [`TaskScore`]'s metric lacks to 1 | documents |
///
/// All are of the quantized model, or of the model that fine-tunes start from ([`with_start`](Self::with_start); activation
/// error and Fisher excepted). Less is better, and only fine-tunes depend on the seed, a task after one too.
pub struct ModelObjective {
    variants: Variants,
    windows: Windows,
    kl: LogitKl,
    /// Of the amount asked for last.
    moments: Option<(usize, Moments)>,
    fisher: Option<(usize, Fisher)>,
    fine_tune: Option<FineTune>,
    task: Option<TaskScore>,
    starts: Option<Starts>,
    /// Amounts of tokens are rounded up to whole batches, so their size is part of what is measured.
    batch_tokens: usize,
    model_hash: String,
    fingerprint: String,
    /// Which block each slot stands in.
    blocks: Vec<(String, usize)>,
}

impl fmt::Debug for ModelObjective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelObjective")
            .field("fingerprint", &self.fingerprint)
            .field("blocks", &self.blocks.len())
            .finish_non_exhaustive()
    }
}

impl ModelObjective {
    /// Runs the original model on the windows.
    ///
    /// # Errors
    /// [`Error::is_argument`] for windows that don't fit the model.
    pub fn new(variants: Variants, windows: &Windows, options: &KlOptions) -> Result<Self> {
        let original = variants.original();
        let kl = LogitKl::new(original, windows, options)?;
        let blocks = blocks_of(original)?;
        let model_hash = kiln_models::fingerprint(original)?;
        let mut objective = Self {
            variants,
            windows: windows.clone(),
            kl,
            moments: None,
            fisher: None,
            fine_tune: None,
            task: None,
            starts: None,
            batch_tokens: options.batch_tokens,
            model_hash,
            fingerprint: String::new(),
            blocks,
        };
        objective.identify();
        Ok(objective)
    }

    /// The same with fine-tunes.
    #[must_use]
    pub fn with_fine_tune(mut self, fine_tune: FineTune) -> Self {
        self.fine_tune = Some(fine_tune);
        self.identify();
        self
    }

    /// The same with a task.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a task that is scored after steps, where there is no fine-tune to make them.
    pub fn with_task(mut self, task: TaskScore) -> Result<Self> {
        if task.steps() > 0 && self.fine_tune.is_none() {
            let expected = "a fine-tune, set before a task that is scored after one";
            return Err(Error::argument("ModelObjective::with_task", expected, "none"));
        }
        self.task = Some(task);
        self.identify();
        Ok(self)
    }

    /// Measures divergence, and tasks without a fine-tune, of the models that fine-tunes start from: by LoftQ or PiSSA, whose
    /// factors make up for a part of what rounding loses, more of it where there are fewer bits.
    ///
    /// # Memory
    /// Every projection in every scheme that a plan asked for, with its factors.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a method that looks at activations, which would have to run for each plan, and for adapters other
    /// than LoRA and DoRA.
    pub fn with_start(mut self, method: Method, adapters: AdapterConfig) -> Result<Self> {
        self.starts = Some(Starts::new(method, adapters, &self.windows)?);
        self.kl.forget();
        self.identify();
        Ok(self)
    }

    /// Tokens of all windows: the most that a fidelity may ask for.
    pub fn tokens(&self) -> u64 {
        self.kl.tokens()
    }

    /// The model's quantized projections.
    pub fn variants(&mut self) -> &mut Variants {
        &mut self.variants
    }

    fn identify(&mut self) {
        let mut hash = Sha256::new();
        hash.update(&self.model_hash);
        hash.update(format!("{:?} {} {:?}", self.variants.rounding(), self.batch_tokens, self.windows));
        if let Some(prunings) = self.variants.prunings() {
            hash.update(prunings.describe());
        }
        if let Some(fine_tune) = &self.fine_tune {
            hash.update(fine_tune.describe());
        }
        if let Some(task) = &self.task {
            hash.update(task.describe());
        }
        if let Some(starts) = &self.starts {
            hash.update(starts.describe());
        }
        self.fingerprint = hex(hash.finalize());
    }

    /// The divergence of a plan's model on the first `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::is_argument`] for a plan of another model, or more tokens than there are.
    pub fn kl(&mut self, plan: &Plan, tokens: u64, keep_going: &mut KeepGoing<'_>) -> Result<Measurement> {
        let mut keys = vec![String::new(); self.variants.original().num_blocks()];
        for (path, block) in &self.blocks {
            if let Some(setting) = plan.get(path) {
                keys[*block] += &format!("{} {:?} {:?} ", setting.scheme, setting.rank, setting.prune);
            }
        }
        let (score, seen) = match &mut self.starts {
            Some(starts) => {
                let model = starts.model(&self.variants, plan)?;
                self.kl.measure(&model, &keys, tokens, keep_going)?
            }
            None => self.kl.measure(&self.variants.model(plan)?, &keys, tokens, keep_going)?,
        };
        let mut measured = Measurement::new(score);
        measured.figures.insert("tokens".into(), seen as f64);
        Ok(measured)
    }

    /// The sum of a proxy over the plan's projections.
    fn proxy(&mut self, plan: &Plan, measure: Measure, tokens: u64) -> Result<Measurement> {
        if tokens == 0 || tokens > self.tokens() {
            let expected = format!("1 to {}, the windows' tokens", self.tokens());
            return Err(Error::argument("tokens", expected, tokens));
        }
        let count = tokens.div_ceil(self.windows.length() as u64) as usize;
        let windows = &self.windows.first(count);
        match measure {
            Measure::Fisher if self.fisher.as_ref().is_none_or(|(known, _)| *known != count) => {
                self.fisher = Some((count, Fisher::measure(self.variants.original(), windows)?));
            }
            Measure::ActivationError if self.moments.as_ref().is_none_or(|(known, _)| *known != count) => {
                self.moments = Some((count, Moments::measure(self.variants.original(), windows)?));
            }
            _ => {}
        }
        let mut sum = 0.0;
        for (path, setting) in plan.iter() {
            let quantized = self.variants.projection(path, scheme_of(path, setting)?)?;
            let original = self.variants.projection(path, Scheme::Dense)?;
            sum += match (measure, &self.fisher, &self.moments) {
                (Measure::Fisher, Some((_, fisher)), _) => fisher.harm(path, &original, &quantized)?,
                (Measure::ActivationError, _, Some((_, moments))) => {
                    moments.relative_error(path, &original, &quantized)?
                }
                (other, ..) => return Err(unmeasurable(other)),
            };
        }
        Ok(Measurement::new(sum))
    }

    fn tuned(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Result<Measurement> {
        let Some(fine_tune) = &self.fine_tune else { return Err(unmeasurable(Measure::Finetune)) };
        let quantized = self.variants.model(request.plan)?;
        let ((original, plan), steps) = (self.variants.cut(request.plan)?, request.fidelity.amount);
        let tuned = fine_tune.run(&original, quantized, &plan, steps, request.seed, keep_going)?;
        let mut measured = Measurement::new(tuned.loss);
        measured.figures.insert("perplexity".into(), tuned.loss.exp());
        measured.figures.insert("train_loss".into(), tuned.train_loss);
        measured.figures.insert("steps".into(), tuned.steps as f64);
        Ok(measured)
    }
}

impl ModelObjective {
    fn task(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Result<Measurement> {
        let Some(task) = &self.task else { return Err(unmeasurable(Measure::Task)) };
        let (plan, documents) = (request.plan, request.fidelity.amount);
        let value = match (task.steps(), &self.fine_tune, &mut self.starts) {
            (0, _, Some(starts)) => task.of(&starts.model(&self.variants, plan)?, documents)?,
            (0, _, None) | (_, None, _) => task.of(&self.variants.model(plan)?, documents)?,
            (steps, Some(fine_tune), _) => {
                let quantized = self.variants.model(plan)?;
                let (original, plan) = self.variants.cut(plan)?;
                match fine_tune.tuned(&original, quantized, &plan, steps, request.seed, keep_going)?.0 {
                    Some(trainer) => task.of(&trainer.model().valid(), documents)?,
                    None => f64::NAN,
                }
            }
        };
        let mut measured = Measurement::new(1.0 - value);
        measured.figures.insert("metric".into(), value);
        Ok(measured)
    }
}

impl Objective for ModelObjective {
    fn fingerprint(&self) -> String {
        self.fingerprint.clone()
    }

    fn rounded(&self, fidelity: Fidelity) -> Fidelity {
        let amount = match fidelity.measure {
            Measure::Kl => self.kl.rounded(fidelity.amount),
            Measure::Finetune => fidelity.amount,
            Measure::Task => {
                self.task.as_ref().map_or(fidelity.amount, |task| fidelity.amount.min(task.documents()))
            }
            _ => fidelity.amount.next_multiple_of(self.windows.length() as u64),
        };
        Fidelity { amount, ..fidelity }
    }

    fn has_seeds(&self, measure: Measure) -> bool {
        match measure {
            Measure::Finetune => true,
            Measure::Task => self.task.as_ref().is_some_and(|task| task.steps() > 0),
            _ => false,
        }
    }

    fn evaluate(&mut self, request: &Request<'_>, keep_going: &mut KeepGoing<'_>) -> Evaluation {
        let tokens = request.fidelity.amount;
        let measured = match request.fidelity.measure {
            Measure::Kl => self.kl(request.plan, tokens, keep_going),
            Measure::Finetune => self.tuned(request, keep_going),
            Measure::Task => self.task(request, keep_going),
            measure => self.proxy(request.plan, measure, tokens),
        };
        measured.map_err(Into::into)
    }
}

fn unmeasurable(measure: Measure) -> Error {
    let expected = "KL, activation error, Fisher, or a fine-tune or a task where one is set";
    Error::argument("fidelity.measure", expected, format!("{measure:?}"))
}

/// Slots and the blocks that they stand in.
fn blocks_of(model: &kiln_models::Decoder<QuantLinear>) -> Result<Vec<(String, usize)>> {
    let (mut blocks, mut last) = (Vec::new(), None);
    let mut index = 0;
    for (path, _) in model.slots() {
        let block = Granularity::Layer.unit(&path).to_string();
        if last.as_ref().is_some_and(|last| *last != block) {
            index += 1;
        }
        last = Some(block);
        blocks.push((path, index));
    }
    let (found, expected) = (index + 1, model.num_blocks());
    match found == expected {
        true => Ok(blocks),
        false => Err(Error::argument("model", format!("linears in {expected} blocks"), found)),
    }
}
