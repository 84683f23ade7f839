//! The same between processes: each test starts this binary again under `mpirun`, as ranks that run a test that is ignored
//! otherwise.

use std::{
    process::{Command, Output},
    time::{Duration, Instant},
};

use kiln_distributed::{Communicator, Mpi, PairwiseSum, share, sum};

/// By the program that `KILN_MPIRUN` names with its options; by Open MPI's without it.
fn mpirun(ranks: usize, test: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let start = std::env::var("KILN_MPIRUN");
    let start = start.as_deref().unwrap_or("mpirun --allow-run-as-root --oversubscribe");
    let mut words = start.split_whitespace();
    let mut command = Command::new(words.next().expect("a program that starts ranks"));
    command.args(words).args(["-n", &ranks.to_string()]);
    command.arg(program).args([test, "--exact", "--ignored", "--nocapture"]);
    command.output().unwrap_or_else(|error| panic!("{start}: {error}"))
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr].concat().iter().map(|byte| char::from(*byte)).collect()
}

fn start(patience: u64) -> Mpi {
    Mpi::start(Duration::from_secs(patience)).unwrap()
}

#[test]
fn processes_say_the_same_as_threads() {
    for ranks in [1, 2, 3] {
        let output = mpirun(ranks, "mpi::rank_that_says_everything");
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(text(&output).matches("1 passed").count(), ranks);
    }
}

#[test]
#[ignore = "a rank of another test"]
fn rank_that_says_everything() {
    let ranks = start(60);
    let (me, size) = (ranks.rank(), ranks.size());
    assert!(Mpi::start(Duration::ZERO).unwrap_err().to_string().contains("started in this process before"));
    for round in 0..20 {
        let parts = (0..size).map(|to| vec![me as u8; round * to]).collect();
        let expected: Vec<Vec<u8>> = (0..size).map(|from| vec![from as u8; round * me]).collect();
        assert_eq!(ranks.all_to_all(parts).unwrap(), expected);
        assert_eq!(ranks.broadcast(vec![me as u8; round]).unwrap(), vec![0; round]);
    }
    let own = if me == size - 1 { Err("a reason".into()) } else { Ok(()) };
    let message = format!("rank {} failed: a reason", size - 1);
    assert_eq!(ranks.agree(own).unwrap_err().to_string(), message);

    const LENGTH: usize = 100_003;
    let term =
        |number: usize| (0..LENGTH).map(|i| ((i * 7919 + number * 104_729) % 1000) as f32 / 7.0).collect();
    let add = |a: Vec<f32>, b: Vec<f32>| a.into_iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f32>>();
    let (mut alone, mut own) = (PairwiseSum::new(0), PairwiseSum::new(share(7, me, size).start));
    (0..7).for_each(|number| alone.push(term(number), add));
    share(7, me, size).for_each(|number| own.push(term(number), add));
    assert_eq!(sum(&ranks, own, 7, LENGTH).unwrap(), alone.finish(add).unwrap());
}

#[test]
fn a_process_that_is_killed_ends_the_others() {
    let started = Instant::now();
    let output = mpirun(3, "mpi::rank_that_is_killed");
    assert!(!output.status.success());
    assert!(!text(&output).contains("1 passed"), "{}", text(&output));
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
#[ignore = "a rank of another test"]
fn rank_that_is_killed() {
    let ranks = start(600);
    ranks.agree(Ok(())).unwrap();
    if ranks.rank() == 1 {
        let own = std::process::id().to_string();
        Command::new("kill").args(["-KILL", &own]).status().unwrap();
    }
    ranks.agree(Ok(())).unwrap();
}

#[test]
fn a_process_that_does_not_answer_is_given_up() {
    let started = Instant::now();
    let output = mpirun(2, "mpi::rank_that_hangs");
    assert!(!output.status.success());
    assert!(text(&output).contains("rank 0 of 2: a rank didn't answer after 2."), "{}", text(&output));
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
#[ignore = "a rank of another test"]
fn rank_that_hangs() {
    let ranks = start(2);
    if ranks.rank() == 1 {
        std::thread::sleep(Duration::from_secs(600));
    }
    let error = ranks.agree(Ok(())).unwrap_err();
    // The process has more to do before it ends; its error comes at once from now on.
    assert!(ranks.agree(Ok(())).is_err());
    panic!("{error}");
}
