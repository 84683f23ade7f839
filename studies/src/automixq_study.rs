//! Searches by several methods, budgets and seeds on the embedded model, whose 6561 plans are all measured once on tokens
//! that no search sees: the share of the exhaustive front's hypervolume that each search finds.

use std::path::PathBuf;

use clap::Args;
use kiln::mixq_search::METHODS;
use kiln_examples::Result;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    log::{Line, Log, figures, words},
    numbers::{deviation, mean},
};

pub(crate) const NAME: &str = "automixq";
pub(crate) const VERSION: u32 = 1;
const EVALUATIONS: [u64; 3] = [40, 120, 328];
const SEEDS: std::ops::Range<u64> = 0..10;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Methods of searching.
    #[arg(long, value_delimiter = ',', default_values = METHODS)]
    methods: Vec<String>,
    /// Keeps the scores of all plans.
    #[arg(long, default_value = "target/kiln-automixq")]
    out: PathBuf,
    /// docs/results/automixq.jsonl if left out.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Only prints the table of the log.
    #[arg(long)]
    table: bool,
}

#[derive(Deserialize)]
struct Run {
    method: String,
    evaluations: u64,
    fraction: f64,
    measured: f64,
}

fn search(options: &Options, method: &str, evaluations: u64, seed: u64) -> Result<Line> {
    // Pruning depends on the seed: without it all searches share one space and the scores of all plans.
    let mut arguments = words(&format!(
        "--ratio 0 --steps 0 --exhaustive --method {method} --evaluations {evaluations} --seed {seed} --out"
    ));
    arguments.push(options.out.display().to_string());
    let found = figures("automixq", &arguments)?;
    let points = |key: &str| json!(found.get(key).and_then(Value::as_array).map(Vec::len));
    Ok(Line::from_iter([
        ("fraction".into(), found.get("hypervolume_fraction").cloned().unwrap_or_default()),
        ("measured".into(), found.get("evaluations").cloned().unwrap_or_default()),
        ("points".into(), points("front")),
        ("exhaustive_points".into(), points("exhaustive_front")),
    ]))
}

pub(crate) fn table(log: &Log) -> Result<String> {
    let runs: Vec<Run> = log.runs()?;
    let heads = EVALUATIONS.map(|evaluations| format!("{evaluations} evaluations"));
    let mut table = format!("| method | {} |\n| --- | --- | --- | --- |\n", heads.join(" | "));
    let mut methods: Vec<&str> = Vec::new();
    for run in &runs {
        if !methods.contains(&run.method.as_str()) {
            methods.push(&run.method);
        }
    }
    for method in methods {
        let cells = EVALUATIONS.map(|evaluations| {
            let mine = || runs.iter().filter(|run| run.method == method && run.evaluations == evaluations);
            let fractions: Vec<f64> = mine().map(|run| run.fraction).collect();
            let measured: Vec<f64> = mine().map(|run| run.measured).collect();
            let spread = deviation(&fractions).map_or(String::new(), |spread| {
                let least = fractions.iter().copied().fold(f64::INFINITY, f64::min);
                format!(" ± {spread:.4}, least {least:.4}")
            });
            match fractions.len() {
                0 => String::new(),
                seeds => {
                    format!("{:.4}{spread}; {seeds} seeds, {:.0} measured", mean(&fractions), mean(&measured))
                }
            }
        });
        table += &format!("| {method} | {} |\n", cells.join(" | "));
    }
    Ok(table)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let log = Log::open(options.log.as_deref(), NAME, VERSION)?;
    if !options.table {
        for method in &options.methods {
            for evaluations in EVALUATIONS {
                for seed in SEEDS {
                    let wanted = json!({ "method": method, "evaluations": evaluations, "seed": seed });
                    log.once(wanted, || search(options, method, evaluations, seed))?;
                }
            }
        }
    }
    print!("{}{}", table(&log)?, log.time_taken()?);
    Ok(())
}
