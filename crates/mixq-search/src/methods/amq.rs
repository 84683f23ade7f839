//! AMQ's search (arXiv 2509.12019).

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;

use super::{
    Individual, Nsga2, Nsga2State, SearchMethod,
    pool::{Model, archive_front, first_design, new_sample},
};
use crate::{Config, Error, Result, SearchSpace, Session, SurrogateKind, moves::stream};

/// Radial basis functions predict the loss, NSGA-II searches on the prediction, and the plans that fill the largest
/// gaps along memory are measured. Units that alone do too much harm at their smallest choice are frozen at their
/// largest in all plans but the uniform and the smallest one.
///
/// Differences from the published method: its sizes (250 first plans, 200 rounds of 50) are shares of the evaluations
/// here, the gap-filling choice is greedy instead of a small genetic algorithm, the front and the latest `max_fit`
/// observations are fitted, units are frozen only where a third of the first plans pays for measuring them, and a
/// round that finds nothing new measures a random plan.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `initial` | 0.25 | share of the evaluations for first plans, the freezing included |
/// | `rounds` | 12 | fits that share the rest |
/// | `population`, `generations` | 100, 20 | NSGA-II on the predictions |
/// | `freeze_above` | 2 | times the median harm; infinite never freezes |
/// | `max_fit` | 500 | observations that are fitted |
#[derive(Debug, Clone, PartialEq)]
pub struct Amq {
    /// Share for first plans.
    pub initial: f64,
    /// Rounds.
    pub rounds: usize,
    /// Population on the predictions.
    pub population: usize,
    /// Generations on the predictions.
    pub generations: usize,
    /// Freezing threshold.
    pub freeze_above: f64,
    /// Observations used.
    pub max_fit: usize,
}

impl Default for Amq {
    fn default() -> Self {
        Self { initial: 0.25, rounds: 12, population: 100, generations: 20, freeze_above: 2.0, max_fit: 500 }
    }
}

impl SearchMethod for Amq {
    fn name(&self) -> &'static str {
        "amq"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        if !(self.initial > 0.0 && self.initial <= 1.0) || self.rounds == 0 || self.population < 4 {
            let found = format!("{}, {} and {}", self.initial, self.rounds, self.population);
            return Err(Error::option(
                "Amq.initial, rounds and population",
                "0 to 1, at least 1 and 4",
                found,
            ));
        }
        let settings = session.settings();
        let frozen = self.frozen(session)?;
        let first = (settings.evaluations as f64 * self.initial) as usize;
        let left = first.saturating_sub(session.spent() as usize).max(2);
        let space = session.space();
        let mut design = space.uniform();
        design.push(space.lowest());
        design.retain(|config| session.fits(config) && !session.known(config));
        let mut sampled = first_design(session, left, &mut stream(settings.seed, "amq start", 0));
        sampled.iter_mut().skip(1).for_each(|config| freeze(session, &frozen, config));
        design.append(&mut sampled);
        let mut seen = HashSet::new();
        design.retain(|config| seen.insert(config.clone()));
        design.truncate(left);
        session.evaluate(&design)?;
        let per_round = (session.remaining() / self.rounds as f64).ceil().max(1.0) as usize;
        let mut round = 0;
        while session.remaining() >= 1.0 && session.archive().iter().any(|seen| seen.loss.is_finite()) {
            round += 1;
            let mut rng = stream(settings.seed, "amq round", round);
            let found = self.predicted_front(session, &frozen, round, &mut rng)?;
            let mut picked = fill_gaps(session, found, per_round.min(session.remaining() as usize));
            if picked.is_empty() {
                let Some(config) = new_sample(session, &[], &mut rng, SearchSpace::sample_stratified) else {
                    break;
                };
                picked.push(config);
            }
            session.evaluate(&picked)?;
        }
        Ok(())
    }
}

impl Amq {
    /// Measures every unit alone at its smallest choice, if a third of the first plans pays for that, and returns the
    /// units that do more than `freeze_above` times the median harm.
    fn frozen(&self, session: &mut Session<'_>) -> Result<Vec<usize>> {
        let space = session.space();
        let affordable = session.settings().evaluations as f64 * self.initial;
        let units: Vec<usize> = (0..space.units().len()).filter(|&unit| space.choices(unit) > 1).collect();
        if self.freeze_above.is_infinite() || (units.len() + 1) as f64 > affordable / 3.0 {
            return Ok(Vec::new());
        }
        let anchor = space.highest();
        let alone = |&unit: &usize| {
            let mut config = anchor.clone();
            config.0[unit] = 0;
            config
        };
        let mut plans = vec![anchor.clone()];
        plans.extend(units.iter().map(alone));
        let losses: Vec<f64> = session.evaluate(&plans)?.into_iter().flatten().collect();
        let harm: Vec<f64> = losses.iter().skip(1).map(|loss| loss - losses[0]).collect();
        let mut sorted = harm.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
        let frozen: Vec<usize> = units
            .iter()
            .zip(&harm)
            .filter(|(_, harm)| median > 0.0 && **harm > self.freeze_above * median)
            .map(|(unit, _)| *unit)
            .collect();
        session.note("frozen_units", frozen.iter().map(|&unit| space.units()[unit].name.clone()).collect());
        Ok(frozen)
    }

    fn predicted_front(
        &self,
        session: &Session<'_>,
        frozen: &[usize],
        round: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Vec<Config>> {
        let settings = session.settings();
        let model = Model::fit(session, SurrogateKind::Rbf, self.max_fit, settings.seed)?;
        let individual = |config: Config| Individual {
            bytes: session.space().bytes(&config),
            loss: Some(model.predict(&config).typical()),
            config,
        };
        let mut population = archive_front(session);
        population.truncate(self.population);
        while population.len() < self.population {
            let mut config = session.space().sample_stratified(rng);
            freeze(session, frozen, &mut config);
            population.push(config);
        }
        let options = Nsga2 { mutation: Some(0.1), ..Nsga2::default() };
        let seed = stream_seed(settings.seed, round);
        let mut state = Nsga2State {
            population: population.into_iter().map(individual).collect(),
            ..Nsga2State::new(seed)
        };
        for _ in 0..self.generations {
            let mut children = state.breed(&options, session.space(), settings.max_bytes, |_| false);
            children.iter_mut().for_each(|config| freeze(session, frozen, config));
            state.select(children.into_iter().map(individual).collect(), self.population);
        }
        let mut found: Vec<Config> = state.population.into_iter().map(|one| one.config).collect();
        found.sort();
        found.dedup();
        found.retain(|config| session.fits(config) && !session.known(config));
        Ok(found)
    }
}

/// Puts frozen units at their largest choice, unless the limit forbids it.
fn freeze(session: &Session<'_>, frozen: &[usize], config: &mut Config) {
    let mut held = config.clone();
    for &unit in frozen {
        held.0[unit] = (session.space().choices(unit) - 1) as u8;
    }
    if session.fits(&held) {
        *config = held;
    }
}

fn stream_seed(seed: u64, round: u64) -> u64 {
    use rand::RngExt;
    stream(seed, "amq nsga2", round).random()
}

/// Up to `count` plans, each the one farthest in memory from the front and from those before.
fn fill_gaps(session: &Session<'_>, mut found: Vec<Config>, count: usize) -> Vec<Config> {
    let space = session.space();
    let mut covered: Vec<u64> = archive_front(session).iter().map(|config| space.bytes(config)).collect();
    let mut picked = Vec::new();
    while picked.len() < count && !found.is_empty() {
        let gap = |config: &Config| {
            let bytes = space.bytes(config);
            covered.iter().map(|known| known.abs_diff(bytes)).min().unwrap_or(u64::MAX)
        };
        let gaps: Vec<u64> = found.iter().map(gap).collect();
        let widest = (0..gaps.len()).fold(0, |best, i| if gaps[i] > gaps[best] { i } else { best });
        let config = found.swap_remove(widest);
        covered.push(space.bytes(&config));
        picked.push(config);
    }
    picked
}
