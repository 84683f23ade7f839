//! Ranks that are threads.

use std::{sync::Arc, thread, time::Duration};

use kiln_distributed::{Communicator, Thread, threads};

/// What each of `size` ranks finds, by number.
///
/// # Panics
/// If one does.
pub fn on_ranks<T: Send>(size: usize, work: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let spawn = |rank: Thread| scope.spawn(move || work(Arc::new(rank)));
        let handles: Vec<_> = threads(size, Duration::from_secs(300)).into_iter().map(spawn).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank that ends well")).collect()
    })
}
