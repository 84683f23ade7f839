//! The search methods.

use crate::{Error, Result, Session};

mod amq;
mod bo;
mod klmix;
mod nsga2;
mod paper;
mod pool;
mod random;
mod released;
mod uniform;

pub use amq::Amq;
pub use bo::Bo;
pub use klmix::{KlMix, Screen};
pub use nsga2::{Individual, Nsga2, Nsga2State};
pub use paper::Paper;
pub use random::Random;
pub use released::Released;
pub use uniform::Uniform;

/// A way to spend evaluations.
///
/// A method decides from the session alone: its settings, its seed, what was measured so far. Run again on the log of
/// a killed search it repeats that search's way out of the log and goes on behind it.
pub trait SearchMethod {
    /// Name in logs and on the command line.
    fn name(&self) -> &'static str;

    /// Proposes plans and has them measured until the evaluations are spent or nothing is left to try.
    ///
    /// # Errors
    /// Those of the session, or of options out of range.
    fn run(&self, session: &mut Session<'_>) -> Result<()>;
}

/// Names that [`method`] knows.
pub const METHODS: [&str; 8] = ["klmix", "paper", "released", "nsga2", "bo", "amq", "random", "uniform"];

/// A method with default options, by name.
///
/// ```
/// for name in kiln_mixq_search::METHODS {
///     assert_eq!(kiln_mixq_search::method(name)?.name(), name);
/// }
/// # Ok::<(), kiln_mixq_search::Error>(())
/// ```
///
/// # Errors
/// [`Error::Option`] for a name that is not in [`METHODS`].
pub fn method(name: &str) -> Result<Box<dyn SearchMethod>> {
    Ok(match name {
        "klmix" => Box::new(KlMix::default()),
        "paper" => Box::new(Paper::default()),
        "released" => Box::new(Released),
        "nsga2" => Box::new(Nsga2::default()),
        "bo" => Box::new(Bo::default()),
        "amq" => Box::new(Amq::default()),
        "random" => Box::new(Random),
        "uniform" => Box::new(Uniform),
        _ => return Err(Error::option("method", &METHODS.join(", "), name)),
    })
}
