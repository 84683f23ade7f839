//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{beside, interruption, lock::hold, parent};
use crate::{Error, Result};

/// How long another process may take to finish writing the same file.
const PATIENCE: Duration = Duration::from_secs(5);

/// Writes a file beside `path`, flushes it to the disk and renames it. The file gets the mode of any new file; an existing
/// `path` is replaced only when everything has been written. A link stays, what it points to is replaced.
///
/// ```
/// use std::io::Write;
/// let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes.txt");
/// kiln_quant_core::files::write_atomically(&path, |file| file.write_all(b"whole"))?;
/// assert_eq!(std::fs::read(&path)?, b"whole");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// [`Error::File`] if `path` is something else than a file, such as a device, or if another process goes on writing it;
/// [`Error::Io`] for the operating system's refusal or `write`'s. `path` is then as it was before.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>,
) -> Result<()> {
    let target = target(path)?;
    let fresh = beside(&target, ".kiln-new");
    let mut file = open(path, &fresh)?;
    // What a killed process left is written over.
    let result = fill(&mut file, write).and_then(|()| {
        interruption::step();
        fs::rename(&fresh, &target)
    });
    if let Err(error) = result {
        // The error that matters is the first one.
        let _ = fs::remove_file(&fresh);
        return Err(Error::io(path)(error));
    }
    sync_folder(parent(&target)).map_err(Error::io(path))
}

fn fill(file: &mut File, write: impl FnOnce(&mut BufWriter<&mut File>) -> io::Result<()>) -> io::Result<()> {
    interruption::step();
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    interruption::step();
    let mut writer = BufWriter::new(&mut *file);
    write(&mut writer)?;
    writer.flush()?;
    drop(writer);
    interruption::step();
    file.sync_all()
}

/// The file that `path` names: itself, or what it links to.
fn target(path: &Path) -> Result<PathBuf> {
    let refused = |found: &str| Error::File {
        path: path.into(),
        field: "file".into(),
        expected: "a file, or nothing".into(),
        found: found.into(),
    };
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(path.into()) };
    let resolved = match metadata.is_symlink() {
        true => fs::canonicalize(path).map_err(|_| refused("a link to nothing"))?,
        false => path.into(),
    };
    match fs::metadata(&resolved).map_err(Error::io(path))?.file_type() {
        kind if kind.is_file() => Ok(resolved),
        kind if kind.is_dir() => Err(refused("a folder")),
        _ => Err(refused("a device or a pipe")),
    }
}

/// The file in the making, locked.
fn open(path: &Path, fresh: &Path) -> Result<File> {
    let start = Instant::now();
    loop {
        match hold(fresh).map_err(Error::io(path))? {
            Some(file) => return Ok(file),
            None if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(5)),
            None => {
                return Err(Error::File {
                    path: path.into(),
                    field: "lock".into(),
                    expected: "a file that no other process is writing".into(),
                    found: "one that is still being written".into(),
                });
            }
        }
    }
}

/// Finds out whether [`write_atomically`] can write `path`: before the work whose result is to go there.
///
/// # Errors
/// As [`write_atomically`].
pub fn check_writable(path: &Path) -> Result<()> {
    let fresh = beside(&target(path)?, ".kiln-new");
    let file = open(path, &fresh)?;
    fs::remove_file(&fresh).map_err(Error::io(path))?;
    drop(file);
    Ok(())
}

/// Waits until the names in a folder are on the disk.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    interruption::step();
    // Elsewhere folders can't be opened.
    #[cfg(unix)]
    File::open(folder)?.sync_all()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, "old").unwrap();
        let error = write_atomically(&path, |file| {
            file.write_all(&[0; 100_000])?;
            Err(io::ErrorKind::StorageFull.into())
        })
        .unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_what_is_no_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("real"), "old").unwrap();
        let link = |to: &Path, name: &str| std::os::unix::fs::symlink(to, at(name)).unwrap();
        link(&at("real"), "link");
        link(&at("nothing"), "dangling");
        link(Path::new("/dev/null"), "device");
        write_atomically(&at("link"), |file| file.write_all(b"new")).unwrap();
        assert!(fs::symlink_metadata(at("link")).unwrap().is_symlink());
        assert_eq!(fs::read(at("real")).unwrap(), b"new");
        let cases = [(at("dangling"), "a link to nothing"), (at("device"), "a device"), (at(""), "a folder")];
        for (path, found) in cases.into_iter().chain([("/dev/null".into(), "a device")]) {
            for result in [write_atomically(&path, |_| Ok(())), check_writable(&path)] {
                let message = result.unwrap_err().to_string();
                assert!(
                    message.contains(&format!("expected a file, or nothing, found {found}")),
                    "{message}"
                );
            }
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
    }

    #[test]
    fn a_place_is_probed_without_a_trace() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("f")).unwrap();
        assert!(check_writable(&folder.path().join("missing/f")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn writers_of_one_file_take_turns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::thread::scope(|scope| {
            for writer in 0..4u8 {
                let path = &path;
                scope.spawn(move || {
                    for _ in 0..20 {
                        write_atomically(path, |file| file.write_all(&[writer; 10_000])).unwrap();
                        let found = fs::read(path).unwrap();
                        assert!(found.len() == 10_000 && found.iter().all(|byte| *byte == found[0]));
                    }
                });
            }
        });
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn written_files_have_the_mode_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let (plain, ours) = (folder.path().join("plain"), folder.path().join("ours"));
        std::fs::write(&plain, "").unwrap();
        write_atomically(&ours, |_| Ok(())).unwrap();
        let mode = |path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
