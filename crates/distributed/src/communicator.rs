//! What ranks can say to one another.

use std::{collections::BTreeMap, fmt};

use crate::{Error, Result};

/// Bytes of a broadcast that are sent at once.
const AT_ONCE: usize = 1 << 28;

/// One rank's side of a group of ranks that run the same program: threads of a process ([`threads`](crate::threads)), or
/// processes of MPI (`Mpi`, feature `mpi`); on cards, `Nccl` (feature `nccl`) over either.
///
/// Every operation is collective: all ranks call the same ones in the same order, and each returns when it has what it
/// asked for. Ranks count from 0. After an error the group is of no more use: every further call fails at once.
pub trait Communicator: Send + Sync + fmt::Debug {
    /// Which rank this is.
    fn rank(&self) -> usize;

    /// How many ranks there are.
    fn size(&self) -> usize;

    /// Sends `parts[r]` to rank r; returns what each rank sent here, by its number.
    ///
    /// # Errors
    /// [`Error::Lost`] if a rank has ended or doesn't answer in time; [`Error::Argument`] for another number of parts than
    /// ranks, or for more bytes at once than the engine takes.
    fn all_to_all(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>>;

    /// Sends `bytes` to all; returns what each rank sent, by its number.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.all_to_all(vec![bytes; self.size()])
    }

    /// What rank 0 gives; the bytes of others are ignored.
    ///
    /// # Errors
    /// As [`all_to_all`](Self::all_to_all).
    fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>> {
        let is_root = self.rank() == 0;
        let length = if is_root { bytes.len() as u64 } else { 0 };
        let lengths = self.all_gather(length.to_le_bytes().to_vec())?;
        let length = <[u8; 8]>::try_from(&lengths[0][..]).map_or(0, u64::from_le_bytes);
        if length <= AT_ONCE as u64 {
            let found = self.all_gather(if is_root { bytes } else { Vec::new() })?;
            return Ok(found.into_iter().next().unwrap_or_default());
        }
        let mut whole = Vec::new();
        for index in 0..length.div_ceil(AT_ONCE as u64) as usize {
            let part = bytes.chunks(AT_ONCE).nth(index).filter(|_| is_root).unwrap_or_default();
            whole.extend(self.all_gather(part.to_vec())?.swap_remove(0));
        }
        Ok(whole)
    }

    /// Sends to all what a part of the work came to here, or why it failed; fails on all ranks if it failed on any.
    ///
    /// # Errors
    /// [`Error::Failed`] of the first rank that failed, itself included; as [`all_to_all`](Self::all_to_all).
    fn gather_results(&self, own: std::result::Result<Vec<u8>, String>) -> Result<Vec<Vec<u8>>> {
        const FAILED: u8 = 1;
        let (mut message, status) = own.map_or_else(|error| (error.into_bytes(), FAILED), |bytes| (bytes, 0));
        message.push(status);
        let mut all = self.all_gather(message)?;
        for (rank, message) in all.iter_mut().enumerate() {
            if message.pop() == Some(FAILED) {
                return Err(Error::Failed { rank, message: String::from_utf8_lossy(message).into_owned() });
            }
        }
        Ok(all)
    }

    /// Says how a part of the work went here, and hears of the others: fails on all ranks if it failed on any.
    ///
    /// # Errors
    /// As [`gather_results`](Self::gather_results).
    fn agree(&self, own: std::result::Result<(), String>) -> Result<()> {
        self.gather_results(own.map(|()| Vec::new())).map(|_| ())
    }

    /// Fails on all ranks unless all have the same facts.
    ///
    /// # Errors
    /// [`Error::Different`] naming the first rank and fact that differ; as [`all_to_all`](Self::all_to_all).
    fn same(&self, facts: &BTreeMap<String, String>) -> Result<()> {
        let text = facts.iter().flat_map(|(name, value)| [name, value]);
        let text = text.map(|text| text.replace(SEPARATOR, " ")).collect::<Vec<_>>().join(SEPARATOR);
        let all = self.all_gather(text.into_bytes())?;
        let all: Vec<BTreeMap<String, String>> = all.iter().map(|bytes| parsed(bytes)).collect();
        for (rank, found) in all.iter().enumerate() {
            for name in all[0].keys().chain(found.keys()) {
                let text =
                    |of: &BTreeMap<String, String>| of.get(name).map_or("nothing", |text| text).to_owned();
                let (expected, found) = (text(&all[0]), text(found));
                if expected != found {
                    return Err(Error::Different { rank, name: name.clone(), expected, found });
                }
            }
        }
        Ok(())
    }
}

/// What is done here, and what all ranks say of it in `bytes`, by rank; fails on all ranks if it failed on any.
///
/// # Errors
/// As [`agreed`].
pub fn gathered<T, E: fmt::Display + From<Error>>(
    ranks: &dyn Communicator,
    own: std::result::Result<T, E>,
    bytes: impl FnOnce(&T) -> Vec<u8>,
) -> std::result::Result<(T, Vec<Vec<u8>>), E> {
    let all = ranks.gather_results(own.as_ref().map(bytes).map_err(ToString::to_string));
    // What failed here is told as it is, not as the others heard of it.
    Ok((own?, all?))
}

/// What is done here, if it was done well on all ranks: to be used wherever one rank may fail alone, that the others don't wait
/// for it in vain.
///
/// # Errors
/// The rank's own; else [`Error::Failed`] of the first that failed, or as [`Communicator::all_to_all`].
pub fn agreed<T, E: fmt::Display + From<Error>>(
    ranks: &dyn Communicator,
    own: std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    Ok(gathered(ranks, own, |_| Vec::new())?.0)
}

/// The only rank there is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Communicator for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn all_to_all(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        check_parts(parts.len(), 1)?;
        Ok(parts)
    }
}

/// Whether there is a part for each rank.
pub(crate) fn check_parts(found: usize, size: usize) -> Result<()> {
    if found == size {
        return Ok(());
    }
    Err(Error::Argument {
        name: "parts".into(),
        expected: format!("one for each of {size} ranks"),
        found: found.to_string(),
    })
}

/// Between names and values of facts.
const SEPARATOR: &str = "\u{1f}";

fn parsed(bytes: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(bytes);
    let parts: Vec<&str> = text.split(SEPARATOR).collect();
    parts.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect()
}

/// The numbers of things that are dealt to a rank: consecutive ones, as evenly as they go.
///
/// ```
/// assert_eq!(kiln_distributed::share(7, 1, 3), 2..4);
/// ```
///
/// # Panics
/// If there are no ranks, or `rank` isn't one of them.
pub fn share(count: usize, rank: usize, size: usize) -> std::ops::Range<usize> {
    assert!(rank < size, "rank {rank} of {size}");
    let start = |rank: usize| (rank as u128 * count as u128 / size as u128) as usize;
    start(rank)..start(rank + 1)
}
