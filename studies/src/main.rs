//! The measurements behind docs/accuracy.md and docs/performance.md, one subcommand each.
//!
//! `finetune`, `apiq`, `automixq` and `side-tuning` measure what their options say. `study-..` make whole tables: each run is a
//! JSON line of a log below docs/results; runs that are in the log are not repeated, so that a study goes on where it was
//! stopped. `study-apiq` and `study-automixq` call `apiq` and `automixq`, each run in a process of its own, because peak
//! memory belongs to a process; the others run in this one.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

mod apiq;
mod apiq_study;
mod automixq;
mod automixq_study;
mod balanced_rank_study;
mod bench;
mod composed_study;
mod compress;
mod finetune;
mod formats_study;
mod log;
mod mixed_study;
mod numbers;
mod parts_study;
mod plot;
mod quantization_study;
mod side_study;
mod side_tuning;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One fine-tune, with every option of every adapter.
    Finetune(Box<finetune::Options>),
    /// Calibrated quantization by several methods, with perplexity before and after the same fine-tuning, and the
    /// activations' error block by block.
    Apiq(Box<apiq::Options>),
    /// A search for bits, with fine-tunes of the best plan of a memory limit and of uniform plans of the same limit.
    Automixq(Box<automixq::Options>),
    /// Time, memory and loss of side tuning, LoRA, QLoRA and full fine-tuning, beside what is predicted.
    SideTuning(Box<side_tuning::Options>),
    /// Models at 4, 3 and 2 bits by all methods of calibration.
    StudyApiq(apiq_study::Options),
    /// Searches by several methods, budgets and seeds against the front of all plans.
    StudyAutomixq(automixq_study::Options),
    /// Models at 4, 3 and 2 bits by all methods, before and after the same fine-tune.
    StudyQuantization(bench::StudyOptions),
    /// LoRA, Q-BaRA, QA-LoRA and QA-HiRA at equal numbers of trained values, merged, beside LoRA quantized again.
    StudyBalancedRank(bench::StudyOptions),
    /// Side networks beside LoRA on the same base, at equal tokens.
    StudySideTuning(side_study::Options),
    /// What formats and quantizers lose by themselves.
    StudyFormats(bench::StudyOptions),
    /// Bits by layer: objectives against tuned losses, and tasks on pruned models.
    StudyMixedBits(bench::StudyOptions),
    /// Pruned, searched, started and tuned within one limit of bytes; and with one of these left out.
    StudyComposed(bench::StudyOptions),
    /// LoRA beside scales, at equal numbers of trained values; a teacher beside the text.
    StudyTrainedParts(bench::StudyOptions),
}

fn main() -> ExitCode {
    kiln_examples::program(|options: Options| match options.command {
        Command::Finetune(options) => finetune::run(*options),
        Command::Apiq(options) => apiq::run(*options),
        Command::Automixq(options) => automixq::run(*options),
        Command::SideTuning(options) => side_tuning::run(*options),
        Command::StudyApiq(options) => apiq_study::run(&options),
        Command::StudyAutomixq(options) => automixq_study::run(&options),
        Command::StudyQuantization(options) => quantization_study::run(&options),
        Command::StudyBalancedRank(options) => balanced_rank_study::run(&options),
        Command::StudySideTuning(options) => side_study::run(&options),
        Command::StudyFormats(options) => formats_study::run(&options),
        Command::StudyMixedBits(options) => mixed_study::run(&options),
        Command::StudyComposed(options) => composed_study::run(&options),
        Command::StudyTrainedParts(options) => parts_study::run(&options),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{bench::Run, log::Log};

    /// Every row of a study's tables is on the page.
    #[test]
    fn the_tables_of_accuracy_md_are_the_logs() {
        let page = include_str!("../../docs/accuracy.md");
        type Table = fn(&[Run], &str) -> String;
        let by_model: [(&str, u32, Table); 5] = [
            (quantization_study::NAME, quantization_study::VERSION, quantization_study::table),
            (balanced_rank_study::NAME, balanced_rank_study::VERSION, balanced_rank_study::table),
            (side_study::NAME, side_study::VERSION, side_study::table),
            (parts_study::NAME, parts_study::VERSION, parts_study::table),
            (composed_study::NAME, composed_study::VERSION, composed_study::table),
        ];
        let open = |name: &str, version: u32| Log::open(None, name, version).unwrap();
        let mut all: Vec<(&str, String)> = by_model
            .into_iter()
            .map(|(name, version, table)| (name, bench::tables(&open(name, version), table).unwrap()))
            .collect();
        let log = open(formats_study::NAME, formats_study::VERSION);
        all.push((formats_study::NAME, formats_study::tables(&log).unwrap()));
        let log = open(mixed_study::NAME, mixed_study::VERSION);
        all.push((mixed_study::NAME, mixed_study::tables(&log).unwrap()));
        let log = open(automixq_study::NAME, automixq_study::VERSION);
        all.push((automixq_study::NAME, automixq_study::table(&log).unwrap()));
        let lines: std::collections::HashSet<&str> = page.lines().collect();
        for (name, tables) in all {
            let rows: Vec<&str> = tables.lines().filter(|line| line.starts_with('|')).collect();
            assert!(rows.len() > 4, "{name} without a table");
            let missing: Vec<&str> = rows.into_iter().filter(|row| !lines.contains(row)).collect();
            assert!(
                missing.is_empty(),
                "docs/accuracy.md lacks what `study study-{name} --table` prints:\n{}",
                missing.join("\n")
            );
        }
    }
}
