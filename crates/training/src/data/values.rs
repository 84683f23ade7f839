//! What a classifier or a regression should say of the examples.

use crate::error::Problem;

/// The numbers of a data set's examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Values {
    /// Examples with one.
    count: usize,
    largest: f32,
    /// Whether all are whole numbers from 0.
    are_classes: bool,
}

impl Default for Values {
    fn default() -> Self {
        Self { count: 0, largest: 0.0, are_classes: true }
    }
}

impl Values {
    pub(super) fn add(&mut self, value: f32) {
        self.count += 1;
        self.largest = self.largest.max(value);
        self.are_classes &= value >= 0.0 && value.fract() == 0.0;
    }

    pub(super) fn joined(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            largest: self.largest.max(other.largest),
            are_classes: self.are_classes && other.are_classes,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Why a model with so many outputs can't learn them.
    pub(crate) fn misfit(&self, outputs: usize) -> Option<Problem> {
        if outputs == 1 || (self.are_classes && (self.largest as usize) < outputs) {
            return None;
        }
        let expected = format!("classes from 0 to {}, as the model has", outputs - 1);
        let found = match self.are_classes {
            true => self.largest.to_string(),
            false => "numbers that are no classes".to_owned(),
        };
        Some(Problem::new("label", expected, found))
    }
}
