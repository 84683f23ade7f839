//! The factor on a step's gradients, for optimizers that multiply by it on their way: Burn's interface of optimizers has no
//! place for it.

use std::cell::Cell;

thread_local! {
    static FACTOR: Cell<f64> = const { Cell::new(1.0) };
}

/// What gradients are yet to be multiplied by in the step that this thread makes; 1 outside of [`during`].
pub(super) fn of_step() -> f64 {
    FACTOR.get()
}

/// Runs a step whose gradients are yet to be multiplied by `factor`.
pub(super) fn during<R>(factor: f64, step: impl FnOnce() -> R) -> R {
    /// Gives the factor back when a step panics too.
    struct Before(f64);
    impl Drop for Before {
        fn drop(&mut self) {
            FACTOR.set(self.0);
        }
    }
    let _before = Before(FACTOR.replace(factor));
    step()
}
