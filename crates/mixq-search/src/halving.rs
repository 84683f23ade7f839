//! After the search: do the plans recover by fine-tuning, and do their scores hold under fresh seeds?

use serde::Serialize;

use crate::{
    Config, Error, Fidelity, GaussianProcess, Observation, Plan, Result, Session, Surrogate, moves::stream,
};

/// Observations that the model of the final choice is fitted to.
const MAX_FIT: usize = 300;

/// Successive halving of short fine-tunes: all candidates of a memory limit are tuned for the first number of steps,
/// the better half for the second, and so on; same seed and data order for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Halving {
    /// Steps per rung, growing.
    pub rungs: Vec<u64>,
    /// Candidates per limit: the knapsack's and the refined plan, runners-up, the best uniform plan, a random one.
    pub candidates: usize,
    /// Memory limits; none is the search's own.
    pub budgets: Vec<u64>,
}

impl Default for Halving {
    fn default() -> Self {
        Self { rungs: vec![50, 200, 800], candidates: 8, budgets: Vec::new() }
    }
}

/// One rung at one limit.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Rung {
    /// The memory limit.
    pub budget: u64,
    /// How long the plans were tuned.
    pub fidelity: Fidelity,
    /// Plans and scores, best first.
    pub ranking: Vec<(Config, Option<f64>)>,
}

/// Fresh seeds for the best plans: the best of many noisy scores is biased, so the final figure never contains the
/// score that a plan was chosen by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finalists {
    /// Plans per limit: those that survived halving, else those with the best mean under a Gaussian process of all
    /// measurements, which shrinks lucky ones.
    pub top: usize,
    /// Fresh seeds per plan.
    pub seeds: u64,
    /// How thoroughly; none is the search's own fidelity.
    pub fidelity: Option<Fidelity>,
    /// Memory limits; none is the search's own.
    pub budgets: Vec<u64>,
}

impl Default for Finalists {
    fn default() -> Self {
        Self { top: 3, seeds: 2, fidelity: None, budgets: Vec::new() }
    }
}

/// A re-scored plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Finalist {
    /// The memory limit it stands for.
    pub budget: u64,
    /// Its bytes.
    pub bytes: u64,
    /// Scores under fresh seeds.
    pub scores: Vec<f64>,
    /// Their mean; `None` if one of them failed.
    pub mean: Option<f64>,
    /// The plan as indices.
    pub config: Config,
    /// The plan as settings.
    pub plan: Plan,
}

/// The limits to look at: those given that a plan meets, or the search's own.
fn limits(session: &Session<'_>, budgets: &[u64]) -> Result<Vec<u64>> {
    let own = session.settings().max_bytes.unwrap_or_else(|| session.space().largest());
    for &budget in budgets {
        session.space().check_limit(Some(budget))?;
    }
    Ok(if budgets.is_empty() { vec![own] } else { budgets.iter().map(|budget| own.min(*budget)).collect() })
}

/// Measured plans within a limit, best first.
fn measured<'s>(session: &'s Session<'_>, budget: u64) -> Vec<&'s Observation> {
    let inside = |seen: &&Observation| seen.bytes <= budget && seen.loss.is_finite() && !seen.stopped;
    let mut seen: Vec<&Observation> = session.archive().iter().filter(inside).collect();
    seen.sort_by(|a, b| a.loss.total_cmp(&b.loss).then(a.bytes.cmp(&b.bytes)).then(a.config.cmp(&b.config)));
    seen
}

impl Halving {
    pub(crate) fn run(&self, session: &mut Session<'_>) -> Result<Vec<Rung>> {
        if self.rungs.is_empty()
            || self.rungs.windows(2).any(|pair| pair[0] >= pair[1])
            || self.candidates == 0
        {
            let found = format!("{:?} and {}", self.rungs, self.candidates);
            return Err(Error::option("Halving.rungs and candidates", "growing steps and at least 1", found));
        }
        let mut rungs = Vec::new();
        for budget in limits(session, &self.budgets)? {
            let mut plans = self.field(session, budget);
            for &steps in &self.rungs {
                let fidelity = Fidelity::finetune(steps);
                let losses = session.evaluate_at(&plans, fidelity, session.settings().evaluation_seed)?;
                let mut order: Vec<(Config, f64)> = plans
                    .into_iter()
                    .zip(losses)
                    .map(|(plan, loss)| (plan, loss.unwrap_or(f64::INFINITY)))
                    .collect();
                order.sort_by(|a, b| a.1.total_cmp(&b.1));
                let half = order.len().div_ceil(2);
                plans = order.iter().take(half).map(|(plan, _)| plan.clone()).collect();
                let direction = session.direction();
                let score = |loss: f64| loss.is_finite().then(|| direction.loss(loss));
                let ranking = order.into_iter().map(|(plan, loss)| (plan, score(loss))).collect();
                rungs.push(Rung { budget, fidelity, ranking });
            }
        }
        Ok(rungs)
    }

    fn field(&self, session: &Session<'_>, budget: u64) -> Vec<Config> {
        let space = session.space();
        let fits = |config: &&Config| space.bytes(config) <= budget;
        let seen = measured(session, budget);
        let mut rng = stream(session.settings().seed, "halving", budget);
        let mut random = space.sample(&mut rng);
        space.repair(&mut random, Some(budget), |_, _| 1.0);
        let uniform = space.uniform();
        let proposals = seen
            .iter()
            .take(3)
            .map(|seen| &seen.config)
            .chain(session.suggestions().iter().filter(fits).max_by_key(|config| space.bytes(config)))
            .chain(uniform.iter().rev().find(fits))
            .chain([&random])
            .chain(seen.iter().skip(3).map(|seen| &seen.config));
        let mut field: Vec<Config> = Vec::new();
        for config in proposals {
            if field.len() < self.candidates && !field.contains(config) {
                field.push(config.clone());
            }
        }
        field
    }
}

impl Finalists {
    /// Re-scores the best plans of each limit; best mean first within a limit.
    pub(crate) fn run(&self, session: &mut Session<'_>, rungs: &[Rung]) -> Result<Vec<Finalist>> {
        if self.top == 0 || self.seeds == 0 {
            let found = format!("{} and {}", self.top, self.seeds);
            return Err(Error::option("Finalists.top and seeds", "at least 1", found));
        }
        let fidelity = self.fidelity.unwrap_or(session.settings().fidelity);
        let mut finalists = Vec::new();
        for budget in limits(session, &self.budgets)? {
            let halved = rungs.iter().rev().find(|rung| rung.budget == budget);
            let mut plans: Vec<Config> = match halved {
                Some(rung) => rung.ranking.iter().map(|(config, _)| config.clone()).collect(),
                None => by_model_mean(session, budget)?,
            };
            plans.truncate(self.top);
            let mut losses: Vec<Vec<f64>> = vec![Vec::new(); plans.len()];
            for fresh in 1..=self.seeds {
                let seed = session.settings().evaluation_seed.wrapping_add(fresh);
                let measured = session.evaluate_at(&plans, fidelity, seed)?;
                for (losses, loss) in losses.iter_mut().zip(measured) {
                    losses.push(loss.unwrap_or(f64::INFINITY));
                }
            }
            let mean = |losses: &Vec<f64>| losses.iter().sum::<f64>() / losses.len() as f64;
            let mut order: Vec<(Config, Vec<f64>)> = plans.into_iter().zip(losses).collect();
            order.sort_by(|a, b| mean(&a.1).total_cmp(&mean(&b.1)));
            let (space, direction) = (session.space(), session.direction());
            finalists.extend(order.into_iter().map(|(config, losses)| Finalist {
                budget,
                bytes: space.bytes(&config),
                mean: Some(direction.loss(mean(&losses))).filter(|mean| mean.is_finite()),
                scores: losses.into_iter().filter(|l| l.is_finite()).map(|l| direction.loss(l)).collect(),
                plan: space.plan(&config),
                config,
            }));
        }
        Ok(finalists)
    }
}

/// Measured plans within a limit by the mean of a Gaussian process, best first.
fn by_model_mean(session: &Session<'_>, budget: u64) -> Result<Vec<Config>> {
    let space = session.space();
    let finite: Vec<&Observation> = session.archive().iter().filter(|seen| seen.loss.is_finite()).collect();
    let inside = measured(session, budget);
    if inside.len() < 2 {
        return Ok(inside.iter().map(|seen| seen.config.clone()).collect());
    }
    let latest = &finite[finite.len().saturating_sub(MAX_FIT)..];
    let x: Vec<Vec<f64>> = latest.iter().map(|seen| space.encode(&seen.config)).collect();
    let y: Vec<f64> = latest.iter().map(|seen| seen.loss).collect();
    let model = GaussianProcess::fit(&x, &y)?;
    let mut order: Vec<(f64, Config)> = inside
        .iter()
        .map(|seen| (model.predict(&space.encode(&seen.config)).mean, seen.config.clone()))
        .collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    Ok(order.into_iter().map(|(_, config)| config).collect())
}
