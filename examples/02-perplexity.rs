//! Perplexity of a model on a text, over windows that don't overlap.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{ops::ControlFlow, path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use kiln::eval::{WindowedPerplexity, peak_rss_bytes};
use kiln_examples::{ModelArgs, Result, check_outputs, read_id_file, say, testdata, write_json};

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, little-endian, 32 bits each in a .u32le file, else 16; the embedded model's held-out addresses if neither is given.
    #[arg(long, conflicts_with = "text")]
    tokens: Option<PathBuf>,
    /// A text, tokenised with the model's tokenizer.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Puts the model's begin token before every window, and scores all of the window.
    #[arg(long)]
    bos: bool,
    /// Tokens of a window.
    #[arg(long, default_value_t = 256)]
    window: usize,
    /// Windows at most.
    #[arg(long)]
    max_windows: Option<usize>,
    /// Windows at once.
    #[arg(long, default_value_t = 1)]
    batch: usize,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(options: Options) -> Result<()> {
    check_outputs([&options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let ids = match (&options.tokens, &options.text) {
        (None, Some(path)) => {
            let text =
                std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
            checkpoint.tokenizer()?.encode(&text, false)?
        }
        (Some(path), None) => read_id_file(path)?,
        _ => read_id_file(&testdata("models/tiny-llama/text/indomain_heldout_sotu_2011.u16le"))?,
    };
    let (model, _) = options.model.load_adapted(&checkpoint)?;
    let start = Instant::now();
    let mut protocol = WindowedPerplexity::new(options.window).with_batch(options.batch);
    if options.bos {
        let begin = checkpoint.special_tokens().bos;
        protocol = protocol.with_begin(begin.ok_or("--bos: the model has no begin token")?);
    }
    if let Some(most) = options.max_windows {
        protocol = protocol.with_max_windows(most);
    }
    let bar = indicatif::ProgressBar::new(0);
    let found = protocol.evaluate_with(&model, &ids, &mut |progress| {
        bar.set_length(progress.total as u64);
        bar.set_position(progress.windows as u64);
        ControlFlow::Continue(())
    })?;
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let error = found.standard_error.windows.map_or(String::new(), |error| format!(" ± {error:.4}"));
    say!(
        "perplexity {:.3} (nll {:.5}{error}) over {} tokens, {seconds:.1} s",
        found.perplexity,
        found.nll,
        found.tokens
    );
    write_json(
        options.json.as_deref(),
        &serde_json::json!({
            "nll": found.nll,
            "perplexity": found.perplexity,
            "tokens": found.tokens,
            "standard_error": found.standard_error.windows,
            "seconds": seconds,
            "peak_rss_bytes": peak_rss_bytes(),
        }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
