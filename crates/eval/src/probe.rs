//! What a piece of work costs: time, memory, tokens, and energy where the machine tells.

use std::{
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, peak_rss_bytes};

/// What a piece of work cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Wall-clock time.
    pub seconds: f64,
    /// The largest resident size of the process so far, whatever it did before; `None` where the system doesn't tell.
    pub peak_rss_bytes: Option<u64>,
    /// Tokens.
    pub tokens: u64,
    /// Tokens in a second.
    pub tokens_per_second: f64,
    /// Energy of all processor packages, other programs' included; `None` where the system doesn't tell.
    pub energy_joules: Option<f64>,
}

/// Measures from its making to [`finish`](Self::finish).
///
/// ```
/// let probe = kiln_eval::Probe::start();
/// let usage = probe.finish(0);
/// assert!(usage.seconds >= 0.0);
/// ```
#[derive(Debug)]
pub struct Probe {
    start: Instant,
    energy: Vec<Counter>,
}

/// An energy counter of Linux's powercap interface.
#[derive(Debug, Clone, PartialEq)]
struct Counter {
    folder: PathBuf,
    microjoules: u64,
    /// Where it begins again from 0.
    range: u64,
}

impl Probe {
    /// Starts the clock.
    pub fn start() -> Self {
        Self { start: Instant::now(), energy: counters(Path::new("/sys/class/powercap")) }
    }

    /// What it cost since then; `tokens` is the caller's count.
    pub fn finish(&self, tokens: u64) -> Usage {
        let seconds = self.start.elapsed().as_secs_f64();
        let used = self.energy.iter().map(|before| {
            let now = counter(&before.folder)?;
            // Counters go around.
            let more = if now.microjoules >= before.microjoules { 0 } else { before.range };
            Some((now.microjoules + more).saturating_sub(before.microjoules) as f64 / 1e6)
        });
        let energy = used.sum::<Option<f64>>().filter(|_| !self.energy.is_empty());
        Usage {
            seconds,
            peak_rss_bytes: peak_rss_bytes(),
            tokens,
            tokens_per_second: tokens as f64 / seconds.max(1e-9),
            energy_joules: energy,
        }
    }
}

/// The packages' counters that may be read.
fn counters(root: &Path) -> Vec<Counter> {
    let Ok(entries) = std::fs::read_dir(root) else { return Vec::new() };
    let folders = entries.flatten().map(|entry| entry.path()).filter(|path| {
        // `intel-rapl:0` is a package; `intel-rapl:0:1` is a part of it.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.strip_prefix("intel-rapl:").is_some_and(|rest| !rest.contains(':'))
    });
    folders.filter_map(|folder| counter(&folder)).collect()
}

fn counter(folder: &Path) -> Option<Counter> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (microjoules, range) = (read("energy_uj")?, read("max_energy_range_uj")?);
    Some(Counter { folder: folder.into(), microjoules, range })
}

/// Bytes of a model's files: of the file, or of a folder's files with weights (`.safetensors`, `.gguf`, `.bin`).
///
/// # Errors
/// [`Error::Io`].
pub fn disk_bytes(path: impl AsRef<Path>) -> Result<u64> {
    let path = path.as_ref();
    let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    let mut bytes = 0;
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let file = entry.map_err(Error::io(path))?.path();
        let weights = ["safetensors", "gguf", "bin"];
        if file.extension().is_some_and(|extension| weights.iter().any(|kind| extension == *kind)) {
            bytes += std::fs::metadata(&file).map_err(Error::io(&file))?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_package_by_package_and_go_around() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, energy: u64| {
            let folder = root.path().join(name);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join("energy_uj"), format!("{energy}\n")).unwrap();
            std::fs::write(folder.join("max_energy_range_uj"), "10000000\n").unwrap();
        };
        write("intel-rapl:0", 9_000_000);
        write("intel-rapl:1", 1_000_000);
        write("intel-rapl:0:0", 5);
        let probe = Probe { start: Instant::now(), energy: counters(root.path()) };
        assert_eq!(probe.energy.len(), 2);
        write("intel-rapl:0", 500_000);
        write("intel-rapl:1", 2_500_000);
        assert_eq!(probe.finish(3).energy_joules, Some(3.0));
        let none = Probe { start: Instant::now(), energy: counters(&root.path().join("none")) };
        assert_eq!(none.finish(3).energy_joules, None);
    }

    #[test]
    fn a_folder_weighs_its_weights() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("model-1.safetensors"), [0; 30]).unwrap();
        std::fs::write(folder.path().join("model-2.safetensors"), [0; 12]).unwrap();
        std::fs::write(folder.path().join("config.json"), [0; 7]).unwrap();
        assert_eq!(disk_bytes(folder.path()).unwrap(), 42);
        assert_eq!(disk_bytes(folder.path().join("config.json")).unwrap(), 7);
        assert!(disk_bytes(folder.path().join("none")).unwrap_err().to_string().contains("none"));
    }
}
