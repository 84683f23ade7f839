//! Further ranks of a run in threads of one process.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use burn::tensor::Device;
use kiln_distributed::{Communicator, threads};
use kiln_models::CausalLm;
use kiln_quant_core::DeviceLimits;

use crate::{
    Error, Result, Trainer,
    ranks::{Ranks, check_accumulate},
};

/// As good as for ever: a thread that ends is noticed.
const PATIENCE: Duration = Duration::from_secs(u32::MAX as u64);

/// A group of ranks that this one has left.
#[derive(Debug)]
struct Left {
    rank: usize,
    size: usize,
}

impl Communicator for Left {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn all_to_all(&self, _: Vec<Vec<u8>>) -> kiln_distributed::Result<Vec<Vec<u8>>> {
        let Self { rank, size } = *self;
        Err(kiln_distributed::Error::Lost { rank, size, lost: Some(rank), waited: Duration::ZERO })
    }
}

impl<M: CausalLm> Trainer<M> {
    /// Shares the work, as [`with_ranks`](Self::with_ranks) says, with a replica of the model on each of `devices`, in threads
    /// of this process; the trainer's own model stays where it is. One device may be named several times.
    ///
    /// To be called after the other `with_` methods, and before [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// Micro-batches that can't be dealt out evenly, a device that isn't there, a model on several devices, and a run that is
    /// shared already.
    pub fn with_devices(mut self, devices: &[Device]) -> Result<Self> {
        self.check_unshared("devices")?;
        self.model().check_one_device("replicas on further devices")?;
        devices.iter().try_for_each(DeviceLimits::check_there)?;
        let size = devices.len() + 1;
        check_accumulate(self.config.accumulate, size)?;
        let mut ranks = threads(size, PATIENCE).into_iter().map(|rank| Arc::new(rank) as Ranks);
        if let Some(own) = ranks.next() {
            self.ranks = own;
        }
        self.replicas =
            devices.iter().zip(ranks).map(|(device, ranks)| self.replica(device, ranks)).collect();
        Ok(self)
    }

    /// The same with its model on `device`, as another rank.
    fn replica(&self, device: &Device, ranks: Ranks) -> Self {
        let reference = self.reference.as_ref().map(|reference| reference.fork_to(device));
        Self {
            model: Some(self.model().clone().fork(&device.clone().autodiff())),
            optimizers: self.optimizers.clone(),
            own_optimizer: self.own_optimizer.clone(),
            config: self.config.clone(),
            schedule: self.schedule,
            reference,
            known_answers: self.known_answers.clone(),
            batches: self.batches.clone(),
            dataset: self.dataset.clone(),
            step: self.step,
            skipped: self.skipped,
            best: self.best.clone(),
            identity: self.identity.clone(),
            frozen: OnceLock::new(),
            reference_hash: OnceLock::new(),
            checkpoint: self.checkpoint.clone(),
            ranks,
            replicas: Vec::new(),
        }
    }

    /// Does `own` here and `theirs` on every replica at the same time; the result is the one from here.
    pub(crate) fn together<T: Send>(
        &mut self,
        own: impl FnOnce(&mut Self) -> Result<T>,
        theirs: impl Fn(&mut Self) -> Result<T> + Sync,
    ) -> Result<T> {
        if self.replicas.is_empty() {
            return own(self);
        }
        let mut replicas = std::mem::take(&mut self.replicas);
        let theirs = &theirs;
        let (own, others) = thread::scope(|scope| {
            let start = |replica| {
                let work = move || Self::guarded(replica, theirs);
                thread::Builder::new().spawn_scoped(scope, work)
            };
            let handles: std::io::Result<Vec<_>> = replicas.iter_mut().map(start).collect();
            match handles {
                Ok(handles) => {
                    let own = self.guarded(own);
                    (own, handles.into_iter().map(|handle| handle.join().and_then(|found| found)).collect())
                }
                // Those that began end with the group.
                Err(error) => {
                    self.leave();
                    (Ok(Err(Error::io("a thread for a rank")(error))), Vec::new())
                }
            }
        });
        self.replicas = replicas;
        let mut found = own.unwrap_or_else(|panic| resume_unwind(panic));
        for other in others {
            let other = other.unwrap_or_else(|panic| resume_unwind(panic));
            // What was only heard of a failure is less than the failure itself.
            if matches!(found, Ok(_) | Err(Error::Ranks(_)))
                && let Err(error) = other
            {
                found = Err(error);
            }
        }
        found
    }

    /// Leaves the group: the others don't wait for this rank any longer, and it does nothing alone.
    fn leave(&mut self) {
        self.ranks = Arc::new(Left { rank: self.ranks.rank(), size: self.ranks.size() });
    }

    /// What `work` finds; if it panics, the others don't wait for this rank any longer.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> thread::Result<Result<T>> {
        let found = catch_unwind(AssertUnwindSafe(|| work(self)));
        if found.is_err() {
            self.leave();
        }
        found
    }
}
