//! What an export wrote, and what was lost on the way.

use std::{fmt, path::PathBuf};

use kiln_quant_core::PackedWeight;
use serde::Serialize;

use super::item::Host;

/// What an export wrote, tensor by tensor.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportReport {
    /// The folder or file.
    pub path: PathBuf,
    /// One row per tensor of the model.
    pub rows: Vec<ExportRow>,
    /// Bytes of the tensors and headers; tokenizer and configuration files of a folder are not counted.
    pub bytes: u64,
    /// What a user may want to hear of: no tokenizer, weights written dense, offsets rounded to integers.
    pub notes: Vec<String>,
}

/// One tensor of an [`ExportReport`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExportRow {
    /// The tensor's name in checkpoints.
    pub name: String,
    /// How the file holds it.
    pub stored: String,
    /// Bytes in the file.
    pub bytes: u64,
    /// Largest absolute difference between a weight of the model and the file's.
    pub max_difference: f32,
    /// `‖written - model‖ / ‖model‖` over the weights.
    pub relative_difference: f64,
}

impl ExportRow {
    /// Whether every weight reads back as it is in the model.
    pub fn is_exact(&self) -> bool {
        self.max_difference == 0.0
    }
}

impl ExportReport {
    /// Whether every weight reads back as it is in the model.
    pub fn is_exact(&self) -> bool {
        self.rows.iter().all(ExportRow::is_exact)
    }

    /// The tensors that were rounded.
    pub fn lossy(&self) -> impl Iterator<Item = &ExportRow> {
        self.rows.iter().filter(|row| !row.is_exact())
    }

    /// Largest absolute difference of all weights.
    pub fn max_difference(&self) -> f32 {
        self.rows.iter().map(|row| row.max_difference).fold(0.0, f32::max)
    }
}

impl fmt::Display for ExportReport {
    /// A table, a line a tensor and a total, then the notes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for ExportRow { name, stored, bytes, max_difference, relative_difference } in &self.rows {
            write!(f, "{name:<52} {stored:<24} {bytes:>12} bytes")?;
            if *max_difference == 0.0 {
                writeln!(f, "  exact")?;
            } else {
                writeln!(f, "  largest difference {max_difference:.2e}, relative {relative_difference:.2e}")?;
            }
        }
        let lossy = self.lossy().count();
        write!(
            f,
            "{}: {} bytes, {} tensors, {lossy} rounded",
            self.path.display(),
            self.bytes,
            self.rows.len()
        )?;
        self.notes.iter().try_for_each(|note| write!(f, "\nnote: {note}"))
    }
}

/// What a reader of the file will see of a tensor.
pub(super) enum Written {
    /// The same values.
    Same,
    /// A packed weight.
    Packed(PackedWeight),
    /// Row-major values in the checkpoint's layout.
    Dense(Vec<f32>),
}

impl Written {
    /// In the checkpoint's order, of a tensor that was written with these columns.
    pub(crate) fn with_columns(self, columns: &[usize]) -> Self {
        match self {
            Self::Same => Self::Same,
            Self::Packed(weight) => {
                let order = columns.iter().map(|column| *column as u32).collect();
                Self::Packed(PackedWeight { input_order: Some(order), ..weight })
            }
            Self::Dense(mut values) => {
                for row in values.chunks_exact_mut(columns.len()) {
                    let file = row.to_vec();
                    columns.iter().zip(file).for_each(|(column, value)| row[*column] = value);
                }
                Self::Dense(values)
            }
        }
    }
}

/// Largest absolute and relative difference between a tensor and what was written of it.
pub(super) fn difference(host: &Host, written: &Written) -> (f32, f64) {
    let found = match (host, written) {
        (_, Written::Same) => return (0.0, 0.0),
        (_, Written::Packed(weight)) => weight.dequantize(),
        (_, Written::Dense(values)) => values.clone(),
    };
    differences(&found, &host.dense())
}

/// Largest absolute difference and `‖found - expected‖ / ‖expected‖`, which is 0 for equal values.
pub(super) fn differences(found: &[f32], expected: &[f32]) -> (f32, f64) {
    let (mut most, mut squares, mut norm) = (0.0f32, 0.0f64, 0.0f64);
    for (found, expected) in found.iter().zip(expected) {
        let difference = (found - expected).abs();
        // A difference that isn't a number must not look like none.
        most = if difference.is_nan() { f32::INFINITY } else { most.max(difference) };
        squares += f64::from(difference).powi(2);
        norm += f64::from(*expected).powi(2);
    }
    let relative = if norm > 0.0 { (squares / norm).sqrt() } else { squares.sqrt() };
    (most, if squares == 0.0 { 0.0 } else { relative })
}
