//! Folders of several files that change as one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{atomic_file::sync_folder, beside, interruption, lock::Lock, parent};
use crate::{Error, Result};

/// A folder in the making, beside its place.
///
/// ```
/// use kiln_quant_core::files::{NewFolder, write_atomically};
/// # let folder = tempfile::tempdir()?;
/// # let target = folder.path().join("adapter");
/// let new = NewFolder::replacing(&target, &["config.json", "weights.bin"])?;
/// std::fs::write(new.path().join("config.json"), "{}")?;
/// std::fs::write(new.path().join("weights.bin"), "...")?;
/// new.commit()?;
/// assert!(target.join("weights.bin").exists());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct NewFolder {
    target: PathBuf,
    fresh: PathBuf,
    /// Names that are the writer's own, if there may be a folder already.
    own: Option<Vec<String>>,
    _lock: Lock,
}

impl NewFolder {
    /// A folder that takes the place of what stands at `target`, a folder or nothing. `own` are the names that its writer
    /// ever uses there: those of an earlier one go, whatever else is there stays.
    ///
    /// # Errors
    /// [`Error::File`] if another process writes there, or if `target` isn't a folder; [`Error::Io`].
    pub fn replacing(target: &Path, own: &[&str]) -> Result<Self> {
        Self::create(target, Some(own.iter().map(|&name| name.to_owned()).collect()))
    }

    /// A folder where there is none yet, or an empty one.
    ///
    /// # Errors
    /// As [`replacing`](Self::replacing), and for a `target` that holds files.
    pub fn at_new_place(target: &Path) -> Result<Self> {
        Self::create(target, None)
    }

    fn create(target: &Path, own: Option<Vec<String>>) -> Result<Self> {
        let is_link = fs::symlink_metadata(target).is_ok_and(|metadata| metadata.is_symlink());
        // What a link points to is replaced, the link stays.
        let target =
            if is_link { fs::canonicalize(target).map_err(Error::io(target))? } else { target.into() };
        fs::create_dir_all(parent(&target)).map_err(Error::io(&target))?;
        let lock = Lock::take(beside(&target, ".kiln-lock"), &target)?;
        recover(&target).map_err(Error::io(&target))?;
        let entries = fs::read_dir(&target).map(|mut entries| entries.next().is_some());
        let found = match entries {
            Ok(true) if own.is_none() => "one that holds files",
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => "something else",
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Error::io(&target)(error)),
            _ if is_mount(&target) => "a mounted one, which can't be renamed",
            _ => "",
        };
        if !found.is_empty() {
            let expected = if own.is_some() { "a folder, or nothing" } else { "a new or empty folder" };
            return Err(Error::File {
                path: target,
                field: "folder".into(),
                expected: expected.into(),
                found: found.into(),
            });
        }
        let fresh = beside(&target, NEW);
        interruption::step();
        fs::create_dir(&fresh).map_err(Error::io(&target))?;
        Ok(Self { target, fresh, own, _lock: lock })
    }

    /// Where files go meanwhile.
    pub fn path(&self) -> &Path {
        &self.fresh
    }

    /// Puts the folder into its place. From then on it is there whatever happens; before, the earlier one is.
    ///
    /// # Errors
    /// [`Error::Io`]; what stood there before still does.
    pub fn commit(self) -> Result<()> {
        self.put_in_place().map_err(Error::io(&self.target))
    }

    fn put_in_place(&self) -> io::Result<()> {
        if self.target.exists() {
            match &self.own {
                Some(own) => {
                    for entry in fs::read_dir(&self.target)? {
                        let entry = entry?;
                        let (name, place) = (entry.file_name(), self.fresh.join(entry.file_name()));
                        if !own.iter().any(|own| name == own.as_str()) && !place.exists() {
                            keep(&entry.path(), &place)?;
                        }
                    }
                }
                // Not every system renames onto an empty folder.
                None => fs::remove_dir(&self.target)?,
            }
        }
        sync_folder(&self.fresh)?;
        let old = beside(&self.target, OLD);
        if self.target.exists() {
            interruption::step();
            fs::rename(&self.target, &old)?;
        }
        interruption::step();
        if let Err(error) = fs::rename(&self.fresh, &self.target) {
            if old.exists() {
                fs::rename(&old, &self.target)?;
            }
            return Err(error);
        }
        sync_folder(parent(&self.target))?;
        remove(&old)
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        if !interruption::is_killed() {
            let _ = remove(&self.fresh);
        }
    }
}

const NEW: &str = ".kiln-new";
const OLD: &str = ".kiln-old";

/// Where the folder `path` is to be read: there, or where a process that was killed between two renames left it.
pub fn whole_folder(path: &Path) -> PathBuf {
    let old = beside(path, OLD);
    if !path.exists() && old.exists() { old } else { path.into() }
}

/// Puts back or removes what a killed process left.
fn recover(target: &Path) -> io::Result<()> {
    let old = beside(target, OLD);
    if old.exists() && !target.exists() {
        interruption::step();
        fs::rename(&old, target)?;
    }
    remove(&old)?;
    remove(&beside(target, NEW))
}

/// Removes a folder, file by file, if it is there.
fn remove(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        interruption::step();
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    interruption::step();
    fs::remove_dir(folder)
}

/// A foreign file or folder in a second place: linked, or copied where that can't be.
fn keep(from: &Path, to: &Path) -> io::Result<()> {
    if fs::symlink_metadata(from)?.is_dir() {
        interruption::step();
        fs::create_dir(to)?;
        return fs::read_dir(from)?.try_for_each(|entry| {
            let entry = entry?;
            keep(&entry.path(), &to.join(entry.file_name()))
        });
    }
    interruption::step();
    fs::hard_link(from, to).or_else(|_| fs::copy(from, to).map(drop))
}

/// Whether something is mounted at `path`, which then can't be renamed.
#[cfg(unix)]
fn is_mount(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    device(path).is_some_and(|found| device(parent(path)) != Some(found))
}

#[cfg(not(unix))]
fn is_mount(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::files::{interruption::killed_at, write_atomically};

    const OWN: [&str; 3] = ["a", "b", "c"];

    /// Names and contents of what is in a folder, or `None` if it isn't there.
    fn contents(folder: &Path) -> Option<BTreeMap<String, String>> {
        let entries = fs::read_dir(folder).ok()?.map(|entry| entry.unwrap());
        let read = |path: PathBuf| fs::read_to_string(path).unwrap_or_else(|_| "folder".into());
        Some(entries.map(|e| (e.file_name().into_string().unwrap(), read(e.path()))).collect())
    }

    fn write(target: &Path, content: &str, names: &[&str]) {
        let new = NewFolder::replacing(target, &OWN).unwrap();
        for name in names {
            write_atomically(&new.path().join(name), |file| io::Write::write_all(file, content.as_bytes()))
                .unwrap();
        }
        new.commit().unwrap();
    }

    #[test]
    fn kills_at_every_operation_once_and_twice_leave_one_of_the_two_whole() {
        let work = tempfile::tempdir().unwrap();
        let target = work.path().join("target");
        let entry = |content: &str| {
            let mut entries: BTreeMap<_, _> =
                ["a", "b"].map(|name| (name.to_owned(), content.to_owned())).into();
            entries.insert("foreign".into(), "theirs".into());
            entries
        };
        let begin = || {
            for entry in fs::read_dir(work.path()).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
            }
            write(&target, "old", &["a", "b", "c"]);
            fs::write(target.join("foreign"), "theirs").unwrap();
            write(&target, "old", &["a", "b"]);
        };
        let check = |allowed: &[&str], killed: &str| {
            let found = contents(&whole_folder(&target));
            let allowed: Vec<_> = allowed.iter().map(|content| Some(entry(content))).collect();
            assert!(allowed.contains(&found), "{killed}: {found:?}");
        };
        let mut kills = 0;
        for first in 0.. {
            begin();
            if killed_at(first, || write(&target, "new", &["a", "b"])).is_some() {
                assert!(first > 15, "{first} operations");
                break;
            }
            kills += 1;
            check(&["old", "new"], &format!("killed at {first}"));
            for second in 0.. {
                begin();
                killed_at(first, || write(&target, "new", &["a", "b"]));
                let done = killed_at(second, || write(&target, "newer", &["a", "b"])).is_some();
                check(
                    if done { &["newer"] } else { &["old", "new", "newer"] },
                    &format!("at {first} and {second}"),
                );
                // Whatever was left, the next one works and cleans up.
                write(&target, "last", &["a", "b"]);
                assert_eq!(contents(&target), Some(entry("last")));
                assert_eq!(contents(work.path()).unwrap().len(), 1);
                if done {
                    break;
                }
                kills += 1;
            }
        }
        assert!(kills > 300, "{kills}");
    }

    #[test]
    fn another_writer_is_told_who_writes() {
        let work = tempfile::tempdir().unwrap();
        let target = work.path().join("target");
        let new = NewFolder::replacing(&target, &OWN).unwrap();
        let error = NewFolder::replacing(&target, &OWN).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(new);
        assert_eq!(contents(work.path()).unwrap().len(), 0);
        write(&target, "x", &["a"]);
    }

    #[test]
    fn places_that_hold_something_else_are_refused() {
        let work = tempfile::tempdir().unwrap();
        let file = work.path().join("file");
        fs::write(&file, "theirs").unwrap();
        let error = NewFolder::replacing(&file, &OWN).unwrap_err().to_string();
        assert!(error.contains("expected a folder, or nothing"), "{error}");
        let error = NewFolder::at_new_place(work.path()).unwrap_err().to_string();
        assert!(error.contains("a new or empty folder"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"theirs");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_what_it_points_to_is_replaced() {
        let work = tempfile::tempdir().unwrap();
        let (real, link) = (work.path().join("real"), work.path().join("link"));
        write(&real, "old", &["a"]);
        std::os::unix::fs::symlink(&real, &link).unwrap();
        write(&link, "new", &["a"]);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read(real.join("a")).unwrap(), b"new");
    }
}
