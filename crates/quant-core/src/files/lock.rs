//! One writer at a time.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use super::interruption;
use crate::{Error, Result};

/// Opens `path`, which is created if missing, and locks it; `None` if another process holds it. What was in the file is
/// still there.
///
/// The system gives the lock back when the process ends, however it ends. Where the file system knows no locks, there are
/// none.
pub(super) fn hold(path: &Path) -> io::Result<Option<File>> {
    // More often than that it changes hands under nobody's eyes.
    for _ in 0..1000 {
        interruption::step();
        // Through a link another file would be written.
        if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
            break;
        }
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Its holder may have renamed or removed it between the two.
        if is_at(&file, path)? {
            return Ok(Some(file));
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("{}: expected a file", path.display())))
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let held = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(found) => Ok((found.dev(), found.ino()) == (held.dev(), held.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> io::Result<bool> {
    Ok(path.exists())
}

/// A lock file of this process, which says so and goes when it is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    file: File,
}

impl Lock {
    /// The lock at `path` for writing to `what`.
    ///
    /// # Errors
    /// [`Error::File`] saying which process holds it; [`Error::Io`].
    pub(super) fn take(path: PathBuf, what: &Path) -> Result<Self> {
        let Some(mut file) = hold(&path).map_err(Error::io(&path))? else {
            let holder = holder(&path);
            return Err(Error::File {
                path: what.into(),
                field: "lock".into(),
                expected: "a place that no other process writes to".into(),
                found: match holder {
                    Some(holder) => format!("one that process {holder} is writing to"),
                    None => "one that another process is writing to".into(),
                },
            });
        };
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(std::process::id().to_string().as_bytes())
        };
        write(&mut file).map_err(Error::io(&path))?;
        Ok(Self { path, file })
    }
}

/// The process that says in the file that it holds it: one that has just begun says so in a moment.
fn holder(path: &Path) -> Option<String> {
    (0..20).find_map(|attempt| {
        std::thread::sleep(Duration::from_millis(if attempt > 0 { 10 } else { 0 }));
        let mut text = String::new();
        File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
        Some(text).filter(|text| !text.is_empty())
    })
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !interruption::is_killed() {
            // Removed while it is held; a file that is left only takes up space.
            let _ = fs::remove_file(&self.path);
        }
        // A program that another thread is just starting has the file too, until it is its own: closing wouldn't do.
        let _ = self.file.unlock();
    }
}

/// A folder that no other process writes to through this type until it is dropped: for the whole of a long run.
///
/// ```
/// use kiln_quant_core::files::OutputFolder;
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("run");
/// let claimed = OutputFolder::claim(&path)?;
/// assert!(OutputFolder::claim(&path).is_err());
/// drop(claimed);
/// assert!(OutputFolder::claim(&path).is_ok());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct OutputFolder {
    path: PathBuf,
    _lock: Lock,
}

impl OutputFolder {
    /// Creates the folder if it is missing, finds out whether files can be made in it, and claims it.
    ///
    /// # Errors
    /// [`Error::File`] if another process, which is named, has claimed it, or another part of this one; [`Error::Io`] if
    /// nothing can be written there.
    pub fn claim(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(Error::io(&path))?;
        let lock = Lock::take(path.join(".kiln-lock"), &path)?;
        Ok(Self { path, _lock: lock })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::interruption::killed_at;

    #[test]
    fn a_lock_is_given_back_though_a_child_still_has_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let take = || Lock::take(path.clone(), folder.path());
        let mut of_child = None;
        let killed = killed_at(2, || {
            let lock = take().unwrap();
            of_child = Some(lock.file.try_clone().unwrap());
            assert!(take().is_err());
            interruption::step();
        });
        assert!(killed.is_none() && path.exists() && of_child.is_some());
        assert!(take().is_ok());
        assert!(!path.exists());
    }
}
