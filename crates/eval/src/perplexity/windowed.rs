//! Non-overlapping windows, as papers on quantization report perplexity.

use std::ops::ControlFlow;

use kiln_models::CausalLm;

use super::{OnProgress, Perplexity, Window, check_ids, check_window, score};
use crate::{Error, Result};

/// The protocol of GPTQ and most papers after it: the text is cut into windows of equal length, what remains is dropped,
/// and nothing is put in front unless `begin` says so. In each window, tokens from the second on are scored, given those before them.
///
/// `perplexity = exp(mean nll)` over `windows * (window - 1)` tokens, with `begin` over `windows * window`. Papers use windows of 2048 (LLM-Pruner: 128) over
/// WikiText-2's test rows joined by blank lines; name the length beside the number.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `window` | – | tokens in a window | from 2 to the model's positions |
/// | `begin` | none | a token in front of every window, which then has all of its tokens scored; some models are lost without one | below the vocabulary |
/// | `max_windows` | all | windows scored, from the start | from 1 |
/// | `batch` | 1 | windows in a forward pass; changes results by rounding only | from 1 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct WindowedPerplexity {
    /// Tokens in a window.
    pub window: usize,
    /// A token in front of every window.
    pub begin: Option<u32>,
    /// Windows scored.
    pub max_windows: Option<usize>,
    /// Windows in a forward pass.
    pub batch: usize,
}

impl WindowedPerplexity {
    /// All windows of `window` tokens, one at a time.
    pub fn new(window: usize) -> Self {
        Self { window, begin: None, max_windows: None, batch: 1 }
    }

    /// Sets `begin`.
    #[must_use]
    pub fn with_begin(mut self, begin: u32) -> Self {
        self.begin = Some(begin);
        self
    }

    /// Sets `max_windows`.
    #[must_use]
    pub fn with_max_windows(mut self, max_windows: usize) -> Self {
        self.max_windows = Some(max_windows);
        self
    }

    /// Sets `batch`.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// Scores the text `ids`.
    ///
    /// # Errors
    /// [`Error::Option`] for an option out of range, [`Error::Data`] for less than a window or ids beyond the
    /// vocabulary, [`Error::NotFinite`].
    pub fn evaluate<M: CausalLm>(&self, model: &M, ids: &[u32]) -> Result<Perplexity> {
        self.evaluate_with(model, ids, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`evaluate`](Self::evaluate), with a callback that may end it.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and [`Error::Cancelled`].
    pub fn evaluate_with<M: CausalLm>(
        &self,
        model: &M,
        ids: &[u32],
        on_progress: OnProgress,
    ) -> Result<Perplexity> {
        let begin = usize::from(self.begin.is_some());
        check_window(model, "WindowedPerplexity.window", self.window + begin, 2, self.batch)?;
        if let Some(id) = self.begin.filter(|id| *id as usize >= model.vocab_size()) {
            let expected = format!("an id below {}, the vocabulary", model.vocab_size());
            return Err(Error::option("WindowedPerplexity.begin", expected, id as usize));
        }
        if self.max_windows == Some(0) {
            return Err(Error::option("WindowedPerplexity.max_windows", "at least 1", 0));
        }
        check_ids(model, "", ids)?;
        let total = (ids.len() / self.window).min(self.max_windows.unwrap_or(usize::MAX));
        if total == 0 {
            return Err(Error::data("tokens", format!("at least one window of {}", self.window), ids.len()));
        }
        let scored = self.window + begin - 1;
        let windows = ids.chunks_exact(self.window).take(total);
        let windows = windows.map(|ids| {
            let ids: Vec<u32> = self.begin.into_iter().chain(ids.iter().copied()).collect();
            Window::of_labels(&ids, scored, scored)
        });
        Ok(score(model, windows, total, self.batch, on_progress)?.perplexity())
    }
}
