//! What a plan costs: three figures that are never mixed, and the published formats' byte counts.

use serde::{Deserialize, Serialize};

/// Which figure of [`MemoryReport`] a search trades against quality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MemoryAxis {
    /// Bytes of the model as stored: searched projections and everything fixed.
    #[default]
    Storage,
    /// Storage and the adapters' training state.
    Static,
    /// Static and the activations: the predicted peak of training.
    Peak,
}

/// What doesn't depend on the plan.
///
/// The peak follows the specification's first-order model: activations don't depend on the bits, so they are measured
/// once per batch size and length and added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MemoryModel {
    /// Bytes of what is not searched: embedding, head, norms, projections left out.
    pub fixed: u64,
    /// Adapter parameters that every plan has, beside those that settings add.
    pub fixed_trained: u64,
    /// Bytes per trained parameter: 4 weight, 4 gradient, 8 Adam moments by default.
    pub bytes_per_trained: u64,
    /// Measured bytes of activations and temporaries during a training step.
    pub activations: u64,
    /// The figure to trade against quality.
    pub axis: MemoryAxis,
}

impl Default for MemoryModel {
    fn default() -> Self {
        Self { fixed: 0, fixed_trained: 0, bytes_per_trained: 16, activations: 0, axis: MemoryAxis::Storage }
    }
}

impl MemoryModel {
    /// Fixed bytes, the rest by default.
    pub fn new(fixed: u64) -> Self {
        Self { fixed, ..Self::default() }
    }

    /// The same with adapter parameters that every plan trains, and bytes for each.
    #[must_use]
    pub fn with_trained(mut self, parameters: u64, bytes_per_parameter: u64) -> Self {
        (self.fixed_trained, self.bytes_per_trained) = (parameters, bytes_per_parameter);
        self
    }

    /// The same with measured activation bytes.
    #[must_use]
    pub fn with_activations(mut self, bytes: u64) -> Self {
        self.activations = bytes;
        self
    }

    /// The same with another axis.
    #[must_use]
    pub fn with_axis(mut self, axis: MemoryAxis) -> Self {
        self.axis = axis;
        self
    }

    /// The report of a plan whose searched projections take `searched` bytes and train `trained` parameters.
    pub(crate) fn report(&self, searched: u64, trained: u64) -> MemoryReport {
        let storage = self.fixed.saturating_add(searched);
        let adapters = self.fixed_trained.saturating_add(trained).saturating_mul(self.bytes_per_trained);
        let total = storage.saturating_add(adapters);
        MemoryReport { searched, storage, adapters, total, peak: total.saturating_add(self.activations) }
    }

    /// What a choice adds on the searched axis.
    pub(crate) fn weigh(&self, cost: Cost) -> u64 {
        let state = match self.axis {
            MemoryAxis::Storage => 0,
            MemoryAxis::Static | MemoryAxis::Peak => cost.trained.saturating_mul(self.bytes_per_trained),
        };
        cost.storage.saturating_add(state)
    }
}

/// What a setting costs at one projection, or a choice at all projections of its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Bytes of the stored weight, exact: codes, scales, offsets, padding.
    pub storage: u64,
    /// Adapter parameters that the setting adds (0 where the rank is not searched).
    pub trained: u64,
}

impl Cost {
    /// A stored weight without parameters of its own.
    pub const fn storage(bytes: u64) -> Self {
        Self { storage: bytes, trained: 0 }
    }

    /// The sum, or `None` where it overflows.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        Some(Self {
            storage: self.storage.checked_add(other.storage)?,
            trained: self.trained.checked_add(other.trained)?,
        })
    }
}

/// Bytes of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryReport {
    /// Searched projections as stored.
    pub searched: u64,
    /// The whole model as stored.
    pub storage: u64,
    /// Weights, gradients and optimizer state of the adapters.
    pub adapters: u64,
    /// `storage + adapters`: static training memory.
    pub total: u64,
    /// `total` and activations: the predicted peak.
    pub peak: u64,
}

impl MemoryReport {
    /// The figure of an axis.
    pub const fn on(&self, axis: MemoryAxis) -> u64 {
        match axis {
            MemoryAxis::Storage => self.storage,
            MemoryAxis::Static => self.total,
            MemoryAxis::Peak => self.peak,
        }
    }
}

/// Formats of the published code with their byte counts: flat blocks that cross rows, unlike Kiln's own formats,
/// whose exact bytes come from `QuantScheme::storage_bytes`. For comparisons with published figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PublishedFormat {
    /// 16-bit floats: `2n`.
    Half,
    /// NF4, blocks of 64, f32 scales: `ceil(n/2) + 4 ceil(n/64)`.
    Nf4,
    /// NF4 with scales in 8 bits: `ceil(n/2) + nb + 4 ceil(nb/256) + 4`, `nb = ceil(n/64)`.
    Nf4Double,
    /// 8-bit integers with an f32 scale per output: `n + 4 out`.
    Int8Row,
    /// Affine codes, groups of 128, f16 scale and zero: `ceil(n bits/8) + 4 ceil(n/128)`.
    Affine128 {
        /// Width of a code.
        bits: u32,
    },
}

impl PublishedFormat {
    /// Bytes of a weight with `d_input` × `d_output` values.
    pub const fn bytes(self, d_input: u64, d_output: u64) -> u64 {
        let n = d_input.saturating_mul(d_output);
        match self {
            Self::Half => n.saturating_mul(2),
            Self::Nf4 => n.div_ceil(2) + 4 * n.div_ceil(64),
            Self::Nf4Double => {
                let blocks = n.div_ceil(64);
                n.div_ceil(2) + blocks + 4 * blocks.div_ceil(256) + 4
            }
            Self::Int8Row => n + 4 * d_output,
            Self::Affine128 { bits } => n.saturating_mul(bits as u64).div_ceil(8) + 4 * n.div_ceil(128),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_add_up() {
        let model = MemoryModel::new(100).with_trained(10, 16).with_activations(7);
        let report = model.report(50, 2);
        assert_eq!((report.storage, report.adapters, report.total, report.peak), (150, 192, 342, 349));
        let cost = Cost { storage: 50, trained: 2 };
        assert_eq!(model.weigh(cost), 50);
        assert_eq!(model.with_axis(MemoryAxis::Static).weigh(cost), 82);
        let axes = [MemoryAxis::Storage, MemoryAxis::Static, MemoryAxis::Peak].map(|axis| report.on(axis));
        assert_eq!(axes, [150, 342, 349]);
    }
}
