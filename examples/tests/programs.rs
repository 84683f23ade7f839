//! Every program on the embedded model, as a person would call it. They take minutes, and cargo builds programs only
//! when asked for all targets, so these tests run on request:
//!
//! ```sh
//! cargo build --release -p kiln-examples --examples
//! cargo test --release -p kiln-examples --test programs -- --ignored
//! ```
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

/// Where cargo puts the programs: beside the folder of this test.
fn path_of(program: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    let folder = test.ancestors().nth(2).expect("cargo's target folder");
    folder.join("examples").join(format!("{program}{}", std::env::consts::EXE_SUFFIX))
}

fn call(program: &str, arguments: &[&str]) -> Output {
    let path = path_of(program);
    println!("{program} {}", arguments.join(" "));
    Command::new(&path).args(arguments).output().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Runs a program that must succeed; what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = call(program, arguments);
    let [printed, errors] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "{program}: {}\n{printed}\n{errors}", output.status);
    println!("{printed}");
    printed
}

/// Runs a program that must succeed; the figures that it wrote.
fn figures(folder: &TempDir, program: &str, arguments: &[&str]) -> Value {
    let file = folder.path().join(format!("{program}.json"));
    run(program, &[arguments, &["--json", text(&file)]].concat());
    serde_json::from_slice(&std::fs::read(&file).expect("a file of figures")).expect("JSON")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

fn number(figures: &Value, key: &str) -> f64 {
    figures[key].as_f64().unwrap_or_else(|| panic!("no number \"{key}\" in {figures}"))
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn quantizing_writes_a_file_that_is_smaller_than_the_checkpoint() {
    let folder = folder();
    let packed = folder.path().join("packed.safetensors");
    figures(&folder, "01-quantize", &["--out", text(&packed)]);
    let checkpoint = kiln_examples::embedded_model().join("model.safetensors");
    let size = |path: &Path| std::fs::metadata(path).expect("a file").len();
    assert!(size(&packed) < size(&checkpoint) / 2, "{} bytes", size(&packed));
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn fine_tuning_halves_the_perplexity_and_others_read_the_adapter() {
    let folder = folder();
    let run_folder = folder.path().join("run");
    let tuned = figures(&folder, "03-finetune", &["--out", text(&run_folder)]);
    let [before, after] = ["perplexity_before", "perplexity_after"].map(|key| number(&tuned, key));
    assert!(after < 0.5 * before, "perplexity {before} -> {after}");
    let adapter = run_folder.join("adapter");
    run("02-perplexity", &["--scheme", "affine4:64", "--adapter", text(&adapter), "--max-windows", "8"]);
    let generated =
        run("04-generate", &["--max-new-tokens", "16", "--adapter", text(&adapter), "--prompt", "The whale"]);
    assert!(generated.contains("The whale"), "{generated}");
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn an_exact_merge_is_exact_in_every_file() {
    let folder = folder();
    let export = folder.path().join("export");
    // The merge is exact; products of rounded operands differ by their rounding.
    let merged = figures(&folder, "06-merge-and-export", &["--compute", "f32", "--out", text(&export)]);
    assert!(number(&merged, "adapter_shift") >= 0.01, "the adapter moved something: {merged}");
    assert!(number(&merged, "merge_error") <= 1e-3, "{merged}");
    for key in ["codes_changed", "gguf_weight_max_difference", "mlx_weight_max_difference"] {
        assert_eq!(number(&merged, key), 0.0, "{key}: {merged}");
    }
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn the_other_programs_run_without_arguments() {
    let folder = folder();
    for program in ["02-perplexity", "07-apiq", "08-side-tuning", "09-evaluate", "10-prune-then-tune"] {
        figures(&folder, program, &[]);
    }
    figures(&folder, "11-automixq", &["--out", text(&folder.path().join("automixq"))]);
    run("05-your-own-burn-model", &[]);
    run("logits", &[]);
}

#[test]
#[ignore = "needs the programs built"]
fn errors_are_sentences_and_exit_with_1_and_wrong_options_with_2() {
    let output = call("02-perplexity", &["--model", "no/such/model"]);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.starts_with("error: no/such/model"), "{errors}");
    assert!(!errors.contains("Error {") && !errors.contains("Os {"), "no debug form: {errors}");
    let output = call("02-perplexity", &["--no-such-option"]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}
