//! Ranks whose large messages go from card to card.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::Duration,
};

use cudarc::{
    driver::CudaContext,
    nccl::{Comm, Id},
};

use crate::{
    Communicator, Error, Result,
    communicator::{agreed, check_parts},
    link::{Answer, Link},
};

/// Messages of fewer bytes go by the ranks' own way.
const LARGE: usize = 1 << 16;
/// Bytes of what NCCL calls a group of ranks by.
const ID: usize = 128;

/// Ranks with a card of NVIDIA's each, whose large messages NCCL brings from card to card: over NVLink in a machine, over
/// InfiniBand between machines, wherever there is one. Small ones go as they did, by the ranks that it stands on: threads of a
/// process, or processes of MPI. What is exchanged comes from host memory and returns there.
///
/// A thread of its own talks to NCCL, so that a rank that waits in vain gets an error after its patience; the thread then
/// stays, with its group and its card's memory, until the process ends.
///
/// **Untried**: the way over cards compiles and has never run, for no machine with two cards was at hand.
///
/// ```no_run
/// use std::{sync::Arc, time::Duration};
/// use kiln_distributed::{Communicator, Nccl, threads};
///
/// let patience = Duration::from_secs(600);
/// std::thread::scope(|scope| {
///     for rank in threads(2, patience) {
///         scope.spawn(move || {
///             let card = rank.rank();
///             let ranks = Nccl::over(Arc::new(rank), card, patience).unwrap();
///             println!("rank {} of {}", ranks.rank(), ranks.size());
///         });
///     }
/// });
/// ```
#[derive(Debug)]
pub struct Nccl {
    ranks: Arc<dyn Communicator>,
    link: Link<Transfer>,
}

/// Large messages, by rank; empty ones aren't sent.
struct Transfer {
    parts: Vec<Vec<u8>>,
    /// Bytes that each rank sends here.
    lengths: Vec<usize>,
}

impl Nccl {
    /// Joins the cards of `ranks`, of which this one has the card `card` by CUDA's count. All ranks call it, with cards that
    /// differ; one that doesn't answer within `patience` is given up.
    ///
    /// # Errors
    /// [`Error::Start`] on a rank without CUDA, NCCL or that card, and [`Error::Failed`] on the others;
    /// [`Error::Lost`] if a rank doesn't join in time.
    pub fn over(ranks: Arc<dyn Communicator>, card: usize, patience: Duration) -> Result<Self> {
        // The libraries are loaded by the first call, which panics where there are none.
        let id = || match ranks.rank() {
            0 => caught(|| Id::new().map_err(|error| format!("{error:?}"))).map(|id| bytes_of(&id)),
            _ => Ok([0; ID]),
        };
        let id = agreed(&*ranks, id())?;
        let id = ranks.broadcast(id.to_vec())?;
        let id = <[u8; ID]>::try_from(id).map_err(|_| fail("rank 0 sent no name of a group"))?;
        let place = [ranks.rank(), ranks.size()];
        let link = link(place, patience, move |commands, answers, started| {
            let joined = caught(|| join(card, place, id));
            let (comm, told) = match joined {
                Ok(comm) => (Some(comm), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = started.send(told);
            if let Some(comm) = comm {
                serve(&comm, &commands, &answers);
            }
        });
        Ok(Self { link: agreed(&*ranks, link)?, ranks })
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.link.rank()
    }

    fn size(&self) -> usize {
        self.link.size()
    }

    fn all_to_all(&self, mut parts: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        check_parts(parts.len(), self.size())?;
        self.link.check()?;
        let own = std::mem::take(&mut parts[self.rank()]);
        // Of each message its length, and what it says if it is small.
        let message = |part: &mut Vec<u8>| {
            let mut message = (part.len() as u64).to_le_bytes().to_vec();
            if part.len() < LARGE {
                message.append(part);
            }
            message
        };
        let messages = self.ranks.all_to_all(parts.iter_mut().map(message).collect())?;
        let mut found = Vec::new();
        let mut lengths = Vec::new();
        for mut message in messages {
            let Some(length) = message.first_chunk().map(|bytes| u64::from_le_bytes(*bytes) as usize) else {
                return Err(fail("a rank sent a message without its length"));
            };
            lengths.push(if length < LARGE { 0 } else { length });
            message.drain(..size_of::<u64>());
            found.push(message);
        }
        if parts.iter().any(|part| !part.is_empty()) || lengths.iter().any(|length| *length > 0) {
            let large = self.link.ask(Transfer { parts, lengths })?;
            for (found, large) in found.iter_mut().zip(large).filter(|(_, large)| !large.is_empty()) {
                *found = large;
            }
        }
        found[self.rank()] = own;
        Ok(found)
    }
}

/// The way to a thread that does what `serve` says, once it has told that it is ready.
fn link(
    [rank, size]: [usize; 2],
    patience: Duration,
    serve: impl FnOnce(Receiver<Transfer>, Sender<Answer>, Sender<Result<()>>) + Send + 'static,
) -> Result<Link<Transfer>> {
    let (commands, received) = channel();
    let (answer, answers) = channel();
    let (started, begun) = channel();
    let serve = move || serve(received, answer, started);
    thread::Builder::new().name("nccl".into()).spawn(serve).map_err(|error| fail(&error.to_string()))?;
    begun.recv_timeout(patience).map_err(|_| Error::Lost { rank, size, lost: None, waited: patience })??;
    Ok(Link::new([rank, size], patience, commands, answers))
}

fn fail(message: &str) -> Error {
    Error::Start { engine: "NCCL", message: message.into() }
}

/// What `call` gives, or why it failed.
fn caught<T>(call: impl FnOnce() -> std::result::Result<T, String>) -> Result<T> {
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
    let found = caught.unwrap_or_else(|_| Err("the libraries of CUDA and NCCL can't be loaded".into()));
    found.map_err(|message| fail(&message))
}

fn bytes_of(id: &Id) -> [u8; ID] {
    id.internal().map(|byte| byte as u8)
}

/// The group of this name, joined with this card; waits for the others.
fn join(card: usize, [rank, size]: [usize; 2], id: [u8; ID]) -> std::result::Result<Comm, String> {
    let context = CudaContext::new(card).map_err(|error| format!("card {card}: {error}"))?;
    let stream = context.new_stream().map_err(|error| format!("card {card}: {error}"))?;
    let id = Id::uninit(id.map(|byte| byte as _));
    Comm::from_rank(stream, rank, size, id).map_err(|error| format!("card {card}: {error:?}"))
}

/// What the thread does that talks to NCCL.
fn serve(comm: &Comm, commands: &Receiver<Transfer>, answers: &Sender<Answer>) {
    while let Ok(transfer) = commands.recv() {
        if answers.send(exchange(comm, &transfer).map_err(|message| fail(&message))).is_err() {
            break;
        }
    }
}

fn exchange(comm: &Comm, transfer: &Transfer) -> std::result::Result<Vec<Vec<u8>>, String> {
    let stream = comm.stream();
    let on_card = |error: cudarc::driver::DriverError| error.to_string();
    let between = |error: cudarc::nccl::result::NcclError| format!("{error:?}");
    let mut sent = Vec::new();
    for (rank, part) in transfer.parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
        sent.push((rank as i32, stream.clone_htod(part).map_err(on_card)?));
    }
    let mut received = Vec::new();
    for (rank, length) in transfer.lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
        received.push((rank, stream.alloc_zeros::<u8>(*length).map_err(on_card)?));
    }
    let mut group = comm.group();
    for (rank, part) in &sent {
        group.send(part.as_view(), *rank).map_err(between)?;
    }
    for (rank, part) in &mut received {
        group.recv(part.as_view_mut(), *rank as i32).map_err(between)?;
    }
    // The messages begin with the end of the group.
    drop(group);
    let mut found = vec![Vec::new(); transfer.lengths.len()];
    for (rank, part) in &received {
        found[*rank] = stream.clone_dtoh(part).map_err(on_card)?;
    }
    stream.synchronize().map_err(on_card)?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Alone, threads};

    #[test]
    fn without_cards_it_is_an_error() {
        // A machine that has them is no machine for this test.
        let started = Nccl::over(Arc::new(Alone), usize::from(u16::MAX), Duration::from_secs(60));
        let error = started.unwrap_err();
        assert!(matches!(&error, Error::Start { engine: "NCCL", .. }), "{error}");
    }

    /// Ranks whose cards are threads.
    fn with_threads_for_cards(size: usize) -> Vec<Nccl> {
        let patience = Duration::from_secs(60);
        let cards = threads(size, patience);
        let both = threads(size, patience).into_iter().zip(cards);
        both.map(|(rank, card)| {
            let place = [rank.rank(), size];
            let link = link(place, patience, move |commands, answers, started| {
                let _ = started.send(Ok(()));
                while let Ok(Transfer { parts, lengths }) = commands.recv() {
                    let found = card.all_to_all(parts).unwrap();
                    assert!(found.iter().map(Vec::len).eq(lengths), "announced as they came");
                    let _ = answers.send(Ok(found));
                }
            });
            Nccl { ranks: Arc::new(rank), link: link.unwrap() }
        })
        .collect()
    }

    #[test]
    fn after_a_failure_small_messages_fail_too() {
        let patience = Duration::from_secs(60);
        // A card that ends at the first message.
        let link = link([0, 1], patience, |commands, _, started| {
            let _ = started.send(Ok(()));
            let _ = commands.recv();
        });
        let ranks = Nccl { ranks: Arc::new(Alone), link: link.unwrap() };
        assert_eq!(ranks.all_gather(vec![1]).unwrap(), [[1]]);
        assert!(ranks.link.ask(Transfer { parts: Vec::new(), lengths: Vec::new() }).is_err());
        assert!(matches!(ranks.all_gather(vec![1]), Err(Error::Lost { .. })));
    }

    #[test]
    fn small_and_large_messages_come_as_they_were_sent() {
        let length = |from: usize, to: usize| match (from + 2 * to) % 4 {
            0 => 0,
            1 => LARGE - 1,
            2 => LARGE,
            _ => LARGE + 70_001,
        };
        let message = |from: usize, to: usize| -> Vec<u8> {
            (0..length(from, to)).map(|index| (index * 7 + 16 * from + to) as u8).collect()
        };
        thread::scope(|scope| {
            for ranks in with_threads_for_cards(4) {
                scope.spawn(move || {
                    let me = ranks.rank();
                    for _ in 0..2 {
                        let found = ranks.all_to_all((0..4).map(|to| message(me, to)).collect()).unwrap();
                        for (from, found) in found.into_iter().enumerate() {
                            assert!(found == message(from, me), "from {from} to {me}");
                        }
                    }
                    let small = ranks.all_gather(vec![me as u8]).unwrap();
                    assert_eq!(small, [[0], [1], [2], [3]]);
                });
            }
        });
    }
}
