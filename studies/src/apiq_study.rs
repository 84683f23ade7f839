//! Perplexity before and after the same fine-tuning of models quantized to 4, 3 and 2 bits by several methods.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_examples::{Result, testdata};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    log::{Line, Log, equal, figures, words},
    numbers::{deviation, mean, significant},
    plot::Plot,
};

const METHODS: [&str; 8] = ["dense", "rtn", "nf", "awq", "gptq", "loftq", "apiq-lw", "apiq-bw"];
const BITS: [u32; 3] = [4, 3, 2];
/// What dense weights are called in the log.
const DENSE_BITS: u32 = 32;

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Model {
    TinyLlama,
    Smollm2,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Self::TinyLlama => "tiny-llama",
            Self::Smollm2 => "smollm2",
        }
    }

    fn seeds(self) -> &'static [u64] {
        match self {
            Self::TinyLlama => &[0, 1, 2],
            Self::Smollm2 => &[0],
        }
    }

    /// Windows of calibration and tokens of each; steps of the fine-tuning, rows of a batch, learning rate. ApiQ has its
    /// own: its factors are trained when the fine-tuning starts, which on SmolLM2 wants a smaller rate than B = 0. And by
    /// width: the fewer levels, the more of a range is worth clipping.
    fn budget(self, method: &str, bits: u32) -> Value {
        let common = match self {
            Self::TinyLlama => json!({ "windows": 16, "length": 128, "steps": 40, "batch": 4, "lr": 1e-3 }),
            Self::Smollm2 => json!({ "windows": 16, "length": 512, "steps": 30, "batch": 1, "lr": 4e-3 }),
        };
        if !method.starts_with("apiq") {
            return common;
        }
        let apiq = match self {
            Self::TinyLlama => json!({ "epochs": 6, "lr-lora": 2e-3, "loss": "mean-squared" }),
            Self::Smollm2 => json!({ "epochs": 4, "loss": "relative", "lr": 1e-3 }),
        };
        let by_bits = match (self, bits) {
            (Self::TinyLlama, 4) => json!({ "initial-logit": 4 }),
            (Self::TinyLlama, 3) => json!({ "initial-logit": 2 }),
            (Self::Smollm2, 4) => json!({ "initial-logit": 4, "lr-lora": 2e-3 }),
            (Self::Smollm2, 3) => json!({ "initial-logit": 2, "lr-lora": 2e-3 }),
            (Self::Smollm2, 2) => json!({ "lr-lora": 5e-3 }),
            _ => json!({}),
        };
        with(with(common, apiq), by_bits)
    }

    /// Other budgets: ApiQ's at 2 bits, and that of dense weights.
    fn others(self) -> Vec<(&'static str, Value)> {
        let large = json!({ "windows": 64, "epochs": 10, "lr-lora": 1e-2, "final-ratio": 0.05 });
        match self {
            Self::TinyLlama => {
                vec![("apiq-bw", json!({ "epochs": 2 })), ("apiq-bw", json!({ "epochs": 30 }))]
            }
            Self::Smollm2 => vec![
                ("apiq-bw", json!({ "windows": 32, "epochs": 10 })),
                ("apiq-bw", json!({ "windows": 32, "epochs": 10, "steps": 240 })),
                ("apiq-bw", large.clone()),
                ("apiq-bw", with(large, json!({ "steps": 240 }))),
                ("dense", json!({ "lr": 2e-3, "steps": 240 })),
            ],
        }
    }
}

/// An object with the entries of another one added or replaced.
fn with(base: Value, more: Value) -> Value {
    let object = |value| match value {
        Value::Object(object) => object,
        _ => Map::new(),
    };
    let mut base = object(base);
    base.extend(object(more));
    Value::Object(base)
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The GGUF file that scripts/fetch-smollm2 fetches; without it, the embedded model only.
    #[arg(long)]
    smollm2: Option<PathBuf>,
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tiny-llama,smollm2")]
    models: Vec<Model>,
    #[arg(long, value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(METHODS), default_values_t = METHODS.map(String::from))]
    methods: Vec<String>,
    /// docs/results/apiq.jsonl if left out.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Only prints the tables of the log.
    #[arg(long)]
    table: bool,
    /// Gets the activations' error of SmolLM2 at 2 bits by block, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct Run {
    model: String,
    bits: u32,
    method: String,
    seed: u64,
    budget: Value,
    perplexity_before: f64,
    perplexity_after: f64,
    activation_error: Vec<f64>,
    seconds: f64,
    block_seconds: Vec<f64>,
    /// A resumed run has no peaks of the blocks that it read.
    block_peak_rss_bytes: Vec<Option<f64>>,
}

impl Run {
    fn is(&self, model: Model, bits: u32, method: &str) -> bool {
        self.model == model.name() && self.bits == bits && self.method == method
    }

    /// Whether the budget is the model's own, not another one of [`Model::others`].
    fn has_common_budget(&self, model: Model) -> bool {
        equal(&self.budget, &model.budget(&self.method, self.bits))
    }
}

fn bits_of(method: &str) -> &'static [u32] {
    if method == "dense" { &[DENSE_BITS] } else { &BITS }
}

struct Study<'a> {
    options: &'a Options,
    log: Log,
}

impl Study<'_> {
    fn once(&self, model: Model, bits: u32, method: &str, seed: u64, budget: &Value) -> Result<()> {
        let wanted = json!({
            "model": model.name(), "bits": bits, "method": method, "seed": seed, "budget": budget,
        });
        self.log.once(wanted, || self.measure(model, bits, method, seed, budget))?;
        Ok(())
    }

    fn measure(&self, model: Model, bits: u32, method: &str, seed: u64, budget: &Value) -> Result<Line> {
        let folder = tempfile::tempdir()?;
        let mut arguments = words(&format!(
            "--methods {method} --bits {bits} --group 64 --rank 16 --seed {seed} --no-original"
        ));
        for (name, value) in budget.as_object().into_iter().flatten() {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
            arguments.extend([format!("--{name}"), value]);
        }
        let mut path =
            |option: &str, path: &Path| arguments.extend([option.into(), path.display().to_string()]);
        path("--out", folder.path());
        if let (Model::Smollm2, Some(file)) = (model, &self.options.smollm2) {
            path("--model", file);
            path("--calibration", &testdata("models/tiny-llama/text/shift_train_moby.txt"));
            path("--eval", &testdata("text/moby_ch100_smollm2_10240.u16le"));
        }
        let found = figures("apiq", &arguments)?;
        let row = found.get("rows").and_then(|rows| rows.get(0)).and_then(Value::as_object);
        let mut row = row.ok_or("apiq: no row among the figures")?.clone();
        row.retain(|key, _| key != "method" && key != "bits");
        Ok(row)
    }

    fn all(&self) -> Result<()> {
        for &model in &self.options.models {
            if model == Model::Smollm2 && self.options.smollm2.is_none() {
                continue;
            }
            for method in &self.options.methods {
                for &bits in bits_of(method) {
                    for &seed in model.seeds() {
                        self.once(model, bits, method, seed, &model.budget(method, bits))?;
                    }
                }
            }
            for (method, other) in model.others() {
                if self.options.methods.iter().any(|wanted| wanted == method) {
                    let bits = if method == "dense" { DENSE_BITS } else { 2 };
                    self.once(
                        model,
                        bits,
                        method,
                        model.seeds()[0],
                        &with(model.budget(method, bits), other),
                    )?;
                }
            }
        }
        Ok(())
    }
}

fn cell(values: &[f64]) -> String {
    if values.is_empty() {
        return String::new();
    }
    let spread = deviation(values).map_or(String::new(), |spread| format!(" ± {}", significant(spread, 3)));
    format!("{}{spread}", significant(mean(values), 4))
}

fn tables(model: Model, runs: &[Run]) -> String {
    let mut text = format!("\n{}\n\n", model.name());
    text += "| method | 4 bits: before | after | 3 bits: before | after | 2 bits: before | after |\n";
    text += "| --- | --- | --- | --- | --- | --- | --- |\n";
    for method in METHODS {
        let mut cells = Vec::new();
        for &bits in bits_of(method) {
            let mine =
                || runs.iter().filter(|run| run.is(model, bits, method) && run.has_common_budget(model));
            cells.push(cell(&mine().map(|run| run.perplexity_before).collect::<Vec<_>>()));
            cells.push(cell(&mine().map(|run| run.perplexity_after).collect::<Vec<_>>()));
        }
        cells.resize(6, String::new());
        text += &format!("| {method} | {} |\n", cells.join(" | "));
    }
    text += "\nDense, and ApiQ-bw at 2 bits, by budget:\n";
    for run in runs.iter().filter(|run| run.is(model, DENSE_BITS, "dense") || run.is(model, 2, "apiq-bw")) {
        let fold =
            |start: f64, choose: fn(f64, f64) -> f64| run.block_seconds.iter().copied().fold(start, choose);
        let (least, most) = (fold(f64::INFINITY, f64::min), fold(0.0, f64::max));
        let peaks: Vec<f64> = run.block_peak_rss_bytes.iter().flatten().copied().collect();
        let peak = |peak: Option<&f64>| peak.map_or("-".into(), |peak| format!("{:.0}", peak / 1e6));
        text += &format!(
            "{} {}, seed {}: {:.1} -> {:.1}, {least:.1} to {most:.1} s a block, {:.0} s; peak after the first and the \
             last block {} and {} MB\n",
            run.method,
            run.budget,
            run.seed,
            run.perplexity_before,
            run.perplexity_after,
            run.seconds,
            peak(peaks.first()),
            peak(peaks.last()),
        );
    }
    text += "\nError after the first and the last block at 2 bits:\n";
    for method in METHODS {
        for run in runs.iter().filter(|run| run.is(model, 2, method) && run.has_common_budget(model)) {
            let error = |error: Option<&f64>| error.map_or("-".into(), |error| format!("{error:.3}"));
            let errors = &run.activation_error;
            text +=
                &format!("{method}, seed {}: {} {}\n", run.seed, error(errors.first()), error(errors.last()));
        }
    }
    text
}

/// The error of the residual stream behind each block at 2 bits, first seed, on a logarithmic axis.
fn plot(path: &Path, model: Model, runs: &[Run]) -> Result<()> {
    let mine = |run: &&Run| {
        run.model == model.name() && run.bits == 2 && run.seed == 0 && run.has_common_budget(model)
    };
    let series = runs.iter().filter(mine).map(|run| {
        let points =
            run.activation_error.iter().enumerate().map(|(block, error)| (block as f64 + 1.0, *error));
        (run.method.clone(), points.collect())
    });
    let caption = format!("{}, 2 bits: norm of the error over norm of the residual stream", model.name());
    Plot { caption: &caption, x: "after block", logarithmic: true }.draw(path, &series.collect::<Vec<_>>())
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let study = Study { options, log: Log::open(options.log.as_deref(), "apiq", 1)? };
    if !options.table {
        study.all()?;
    }
    let runs: Vec<Run> = study.log.runs()?;
    for &model in &options.models {
        print!("{}", tables(model, &runs));
    }
    match &options.plot {
        Some(path) => plot(path, Model::Smollm2, &runs),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_accuracy_md_are_the_logs() {
        let runs: Vec<Run> = Log::open(None, "apiq", 1).unwrap().runs().unwrap();
        for (model, row) in [
            (
                Model::TinyLlama,
                "| apiq-bw | 284.1 ± 0.442 | 191.8 ± 3.36 | 285.2 ± 0.345 | 180 ± 2.22 | 287.8 ± 1.45 | 173.1 ± 0.878 |",
            ),
            (Model::Smollm2, "| nf | 61.12 | 44.77 | 162 | 63.37 | 1.38e9 | 6.326e4 |"),
            (Model::Smollm2, "| apiq-bw | 52.17 | 43.35 | 66.29 | 53.5 | 140.1 | 99.38 |"),
        ] {
            let tables = tables(model, &runs);
            assert!(tables.contains(row), "{row}\n{tables}");
        }
    }
}
