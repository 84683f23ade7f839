//! Integration tests, in one binary.

#[cfg(feature = "mpi")]
mod mpi;
mod sums;
mod threads;

use std::{sync::Arc, thread, time::Duration};

use kiln_distributed::{Communicator, Thread, threads};

/// What each of `size` threads finds.
fn on_threads<T: Send>(size: usize, work: impl Fn(&dyn Communicator) -> T + Sync) -> Vec<T> {
    on_ranks(size, |ranks| work(&*ranks))
}

/// The same with ranks to keep.
fn on_ranks<T: Send>(size: usize, work: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let spawn = |rank: Thread| scope.spawn(move || work(Arc::new(rank)));
        let handles: Vec<_> = threads(size, Duration::from_secs(60)).into_iter().map(spawn).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank that ends well")).collect()
    })
}
