//! What formats and quantizers lose by themselves, at their bytes; and what decides LoftQ's figure at 2 bits.

use kiln::{
    Base,
    adapters::{AdapterConfig, Svd},
    calibration::{CalibrationConfig, LoftqConfig, Method as Calibration, Rounding},
    mixq::{Choices, space_of},
    quant::{Plan, Scheme},
};
use kiln_examples::Result;
use serde::Deserialize;
use serde_json::json;

use crate::{
    bench::{Case, EMBEDDED, SMOLLM2, StudyOptions, Texts, head, line_of},
    log::{Line, Log},
    numbers::significant,
};

pub(crate) const NAME: &str = "formats";
pub(crate) const VERSION: u32 = 1;
const ROUNDINGS: [(&str, Rounding); 4] = [
    ("min-max", Rounding::MinMax),
    ("least squares", Rounding::LeastSquares),
    ("shrunken range", Rounding::MseClipped),
    ("half-quadratic", Rounding::Hqq),
];
const RANK: usize = 16;
/// Where LoftQ and another program differed.
const LOFTQ: &str = "affine2:64:int:f16";

#[derive(Debug, Deserialize)]
struct Run {
    model: String,
    scheme: String,
    how: String,
    bits_per_weight: f64,
    test: f64,
}

fn schemes() -> Vec<String> {
    let of = |bits: u32| {
        [format!("affine{bits}:64"), format!("affine{bits}:64:f16"), format!("affine{bits}:64:int:f16")]
            .into_iter()
            .chain((bits < 5).then(|| format!("nf{bits}:64:f16")))
    };
    [4, 3, 2].into_iter().flat_map(of).collect()
}

/// LoftQ with every part that could differ from another program's.
fn loftqs() -> Vec<(String, LoftqConfig)> {
    let mut all = Vec::new();
    for (svd, name) in [(Svd::default(), "4 subspace iterations"), (Svd::Exact, "exact")] {
        for iterations in [1, 5, 10] {
            for keep_best in [true, false] {
                let kept = if keep_best { "best" } else { "last" };
                let config = LoftqConfig { iterations, svd, keep_best, ..LoftqConfig::default() };
                all.push((format!("LoftQ, {iterations} steps, {name}, {kept}"), config));
            }
        }
    }
    for rounding in [Rounding::LeastSquares, Rounding::MseClipped] {
        let name = ROUNDINGS.iter().find(|(_, other)| *other == rounding).map_or("", |(name, _)| name);
        for iterations in [1, 5] {
            let config = LoftqConfig { iterations, rounding, ..LoftqConfig::default() };
            all.push((format!("LoftQ, {iterations} steps, 4 subspace iterations, {name}, best"), config));
        }
    }
    all
}

struct Bench<'a> {
    case: &'a Case,
    base: Base,
    texts: Texts,
}

impl Bench<'_> {
    fn once(&self, log: &Log, scheme: &str, how: &str, method: &Calibration) -> Result<Line> {
        let wanted = json!({ "model": self.case.name, "scheme": scheme, "how": how });
        log.once(wanted, || {
            let scheme: Scheme = scheme.parse()?;
            let windows = self.texts.windows(self.case.length, 1, 0)?;
            let mut config = CalibrationConfig::new(method.clone(), Plan::uniform(scheme));
            config.measured_windows = 0;
            let model = self.base.calibrate(AdapterConfig::lora(RANK, RANK as f64), &config, &windows)?;
            let [validation, test] = self.texts.losses(|data| model.evaluate(data))?;
            let bytes = |scheme| -> Result<u64> {
                Ok(space_of(self.base.model(), &Choices::new([scheme]))?.smallest())
            };
            let weights: usize = model
                .tuned()
                .adapters()
                .iter()
                .map(|(_, adapter)| adapter.base_shape().iter().product::<usize>())
                .sum();
            // Against a format of known size, since bytes count the other tensors too.
            let known: Scheme = "affine8:64:sym:f16".parse()?;
            let difference = bytes(scheme)? as f64 - bytes(known)? as f64;
            let bits = 8.25 + 8.0 * difference / weights as f64;
            Ok(line_of(json!({ "bits_per_weight": bits, "validation": validation, "test": test })))
        })
    }
}

fn quantizers(runs: &[Run], model: &str) -> String {
    let names: Vec<&str> = ROUNDINGS.iter().map(|(name, _)| *name).collect();
    let mut text = head(&format!("format | bits a weight | {}", names.join(" | ")));
    for scheme in schemes() {
        let of =
            |how: &str| runs.iter().find(|run| run.model == model && run.scheme == scheme && run.how == how);
        let Some(any) = of(names[0]) else { continue };
        let cells: Vec<String> = names
            .iter()
            .map(|how| of(how).map_or("-".into(), |run| significant(run.test.exp(), 4)))
            .collect();
        text += &format!("| `{scheme}` | {:.3} | {} |\n", any.bits_per_weight, cells.join(" | "));
    }
    text
}

/// What decides LoftQ's figure at 2 bits, on both models.
fn loftq(runs: &[Run]) -> String {
    let mut text = head(&format!("LoftQ on `{LOFTQ}` | embedded model | SmolLM2"));
    for (how, _) in loftqs() {
        let of = |model: &str| runs.iter().find(|run| run.model == model && run.how == how);
        let cells = [EMBEDDED, SMOLLM2]
            .map(|model| of(model).map_or("-".into(), |run| significant(run.test.exp(), 4)));
        text += &format!(
            "| {} | {} |\n",
            how.trim_start_matches("LoftQ, ").replace("1 steps", "1 step"),
            cells.join(" | ")
        );
    }
    text
}

pub(crate) fn tables(log: &Log) -> Result<String> {
    let runs: Vec<Run> = log.runs()?;
    let there = |model: &&str| runs.iter().any(|run| run.model == **model);
    let of = |model| format!("\n{model}\n\n{}", quantizers(&runs, model));
    let quantizers: String = [EMBEDDED, SMOLLM2].into_iter().filter(there).map(of).collect();
    Ok(format!("{quantizers}\n{}", loftq(&runs)))
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    let log = Log::open(options.log.as_deref(), NAME, VERSION)?;
    let cases = if options.table { Vec::new() } else { Case::all(options.smollm2.as_ref()) };
    for case in cases {
        let base = case.open(Scheme::Dense)?;
        let texts = Texts::of(&base, &case)?;
        let bench = Bench { case: &case, base, texts };
        for scheme in schemes() {
            for (how, rounding) in ROUNDINGS {
                // Half-quadratic quantization moves zero points, which codebooks don't have.
                if rounding != Rounding::Hqq || scheme.starts_with("affine") {
                    bench.once(&log, &scheme, how, &Calibration::Rtn(rounding))?;
                }
            }
        }
        for (how, config) in loftqs() {
            bench.once(&log, LOFTQ, &how, &Calibration::Loftq(config))?;
        }
    }
    print!("{}{}", tables(&log)?, log.time_taken()?);
    Ok(())
}
