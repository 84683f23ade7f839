//! Further ranks of a run in threads of one process.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use burn::tensor::Device;
use kiln_distributed::{Alone, threads};
use kiln_models::CausalLm;

use crate::{Result, Trainer, error::Problem, ranks::check_accumulate};

/// As long as a rank may be alone at work, such as writing a checkpoint.
const PATIENCE: Duration = Duration::from_secs(3600);

impl<M: CausalLm> Trainer<M> {
    /// Shares the work, as [`with_ranks`](Self::with_ranks) says, with a replica of the model on each of `devices`, in threads
    /// of this process; the trainer's own model stays where it is. One device may be named several times.
    ///
    /// To be called after the other `with_` methods, and before [`resumed`](Self::resumed).
    ///
    /// # Errors
    /// Micro-batches that can't be dealt out evenly, and a run that is shared already.
    pub fn with_devices(mut self, devices: &[Device]) -> Result<Self> {
        if self.ranks.size() > 1 {
            let expected = "a run that isn't shared yet: a rank for each device";
            return Err(Problem::new("devices", expected, format!("{} ranks", self.ranks.size())).argument());
        }
        let size = devices.len() + 1;
        check_accumulate(self.config.accumulate, size)?;
        let mut ranks = threads(size, PATIENCE).into_iter().map(Arc::new);
        if let Some(own) = ranks.next() {
            self.ranks = own;
        }
        self.replicas = devices
            .iter()
            .zip(ranks)
            .map(|(device, ranks)| Trainer { ranks, ..self.replica(device) })
            .collect();
        Ok(self)
    }

    /// The same with its model on `device`.
    fn replica(&self, device: &Device) -> Self {
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
            ranks: Arc::new(Alone),
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
            let handles: Vec<_> =
                replicas.iter_mut().map(|replica| scope.spawn(move || replica.guarded(theirs))).collect();
            let own = self.guarded(own);
            let others = handles.into_iter().map(|handle| handle.join().and_then(|found| found));
            (own, others.collect::<Vec<_>>())
        });
        self.replicas = replicas;
        let own = own.unwrap_or_else(|panic| resume_unwind(panic))?;
        for other in others {
            other.unwrap_or_else(|panic| resume_unwind(panic))?;
        }
        Ok(own)
    }

    /// What `work` finds; if it panics, the others don't wait for this rank any longer.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> thread::Result<Result<T>> {
        let found = catch_unwind(AssertUnwindSafe(|| work(self)));
        if found.is_err() {
            self.ranks = Arc::new(Alone);
        }
        found
    }
}
