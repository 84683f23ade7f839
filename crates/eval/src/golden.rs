//! The specification's reference data, for the unit tests.

use serde_json::Value;

/// The lines of `testdata/eval/harness.jsonl`.
pub(crate) fn lines() -> Vec<Value> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/eval/harness.jsonl");
    let text = std::fs::read_to_string(path).expect("the reference data");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// The result of a single function.
pub(crate) fn vector(name: &str) -> Value {
    let line = lines().into_iter().find(|line| line["vector"] == name);
    line.unwrap_or_else(|| panic!("no line {name}"))["value"].clone()
}
