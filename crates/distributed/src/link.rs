//! An engine that one thread talks to, asked from others with patience.

use std::{
    fmt,
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use crate::{Error, Result};

/// What came from each rank.
pub(crate) type Answer = Result<Vec<Vec<u8>>>;

/// The way to the thread that talks to the engine.
pub(crate) struct Link<C> {
    rank: usize,
    size: usize,
    patience: Duration,
    ends: Mutex<Ends<C>>,
}

struct Ends<C> {
    commands: Sender<C>,
    answers: Receiver<Answer>,
    /// Whether an operation has failed, after which nothing can be relied on.
    failed: bool,
}

impl<C> Link<C> {
    /// To a thread that answers each of `commands` in `answers`, as rank `rank` of `size`.
    pub(crate) fn new(
        [rank, size]: [usize; 2],
        patience: Duration,
        commands: Sender<C>,
        answers: Receiver<Answer>,
    ) -> Self {
        Self { rank, size, patience, ends: Mutex::new(Ends { commands, answers, failed: false }) }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// The answer, or an error if there is none in time.
    pub(crate) fn ask(&self, command: C) -> Answer {
        let mut ends = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let started = Instant::now();
        if ends.failed || ends.commands.send(command).is_err() {
            ends.failed = true;
            return Err(self.lost(started.elapsed()));
        }
        match ends.answers.recv_timeout(self.patience) {
            Ok(answer) => {
                ends.failed |= answer.is_err();
                answer
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                ends.failed = true;
                Err(self.lost(started.elapsed()))
            }
        }
    }

    /// Fails if an operation has.
    #[cfg(feature = "nccl")]
    pub(crate) fn check(&self) -> Result<()> {
        match self.ends.lock().unwrap_or_else(PoisonError::into_inner).failed {
            true => Err(self.lost(Duration::ZERO)),
            false => Ok(()),
        }
    }

    fn lost(&self, waited: Duration) -> Error {
        Error::Lost { rank: self.rank, size: self.size, lost: None, waited }
    }

    /// Whether an operation has failed.
    #[cfg(feature = "mpi")]
    pub(crate) fn has_failed(&mut self) -> bool {
        self.ends.get_mut().is_ok_and(|ends| ends.failed)
    }
}

impl<C> fmt::Debug for Link<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rank, size, patience, .. } = self;
        f.debug_struct("Link")
            .field("rank", rank)
            .field("size", size)
            .field("patience", patience)
            .finish_non_exhaustive()
    }
}
