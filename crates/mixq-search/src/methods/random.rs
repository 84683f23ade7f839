//! Uniform random search.

use super::{SearchMethod, pool::new_sample};
use crate::{Result, SearchSpace, Session, moves::stream};

/// Uniformly drawn plans within the limit, each once: the baseline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Random;

impl SearchMethod for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        let mut rng = stream(session.settings().seed, "random", 0);
        let mut drawn = Vec::new();
        while (drawn.len() as f64) < session.remaining() {
            let Some(config) = new_sample(session, &drawn, &mut rng, SearchSpace::sample) else { break };
            drawn.push(config);
        }
        session.evaluate(&drawn)?;
        Ok(())
    }
}
