//! k ranks are one rank with k times the micro-batches: the same bits, however the run is cut, and no rank waits for one that
//! is gone.

use std::{
    ops::ControlFlow,
    path::Path,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use burn::{module::Module, tensor::Device};
use kiln_models::{CausalLm, Recompute};
use kiln_training::{
    Communicator, Dataset, Error, Evaluation, Event, Observer, RunOptions, RunReport, Trainer, TrainerConfig,
    distributed::{Alone, threads},
    evaluate, evaluate_on,
};

use crate::trainer::{LoraModel, base, config, documents, dropout_model, losses, parameters};

fn parts() -> (Arc<Dataset>, Arc<Dataset>) {
    let (train, held_out) = Arc::unwrap_or_clone(documents()).split(0.25, 1).unwrap();
    (train.into(), held_out.into())
}

fn trainer(config: TrainerConfig) -> Trainer<LoraModel> {
    Trainer::new(dropout_model(), parts().0, config).unwrap()
}

/// `count` ranks in all, of which one is the trainer's own.
fn devices(count: usize) -> Vec<Device> {
    vec![Device::flex(); count - 1]
}

/// What each of `count` ranks finds that makes everything by itself, as processes do.
pub(crate) fn on_ranks<T: Send>(count: usize, work: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let ranks = threads(count, Duration::from_secs(120)).into_iter();
        let handles: Vec<_> = ranks.map(|rank| scope.spawn(move || work(Arc::new(rank)))).collect();
        handles.into_iter().map(|handle| handle.join().expect("a rank that ends well")).collect()
    })
}

type Figures = (Vec<u64>, Vec<u64>, Vec<u64>);

fn figures(report: &RunReport) -> Figures {
    let norms = report.steps.iter().map(|step| step.grad_norm.to_bits()).collect();
    let scores = report.evaluations.iter().map(|evaluation| evaluation.score.to_bits()).collect();
    (losses(&report.steps), norms, scores)
}

fn held_out() -> RunOptions {
    RunOptions::new().with_held_out(parts().1, 2)
}

#[test]
fn ranks_have_the_bits_of_one() {
    for recompute in [Recompute::None, Recompute::Block] {
        let config = || config(1, 4).with_recompute(recompute);
        let mut alone = trainer(config());
        let expected = figures(&alone.run(&held_out()).unwrap());
        for count in [2, 4] {
            let mut shared = trainer(config()).with_devices(&devices(count)).unwrap();
            assert_eq!(figures(&shared.run(&held_out()).unwrap()), expected, "{count} ranks");
            assert_eq!(parameters(shared.model()), parameters(alone.model()));
        }
        let found = on_ranks(2, |ranks| {
            let mut own = trainer(config()).with_ranks(ranks).unwrap();
            let found = figures(&own.run(&held_out()).unwrap());
            (found, parameters(own.model()), parameters(&own.into_best_model().train()))
        });
        let best = parameters(&alone.into_best_model().train());
        let last = found[0].1.clone();
        assert_eq!(found, vec![(expected.clone(), last, best); 2]);
    }
}

/// Numbers of micro-batches that aren't powers of two, and all parameters of a model, some without a gradient of their own.
#[test]
fn full_training_on_three_ranks_has_the_bits_of_one() {
    let run = |count: usize| {
        let model = base("tiny/llama-untied-bf16", None).unfreeze();
        let config = config(1, 6).with_steps(3).with_clip(Some(0.5));
        let trainer = Trainer::new(model, documents(), config).unwrap();
        let mut trainer = trainer.with_devices(&devices(count)).unwrap();
        let report = trainer.run(&RunOptions::new()).unwrap();
        (figures(&report), parameters(trainer.model()))
    };
    let expected = run(1);
    assert_eq!(run(2), expected);
    assert_eq!(run(3), expected);
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let mut whole = trainer(config(1, 4));
    let expected = whole.run(&held_out()).unwrap();
    let stopped = |count: usize, folder: &Path| {
        let mut steps = 0;
        let mut stop = |event: &Event<'_>| {
            steps += u64::from(matches!(event, Event::Step(_)));
            if steps == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let mut first = trainer(config(1, 4)).with_devices(&devices(count)).unwrap();
        first.run_with(&held_out().with_folder(folder), &mut stop).unwrap().steps.len()
    };
    for (before, after) in [(4, 1), (1, 2), (2, 4)] {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(stopped(before, folder.path()), 3);
        let last = folder.path().join("last");
        let second = trainer(config(1, 4)).with_devices(&devices(after)).unwrap();
        let mut second = second.resumed(&last).unwrap();
        let report = second.run(&held_out()).unwrap();
        assert_eq!(losses(&report.steps), losses(&expected.steps[3..]), "{before} ranks, then {after}");
        assert_eq!(parameters(second.model()), parameters(whole.model()));
        // Where the other ranks can't see the folder, too.
        let nowhere = folder.path().join("nowhere");
        let found = on_ranks(2, |ranks| {
            let folder = if ranks.rank() == 0 { &last } else { &nowhere };
            let mut second = trainer(config(1, 4)).with_ranks(ranks).unwrap().resumed(folder).unwrap();
            let best = second.best();
            second.run(&held_out()).unwrap();
            (best.map(f64::to_bits), parameters(&second.into_best_model().train()))
        });
        assert_eq!(found[0], found[1]);
        assert_eq!(found[0].0, Some(expected.evaluations[0].score.to_bits()));
    }
}

#[test]
fn the_first_rank_writes_and_the_others_do_not() {
    let folder = tempfile::tempdir().unwrap();
    let places = ["first", "second"].map(|name| folder.path().join(name));
    on_ranks(2, |ranks| {
        let place = &places[ranks.rank()];
        let options =
            held_out().with_folder(place).with_save_every(1).with_keep(1).with_metrics(place.join("metrics"));
        trainer(config(1, 2)).with_ranks(ranks).unwrap().run(&options).unwrap();
    });
    let written = ["last", "best", "step-6", "metrics/metrics.jsonl"];
    assert!(written.iter().all(|name| places[0].join(name).exists()));
    assert!(!places[0].join("step-5").exists() && !places[1].exists());
}

#[test]
fn ranks_that_differ_are_refused_by_name() {
    let other_config = config(1, 2).with_lr(1e-4);
    let other_data = || Trainer::new(dropout_model(), documents(), config(1, 2)).unwrap();
    type Make<'a> = Box<dyn Fn() -> Trainer<LoraModel> + Sync + 'a>;
    let named = || trainer(config(1, 2)).with_identity([("adapters".into(), "r=8".into())].into());
    let mut moved = trainer(config(1, 2));
    // The rate of the first step is 0.
    for _ in 0..2 {
        moved.step().unwrap();
    }
    let moved = moved.into_model();
    let cases: [(&str, Make<'_>); 4] = [
        (
            "rank 1: config.lr: expected 0.005, as rank 0 has, found 0.0001",
            Box::new(|| trainer(other_config.clone())),
        ),
        ("rank 1: data: expected", Box::new(other_data)),
        ("rank 1: adapters: expected nothing, as rank 0 has, found r=8", Box::new(named)),
        (
            "rank 1: trained parameters: expected",
            Box::new(|| Trainer::new(moved.clone(), parts().0, config(1, 2)).unwrap()),
        ),
    ];
    for (expected, make) in &cases {
        let found = on_ranks(2, |ranks| {
            let own = if ranks.rank() == 0 { trainer(config(1, 2)) } else { make() };
            own.with_ranks(ranks).map(|_| ()).unwrap_err().to_string()
        });
        assert!(found.iter().all(|found| found.starts_with(expected)), "{expected}: {found:?}");
    }
    let found = on_ranks(2, |ranks| {
        let every = if ranks.rank() == 0 { 2 } else { 3 };
        let options = RunOptions::new().with_held_out(parts().1, every);
        trainer(config(1, 2)).with_ranks(ranks).unwrap().run(&options).unwrap_err().to_string()
    });
    assert_eq!(found, ["rank 1: evaluate_every: expected 2, as rank 0 has, found 3"; 2]);
}

#[test]
fn micro_batches_that_can_not_be_dealt_out_are_refused() {
    let expected = "accumulate: expected a multiple of 3, the number of ranks, found 4";
    let error = trainer(config(1, 4)).with_devices(&devices(3)).unwrap_err();
    assert_eq!(error.to_string(), expected);
    let errors =
        on_ranks(3, |ranks| trainer(config(1, 4)).with_ranks(ranks).map(|_| ()).unwrap_err().to_string());
    assert_eq!(errors, [expected; 3]);
    // Alone one may always be.
    assert!(trainer(config(1, 3)).with_ranks(Arc::new(Alone)).is_ok());
}

/// Fails at rank 1, by an error or by a panic.
struct Ill {
    panics: bool,
    is_ill: bool,
}

impl Observer<LoraModel> for Ill {
    fn score(
        &mut self,
        _: &LoraModel,
        _: u64,
    ) -> Result<Option<f64>, Box<dyn std::error::Error + Send + Sync>> {
        match (self.is_ill, self.panics) {
            (false, _) => Ok(Some(1.0)),
            (true, false) => Err("the judge is ill".into()),
            (true, true) => std::panic::resume_unwind(Box::new("the judge is gone")),
        }
    }
}

#[test]
fn a_rank_that_fails_ends_all() {
    let started = Instant::now();
    for panics in [false, true] {
        let run = |ranks: Arc<dyn Communicator>| {
            let mut ill = Ill { panics, is_ill: ranks.rank() == 1 };
            let work = std::panic::AssertUnwindSafe(|| {
                let mut trainer = trainer(config(1, 2)).with_ranks(ranks).unwrap();
                trainer.run_with(&RunOptions::new().with_evaluations(2), &mut ill).unwrap_err()
            });
            std::panic::catch_unwind(work)
        };
        let found = on_ranks(2, run);
        match panics {
            false => {
                let own = found[1].as_ref().unwrap();
                assert!(matches!(own, Error::Observer(_)), "{own}");
                let heard = found[0].as_ref().unwrap().to_string();
                assert_eq!(heard, "rank 1 failed: the judge is ill");
            }
            true => {
                assert!(found[1].is_err());
                let heard = found[0].as_ref().unwrap().to_string();
                assert!(heard.contains("rank 1 has ended"), "{heard}");
            }
        }
    }
    assert!(started.elapsed() < Duration::from_secs(100));
}

#[test]
fn a_replica_whose_observer_panics_ends_the_run() {
    let mut shared = trainer(config(1, 2)).with_devices(&devices(2)).unwrap();
    let mut panics = |event: &Event<'_>| match event {
        Event::Step(report) if report.step == 1 => std::panic::resume_unwind(Box::new("enough")),
        _ => ControlFlow::Continue(()),
    };
    let work = std::panic::AssertUnwindSafe(|| shared.run_with(&RunOptions::new(), &mut panics));
    assert!(std::panic::catch_unwind(work).is_err());
}

/// A rank that panicked does nothing alone afterwards, such as training to the end and writing checkpoints.
#[test]
fn after_a_panic_no_rank_goes_on() {
    struct Breaks;
    impl Observer<LoraModel> for Breaks {
        fn on_event(&mut self, _: &Event<'_>) -> ControlFlow<()> {
            std::panic::resume_unwind(Box::new("enough"))
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let options = RunOptions::new().with_folder(folder.path());
    let mut shared = trainer(config(1, 2)).with_devices(&devices(2)).unwrap();
    let work = std::panic::AssertUnwindSafe(|| shared.run_with(&options, &mut Breaks));
    assert!(std::panic::catch_unwind(work).is_err());
    for _ in 0..2 {
        let error = shared.run(&options).unwrap_err();
        assert!(matches!(error, Error::Ranks(_)), "{error}");
    }
    assert!(!folder.path().join("last").exists());
}

#[test]
fn what_ranks_would_not_hear_of_is_refused() {
    let shared = || trainer(config(1, 2)).with_devices(&devices(2)).unwrap();
    let distilled = || {
        let loss = kiln_training::TokenLoss::new().with_distillation(kiln_training::Distillation::default());
        trainer(config(1, 2).with_loss(loss)).with_devices(&devices(2)).unwrap()
    };
    let errors = [
        shared().with_ranks(Arc::new(Alone)).map(|_| ()).unwrap_err(),
        shared().with_devices(&devices(2)).map(|_| ()).unwrap_err(),
        distilled().with_reference(dropout_model()).map(|_| ()).unwrap_err(),
    ];
    for (what, error) in ["ranks", "devices", "reference"].iter().zip(errors) {
        let expected = format!("{what}: expected a run that isn't shared yet: ");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}

#[test]
fn ranks_at_different_steps_are_refused() {
    let found = on_ranks(2, |ranks| {
        let mut own = trainer(config(1, 2));
        for _ in 0..=ranks.rank() {
            own.step().unwrap();
        }
        own.with_ranks(ranks).map(|_| ()).unwrap_err().to_string()
    });
    let expected =
        "rank 1: place in the data: expected Cursor { seed: 9, epoch: 0, position: 2 }, as rank 0 has";
    assert!(found.iter().all(|found| found.starts_with(expected)), "{found:?}");
}

#[test]
fn an_error_leaves_the_ranks_at_the_same_place() {
    let folder = tempfile::tempdir().unwrap();
    let busy = folder.path().join("busy");
    let _claim = kiln_quant_core::files::OutputFolder::claim(&busy).unwrap();
    let mut shared = trainer(config(1, 2)).with_devices(&devices(2)).unwrap();
    shared.run(&RunOptions::new().with_folder(&busy)).unwrap_err();
    let mut alone = trainer(config(1, 2));
    assert_eq!(figures(&shared.run(&held_out()).unwrap()), figures(&alone.run(&held_out()).unwrap()));
}

/// The first rank decides where a run ends.
#[test]
fn the_first_ranks_observer_counts() {
    struct Stops(bool, Vec<u64>);
    impl Observer<LoraModel> for Stops {
        fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
            if let Event::Step(report) = event {
                self.1.push(report.step);
            }
            if self.0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
        fn inspect(
            &mut self,
            _: &LoraModel,
            _: &Evaluation,
        ) -> Result<ControlFlow<()>, Box<dyn std::error::Error + Send + Sync>> {
            Ok(ControlFlow::Continue(()))
        }
    }
    for first_stops in [true, false] {
        let steps = on_ranks(2, |ranks| {
            let mut observer = Stops(first_stops == (ranks.rank() == 0), Vec::new());
            let mut own = trainer(config(1, 2)).with_ranks(ranks).unwrap();
            own.run_with(&RunOptions::new(), &mut observer).unwrap();
            observer.1.len()
        });
        assert_eq!(steps, [if first_stops { 1 } else { 6 }; 2]);
    }
}

#[test]
fn evaluation_is_shared_out_to_the_bit() {
    let (_, held_out) = parts();
    let model = dropout_model();
    for batch in [1, 2, 4] {
        let expected = evaluate(&model, &held_out, batch).unwrap();
        for count in [2, 3, 9] {
            let found = on_ranks(count, |ranks| {
                evaluate_on(&*ranks, &model.clone().fork(&model.device()), &held_out, batch).unwrap()
            });
            assert!(found.iter().all(|found| *found == expected), "{count} ranks, {batch} rows");
        }
    }
}

/// The same between processes: a test that starts this binary again under `mpirun`.
#[cfg(feature = "mpi")]
mod processes {
    use std::{path::PathBuf, process::Command};

    use kiln_training::distributed::Mpi;

    use super::*;

    const FOLDER: &str = "KILN_TEST_FOLDER";

    /// Runs the test `name` as `count` ranks, which find `folder` in their environment.
    fn mpirun(count: usize, name: &str, folder: &Path) -> String {
        let mut command = Command::new("mpirun");
        command.args(["--allow-run-as-root", "--oversubscribe", "-n", &count.to_string()]);
        command.arg(std::env::current_exe().unwrap()).args([name, "--exact", "--ignored", "--nocapture"]);
        let output = command.env(FOLDER, folder).output().expect("mpirun, of Open MPI");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{text}");
        text
    }

    #[test]
    fn processes_have_the_bits_of_one_rank() {
        let folder = tempfile::tempdir().unwrap();
        let mut alone = trainer(config(1, 4));
        let expected = figures(&alone.run(&held_out()).unwrap());
        alone.save(folder.path().join("alone")).unwrap();
        // Two processes make a half, four the other.
        mpirun(2, "ranks::processes::rank_of_a_run", folder.path());
        mpirun(4, "ranks::processes::rank_of_a_run", folder.path());
        let found = std::fs::read_to_string(folder.path().join("figures")).unwrap();
        let (losses, norms, scores) = &expected;
        let line = |values: &[u64]| format!("{values:?}");
        let halves = [0..3, 3..6].map(|half| line(&losses[half.clone()]) + &line(&norms[half]));
        let expected = format!("{}{}\n{}{}\n", halves[0], line(&scores[..1]), halves[1], line(&scores[1..]));
        assert_eq!(found, expected);
        let parameters =
            |name: &str| std::fs::read(folder.path().join(name).join("trainable.safetensors")).unwrap();
        assert_eq!(safe_values(&parameters("last")), safe_values(&parameters("alone")));
    }

    /// Values without the parameters' ids, which are drawn.
    fn safe_values(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let mut tensors: Vec<_> =
            file.tensors().into_iter().map(|(name, tensor)| (name, tensor.data().to_vec())).collect();
        tensors.sort();
        tensors
    }

    /// Makes three steps, going on from where others stopped.
    #[test]
    #[ignore = "a rank of another test"]
    fn rank_of_a_run() {
        use std::io::Write;

        let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
        let ranks: Arc<dyn Communicator> = Arc::new(Mpi::start(Duration::from_secs(120)).unwrap());
        let last = folder.join("last");
        let mut own = trainer(config(1, 4)).with_ranks(ranks.clone()).unwrap();
        if last.exists() {
            own = own.resumed(&last).unwrap();
        }
        let mut steps = 0;
        let mut stop = |event: &Event<'_>| {
            steps += u64::from(matches!(event, Event::Step(_)));
            if steps == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let report = own.run_with(&held_out().with_folder(&folder), &mut stop).unwrap();
        if ranks.rank() == 0 {
            let (losses, norms, scores) = figures(&report);
            let mut file =
                std::fs::File::options().create(true).append(true).open(folder.join("figures")).unwrap();
            writeln!(file, "{losses:?}{norms:?}{scores:?}").unwrap();
        }
    }
}
