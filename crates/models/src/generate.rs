//! Text generation: one pass over the prompt, then one token at a time with cached keys and values.

use std::ops::ControlFlow;

use kiln_quant_core::to_host;

use crate::{CausalLm, Error, KvCache, Result, TokenBatch, nll::check_tokens, sampling::Sampler};

/// How to generate.
///
/// | option | default | meaning | range |
/// | --- | --- | --- | --- |
/// | `max_new_tokens` | – | tokens to generate at most | from 1; with the prompt within the model's positions |
/// | `temperature` | 0 | divisor of the logits; 0 takes the most likely token | finite, from 0 |
/// | `top_k` | none | draw among the k most likely tokens (and ties with the k-th) | from 1 |
/// | `top_p` | none | draw among the fewest tokens whose probabilities reach p | above 0, to 1 |
/// | `min_p` | none | draw among the tokens at least p times as likely as the most likely one | above 0, to 1 |
/// | `repetition_penalty` | 1 | what positive logits of tokens that occurred, in prompt or text, are divided by, and negative ones multiplied (Keskar et al. 2019) | above 0 |
/// | `seed` | 0 | of the draws | any |
/// | `stop` | none | ids that end the text | any |
/// | `stop_texts` | none | texts that end the text, for those who decode it (`kiln::Base`); [`generate`] looks at ids only | not empty |
///
/// Penalty, temperature, top-k, top-p and min-p apply in this order, as in transformers; at temperature 0 the last three and
/// the seed change nothing. The same options and logits give the same tokens.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Divisor of the logits; 0 takes the most likely token.
    pub temperature: f64,
    /// Tokens to draw among.
    pub top_k: Option<usize>,
    /// Probability to draw among.
    pub top_p: Option<f64>,
    /// Share of the largest probability to draw among.
    pub min_p: Option<f64>,
    /// What logits of tokens that occurred are divided by.
    pub repetition_penalty: f64,
    /// Texts that end the text.
    pub stop_texts: Vec<String>,
    /// Seed of the draws.
    pub seed: u64,
    /// Ids that end the text, as [`SpecialTokens::eos`](crate::config::SpecialTokens::eos).
    pub stop: Vec<u32>,
}

impl GenerateOptions {
    /// The most likely token each time, `max_new_tokens` times.
    pub fn new(max_new_tokens: usize) -> Self {
        Self {
            max_new_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
            stop_texts: Vec::new(),
            seed: 0,
            stop: Vec::new(),
        }
    }

    /// Sets `temperature`.
    #[must_use]
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets `top_k`.
    #[must_use]
    pub fn with_top_k(mut self, top_k: usize) -> Self {
        self.top_k = Some(top_k);
        self
    }

    /// Sets `top_p`.
    #[must_use]
    pub fn with_top_p(mut self, top_p: f64) -> Self {
        self.top_p = Some(top_p);
        self
    }

    /// Sets `min_p`.
    #[must_use]
    pub fn with_min_p(mut self, min_p: f64) -> Self {
        self.min_p = Some(min_p);
        self
    }

    /// Sets `repetition_penalty`.
    #[must_use]
    pub fn with_repetition_penalty(mut self, repetition_penalty: f64) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Sets `stop_texts`.
    #[must_use]
    pub fn with_stop_texts<T: Into<String>>(mut self, stop_texts: impl IntoIterator<Item = T>) -> Self {
        self.stop_texts = stop_texts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets `seed`.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets `stop`.
    #[must_use]
    pub fn with_stop(mut self, stop: impl Into<Vec<u32>>) -> Self {
        self.stop = stop.into();
        self
    }

    fn check(&self) -> Result<()> {
        let fail = |option: &str, expected: &str, found: String| {
            Err(Error::Argument {
                name: format!("GenerateOptions.{option}"),
                expected: expected.into(),
                found,
            })
        };
        if self.max_new_tokens == 0 {
            return fail("max_new_tokens", "at least 1", "0".into());
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return fail("temperature", "a finite number, not negative", self.temperature.to_string());
        }
        if self.top_k == Some(0) {
            return fail("top_k", "at least 1", "0".into());
        }
        for (name, p) in [("top_p", self.top_p), ("min_p", self.min_p)] {
            if let Some(p) = p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
                return fail(name, "above 0, at most 1", p.to_string());
            }
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return fail(
                "repetition_penalty",
                "a finite number above 0",
                self.repetition_penalty.to_string(),
            );
        }
        match self.stop_texts.iter().any(String::is_empty) {
            true => fail("stop_texts", "texts that aren't empty", "an empty one".into()),
            false => Ok(()),
        }
    }
}

/// The most likely token each time, at most so many times.
impl From<usize> for GenerateOptions {
    fn from(max_new_tokens: usize) -> Self {
        Self::new(max_new_tokens)
    }
}

/// What was generated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, without the prompt; a stop token is the last of them.
    pub ids: Vec<u32>,
    /// Why there are no more.
    pub finish: Finish,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Finish {
    /// There are `max_new_tokens`.
    Length,
    /// The last token is one of `stop`.
    Stop,
    /// `on_token` said so.
    Cancelled,
}

/// Continues `prompt_ids`.
///
/// Works on a model that is being trained, and records no gradients.
///
/// ```no_run
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, GenerateOptions, LoadOptions, generate};
/// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// let options = GenerateOptions::new(64)
///     .with_temperature(0.8)
///     .with_top_p(0.95)
///     .with_stop(checkpoint.special_tokens().eos.clone());
/// let generation = generate(&model, &[504, 3575, 282], &options)?;
/// println!("{} tokens, {:?}", generation.ids.len(), generation.finish);
/// # Ok::<(), kiln_models::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] for an option out of range, an empty prompt, ids beyond the vocabulary, more tokens than the
/// model has positions, or a model whose logits are not numbers.
pub fn generate<M: CausalLm>(model: &M, prompt_ids: &[u32], options: &GenerateOptions) -> Result<Generation> {
    generate_with(model, prompt_ids, options, &mut |_| ControlFlow::Continue(()))
}

/// As [`generate`]; every new token, a stop token too, goes to `on_token` at once, which may end the text.
///
/// # Errors
/// As [`generate`].
pub fn generate_with<M: CausalLm>(
    model: &M,
    prompt_ids: &[u32],
    options: &GenerateOptions,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generation> {
    options.check()?;
    check_prompt(model, prompt_ids, options)?;
    let model = model.valid();
    let (mut cache, mut sampler) = (KvCache::new(), Sampler::new(options, prompt_ids));
    let (mut ids, mut fresh) = (Vec::new(), prompt_ids.to_vec());
    loop {
        let limit = model.cache_limit().unwrap_or(usize::MAX);
        if cache.length() > 0 && cache.length() <= limit && cache.length() + fresh.len() > limit {
            // Begun again, as transformers does.
            cache = KvCache::new();
            fresh = [prompt_ids, ids.as_slice()].concat();
        }
        let logits = next_logits(&model, fresh, &mut cache)?;
        let id = sampler.choose(&logits)?;
        ids.push(id);
        let flow = on_token(id);
        match finish(options, id, ids.len(), flow) {
            Some(finish) => return Ok(Generation { ids, finish }),
            None => fresh = vec![id],
        }
    }
}

/// Whether the text ends with `id`, its token number `count`.
fn finish(options: &GenerateOptions, id: u32, count: usize, flow: ControlFlow<()>) -> Option<Finish> {
    if options.stop.contains(&id) {
        Some(Finish::Stop)
    } else if flow.is_break() {
        Some(Finish::Cancelled)
    } else {
        (count == options.max_new_tokens).then_some(Finish::Length)
    }
}

/// Continues several prompts at once: each as [`generate`] continues it alone, to rounding, in one pass for each token of all
/// of them. Row `i` draws with `seed + i`. A text that has ended costs nothing further.
///
/// # Errors
/// As [`generate`], of any prompt; models whose keys serve short texts only ([`CausalLm::cache_limit`]) take texts up to that
/// length.
pub fn generate_batch<M: CausalLm, P: AsRef<[u32]>>(
    model: &M,
    prompts: &[P],
    options: &GenerateOptions,
) -> Result<Vec<Generation>> {
    options.check()?;
    for prompt in prompts {
        check_prompt(model, prompt.as_ref(), options)?;
    }
    let Some(longest) = prompts.iter().map(|prompt| prompt.as_ref().len()).max() else {
        return Ok(Vec::new());
    };
    let needed = longest + options.max_new_tokens;
    if let Some(limit) = model.cache_limit().filter(|limit| needed > *limit) {
        return Err(Error::Argument {
            name: "GenerateOptions.max_new_tokens".into(),
            expected: format!(
                "texts of at most {limit} tokens in a batch, which the cache of this model serves"
            ),
            found: format!("{needed} tokens"),
        });
    }
    let model = model.valid();
    let mut cache = KvCache::new();
    let mut samplers: Vec<Sampler> = prompts
        .iter()
        .zip(0..)
        .map(|(prompt, row)| {
            let seed = options.seed.wrapping_add(row);
            Sampler::new(&GenerateOptions { seed, ..options.clone() }, prompt.as_ref())
        })
        .collect();
    let mut found: Vec<Generation> =
        prompts.iter().map(|_| Generation { ids: Vec::new(), finish: Finish::Length }).collect();
    // The rows that go on, and what comes next: at first whole prompts, padded on the left.
    let mut rows: Vec<usize> = (0..prompts.len()).collect();
    let padded = prompts.iter().map(|prompt| {
        let prompt = prompt.as_ref();
        let padding = longest - prompt.len();
        (vec![0; padding], vec![0; padding], prompt)
    });
    let (mut ids, mut mask) = (Vec::new(), Vec::new());
    for (zeros, unseen, prompt) in padded {
        ids.extend(zeros.into_iter().chain(prompt.iter().copied()));
        mask.extend(unseen.into_iter().chain(std::iter::repeat_n(1, prompt.len())));
    }
    let mut tokens = TokenBatch::masked(ids, mask, prompts.len(), longest)?;
    loop {
        let context = model.context(&tokens, Some(&cache))?;
        let x = model.residual(&context, Some(&mut cache));
        let last = x.narrow(1, tokens.length - 1, 1);
        let logits = to_host("logits", model.lm_head(model.final_norm(last)))?;
        let mut going_on = Vec::new();
        for (place, logits) in logits.chunks_exact(model.vocab_size()).enumerate() {
            let row = rows[place];
            let id = samplers[row].choose(logits)?;
            found[row].ids.push(id);
            match finish(options, id, found[row].ids.len(), ControlFlow::Continue(())) {
                Some(finish) => found[row].finish = finish,
                None => going_on.push(place),
            }
        }
        if going_on.is_empty() {
            return Ok(found);
        }
        if going_on.len() < rows.len() {
            cache = cache.select_rows(&going_on);
            rows = going_on.iter().map(|place| rows[*place]).collect();
        }
        let next = |row: &usize| {
            (
                found[*row].ids[found[*row].ids.len() - 1],
                prompts[*row].as_ref().len() + found[*row].ids.len() - 1,
            )
        };
        let (ids, positions): (Vec<u32>, Vec<u32>) =
            rows.iter().map(next).map(|(id, position)| (id, position as u32)).unzip();
        let batch = rows.len();
        tokens = TokenBatch { ids, positions, segments: vec![1; batch], batch, length: 1 };
    }
}

/// Logits after the last of `ids`, which follow what is in the cache.
fn next_logits<M: CausalLm>(model: &M, ids: Vec<u32>, cache: &mut KvCache) -> Result<Vec<f32>> {
    let tokens = TokenBatch::continuing(ids, cache.length() as u32);
    let context = model.context(&tokens, Some(&*cache))?;
    let x = model.residual(&context, Some(cache));
    // No other row's logits are needed.
    let last = x.narrow(1, tokens.length - 1, 1);
    Ok(to_host("logits", model.lm_head(model.final_norm(last)))?)
}

fn check_prompt<M: CausalLm>(model: &M, prompt_ids: &[u32], options: &GenerateOptions) -> Result<()> {
    let fail =
        |expected: String, found: String| Err(Error::Argument { name: "prompt_ids".into(), expected, found });
    if model.labels().is_some() {
        let expected = "a language model: a classifier says nothing".into();
        return Err(Error::Argument { name: "model".into(), expected, found: "a classifier".into() });
    }
    if prompt_ids.is_empty() {
        return fail("at least one token".into(), "none".into());
    }
    let (limit, new) = (model.max_positions(), options.max_new_tokens);
    if prompt_ids.len() >= limit {
        return fail(
            format!("fewer than {limit} tokens, the model's limit"),
            format!("{} tokens", prompt_ids.len()),
        );
    }
    let room = limit - prompt_ids.len();
    if new > room {
        return Err(Error::Argument {
            name: "GenerateOptions.max_new_tokens".into(),
            expected: format!(
                "at most {room}: the model has {limit} positions, the prompt {} tokens",
                prompt_ids.len()
            ),
            found: new.to_string(),
        });
    }
    check_tokens(model, &TokenBatch::continuing(prompt_ids.to_vec(), 0))
}
