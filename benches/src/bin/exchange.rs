//! Time that ranks of MPI take to add up gradients, beside what the link's rate predicts.
//!
//! `scripts/two-hosts 100mbit target/release/exchange --rate 100`; more processes by `mpirun -n`.
#![allow(clippy::print_stdout, reason = "a program talks to its user")]

use std::time::{Duration, Instant};

use clap::Parser;
use kiln::distributed::{Communicator, Error, Mpi, PairwiseSum, sum};

#[derive(Parser)]
#[command(about)]
struct Options {
    /// Trained values; sizes of several models.
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000, 4_884_480])]
    values: Vec<usize>,
    /// Million bits a second of each rank's link, in each direction; without it nothing is predicted.
    #[arg(long)]
    rate: Option<f64>,
    /// Milliseconds that a packet is under way in one direction, as far as the prediction goes.
    #[arg(long, default_value_t = 0.0)]
    delay: f64,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// Of what a link carries, what isn't headers: TCP over Ethernet, with timestamps.
const PAYLOAD: f64 = 1448.0 / 1514.0;

fn main() -> Result<(), Error> {
    let options = Options::parse();
    let ranks = Mpi::start(Duration::from_secs(3600))?;
    let (rank, size) = (ranks.rank(), ranks.size());
    // The first exchange opens connections.
    ranks.agree(Ok(()))?;
    // What remains when there is next to nothing to send: the operations' own messages.
    let idle = timed(&ranks, size, 10)?;
    if rank == 0 {
        println!("{size} ranks; an exchange of {size} values takes {:.2} ms", 1e3 * idle);
        println!("| values | MB a rank | s measured | s predicted | measured / predicted |");
        println!("| ---: | ---: | ---: | ---: | ---: |");
    }
    for values in options.values {
        let measured = timed(&ranks, values, options.rounds)?;
        if rank == 0 {
            let bytes = 4.0 * values as f64 * 2.0 * (size - 1) as f64 / size as f64;
            let predicted = options.rate.map(|rate| {
                let rate = rate * 1e6 * PAYLOAD / 8.0;
                idle + bytes / rate
                    + slow_start(4.0 * values as f64 / size as f64, rate, 2e-3 * options.delay)
            });
            let of_prediction = |predicted: f64| format!("{predicted:.4} | {:.2}", measured / predicted);
            let predicted = predicted.map_or_else(|| "| ".to_owned(), of_prediction);
            println!("| {values} | {:.3} | {measured:.4} | {predicted} |", bytes / 1e6);
        }
    }
    Ok(())
}

/// What TCP loses of a link while it begins: with ten segments, twice as many in each round trip, until the message of
/// `bytes` is under way or the link of `rate` bytes a second is full.
fn slow_start(bytes: f64, rate: f64, round_trip: f64) -> f64 {
    let (first, enough) = (10.0 * 1448.0, bytes.min(rate * round_trip));
    if enough <= first { 0.0 } else { round_trip * (enough / first).log2() - enough / rate }
}

/// The median time of an exchange.
fn timed(ranks: &Mpi, values: usize, rounds: usize) -> Result<f64, Error> {
    let mut times = Vec::new();
    for _ in 0..rounds.max(1) {
        let mut own = PairwiseSum::new(ranks.rank());
        own.push(vec![ranks.rank() as f32; values], |a, _| a);
        ranks.agree(Ok(()))?;
        let begin = Instant::now();
        let found = sum(ranks, own, ranks.size(), values)?;
        times.push(begin.elapsed().as_secs_f64());
        let expected = (0..ranks.size()).sum::<usize>() as f32;
        assert!(found.iter().all(|value| *value == expected));
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}
