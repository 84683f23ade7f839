//! Balanced-rank adapters at about equal numbers of trained values: LoRA, Q-BaRA, QA-LoRA and QA-HiRA.

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_examples::{Result, testdata};
use serde::Deserialize;
use serde_json::json;

use crate::{
    log::{Line, Log, figures, words},
    numbers::{deviation, mean},
};

const GROUP: usize = 32;
const STEPS: u64 = 60;
/// Learning rates are the best of these on the embedded model at 4 bits, with a seed of their own.
const LEARNING_RATES: [f64; 3] = [3e-3, 1e-2, 3e-2];
const TUNING_SEED: u64 = 1000;
/// SmolLM2 takes the embedded model's rates times the best of these, by short runs of two methods.
const FACTORS: [f64; 3] = [0.03, 0.1, 0.3];
const FACTOR_STEPS: u64 = 20;
const SMOLLM2: &str = "smollm2";
const EMBEDDED: &str = "tiny-llama";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Lora,
    Qbara,
    Qalora,
    Qahira,
}

impl Method {
    const ALL: [Self; 4] = [Self::Lora, Self::Qbara, Self::Qalora, Self::Qahira];

    fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Qbara => "qbara",
            Self::Qalora => "qalora",
            Self::Qahira => "qahira",
        }
    }

    /// Pooling by sums, and an alpha for QA-HiRA's mean, make a step move the weights about as far as LoRA's.
    fn options(self) -> String {
        match self {
            Self::Lora => "--method lora".into(),
            Self::Qbara => "--method qbara --lambda 2".into(),
            Self::Qalora => format!("--method qalora --pool {GROUP} --pooling sum"),
            Self::Qahira => format!("--method qahira --pool {GROUP} --repeat 1"),
        }
    }

    /// Ranks at which the numbers of trained values come closest (QA-HiRA has none: the rank only scales it).
    fn rank(self, model: &str) -> usize {
        match (self, model == SMOLLM2) {
            (Self::Lora | Self::Qbara, false) => 4,
            (Self::Qalora, false) => 7,
            (Self::Lora | Self::Qbara, true) => 11,
            (Self::Qalora, true) => 21,
            (Self::Qahira, _) => 1,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The GGUF file that scripts/fetch-smollm2 fetches; without it, the embedded model only.
    #[arg(long)]
    smollm2: Option<PathBuf>,
    /// docs/results/balanced-rank.jsonl if left out.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Only prints the table of the log.
    #[arg(long)]
    table: bool,
}

#[derive(Deserialize)]
struct Run {
    model: String,
    bits: u32,
    method: String,
    seed: u64,
    lr: f64,
    trainable_parameters: usize,
    loss_before: f64,
    loss_after: f64,
}

struct Study<'a> {
    log: Log,
    smollm2: Option<&'a Path>,
}

impl Study<'_> {
    fn fine_tune(
        &self,
        model: &str,
        bits: u32,
        method: Method,
        seed: u64,
        lr: f64,
        steps: u64,
    ) -> Result<Run> {
        let wanted = json!({
            "model": model, "bits": bits, "method": method.name(), "seed": seed, "lr": lr, "steps": steps,
        });
        let line = self.log.once(wanted, || self.run(model, bits, method, seed, lr, steps))?;
        Ok(serde_json::from_value(line.into())?)
    }

    fn run(&self, model: &str, bits: u32, method: Method, seed: u64, lr: f64, steps: u64) -> Result<Line> {
        let rank = method.rank(model);
        let alpha = if method == Method::Qahira { GROUP } else { rank };
        let folder = tempfile::tempdir()?;
        let mut arguments = words(&format!(
            "{} --scheme affine{bits}:{GROUP} --rank {rank} --alpha {alpha} --lr {lr} --seed {seed} --steps {steps} \
             --batch 2 --seq-len 256 --schedule linear --warmup 5 --clip 1",
            method.options()
        ));
        let mut path =
            |option: &str, path: &Path| arguments.extend([option.into(), path.display().to_string()]);
        path("--out", folder.path());
        path("--data", &testdata("models/tiny-llama/text/shift_train_moby.txt"));
        match (model == SMOLLM2, self.smollm2) {
            (true, Some(file)) => {
                path("--model", file);
                path("--eval", &testdata("text/moby_ch100_smollm2_10240.u16le"));
                arguments.extend(words("--window 512"));
            }
            _ => path("--eval", &testdata("models/tiny-llama/text/shift_test_moby.u16le")),
        }
        let found = figures("finetune", &arguments)?;
        let loss = |key: &str| found.get(key).and_then(serde_json::Value::as_f64).map(f64::ln);
        let kept = |key: &str| (key.to_string(), found.get(key).cloned().unwrap_or_default());
        Ok(Line::from_iter([
            ("rank".into(), json!(rank)),
            ("alpha".into(), json!(alpha)),
            kept("trainable_parameters"),
            ("loss_before".into(), json!(loss("perplexity_before"))),
            ("loss_after".into(), json!(loss("perplexity_after"))),
            kept("tokens_per_second"),
            kept("peak_rss_bytes"),
        ]))
    }

    /// The learning rate that is best on the embedded model at 4 bits.
    fn tuned(&self, method: Method) -> Result<f64> {
        best(LEARNING_RATES, |lr| Ok(self.fine_tune(EMBEDDED, 4, method, TUNING_SEED, lr, STEPS)?.loss_after))
    }

    /// What to multiply the embedded model's learning rates by for SmolLM2.
    fn factor(&self, rate: impl Fn(Method) -> f64) -> Result<f64> {
        best(FACTORS, |factor| {
            let loss = |method| -> Result<f64> {
                let lr = factor * rate(method);
                Ok(self.fine_tune(SMOLLM2, 4, method, TUNING_SEED, lr, FACTOR_STEPS)?.loss_after)
            };
            Ok(loss(Method::Lora)? + loss(Method::Qahira)?)
        })
    }

    fn all(&self) -> Result<()> {
        let mut rates = Vec::new();
        for method in Method::ALL {
            rates.push((method, self.tuned(method)?));
        }
        for bits in [4, 3, 2] {
            for seed in 0..3 {
                for (method, lr) in &rates {
                    self.fine_tune(EMBEDDED, bits, *method, seed, *lr, STEPS)?;
                }
            }
        }
        if self.smollm2.is_some() {
            let rate = |wanted| rates.iter().find(|(method, _)| *method == wanted).map_or(0.0, |(_, lr)| *lr);
            let factor = self.factor(rate)?;
            for bits in [2, 3, 4] {
                for (method, lr) in &rates {
                    self.fine_tune(SMOLLM2, bits, *method, 0, factor * lr, STEPS)?;
                }
            }
        }
        Ok(())
    }
}

/// The choice with the least loss.
fn best(choices: [f64; 3], loss: impl Fn(f64) -> Result<f64>) -> Result<f64> {
    let mut losses = Vec::new();
    for choice in choices {
        losses.push((choice, loss(choice)?));
    }
    losses.sort_by(|a, b| a.1.total_cmp(&b.1));
    Ok(losses[0].0)
}

fn table(log: &Log) -> Result<String> {
    let mut runs: Vec<Run> = log.runs()?;
    runs.retain(|run| run.seed != TUNING_SEED);
    let mut table =
        String::from("| model | method | learning rate | trained parameters | 4 bits | 3 bits | 2 bits |\n");
    table += "| --- | --- | --- | --- | --- | --- | --- |\n";
    for model in [EMBEDDED, SMOLLM2] {
        let of = |bits: u32, value: fn(&Run) -> f64, method: Option<Method>| -> Vec<f64> {
            let mine = runs.iter().filter(|run| run.model == model && run.bits == bits);
            mine.filter(|run| method.is_none_or(|method| run.method == method.name())).map(value).collect()
        };
        for method in Method::ALL {
            let Some(any) = runs.iter().find(|run| run.model == model && run.method == method.name()) else {
                continue;
            };
            let cells = [4, 3, 2].map(|bits| {
                let losses = of(bits, |run| run.loss_after, Some(method));
                let spread = deviation(&losses).map_or(String::new(), |spread| format!(" ± {spread:.4}"));
                if losses.is_empty() { String::new() } else { format!("{:.4}{spread}", mean(&losses)) }
            });
            let (lr, parameters) = (any.lr, any.trainable_parameters);
            table +=
                &format!("| {model} | {} | {lr} | {parameters} | {} |\n", method.name(), cells.join(" | "));
        }
        let before = [4, 3, 2].map(|bits| {
            of(bits, |run| run.loss_before, None).first().map_or(String::new(), |loss| format!("{loss:.4}"))
        });
        if before.iter().any(|cell| !cell.is_empty()) {
            table += &format!("| {model} | before training | | | {} |\n", before.join(" | "));
        }
    }
    Ok(table)
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let log = Log::new(options.log.as_deref(), "balanced-rank.jsonl");
    let study = Study { log, smollm2: options.smollm2.as_deref() };
    if !options.table {
        study.all()?;
    }
    print!("{}", table(&study.log)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_accuracy_md_is_the_logs() {
        let table = table(&Log::new(None, "balanced-rank.jsonl")).unwrap();
        for row in [
            "| tiny-llama | lora | 0.03 | 54272 | 4.5761 ± 0.0078 | 4.5822 ± 0.0106 | 4.6115 ± 0.0050 |",
            "| smollm2 | qahira | 0.001 | 3317760 | 3.6446 | 3.8776 | 5.3958 |",
            "| smollm2 | before training | | | 3.8786 | 5.2644 | 12.2928 |",
        ] {
            assert!(table.contains(row), "{row}\n{table}");
        }
    }
}
