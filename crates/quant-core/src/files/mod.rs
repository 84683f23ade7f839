//! Files and folders that appear whole or not at all, and by one writer at a time.
//!
//! Whatever is written goes to a place beside its own first, which has the same name behind a dot and an end that tells what
//! it is: `.NAME.kiln-new` (in the making), `.NAME.kiln-old` (what is being replaced), `.NAME.kiln-lock` (held by the
//! process that writes). What a killed process leaves of these is put back or removed by the next one that writes there.

mod atomic_file;
mod folder;
#[doc(hidden)]
pub mod interruption;
mod lock;

use std::path::{Path, PathBuf};

pub use atomic_file::{check_writable, write_atomically};
pub use folder::{NewFolder, whole_folder};
pub use lock::OutputFolder;

/// The place beside `path` with this end.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(end);
    path.with_file_name(name)
}

/// The folder that `path` is in.
fn parent(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
