//! How long a piece of work may take: by the clock, and, on a busy machine, by what the thread itself has worked.

use std::time::{Duration, Instant};

/// A limit of time.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    /// When to look again.
    until: Instant,
    /// What the thread had worked in all when the clock said that time was up for the first time.
    worked: Option<Duration>,
}

impl Patience {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, until: Instant::now() + limit, worked: None }
    }

    /// Whether time is up. Where the system tells what a thread has worked, a thread that had to wait for others gets as much
    /// work again as it had time.
    pub(crate) fn is_over(&mut self) -> bool {
        let now = Instant::now();
        if now <= self.until {
            return false;
        }
        let Some(total) = worked() else { return true };
        let since = total.saturating_sub(*self.worked.get_or_insert(total));
        // It can't have worked longer than the clock went.
        self.until = now + self.limit.saturating_sub(since);
        since >= self.limit
    }
}

/// What this thread has worked since it began.
fn worked() -> Option<Duration> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(30);

    #[test]
    fn a_thread_that_works_on_comes_to_an_end() {
        let (start, mut patience) = (Instant::now(), Patience::new(LIMIT));
        while !patience.is_over() {
            assert!(start.elapsed() < 100 * LIMIT, "it doesn't end");
        }
        assert!(start.elapsed() >= LIMIT);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_thread_that_waits_has_time() {
        let mut patience = Patience::new(LIMIT);
        for _ in 0..5 {
            std::thread::sleep(LIMIT);
            assert!(!patience.is_over(), "it has worked next to nothing");
        }
    }
}
