//! What a rendering may take, and the functions that look at it.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    time::Duration,
};

use minijinja::{Environment, Error, Output, State, Value, value::ValueKind};

use super::refused;
use crate::patience::Patience;

/// How deep values may be nested.
const MAX_DEPTH: usize = 100;
/// What a value takes besides its text, in bytes or so.
const VALUE: usize = 16;
/// Looks at the clock are dear: so many cheap steps are taken between two.
const STEPS: u32 = 32;

/// What one rendering may take: in proportion to its input, and something on top.
#[derive(Debug)]
pub struct Budget {
    patience: Patience,
    steps: u32,
    /// Largest value that may be stored, in bytes or so.
    value: usize,
    /// Bytes that may still be printed by expressions.
    printed: usize,
    /// Bytes of the template's own text that may still be printed by loops and macros.
    text: usize,
}

thread_local! {
    static BUDGET: RefCell<Option<Budget>> = const { RefCell::new(None) };
}

impl Budget {
    /// For an input of so many bytes in so many parts (messages, fields).
    pub fn for_input(bytes: usize, parts: usize) -> Self {
        Self {
            patience: Patience::new(Duration::from_millis(500) + Duration::from_micros(bytes as u64)),
            steps: 0,
            value: (128usize << 10).saturating_add(bytes.saturating_mul(8)),
            printed: (1usize << 20).saturating_add(bytes.saturating_mul(16)),
            text: (32usize << 20).saturating_add(parts.saturating_mul(4096)),
        }
    }

    /// Renders within the budget. A panic is an error.
    ///
    /// # Errors
    /// What the template meets, or which limit it exceeds.
    pub fn run<T>(self, render: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let before = BUDGET.replace(Some(self));
        let result = catch_unwind(AssertUnwindSafe(render));
        BUDGET.replace(before);
        result.unwrap_or_else(|_| Err(refused("rendering failed: a panic")))
    }

    fn with<T>(f: impl FnOnce(&mut Self) -> Result<T, Error>) -> Result<T, Error> {
        BUDGET.with_borrow_mut(|budget| match budget {
            Some(budget) => f(budget),
            None => Err(refused("rendering without a budget")),
        })
    }

    /// Looks at the clock now and then.
    fn step(&mut self) -> Result<(), Error> {
        self.steps += 1;
        if self.steps < STEPS {
            return Ok(());
        }
        self.steps = 0;
        self.on_time()
    }

    fn on_time(&mut self) -> Result<(), Error> {
        match self.patience.is_over() {
            false => Ok(()),
            true => Err(refused("rendering takes longer than its input could ask for")),
        }
    }
}

/// A cheap step; now and then, whether there is time left.
pub(super) fn step() -> Result<(), Error> {
    Budget::with(Budget::step)
}

/// Whether there is time left.
pub(super) fn on_time() -> Result<(), Error> {
    Budget::with(|budget| budget.on_time())
}

/// Refuses a text of so many bytes if it is larger than values may be.
///
/// # Errors
/// That it is.
pub fn check_size(size: usize) -> Result<(), Error> {
    Budget::with(|budget| match size <= budget.value {
        true => Ok(()),
        false => Err(too_large(budget)),
    })
}

fn too_large(budget: &Budget) -> Error {
    refused(format!("a value is larger than {} bytes, the most for this input", budget.value))
}

/// Counts what hangs on a value, each time that it does; `left` is what it may still take.
fn measure(value: &Value, depth: usize, namespaces: bool, left: &mut usize) -> Result<(), Error> {
    let take = |left: &mut usize, size: usize| match left.checked_sub(size) {
        Some(rest) => {
            *left = rest;
            Ok(())
        }
        None => Budget::with(|budget| Err(too_large(budget))),
    };
    if depth > MAX_DEPTH {
        return Err(refused(format!("values are nested more than {MAX_DEPTH} deep")));
    }
    if let Some(text) = value.as_str() {
        return take(left, VALUE + text.len());
    }
    take(left, VALUE + value.as_bytes().map_or(0, <[u8]>::len))?;
    let Some(object) = value.as_object() else { return Ok(()) };
    if !namespaces && object.type_name().ends_with("Namespace") {
        return Err(refused("a namespace can't be a part of another's field"));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            value.try_iter()?.try_for_each(|item| measure(&item, depth + 1, namespaces, left))
        }
        ValueKind::Map => value.try_iter()?.try_for_each(|key| {
            measure(&key, depth + 1, namespaces, left)?;
            measure(&value.get_item(&key)?, depth + 1, namespaces, left)
        }),
        _ => Ok(()),
    }
}

/// `value`, if it may be stored.
fn keep(value: Value, namespaces: bool) -> Result<Value, Error> {
    let mut left = Budget::with(|budget| budget.step().map(|()| budget.value))?;
    measure(&value, 0, namespaces, &mut left)?;
    Ok(value)
}

/// `value`, if a template may store it: all that hangs on it is measured.
///
/// # Errors
/// A value that is too large for the input or nested too deep.
pub fn stored(value: Value) -> Result<Value, Error> {
    keep(value, true)
}

/// Prints as minijinja does, and counts.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let size = match value.as_str() {
        Some(text) => text.len(),
        None if value.as_object().is_none() => VALUE,
        None => {
            let limit = Budget::with(|budget| Ok(budget.value))?;
            let mut left = limit;
            measure(value, 0, true, &mut left)?;
            limit - left
        }
    };
    Budget::with(|budget| {
        budget.step()?;
        budget.printed = budget.printed.checked_sub(size).ok_or_else(|| refused("too much is printed"))?;
        Ok(())
    })?;
    minijinja::escape_formatter(out, state, value)
}

/// Names of the functions that [`prepare`](super::prepare) writes into templates.
pub(super) const KEEP: &str = "__kiln_keep";
pub(super) const KEEP_IN_FIELD: &str = "__kiln_keep_in_field";
pub(super) const PASS: &str = "__kiln_pass";
pub(super) const BEGIN: &str = "__kiln_begin_text";

pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(print);
    environment.remove_global("debug");
    environment.add_function(KEEP, stored);
    environment.add_function(KEEP_IN_FIELD, |value: Value| keep(value, false));
    environment.add_function(PASS, |value: Value| step().map(|()| value));
    environment.add_function(BEGIN, |bytes: usize| {
        Budget::with(|budget| {
            budget.step()?;
            budget.text = budget.text.checked_sub(bytes).ok_or_else(|| refused("too much is printed"))?;
            Ok(Value::UNDEFINED)
        })
    });
}
