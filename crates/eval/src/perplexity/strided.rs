//! Overlapping windows, as Hugging Face's guide to perplexity computes it.

use std::ops::ControlFlow;

use kiln_models::CausalLm;

use super::{OnProgress, Perplexity, Window, check_ids, check_window, score};
use crate::{Error, Result};

/// The protocol of transformers' guide "Perplexity of fixed-length models": a window of `window` tokens moves on by
/// `stride`; each time the tokens not yet scored are, with the rest of the window as context. Nothing is dropped.
///
/// As in the guide, a window with `n` new tokens counts as `n - 1` in the mean, and so in [`Perplexity::tokens`]: right
/// for the first, whose first token has nothing before it, and a slight tilt towards it for the later ones, where all
/// `n` are scored. With `stride = window` and a whole number of windows the result is that of
/// [`WindowedPerplexity`](super::WindowedPerplexity).
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `window` | – | tokens in a window | from 2 to the model's positions |
/// | `stride` | – | new tokens in a window | from 2 (one new token would count as none) to `window` |
/// | `batch` | 1 | windows in a forward pass; changes results by rounding only | from 1 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StridedPerplexity {
    /// Tokens in a window.
    pub window: usize,
    /// New tokens in a window.
    pub stride: usize,
    /// Windows in a forward pass.
    pub batch: usize,
}

impl StridedPerplexity {
    /// Windows of `window` tokens, each `stride` after the one before, one at a time.
    pub fn new(window: usize, stride: usize) -> Self {
        Self { window, stride, batch: 1 }
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
    /// [`Error::Option`] for an option out of range, [`Error::Data`] for fewer than two tokens or ids beyond the
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
        check_window(model, "StridedPerplexity.window", self.window, 2, self.batch)?;
        if self.stride < 2 || self.stride > self.window {
            let expected = format!("at least 2, at most the window, {}", self.window);
            return Err(Error::option("StridedPerplexity.stride", expected, self.stride));
        }
        check_ids(model, "", ids)?;
        if ids.len() < 2 {
            return Err(Error::data("tokens", "at least 2", ids.len()));
        }
        let places = self.places(ids.len());
        let windows =
            places.iter().map(|&Place { start, end, new }| Window::of_labels(&ids[start..end], new, new - 1));
        Ok(score(model, windows, places.len(), self.batch, on_progress)?.perplexity())
    }

    /// The windows of a text of `length` tokens that count.
    fn places(&self, length: usize) -> Vec<Place> {
        let (mut places, mut scored) = (Vec::new(), 0);
        for start in (0..length).step_by(self.stride) {
            let end = (start + self.window).min(length);
            places.push(Place { start, end, new: end - scored });
            scored = end;
            if end == length {
                break;
            }
        }
        places.retain(|place| place.new > 1);
        places
    }
}

/// Where a window stands, and how many of its tokens are new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    start: usize,
    end: usize,
    new: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_overlap_and_every_token_is_new_once() {
        let places = |window, stride, length| {
            let places = StridedPerplexity::new(window, stride).places(length);
            places.iter().map(|place| [place.start, place.end, place.new]).collect::<Vec<_>>()
        };
        assert_eq!(places(6, 4, 14), [[0, 6, 6], [4, 10, 4], [8, 14, 4]]);
        assert_eq!(places(6, 4, 12), [[0, 6, 6], [4, 10, 4], [8, 12, 2]]);
        // One new token counts as none.
        assert_eq!(places(6, 4, 11), [[0, 6, 6], [4, 10, 4]]);
        assert_eq!(places(6, 6, 12), [[0, 6, 6], [6, 12, 6]]);
        assert_eq!(places(6, 4, 3), [[0, 3, 3]]);
    }
}
