//! A log of one JSON line a run, which lets a study go on where it stopped.

use std::{
    fs::{File, TryLockError},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use kiln::quant::hash::Fnv1a;
use kiln_examples::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Seconds of a run by the clock, whatever else the machine was doing.
const TOOK: &str = "took_seconds";

/// One run: what was asked for, then what was found.
pub(crate) type Line = Map<String, Value>;

/// What writes a log, in its first line; another version's runs may mean something else.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Head<'a> {
    study: &'a str,
    version: u32,
}

pub(crate) struct Log {
    path: PathBuf,
    head: String,
}

impl Log {
    /// The log at `path`, or `study`'s below the repository's docs/results. A new one begins with a line that names the study
    /// and its version.
    ///
    /// # Errors
    /// A log of another study or version.
    pub(crate) fn open(path: Option<&Path>, study: &str, version: u32) -> Result<Self> {
        let default = || {
            let results = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/results"));
            results.join(study).with_extension("jsonl")
        };
        let head = Head { study, version };
        let expected = serde_json::to_string(&head)?;
        let log = Self { path: path.map_or_else(default, Path::to_path_buf), head: expected };
        let text = log.text()?;
        let first = text.lines().next().map(serde_json::from_str::<Head<'_>>);
        let found = match first {
            None => return Ok(log),
            Some(Ok(found)) if found == head => return Ok(log),
            Some(Ok(found)) => format!("one of {}", serde_json::to_string(&found)?),
            _ => "no such first line".into(),
        };
        Err(format!("{}: expected a log of {}, found {found}", log.path.display(), log.head).into())
    }

    fn text(&self) -> Result<String> {
        match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
            text => Ok(text.map_err(|error| format!("{}: {error}", self.path.display()))?),
        }
    }

    /// All runs, but for one that was being written when it was stopped.
    pub(crate) fn lines(&self) -> Result<Vec<Line>> {
        let text = self.text()?;
        Ok(text.lines().skip(1).filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// All lines as `T`.
    pub(crate) fn runs<T: for<'a> Deserialize<'a>>(&self) -> Result<Vec<T>> {
        let parse = |line| serde_json::from_value(Value::Object(line));
        let runs: serde_json::Result<Vec<T>> = self.lines()?.into_iter().map(parse).collect();
        runs.map_err(|error| format!("{}: {error}", self.path.display()).into())
    }

    /// How long the runs took that say so, in a sentence.
    ///
    /// # Errors
    /// As [`lines`](Self::lines).
    pub(crate) fn time_taken(&self) -> Result<String> {
        let lines = self.lines()?;
        let taken: Vec<f64> = lines.iter().filter_map(|line| line.get(TOOK)?.as_f64()).collect();
        let hours = taken.iter().sum::<f64>() / 3600.0;
        Ok(format!("\n{} of {} runs say what they took: {hours:.2} hours\n", taken.len(), lines.len()))
    }

    /// The line that has all values of `wanted`; without one, `run` is called and its figures are added. Of several processes
    /// one calls it, and the others wait for its line; if it is killed, the next one calls it.
    pub(crate) fn once(&self, wanted: Value, run: impl FnOnce() -> Result<Line>) -> Result<Line> {
        let line = self.found_or_made(wanted, run, |claim| claim.lock().map(|()| true))?;
        line.ok_or_else(|| "a run that was waited for".into())
    }

    /// As [`once`](Self::once), without waiting: nothing if another process is at this run.
    pub(crate) fn unless_taken(
        &self,
        wanted: Value,
        run: impl FnOnce() -> Result<Line>,
    ) -> Result<Option<Line>> {
        self.found_or_made(wanted, run, |claim| match claim.try_lock() {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        })
    }

    /// The line of `wanted`, made if `lock` says that it may be.
    fn found_or_made(
        &self,
        wanted: Value,
        run: impl FnOnce() -> Result<Line>,
        lock: impl FnOnce(&File) -> std::io::Result<bool>,
    ) -> Result<Option<Line>> {
        let Value::Object(wanted) = wanted else { return Err("a run is named by an object".into()) };
        let same = |line: &Line| {
            wanted.iter().all(|(key, value)| line.get(key).is_some_and(|found| equal(found, value)))
        };
        if let Some(line) = self.lines()?.into_iter().find(same) {
            return Ok(Some(line));
        }
        // The right to make it, until the file is closed.
        let claim = self.claim(&wanted)?;
        if !lock(&claim)? {
            return Ok(None);
        }
        // Somebody else's by now.
        if let Some(line) = self.lines()?.into_iter().find(same) {
            return Ok(Some(line));
        }
        let start = Instant::now();
        let mut line = wanted.clone();
        line.extend(run()?);
        line.insert(TOOK.into(), start.elapsed().as_secs_f64().round().into());
        let text = serde_json::to_string(&line)?;
        self.append(&text)?;
        println!("{text}");
        Ok(Some(line))
    }

    /// The file whose lock is the right to make a run.
    fn claim(&self, wanted: &Line) -> Result<File> {
        let folder = self.path.with_extension("claims");
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(Fnv1a::of(serde_json::to_string(wanted)?.bytes()).text());
        Ok(File::options().create(true).append(true).open(&path)?)
    }

    fn append(&self, text: &str) -> Result<()> {
        let name = |error: std::io::Error| format!("{}: {error}", self.path.display());
        let mut file = File::options().create(true).append(true).open(&self.path).map_err(name)?;
        file.lock().map_err(name)?;
        // A line that was being written when its run was stopped ends here.
        let before = match std::fs::read(&self.path).map_err(name)?.last() {
            None => format!("{}\n", self.head),
            Some(b'\n') => String::new(),
            Some(_) => "\n".into(),
        };
        Ok(writeln!(file, "{before}{text}").map_err(name)?)
    }
}

/// Whether two values are the same, 4 and 4.0 included.
pub(crate) fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(a), Value::Number(b)) => a.as_f64() == b.as_f64(),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| equal(value, other)))
        }
        _ => a == b,
    }
}

/// Calls a subcommand of this program with `arguments`; the figures that it writes as JSON.
pub(crate) fn figures(subcommand: &str, arguments: &[String]) -> Result<Line> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("figures.json");
    let output = Command::new(std::env::current_exe()?)
        .arg(subcommand)
        .args(arguments)
        .arg("--json")
        .arg(&file)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{subcommand} {}: {}", arguments.join(" "), errors.trim()).into());
    }
    Ok(serde_json::from_slice(&std::fs::read(&file)?)?)
}

/// Words as owned strings.
pub(crate) fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_string).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_in_the_log_is_not_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::open(Some(&folder.path().join("log.jsonl")), "test", 1).unwrap();
        let figures = |value: u32| move || Ok(Line::from_iter([("loss".into(), json!(value))]));
        let first = log.once(json!({ "seed": 1, "lr": 4.0 }), figures(5)).unwrap();
        assert_eq!(first["loss"], 5);
        assert_eq!(log.once(json!({ "seed": 1, "lr": 4 }), figures(6)).unwrap()["loss"], 5);
        assert_eq!(log.once(json!({ "seed": 2, "lr": 4 }), figures(6)).unwrap()["loss"], 6);
        // A run that was stopped while it wrote.
        let path = folder.path().join("log.jsonl");
        let cut = std::fs::read_to_string(&path).unwrap().trim_end().trim_end_matches('}').to_string();
        std::fs::write(&path, cut).unwrap();
        assert_eq!(log.lines().unwrap().len(), 1);
        log.once(json!({ "seed": 2, "lr": 4 }), figures(7)).unwrap();
        assert_eq!(log.lines().unwrap().len(), 2);
    }

    #[test]
    fn logs_of_others_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let open = |study, version| Log::open(Some(&path), study, version).map(drop);
        open("test", 1).unwrap();
        assert!(!path.exists(), "nothing was written yet");
        let log = Log::open(Some(&path), "test", 1).unwrap();
        log.once(json!({ "seed": 1 }), || Ok(Line::new())).unwrap();
        open("test", 1).unwrap();
        for (study, version) in [("test", 2), ("other", 1)] {
            let error = open(study, version).unwrap_err().to_string();
            assert!(error.contains("log.jsonl") && error.contains(study), "{error}");
            assert!(error.contains(r#"found one of {"study":"test","version":1}"#), "{error}");
        }
        std::fs::write(&path, "{\"seed\":1}\n").unwrap();
        assert!(open("test", 1).unwrap_err().to_string().contains("no such first line"));
    }

    #[test]
    fn of_several_who_want_a_run_one_makes_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let log = Log::open(Some(&path), "test", 1).unwrap();
        let made = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for seed in 0..5 {
                        let run = || {
                            made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                            std::thread::sleep(std::time::Duration::from_millis(5));
                            Ok(Line::from_iter([("loss".into(), json!(seed * 2))]))
                        };
                        let found = log.once(json!({ "seed": seed }), run).unwrap();
                        assert_eq!(found["loss"], seed * 2);
                    }
                });
            }
        });
        assert_eq!(made.into_inner(), 5);
        assert_eq!(log.lines().unwrap().len(), 5);
    }
}
