//! The default: sensitivities, exact knapsack, refinement on the end-to-end loss.

use rand::RngExt;

use super::{
    SearchMethod,
    pool::{Candidate, Scale, pick, reference, staircase},
};
use crate::{
    Config, Error, Prediction, Result, Ridge, SearchSpace, Session, Surrogate, knapsack, moves::stream,
    surrogate::ehvi::Belief,
};

/// Knapsack solutions that are looked at when the ones to measure are chosen.
const MAX_SOLUTIONS: usize = 2000;

/// A step of successive screening.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Screen {
    /// Share of the full amount that offspring are measured on.
    pub share: f64,
    /// Offspring that pass.
    pub keep: usize,
}

/// Sensitivities by one-at-a-time measurements, an exact multiple-choice knapsack for every budget, then elitist
/// `(1 + lambda)` refinement by swaps at several budgets.
///
/// 1. The uniform plans, so that no result is worse than those.
/// 2. The harm of each unit at each choice, all others at their largest: `U (B - 1) + 1` evaluations; clipped at 0 and
///    made monotone. Where that is more than half of what is left, the smallest choices come first and the rest is
///    interpolated in bytes; where not even those can be paid, evenly spaced units are measured and the others get
///    the median harm per byte.
/// 3. The knapsack's front; half of what is left measures the solutions with the largest predicted hypervolume.
/// 4. At each of `budgets` memories in turn: `offspring` plans by swaps from the best plan that fits; a correction of
///    the additive model, fitted to everything measured, keeps `screened` of them, `screens` (successive shares of the
///    tokens) may narrow them further, and the survivors are measured in full.
///
/// The recoverability check by short fine-tunes is [`Halving`](crate::Halving), a stage of
/// [`search`](crate::search()). The prescreening by a model is an addition to the specification, which screens 32 → 8 →
/// 2 → 1 on 2k → 8k → 32k tokens: `screened: 32, screens: vec![Screen { share: 1/16, keep: 8 }, Screen { share: 1/4, keep: 2 }]`.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `budgets` | none | memories to refine at; none is one for every 12 evaluations left, 5 to 24 |
/// | `offspring` | 32 | swaps tried per step |
/// | `screened` | 1 | offspring that pass the model |
/// | `screens` | none | further screens on fewer tokens |
/// | `patience`, `generations` | 10, 60 | a budget ends after so many steps without gain, or in all |
#[derive(Debug, Clone, PartialEq)]
pub struct KlMix {
    /// Memories to refine at.
    pub budgets: Option<usize>,
    /// Swaps tried per step.
    pub offspring: usize,
    /// Offspring that pass the model.
    pub screened: usize,
    /// Screens on fewer tokens.
    pub screens: Vec<Screen>,
    /// Steps without gain.
    pub patience: usize,
    /// Steps in all.
    pub generations: usize,
}

impl Default for KlMix {
    fn default() -> Self {
        Self { budgets: None, offspring: 32, screened: 1, screens: Vec::new(), patience: 10, generations: 60 }
    }
}

impl SearchMethod for KlMix {
    fn name(&self) -> &'static str {
        "klmix"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        self.check()?;
        let mut uniform = session.space().uniform();
        uniform.retain(|config| session.fits(config));
        session.evaluate(&uniform)?;
        let table = sensitivities(session)?;
        session.note("sensitivities", serde_json::json!(table));
        let solutions = solutions(session, &table)?;
        measure_solutions(session, &table, &solutions)?;
        self.refine(session, &table, &solutions)
    }
}

impl KlMix {
    fn check(&self) -> Result<()> {
        if self.offspring == 0 || self.screened == 0 || self.budgets == Some(0) {
            let found = format!("{}, {} and {:?}", self.offspring, self.screened, self.budgets);
            return Err(Error::option("KlMix.offspring, screened and budgets", "at least 1", found));
        }
        match self
            .screens
            .iter()
            .find(|screen| !(screen.share > 0.0 && screen.share < 1.0) || screen.keep == 0)
        {
            Some(screen) => Err(Error::option(
                "KlMix.screens",
                "shares in 0..1, keeping 1 or more",
                format!("{screen:?}"),
            )),
            None => Ok(()),
        }
    }

    fn refine(&self, session: &mut Session<'_>, table: &[Vec<f64>], solutions: &[Config]) -> Result<()> {
        let space = session.space();
        let top = session.settings().max_bytes.unwrap_or(u64::MAX).min(space.largest());
        let count = self.budgets.unwrap_or((session.remaining() / 12.0) as usize).clamp(1, 255);
        let count = if self.budgets.is_none() { count.clamp(5, 24) } else { count } as u64;
        let span = top - space.smallest();
        let budgets: Vec<u64> = (1..=count)
            .map(|k| space.smallest() + (u128::from(span) * u128::from(k) / u128::from(count)) as u64)
            .collect();
        let mut idle = vec![0; budgets.len()];
        'refining: for generation in 0..self.generations {
            for (level, &budget) in budgets.iter().enumerate() {
                if session.remaining() < 1.0 {
                    break 'refining;
                }
                if idle[level] < self.patience {
                    let gained =
                        self.step(session, table, budget, (generation * budgets.len() + level) as u64)?;
                    idle[level] = if gained { 0 } else { idle[level] + 1 };
                }
            }
            if idle.iter().all(|&idle| idle >= self.patience) {
                break;
            }
        }
        for &budget in &budgets {
            if let Some(solution) = solutions.iter().rev().find(|config| space.bytes(config) <= budget) {
                session.suggest(solution.clone());
            }
        }
        Ok(())
    }

    /// One generation at one budget; whether it found something better.
    fn step(&self, session: &mut Session<'_>, table: &[Vec<f64>], budget: u64, step: u64) -> Result<bool> {
        let inside = session.archive().iter().filter(|seen| seen.bytes <= budget && !seen.stopped);
        let Some(parent) = inside.min_by(|a, b| a.loss.total_cmp(&b.loss)).cloned() else { return Ok(false) };
        let mut rng = stream(session.settings().seed, "klmix", step);
        let mut offspring: Vec<Config> = Vec::new();
        for _ in 0..self.offspring {
            let swaps = rng.random_range(1..4usize).min(rng.random_range(1..4usize));
            let child = session.space().swap(&parent.config, swaps, budget, &mut rng);
            if !session.known(&child) && !offspring.contains(&child) {
                offspring.push(child);
            }
        }
        let model = Corrected::fit(session, table)?;
        let predicted: Vec<f64> = offspring.iter().map(|config| model.predict(config)).collect();
        keep_best(&mut offspring, &predicted, self.screened);
        for screen in &self.screens {
            if offspring.len() > screen.keep {
                let fidelity = session.settings().fidelity.share(screen.share);
                let seed = session.settings().evaluation_seed;
                let losses = session.evaluate_at(&offspring, fidelity, seed)?;
                let losses: Vec<f64> = losses.into_iter().map(|loss| loss.unwrap_or(f64::INFINITY)).collect();
                keep_best(&mut offspring, &losses, screen.keep);
            }
        }
        let losses = session.evaluate(&offspring)?;
        Ok(losses.into_iter().flatten().any(|loss| loss < parent.loss))
    }
}

fn keep_best(configs: &mut Vec<Config>, losses: &[f64], count: usize) {
    let mut order: Vec<usize> = (0..configs.len()).collect();
    order.sort_by(|&a, &b| losses[a].total_cmp(&losses[b]).then(a.cmp(&b)));
    order.truncate(count);
    *configs = order.into_iter().map(|index| configs[index].clone()).collect();
}

/// `[unit][choice]`: the loss of the largest plan with one unit at one choice, less that plan's loss.
fn sensitivities(session: &mut Session<'_>) -> Result<Vec<Vec<f64>>> {
    let space = session.space();
    let anchor = space.highest();
    let mut probes: Vec<(usize, usize)> = Vec::new();
    let most = (0..space.units().len()).map(|unit| space.choices(unit)).max().unwrap_or(1);
    for choice in 0..most {
        let smaller = |&unit: &usize| choice + 1 < space.choices(unit);
        probes.extend((0..space.units().len()).filter(smaller).map(|unit| (unit, choice)));
    }
    let lowest = probes.iter().filter(|(_, choice)| *choice == 0).count();
    let affordable = ((session.remaining() / 2.0) as usize).max(1);
    if affordable < lowest {
        probes = (0..affordable).map(|index| probes[index * lowest / affordable]).collect();
    }
    probes.truncate(affordable);
    let mut plans = vec![anchor.clone()];
    plans.extend(probes.iter().map(|&(unit, choice)| {
        let mut config = anchor.clone();
        config.0[unit] = choice as u8;
        config
    }));
    let losses = session.evaluate(&plans)?;
    let base = losses[0].filter(|loss| loss.is_finite()).unwrap_or(0.0);
    let mut table: Vec<Vec<Option<f64>>> =
        (0..space.units().len()).map(|unit| vec![None; space.choices(unit)]).collect();
    let worst = losses.iter().flatten().filter(|loss| loss.is_finite()).fold(base, |a, b| a.max(*b)) - base;
    for (&(unit, choice), loss) in probes.iter().zip(&losses[1..]) {
        // A unit that breaks the model there is worse than any other.
        table[unit][choice] =
            loss.map(|loss| if loss.is_finite() { (loss - base).max(0.0) } else { 10.0 * worst + 1.0 });
    }
    fill_unmeasured(space, &mut table);
    Ok(table.into_iter().enumerate().map(|(unit, row)| complete(space, unit, row)).collect())
}

/// Gives units without any measurement the others' median harm per byte that the smallest choice saves.
fn fill_unmeasured(space: &SearchSpace, table: &mut [Vec<Option<f64>>]) {
    let saved = |unit: usize| {
        let bytes = &space.weights()[unit];
        bytes[bytes.len() - 1].saturating_sub(bytes[0]) as f64
    };
    let mut rates: Vec<f64> = (0..table.len())
        .filter(|&unit| saved(unit) > 0.0)
        .filter_map(|unit| Some(table[unit][0]? / saved(unit)))
        .collect();
    rates.sort_by(f64::total_cmp);
    let Some(&median) = rates.get(rates.len() / 2) else { return };
    for (unit, row) in table.iter_mut().enumerate() {
        if row.iter().all(Option::is_none) {
            row[0] = Some(median * saved(unit));
        }
    }
}

/// Fills a unit's gaps by interpolation in bytes, ends at 0, never rises with the bytes.
fn complete(space: &SearchSpace, unit: usize, mut row: Vec<Option<f64>>) -> Vec<f64> {
    let bytes = |choice: usize| space.weights()[unit][choice] as f64;
    if let Some(last) = row.last_mut() {
        *last = Some(0.0);
    }
    let mut filled: Vec<f64> = (0..row.len())
        .map(|choice| {
            let known = |at: &usize| row[*at].is_some();
            let below = (0..=choice).rev().find(known);
            let above = (choice..row.len()).find(known).unwrap_or(row.len() - 1);
            let high = row[above].unwrap_or(0.0);
            match below {
                Some(below) if bytes(above) > bytes(below) => {
                    let low = row[below].unwrap_or(0.0);
                    low + (high - low) * (bytes(choice) - bytes(below)) / (bytes(above) - bytes(below))
                }
                _ => high,
            }
        })
        .collect();
    for choice in (0..filled.len().saturating_sub(1)).rev() {
        filled[choice] = filled[choice].max(filled[choice + 1]);
    }
    filled
}

/// The knapsack's front within the limit, by growing memory.
fn solutions(session: &Session<'_>, table: &[Vec<f64>]) -> Result<Vec<Config>> {
    let mut front: Vec<Config> =
        knapsack(session.space().weights(), table)?.into_iter().map(|p| p.config).collect();
    front.retain(|config| session.fits(config));
    Ok(front)
}

/// Measures half of what is left: the solutions with the largest predicted hypervolume, each given those before.
fn measure_solutions(session: &mut Session<'_>, table: &[Vec<f64>], solutions: &[Config]) -> Result<()> {
    let step = solutions.len().div_ceil(MAX_SOLUTIONS).max(1);
    let count = (session.remaining() / 2.0).ceil().max(1.0) as usize;
    let model = Corrected::fit(session, table)?;
    let candidate =
        |config: &Config| Candidate::new(session, config.clone(), Belief::certain(model.predict(config)));
    let candidates: Vec<_> =
        solutions.iter().step_by(step).filter(|config| !session.known(config)).map(candidate).collect();
    let mut ends = reference(session);
    // Predictions may lie above everything measured so far.
    let predicted = || candidates.iter().map(|candidate| candidate.belief.typical());
    let (worst, best) = (predicted().fold(ends[1], f64::max), predicted().fold(ends[1], f64::min));
    ends[1] = worst + 0.05 * (worst - best);
    let stairs = staircase(session, ends);
    let picked: Vec<Config> = if candidates.len() <= count {
        candidates.into_iter().map(|candidate| candidate.config).collect()
    } else {
        pick(stairs, &candidates, count, false).into_iter().map(|(config, _)| config).collect()
    };
    session.evaluate(&picked)?;
    Ok(())
}

/// The additive model with a linear correction of its logarithm, fitted to everything measured.
struct Corrected<'s, 't> {
    space: &'s SearchSpace,
    table: &'t [Vec<f64>],
    base: f64,
    scale: Scale,
    /// None as long as nothing could be measured.
    ridge: Option<Ridge>,
}

impl<'s, 't> Corrected<'s, 't> {
    fn fit(session: &Session<'s>, table: &'t [Vec<f64>]) -> Result<Self> {
        let seen: Vec<_> = session.archive().iter().filter(|seen| seen.loss.is_finite()).collect();
        let scale = Scale::of(seen.iter().map(|seen| seen.loss));
        let space = session.space();
        let highest = space.highest();
        let base = seen.iter().find(|seen| seen.config == highest).map_or(0.0, |seen| seen.loss);
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for seen in seen {
            let sum = scale.forward(base + additive(table, &seen.config));
            x.push(features(space, &seen.config, sum));
            y.push(scale.forward(seen.loss) - sum);
        }
        let ridge = if x.is_empty() { None } else { Some(Ridge::fit(&x, &y, 0.3)?) };
        Ok(Self { space, table, base, scale, ridge })
    }

    fn predict(&self, config: &Config) -> f64 {
        let sum = self.scale.forward(self.base + additive(self.table, config));
        let correct = |ridge: &Ridge| ridge.predict(&features(self.space, config, sum)).mean;
        let correction = self.ridge.as_ref().map_or(0.0, correct);
        self.scale.back(Prediction { mean: sum + correction, sd: 0.0 }).typical()
    }
}

fn additive(table: &[Vec<f64>], config: &Config) -> f64 {
    table.iter().zip(&config.0).map(|(unit, &choice)| unit[usize::from(choice)]).sum()
}

/// The additive model's own prediction and one indicator per unit and choice.
fn features(space: &SearchSpace, config: &Config, sum: f64) -> Vec<f64> {
    let mut features = vec![sum];
    for (unit, &choice) in config.0.iter().enumerate() {
        features
            .extend((0..space.choices(unit)).map(|index| f64::from(u8::from(index == usize::from(choice)))));
    }
    features
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::toy_space;

    #[test]
    fn gaps_are_interpolated_and_rows_fall() {
        let space = toy_space(1, 4);
        let row = complete(&space, 0, vec![Some(6.0), None, None, None]);
        for (found, expected) in row.iter().zip([6.0, 4.0, 2.0, 0.0]) {
            assert!((found - expected).abs() < 1e-12, "{row:?}");
        }
        assert_eq!(complete(&space, 0, vec![Some(1.0), Some(3.0), Some(0.5), None]), [3.0, 3.0, 0.5, 0.0]);
    }

    #[test]
    fn best_offspring_stay() {
        let mut configs: Vec<Config> = (0..4).map(|i| Config(vec![i])).collect();
        keep_best(&mut configs, &[3.0, 1.0, f64::INFINITY, 2.0], 2);
        assert_eq!(configs, [Config(vec![1]), Config(vec![3])]);
    }
}
