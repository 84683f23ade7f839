//! The tensors that adapters are made of, and what they are called in files.

use std::fmt;

use crate::{Geometry, Pooling};

/// One tensor of an adapter. Factors are held `[inputs, outputs]` and stored `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The first factor.
    A,
    /// The second factor.
    B,
    /// The single matrix.
    H,
    /// DoRA's magnitudes, one an output.
    Magnitude,
}

/// Sizes of a tensor as the file has them.
pub(crate) type FileShape = Vec<usize>;

/// Host values of an adapter's parts, as they are held.
pub(crate) type Parts = Vec<(Part, Vec<f32>)>;

impl Part {
    /// The name in PEFT's files.
    pub(crate) fn peft_name(self, path: &str) -> String {
        let suffix = match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::H => "hira_H.weight",
            Self::Magnitude => "lora_magnitude_vector",
        };
        format!("base_model.model.{path}.{suffix}")
    }

    /// The name in Kiln's files.
    pub(crate) fn kiln_name(self, path: &str) -> String {
        let suffix = match self {
            Self::A => "A",
            Self::B => "B",
            Self::H => "H",
            Self::Magnitude => "magnitude",
        };
        format!("{path}.{suffix}")
    }

    /// The shape in files of the part that is held as `[rows, columns]`.
    pub(crate) fn file_shape(self, [rows, columns]: [usize; 2]) -> FileShape {
        match self {
            Self::Magnitude => vec![columns],
            _ => vec![columns, rows],
        }
    }
}

/// What an adapter is, in numbers: equal where it computes the same function of its tensors.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Description {
    pub(crate) geometry: Geometry,
    pub(crate) scaling: f64,
    pub(crate) magnitudes: bool,
}

impl Description {
    /// The parts of an adapter on a base of `shape`, and how each is held.
    pub(crate) fn parts(&self, shape: [usize; 2]) -> Vec<(Part, [usize; 2])> {
        let [rows, columns] = self.geometry.map_shape(shape);
        let mut parts = match self.geometry.rank {
            Some(rank) => vec![(Part::A, [rows, rank]), (Part::B, [rank, columns])],
            None => vec![(Part::H, [rows, columns])],
        };
        if self.magnitudes {
            parts.push((Part::Magnitude, [1, shape[1]]));
        }
        parts
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.geometry.rank {
            Some(rank) => write!(f, "rank {rank}")?,
            None => f.write_str("a single matrix")?,
        }
        write!(f, " and scaling {}", self.scaling)?;
        let Geometry { pool, repeat, pooling, .. } = self.geometry;
        if (pool, repeat) != (1, 1) {
            let pooling = match pooling {
                Pooling::Average => "average",
                Pooling::Sum => "sum",
                Pooling::AverageTimesGroups => "average-times-groups",
            };
            write!(f, ", pool {pool} by {pooling}, repeat {repeat}")?;
        }
        if self.magnitudes { f.write_str(", magnitudes") } else { Ok(()) }
    }
}
