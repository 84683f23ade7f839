//! The log of a run: a line for each document, written as soon as it is scored, so that a run can be resumed.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{File, OpenOptions, TryLockError},
    io::{ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::PROTOCOL;
use crate::{Error, Gold, Requests, Response, Result, Score, Scored};

/// What was asked about one document, and what came of it: a line of the log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The task.
    pub task: String,
    /// Examples shown.
    pub shots: usize,
    /// The document's place in the split.
    pub document: usize,
    /// Its id, if the task has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// What was asked.
    pub requests: Requests,
    /// What was answered.
    pub responses: Vec<Response>,
    /// Number of the likeliest choice, texts by filter, whether the answer is the model's first choice, or nothing.
    pub prediction: Value,
    /// What was right.
    pub answer: Value,
    /// By `metric,filter`, as the harness writes them.
    pub scores: BTreeMap<String, Score>,
}

impl Sample {
    pub(super) fn answer(gold: &Gold) -> Value {
        match gold {
            Gold::Choices(right) if right.len() == 1 => right[0].into(),
            Gold::Nothing => Value::Null,
            other => serde_json::to_value(other).unwrap_or_default(),
        }
    }

    pub(super) fn scores(scored: &Scored) -> BTreeMap<String, Score> {
        let name = |(metric, filter): &(_, String)| format!("{},{filter}", crate::task::name(metric));
        scored.scores.iter().map(|(key, score)| (name(key), *score)).collect()
    }
}

/// The first line: what must be the same when a run is resumed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Header {
    pub protocol: String,
    pub model: String,
    pub settings: Value,
}

/// A log, open for more lines.
pub(super) struct SampleLog {
    path: PathBuf,
    file: File,
    /// What it held, by task, shots and document.
    pub earlier: HashMap<(String, usize, usize), Sample>,
}

impl SampleLog {
    /// Opens or begins a log. A last line that was cut off in the middle is dropped.
    pub(super) fn open(path: &Path, header: &Header) -> Result<Self> {
        let mut earlier = HashMap::new();
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(Error::io(path))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(path, "lock", "a log that no other process writes", "one in use"));
            }
            Err(TryLockError::Error(error)) if error.kind() != ErrorKind::Unsupported => {
                return Err(Error::io(path)(error));
            }
            _ => {}
        }
        let (lines, whole) = read_lines(path)?;
        match lines.split_first() {
            None => {
                let mut line = serde_json::to_vec(header).unwrap_or_default();
                line.push(b'\n');
                let found = std::fs::read(path).map_err(Error::io(path))?;
                if !line.starts_with(&found) {
                    return Err(Error::file(
                        path,
                        "line 1",
                        "the beginning of a log of samples",
                        "something else",
                    ));
                }
                file.set_len(0).map_err(Error::io(path))?;
                file.write_all(&line).map_err(Error::io(path))?;
            }
            Some((first, samples)) => {
                let found: Header = parse(path, 0, first)?;
                if &found != header {
                    let show = |header| serde_json::to_string(header).unwrap_or_default();
                    return Err(Error::file(
                        path,
                        "line 1",
                        format!("this run's {}", show(header)),
                        show(&found),
                    ));
                }
                for (number, line) in samples.iter().enumerate() {
                    let sample: Sample = parse(path, number + 1, line)?;
                    earlier.insert((sample.task.clone(), sample.shots, sample.document), sample);
                }
                file.set_len(whole).map_err(Error::io(path))?;
                std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(Error::io(path))?;
            }
        }
        Ok(Self { path: path.into(), file, earlier })
    }

    /// Adds a line, and hands it to the operating system.
    pub(super) fn write(&mut self, sample: &Sample) -> Result<()> {
        let mut line = serde_json::to_vec(sample)
            .map_err(|error| Error::file(&self.path, "sample", "what JSON can hold", error))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(Error::io(&self.path))
    }
}

/// Whole lines, and the bytes that they take.
fn read_lines(path: &Path) -> Result<(Vec<Vec<u8>>, u64)> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
    let lines = bytes[..whole].split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    Ok((lines.map(<[u8]>::to_vec).collect(), whole as u64))
}

fn parse<T: for<'a> Deserialize<'a>>(path: &Path, number: usize, line: &[u8]) -> Result<T> {
    serde_json::from_slice(line).map_err(|error| {
        Error::file(path, format!("line {}", number + 1), "a line of a log of samples", error)
    })
}

/// Reads the log of a run, finished or not.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] with the line that isn't a sample.
pub fn read_samples(path: impl AsRef<Path>) -> Result<Vec<Sample>> {
    let path = path.as_ref();
    let (lines, _) = read_lines(path)?;
    let header: Option<Header> = lines.first().map(|line| parse(path, 0, line)).transpose()?;
    if let Some(header) = header
        && header.protocol != PROTOCOL
    {
        return Err(Error::file(path, "protocol", PROTOCOL, header.protocol));
    }
    let samples = lines.iter().enumerate().skip(1);
    samples.map(|(number, line)| parse(path, number, line)).collect()
}
