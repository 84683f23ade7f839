//! Progress on the terminal, and the ways to stop.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::{ProgressBar, ProgressStyle};
use kiln::training::{Event, Observer};
use signal_hook::{
    SigId,
    consts::{SIGINT, SIGTERM},
    flag, low_level,
};

use crate::{Result, errors::Stopped};

/// Shows the steps of a training run. While it is there, SIGINT or SIGTERM ends the run after its step; a second one ends the
/// program at once.
#[derive(Debug)]
pub struct Bar {
    bar: ProgressBar,
    signalled: Arc<AtomicBool>,
    handlers: Vec<SigId>,
    /// Steps done when the run was stopped.
    stopped: Option<u64>,
}

impl Bar {
    /// A bar of `steps` steps.
    ///
    /// # Errors
    /// The operating system's refusal.
    pub fn new(steps: u64) -> Result<Self> {
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}")?;
        let mut bar = Self {
            bar: ProgressBar::new(steps).with_style(style),
            signalled: Arc::default(),
            handlers: Vec::new(),
            stopped: None,
        };
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first one sets what the second one finds.
            bar.handlers.push(flag::register_conditional_shutdown(
                signal,
                128 + signal,
                bar.signalled.clone(),
            )?);
            bar.handlers.push(flag::register(signal, bar.signalled.clone())?);
        }
        Ok(bar)
    }

    /// Takes the bar away.
    ///
    /// # Errors
    /// That the run was stopped, and `kept`, what is left of it.
    pub fn finish(self, kept: &str) -> Result<()> {
        self.bar.finish_and_clear();
        match self.stopped {
            Some(steps) => Err(Stopped(format!("stopped after {steps} steps: {kept}")).into()),
            None => Ok(()),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}

impl<M> Observer<M> for Bar {
    fn on_event(&mut self, event: &Event<'_>) -> ControlFlow<()> {
        let Event::Step(report) = event else { return ControlFlow::Continue(()) };
        let rate = report.tokens as f64 / report.seconds;
        self.bar.set_position(report.step + 1);
        self.bar.set_message(format!("loss {:.4}, {rate:.0} tokens/s", report.loss));
        match self.signalled.load(Ordering::Relaxed) {
            true => {
                self.stopped = Some(report.step + 1);
                ControlFlow::Break(())
            }
            false => ControlFlow::Continue(()),
        }
    }
}
