//! Negative log-likelihoods of given tokens, without a graph and without all logits at once.

use burn::tensor::{FloatDType, Int, Tensor, TensorData};
use kiln_quant_core::{fused, to_host};

use crate::{CausalLm, Error, Result, Targets, TokenBatch};

/// Rows of logits held at once.
const ROWS: usize = 64;

/// Negative log-likelihoods, in nats, of the scored targets, in their order.
///
/// Logits are made 64 rows at a time, of scored places only, and compared in f32. No gradient is recorded, whether
/// or not `model` is being trained.
///
/// ```no_run
/// use burn::tensor::Device;
/// use kiln_models::{Checkpoint, LoadOptions, Targets, TokenBatch, token_nll};
/// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf")?;
/// let (model, _) = checkpoint.load(&LoadOptions::default(), &Device::flex())?;
/// // How surprising are 338 after 28 and 216 after 338?
/// let tokens = TokenBatch::new(&[vec![28, 338, 216]])?;
/// let targets = Targets { ids: &[338, 216, 0], scored: &[true, true, false] };
/// assert_eq!(token_nll(&model, &tokens, targets)?.len(), 2);
/// # Ok::<(), kiln_models::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] if targets don't fit the batch, an id is not in the vocabulary, or a position is beyond the
/// model's limit.
pub fn token_nll<M: CausalLm>(model: &M, tokens: &TokenBatch, targets: Targets) -> Result<Vec<f32>> {
    check_tokens(model, tokens)?;
    let places = scored_places(model, tokens, targets)?;
    if places.is_empty() {
        return Ok(Vec::new());
    }
    let model = model.valid();
    let x = model.residual(&model.context(tokens, None)?, None);
    let [batch, length, width] = x.dims();
    of_places(&model, &x.reshape([batch * length, width]), &places, targets.ids)
}

/// What the head gives at the scored places, in their order: of a [`Classifier`](crate::Classifier) the scores of labels. No
/// gradient is recorded.
///
/// # Errors
/// As [`token_nll`], and flags that don't fit the batch.
pub fn scores_at<M: CausalLm>(model: &M, tokens: &TokenBatch, scored: &[bool]) -> Result<Vec<Vec<f32>>> {
    check_tokens(model, tokens)?;
    let count = tokens.ids.len();
    if scored.len() != count {
        let (name, expected) = ("targets".into(), format!("a flag for each of {count} tokens"));
        return Err(Error::Argument { name, expected, found: scored.len().to_string() });
    }
    let places: Vec<usize> = (0..count).filter(|&place| scored[place]).collect();
    let model = model.valid();
    let x = model.residual(&model.context(tokens, None)?, None);
    let [batch, length, width] = x.dims();
    let rows = x.reshape([batch * length, width]);
    let mut found = Vec::with_capacity(places.len());
    for places in places.chunks(ROWS) {
        let index: Vec<i64> = places.iter().map(|&place| place as i64).collect();
        let index = Tensor::<1, Int>::from_data(TensorData::new(index, [places.len()]), &rows.device());
        let scores = model.lm_head(model.final_norm(rows.clone().select(0, index)));
        let outputs = scores.dims()[1];
        let values = to_host("scores", scores.cast(FloatDType::F32))?;
        found.extend(values.chunks_exact(outputs).map(<[f32]>::to_vec));
    }
    Ok(found)
}

/// Negative log-likelihoods at `places` of `rows` `[batch * length, width]` of the residual stream, by a model outside
/// autodiff.
pub(crate) fn of_places<M: CausalLm>(
    model: &M,
    rows: &Tensor<2>,
    places: &[usize],
    targets: &[u32],
) -> Result<Vec<f32>> {
    let device = rows.device();
    let ints = |values: Vec<i64>| {
        let count = values.len();
        Tensor::<1, Int>::from_data(TensorData::new(values, [count]), &device)
    };
    let mut nll = Vec::with_capacity(places.len());
    for (number, places) in places.chunks(ROWS).enumerate() {
        model.at_row(number * ROWS);
        let index = ints(places.iter().map(|&place| place as i64).collect());
        let ids = ints(places.iter().map(|&place| i64::from(targets[place])).collect());
        let logits = model.lm_head(model.final_norm(rows.clone().select(0, index)));
        nll.extend(to_host("likelihoods", fused::cross_entropy(logits.cast(FloatDType::F32), ids))?);
    }
    Ok(nll)
}

/// Indices of the scored places, once ids and flags are known to fit.
fn scored_places<M: CausalLm>(model: &M, tokens: &TokenBatch, targets: Targets) -> Result<Vec<usize>> {
    let count = tokens.ids.len();
    if targets.ids.len() != count || targets.scored.len() != count {
        return Err(Error::Argument {
            name: "targets".into(),
            expected: format!("one id and flag for each of {count} tokens"),
            found: format!("{} ids and {} flags", targets.ids.len(), targets.scored.len()),
        });
    }
    let places: Vec<usize> = (0..count).filter(|&place| targets.scored[place]).collect();
    let outputs = model.labels().unwrap_or(model.vocab_size());
    check_ids("target ids", outputs, places.iter().map(|&place| targets.ids[place]))?;
    Ok(places)
}

/// Fails where a model would look beyond its tables.
pub(crate) fn check_tokens<M: CausalLm>(model: &M, tokens: &TokenBatch) -> Result<()> {
    check_ids("token ids", model.vocab_size(), tokens.ids.iter().copied())?;
    let limit = model.max_positions();
    match tokens.positions.iter().find(|&&position| position as usize >= limit) {
        Some(position) => Err(Error::Argument {
            name: "positions".into(),
            expected: format!("positions below {limit}, the model's limit"),
            found: position.to_string(),
        }),
        None => Ok(()),
    }
}

fn check_ids(name: &str, limit: usize, mut ids: impl Iterator<Item = u32>) -> Result<()> {
    match ids.find(|&id| id as usize >= limit) {
        Some(id) => Err(Error::Argument {
            name: name.into(),
            expected: format!("ids below {limit}"),
            found: id.to_string(),
        }),
        None => Ok(()),
    }
}
