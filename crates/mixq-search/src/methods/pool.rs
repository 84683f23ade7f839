//! What the model-based methods share: first designs, candidates, predictions, picks.

use std::collections::HashSet;

use rand_chacha::ChaCha8Rng;

use crate::{
    Config, Observation, Prediction, Result, SearchSpace, Session, Surrogate, SurrogateKind,
    moves::crossover,
    pareto_front,
    surrogate::ehvi::{Belief, Staircase},
};

/// Draws before giving up on finding a new plan.
const TRIES: usize = 2000;

/// Share of the largest loss below which losses are not told apart.
const LOG_FLOOR: f64 = 1e-3;

/// A random plan within the limit that was not measured before and is not among `taken`.
pub(super) fn new_sample(
    session: &Session<'_>,
    taken: &[Config],
    rng: &mut ChaCha8Rng,
    mut draw: impl FnMut(&SearchSpace, &mut ChaCha8Rng) -> Config,
) -> Option<Config> {
    let fresh = |config: &Config| !session.known(config) && !taken.contains(config);
    for attempt in 0..TRIES {
        let mut config = draw(session.space(), rng);
        if !session.fits(&config) && attempt > TRIES / 20 {
            // A tight limit: what was drawn is brought inside instead of drawn again.
            session.space().repair(&mut config, session.settings().max_bytes, |_, _| 1.0);
        }
        if session.fits(&config) && fresh(&config) {
            return Some(config);
        }
    }
    None
}

/// The smallest plan, the largest that fits, and random ones up to `count`.
pub(super) fn first_design(session: &Session<'_>, count: usize, rng: &mut ChaCha8Rng) -> Vec<Config> {
    let space = session.space();
    let mut design = vec![space.lowest()];
    let mut highest = space.highest();
    space.repair(&mut highest, session.settings().max_bytes, |_, _| 1.0);
    if highest != design[0] {
        design.push(highest);
    }
    while design.len() < count {
        let Some(config) = new_sample(session, &design, rng, SearchSpace::sample_stratified) else { break };
        design.push(config);
    }
    design
}

/// The archive's front among the plans within the limit.
pub(super) fn archive_front(session: &Session<'_>) -> Vec<Config> {
    let inside: Vec<&Observation> = session
        .archive()
        .iter()
        .filter(|seen| session.fits(&seen.config) && !seen.stopped && seen.loss.is_finite())
        .collect();
    let points: Vec<[f64; 2]> = inside.iter().map(|seen| [seen.bytes as f64, seen.loss]).collect();
    pareto_front(&points).into_iter().map(|index| inside[index].config.clone()).collect()
}

/// The candidates of the specification: every one-unit change of a front member, crossovers of random pairs of them,
/// and random plans over all memories; nothing measured, nothing beyond the limit, nothing twice.
pub(super) fn candidates(
    session: &Session<'_>,
    crossovers: usize,
    random: usize,
    rng: &mut ChaCha8Rng,
) -> Vec<Config> {
    use rand::RngExt;
    let space = session.space();
    let front = archive_front(session);
    let mut all: Vec<Config> = front.iter().flat_map(|config| space.neighbours(config)).collect();
    if front.len() > 1 {
        for _ in 0..crossovers {
            let (a, b) = (rng.random_range(0..front.len()), rng.random_range(0..front.len()));
            all.push(crossover(&front[a], &front[b], rng));
        }
    }
    all.extend((0..random).map(|_| space.sample_stratified(rng)));
    let mut seen = HashSet::new();
    all.retain(|config| session.fits(config) && !session.known(config) && seen.insert(config.clone()));
    all
}

/// Losses as a surrogate sees them. KL and its like span orders of magnitude, so non-negative losses are taken as
/// logarithms; others (accuracies) as they are.
pub(super) struct Scale {
    floor: Option<f64>,
}

impl Scale {
    pub(super) fn of(losses: impl Iterator<Item = f64> + Clone) -> Self {
        let largest = losses.clone().fold(0.0, f64::max);
        let logarithmic = largest > 0.0 && losses.fold(f64::INFINITY, f64::min) >= 0.0;
        Self { floor: logarithmic.then_some(LOG_FLOOR * largest) }
    }

    pub(super) fn forward(&self, loss: f64) -> f64 {
        self.floor.map_or(loss, |floor| (loss.max(0.0) + floor).ln())
    }

    /// What a prediction of [`forward`](Self::forward)'s values says of the loss.
    pub(super) fn back(&self, prediction: Prediction) -> Belief {
        match self.floor {
            None => Belief::Normal(prediction),
            Some(floor) => Belief::LogNormal { log: prediction, floor },
        }
    }
}

/// A surrogate of the archive.
pub(super) struct Model<'s> {
    space: &'s SearchSpace,
    surrogate: Box<dyn Surrogate>,
    scale: Scale,
}

impl<'s> Model<'s> {
    /// Fits the last `limit` finished observations, and the front whenever it was measured.
    pub(super) fn fit(session: &Session<'s>, kind: SurrogateKind, limit: usize, seed: u64) -> Result<Self> {
        let finished = session.archive().iter().filter(|seen| seen.loss.is_finite());
        let mut seen: Vec<&Observation> = finished.collect();
        let early = seen.len().saturating_sub(limit);
        if early > 0 {
            let front: HashSet<Config> = archive_front(session).into_iter().collect();
            let mut index = 0..;
            seen.retain(|seen| index.next() >= Some(early) || front.contains(&seen.config));
        }
        let scale = Scale::of(seen.iter().map(|seen| seen.loss));
        let space = session.space();
        let x: Vec<Vec<f64>> = seen.iter().map(|seen| space.encode(&seen.config)).collect();
        let y: Vec<f64> = seen.iter().map(|seen| scale.forward(seen.loss)).collect();
        Ok(Self { space, surrogate: kind.fit(&x, &y, seed)?, scale })
    }

    pub(super) fn predict(&self, config: &Config) -> Belief {
        self.scale.back(self.surrogate.predict(&self.space.encode(config)))
    }
}

/// Where a method's hypervolume ends: fixed after the first design, so that gains stay comparable.
pub(super) fn reference(session: &Session<'_>) -> [f64; 2] {
    let space = session.space();
    let memory = session.settings().max_bytes.unwrap_or(u64::MAX).min(space.largest()) as f64;
    let finite = || session.archive().iter().map(|seen| seen.loss).filter(|loss| loss.is_finite());
    let (worst, best) = (finite().fold(f64::NEG_INFINITY, f64::max), finite().fold(f64::INFINITY, f64::min));
    let span = if worst > best { worst - best } else { 1.0 };
    let bytes = memory - space.smallest() as f64;
    [memory + 0.01 * bytes.max(1.0), if worst.is_finite() { worst + 0.05 * span } else { 1.0 }]
}

/// The archive's staircase within the limit.
pub(super) fn staircase(session: &Session<'_>, reference: [f64; 2]) -> Staircase {
    let seen = session.archive().iter().filter(|seen| session.fits(&seen.config) && !seen.stopped);
    let points: Vec<[f64; 2]> = seen.map(|seen| [seen.bytes as f64, seen.loss]).collect();
    Staircase::new(&points, reference)
}

/// A plan that may be measured.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) config: Config,
    pub(super) bytes: f64,
    pub(super) belief: Belief,
}

impl Candidate {
    pub(super) fn new(session: &Session<'_>, config: Config, belief: Belief) -> Self {
        Self { bytes: session.space().bytes(&config) as f64, config, belief }
    }
}

/// Up to `count` candidates, each the one with the largest gain given those before, whose typical losses are believed
/// and returned.
pub(super) fn pick(
    mut stairs: Staircase,
    candidates: &[Candidate],
    count: usize,
    expected: bool,
) -> Vec<(Config, f64)> {
    let mut picked: Vec<(Config, f64)> = Vec::new();
    let mut left: Vec<&Candidate> = candidates.iter().collect();
    while picked.len() < count && !left.is_empty() {
        let gain = |Candidate { bytes, belief, .. }: &Candidate| match expected {
            true => stairs.expected_gain(*bytes, *belief),
            false => stairs.gain(*bytes, belief.typical()),
        };
        let gains: Vec<f64> = left.iter().map(|candidate| gain(candidate)).collect();
        // The first of equals, so that ties don't depend on anything hidden.
        let best = (0..gains.len()).fold(0, |best, i| if gains[i] > gains[best] { i } else { best });
        if picked.is_empty() || gains[best] > 0.0 {
            let Candidate { config, bytes, belief } = left.swap_remove(best);
            stairs.push([*bytes, belief.typical()]);
            picked.push((config.clone(), belief.typical()));
        } else {
            break;
        }
    }
    picked
}
