//! A model that is only asked: the reference of a preference loss, the teacher of a distillation.

use std::{collections::BTreeMap, path::Path};

use burn::tensor::Device;
use kiln_distributed::{Communicator, agreed};
use kiln_models::{CausalLm, Place, Teacher, TokenBatch, token_nll};
use kiln_quant_core::{files::write_atomically, fingerprint};
use serde::{Deserialize, Serialize};

use crate::{
    Batch, Dataset, Error, Result,
    error::Problem,
    in_order, preference,
    ranks::{by_first, gathered},
};

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
        Ok(fingerprint(self, |_| true)?)
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

/// Log-probabilities of all examples, from rank 0's file `path` if it is of this data and this model; else computed, each batch
/// by one of the ranks, and written there.
pub(crate) fn cached(
    ranks: &dyn Communicator,
    reference: &dyn Reference,
    dataset: &Dataset,
    batch: usize,
    compute: &str,
    path: &Path,
) -> Result<Vec<f64>> {
    let fingerprints = || -> Result<BTreeMap<String, String>> {
        Ok(BTreeMap::from([
            ("data".to_owned(), dataset.fingerprint()?),
            ("reference".to_owned(), reference.fingerprint()?),
            ("compute".to_owned(), compute.to_owned()),
        ]))
    };
    let fingerprints = agreed(ranks, fingerprints())?;
    ranks.same(&fingerprints)?;
    let found = by_first(ranks, || read(path, &fingerprints, dataset.len()))?.flatten();
    let (_, found) = gathered(ranks, Ok(found.unwrap_or_default()), Vec::clone)?;
    if let Some(found) = found.into_iter().next().filter(|found| !found.is_empty()) {
        return Ok(found);
    }
    let own = || {
        let mine = in_order(dataset, batch, 0)?.skip(ranks.rank()).step_by(ranks.size());
        let answers = mine.map(|batch| reference.log_p(&batch?)).collect::<Result<Vec<_>>>()?;
        Ok(answers.concat())
    };
    let (_, all) = gathered(ranks, own(), Vec::clone)?;
    let mut rest: Vec<&[f64]> = all.iter().map(Vec::as_slice).collect();
    let mut log_p = Vec::with_capacity(dataset.len());
    let units = dataset.units();
    for (number, start) in (0..units).step_by(batch).enumerate() {
        let examples = dataset.unit(start).start..dataset.unit((start + batch).min(units) - 1).end;
        let of_rank = &mut rest[number % ranks.size()];
        let (of_batch, later) = of_rank.split_at(examples.len().min(of_rank.len()));
        log_p.extend_from_slice(of_batch);
        *of_rank = later;
    }
    by_first(ranks, || write(path, &Cached { fingerprints, log_p: log_p.clone() }))?;
    Ok(log_p)
}

/// The numbers of a file; none where there is no file.
fn read(path: &Path, fingerprints: &BTreeMap<String, String>, examples: usize) -> Result<Option<Vec<f64>>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path)(error)),
    };
    let not_cache = |error| Problem::new("file", "log-probabilities of a reference", error).in_file(path);
    let found: Cached = serde_json::from_slice(&bytes).map_err(not_cache)?;
    if found.fingerprints != *fingerprints {
        let (expected, found) = (format!("{fingerprints:?}"), format!("{:?}", found.fingerprints));
        return Err(Problem::new("fingerprints", expected, found).in_file(path));
    }
    if found.log_p.len() != examples || found.log_p.iter().any(|log_p| !log_p.is_finite()) {
        let expected = format!("{examples} finite numbers");
        return Err(Problem::new("log_p", expected, format!("{} numbers", found.log_p.len())).in_file(path));
    }
    Ok(Some(found.log_p))
}

fn write(path: &Path, cached: &Cached) -> Result<()> {
    let text = serde_json::to_vec(cached)
        .map_err(|error| Problem::new("log_p", "finite numbers", error).in_file(path))?;
    Ok(write_atomically(path, |file| std::io::Write::write_all(file, &text))?)
}
