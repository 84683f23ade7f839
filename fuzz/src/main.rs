//! Mutated files through every reader: no panic, no abort, no hang, no allocation beyond four times the input and 64 MB.
//!
//! Files that are right are changed at random, so that most of what a reader checks is reached; a run is repeated by its
//! number. Runs are made in a child process: what kills it is the finding of the run it was at.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

mod mutate;
mod targets;

use std::{
    collections::BTreeMap,
    fs,
    io::{Seek, SeekFrom, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser;
use mutate::{Draw, mutated};
use peak_alloc::PeakAlloc;
use targets::{Seed, TARGETS, Target};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// Longest time of a run.
const PATIENCE: Duration = Duration::from_secs(10);
/// What a run may allocate beside four times its input.
const ALLOWED: usize = 64 << 20;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
#[command(about)]
struct Options {
    /// What is read; everything if left out.
    targets: Vec<String>,
    /// Runs of each target.
    #[arg(long, default_value_t = 1000)]
    runs: u64,
    /// The first run's number.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Most seconds for each target; runs end then.
    #[arg(long, default_value_t = u64::MAX)]
    seconds: u64,
    /// Gets the files of runs that failed.
    #[arg(long, default_value = "target/kiln-fuzz")]
    out: PathBuf,
    /// Internal: makes the runs, and writes the number of each into this file.
    #[arg(long, hide = true)]
    progress: Option<PathBuf>,
}

/// The seeds on disk, of which one file at a time is another.
struct Cases {
    seeds: Vec<Seed>,
    folders: Vec<tempfile::TempDir>,
}

impl Cases {
    fn of(target: &Target) -> Result<Self> {
        let seeds = (target.seeds)();
        let folders = seeds.iter().map(|_| tempfile::tempdir()).collect::<std::io::Result<Vec<_>>>()?;
        for (Seed(files), folder) in seeds.iter().zip(&folders) {
            for (name, bytes) in files {
                fs::write(folder.path().join(name), bytes)?;
            }
        }
        Ok(Self { seeds, folders })
    }

    /// Which seed and which of its files the run changes, and into what.
    fn case(&self, run: u64) -> (usize, usize, Vec<u8>) {
        let mut draw = Draw::new(run);
        let seed = draw.below(self.seeds.len());
        let files = &self.seeds[seed].0;
        let file = draw.below(files.len());
        let others = &self.seeds[draw.below(self.seeds.len())].0;
        let other = &others[draw.below(others.len())].1;
        (seed, file, mutated(&files[file].1, other, &mut draw))
    }

    fn path(&self, seed: usize, file: usize) -> PathBuf {
        self.folders[seed].path().join(&self.seeds[seed].0[file].0)
    }

    /// Makes a run; says what it found.
    fn run(&self, target: &Target, run: u64) -> Result<Option<String>> {
        let (seed, file, bytes) = self.case(run);
        let whole: usize =
            self.seeds[seed].0.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + bytes.len();
        fs::write(self.path(seed, file), &bytes)?;
        let folder = self.folders[seed].path();
        let before = ALLOCATOR.current_usage();
        ALLOCATOR.reset_peak_usage();
        let result = catch_unwind(AssertUnwindSafe(|| (target.read)(folder)));
        let grown = ALLOCATOR.peak_usage().saturating_sub(before);
        // What a reader left beside its files goes too.
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            if !self.seeds[seed].0.iter().any(|(name, _)| path.file_name() == Some(name.as_ref())) {
                let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
            }
        }
        fs::write(self.path(seed, file), &self.seeds[seed].0[file].1)?;
        Ok(match result {
            Err(_) => Some("a panic".into()),
            Ok(()) if grown > 4 * whole + ALLOWED => Some(format!("{grown} bytes for {whole}")),
            Ok(()) => None,
        })
    }

    /// Keeps the files of a run.
    fn keep(&self, target: &Target, run: u64, out: &Path) -> Result<PathBuf> {
        let (seed, file, bytes) = self.case(run);
        let folder = out.join(format!("{}-{run}", target.name));
        fs::create_dir_all(&folder)?;
        for (index, (name, original)) in self.seeds[seed].0.iter().enumerate() {
            fs::write(folder.join(name), if index == file { &bytes } else { original })?;
        }
        Ok(folder)
    }
}

fn target(name: &str) -> Result<&'static Target> {
    let known = || TARGETS.iter().map(|target| target.name).collect::<Vec<_>>().join(", ");
    TARGETS
        .iter()
        .find(|target| target.name == name)
        .ok_or_else(|| format!("{name}: expected one of {}", known()).into())
}

/// The child: makes runs one after the other. A panic that the library catches is counted, by its place.
fn child(options: &Options, progress: &Path) -> Result<()> {
    static CAUGHT: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());
    static STARTED: AtomicU64 = AtomicU64::new(0);
    let target = target(&options.targets[0])?;
    let cases = Cases::of(target)?;
    let begin = Instant::now();
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(String::new, ToString::to_string);
        *CAUGHT.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).entry(place).or_insert(0) += 1;
    }));
    let millis = move || begin.elapsed().as_millis() as u64;
    STARTED.store(millis(), Ordering::Relaxed);
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(200));
            if millis().saturating_sub(STARTED.load(Ordering::Relaxed)) > PATIENCE.as_millis() as u64 {
                eprintln!("a hang");
                std::process::abort();
            }
        }
    });
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).open(progress)?;
    let mut done = 0;
    for run in options.first..options.first.saturating_add(options.runs) {
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&run.to_le_bytes())?;
        STARTED.store(millis(), Ordering::Relaxed);
        if let Some(finding) = cases.run(target, run)? {
            println!("finding {run} {finding}");
        }
        done += 1;
        if begin.elapsed().as_secs() >= options.seconds {
            break;
        }
    }
    println!("done {done}");
    for (place, count) in CAUGHT.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).iter() {
        println!("panics {count} {place}");
    }
    Ok(())
}

/// The parent: starts children until all runs are made; counts what failed.
fn fuzz(options: &Options, target: &Target) -> Result<u64> {
    let start = Instant::now();
    let work = tempfile::tempdir()?;
    let progress = work.path().join("progress");
    let (mut first, end) = (options.first, options.first.saturating_add(options.runs));
    let (mut done, mut failed, mut panics) = (0, 0, BTreeMap::<String, u64>::new());
    let cases = Cases::of(target)?;
    while first < end && start.elapsed().as_secs() < options.seconds {
        let output = Command::new(std::env::current_exe()?)
            .arg(target.name)
            .args(["--runs", &(end - first).to_string(), "--first", &first.to_string()])
            .args(["--seconds", &options.seconds.saturating_sub(start.elapsed().as_secs()).to_string()])
            .arg("--progress")
            .arg(&progress)
            .stderr(Stdio::piped())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        for line in text.lines() {
            let (kind, rest) = line.split_once(' ').unwrap_or((line, ""));
            match kind {
                "finding" => {
                    let (run, what) = rest.split_once(' ').unwrap_or((rest, ""));
                    println!(
                        "{}: run {run}: {what}: {}",
                        target.name,
                        cases.keep(target, run.parse()?, &options.out)?.display()
                    );
                    failed += 1;
                }
                "done" => done += rest.parse::<u64>()?,
                "panics" => {
                    let (count, place) = rest.split_once(' ').unwrap_or(("1", rest));
                    *panics.entry(place.into()).or_insert(0) += count.parse::<u64>()?;
                }
                _ => {}
            }
        }
        if output.status.success() {
            break;
        }
        let run = u64::from_le_bytes(fs::read(&progress)?.try_into().map_err(|_| "the child didn't begin")?);
        let last = String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned();
        println!(
            "{}: run {run}: {}, {last}: {}",
            target.name,
            output.status,
            cases.keep(target, run, &options.out)?.display()
        );
        failed += 1;
        done += run + 1 - first;
        first = run + 1;
    }
    println!("{:<18} {done:>8} runs, {failed} failed, {:>4} s", target.name, start.elapsed().as_secs());
    for (place, count) in panics {
        println!("{:<18} {count} panics caught at {place}", "");
    }
    Ok(failed)
}

fn run(options: &Options) -> Result<bool> {
    if let Some(progress) = &options.progress {
        child(options, progress)?;
        return Ok(true);
    }
    let chosen = match options.targets.is_empty() {
        true => TARGETS.iter().collect(),
        false => options.targets.iter().map(|name| target(name)).collect::<Result<Vec<_>>>()?,
    };
    let mut failed = 0;
    for target in chosen {
        failed += fuzz(options, target)?;
    }
    Ok(failed == 0)
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
