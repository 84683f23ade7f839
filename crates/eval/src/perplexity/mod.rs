//! Perplexity: how the protocols share windows, sums and errors.

mod rolling;
mod strided;
mod windowed;

use std::ops::ControlFlow;

use kiln_models::{CausalLm, Targets, TokenBatch, token_nll};
use serde::{Deserialize, Serialize};

pub use rolling::{RollingDocument, RollingPerplexity, RollingResult};
pub use strided::StridedPerplexity;
pub use windowed::WindowedPerplexity;

use crate::{Error, Result};

/// How surprised a model is by a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Perplexity {
    /// Mean negative log-likelihood of a scored token, in nats.
    pub nll: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Tokens the mean is over.
    pub tokens: usize,
    /// Windows they stand in.
    pub windows: usize,
    /// How far the mean may be off as an estimate for more text of the kind.
    pub standard_error: StandardError,
}

/// Standard errors of the mean negative log-likelihood, in nats; that of the perplexity is about `perplexity` times as
/// large. `None` where there is one sample only.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StandardError {
    /// With windows as samples, weighted by their tokens. Tokens of a text depend on one another, so this is the honest
    /// one, provided that there are a few dozen windows.
    pub windows: Option<f64>,
    /// With tokens as samples, as if they were independent.
    pub tokens: Option<f64>,
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Progress {
    /// Windows scored.
    pub windows: usize,
    /// Windows in all.
    pub total: usize,
    /// Mean negative log-likelihood so far, in nats.
    pub nll: f64,
}

/// Told after each forward pass; may end the evaluation, which then fails with [`Error::Cancelled`].
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// One row for the model.
struct Window {
    ids: Vec<u32>,
    /// What follows each of `ids`; `None` is not scored.
    targets: Vec<Option<u32>>,
    /// Tokens that the window counts as in the mean.
    weight: usize,
}

impl Window {
    /// The last `scored` tokens of `ids`, each given what stands before it. Logits after the last are not used, but the
    /// model sees it, as in transformers when labels are the inputs.
    fn of_labels(ids: &[u32], scored: usize, weight: usize) -> Self {
        let places = ids.len() - 1;
        let targets = (0..places).map(|place| (places - place <= scored).then(|| ids[place + 1]));
        Self { ids: ids.to_vec(), targets: targets.chain([None]).collect(), weight }
    }
}

/// Sums over a window's scored tokens.
#[derive(Debug, Clone, Copy)]
struct Sums {
    /// Tokens that the window counts as.
    weight: f64,
    mean: f64,
    mean_square: f64,
}

impl Sums {
    fn new(weight: usize, nll: &[f32]) -> Self {
        let count = nll.len() as f64;
        let sum: f64 = nll.iter().map(|&nll| f64::from(nll)).sum();
        let squares: f64 = nll.iter().map(|&nll| f64::from(nll).powi(2)).sum();
        Self { weight: weight as f64, mean: sum / count, mean_square: squares / count }
    }
}

/// The sums of all windows so far.
#[derive(Debug, Default)]
struct Tally(Vec<Sums>);

impl Tally {
    fn total(&self, of: impl Fn(&Sums) -> f64) -> f64 {
        self.0.iter().map(of).sum()
    }

    fn weight(&self) -> f64 {
        self.total(|sums| sums.weight)
    }

    /// Negative log-likelihood of all tokens.
    fn nll(&self) -> f64 {
        self.total(|sums| sums.weight * sums.mean)
    }

    /// There must be a token.
    fn perplexity(&self) -> Perplexity {
        let weight = self.weight();
        let nll = self.nll() / weight;
        let variance = (self.total(|sums| sums.weight * sums.mean_square) / weight - nll * nll).max(0.0);
        let tokens = (weight > 1.0).then(|| (variance / (weight - 1.0)).sqrt());
        let count = self.0.len() as f64;
        // Of a ratio of two sums over windows; for windows of one size the usual standard error of a mean.
        let spread = self.total(|sums| (sums.weight * (sums.mean - nll)).powi(2));
        let windows = (count > 1.0).then(|| (count / (count - 1.0) * spread).sqrt() / weight);
        Perplexity {
            nll,
            perplexity: nll.exp(),
            tokens: weight as usize,
            windows: self.0.len(),
            standard_error: StandardError { windows, tokens },
        }
    }
}

/// Scores windows one after another, up to `batch` of one length in a forward pass.
fn score<M: CausalLm>(
    model: &M,
    windows: impl Iterator<Item = Window>,
    total: usize,
    batch: usize,
    on_progress: OnProgress,
) -> Result<Tally> {
    let model = model.valid();
    let mut windows = windows.peekable();
    let mut tally = Tally::default();
    while let Some(first) = windows.next() {
        let length = first.ids.len();
        let mut rows = vec![first];
        while rows.len() < batch
            && let Some(row) = windows.next_if(|row| row.ids.len() == length)
        {
            rows.push(row);
        }
        score_rows(&model, &rows, &mut tally)?;
        let done = tally.0.len();
        let progress = Progress { windows: done, total, nll: tally.nll() / tally.weight() };
        if on_progress(progress).is_break() {
            return Err(Error::Cancelled { windows: done, total });
        }
    }
    Ok(tally)
}

/// One forward pass.
fn score_rows<M: CausalLm>(model: &M, rows: &[Window], tally: &mut Tally) -> Result<()> {
    let ids: Vec<Vec<u32>> = rows.iter().map(|row| row.ids.clone()).collect();
    let targets = || rows.iter().flat_map(|row| &row.targets);
    let (target_ids, scored): (Vec<u32>, Vec<bool>) =
        targets().map(|target| (target.unwrap_or(0), target.is_some())).unzip();
    let targets = Targets { ids: &target_ids, scored: &scored };
    let nll = token_nll(model, &TokenBatch::new(&ids)?, targets)?;
    let mut nll = nll.as_slice();
    for row in rows {
        let (own, rest) = nll.split_at(row.targets.iter().flatten().count());
        nll = rest;
        if let Some(&nll) = own.iter().find(|nll| !nll.is_finite()) {
            return Err(Error::NotFinite { window: tally.0.len(), nll });
        }
        tally.0.push(Sums::new(row.weight, own));
    }
    Ok(())
}

/// Checks what all protocols share; `option` is the field that gives the window's length.
fn check_window<M: CausalLm>(
    model: &M,
    option: &str,
    window: usize,
    least: usize,
    batch: usize,
) -> Result<()> {
    let limit = model.max_positions();
    if window < least || window > limit {
        let expected = format!("at least {least}, at most {limit}, the model's limit");
        return Err(Error::option(option, expected, window));
    }
    if batch == 0 {
        let protocol = option.split('.').next().unwrap_or_default();
        return Err(Error::option(&format!("{protocol}.batch"), "at least 1", batch));
    }
    Ok(())
}

/// Checks that the model knows every token; `text` names the sequence.
fn check_ids<M: CausalLm>(model: &M, text: &str, ids: &[u32]) -> Result<()> {
    let vocabulary = model.vocab_size();
    match ids.iter().position(|&id| id as usize >= vocabulary) {
        Some(place) => {
            let expected = format!("an id below {vocabulary}, the vocabulary");
            Err(Error::data(format!("{text}token {place}"), expected, ids[place]))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_shifted_and_counted_from_the_end() {
        let window = Window::of_labels(&[5, 6, 7, 8], 2, 2);
        assert_eq!(window.targets, [None, Some(7), Some(8), None]);
        let window = Window::of_labels(&[5, 6, 7], 9, 2);
        assert_eq!(window.targets, [Some(6), Some(7), None]);
    }

    #[test]
    fn means_and_errors_equal_a_calculation_by_hand() {
        // Two windows of two tokens: mean 3; window means 2 and 4, their standard error sqrt(2) / sqrt(2) = 1; tokens
        // deviate by -2, 0, 0 and 2: variance 8 / 3, standard error sqrt(8 / 3 / 4).
        let tally = Tally(vec![Sums::new(2, &[1.0, 3.0]), Sums::new(2, &[3.0, 5.0])]);
        let found = tally.perplexity();
        assert_eq!((found.nll, found.tokens, found.windows), (3.0, 4, 2));
        assert_eq!(found.perplexity, 3f64.exp());
        assert!((found.standard_error.windows.unwrap() - 1.0).abs() < 1e-12);
        assert!((found.standard_error.tokens.unwrap() - (2f64 / 3.0).sqrt()).abs() < 1e-12);
        // Three tokens beside one: the mean is the tokens', not the windows'.
        let tally = Tally(vec![Sums::new(3, &[1.0, 1.0, 1.0]), Sums::new(1, &[5.0])]);
        let found = tally.perplexity();
        assert_eq!(found.nll, 2.0);
        // sqrt(2 / 1 * ((3 * -1)^2 + (1 * 3)^2)) / 4.
        assert!((found.standard_error.windows.unwrap() - 1.5).abs() < 1e-12);
        // One token has no spread.
        let found = Tally(vec![Sums::new(1, &[5.0])]).perplexity();
        assert_eq!(found.standard_error, StandardError { windows: None, tokens: None });
    }
}
