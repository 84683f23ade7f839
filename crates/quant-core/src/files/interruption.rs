//! Kills for tests: a thread that stops before a chosen operation on files, as a process does that is killed there.
//!
//! Whatever changes files in this crate's [`files`](super) announces every operation by `step`. Outside of tests that
//! does nothing.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

#[derive(Clone, Copy)]
enum State {
    /// Nothing is counted.
    Off,
    /// So many operations will be done.
    Counting(u64),
    Killed,
}

thread_local! {
    static STATE: Cell<State> = const { Cell::new(State::Off) };
}

/// What a killed thread unwinds with.
struct Kill;

/// Announces an operation on files.
pub(crate) fn step() {
    match STATE.get() {
        State::Off => {}
        State::Counting(0) => {
            STATE.set(State::Killed);
            resume_unwind(Box::new(Kill));
        }
        State::Counting(left) => STATE.set(State::Counting(left - 1)),
        // What is dropped on the way out asks `is_killed`; whatever else comes here was not stopped.
        State::Killed => unreachable!("an operation after a kill"),
    }
}

/// Whether this thread was killed: what is dropped must then leave all as it is.
pub(crate) fn is_killed() -> bool {
    matches!(STATE.get(), State::Killed)
}

/// Runs `f` and kills it before its operation number `operation` (0 is the first). `None` if it was killed.
///
/// # Panics
/// If `f` panics.
pub fn killed_at<T>(operation: u64, f: impl FnOnce() -> T) -> Option<T> {
    STATE.set(State::Counting(operation));
    let result = catch_unwind(AssertUnwindSafe(f));
    STATE.set(State::Off);
    match result {
        Ok(value) => Some(value),
        Err(payload) if payload.is::<Kill>() => None,
        Err(payload) => resume_unwind(payload),
    }
}
