//! Measurements in a process of their own: a test runs the binary it is in again, with its own name, and a task to do.
//!
//! ```ignore
//! #[test]
//! fn loading_holds_one_tensor() {
//!     if let Some(path) = task() {
//!         load(&path);
//!         return report(&[peak()]);
//!     }
//!     assert!(peak_of("memory::loading_holds_one_tensor", "small.safetensors") < 1e6);
//! }
//! ```

use std::process::Command;

/// Set in the other process.
const TASK: &str = "KILN_TEST_TASK";
/// What stands before the figures on the line that the other process prints.
const FIGURES: &str = "FIGURES";

/// The task that this process was started for; `None` in the one that the tests run in.
pub fn task() -> Option<String> {
    std::env::var(TASK).ok()
}

/// Tells the figures to the process that [`figures_of`] was called in.
pub fn report(figures: &[f64]) {
    let figures: Vec<String> = figures.iter().map(f64::to_string).collect();
    println!("{FIGURES} {}", figures.join(" "));
}

/// Runs `test` of this binary, named with its modules, in a process with two threads, and returns what it [`report`]s.
///
/// # Panics
/// If it reports nothing.
pub fn figures_of(test: &str, task: &str) -> Vec<f64> {
    let output = Command::new(std::env::current_exe().expect("this binary's path"))
        .args(["--exact", test, "--nocapture", "--test-threads", "1"])
        .env(TASK, task)
        // A pool's threads hold buffers of their own.
        .env("RAYON_NUM_THREADS", "2")
        // glibc else gives each thread a heap of its own, and which thread frees what first moves peaks by 40 MB from
        // run to run.
        .env("MALLOC_ARENA_MAX", "1")
        .output()
        .expect("this binary runs");
    let [printed, errors] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    // The test runner may have printed the test's name on the same line.
    let line = printed.lines().find_map(|line| line.split(FIGURES).nth(1));
    let figures = line.map(|line| line.split_whitespace().map(str::parse).collect::<Result<Vec<f64>, _>>());
    match figures {
        Some(Ok(figures)) => figures,
        _ => panic!("{test} reports no figures of {task:?}: {printed}{errors}"),
    }
}

/// The one figure of [`figures_of`], bytes by custom.
///
/// # Panics
/// If it reports none.
pub fn peak_of(test: &str, task: &str) -> f64 {
    figures_of(test, task)[0]
}

/// The largest resident size of this process so far, in bytes.
///
/// # Panics
/// If the system isn't Linux.
pub fn peak() -> f64 {
    status("VmHWM:")
}

/// The resident size of this process, in bytes.
///
/// # Panics
/// If the system isn't Linux.
pub fn resident() -> f64 {
    status("VmRSS:")
}

fn status(key: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux's /proc");
    let line = status.lines().find(|line| line.starts_with(key)).expect("a line of memory");
    let kilobytes = line.split_whitespace().nth(1).and_then(|number| number.parse::<f64>().ok());
    kilobytes.expect("a number of kilobytes") * 1024.0
}
