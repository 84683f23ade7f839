//! A model that is only asked: the reference of a preference loss, the teacher of a distillation.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::Device;
use kiln_models::{CausalLm, Place, Teacher, TokenBatch, token_nll};
use kiln_quant_core::files::write_atomically;
use serde::{Deserialize, Serialize};

use crate::{Batch, Dataset, Error, Result, error::Problem, in_order, preference, trainable::fingerprint};

/// A model of whatever type that isn't trained.
pub(crate) trait Reference: Send {
    /// Log-probabilities of the batch's examples: sums over their learned targets.
    fn log_p(&self, batch: &Batch) -> Result<Vec<f64>>;

    /// Its logits of a batch.
    fn teacher(&self, tokens: &TokenBatch) -> Result<Teacher<'static>>;

    /// SHA-256 of all parameters.
    fn fingerprint(&self) -> Result<String>;

    /// The same on a device, with its own place in the run.
    fn fork_to(&self, device: &Device) -> Box<dyn Reference>;
}

impl<M: CausalLm> Reference for M {
    fn log_p(&self, batch: &Batch) -> Result<Vec<f64>> {
        log_p(self, batch)
    }

    fn teacher(&self, tokens: &TokenBatch) -> Result<Teacher<'static>> {
        quiet(self);
        Ok(Teacher::new(self, tokens)?)
    }

    fn fingerprint(&self) -> Result<String> {
        fingerprint(self, |_| true)
    }

    fn fork_to(&self, device: &Device) -> Box<dyn Reference> {
        Box::new(self.clone().fork(device))
    }
}

/// Without dropout. Clones of a model share their place with it, so whoever trains tells it again afterwards.
fn quiet<M: CausalLm>(model: &M) {
    model.at(Place { step: 0, micro_batch: 0, training: false });
}

/// Log-probabilities of the batch's examples, without dropout.
pub(crate) fn log_p<M: CausalLm>(model: &M, batch: &Batch) -> Result<Vec<f64>> {
    quiet(model);
    let nll = token_nll(model, &batch.tokens, batch.as_targets())?;
    let counts: Vec<usize> = batch.examples.iter().map(|placed| placed.targets).collect();
    Ok(preference::sums(&nll, &counts)?.into_iter().map(|nll| -nll).collect())
}

/// What the reference thinks of every example of a data set, on disk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cached {
    /// Of data and model, and what operands of its products were rounded to.
    fingerprints: BTreeMap<String, String>,
    log_p: Vec<f64>,
}

/// Log-probabilities of all examples, from the file `path` if it is of this data and this model; else computed, and written
/// there.
pub(crate) fn cached(
    reference: &dyn Reference,
    dataset: &Dataset,
    batch: usize,
    compute: &str,
    path: &Path,
) -> Result<Vec<f64>> {
    let fingerprints = BTreeMap::from([
        ("data".to_owned(), dataset.fingerprint()?),
        ("reference".to_owned(), reference.fingerprint()?),
        ("compute".to_owned(), compute.to_owned()),
    ]);
    match std::fs::read(path) {
        Ok(bytes) => {
            let not_cache =
                |error| Problem::new("file", "log-probabilities of a reference", error).in_file(path);
            let found: Cached = serde_json::from_slice(&bytes).map_err(not_cache)?;
            if found.fingerprints != fingerprints {
                let (expected, found) = (format!("{fingerprints:?}"), format!("{:?}", found.fingerprints));
                return Err(Problem::new("fingerprints", expected, found).in_file(path));
            }
            if found.log_p.len() != dataset.len() || found.log_p.iter().any(|log_p| !log_p.is_finite()) {
                let expected = format!("{} finite numbers", dataset.len());
                return Err(
                    Problem::new("log_p", expected, format!("{} numbers", found.log_p.len())).in_file(path)
                );
            }
            return Ok(found.log_p);
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io(path)(error)),
    }
    let mut log_p = Vec::with_capacity(dataset.len());
    for batch in in_order(dataset, batch, 0)? {
        log_p.extend(reference.log_p(&batch?)?);
    }
    let cached = Cached { fingerprints, log_p };
    let text = serde_json::to_vec(&cached)
        .map_err(|error| Problem::new("log_p", "finite numbers", error).in_file(path))?;
    write_atomically(path, |file| std::io::Write::write_all(file, &text))?;
    Ok(cached.log_p)
}
