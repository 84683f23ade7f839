//! NSGA-II with a state that can be kept.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{SearchMethod, pool::first_design};
use crate::{
    Config, Error, Result, Ridge, SearchSpace, Session, crowding_distances,
    moves::{crossover, stream},
    non_dominated_ranks,
};

/// NSGA-II on memory and loss: tournament by rank and crowding, uniform crossover, mutation to neighbouring choices,
/// repair to the memory limit by the cheapest estimated damage per byte.
///
/// Unlike the published code's it survives between processes: run on the log of an earlier process it finds itself in
/// the generation where that one was, and [`Nsga2State`] can be serialized where a caller drives it itself.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `population` | 40 | at most a quarter of the evaluations is used |
/// | `crossover` | 0.9 | probability that a child has two parents |
/// | `mutation` | none | rate per unit; none is 1 / units |
#[derive(Debug, Clone, PartialEq)]
pub struct Nsga2 {
    /// Individuals that survive a generation.
    pub population: usize,
    /// Probability of crossover.
    pub crossover: f64,
    /// Mutation rate per unit.
    pub mutation: Option<f64>,
}

impl Default for Nsga2 {
    fn default() -> Self {
        Self { population: 40, crossover: 0.9, mutation: None }
    }
}

/// A measured plan in a population.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Individual {
    /// The plan.
    pub config: Config,
    /// Its bytes.
    pub bytes: u64,
    /// What is minimised; `None` for a plan that failed.
    pub loss: Option<f64>,
}

impl Individual {
    fn point(&self) -> [f64; 2] {
        [self.bytes as f64, self.loss.unwrap_or(f64::MAX)]
    }
}

/// Everything that NSGA-II carries from one generation to the next. Random draws are functions of seed and
/// generation, so a state read back goes on exactly as the one that was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Nsga2State {
    /// The search's seed.
    pub seed: u64,
    /// Generations bred so far.
    pub generation: u64,
    /// The survivors.
    pub population: Vec<Individual>,
}

impl Nsga2State {
    /// A state without survivors yet.
    pub fn new(seed: u64) -> Self {
        Self { seed, generation: 0, population: Vec::new() }
    }

    /// The next generation's children, within the limit, none measured (`known`) and none twice, as far as enough new
    /// plans are found.
    pub fn breed(
        &self,
        options: &Nsga2,
        space: &SearchSpace,
        max_bytes: Option<u64>,
        known: impl Fn(&Config) -> bool,
    ) -> Vec<Config> {
        let points: Vec<[f64; 2]> = self.population.iter().map(Individual::point).collect();
        let ranks = non_dominated_ranks(&points);
        let crowding = crowding_distances(&points, &ranks);
        let damage = self.damage(space);
        let mut rng = stream(self.seed, "nsga2", self.generation);
        let rate = options.mutation.unwrap_or(1.0 / space.units().len() as f64);
        let parent = |rng: &mut ChaCha8Rng| {
            let (a, b) = (rng.random_range(0..points.len()), rng.random_range(0..points.len()));
            let better = ranks[a].cmp(&ranks[b]).then(crowding[b].total_cmp(&crowding[a]));
            &self.population[if better.is_gt() { b } else { a }].config
        };
        let mut children: Vec<Config> = Vec::new();
        for _ in 0..20 * points.len() {
            if children.len() == points.len() {
                break;
            }
            let (mother, father) = (parent(&mut rng), parent(&mut rng));
            let two = rng.random_bool(options.crossover.clamp(0.0, 1.0));
            let mixed = if two { crossover(mother, father, &mut rng) } else { mother.clone() };
            let mut child = space.mutate(&mixed, rate, &mut rng);
            space.repair(&mut child, max_bytes, |unit, _| damage[unit]);
            if !known(&child) && !children.contains(&child) {
                children.push(child);
            }
        }
        children
    }

    /// The survivors of `size` among population and measured children: by rank, then by crowding.
    pub fn select(&mut self, children: Vec<Individual>, size: usize) {
        self.population.extend(children);
        let points: Vec<[f64; 2]> = self.population.iter().map(Individual::point).collect();
        let ranks = non_dominated_ranks(&points);
        let crowding = crowding_distances(&points, &ranks);
        let mut order: Vec<usize> = (0..points.len()).collect();
        order.sort_by(|&a, &b| {
            ranks[a].cmp(&ranks[b]).then(crowding[b].total_cmp(&crowding[a])).then(a.cmp(&b))
        });
        order.truncate(size);
        self.population = order.into_iter().map(|index| self.population[index].clone()).collect();
        self.generation += 1;
    }

    /// Per unit, what one choice less costs: the slopes of a linear model of the population.
    fn damage(&self, space: &SearchSpace) -> Vec<f64> {
        let measured = || self.population.iter().filter_map(|one| Some((&one.config, one.loss?)));
        let x: Vec<Vec<f64>> = measured().map(|(config, _)| space.encode(config)).collect();
        let y: Vec<f64> = measured().map(|(_, loss)| loss).collect();
        let steps = |unit: usize| (space.choices(unit) - 1).max(1) as f64;
        match Ridge::fit(&x, &y, 0.1) {
            Ok(ridge) => {
                ridge.weights().iter().enumerate().map(|(unit, slope)| -slope / steps(unit)).collect()
            }
            Err(_) => vec![1.0; space.units().len()],
        }
    }
}

impl SearchMethod for Nsga2 {
    fn name(&self) -> &'static str {
        "nsga2"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        if self.population < 4 {
            return Err(Error::option("Nsga2.population", "at least 4", self.population));
        }
        let settings = session.settings();
        let size = self.population.min(settings.evaluations / 4).max(4);
        let mut state = Nsga2State::new(settings.seed);
        let first = first_design(session, size, &mut stream(settings.seed, "nsga2 start", 0));
        state.population = measured(session, &first)?;
        while session.remaining() >= 1.0 && state.population.len() > 1 {
            let children =
                state.breed(self, session.space(), settings.max_bytes, |config| session.known(config));
            if children.is_empty() {
                break;
            }
            let children = measured(session, &children)?;
            state.select(children, size);
        }
        session.note("nsga2_state", serde_json::json!(state));
        Ok(())
    }
}

fn measured(session: &mut Session<'_>, configs: &[Config]) -> Result<Vec<Individual>> {
    let losses = session.evaluate(configs)?;
    let individual = |(config, loss): (&Config, Option<f64>)| {
        let loss = loss?;
        let bytes = session.space().bytes(config);
        Some(Individual { config: config.clone(), bytes, loss: loss.is_finite().then_some(loss) })
    };
    Ok(configs.iter().zip(losses).filter_map(individual).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{toy_loss, toy_space};

    #[test]
    fn a_state_read_back_goes_on_as_the_one_written() {
        let space = toy_space(8, 4);
        let options = Nsga2::default();
        let individual = |config: Config| Individual {
            bytes: space.bytes(&config),
            loss: Some(toy_loss(&config, |u| 1.0 + u as f64)),
            config,
        };
        let start = || -> Nsga2State {
            let mut rng = stream(1, "start", 0);
            let population = (0..12).map(|_| individual(space.sample(&mut rng))).collect();
            Nsga2State { population, ..Nsga2State::new(9) }
        };
        let step = |state: &mut Nsga2State| {
            let children = state.breed(&options, &space, None, |_| false);
            state.select(children.into_iter().map(individual).collect(), 12);
        };
        let (mut through, mut interrupted) = (start(), start());
        for _ in 0..6 {
            step(&mut through);
            step(&mut interrupted);
            let written = serde_json::to_string(&interrupted).unwrap();
            interrupted = serde_json::from_str(&written).unwrap();
        }
        assert_eq!(through.generation, 6);
        let configs =
            |state: &Nsga2State| state.population.iter().map(|i| i.config.clone()).collect::<Vec<_>>();
        assert_eq!(configs(&through), configs(&interrupted));
        let lowest =
            |state: &Nsga2State| state.population.iter().filter_map(|i| i.loss).fold(f64::MAX, f64::min);
        assert!(lowest(&through) < lowest(&start()));
    }
}
