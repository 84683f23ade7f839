//! Files that tests read.

use std::path::PathBuf;

/// A path below the repository's `testdata`.
pub fn testdata(path: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata")).join(path)
}

/// The folder of the embedded model, a LLaMA of 2 M parameters.
pub fn tiny() -> PathBuf {
    testdata("models/tiny-llama")
}

/// Token ids of a file of `testdata` that holds 16 bits each, little-endian.
///
/// # Panics
/// If there is no such file, or its length is odd.
pub fn u16le(path: &str) -> Vec<u32> {
    let bytes = std::fs::read(testdata(path)).unwrap_or_else(|error| panic!("testdata/{path}: {error}"));
    let (ids, rest) = bytes.as_chunks();
    assert!(rest.is_empty(), "testdata/{path}: an odd number of bytes, {}", bytes.len());
    ids.iter().map(|id| u32::from(u16::from_le_bytes(*id))).collect()
}

/// Token ids of a text of the embedded model, named without its folder and ending.
///
/// # Panics
/// Like [`u16le`].
pub fn ids(text: &str) -> Vec<u32> {
    u16le(&format!("models/tiny-llama/text/{text}.u16le"))
}

/// SmolLM2's file, which the variable `KILN_SMOLLM2` names; `None`, said on the terminal, where it doesn't.
///
/// # Panics
/// If there is no such file; if the variable isn't set although `KILN_REQUIRE_SMOLLM2=1`.
pub fn smollm2() -> Option<PathBuf> {
    let Some(path) = std::env::var_os("KILN_SMOLLM2").map(PathBuf::from) else {
        assert!(!required("KILN_REQUIRE_SMOLLM2"), "KILN_REQUIRE_SMOLLM2=1, but KILN_SMOLLM2 names no file");
        crate::skipped("KILN_SMOLLM2 names no file");
        return None;
    };
    assert!(path.is_file(), "KILN_SMOLLM2={}: no such file", path.display());
    Some(path)
}

/// Whether a variable says that what may be missing must be there.
pub(crate) fn required(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "1")
}
