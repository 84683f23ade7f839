//! Ranks that are processes of MPI.

use std::{
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use mpi::{
    Count, Threading,
    datatype::{Partition, PartitionMut},
    environment::Universe,
    request::{LocalScope, Request},
    topology::SimpleCommunicator,
    traits::{Communicator as _, CommunicatorCollectives as _},
};

use crate::{
    Communicator, Error, Result,
    communicator::check_parts,
    link::{Answer, Link},
};

/// A rank that is a process, started by `mpirun`, `srun` or the like; a process that was started alone is the only rank.
///
/// A thread of its own talks to MPI, so that a rank that waits in vain gets an error after its patience, and not never.
/// The error ends the process in the end, and with that the launcher ends the others. Open MPI's and MPICH's launchers do
/// so too, at once, when a process is killed.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
/// use kiln_distributed::{Communicator, Mpi};
///
/// let ranks: Arc<dyn Communicator> = Arc::new(Mpi::start(Duration::from_secs(600))?);
/// println!("rank {} of {}", ranks.rank(), ranks.size());
/// # Ok::<(), kiln_distributed::Error>(())
/// ```
#[derive(Debug)]
pub struct Mpi {
    link: Link<Command>,
}

enum Command {
    AllToAll(Vec<Vec<u8>>),
    AllGather(Vec<u8>),
    Finish,
}

impl Mpi {
    /// Starts MPI. A rank that doesn't answer within `patience` is given up: it must cover the longest that one rank is
    /// alone at work, such as writing a checkpoint.
    ///
    /// # Errors
    /// [`Error::Start`] if MPI was started in this process before, or no thread can be. Where MPI itself fails to start, it ends
    /// the process.
    pub fn start(patience: Duration) -> Result<Self> {
        let fail = |message: &str| Error::Start { engine: "MPI", message: message.into() };
        let (commands, received) = channel();
        let (answer, answers) = channel();
        let (started, begun) = channel();
        let serve = move || {
            let universe = mpi::initialize_with_threading(Threading::Funneled);
            let world = universe.as_ref().map(|(universe, _)| universe.world());
            let place = world.as_ref().map(|world| (world.rank() as usize, world.size() as usize));
            let _ = started.send(place);
            if let (Some((universe, _)), Some(world)) = (universe, world) {
                serve(universe, &world, &received, &answer);
            }
        };
        thread::Builder::new().name("mpi".into()).spawn(serve).map_err(|error| fail(&error.to_string()))?;
        let place = begun.recv().map_err(|_| fail("the library can't be started"))?;
        let (rank, size) = place.ok_or_else(|| fail("it was started in this process before"))?;
        Ok(Self { link: Link::new([rank, size], patience, commands, answers) })
    }
}

impl Communicator for Mpi {
    fn rank(&self) -> usize {
        self.link.rank()
    }

    fn size(&self) -> usize {
        self.link.size()
    }

    fn all_to_all(&self, parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        check_parts(parts.len(), self.size())?;
        self.link.ask(Command::AllToAll(parts))
    }

    fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.link.ask(Command::AllGather(bytes))
    }
}

/// Takes leave of the other ranks, unless something has failed: then the process ends without, which tells the launcher.
impl Drop for Mpi {
    fn drop(&mut self) {
        if !self.link.has_failed() && !thread::panicking() {
            let _ = self.link.ask(Command::Finish);
        }
    }
}

/// What the thread does that talks to MPI. It must not end before it is told to: leaving MPI waits for the others.
fn serve(
    universe: Universe,
    world: &SimpleCommunicator,
    commands: &Receiver<Command>,
    answer: &Sender<Answer>,
) {
    while let Ok(command) = commands.recv() {
        let found = match command {
            Command::AllToAll(parts) => all_to_all(world, &parts),
            Command::AllGather(bytes) => all_gather(world, &bytes),
            Command::Finish => {
                drop(universe);
                let _ = answer.send(Ok(Vec::new()));
                return;
            }
        };
        if answer.send(found).is_err() {
            break;
        }
    }
    std::mem::forget(universe);
}

fn all_to_all(world: &SimpleCommunicator, parts: &[Vec<u8>]) -> Result<Vec<Vec<u8>>> {
    let mut sent: Vec<u64> = parts.iter().map(|part| part.len() as u64).collect();
    // Whoever has too much to send tells the others, who would wait for it.
    if sent.iter().sum::<u64>() > Count::MAX as u64 {
        sent.fill(u64::MAX);
    }
    let mut lengths = vec![0; parts.len()];
    mpi::request::scope(|scope| {
        wait(world.immediate_all_to_all_into(scope, &sent[..], &mut lengths[..]));
    });
    let (to, from) = (Layout::new(&sent)?, Layout::new(&lengths)?);
    let mut sent = buffer(to.total);
    parts.iter().for_each(|part| sent.extend_from_slice(part));
    let mut found = buffer(from.total);
    found.resize(from.total, 0);
    let to = Partition::new(&sent[..], &to.counts[..], &to.starts[..]);
    let mut whole = PartitionMut::new(&mut found[..], &from.counts[..], &from.starts[..]);
    mpi::request::scope(|scope| {
        wait(world.immediate_all_to_all_varcount_into(scope, &to, &mut whole));
    });
    Ok(from.split(&found))
}

fn all_gather(world: &SimpleCommunicator, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut lengths = vec![0_u64; world.size() as usize];
    let length = bytes.len() as u64;
    mpi::request::scope(|scope| wait(world.immediate_all_gather_into(scope, &length, &mut lengths[..])));
    let from = Layout::new(&lengths)?;
    let mut sent = buffer(bytes.len());
    sent.extend_from_slice(bytes);
    let mut found = buffer(from.total);
    found.resize(from.total, 0);
    let mut whole = PartitionMut::new(&mut found[..], &from.counts[..], &from.starts[..]);
    mpi::request::scope(|scope| wait(world.immediate_all_gather_varcount_into(scope, &sent[..], &mut whole)));
    Ok(from.split(&found))
}

/// Room for so many bytes, and for one at least: the address of an empty slice may be 1, which in Open MPI means
/// `MPI_IN_PLACE`.
fn buffer(length: usize) -> Vec<u8> {
    Vec::with_capacity(length.max(1))
}

/// Waits without keeping a core busy, which the other ranks of the machine may need.
fn wait<'a, D: ?Sized>(mut request: Request<'a, D, &LocalScope<'a>>) {
    const BUSY: Duration = Duration::from_millis(1);
    const PAUSE: Duration = Duration::from_micros(50);
    let started = Instant::now();
    while let Err(pending) = request.test() {
        request = pending;
        if started.elapsed() < BUSY { thread::yield_now() } else { thread::sleep(PAUSE) }
    }
}

/// Where the parts of a buffer are.
struct Layout {
    counts: Vec<Count>,
    starts: Vec<Count>,
    total: usize,
}

impl Layout {
    /// MPI counts by 32 bits.
    fn new(lengths: &[u64]) -> Result<Self> {
        let total = lengths.iter().fold(0_u64, |total, length| total.saturating_add(*length));
        if total > Count::MAX as u64 {
            return Err(Error::Argument {
                name: "bytes of one exchange".into(),
                expected: format!("at most {}", Count::MAX),
                found: total.to_string(),
            });
        }
        let counts: Vec<Count> = lengths.iter().map(|length| *length as Count).collect();
        let ends = counts.iter().scan(0, |end, count| {
            *end += count;
            Some(*end)
        });
        let starts = ends.zip(&counts).map(|(end, count)| end - count).collect();
        Ok(Self { counts, starts, total: total as usize })
    }

    fn split(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let parts = self.starts.iter().zip(&self.counts);
        parts.map(|(start, count)| bytes[*start as usize..][..*count as usize].to_vec()).collect()
    }
}
