//! What the published code of AutoMixQ does.

use super::SearchMethod;
use crate::{Result, Session, moves::stream};

/// The proposals of the published code.
///
/// It means to run NSGA-II in an Optuna study, but starts a new process per trial and brings old trials back without
/// their generation, so every trial is generation 0, and generation 0 is drawn uniformly: **its search is uniform
/// random sampling with replacement**. It knows no memory limit while it draws (plans beyond the limit are measured
/// and lost to the front), doesn't notice repeats (each costs a trial), and has no performance model. All of that is
/// copied here.
///
/// Not copied is what spoils its measurements, since scores come from the [`Objective`](crate::Objective): its
/// evaluator puts the adapter on the 16-bit model, so that quantization enters only through training; its 8-bit
/// layers keep 16-bit masters; its memory figure is the allocator's reservation; it selects on the evaluation set; and
/// its reported best is not re-scored. Its space is 4 (NF4) or 8 bits per pruned layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Released;

impl SearchMethod for Released {
    fn name(&self) -> &'static str {
        "released"
    }

    fn run(&self, session: &mut Session<'_>) -> Result<()> {
        let mut trial = 0;
        while session.remaining() >= 1.0 {
            // Each of its processes starts with a generator of its own.
            let config = session.space().sample(&mut stream(session.settings().seed, "released", trial));
            trial += 1;
            if session.known(&config) {
                session.charge(1.0);
            }
            session.evaluate(&[config])?;
        }
        Ok(())
    }
}
