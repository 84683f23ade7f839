//! Progress on the terminal.

use std::ops::ControlFlow;

use indicatif::{ProgressBar, ProgressStyle};
use kiln::training::{Event, Observer};

/// Shows the steps of a training run.
#[derive(Debug)]
pub struct Bar(ProgressBar);

impl Bar {
    /// A bar of `steps` steps.
    pub fn new(steps: u64) -> Self {
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}");
        Self(ProgressBar::new(steps).with_style(style.expect("a template that indicatif knows")))
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.0.finish_and_clear();
    }
}

impl<M> Observer<M> for Bar {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        let Event::Step(report) = event else { return ControlFlow::Continue(()) };
        let rate = report.tokens as f64 / report.seconds;
        self.0.set_position(report.step + 1);
        self.0.set_message(format!("loss {:.4}, {rate:.0} tokens/s", report.loss));
        ControlFlow::Continue(())
    }
}
