//! A log of one JSON line a run, which lets a study go on where it stopped.

use std::{
    fs::OpenOptions,
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use kiln_examples::Result;
use serde::Deserialize;
use serde_json::{Map, Value};

/// One run: what was asked for, then what was found.
pub(crate) type Line = Map<String, Value>;

pub(crate) struct Log(PathBuf);

impl Log {
    /// The log at `path`, or below the repository's docs/results.
    pub(crate) fn new(path: Option<&Path>, name: &str) -> Self {
        let default = || Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/results")).join(name);
        Self(path.map_or_else(default, Path::to_path_buf))
    }

    /// All lines, but for one that was being written when its run was stopped.
    pub(crate) fn lines(&self) -> Result<Vec<Line>> {
        match std::fs::read_to_string(&self.0) {
            Ok(text) => Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(format!("{}: {error}", self.0.display()).into()),
        }
    }

    /// All lines as `T`.
    pub(crate) fn runs<T: for<'a> Deserialize<'a>>(&self) -> Result<Vec<T>> {
        let parse = |line| serde_json::from_value(Value::Object(line));
        let runs: serde_json::Result<Vec<T>> = self.lines()?.into_iter().map(parse).collect();
        runs.map_err(|error| format!("{}: {error}", self.0.display()).into())
    }

    /// The line that has all values of `wanted`; without one, `run` is called and its figures are added.
    pub(crate) fn once(&self, wanted: Value, run: impl FnOnce() -> Result<Line>) -> Result<Line> {
        let Value::Object(wanted) = wanted else { return Err("a run is named by an object".into()) };
        let same = |line: &Line| {
            wanted.iter().all(|(key, value)| line.get(key).is_some_and(|found| equal(found, value)))
        };
        if let Some(line) = self.lines()?.into_iter().find(same) {
            return Ok(line);
        }
        let mut line = wanted;
        line.extend(run()?);
        let text = serde_json::to_string(&line)?;
        let name = |error: std::io::Error| format!("{}: {error}", self.0.display());
        // A line that was being written when its run was stopped ends here.
        let torn = std::fs::read(&self.0).is_ok_and(|found| found.last().is_some_and(|byte| *byte != b'\n'));
        let mut file = OpenOptions::new().create(true).append(true).open(&self.0).map_err(name)?;
        writeln!(file, "{}{text}", if torn { "\n" } else { "" }).map_err(name)?;
        println!("{text}");
        Ok(line)
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
        let log = Log::new(Some(&folder.path().join("log.jsonl")), "");
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
}
