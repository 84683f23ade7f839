//! Work of some microseconds on several threads, without waiting for one that hasn't woken up.

use std::{
    hint::spin_loop,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread::yield_now,
};

/// Set once nobody may begin any more.
const CLOSED: usize = 1 << (usize::BITS - 1);
/// Set once a helper panicked.
const PANICKED: usize = CLOSED >> 1;
/// How often a thread looks before it lets others run.
const SPINS: usize = 1000;

/// What helpers hold beyond the call.
struct Door {
    /// How many helpers are inside, and the flags.
    state: AtomicUsize,
    /// The caller's work: valid while the door isn't closed, or somebody is inside.
    work: *const (dyn Fn() + Sync),
}

// SAFETY: `work` is `Sync`, and only called as said there.
unsafe impl Send for Door {}
// SAFETY: as above.
unsafe impl Sync for Door {}

impl Door {
    fn help(&self) {
        let enter = |state: usize| (state & CLOSED == 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: this thread is inside, so the caller waits.
        let work = unsafe { &*self.work };
        if catch_unwind(AssertUnwindSafe(work)).is_err() {
            self.state.fetch_or(PANICKED, Ordering::Relaxed);
        }
        self.state.fetch_sub(1, Ordering::Release);
    }

    /// Lets nobody in any more and waits for those inside; whether one panicked.
    fn close(&self) -> bool {
        let mut state = self.state.fetch_or(CLOSED, Ordering::Acquire);
        for spins in 0.. {
            if state & !(CLOSED | PANICKED) == 0 {
                break;
            }
            if spins < SPINS {
                spin_loop()
            } else {
                yield_now()
            }
            state = self.state.load(Ordering::Acquire);
        }
        state & PANICKED != 0
    }
}

/// Closes the door also where the caller's own part panics.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Runs `f` on `0..size` in parts of `step`, on this thread and on those of the pool that come in time.
///
/// # Panics
/// If `f` does, after all have ended.
pub(super) fn share(size: usize, step: usize, f: impl Fn((usize, usize)) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || {
        loop {
            let start = next.fetch_add(step, Ordering::Relaxed);
            if start >= size {
                break;
            }
            f((start, size.min(start + step)));
        }
    };
    let helpers = (rayon::current_num_threads() - 1).min(size.div_ceil(step).saturating_sub(1));
    if helpers == 0 {
        return work();
    }
    let work: &(dyn Fn() + Sync) = &work;
    // SAFETY: the lifetime alone is erased: `close` returns before `work` ends, and after it nobody calls it.
    let erased =
        unsafe { std::mem::transmute::<*const (dyn Fn() + Sync + '_), *const (dyn Fn() + Sync)>(work) };
    let door = Arc::new(Door { state: AtomicUsize::new(0), work: erased });
    let closing = Closing(&door);
    for _ in 0..helpers {
        let door = Arc::clone(&door);
        rayon::spawn(move || door.help());
    }
    work();
    assert!(!closing.0.close(), "a part of a product panicked");
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    fn pool(threads: usize) -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn every_part_is_done_once() {
        for threads in [1, 2, 5] {
            pool(threads).install(|| {
                for (size, step) in [(0, 3), (1, 1), (7, 3), (9, 3), (64, 1), (1000, 7)] {
                    for _ in 0..50 {
                        let done: Vec<AtomicUsize> = (0..size).map(|_| AtomicUsize::new(0)).collect();
                        share(size, step, |(start, end)| {
                            assert!(start % step == 0 && end - start <= step);
                            for count in &done[start..end] {
                                count.fetch_add(1, Ordering::Relaxed);
                            }
                        });
                        assert!(
                            done.iter().all(|count| count.load(Ordering::Relaxed) == 1),
                            "{size} by {step}"
                        );
                    }
                }
            });
        }
    }

    #[test]
    fn threads_that_are_busy_are_not_waited_for() {
        let pool = pool(2);
        let (release, blocked) = channel::<()>();
        let (started, begun) = channel();
        pool.spawn(move || {
            started.send(()).unwrap();
            blocked.recv().unwrap();
        });
        begun.recv().unwrap();
        // The other thread of the pool calls; its helper can't begin before the first is released.
        pool.install(|| {
            let count = AtomicUsize::new(0);
            share(10, 1, |_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 10);
        });
        release.send(()).unwrap();
    }

    #[test]
    fn panics_of_any_part_arrive() {
        for panicking in [0, 1, 63] {
            let result = catch_unwind(|| {
                pool(3).install(|| share(64, 1, |(part, _)| assert_ne!(part, panicking)));
            });
            assert!(result.is_err(), "part {panicking}");
        }
    }

    /// Two parts that begin together, so that a helper has one; `f` is told whether it is the caller's.
    fn beside_a_helper(f: impl Fn(bool) + Sync + std::panic::UnwindSafe + std::panic::RefUnwindSafe) -> bool {
        let result = catch_unwind(|| {
            pool(2).install(|| {
                let (caller, both) = (std::thread::current().id(), std::sync::Barrier::new(2));
                share(2, 1, |_| {
                    both.wait();
                    f(std::thread::current().id() == caller);
                });
            });
        });
        result.is_err()
    }

    #[test]
    fn a_helper_that_panics_is_told_of() {
        assert!(beside_a_helper(|caller| assert!(caller)));
        assert!(!beside_a_helper(|_| {}));
    }

    #[test]
    fn a_caller_that_panics_waits_for_the_helper() {
        let done = AtomicUsize::new(0);
        assert!(beside_a_helper(|caller| {
            assert!(!caller);
            std::thread::sleep(std::time::Duration::from_millis(50));
            done.fetch_add(1, Ordering::Relaxed);
        }));
        assert_eq!(done.into_inner(), 1);
    }
}
