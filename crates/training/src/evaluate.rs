//! The loss on a data set.

use kiln_distributed::{Alone, Communicator};
use kiln_models::{CausalLm, scores_at, token_nll};
use serde::{Deserialize, Serialize};

use crate::{
    Batch, Dataset, Placed, Result,
    error::Problem,
    in_order,
    ranks::{gathered, in_turn},
};

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
    evaluate_on(&Alone, model, dataset, batch)
}

/// As [`evaluate`], the batches dealt to `ranks`, which all have the same model and data: the same figures on all of them,
/// to the last bit those of one.
///
/// # Errors
/// As [`evaluate`], of any of the ranks.
pub fn evaluate_on<M: CausalLm>(
    ranks: &dyn Communicator,
    model: &M,
    dataset: &Dataset,
    batch: usize,
) -> Result<DatasetLoss> {
    let own = || {
        check_values(dataset, model)?;
        let mine = in_order(dataset, batch, 0)?.skip(ranks.rank()).step_by(ranks.size());
        let figures = mine.map(|batch| figures(model, &batch?)).collect::<Result<Vec<_>>>()?;
        Ok(figures.concat())
    };
    let (_, all) = gathered(ranks, own(), Vec::clone)?;
    let (mut sum, mut tokens, mut total) = (0.0, 0, 0.0);
    for figures in in_turn(&all, FIGURES) {
        sum += figures[0];
        tokens += figures[1] as usize;
        total += figures[2];
    }
    Ok(DatasetLoss { nll: sum / total, tokens })
}

const FIGURES: usize = 3;

/// Of a batch the weighted sum of losses, the number of targets, and the sum of weights.
fn figures<M: CausalLm>(model: &M, batch: &Batch) -> Result<[f64; FIGURES]> {
    let losses = match model.labels() {
        Some(1) => squared_errors(model, batch)?,
        _ => token_nll(model, &batch.tokens, batch.as_targets())?,
    };
    let mut rest = losses.iter().map(|loss| f64::from(*loss));
    let of_example =
        |placed: &Placed| f64::from(placed.weight) * rest.by_ref().take(placed.targets).sum::<f64>();
    let sum = batch.examples.iter().map(of_example).sum();
    Ok([sum, losses.len() as f64, batch.total_weight()])
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
