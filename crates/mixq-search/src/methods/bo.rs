//! Bayesian optimisation.

use super::{
    SearchMethod,
    pool::{Candidate, Model, candidates, first_design, pick, reference, staircase},
};
use crate::{Error, Result, Session, SurrogateKind, moves::stream};

/// A Gaussian process (Matérn-5/2, fitted kernel) and exact expected hypervolume improvement: the memory of a plan is
/// known, so the expectation has a closed form.
///
/// | option | default | |
/// | --- | --- | --- |
/// | `initial` | 12 | first plans: the smallest, the largest, random ones |
/// | `picks` | 4 | plans measured per fit; after the first, predictions of those before are believed |
/// | `crossovers`, `random` | 200, 300 | candidates, beside the neighbours of the front |
/// | `max_fit` | 300 | observations that the process is fitted to, the latest; cubic cost |
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bo {
    /// First plans.
    pub initial: usize,
    /// Plans measured per fit.
    pub picks: usize,
    /// Candidates from pairs.
    pub crossovers: usize,
    /// Random candidates.
    pub random: usize,
    /// Observations used.
    pub max_fit: usize,
}

impl Default for Bo {
    fn default() -> Self {
        Self { initial: 12, picks: 4, crossovers: 200, random: 300, max_fit: 300 }
    }
}

impl SearchMethod for Bo {
    fn name(&self) -> &'static str {
        "bo"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        if self.initial < 2 || self.picks == 0 || self.max_fit < 2 {
            let found = format!("{}, {} and {}", self.initial, self.picks, self.max_fit);
            return Err(Error::option("Bo.initial, Bo.picks and Bo.max_fit", "at least 2, 1 and 2", found));
        }
        let seed = session.settings().seed;
        let design = first_design(session, self.initial, &mut stream(seed, "bo start", 0));
        session.evaluate(&design)?;
        let reference = reference(session);
        let mut round = 0;
        while session.remaining() >= 1.0 {
            round += 1;
            let pool = candidates(session, self.crossovers, self.random, &mut stream(seed, "bo pool", round));
            let count = self.picks.min(session.remaining() as usize);
            let learnable = session.archive().iter().any(|seen| seen.loss.is_finite());
            let plans: Vec<_> = if learnable {
                let model = Model::fit(session, SurrogateKind::Gp, self.max_fit, seed)?;
                let predicted: Vec<_> = pool
                    .into_iter()
                    .map(|config| {
                        let belief = model.predict(&config);
                        Candidate::new(session, config, belief)
                    })
                    .collect();
                pick(staircase(session, reference), &predicted, count, true)
                    .into_iter()
                    .map(|(config, _)| config)
                    .collect()
            } else {
                pool.into_iter().take(count).collect()
            };
            if plans.is_empty() {
                break;
            }
            session.evaluate(&plans)?;
        }
        Ok(())
    }
}
