//! The loss on a data set.

use kiln_models::{CausalLm, scores_at, token_nll};
use serde::{Deserialize, Serialize};

use crate::{Batch, Dataset, Result, error::Problem, in_order};

/// The loss of a model on a data set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct DatasetLoss {
    /// Mean negative log-likelihood of the scored tokens, or of classes, in nats; of a regression the mean squared error;
    /// weighted, where examples have weights.
    pub nll: f64,
    /// Scored tokens.
    pub tokens: usize,
}

impl DatasetLoss {
    /// `exp` of the mean.
    pub fn perplexity(&self) -> f64 {
        self.nll.exp()
    }
}

/// The mean loss over the tokens of `dataset` that are learned, `batch` rows at a time; no gradient is recorded.
///
/// Each row is seen alone, so `batch` decides time and memory only.
///
/// ```no_run
/// # fn example(model: &kiln_models::Decoder<kiln_quant_core::QuantLinear>, held_out: &kiln_training::Dataset)
/// # -> Result<(), kiln_training::Error> {
/// let loss = kiln_training::evaluate(model, held_out, 8)?;
/// println!("{:.3} nats per token over {} tokens", loss.nll, loss.tokens);
/// # Ok(()) }
/// ```
///
/// # Errors
/// A `batch` of 0, and data that doesn't fit the model.
pub fn evaluate<M: CausalLm>(model: &M, dataset: &Dataset, batch: usize) -> Result<DatasetLoss> {
    let (mut sum, mut tokens, mut total) = (0.0, 0, 0.0);
    check_values(dataset, model)?;
    for batch in in_order(dataset, batch, 0)? {
        let batch = batch?;
        let losses = match model.labels() {
            Some(1) => squared_errors(model, &batch)?,
            _ => token_nll(model, &batch.tokens, batch.as_targets())?,
        };
        let mut rest = losses.iter().map(|loss| f64::from(*loss));
        for placed in &batch.examples {
            sum += f64::from(placed.weight) * rest.by_ref().take(placed.targets).sum::<f64>();
        }
        tokens += losses.len();
        total += batch.total_weight();
    }
    Ok(DatasetLoss { nll: sum / total, tokens })
}

/// Whether a model that says classes or numbers gets such data, and no other does.
pub(crate) fn check_values<M: CausalLm>(dataset: &Dataset, model: &M) -> Result<()> {
    match (dataset.values(), model.labels()) {
        (None, None) => Ok(()),
        (Some(_), None) => {
            let expected = "text to learn: classes and numbers are for a `Classifier`; to read the text alone, name the \
                            form: `Form::Text`";
            Err(Problem::new("data", expected, "texts with classes or numbers").argument())
        }
        (None, Some(_)) => {
            let expected = "texts with classes or numbers, for a classifier";
            Err(Problem::new("data", expected, "text to learn").argument())
        }
        (Some(values), Some(outputs)) => {
            values.misfit(outputs).map_or(Ok(()), |problem| Err(problem.argument()))
        }
    }
}

fn squared_errors<M: CausalLm>(model: &M, batch: &Batch) -> Result<Vec<f32>> {
    let found = scores_at(model, &batch.tokens, &batch.scored)?;
    let wanted = batch.examples.iter().filter_map(|placed| placed.value);
    Ok(found.iter().zip(wanted).map(|(scores, value)| (scores[0] - value).powi(2)).collect())
}
