//! A language model as a scorer.

use std::{cell::Cell, collections::BTreeMap, fmt};

use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use kiln_models::{CausalLm, KvCache, TokenBatch, Tokenizer};
use kiln_quant_core::{fused, ints_to_host, to_host};

use super::{
    GenerateRequest, OnAnswer, Scorer,
    encode::Encoder,
    generation,
    plan::{self, Row, Unit},
};
use crate::{Error, Response, Result, RollingDocument, RollingPerplexity, error::Problem};

/// Rows of logits held at once.
const LOGIT_ROWS: usize = 128;

/// A model with its tokenizer, by the harness's rules: context and continuation are tokenized together, what doesn't fit
/// is cut from the left, an empty context is the begin-of-sequence token (or, for want of it, end-of-sequence).
/// Log-likelihoods are f32 sums' logarithms, whatever the model computes in.
///
/// Questions that share a beginning (the choices of one, or many after the same examples) go through the model once
/// for it, and then on with its keys and values; this changes answers by rounding only, and so does the batch.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `max_length` | the model's positions | tokens of input | from 1 to the model's positions |
/// | `batch` | 1 | rows in a forward pass | from 1 |
/// | `prefix` | BOS, else EOS | what stands before a text without context | below the vocabulary |
/// | `special_tokens` | as the tokenizer has it | whether a text gets the tokenizer's special tokens | |
pub struct ModelScorer<'a, M> {
    model: M,
    encoder: Encoder<'a>,
    max_length: usize,
    batch: usize,
    tokens: Cell<u64>,
}

impl<M> fmt::Debug for ModelScorer<'_, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelScorer")
            .field("max_length", &self.max_length)
            .field("batch", &self.batch)
            .finish_non_exhaustive()
    }
}

impl<'a, M: CausalLm> ModelScorer<'a, M> {
    /// A scorer with the default options. The model may be in training; no gradients are recorded.
    ///
    /// # Errors
    /// [`Error::Option`] for a classifier and a tokenizer without BOS and EOS, [`Error::Model`] for one that can't decode them.
    pub fn new(model: &M, tokenizer: &'a Tokenizer) -> Result<Self> {
        if model.labels().is_some() {
            return Err(Error::option("ModelScorer.model", "a language model", "a classifier"));
        }
        let special = tokenizer.special();
        let prefix = special.bos.or(special.eos.first().copied());
        let prefix =
            prefix.ok_or_else(|| Error::option("ModelScorer.prefix", "a BOS or EOS token", "none"))?;
        let encoder = Encoder::new(tokenizer, prefix, None)?;
        Ok(Self {
            model: model.valid(),
            encoder,
            max_length: model.max_positions(),
            batch: 1,
            tokens: Cell::new(0),
        })
    }

    /// Sets `max_length`.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn with_max_length(mut self, max_length: usize) -> Result<Self> {
        let limit = self.model.max_positions();
        if max_length == 0 || max_length > limit {
            let expected = format!("at least 1, at most {limit}, the model's limit");
            return Err(Error::option("ModelScorer.max_length", expected, max_length));
        }
        self.max_length = max_length;
        Ok(self)
    }

    /// Sets `batch`.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn with_batch(mut self, batch: usize) -> Result<Self> {
        if batch == 0 {
            return Err(Error::option("ModelScorer.batch", "at least 1", batch));
        }
        self.batch = batch;
        Ok(self)
    }

    /// Sets `prefix`.
    ///
    /// # Errors
    /// [`Error::Option`].
    pub fn with_prefix(mut self, prefix: u32) -> Result<Self> {
        let vocabulary = self.model.vocab_size();
        if prefix as usize >= vocabulary {
            let expected = format!("an id below {vocabulary}, the vocabulary");
            return Err(Error::option("ModelScorer.prefix", expected, prefix));
        }
        self.encoder = Encoder::new(self.encoder.tokenizer(), prefix, self.encoder.add_special())?;
        Ok(self)
    }

    /// Sets `special_tokens`.
    ///
    /// # Errors
    /// [`Error::Model`].
    pub fn with_special_tokens(mut self, special_tokens: bool) -> Result<Self> {
        self.encoder = Encoder::new(self.encoder.tokenizer(), self.encoder.prefix, Some(special_tokens))?;
        Ok(self)
    }

    /// Tokens of input at most.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The tokens of a pair as they go into the model, and those that are predicted at its last places.
    ///
    /// # Errors
    /// [`Error::Request`] for the request 0 if there are no tokens, or more than fit.
    pub fn tokenize_pair(&self, context: &str, continuation: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let mut row = self.row(0, context, continuation)?;
        let (_, targets) = row.wanted.remove(0);
        Ok((row.ids, targets))
    }

    fn row(&self, request: usize, context: &str, continuation: &str) -> Result<Row> {
        let problem =
            |problem: Problem| Error::request(request, &problem.field, problem.expected, problem.found);
        let (context, continuation) = self.encoder.encode_pair(context, continuation)?.map_err(problem)?;
        if continuation.len() > self.max_length {
            let expected = format!("at most {} tokens, the window", self.max_length);
            let found = format!("{} tokens", continuation.len());
            return Err(Error::request(request, "continuation", expected, found));
        }
        let vocabulary = self.model.vocab_size();
        if let Some(id) = context.iter().chain(&continuation).find(|&&id| id as usize >= vocabulary) {
            let expected = format!("token ids below {vocabulary}, the vocabulary");
            return Err(Error::request(request, "tokens", expected, id));
        }
        Ok(plan::row(request, context, continuation, self.max_length))
    }

    /// Scores the units of one batch.
    fn score(&self, units: &[Unit]) -> Result<BTreeMap<usize, (f64, bool)>> {
        let mut rows: Vec<(usize, &Row)> = Vec::new();
        for (index, unit) in units.iter().enumerate() {
            rows.extend(unit.rows.iter().map(|row| (index, row)));
        }
        let cache = if units[0].shared > 0 { Some(self.shared_cache(units)?) } else { None };
        let rest = |&(unit, row): &(usize, &Row)| row.ids.len() - units[unit].shared;
        rows.sort_by_key(|row| std::cmp::Reverse(rest(row)));
        let mut answers = BTreeMap::new();
        for rows in rows.chunks(self.batch) {
            let length = rest(&rows[0]);
            let mut tokens = TokenBatch {
                ids: Vec::with_capacity(rows.len() * length),
                positions: Vec::with_capacity(rows.len() * length),
                segments: Vec::with_capacity(rows.len() * length),
                batch: rows.len(),
                length,
            };
            for &(unit, row) in rows {
                let shared = units[unit].shared;
                let ids = &row.ids[shared..];
                let last = row.ids.len() - 1;
                for place in 0..length {
                    tokens.ids.push(ids.get(place).copied().unwrap_or(0));
                    tokens.positions.push((shared + place).min(last) as u32);
                    tokens.segments.push(u32::from(place < ids.len()));
                }
                self.count(ids.len());
            }
            let chosen: Vec<usize> = rows.iter().map(|(unit, _)| *unit).collect();
            let cache = cache.as_ref().map(|cache| cache.select_rows(&chosen));
            let rows: Vec<(usize, &Row)> = rows.iter().map(|row| (rest(row), row.1)).collect();
            self.read(&tokens, cache, &rows, &mut answers)?;
        }
        Ok(answers)
    }

    /// Keys and values of what the rows of each unit share, a row a unit.
    fn shared_cache(&self, units: &[Unit]) -> Result<KvCache> {
        let length = units.iter().map(|unit| unit.shared).max().unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for unit in units {
            // On the left, so that what follows is next to what it follows.
            let padding = length - unit.shared;
            ids.extend(
                std::iter::repeat_n(0, padding).chain(unit.rows[0].ids[..unit.shared].iter().copied()),
            );
            mask.extend(std::iter::repeat_n(0, padding).chain(std::iter::repeat_n(1, unit.shared)));
            self.count(unit.shared);
        }
        let tokens = TokenBatch::masked(ids, mask, units.len(), length)?;
        let mut cache = KvCache::new();
        let context = self.model.context(&tokens, Some(&cache))?;
        self.model.residual(&context, Some(&mut cache));
        Ok(cache)
    }

    /// One forward pass, and what the requests want of it; `rows` come with their lengths.
    fn read(
        &self,
        tokens: &TokenBatch,
        mut cache: Option<KvCache>,
        rows: &[(usize, &Row)],
        answers: &mut BTreeMap<usize, (f64, bool)>,
    ) -> Result<()> {
        let context = self.model.context(tokens, cache.as_ref())?;
        let x = self.model.residual(&context, cache.as_mut());
        let [batch, length, width] = x.dims();
        let x = x.reshape([batch * length, width]);
        let mut asked: BTreeMap<usize, Vec<(usize, u32)>> = BTreeMap::new();
        for (index, (end, row)) in rows.iter().enumerate() {
            for (request, targets) in &row.wanted {
                let first = index * length + end - targets.len();
                for (place, &target) in (first..).zip(targets) {
                    asked.entry(place).or_default().push((*request, target));
                }
            }
        }
        let asked: Vec<(usize, Vec<(usize, u32)>)> = asked.into_iter().collect();
        for asked in asked.chunks(LOGIT_ROWS) {
            let places = ints(asked.iter().map(|(place, _)| *place as i64).collect(), &x);
            let logits = self.model.lm_head(self.model.final_norm(x.clone().select(0, places)));
            self.look_up(logits.cast(FloatDType::F32), asked, answers)?;
        }
        Ok(())
    }

    fn look_up(
        &self,
        logits: Tensor<2>,
        asked: &[(usize, Vec<(usize, u32)>)],
        answers: &mut BTreeMap<usize, (f64, bool)>,
    ) -> Result<()> {
        let wanted = || {
            asked.iter().enumerate().flat_map(|(row, (_, wanted))| {
                wanted.iter().map(move |&(request, target)| (row, request, target))
            })
        };
        let best = ints_to_host("best", logits.clone().argmax(1)).map_err(kiln_models::Error::from)?;
        let targets = ints(wanted().map(|(_, _, target)| i64::from(target)).collect(), &logits);
        let logits = if asked.iter().all(|(_, wanted)| wanted.len() == 1) {
            logits
        } else {
            let rows = ints(wanted().map(|(row, _, _)| row as i64).collect(), &logits);
            logits.select(0, rows)
        };
        let nll = to_host("likelihoods", fused::cross_entropy(logits, targets));
        for ((row, request, target), nll) in wanted().zip(nll.map_err(kiln_models::Error::from)?) {
            if !nll.is_finite() {
                return Err(Error::request(request, "log-likelihood", "a finite number", -nll));
            }
            let answer = answers.entry(request).or_insert((0.0, true));
            answer.0 -= f64::from(nll);
            answer.1 &= best[row] == i64::from(target);
        }
        Ok(())
    }

    fn count(&self, tokens: usize) {
        self.tokens.set(self.tokens.get() + tokens as u64);
    }
}

fn ints<const D: usize>(values: Vec<i64>, beside: &Tensor<D>) -> Tensor<1, Int> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), &beside.device())
}

impl<M: CausalLm> Scorer for ModelScorer<'_, M> {
    fn loglikelihood(&self, requests: &[(String, String)], on_answer: OnAnswer) -> Result<()> {
        let rows = requests.iter().enumerate();
        let rows = rows.map(|(request, (context, continuation))| self.row(request, context, continuation));
        let units = plan::units(rows.collect::<Result<_>>()?, self.model.cache_limit());
        for units in plan::batches(units, self.batch) {
            for (request, (ll, greedy)) in self.score(&units)? {
                if on_answer(request, Response::Pair(ll, greedy))?.is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn loglikelihood_rolling(&self, requests: &[String], on_answer: OnAnswer) -> Result<()> {
        let protocol = RollingPerplexity::new(self.max_length, self.encoder.prefix).with_batch(self.batch);
        for (request, text) in requests.iter().enumerate() {
            let ids = self.encoder.encode(text)?;
            self.count(ids.len());
            let ll = if ids.is_empty() {
                0.0
            } else {
                let document = RollingDocument { ids, words: 1, bytes: 1 };
                let found = protocol.evaluate(&self.model, &[document]);
                let found = found.map_err(|error| match error {
                    Error::NotFinite { nll, .. } => {
                        Error::request(request, "log-likelihood", "a finite number", -nll)
                    }
                    Error::Data { what, expected, found } => Error::request(request, &what, expected, found),
                    other => other,
                })?;
                -found.token.nll * found.token.tokens as f64
            };
            if on_answer(request, Response::Rolling(ll))?.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn generate_until(&self, requests: &[GenerateRequest], on_answer: OnAnswer) -> Result<()> {
        for (index, request) in requests.iter().enumerate() {
            let (text, tokens) = generation::generate(&self.model, &self.encoder, self.max_length, request)?
                .map_err(|problem| Error::request(index, &problem.field, problem.expected, problem.found))?;
            self.count(tokens);
            if on_answer(index, Response::Text(text))?.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn settings(&self) -> serde_json::Value {
        serde_json::json!({
            "max_length": self.max_length,
            "prefix_token_id": self.encoder.prefix,
            "add_special_tokens": self.encoder.add_special(),
        })
    }

    fn tokens(&self) -> u64 {
        self.tokens.get()
    }
}
