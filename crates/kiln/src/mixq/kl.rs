//! How far a quantized model's predictions are from the original's.

use std::fmt;

use burn::tensor::{FloatDType, Tensor, activation::log_softmax};
use kiln_models::{CausalLm, Context, Decoder, Windows};
use kiln_quant_core::{QuantLinear, to_host};

use super::{Error, Result};

/// What a measurement of [`LogitKl`] holds.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `batch_tokens` | 1024 | tokens of a forward pass, at least one window |
/// | `logit_rows` | 256 | rows of logits held at once |
/// | `cache_bytes` | 512 MiB | for the original's log-probabilities, and for residual streams of the plan before |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct KlOptions {
    /// Tokens of a forward pass.
    pub batch_tokens: usize,
    /// Rows of logits held at once.
    pub logit_rows: usize,
    /// Bytes that may be kept between measurements.
    pub cache_bytes: usize,
}

impl Default for KlOptions {
    fn default() -> Self {
        Self { batch_tokens: 1024, logit_rows: 256, cache_bytes: 512 << 20 }
    }
}

/// `KL(original || quantized)` of the next-token distributions in nats, the mean over all positions of some windows.
///
/// Two things make repeated measurements fast, neither of which changes a bit of a result: the original's
/// log-probabilities are made once (or, where the cache can't hold them, its last states, from which they are made
/// again chunk by chunk), and blocks below the first one that differs from the plan measured before are not run again.
pub struct LogitKl {
    batches: Vec<Batch>,
    options: KlOptions,
    keeps_streams: bool,
}

impl fmt::Debug for LogitKl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogitKl")
            .field("batches", &self.batches.len())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

struct Batch {
    context: Context,
    tokens: usize,
    embedded: Tensor<3>,
    teacher: Teacher,
    /// Output of every block for the plan measured last, with the block's schemes.
    trail: Vec<(String, Tensor<3>)>,
}

/// What is kept of the original.
enum Teacher {
    /// Log-probabilities `[tokens, vocabulary]`.
    LogProbabilities(Tensor<2>),
    /// The residual stream after the last block, `[tokens, width]`.
    States(Tensor<2>),
}

impl LogitKl {
    /// Runs the original on the windows.
    ///
    /// # Errors
    /// [`Error::is_argument`] for windows that don't fit the model.
    pub fn new(original: &Decoder<QuantLinear>, windows: &Windows, options: &KlOptions) -> Result<Self> {
        windows.check(original)?;
        let length = windows.length();
        let mut batches = Vec::new();
        for batch in windows.batches_of(options.batch_tokens / length) {
            let context = original.context(&batch, None)?;
            let embedded = original.embed(&context);
            let tokens = batch.ids.len();
            let last = flat(original.residual(&context, None));
            let (teacher, trail) = (Teacher::States(last), Vec::new());
            batches.push(Batch { context, tokens, embedded, teacher, trail });
        }
        let (tokens, width) = (windows.count() * length, batches[0].embedded.dims()[2]);
        let probabilities = tokens.saturating_mul(4 * original.vocab_size());
        let mut left = options.cache_bytes;
        let mut kl = Self { batches, options: *options, keeps_streams: false };
        if probabilities <= left {
            left -= probabilities;
            kl.keep_probabilities(original);
        }
        kl.keeps_streams = tokens.saturating_mul(4 * width * original.num_blocks()) <= left;
        Ok(kl)
    }

    /// Drops what is kept of the plan measured last: models to come differ from it in more than `blocks` tell.
    pub(super) fn forget(&mut self) {
        for batch in &mut self.batches {
            batch.trail.clear();
        }
    }

    fn keep_probabilities(&mut self, original: &Decoder<QuantLinear>) {
        for batch in &mut self.batches {
            if let Teacher::States(states) = &batch.teacher {
                let parts = chunks(batch.tokens, self.options.logit_rows).map(|(start, count)| {
                    log_probabilities(original, states.clone().narrow(0, start, count))
                });
                batch.teacher = Teacher::LogProbabilities(Tensor::cat(parts.collect(), 0));
            }
        }
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> u64 {
        self.batches.iter().map(|batch| batch.tokens as u64).sum()
    }

    /// What [`measure`](Self::measure) runs for `tokens` tokens: whole batches.
    pub fn rounded(&self, tokens: u64) -> u64 {
        let mut seen = 0;
        for batch in &self.batches {
            if seen >= tokens {
                break;
            }
            seen += batch.tokens as u64;
        }
        seen
    }

    /// The divergence of `quantized` on the first `tokens` tokens, rounded up to whole batches, and how many they were.
    ///
    /// `blocks` tells models apart: for each block a text that is another one where its weights are others. Embedding,
    /// norms and head must be the original's. `keep_going` hears of tokens and mean after each batch but the last, and
    /// may end the measurement.
    ///
    /// # Errors
    /// [`Error::is_argument`] for more tokens than there are, or a text too few or too many.
    pub fn measure<M: CausalLm>(
        &mut self,
        quantized: &M,
        blocks: &[String],
        tokens: u64,
        keep_going: &mut dyn FnMut(u64, f64) -> bool,
    ) -> Result<(f64, u64)> {
        if tokens == 0 || tokens > self.tokens() {
            let expected = format!("1 to {}, the windows' tokens", self.tokens());
            return Err(Error::argument("tokens", expected, tokens));
        }
        if blocks.len() != quantized.num_blocks() {
            let expected = format!("{}, one a block", quantized.num_blocks());
            return Err(Error::argument("blocks", expected, blocks.len()));
        }
        let (mut sum, mut seen) = (0.0, 0);
        for batch in &mut self.batches {
            let x = batch.forward(quantized, blocks, self.keeps_streams);
            sum += batch.divergence(quantized, x, self.options.logit_rows)?;
            seen += batch.tokens as u64;
            if seen >= tokens || !keep_going(seen, sum / seen as f64) {
                break;
            }
        }
        Ok(((sum / seen as f64).max(0.0), seen))
    }
}

impl Batch {
    /// The residual stream `[tokens, width]` after the last block.
    fn forward<M: CausalLm>(&mut self, model: &M, blocks: &[String], keep: bool) -> Tensor<2> {
        let same = self.trail.iter().zip(blocks).take_while(|((known, _), block)| known == *block).count();
        self.trail.truncate(same);
        let mut x = self.trail.last().map_or_else(|| self.embedded.clone(), |(_, x)| x.clone());
        for (index, block) in blocks.iter().enumerate().skip(same) {
            x = model.block(index, x, &self.context, None);
            if keep {
                self.trail.push((block.clone(), x.clone()));
            }
        }
        flat(x)
    }

    /// The sum over all positions.
    fn divergence<M: CausalLm>(&self, model: &M, x: Tensor<2>, logit_rows: usize) -> Result<f64> {
        let mut sum = 0.0;
        for (start, count) in chunks(self.tokens, logit_rows) {
            let reference = match &self.teacher {
                Teacher::LogProbabilities(values) => values.clone().narrow(0, start, count),
                Teacher::States(states) => log_probabilities(model, states.clone().narrow(0, start, count)),
            };
            let found = log_probabilities(model, x.clone().narrow(0, start, count));
            let rows = (reference.clone().exp() * (reference - found)).sum_dim(1);
            sum += to_host("divergences", rows)?.into_iter().map(f64::from).sum::<f64>();
        }
        Ok(sum)
    }
}

fn log_probabilities<M: CausalLm>(model: &M, rows: Tensor<2>) -> Tensor<2> {
    log_softmax(model.lm_head(model.final_norm(rows)).cast(FloatDType::F32), 1)
}

/// `[rows, length, width]` → `[tokens, width]`.
fn flat(x: Tensor<3>) -> Tensor<2> {
    let [rows, length, width] = x.dims();
    x.reshape([rows * length, width])
}

/// Starts and sizes of runs of at most `size`.
fn chunks(total: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    let size = size.max(1);
    (0..total).step_by(size).map(move |start| (start, size.min(total - start)))
}
