//! What a step launches: how many kernels, and which take the time.

use std::{
    collections::HashMap,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use cubecl::{
    config::{TypeNameFormatLevel, type_name_format},
    logging::{LaunchObservation, LaunchObserver, ProfileDuration, TimingMethod, TimingRequest},
};

/// Lines of the table.
const ROWS: usize = 14;

#[derive(Default)]
struct Counter {
    launches: Mutex<usize>,
}

impl LaunchObserver for Counter {
    fn launched(&self, _: &'static str) {
        *self.launches.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }
}

/// Kernels that `f` launches.
pub(crate) fn count<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let counter = Arc::new(Counter::default());
    let watching = LaunchObservation::new(counter.clone());
    let result = f();
    drop(watching);
    let launches = *counter.launches.lock().unwrap_or_else(PoisonError::into_inner);
    (result, launches)
}

#[derive(Default)]
struct Profiler {
    measured: Mutex<Vec<(&'static str, ProfileDuration)>>,
    read: Mutex<Vec<(&'static str, Duration)>>,
}

impl LaunchObserver for Profiler {
    fn launched(&self, _: &'static str) {}

    fn timing(&self) -> TimingRequest {
        TimingRequest::Deferred
    }

    fn profiled(&self, kernel: &'static str, profile: ProfileDuration) {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner).push((kernel, profile));
    }

    fn timed(&self, kernel: &'static str, duration: Duration, _: TimingMethod) {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).push((kernel, duration));
    }
}

/// Waits for a future that needs no reactor.
fn wait<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::yield_now(),
        }
    }
}

/// Runs `f` and prints which kernels took the device's time.
pub(crate) fn profile<T>(f: impl FnOnce() -> T) -> T {
    let profiler = Arc::new(Profiler::default());
    let watching = LaunchObservation::new(profiler.clone());
    let result = f();
    drop(watching);
    let mut total: HashMap<String, (usize, f64)> = HashMap::new();
    let mut add = |kernel: &str, duration: Duration| {
        let entry = total.entry(type_name_format(kernel, TypeNameFormatLevel::Balanced)).or_default();
        *entry = (entry.0 + 1, entry.1 + duration.as_secs_f64());
    };
    let measured = std::mem::take(&mut *profiler.measured.lock().unwrap_or_else(PoisonError::into_inner));
    for (kernel, profile) in measured {
        if let Some(ticks) = wait(profile.resolve()) {
            add(kernel, ticks.duration());
        }
    }
    for (kernel, duration) in profiler.read.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        add(kernel, duration);
    }
    let all: f64 = total.values().map(|(_, seconds)| seconds).sum();
    let mut rows: Vec<_> = total.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    println!("  kernels of a step, {:.1} ms together:", all * 1e3);
    for (kernel, (launches, seconds)) in rows.into_iter().take(ROWS) {
        let kernel: String = kernel.chars().take(70).collect();
        println!("    {:8.2} ms {launches:6} launches  {kernel}", seconds * 1e3);
    }
    result
}
