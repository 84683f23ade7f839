//! The trial log: one JSON object per line, flushed, shared by processes, read back after a kill.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, SearchSpace, Trial, TrialKey, digest::digest};

const FORMAT: &str = "kiln-mixq-log";
const VERSION: u32 = 1;

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    format: String,
    version: u32,
    space: String,
    objective: String,
}

impl Header {
    /// As it stands in the file.
    fn line(&self) -> String {
        serde_json::json!(self).to_string()
    }
}

/// Measured trials, in memory and, if it has a file, on disk.
///
/// The first line names the fingerprints of space and objective, every further line is a [`Trial`]. Lines are
/// appended under an exclusive file lock and synced, so several processes may share a file. A line that a killed
/// process left unfinished is cut off; a complete line that doesn't parse is skipped and left alone.
///
/// While a process measures a trial it holds a lock on a file in `<log>.claims`; the system releases it when the
/// process ends, however it ends, so nothing waits for the dead.
#[derive(Debug)]
pub struct TrialLog {
    disk: Option<Disk>,
    space: SearchSpace,
    /// Fingerprint of what is measured; without a file, that of the first search.
    objective: Option<String>,
    trials: Vec<Trial>,
    index: HashMap<TrialKey, usize>,
    skipped: usize,
}

#[derive(Debug)]
struct Disk {
    path: PathBuf,
    file: File,
    header: Header,
    /// How far the file has been read: always behind a newline.
    read: u64,
}

/// The right to measure one trial, until dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    /// Holds the lock.
    file: Option<(File, PathBuf)>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some((_, path)) = &self.file {
            // Removed while still locked; a leftover file would only take up space.
            let _ = fs::remove_file(path);
        }
    }
}

impl TrialLog {
    /// A log without a file.
    pub fn in_memory(space: &SearchSpace) -> Self {
        let (space, index) = (space.clone(), HashMap::new());
        Self { disk: None, space, objective: None, trials: Vec::new(), index, skipped: 0 }
    }

    /// Opens or creates a log file of this space and objective.
    ///
    /// # Errors
    /// [`Error::Log`] if the file is something else or of another space or objective; [`Error::Io`].
    pub fn open(path: impl AsRef<Path>, space: &SearchSpace, objective: &str) -> Result<Self> {
        let path = path.as_ref();
        let file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(Error::io(path))?;
        let header = Header {
            format: FORMAT.into(),
            version: VERSION,
            space: space.fingerprint(),
            objective: objective.into(),
        };
        let disk = Disk { path: path.into(), file, header, read: 0 };
        let objective = Some(objective.into());
        let mut log = Self { disk: Some(disk), objective, ..Self::in_memory(space) };
        log.locked(|log| log.catch_up(true))?;
        Ok(log)
    }

    /// All trials in the order of the log.
    pub fn trials(&self) -> &[Trial] {
        &self.trials
    }

    /// A trial, if it has been measured.
    pub fn get(&self, key: &TrialKey) -> Option<&Trial> {
        self.index.get(key).map(|&index| &self.trials[index])
    }

    /// Complete lines that were not trials of this space.
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// Reads what other processes have added.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Log`] if the file was replaced by another.
    pub fn refresh(&mut self) -> Result<()> {
        self.locked(|log| log.catch_up(false))
    }

    /// Fails unless the log is of this space and objective.
    pub(crate) fn check(&mut self, space: &SearchSpace, objective: &str) -> Result<()> {
        let (known, found) = (self.space.fingerprint(), space.fingerprint());
        if known != found {
            return Err(self.fail("space fingerprint", &format!("\"{found}\", the searched space's"), known));
        }
        match &self.objective {
            Some(known) if known != objective => {
                let expected = format!("\"{objective}\", the search's");
                Err(self.fail("objective fingerprint", &expected, known))
            }
            _ => {
                self.objective = Some(objective.into());
                Ok(())
            }
        }
    }

    /// Adds a trial, on disk too. If it is there already, the first one stays, unless it was stopped early and this one
    /// was not.
    ///
    /// The trial is kept as it reads back, so that a resumed search sees bit for bit the numbers of the first.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Log`] if the trial is not of this space.
    pub fn append(&mut self, trial: &Trial) -> Result<()> {
        let line = serde_json::to_string(trial).map_err(|e| self.fail("trial", "serializable", e))?;
        let Some(read_back) = self.parse(line.as_bytes()) else {
            return Err(self.fail("trial", "a configuration and finite figures of this space", line));
        };
        self.locked(|log| {
            log.catch_up(true)?;
            if !log.lacks(&read_back) {
                return Ok(());
            }
            if let Some(disk) = &mut log.disk {
                disk.write(&line)?;
            }
            log.keep(read_back);
            Ok(())
        })
    }

    /// The right to measure a trial, unless another process has it.
    pub(crate) fn claim(&self, key: &TrialKey) -> Result<Option<Claim>> {
        let Some(disk) = &self.disk else { return Ok(Some(Claim { file: None })) };
        let folder = disk.claims();
        let path = folder.join(&digest(format!("{key:?}"))[..32]);
        let file = open_claim(&folder, &path).map_err(Error::io(&path))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(Claim { file: Some((file, path)) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(Error::io(&path)(error)),
        }
    }

    /// Runs `work` under the file's exclusive lock.
    fn locked(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if let Some(disk) = &self.disk {
            disk.file.lock().map_err(Error::io(&disk.path))?;
        }
        let result = work(self);
        if let Some(disk) = &self.disk {
            disk.file.unlock().map_err(Error::io(&disk.path))?;
        }
        result
    }

    /// Reads new lines; the lock must be held. An unfinished last line can only be a dead process's: it is cut off
    /// where `repair` allows writing.
    fn catch_up(&mut self, repair: bool) -> Result<()> {
        let Some(disk) = &mut self.disk else { return Ok(()) };
        let fresh = disk.read == 0;
        let bytes = disk.read_on(repair)?;
        if fresh && bytes.is_empty() && repair {
            disk.write(&disk.header.line())?;
        }
        let lines = bytes.split(|&byte| byte == b'\n').skip(usize::from(fresh));
        for line in lines.filter(|line| !line.is_empty()) {
            match self.parse(line) {
                Some(trial) if self.lacks(&trial) => self.keep(trial),
                Some(_) => {}
                None => {
                    self.skipped += 1;
                    tracing::warn!(line = %String::from_utf8_lossy(line), "skipped a line of the trial log");
                }
            }
        }
        Ok(())
    }

    fn parse(&self, line: &[u8]) -> Option<Trial> {
        let trial: Trial = serde_json::from_slice(line).ok()?;
        let known = self.space.contains(&trial.config) && self.space.bytes(&trial.config) == trial.bytes;
        known.then_some(trial)
    }

    /// Whether there is no such trial, or only one that was stopped early where this one was not.
    fn lacks(&self, trial: &Trial) -> bool {
        self.get(&trial.key()).is_none_or(|known| known.stopped && !trial.stopped)
    }

    fn keep(&mut self, trial: Trial) {
        match self.index.get(&trial.key()) {
            Some(&index) => self.trials[index] = trial,
            None => {
                self.index.insert(trial.key(), self.trials.len());
                self.trials.push(trial);
            }
        }
    }

    fn fail(&self, field: &str, expected: &str, found: impl ToString) -> Error {
        let path = self.disk.as_ref().map_or_else(|| PathBuf::from("trial log"), |disk| disk.path.clone());
        Error::Log { path, field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Goes only when it is empty, that is when nobody is measuring.
        let _ = fs::remove_dir(self.claims());
    }
}

impl Disk {
    /// The folder of the claims.
    fn claims(&self) -> PathBuf {
        let mut folder = self.path.clone().into_os_string();
        folder.push(".claims");
        folder.into()
    }

    /// The complete lines behind what was read before. Nothing is cut off a file that doesn't begin as this log does.
    fn read_on(&mut self, repair: bool) -> Result<Vec<u8>> {
        let io = |error| Error::io(&self.path)(error);
        let length = self.file.metadata().map_err(io)?.len();
        if length < self.read {
            return Err(Error::Log {
                path: self.path.clone(),
                field: "length".into(),
                expected: format!("at least {} bytes, as read before", self.read),
                found: length.to_string(),
            });
        }
        let mut bytes = Vec::new();
        self.file.seek(SeekFrom::Start(self.read)).map_err(io)?;
        (&self.file).take(length - self.read).read_to_end(&mut bytes).map_err(io)?;
        if self.read == 0 {
            self.check_start(&bytes)?;
        }
        let complete = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
        if complete < bytes.len() && repair {
            self.file.set_len(self.read + complete as u64).map_err(io)?;
        }
        bytes.truncate(complete);
        self.read += complete as u64;
        Ok(bytes)
    }

    /// Writes a line behind all others and waits until it is on disk.
    fn write(&mut self, line: &str) -> Result<()> {
        let text = format!("{line}\n");
        let written: io::Result<()> =
            self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(Error::io(&self.path))?;
        self.read += text.len() as u64;
        Ok(())
    }

    /// Fails unless a file begins with this log's header, or with a part of it that a killed process left.
    fn check_start(&self, bytes: &[u8]) -> Result<()> {
        match bytes.iter().position(|&byte| byte == b'\n') {
            None if self.header.line().as_bytes().starts_with(bytes) => Ok(()),
            None => self.check_header(bytes),
            Some(end) => self.check_header(&bytes[..end]),
        }
    }

    fn check_header(&self, line: &[u8]) -> Result<()> {
        let fail = |field: &str, expected: &str, found: &str| Error::Log {
            path: self.path.clone(),
            field: field.into(),
            expected: expected.into(),
            found: format!("\"{found}\""),
        };
        let text = String::from_utf8_lossy(line);
        let start: String = text.chars().take(80).collect();
        let found: Header = serde_json::from_slice(line)
            .map_err(|_| fail("first line", "the header of a trial log", &start))?;
        let known = &self.header;
        for (field, expected, found) in [
            ("format", &known.format, &found.format),
            ("version", &known.version.to_string(), &found.version.to_string()),
            ("space fingerprint", &known.space, &found.space),
            ("objective fingerprint", &known.objective, &found.objective),
        ] {
            if expected != found {
                return Err(fail(field, &format!("\"{expected}\""), found));
            }
        }
        Ok(())
    }
}

/// Opens a claim's file; the folder may be removed by another process between the two steps, so both are retried.
fn open_claim(folder: &Path, path: &Path) -> io::Result<File> {
    let mut attempts = 0;
    loop {
        fs::create_dir_all(folder)?;
        match OpenOptions::new().write(true).create(true).truncate(false).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && attempts < 100 => attempts += 1,
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Config, Fidelity, testing::toy_space};

    fn trial(space: &SearchSpace, config: Vec<u8>, score: f64) -> Trial {
        let config = Config(config);
        Trial {
            fidelity: Fidelity::kl(100),
            seed: 0,
            score: Some(score),
            bytes: space.bytes(&config),
            seconds: 0.5,
            method: "random".into(),
            figures: Default::default(),
            curve: vec![],
            stopped: false,
            plan: space.plan(&config),
            config,
        }
    }

    #[test]
    fn trials_survive_reopening_bit_for_bit_and_repeats_are_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let (path, space) = (folder.path().join("log.jsonl"), toy_space(3, 3));
        let mut log = TrialLog::open(&path, &space, "model").unwrap();
        let scores = [0.1 + 0.2, 1.0 / 3.0, 2.2250738585072014e-300, 123_456.789_101_112_13];
        for (index, score) in scores.into_iter().enumerate() {
            log.append(&trial(&space, vec![index as u8 % 3, index as u8 / 3, 0], score)).unwrap();
        }
        log.append(&trial(&space, vec![0, 0, 0], 7.0)).unwrap();
        let read = TrialLog::open(&path, &space, "model").unwrap();
        assert_eq!(read.trials(), log.trials());
        assert_eq!(read.trials().len(), 4);
        assert_ne!(read.trials()[0].score, Some(7.0));
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 5);
    }

    #[test]
    fn every_cut_of_the_file_keeps_the_complete_trials() {
        let folder = tempfile::tempdir().unwrap();
        let (path, space) = (folder.path().join("log.jsonl"), toy_space(2, 2));
        let mut log = TrialLog::open(&path, &space, "model").unwrap();
        for config in [[0, 0], [0, 1], [1, 0]] {
            log.append(&trial(&space, config.to_vec(), 1.5)).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let lines = whole[..cut].iter().filter(|&&byte| byte == b'\n').count();
            let mut log = TrialLog::open(&path, &space, "model").unwrap();
            assert_eq!(log.trials().len(), lines.saturating_sub(1), "cut at {cut}");
            log.append(&trial(&space, vec![1, 1], 2.0)).unwrap();
            assert_eq!(TrialLog::open(&path, &space, "model").unwrap().trials(), log.trials());
        }
    }

    #[test]
    fn corrupt_lines_are_skipped_and_others_kept() {
        let folder = tempfile::tempdir().unwrap();
        let (path, space) = (folder.path().join("log.jsonl"), toy_space(2, 2));
        let mut log = TrialLog::open(&path, &space, "model").unwrap();
        log.append(&trial(&space, vec![0, 0], 1.0)).unwrap();
        let good = std::fs::read_to_string(&path).unwrap();
        let line = good.lines().nth(1).unwrap().replace("[0,0]", "[0,9]");
        let bad = format!("{good}{line}\n{{\"config\":\n\u{0}\u{0}\n");
        std::fs::write(&path, [bad.as_bytes(), &[0xff, 0xfe]].concat()).unwrap();
        let mut log = TrialLog::open(&path, &space, "model").unwrap();
        assert_eq!((log.trials().len(), log.skipped()), (1, 3));
        log.append(&trial(&space, vec![1, 1], 2.0)).unwrap();
        assert_eq!(TrialLog::open(&path, &space, "model").unwrap().trials().len(), 2);
    }

    #[test]
    fn logs_of_other_models_spaces_and_formats_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (path, space) = (folder.path().join("log.jsonl"), toy_space(2, 2));
        TrialLog::open(&path, &space, "model").unwrap();
        let fail = |space: &SearchSpace, objective: &str| {
            TrialLog::open(&path, space, objective).unwrap_err().to_string()
        };
        assert!(fail(&space, "other").contains("objective fingerprint: expected \"other\", found \"model\""));
        assert!(fail(&toy_space(2, 3), "model").contains("space fingerprint"));
        // Whatever else was named by mistake stays as it was.
        for other in ["hello\n", "hello", "{\"weights\":[1,2]}", "{}\n[1]\nrest", "\n\n", "a\nb"] {
            std::fs::write(&path, other).unwrap();
            assert!(fail(&space, "model").contains("first line"), "{other}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), other);
        }
    }

    #[test]
    fn two_handles_see_each_other_and_claim_exclusively() {
        let folder = tempfile::tempdir().unwrap();
        let (path, space) = (folder.path().join("log.jsonl"), toy_space(2, 2));
        let mut first = TrialLog::open(&path, &space, "model").unwrap();
        let mut second = TrialLog::open(&path, &space, "model").unwrap();
        first.append(&trial(&space, vec![0, 1], 1.0)).unwrap();
        let key = first.trials()[0].key();
        assert!(second.get(&key).is_none());
        second.refresh().unwrap();
        assert_eq!(second.get(&key), first.get(&key));
        let claim = first.claim(&key).unwrap().unwrap();
        assert!(second.claim(&key).unwrap().is_none());
        drop(claim);
        assert!(second.claim(&key).unwrap().is_some());
        drop((first, second));
        assert!(!folder.path().join("log.jsonl.claims").exists());
    }
}
