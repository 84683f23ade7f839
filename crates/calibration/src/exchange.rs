//! What ranks send one another during a calibration: solved projections, streams, a finished block's file.

use std::{fs, path::Path, time::Instant};

use kiln_distributed::{Communicator, Shares, agreed, gathered};
use tempfile::TempDir;

use crate::{
    Error, Result,
    block::Block,
    checkpoint::SavedSlots,
    station::Slot,
    stream::{Store, Stream},
};

impl Block<'_> {
    /// Solves projections that don't depend on one another, each by one of the ranks; all get all, with the time that each
    /// took where it was solved.
    pub(crate) fn dealt(
        &mut self,
        projections: &[usize],
        mut solve: impl FnMut(&mut Self, usize) -> Result<Slot>,
    ) -> Result<Vec<(Slot, f64)>> {
        let (rank, size) = (self.shares.ranks().rank(), self.shares.ranks().size());
        let mut solved = Vec::with_capacity(projections.len());
        for round in projections.chunks(size) {
            let own = round.get(rank).map(|&projection| -> Result<(Slot, f64)> {
                let start = Instant::now();
                let slot = solve(self, projection)?;
                self.tell_solved(projection)?;
                Ok((slot, start.elapsed().as_secs_f64()))
            });
            if size == 1 {
                solved.extend(own.transpose()?);
                continue;
            }
            let own = own.transpose().and_then(|own| match own {
                Some((slot, seconds)) => {
                    let mut bytes = seconds.to_le_bytes().to_vec();
                    bytes.extend(self.sent(round[rank], &slot)?);
                    Ok((Some((slot, seconds)), bytes))
                }
                None => Ok((None, Vec::new())),
            });
            let ((mut own, _), all) = gathered(self.shares.ranks(), own, |(_, bytes)| bytes.clone())?;
            let theirs = round.iter().zip(&all).enumerate().map(|(of, (&projection, bytes))| {
                match own.take_if(|_| of == rank) {
                    Some(own) => Ok(own),
                    None => self.received(projection, bytes),
                }
            });
            let found = theirs.collect::<Result<Vec<_>>>();
            solved.extend(agreed(self.shares.ranks(), found)?);
        }
        Ok(solved)
    }

    /// A slot as a file's bytes.
    fn sent(&self, projection: usize, slot: &Slot) -> Result<Vec<u8>> {
        let folder = temporary_folder(&self.store)?;
        let path = folder.path().join("slot.safetensors");
        SavedSlots::save(&path, [(self.places[projection].path.as_str(), slot)], &[], Default::default())?;
        fs::read(&path).map_err(Error::io(path))
    }

    /// The slot of a projection, and the time that it took, as another rank sent them.
    fn received(&self, projection: usize, bytes: &[u8]) -> Result<(Slot, f64)> {
        let place = &self.places[projection];
        let wrong =
            |found: String| Error::argument(&place.path, "a solved projection of another rank", found);
        let Some((seconds, bytes)) = bytes.split_first_chunk() else {
            return Err(wrong(format!("{} bytes", bytes.len())));
        };
        let folder = temporary_folder(&self.store)?;
        let path = folder.path().join("slot.safetensors");
        fs::write(&path, bytes).map_err(Error::io(&path))?;
        let slot = SavedSlots::open(&path)?.slot(place, &self.device)?;
        Ok((slot, f64::from_le_bytes(*seconds)))
    }
}

/// A stream of all windows at rank 0, in place of each rank's own; none at the others.
pub(crate) fn collected(shares: &Shares, own: &Stream, store: &Store) -> Result<Option<Stream>> {
    let ranks = shares.ranks();
    let all = if ranks.rank() == 0 { Stream::new(store, own.shape()).map(Some) } else { Ok(None) };
    let mut all = agreed(ranks, all)?;
    for window in 0..shares.count() {
        let mine = shares.own();
        let bytes = if mine.contains(&window) { own.bytes(window - mine.start) } else { Ok(Vec::new()) };
        let mut parts = vec![Vec::new(); ranks.size()];
        parts[0] = agreed(ranks, bytes)?;
        let found = ranks.all_to_all(parts)?.concat();
        agreed(ranks, all.as_mut().map_or(Ok(()), |all| all.set_bytes(window, &found)))?;
    }
    Ok(all)
}

/// Each rank's own windows of a stream that rank 0 has.
pub(crate) fn dealt_out(
    shares: &Shares,
    all: Option<&Stream>,
    shape: [usize; 2],
    store: &Store,
) -> Result<Stream> {
    let ranks = shares.ranks();
    let mut own = agreed(ranks, Stream::new(store, shape))?;
    for window in 0..shares.count() {
        let part = |rank: usize| match all.filter(|_| shares.of(rank).contains(&window)) {
            Some(all) => all.bytes(window),
            None => Ok(Vec::new()),
        };
        let parts = (0..ranks.size()).map(part).collect::<Result<Vec<_>>>();
        let found = ranks.all_to_all(agreed(ranks, parts)?)?.concat();
        let mine = shares.own();
        let set = if mine.contains(&window) { own.set_bytes(window - mine.start, &found) } else { Ok(()) };
        agreed(ranks, set)?;
    }
    Ok(own)
}

/// A file of rank 0's, under the same name in a folder of its own; none at rank 0 itself.
pub(crate) fn from_first(
    ranks: &dyn Communicator,
    path: Option<&Path>,
    name: &str,
    store: &Store,
) -> Result<Option<TempDir>> {
    if ranks.size() == 1 {
        return Ok(None);
    }
    let read = path.map_or(Ok(Vec::new()), |path| fs::read(path).map_err(Error::io(path)));
    let bytes = ranks.broadcast(agreed(ranks, read)?)?;
    let copy = || -> Result<Option<TempDir>> {
        if path.is_some() {
            return Ok(None);
        }
        let folder = temporary_folder(store)?;
        let path = folder.path().join(name);
        fs::write(&path, bytes).map_err(Error::io(path))?;
        Ok(Some(folder))
    };
    agreed(ranks, copy())
}

/// A folder beside spilled streams, where there are any.
fn temporary_folder(store: &Store) -> Result<TempDir> {
    match store {
        Store::Memory => tempfile::tempdir().map_err(Error::io("a temporary folder")),
        Store::Folder(folder) => tempfile::tempdir_in(folder).map_err(Error::io(folder)),
    }
}
