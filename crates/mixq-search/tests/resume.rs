//! Searches that are killed, continued and shared.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::Ordering,
    thread,
    time::Duration,
};

use kiln_mixq_search::{Front, KlMix, METHODS, Nsga2, Outcome, SearchSettings, TrialLog, method, search};

use crate::common::{FULL, Synthetic, space};

const EVALUATIONS: usize = 40;

fn settings() -> SearchSettings {
    SearchSettings::new(EVALUATIONS, FULL).with_seed(5)
}

fn on_file(path: &Path, name: &str, model: &mut Synthetic) -> kiln_mixq_search::Result<Outcome> {
    let space = space(5);
    let mut log = TrialLog::open(path, &space, &format!("synthetic {}", model.model))?;
    search(&space, model, &mut log, &*method(name)?, &settings())
}

#[test]
fn a_search_killed_anywhere_ends_as_the_uninterrupted_one_without_measuring_twice() {
    let folder = tempfile::tempdir().unwrap();
    for name in METHODS {
        let whole = on_file(&folder.path().join(name), name, &mut Synthetic::new(1)).unwrap();
        let total = whole.trials.len();
        for dies_after in std::collections::BTreeSet::from([0, 1, total / 3, total - 1]) {
            let path = folder.path().join(format!("{name} {dies_after}"));
            let mut killed = Synthetic { dies_after, ..Synthetic::new(1) };
            let error = on_file(&path, name, &mut killed).unwrap_err();
            assert!(error.to_string().contains("killed"), "{error}");
            // Half of a line that was being written.
            let mut text = std::fs::read(&path).unwrap();
            text.extend(br#"{"config":[0,1"#);
            std::fs::write(&path, text).unwrap();

            let mut resumed = Synthetic::new(1);
            let outcome = on_file(&path, name, &mut resumed).unwrap();
            assert_eq!(outcome.front, whole.front, "{name} killed after {dies_after}");
            assert_eq!(outcome.hypervolume.to_bits(), whole.hypervolume.to_bits());
            assert_eq!(killed.calls() + resumed.calls(), total, "{name} killed after {dies_after}");
        }
    }
}

#[test]
fn a_log_cut_at_any_byte_resumes_to_the_same_front() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let whole = on_file(&path, "nsga2", &mut Synthetic::new(2)).unwrap();
    let text = std::fs::read(&path).unwrap();
    for cut in (0..text.len()).step_by(text.len() / 23) {
        std::fs::write(&path, &text[..cut]).unwrap();
        let outcome = on_file(&path, "nsga2", &mut Synthetic::new(2)).unwrap();
        assert_eq!(outcome.front, whole.front, "cut at {cut}");
    }
}

#[test]
fn a_larger_budget_continues() {
    let (space, mut model) = (space(6), Synthetic::new(3));
    let mut log = TrialLog::in_memory(&space);
    let reference = [space.largest() as f64, 2.0 * model.loss(&space.lowest())];
    let mut run = |evaluations| {
        let settings = SearchSettings::new(evaluations, FULL).with_reference(reference[0], reference[1]);
        let outcome =
            search(&space, &mut model, &mut log, &Nsga2 { population: 10, ..Nsga2::default() }, &settings);
        (outcome.unwrap(), model.calls.load(Ordering::SeqCst))
    };
    let (short, calls) = run(40);
    assert_eq!(calls, 40);
    let (long, calls) = run(100);
    assert_eq!(calls, 100, "the first 40 come from the log");
    assert_eq!(long.trials[..40], short.trials[..]);
    assert!(long.hypervolume >= short.hypervolume);
}

#[test]
fn workers_on_one_log_share_the_measurements() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["klmix", "nsga2", "random"] {
        let alone =
            on_file(&folder.path().join(format!("{name} alone")), name, &mut Synthetic::new(4)).unwrap();
        let path = folder.path().join(name);
        let work = || {
            let mut model = Synthetic { pause: Duration::from_millis(2), ..Synthetic::new(4) };
            let outcome = on_file(&path, name, &mut model).unwrap();
            (outcome, model.calls())
        };
        let ((first, a), (second, b)) = thread::scope(|scope| {
            let other = scope.spawn(work);
            (work(), other.join().unwrap())
        });
        assert_eq!(first.front, alone.front, "{name}");
        assert_eq!(second.front, alone.front, "{name}");
        assert_eq!(a + b, alone.trials.len(), "{name}: every trial is measured once");
        if name != "klmix" {
            assert!(a > 0 && b > 0, "{name}: {a} and {b}");
        }
        // Independent searches in one log: its front is at least as good as either's.
        let space = space(5);
        let log = TrialLog::open(&path, &space, "synthetic 4").unwrap();
        let all = Front::of_trials(&space, alone.front.direction, log.trials(), FULL, 0, None);
        assert_eq!(all, alone.front);
    }
}

const LOG: &str = "KILN_MIXQ_TEST_LOG";

/// The program that the next test starts and kills; as a test of its own it does nothing.
#[test]
fn child_process() {
    let Some(path) = std::env::var_os(LOG) else { return };
    let mut model = Synthetic { pause: Duration::from_millis(15), ..Synthetic::new(6) };
    on_file(Path::new(&path), "klmix", &mut model).unwrap();
}

fn child(path: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["resume::child_process", "--exact"])
        .env(LOG, path)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn processes_share_a_log_and_survive_a_kill() {
    let folder = tempfile::tempdir().unwrap();
    let whole = on_file(&folder.path().join("whole"), "klmix", &mut Synthetic::new(6)).unwrap();
    let path = folder.path().join("shared");
    let (mut first, mut second) = (child(&path), child(&path));
    let trials = || std::fs::read_to_string(&path).unwrap_or_default().lines().count().saturating_sub(1);
    while trials() < 8 {
        assert!(first.try_wait().unwrap().is_none() || second.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(2));
    }
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(trials() < whole.trials.len(), "killed before the end");
    assert!(second.wait().unwrap().success(), "the other goes on");
    let mut resumed = Synthetic::new(6);
    let outcome = on_file(&path, "klmix", &mut resumed).unwrap();
    assert_eq!(outcome.front, whole.front);
    assert_eq!(resumed.calls(), 0);
    assert_eq!(trials(), whole.trials.len());
}

#[test]
fn defaults_differ_between_methods_but_share_the_log() {
    // What one method measured is free for another.
    let (space, mut model) = (space(5), Synthetic::new(7));
    let mut log = TrialLog::in_memory(&space);
    search(&space, &mut model, &mut log, &KlMix::default(), &settings()).unwrap();
    let before = model.calls();
    let uniform = search(&space, &mut model, &mut log, &kiln_mixq_search::Uniform, &settings()).unwrap();
    assert_eq!(uniform.trials.len(), 4);
    assert_eq!(model.calls(), before);
}
