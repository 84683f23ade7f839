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
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
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
    let out = folder.path().join("automixq");
    let mixed = figures(&folder, "11-automixq", &["--out", text(&out)]);
    assert!(number(&mixed, "accuracy_after") > number(&mixed, "accuracy_before"), "{mixed}");
    // What it keeps is what it measured.
    let (model, adapter, letters) =
        (out.join("model"), out.join("adapter"), kiln_examples::testdata("eval/letters.json"));
    let arguments =
        ["--model", text(&model), "--adapter", text(&adapter), "--tasks", text(&letters), "--shots", "0"];
    let again = figures(&self::folder(), "09-evaluate", &arguments);
    let again = number(&again["results"]["letters"]["acc"], "value");
    // Rows go through the model in other company, which may turn one of 86 answers that was a toss-up.
    assert!((again - number(&mixed, "accuracy_after")).abs() < 0.012, "{again}: {mixed}");
    run("05-your-own-burn-model", &[]);
    run("logits", &[]);
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn instructions_and_preferences_are_learned_and_curves_drawn() {
    let folder = folder();
    let out = folder.path().join("instruct");
    let letters = kiln_examples::testdata("eval/quiz/quiz_letters.json");
    let asked = ["--tasks", text(&letters), "--task-limit", "40"];
    let found = figures(&folder, "12-instruct", &[&["--out", text(&out)][..], &asked].concat());
    let answers = found["tasks"]["quiz_letters acc"].as_array().expect("accuracies");
    assert!(answers.iter().all(|pair| pair[1].as_f64().is_some_and(|share| (0.0..=1.0).contains(&share))));
    assert!(
        answers.len() > 1 && number(&found, "validation_after") < 0.5 * number(&found, "validation_before"),
        "{found}"
    );
    let adapter = out.join("adapter");
    run("02-perplexity", &["--adapter", text(&adapter), "--max-windows", "4"]);
    let metrics = std::fs::read_to_string(out.join("figures/metrics.jsonl")).expect("figures");
    let steps = metrics.lines().filter(|line| line.starts_with(r#"{"event":"step""#)).count();
    assert_eq!(steps as f64, number(&found, "steps"));
    let preferences = folder.path().join("preferences");
    let found = figures(&folder, "13-preferences", &["--out", text(&preferences)]);
    assert!(number(&found, "accuracy_after") >= 0.9, "{found}");
    assert!(number(&found, "validation_after") < 0.5 * number(&found, "loss_first"), "{found}");
    // A run that is done has nothing left to do, and writes the same adapter.
    let adapter = preferences.join("adapter/adapter_model.safetensors");
    let before = std::fs::read(&adapter).expect("an adapter");
    let again = figures(&self::folder(), "13-preferences", &["--out", text(&preferences), "--resume"]);
    assert!(again["steps"].is_null(), "{again}");
    assert!(std::fs::read(&adapter).expect("an adapter") == before, "another adapter");
    for out in [out, preferences] {
        let curve = std::fs::read_to_string(out.join("loss.svg")).expect("a curve");
        assert!(curve.starts_with("<svg") && curve.contains("held out"));
    }
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn ranks_share_a_run_to_the_bit_and_a_killed_one_goes_on_with_fewer() {
    let folder = folder();
    let short = ["--steps", "30", "--every", "2", "--gptq", "affine3:64"];
    let run_of = |ranks: &str| {
        let out = folder.path().join(ranks);
        let found = figures(
            &folder,
            "15-data-parallel",
            &[&short[..], &["--ranks", ranks, "--out", text(&out)]].concat(),
        );
        (found, std::fs::read(out.join("adapter/adapter_model.safetensors")).expect("an adapter"))
    };
    let (alone, adapter) = run_of("1");
    let (shared, of_two) = run_of("2");
    assert_eq!(alone["losses"], shared["losses"]);
    assert_eq!(alone["validation"], shared["validation"]);
    assert!(adapter == of_two);
    if !cfg!(feature = "mpi") {
        return;
    }
    // Processes, of which one is killed as soon as there is a checkpoint; the other goes on alone.
    let out = folder.path().join("mpi");
    let arguments = [&short[..], &["--ranks", "mpi", "--out", text(&out)]].concat();
    let mut command = Command::new("mpirun");
    command
        .args(["--allow-run-as-root", "--oversubscribe", "-n", "2"])
        .arg(path_of("15-data-parallel"))
        .args(&arguments);
    let mut ranks = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("mpirun, of Open MPI");
    let begin = Instant::now();
    while !out.join("last/state.json").exists() && begin.elapsed() < Duration::from_secs(120) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let children = Command::new("pgrep").args(["-P", &ranks.id().to_string()]).output().expect("pgrep");
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    let victim = children.lines().last().expect("a rank");
    Command::new("kill").args(["-KILL", victim]).status().expect("kill");
    let killed = Instant::now();
    assert!(!ranks.wait().expect("an end").success());
    assert!(killed.elapsed() < Duration::from_secs(60));
    run("15-data-parallel", &[&short[..], &["--ranks", "1", "--resume", "--out", text(&out)]].concat());
    assert!(std::fs::read(out.join("adapter/adapter_model.safetensors")).expect("an adapter") == adapter);
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn a_model_is_pruned_quantized_and_tuned_on_a_task_and_answers_the_same_when_it_is_loaded() {
    let folder = folder();
    let out = folder.path().join("pipeline");
    let found = figures(&folder, "14-pipeline", &["--out", text(&out)]);
    assert!(number(&found, "accuracy_after") > number(&found, "accuracy_before") + 0.1, "{found}");
    assert_eq!(found["answers_equal_after_reload"], true, "{found}");
    // Tables are stored in f32, where the checkpoint has 16 bits.
    assert!(number(&found, "stored_bytes") < number(&found, "original_bytes"), "{found}");
    let [model, adapter] = ["model", "adapter"].map(|name| out.join(name));
    let both = ["--model", text(&model), "--adapter", text(&adapter)];
    run("02-perplexity", &[&both[..], &["--max-windows", "4"]].concat());
    run("04-generate", &[&both[..], &["--prompt", "The whale"]].concat());
    let task = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/eval/letters.json");
    let again = figures(&folder, "09-evaluate", &[&both[..], &["--tasks", text(&task)]].concat());
    let accuracy = again["results"]["letters"]["acc"]["value"].as_f64().expect("an accuracy");
    assert!((accuracy - number(&found, "accuracy_after")).abs() < 1e-9, "{again}");
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

/// A small fine-tune.
const SMALL: [&str; 8] = ["--batch", "1", "--seq-len", "32", "--rank", "2", "--window", "32"];

fn start(program: &str, arguments: &[&str]) -> Child {
    let path = path_of(program);
    let mut command = Command::new(&path);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn of_two_processes_on_one_folder_one_wins_and_the_other_says_so() {
    for pair in 0..4 {
        let folder = folder();
        let out = folder.path().join("run");
        let arguments = |seed: &'static str| {
            [&SMALL[..], &["--steps", "3", "--save-every", "1", "--seed", seed, "--out", text(&out)]].concat()
        };
        let both = ["1", "2"].map(|seed| start("03-finetune", &arguments(seed)));
        let both = both.map(|child| child.wait_with_output().expect("an end"));
        let won: Vec<usize> = (0..2).filter(|&index| both[index].status.success()).collect();
        assert_eq!(won.len(), 1, "{pair}: {} {}", errors(&both[0]), errors(&both[1]));
        let lost = errors(&both[1 - won[0]]);
        assert!(
            lost.contains("expected a place that no other process writes to, found one that process"),
            "{lost}"
        );
        // What is there is whole and the winner's: it goes on.
        let seed = ["1", "2"][won[0]];
        run("03-finetune", &[&arguments(seed)[..], &["--resume"]].concat());
    }
}

#[cfg(unix)]
#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn a_signal_ends_a_run_after_its_step_with_a_checkpoint_that_goes_on() {
    for signal in ["-INT", "-TERM"] {
        let folder = folder();
        let out = folder.path().join("run");
        let arguments = [&SMALL[..], &["--steps", "2000", "--out", text(&out)]].concat();
        let mut child = start("03-finetune", &arguments);
        // A line before the first step says that training begins.
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        assert!(lines.any(|line| line.expect("a line").starts_with("training")));
        std::thread::sleep(Duration::from_millis(300));
        let sent = Command::new("kill").args([signal, &child.id().to_string()]).status();
        assert!(sent.expect("kill").success());
        let output = child.wait_with_output().expect("an end");
        let message = errors(&output);
        assert_eq!(output.status.code(), Some(130), "{message}");
        assert!(message.contains("stopped after") && message.contains("--resume goes on"), "{message}");
        let state = std::fs::read(out.join("last/state.json")).expect("a checkpoint");
        let state: Value = serde_json::from_slice(&state).expect("JSON");
        let done = state["step"].as_u64().expect("a number");
        assert!((1..2000).contains(&done), "{done}");
        let mut child = start("03-finetune", &[&arguments[..], &["--resume"]].concat());
        std::thread::sleep(Duration::from_millis(1500));
        assert!(child.try_wait().expect("a process").is_none(), "it goes on");
        child.kill().expect("an end");
        child.wait().expect("an end");
    }
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn what_cannot_be_written_is_said_before_the_work() {
    let folder = folder();
    let file = folder.path().join("file");
    std::fs::write(&file, "mine").expect("a file");
    let (below, missing) = (file.join("below"), folder.path().join("no/where.json"));
    for (program, arguments) in [
        ("03-finetune", ["--out", text(&below)]),
        ("06-merge-and-export", ["--out", text(&below)]),
        ("08-side-tuning", ["--out", text(&below)]),
        ("10-prune-then-tune", ["--out", text(&below)]),
        ("11-automixq", ["--out", text(&below)]),
        ("12-instruct", ["--out", text(&below)]),
        ("13-preferences", ["--out", text(&below)]),
        ("14-pipeline", ["--out", text(&below)]),
        ("01-quantize", ["--out", text(&below)]),
        ("02-perplexity", ["--json", text(&missing)]),
        ("07-apiq", ["--json", text(&missing)]),
        ("09-evaluate", ["--json", text(&missing)]),
        ("01-quantize", ["--out", "/dev/null"]),
    ] {
        let (begin, output) = (Instant::now(), call(program, &arguments));
        let message = errors(&output);
        assert_eq!(output.status.code(), Some(1), "{program}: {message}");
        assert!(output.stdout.is_empty() && message.starts_with("error: "), "{program}: {message}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{program}");
    }
    assert_eq!(std::fs::read(&file).expect("a file"), b"mine");
}

#[test]
#[ignore = "takes minutes, and needs the programs built"]
fn a_closed_pipe_loses_nothing() {
    let folder = folder();
    let out = folder.path().join("run");
    let mut child = start("03-finetune", &[&SMALL[..], &["--steps", "2", "--out", text(&out)]].concat());
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("an end");
    let message = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("not all could be printed") && !message.contains("panicked"), "{message}");
    assert!(out.join("adapter/adapter_model.safetensors").exists());
}
