//! Quantizes a checkpoint and shows the error and the bytes of every weight.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program talks to its user")]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use kiln::{
    models::{LoadOptions, Slots},
    quant::{
        HostQuantizer, Hqq, LeastSquares, MinMax, MseClipped, QuantLinear, Scheme, packed_file::PackedFile,
    },
};
use kiln_examples::{ModelArgs, Result, check_outputs, say, write_json};

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Quantizer {
    /// Round to nearest on each block's range.
    MinMax,
    /// The shrunken range with the least squared error.
    Mse,
    /// Scale and offset of least squared error for the codes, in turns.
    LeastSquares,
    /// The half-quadratic solver (affine schemes).
    Hqq,
}

#[derive(Parser)]
#[command(about)]
struct Options {
    #[command(flatten)]
    model: ModelArgs,
    /// How codes are chosen.
    #[arg(long, value_enum, default_value = "min-max")]
    quantizer: Quantizer,
    /// Where the packed weights go, as one Kiln file.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Where the figures go.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn run(mut options: Options) -> Result<()> {
    let scheme = *options.model.scheme.get_or_insert("affine4:64".parse::<Scheme>()?);
    let quantizer: Box<dyn HostQuantizer> = match options.quantizer {
        Quantizer::MinMax => Box::new(MinMax),
        Quantizer::Mse => Box::new(MseClipped::default()),
        Quantizer::LeastSquares => Box::new(LeastSquares::default()),
        Quantizer::Hqq => Box::new(Hqq::default()),
    };
    check_outputs([&options.out, &options.json])?;
    let checkpoint = options.model.checkpoint()?;
    let bar = indicatif::ProgressBar::new_spinner();
    let progress = |path: &str| bar.set_message(path.to_string());
    let load = LoadOptions::uniform(scheme)
        .with_quantizer(quantizer.as_ref())
        .with_measure(true)
        .with_progress(&progress);
    let (model, report) = checkpoint.load(&load, &options.model.device.open()?)?;
    bar.finish_and_clear();
    say!(
        "{:<44} {:<20} {:>10} {:>12} {:>10} {:>9}",
        "weight",
        "scheme",
        "bits",
        "bytes",
        "rel. error",
        "max"
    );
    for row in &report.storage.rows {
        let error = report.errors.iter().find(|(path, _)| *path == row.path).map(|(_, error)| error);
        let (relative, largest) = error.map_or((String::new(), String::new()), |error| {
            (format!("{:.5}", error.relative), format!("{:.4}", error.max_abs))
        });
        let (scheme, bits) = (row.scheme.to_string(), row.bits_per_weight());
        say!("{:<44} {scheme:<20} {bits:>10.4} {:>12} {relative:>10} {largest:>9}", row.path, row.bytes);
    }
    let (bytes, values) = (report.storage.total_bytes(), report.storage.total_values());
    say!("total: {values} values in {bytes} bytes, {:.3} bits each", 8.0 * bytes as f64 / values as f64);

    if let Some(path) = &options.out {
        let mut weights = Vec::new();
        let mut failed = None;
        for (path, slot) in model.slots() {
            if let QuantLinear::Packed(linear) = slot {
                match linear.weight.to_host() {
                    Ok(weight) => weights.push((path.to_string(), weight)),
                    Err(error) => failed = Some(error),
                }
            }
        }
        if let Some(error) = failed {
            return Err(error.into());
        }
        let packed = weights.iter().map(|(path, weight)| (path.as_str(), weight));
        PackedFile::save(path, packed, std::iter::empty(), &Default::default())?;
        say!("packed weights written to {}", path.display());
    }
    let errors: Vec<_> = report
        .errors
        .iter()
        .map(|(path, error)| serde_json::json!({ "path": path, "error": error }))
        .collect();
    write_json(
        options.json.as_deref(),
        &serde_json::json!({ "scheme": scheme, "storage": report.storage, "total_bytes": bytes, "errors": errors }),
    )
}

fn main() -> ExitCode {
    kiln_examples::program(run)
}
