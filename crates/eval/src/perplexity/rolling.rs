//! Perplexity per word and per byte, as the lm-evaluation-harness computes it.

use std::ops::ControlFlow;

use kiln_models::CausalLm;
use serde::{Deserialize, Serialize};

use super::{OnProgress, Perplexity, Window, check_ids, check_window, score};
use crate::{Error, Result, wikitext::count_words};

/// The protocol of the lm-evaluation-harness's task `wikitext` (its `loglikelihood_rolling`): whole documents, every
/// token scored once, sums divided by the words or bytes of the original text.
///
/// A document's first window is the prefix token and the first `max_length - 1` tokens; each later one ends with the
/// next `max_length` tokens that are scored, which leaves one token of context. The last, short one reaches back over
/// earlier text, up to `max_length` tokens of input. The result depends on `max_length`: name it beside the number.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `max_length` | – | tokens of input | from 1 to the model's positions |
/// | `prefix` | – | the token before a document: the model's BOS, or else EOS | below the vocabulary |
/// | `batch` | 1 | windows in a forward pass; changes results by rounding only | from 1 |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RollingPerplexity {
    /// Tokens of input.
    pub max_length: usize,
    /// The token before a document.
    pub prefix: u32,
    /// Windows in a forward pass.
    pub batch: usize,
}

/// A document's tokens, and the size of the text that results are divided by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollingDocument {
    /// Tokens of the text that is scored, with whatever special tokens the tokenizer adds.
    pub ids: Vec<u32>,
    /// Words of the original text.
    pub words: usize,
    /// UTF-8 bytes of the original text.
    pub bytes: usize,
}

impl RollingDocument {
    /// Counts words and bytes of `original`, the text before [`detokenize`](crate::wikitext::detokenize); `ids` are the
    /// tokens of the text after it.
    pub fn new(ids: Vec<u32>, original: &str) -> Self {
        Self { ids, words: count_words(original), bytes: original.len() }
    }
}

/// What [`RollingPerplexity`] found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RollingResult {
    /// Per token.
    pub token: Perplexity,
    /// `exp(nll of all tokens / words)`.
    pub word_perplexity: f64,
    /// `exp(nll of all tokens / bytes)`.
    pub byte_perplexity: f64,
    /// `nll of all tokens / bytes / ln 2`.
    pub bits_per_byte: f64,
    /// Words of all documents.
    pub words: usize,
    /// Bytes of all documents.
    pub bytes: usize,
}

impl RollingResult {
    fn new(token: Perplexity, nll: f64, words: usize, bytes: usize) -> Self {
        let (per_word, per_byte) = (nll / words as f64, nll / bytes as f64);
        Self {
            token,
            word_perplexity: per_word.exp(),
            byte_perplexity: per_byte.exp(),
            bits_per_byte: per_byte / std::f64::consts::LN_2,
            words,
            bytes,
        }
    }
}

impl RollingPerplexity {
    /// Windows of `max_length` tokens, one at a time; `prefix` goes before each document.
    pub fn new(max_length: usize, prefix: u32) -> Self {
        Self { max_length, prefix, batch: 1 }
    }

    /// Sets `batch`.
    #[must_use]
    pub fn with_batch(mut self, batch: usize) -> Self {
        self.batch = batch;
        self
    }

    /// Scores all documents.
    ///
    /// # Errors
    /// [`Error::Option`] for an option out of range, [`Error::Data`] if there are no tokens, words or bytes, or for ids
    /// beyond the vocabulary, [`Error::NotFinite`].
    pub fn evaluate<M: CausalLm>(&self, model: &M, documents: &[RollingDocument]) -> Result<RollingResult> {
        self.evaluate_with(model, documents, &mut |_| ControlFlow::Continue(()))
    }

    /// As [`evaluate`](Self::evaluate), with a callback that may end it.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate), and [`Error::Cancelled`].
    pub fn evaluate_with<M: CausalLm>(
        &self,
        model: &M,
        documents: &[RollingDocument],
        on_progress: OnProgress,
    ) -> Result<RollingResult> {
        check_window(model, "RollingPerplexity.max_length", self.max_length, 1, self.batch)?;
        check_ids(model, "prefix, ", &[self.prefix])?;
        for (number, document) in documents.iter().enumerate() {
            check_ids(model, &format!("document {number}, "), &document.ids)?;
        }
        let sum = |of: fn(&RollingDocument) -> usize| documents.iter().map(of).sum::<usize>();
        let (words, bytes) = (sum(|document| document.words), sum(|document| document.bytes));
        for (what, count) in
            [("tokens", sum(|document| document.ids.len())), ("words", words), ("bytes", bytes)]
        {
            if count == 0 {
                return Err(Error::data(what, "at least 1 in all documents", 0));
            }
        }
        let total = sum_windows(documents, self.max_length);
        let windows = documents.iter().flat_map(|document| self.windows(&document.ids));
        let tally = score(model, windows, total, self.batch, on_progress)?;
        Ok(RollingResult::new(tally.perplexity(), tally.nll(), words, bytes))
    }

    /// Cuts a document: each token is the target of one place of one window.
    fn windows(&self, ids: &[u32]) -> impl Iterator<Item = Window> {
        let length = self.max_length;
        // What stands before token `i` is `context[i]`.
        let context: Vec<u32> = std::iter::once(self.prefix).chain(ids.iter().copied()).collect();
        (0..ids.len()).step_by(length).map(move |start| {
            let end = (start + length).min(context.len() - 1);
            // A short last window is filled up with earlier text; a short document has none.
            let first = if start == 0 { 0 } else { end - length };
            let targets = (first..end).map(|place| (place >= start).then(|| context[place + 1]));
            Window { ids: context[first..end].to_vec(), targets: targets.collect(), weight: end - start }
        })
    }
}

fn sum_windows(documents: &[RollingDocument], length: usize) -> usize {
    documents.iter().map(|document| document.ids.len().div_ceil(length)).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// Lines of the harness's own results, by the value of a key.
    fn golden(key: &str, value: &str) -> Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/eval/harness.jsonl");
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.find(|line| line[key] == value).unwrap()
    }

    /// Input and scored tokens of each window over the ids 1, 2, .., `count`.
    fn cut(count: u32, max_length: usize) -> Vec<[Vec<u32>; 2]> {
        let ids: Vec<u32> = (1..=count).collect();
        let protocol = RollingPerplexity::new(max_length, 0);
        let windows = protocol.windows(&ids);
        windows.map(|window| [window.ids, window.targets.into_iter().flatten().collect()]).collect()
    }

    /// The harness drops from the input's end what it appends of the continuation: the input is the context and all
    /// but the last token of the continuation.
    fn inputs(disjoint: &Value) -> Vec<[Vec<u32>; 2]> {
        let ids = |value: &Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
        };
        let pairs = disjoint.as_array().unwrap().iter().map(|pair| {
            let (context, scored) = (ids(&pair[0]), ids(&pair[1]));
            [[context, scored[..scored.len() - 1].to_vec()].concat(), scored]
        });
        pairs.collect()
    }

    #[test]
    fn windows_are_the_harness_s() {
        for (count, name) in
            [(10, "rolling_disjoint n=10 L=4 prefix=0"), (3, "rolling_disjoint n=3 L=4 prefix=0")]
        {
            assert_eq!(cut(count, 4), inputs(&golden("vector", name)["value"]), "{name}");
        }
        assert_eq!(cut(0, 4), [] as [[Vec<u32>; 2]; 0]);
        assert_eq!(cut(2, 1), [[vec![0], vec![1]], [vec![1], vec![2]]]);
        // By the rule: the last input is the 4 tokens before the last one.
        assert_eq!(cut(5, 4)[1], [vec![1, 2, 3, 4], vec![5]]);
    }

    #[test]
    fn words_and_bytes_divide_as_in_the_harness() {
        let perplexity = Perplexity {
            nll: 0.0,
            perplexity: 1.0,
            tokens: 1,
            windows: 1,
            standard_error: super::super::StandardError { windows: None, tokens: None },
        };
        let (word, byte) =
            (golden("vector", "word_perplexity items"), golden("vector", "byte_perplexity items"));
        let sum = |line: &Value, part: usize| -> f64 {
            line["value"]["items"].as_array().unwrap().iter().map(|item| item[part].as_f64().unwrap()).sum()
        };
        let (words, bytes) = (sum(&word, 1) as usize, sum(&byte, 1) as usize);
        let found = RollingResult::new(perplexity, -sum(&word, 0), words, bytes);
        for (found, expected) in [
            (found.word_perplexity, &word["value"]["value"]),
            (found.byte_perplexity, &byte["value"]["value"]),
            (found.bits_per_byte, &byte["value"]["bits_per_byte"]),
        ] {
            assert!((found - expected.as_f64().unwrap()).abs() < 1e-12, "{found}, {expected}");
        }
    }
}
