//! The same setting everywhere.

use super::SearchMethod;
use crate::{Result, Session};

/// Every plan that gives all units the same setting, as far as it fits: the baseline of uniform bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Uniform;

impl SearchMethod for Uniform {
    fn name(&self) -> &'static str {
        "uniform"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        let mut plans = session.space().uniform();
        plans.retain(|config| session.fits(config));
        session.evaluate(&plans)?;
        Ok(())
    }
}
