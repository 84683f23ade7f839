//! What the ranks of a run tell one another.

use std::{collections::BTreeMap, sync::Arc};

use kiln_distributed::{Communicator, agreed};

use crate::{Error, Result, error::Problem};

/// This process's place among the ranks of a run.
pub(crate) type Ranks = Arc<dyn Communicator>;

/// What is done here, and what all ranks say of it in `numbers`, by rank. If it failed on any of them, it fails on all.
pub(crate) fn gathered<T>(
    ranks: &dyn Communicator,
    own: Result<T>,
    numbers: impl FnOnce(&T) -> Vec<f64>,
) -> Result<(T, Vec<Vec<f64>>)> {
    let to_bytes = |found: &T| numbers(found).into_iter().flat_map(f64::to_le_bytes).collect();
    let (own, all) = kiln_distributed::gathered(ranks, own, to_bytes)?;
    let to_numbers = |bytes: Vec<u8>| bytes.chunks_exact(8).map(number).collect();
    Ok((own, all.into_iter().map(to_numbers).collect()))
}

fn number(bytes: &[u8]) -> f64 {
    <[u8; 8]>::try_from(bytes).map_or(f64::NAN, f64::from_le_bytes)
}

/// What is done by rank 0 alone; the others wait for it, and fail if it fails.
pub(crate) fn by_first<T>(ranks: &dyn Communicator, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    agreed(ranks, if ranks.rank() == 0 { work().map(Some) } else { Ok(None) })
}

/// Numbers of things that were dealt out in turn, each `width` of them, in the things' order.
pub(crate) fn in_turn(found: &[Vec<f64>], width: usize) -> impl Iterator<Item = &[f64]> {
    let rounds = found.iter().map(|numbers| numbers.len() / width).max().unwrap_or(0);
    let of_round =
        move |round: usize| found.iter().filter_map(move |numbers| numbers.chunks_exact(width).nth(round));
    (0..rounds).flat_map(of_round)
}

/// Checks that a step's micro-batches can be dealt out evenly.
pub(crate) fn check_accumulate(accumulate: usize, size: usize) -> Result<()> {
    if accumulate.is_multiple_of(size) {
        return Ok(());
    }
    let expected = format!("a multiple of {size}, the number of ranks");
    Err(Problem::new("accumulate", expected, accumulate).argument())
}

/// Fails on all ranks if one has other facts; a rank that has none to give fails with its own error.
pub(crate) fn same(ranks: &dyn Communicator, facts: Result<BTreeMap<String, String>>) -> Result<()> {
    let facts = agreed(ranks, facts)?;
    ranks.same(&facts).map_err(Error::from)
}
