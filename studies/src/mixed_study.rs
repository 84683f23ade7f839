//! Bits by layer: which objective ranks plans of equal bytes as they end up after tuning, and what a plan that was searched is
//! worth on a task beside uniform ones, on models pruned by different ratios.

use std::path::{Path, PathBuf};

use kiln::{
    Base,
    calibration::{ApiqConfig, Method as Calibration},
    eval::{PythonRandom, Sample},
    mixq::{Choices, KlOptions, ModelObjective, Variants, schemes, space_of},
    mixq_search::{Config, Fidelity, Granularity, Measure, Objective, Plan, Request, SearchSpace},
    models::Windows,
    quant::{Plan as Schemes, Scheme},
    training::Dataset,
};
use kiln_examples::{Questions, Result, testdata};
use serde_json::{Map, Value, json};

use crate::{
    bench::{Case, Cell, Chosen, EMBEDDED, Run, SMOLLM2, StudyOptions, Texts, head, line_of, with_deviation},
    compress::{bytes_of, loftq, lora, pruned, rounding, searched, space, space_by_block, started_by},
    log::{Line, Log},
    numbers::{deviation, mean, significant},
};

pub(crate) const NAME: &str = "mixed-bits";
pub(crate) const VERSION: u32 = 1;
const SCHEMES: [&str; 3] = ["affine2:64:int:f16", "affine3:64:int:f16", "affine4:64:int:f16"];
/// What searches by kind choose from besides.
const CODEBOOKS: [&str; 2] = ["nf3:64:f16", "nf4:64:f16"];
/// Whose bytes are the limit.
const WITHIN: &str = "affine3:64:int:f16";
/// A lower limit, below which no uniform plan of 3 bits is.
const BELOW: &str = "affine2:32:int:f16";
/// Passes of ApiQ over the windows.
const EPOCHS: usize = 6;
/// Plans of about equal bytes that are ranked.
const RANKED: u64 = 20;

/// What a case may spend.
struct Budget {
    windows: usize,
    evaluations: usize,
    seeds: u64,
    /// Shares of the model that are pruned.
    ratios: &'static [f64],
    methods: &'static [Method],
    /// Those that the others are compared with, by what the table calls them.
    rivals: &'static [(Method, &'static str)],
    /// What the tasks are called together, of which each fine-tune learns all, and in how many steps.
    learned: &'static str,
    tasks: &'static [&'static str],
    steps: u64,
    lr: f64,
    /// Steps after which plans are ranked, and seeds of them.
    ranked_steps: u64,
    ranked_seeds: u64,
}

impl Budget {
    fn of(case: &Case) -> Self {
        match case.name {
            EMBEDDED => Self {
                windows: 16,
                evaluations: 120,
                seeds: 3,
                ratios: &[0.2, 0.3, 0.5],
                methods: &Method::ALL,
                rivals: &[(Method::Searched, "searched")],
                learned: "letters",
                tasks: &["eval/letters.json"],
                steps: 200,
                lr: 3e-3,
                ranked_steps: 120,
                ranked_seeds: 5,
            },
            _ => Self {
                windows: 8,
                evaluations: 120,
                seeds: 3,
                ratios: &[0.2, 0.3, 0.5],
                methods: &Method::FEW,
                rivals: &[
                    (Method::Searched, "searched"),
                    (Method::SearchedByKind(WITHIN), "searched by kind"),
                    (Method::SearchedByKind(BELOW), "searched below"),
                ],
                learned: "quiz",
                tasks: &[
                    "eval/quiz/bsdquiz_words.json",
                    "eval/quiz/wordnet_words.json",
                    "eval/quiz/quiz_partial.json",
                ],
                steps: 60,
                lr: 1e-3,
                ranked_steps: 60,
                ranked_seeds: 1,
            },
        }
    }
}

/// A plan of at most `limit` bytes and at least 99 % of them, drawn by `seed`.
fn random_plan(space: &SearchSpace, limit: u64, seed: u64) -> Result<Config> {
    let mut random = PythonRandom::new(seed);
    for _ in 0..100_000 {
        let units = 0..space.units().len();
        let config = Config(units.map(|unit| random.choose(space.choices(unit)) as u8).collect());
        if (limit / 100 * 99..=limit).contains(&space.bytes(&config)) {
            return Ok(config);
        }
    }
    Err(format!("no plan of 99 to 100 % of {limit} bytes in 100,000 draws").into())
}

/// What each objective says of random plans, and what they end at; nothing of those that diverge.
fn rank(log: &Log, case: &Case, budget: &Budget) -> Result<()> {
    let base = case.open(Scheme::Dense)?;
    let texts = Texts::of(&base, case)?;
    let (space, limit) = (space_by_block(&base, &SCHEMES, None)?, bytes_of(&base, WITHIN)?);
    let windows = texts.windows(case.length, budget.windows, 0)?;
    let new = || ModelObjective::new(Variants::new(base.model().clone()), &windows, &KlOptions::default());
    let (mut rounded, mut started) = (new()?, new()?.with_start(loftq(), lora(0))?);
    let tuned = |plan: &Plan, seed: u64| -> Result<Option<[f64; 2]>> {
        let start = started_by(&base, schemes(plan)?, loftq(), lora(seed), &windows)?;
        let trainer = case.trainer(budget.ranked_steps, seed, 1e-2 * case.rate);
        match start.finetune(texts.train.clone()).with_trainer(trainer).run() {
            Err(error) if error.is_not_finite() => Ok(None),
            tuned => {
                let tuned = tuned?;
                texts.losses(|data| tuned.evaluate(data)).map(Some)
            }
        }
    };
    for ranked in 0..RANKED {
        let config = random_plan(&space, limit, ranked)?;
        let plan = space.plan(&config);
        log.once(json!({ "model": case.name, "ranked": ranked }), || {
            let tokens = rounded.tokens();
            let score = |objective: &mut ModelObjective, measure: Measure| -> Result<f64> {
                let fidelity = Fidelity { measure, amount: tokens };
                let request = Request::new(&config, &plan, fidelity, 0);
                Ok(objective.evaluate(&request, &mut |_, _| true).map_err(|error| error.to_string())?.score)
            };
            let [kl, error, fisher] = [
                score(&mut rounded, Measure::Kl)?,
                score(&mut rounded, Measure::ActivationError)?,
                score(&mut rounded, Measure::Fisher)?,
            ];
            let of_start = score(&mut started, Measure::Kl)?;
            let [validation, test] = tuned(&plan, 0)?.map_or([None; 2], |losses| losses.map(Some));
            Ok(line_of(json!({
                "bytes": space.bytes(&config), "limit": limit, "plan": plan, "kl": kl, "kl_loftq": of_start,
                "activation_error": error, "fisher": fisher, "validation": validation, "test": test,
            })))
        })?;
        for seed in 1..budget.ranked_seeds {
            log.once(json!({ "model": case.name, "ranked": ranked, "again": seed }), || {
                let [validation, test] = tuned(&plan, seed)?.map_or([None; 2], |losses| losses.map(Some));
                Ok(line_of(json!({ "validation": validation, "test": test })))
            })?;
        }
    }
    Ok(())
}

/// A model on a task.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Method {
    /// One format, LoRA's own start.
    Lora(&'static str),
    /// One format, started by LoftQ.
    Loftq(&'static str),
    /// One format, started by ApiQ.
    Apiq(&'static str),
    Searched,
    SearchedApiq,
    /// By kind of projection in all blocks, among codebooks too, within the bytes of a format.
    SearchedByKind(&'static str),
    Random(u64),
}

impl Method {
    const ALL: [Self; 12] = [
        Self::Lora("dense"),
        Self::Lora("nf4:64:double"),
        Self::Loftq("affine4:64:int:f16"),
        Self::Loftq("nf3:64:f16"),
        Self::Loftq(WITHIN),
        Self::Apiq(WITHIN),
        Self::Searched,
        Self::SearchedApiq,
        Self::Random(0),
        Self::Random(1),
        Self::Random(2),
        Self::Loftq("affine2:64:int:f16"),
    ];

    /// Those that tell whether a searched plan is worth its search.
    const FEW: [Self; 9] = [
        Self::SearchedByKind(WITHIN),
        Self::Searched,
        Self::Loftq("nf3:64:f16"),
        Self::Loftq(WITHIN),
        Self::SearchedByKind(BELOW),
        Self::Loftq(BELOW),
        Self::Loftq("nf2:16:f16"),
        Self::Random(0),
        Self::Lora("dense"),
    ];

    fn name(self) -> String {
        match self {
            Self::Lora(scheme) => format!("`{scheme}`, LoRA"),
            Self::Loftq(scheme) => format!("`{scheme}`, LoftQ"),
            Self::Apiq(scheme) => format!("`{scheme}`, ApiQ"),
            Self::Searched => format!("searched within `{WITHIN}`, LoftQ"),
            Self::SearchedApiq => format!("searched within `{WITHIN}`, ApiQ"),
            Self::SearchedByKind(limit) => {
                format!("searched by kind, codebooks too, within `{limit}`, LoftQ")
            }
            Self::Random(seed) => format!("random within `{WITHIN}`, LoftQ, {seed}"),
        }
    }
}

/// A pruned model with everything to compress it.
struct Pruned<'a> {
    log: &'a Log,
    model: &'a str,
    ratio: f64,
    base: Base,
    space: SearchSpace,
    by_kind: SearchSpace,
    windows: Windows,
    budget: &'a Budget,
}

impl Pruned<'_> {
    fn plan(&self, method: Method) -> Result<Option<Plan>> {
        let limit = bytes_of(&self.base, WITHIN)?;
        Ok(match method {
            Method::Lora(_) => None,
            Method::Loftq(scheme) | Method::Apiq(scheme) => {
                let uniform = space_of(self.base.model(), &Choices::new([scheme.parse()?]))?;
                Some(uniform.plan(&uniform.lowest()))
            }
            Method::Random(seed) => Some(self.space.plan(&random_plan(&self.space, limit, seed)?)),
            Method::Searched | Method::SearchedApiq => {
                Some(self.best(Method::Searched, &self.space, limit)?)
            }
            Method::SearchedByKind(limit) => {
                Some(self.best(method, &self.by_kind, bytes_of(&self.base, limit)?)?)
            }
        })
    }

    /// The plan that a search finds; the log has it where a run of `method` is.
    fn best(&self, method: Method, space: &SearchSpace, limit: u64) -> Result<Plan> {
        let name = named(self.budget.learned, self.ratio, method);
        let is = |line: &Line, key: &str, value: &str| line.get(key).is_some_and(|found| found == value);
        let mut lines = self.log.lines()?.into_iter();
        let logged = lines.find(|line| is(line, "model", self.model) && is(line, "method", &name));
        match logged.and_then(|mut line| line.remove("plan")) {
            Some(plan) => Ok(serde_json::from_value(plan)?),
            None => searched(&self.base, space, &self.windows, self.budget.evaluations, limit, None),
        }
    }

    fn run(&self, case: &Case, tasks: &[Questions], method: Method, lr: f64, seed: u64) -> Result<Line> {
        let plan = self.plan(method)?;
        let (schemes, by) = match (&plan, method) {
            (Some(plan), Method::Apiq(_) | Method::SearchedApiq) => {
                // One set of values for all widths: those of the limit's.
                let config = ApiqConfig::for_budget(3, self.budget.windows, EPOCHS);
                (schemes(plan)?, Calibration::ApiqBlock(config))
            }
            (Some(plan), _) => (schemes(plan)?, loftq()),
            (None, Method::Lora(scheme)) => (Schemes::uniform(scheme.parse()?), rounding()),
            (None, _) => return Err("a plan".into()),
        };
        let start = started_by(&self.base, schemes, by, lora(seed), &self.windows)?;
        let bytes = match (&plan, method) {
            (None, Method::Lora(scheme)) | (_, Method::Loftq(scheme) | Method::Apiq(scheme)) => {
                bytes_of(&self.base, scheme)?
            }
            (Some(plan), Method::SearchedByKind(_)) => self.by_kind.bytes(&self.by_kind.config(plan)?),
            (Some(plan), _) => self.space.bytes(&self.space.config(plan)?),
            (None, _) => return Err("a plan".into()),
        };
        let trainer = case.trainer(self.budget.steps, seed, lr);
        // Every fifth row of what may be learned chooses the rate.
        let data = |chooses: bool| -> Result<Vec<Dataset>> {
            let of = |task: &Questions| {
                task.dataset(&self.base, case.length, |row| row.is_multiple_of(5) == chooses)
            };
            tasks.iter().map(of).collect()
        };
        let mut learned = data(false)?;
        let learned = match learned.len() {
            1 => learned.remove(0),
            _ => Dataset::mixture(learned.into_iter().map(|data| (data, 1.0)))?,
        };
        let tuned = start.finetune(learned).with_trainer(trainer).run()?;
        let losses =
            data(true)?.iter().map(|data| Ok(tuned.evaluate(data)?.nll)).collect::<Result<Vec<_>>>()?;
        let mut answered = Map::new();
        for task in tasks {
            let folder = tempfile::tempdir()?;
            let answers = folder.path().join("answers.jsonl");
            let accuracy = task.accuracy(tuned.model(), self.base.tokenizer(), &answers)?;
            let found = json!({ "accuracy": accuracy, "right": right(&answers)? });
            answered.insert(task.name().to_owned(), found);
        }
        Ok(line_of(json!({
            "validation": mean(&losses), "tasks": answered, "bytes": bytes, "plan": plan,
            "steps": self.budget.steps,
        })))
    }
}

/// Of each document of a log of answers, whether it was right: `1` or `0`.
fn right(log: &Path) -> Result<String> {
    let mut right = String::new();
    // The first line says what was asked of whom.
    for line in std::fs::read_to_string(log)?.lines().skip(1) {
        let sample: Sample = serde_json::from_str(line)?;
        right.push(if sample.prediction == sample.answer { '1' } else { '0' });
    }
    Ok(right)
}

fn tune(log: &Log, case: &Case, budget: &Budget) -> Result<()> {
    let tasks = questions(budget)?;
    for &ratio in budget.ratios {
        let base = case.open(Scheme::Dense)?;
        let texts = Texts::of(&base, case)?;
        let windows = texts.windows(case.length, budget.windows, 0)?;
        let base = pruned(&base, ratio, &windows)?;
        let pruned = Pruned {
            log,
            model: case.name,
            ratio,
            space: space_by_block(&base, &SCHEMES, None)?,
            by_kind: space(&base, &[&SCHEMES[..], &CODEBOOKS].concat(), Granularity::Kind, None)?,
            base,
            windows,
            budget,
        };
        for &method in budget.methods {
            let name = named(budget.learned, ratio, method);
            let cell = Cell { model: case.name, bits: 0, method: &name };
            let rates = [0.3 * budget.lr, budget.lr, 3.0 * budget.lr];
            cell.study(log, &rates, budget.seeds, |lr, seed| pruned.run(case, &tasks, method, lr, seed))?;
        }
    }
    Ok(())
}

fn questions(budget: &Budget) -> Result<Vec<Questions>> {
    let open = |task: &&str| Questions::open(testdata(task).to_str(), Path::new("data"), 1000);
    budget.tasks.iter().map(open).collect()
}

/// What a run says of a task; runs of one task said it without naming it.
fn said<'a>(run: &'a Run, task: &str, what: &str) -> Option<&'a Value> {
    match run.more.get("tasks") {
        Some(tasks) => tasks.get(task)?.get(what),
        None => run.more.get(what),
    }
}

fn named(task: &str, ratio: f64, method: Method) -> String {
    format!("{task}, pruned {ratio}, {}", method.name())
}

/// Spearman's correlation of two lists.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| -> Vec<f64> {
        let below = |value: f64| values.iter().filter(|other| **other < value).count() as f64;
        let same = |value: f64| values.iter().filter(|other| **other == value).count() as f64;
        values.iter().map(|value| below(*value) + (same(*value) - 1.0) / 2.0).collect()
    };
    let (a, b) = (ranks(a), ranks(b));
    let (of_a, of_b) = (mean(&a), mean(&b));
    let products: f64 = a.iter().zip(&b).map(|(a, b)| (a - of_a) * (b - of_b)).sum();
    let squares = |values: &[f64], mean: f64| values.iter().map(|value| (value - mean).powi(2)).sum::<f64>();
    products / (squares(&a, of_a) * squares(&b, of_b)).sqrt()
}

fn ranks_table(lines: &[Line], model: &str) -> String {
    let figure = |line: &Line, key: &str| line.get(key).and_then(Value::as_f64);
    let of_model = |line: &&Line| line.get("model").is_some_and(|name| name == model);
    let mine: Vec<&Line> = lines.iter().filter(of_model).collect();
    let plans: Vec<&Line> = mine.iter().copied().filter(|line| line.contains_key("kl")).collect();
    if plans.len() < 3 {
        return String::new();
    }
    // The mean over seeds; nothing of a plan that diverged under one.
    let loss = |plan: &Line, key: &str| -> Option<f64> {
        let same = mine.iter().filter(|line| line.get("ranked") == plan.get("ranked"));
        let losses: Option<Vec<f64>> = same.map(|line| figure(line, key)).collect();
        losses.map(|losses| mean(&losses))
    };
    let mut text = format!("\n{model}, {} plans, {} runs", plans.len(), mine.len());
    for key in ["validation", "test"] {
        let of_plan = |plan: &&Line| -> Vec<f64> {
            let same = mine.iter().filter(|line| line.get("ranked") == plan.get("ranked"));
            same.filter_map(|line| figure(line, key)).collect()
        };
        let losses: Vec<Vec<f64>> = plans.iter().map(of_plan).collect();
        let means: Vec<f64> = losses.iter().map(|losses| mean(losses)).collect();
        let within: Vec<f64> = losses.iter().filter_map(|losses| deviation(losses)).collect();
        let between = deviation(&means).unwrap_or_default();
        text += &format!("; {key}: plans {between:.4} apart, seeds {:.4}", mean(&within));
    }
    text += "\n\n";
    text += &head("objective | text for choices | test");
    for (key, name) in [
        ("kl", "divergence of the rounded model (`kl`)"),
        ("kl_loftq", "divergence with LoftQ's factors (`kl_loftq`)"),
        ("activation_error", "activations' error"),
        ("fisher", "Fisher"),
        ("bytes", "bytes"),
    ] {
        let correlation = |of: &str| {
            let both = |line: &&Line| Some((figure(line, key)?, loss(line, of)?));
            let (scores, losses): (Vec<f64>, Vec<f64>) = plans.iter().filter_map(both).unzip();
            spearman(&scores, &losses)
        };
        text += &format!("| {name} | {:.2} | {:.2} |\n", correlation("validation"), correlation("test"));
    }
    let (one, other): (Vec<f64>, Vec<f64>) =
        plans.iter().filter_map(|line| Some((loss(line, "validation")?, loss(line, "test")?))).unzip();
    text += &format!("| the other text's loss | {:.2} | |\n", spearman(&one, &other));
    text
}

/// Two-sided p of the exact sign test: of `n` documents on which two models differ, `k` for one of them. McNemar's, where each
/// model answered once.
fn sign_test(k: u32, n: u32) -> f64 {
    // In logarithms: a half to the power of a thousand is no number.
    let (mut term, mut sum) = (-f64::from(n) * 2f64.ln(), 0.0);
    for i in 0..=k.min(n - k) {
        sum += term.exp();
        term += f64::from(n - i).ln() - f64::from(i + 1).ln();
    }
    (2.0 * sum).min(1.0)
}

/// How often each document was answered right under the seeds that both have; the documents' differences, second less first.
fn differences(first: &[(u64, String)], second: &[(u64, String)]) -> Vec<i32> {
    let mut found: Vec<i32> = Vec::new();
    for (seed, answers) in first {
        let Some((_, others)) = second.iter().find(|(other, _)| other == seed) else { continue };
        found.resize(answers.len(), 0);
        for ((sum, one), other) in found.iter_mut().zip(answers.chars()).zip(others.chars()) {
            *sum += i32::from(other == '1') - i32::from(one == '1');
        }
    }
    found
}

fn tasks_table(runs: &[Run], case: &Case) -> Result<String> {
    let mut text = String::new();
    let budget = Budget::of(case);
    for task in questions(&budget)? {
        let name = task.name();
        for &ratio in budget.ratios {
            let chosen = |method: Method| {
                let method = named(budget.learned, ratio, method);
                (Cell { model: case.name, bits: 0, method: &method }).chosen(runs)
            };
            let answers = |found: &Chosen| -> Vec<(u64, String)> {
                let of = |run: &Run| Some((run.seed, said(run, name, "right")?.as_str()?.to_owned()));
                found.runs.iter().filter_map(of).collect()
            };
            if budget.methods.iter().all(|method| chosen(*method).is_none()) {
                continue;
            }
            text += &format!("\n{}, {name}, pruned by {ratio}\n\n", case.name);
            let rivals: Vec<_> = budget.rivals.iter().filter(|(rival, _)| chosen(*rival).is_some()).collect();
            let against = rivals.iter().map(|(_, name)| format!(" | p against {name}"));
            text += &head(&format!("plan | bytes | accuracy | rate{}", against.collect::<String>()));
            for &method in budget.methods {
                let Some(found) = chosen(method) else { continue };
                let bytes = found.values(|run| run.more.get("bytes")?.as_f64());
                let accuracy = found.values(|run| said(run, name, "accuracy")?.as_f64());
                let p_against = |rival: Method| {
                    let rivals = chosen(rival).map_or(Vec::new(), |found| answers(&found));
                    let differing = differences(&answers(&found), &rivals);
                    let [better, worse] = [1, -1]
                        .map(|sign| differing.iter().filter(|sum| sum.signum() == sign).count() as u32);
                    match method == rival || differing.is_empty() {
                        true => String::new(),
                        false => significant(sign_test(better, better + worse), 2),
                    }
                };
                let p = rivals.iter().map(|(rival, _)| p_against(*rival)).collect::<Vec<_>>();
                text += &format!(
                    "| {} | {} | {} | {} | {} |\n",
                    method.name(),
                    bytes.first().copied().unwrap_or_default(),
                    with_deviation(&accuracy, |value| format!("{value:.3}")),
                    found.rate(),
                    p.join(" | "),
                );
            }
        }
    }
    Ok(text)
}

pub(crate) fn tables(log: &Log) -> Result<String> {
    let (ranked, tuned): (Vec<Line>, Vec<Line>) =
        log.lines()?.into_iter().partition(|line| line.contains_key("ranked"));
    let tuned: serde_json::Result<Vec<Run>> =
        tuned.into_iter().map(|line| serde_json::from_value(line.into())).collect();
    let tuned = tuned?;
    let ranks = [EMBEDDED, SMOLLM2].map(|model| ranks_table(&ranked, model)).concat();
    // The tables need a case's name and tasks only.
    let cases = Case::all(Some(&PathBuf::new()));
    let tasks = cases.iter().map(|case| tasks_table(&tuned, case)).collect::<Result<String>>()?;
    Ok(ranks + &tasks)
}

pub(crate) fn run(options: &StudyOptions) -> Result<()> {
    let log = Log::open(options.log.as_deref(), NAME, VERSION)?;
    for case in Case::all(options.smollm2.as_ref()) {
        if !options.table {
            let budget = Budget::of(&case);
            tune(&log, &case, &budget)?;
            rank(&log, &case, &budget)?;
        }
    }
    print!("{}{}", tables(&log)?, log.time_taken()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_those_of_textbooks() {
        assert!((spearman(&[1.0, 2.0, 3.0, 4.0], &[10.0, 30.0, 20.0, 40.0]) - 0.8).abs() < 1e-12);
        assert_eq!(spearman(&[1.0, 2.0], &[2.0, 1.0]), -1.0);
        // 2 * (1 + 10 + 45) / 1024
        assert!((sign_test(2, 10) - 0.109375).abs() < 1e-12 && sign_test(0, 0) == 1.0);
        assert!(
            (sign_test(5, 10) - 1.0).abs() < 1e-12
                && sign_test(900, 2000) < 1e-5
                && sign_test(900, 2000) > 1e-6
        );
        // Paired by seed; the seed that one of them lacks doesn't count.
        let of = |runs: &[(u64, &str)]| {
            runs.iter().map(|(seed, right)| (*seed, (*right).into())).collect::<Vec<_>>()
        };
        let (first, second) = (of(&[(0, "110"), (2, "100")]), of(&[(1, "000"), (2, "111"), (0, "011")]));
        assert_eq!(differences(&first, &second), [-1, 1, 2]);
    }
}
