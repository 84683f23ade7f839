//! Ranks that are threads of one process.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::{Communicator, Error, Result, communicator::check_parts};

/// A rank that is a thread; made by [`threads`].
///
/// Dropping one that others still wait for makes them fail, so that a rank that ends in an error or a panic ends all.
#[derive(Debug)]
pub struct Thread {
    rank: usize,
    group: Arc<Group>,
    /// Operations that this rank has begun; `None` after a failure.
    rounds: Mutex<Option<u64>>,
    patience: Duration,
}

#[derive(Debug)]
struct Group {
    state: Mutex<State>,
    changed: Condvar,
    size: usize,
}

#[derive(Debug)]
struct State {
    gone: Vec<bool>,
    rounds: BTreeMap<u64, Round>,
}

/// An operation that not all ranks have taken their parts of.
#[derive(Debug)]
struct Round {
    /// By sender, then by receiver.
    sent: Vec<Option<Vec<Vec<u8>>>>,
    taken: usize,
}

/// `size` ranks, to be moved to a thread each. A rank that doesn't answer within `patience` is given up.
///
/// ```
/// use std::{thread, time::Duration};
/// use kiln_distributed::{Communicator, threads};
///
/// thread::scope(|scope| {
///     for rank in threads(3, Duration::from_secs(60)) {
///         scope.spawn(move || {
///             let all = rank.all_gather(vec![rank.rank() as u8]).unwrap();
///             assert_eq!(all, [[0], [1], [2]]);
///         });
///     }
/// });
/// ```
pub fn threads(size: usize, patience: Duration) -> Vec<Thread> {
    let state = State { gone: vec![false; size], rounds: BTreeMap::new() };
    let group = Arc::new(Group { state: Mutex::new(state), changed: Condvar::new(), size });
    (0..size)
        .map(|rank| Thread { rank, group: group.clone(), rounds: Mutex::new(Some(0)), patience })
        .collect()
}

impl Group {
    /// A thread that panicked elsewhere has left the state as it should be: it changes by single statements.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self, rank: usize) {
        self.lock().gone[rank] = true;
        self.changed.notify_all();
    }

    fn exchange(
        &self,
        rank: usize,
        number: u64,
        parts: Vec<Vec<u8>>,
        patience: Duration,
    ) -> Result<Vec<Vec<u8>>> {
        let started = Instant::now();
        let lost = |lost| Err(Error::Lost { rank, size: self.size, lost, waited: started.elapsed() });
        let mut state = self.lock();
        let empty = || Round { sent: vec![None; self.size], taken: 0 };
        state.rounds.entry(number).or_insert_with(empty).sent[rank] = Some(parts);
        self.changed.notify_all();
        loop {
            let State { gone, rounds } = &mut *state;
            let Some(round) = rounds.get_mut(&number) else { return lost(None) };
            let Some(missing) = round.sent.iter().position(Option::is_none) else { break };
            if let Some(index) = (0..self.size).find(|&index| round.sent[index].is_none() && gone[index]) {
                return lost(Some(index));
            }
            let Some(rest) = patience.checked_sub(started.elapsed()) else { return lost(Some(missing)) };
            state = self.changed.wait_timeout(state, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        let Some(round) = state.rounds.get_mut(&number) else { return lost(None) };
        let of_sender =
            |sent: &mut Option<Vec<Vec<u8>>>| sent.as_mut().map(|parts| std::mem::take(&mut parts[rank]));
        let found = round.sent.iter_mut().map(|sent| of_sender(sent).unwrap_or_default()).collect();
        round.taken += 1;
        if round.taken == self.size {
            state.rounds.remove(&number);
        }
        Ok(found)
    }
}

impl Communicator for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.group.size
    }

    fn all_to_all(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        check_parts(parts.len(), self.size())?;
        let mut rounds = self.rounds.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(number) = *rounds else {
            let (rank, size) = (self.rank, self.size());
            return Err(Error::Lost { rank, size, lost: None, waited: Duration::ZERO });
        };
        let found = self.group.exchange(self.rank, number, parts, self.patience);
        *rounds = found.is_ok().then_some(number + 1);
        if found.is_err() {
            self.group.leave(self.rank);
        }
        found
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.group.leave(self.rank);
    }
}
