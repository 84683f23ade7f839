//! What a model weighs, tensor by tensor.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::Scheme;

/// Bytes of a model's tensors as stored: codes, scales, offsets and input orders of packed ones, 4 bytes a value of
/// dense ones.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StorageReport {
    /// One row per tensor.
    pub rows: Vec<StorageRow>,
}

/// One tensor of a [`StorageReport`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StorageRow {
    /// The tensor's or module's path in the checkpoint.
    pub path: String,
    /// How it is stored.
    pub scheme: Scheme,
    /// Sizes; `[d_input, d_output]` for packed weights.
    pub shape: Vec<usize>,
    /// Bytes.
    pub bytes: usize,
}

impl StorageRow {
    /// Number of values.
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bits per value.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.bytes as f64 / self.values().max(1) as f64
    }
}

impl StorageReport {
    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> usize {
        self.rows.iter().map(|row| row.bytes).sum()
    }

    /// Values of all tensors.
    pub fn total_values(&self) -> usize {
        self.rows.iter().map(StorageRow::values).sum()
    }
}

impl fmt::Display for StorageReport {
    /// A table, a line a tensor and a total.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.rows {
            let (scheme, shape) = (row.scheme.to_string(), format!("{:?}", row.shape));
            let bits = row.bits_per_weight();
            writeln!(
                f,
                "{:<44} {scheme:<20} {shape:<16} {bits:>6.3} bits {:>12} bytes",
                row.path, row.bytes
            )?;
        }
        let (values, bytes) = (self.total_values(), self.total_bytes());
        write!(f, "total: {values} values, {bytes} bytes")
    }
}
