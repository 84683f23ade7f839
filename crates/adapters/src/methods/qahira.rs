//! QA-HiRA.

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::kaiming;
use crate::{Geometry, Pooling};

/// H before training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum InitH {
    /// Zero: training starts at the base model.
    #[default]
    Zero,
    /// Uniform within one over the root of the pooled inputs, as the released code has it: training starts beside the
    /// base model. For comparisons only.
    Kaiming,
}

/// [QA-HiRA](https://arxiv.org/abs/2407.17029): `y = base(x) + alpha / r · repeat_q(dropout(average_p(x)) · H)` with a
/// single matrix H `[d_input / p, d_output / q]`.
///
/// The rank r serves the scaling only. H has no bottleneck: the change of the weight may have rank
/// min(d_input / p, d_output / q), which at one number of trained values is largest where the two are alike. Trained
/// values: d_input · d_output / (p q). With p × q as the base's blocks, H *is* the blocks' offsets, up to the factor
/// alpha / (r p), and merges into them exactly.
///
/// An optimizer like Adam moves an entry of H by its rate whatever the gradient, so the weight moves by
/// rate · alpha / (r p): change alpha with p.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QaHira {
    /// Neighbouring inputs that become one, p.
    pub pool: usize,
    /// Neighbouring outputs that are the same, q.
    pub repeat: usize,
    /// H before training.
    pub init: InitH,
}

/// The released shape, for bases of tiles of 8 outputs × 4 inputs.
impl Default for QaHira {
    fn default() -> Self {
        Self { pool: 4, repeat: 8, init: InitH::Zero }
    }
}

impl QaHira {
    /// For a base with groups of `inputs` inputs of one output: p = `inputs`, q = 1.
    pub fn for_groups(inputs: usize) -> Self {
        Self { pool: inputs, repeat: 1, init: InitH::Zero }
    }

    /// For a base with tiles of `outputs` × `inputs`: p = `inputs`, q = `outputs`.
    pub fn for_tiles(outputs: usize, inputs: usize) -> Self {
        Self { pool: inputs, repeat: outputs, init: InitH::Zero }
    }

    /// The numbers, the same for every rank.
    pub fn geometry(&self) -> Geometry {
        Geometry { pool: self.pool, repeat: self.repeat, pooling: Pooling::Average, rank: None }
    }

    pub(super) fn initial(&self, [rows, columns]: [usize; 2], rng: &mut ChaCha8Rng) -> Vec<f32> {
        match self.init {
            InitH::Zero => vec![0.0; rows * columns],
            InitH::Kaiming => kaiming(rows, rows * columns, rng),
        }
    }
}
