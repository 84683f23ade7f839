//! QA-LoRA.

use kiln_quant_core::random::uniform;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::{Geometry, Pooling};

/// [QA-LoRA](https://arxiv.org/abs/2309.14717): `y = base(x) + alpha / r · dropout(pool_g(x)) · A · B`, with A
/// `[d_input / g, r]` and B `[r, d_output]`.
///
/// With g a multiple of the base's group of inputs, the change of the weight is constant inside each group, so that it
/// merges exactly into the groups' offsets.
///
/// The paper sums each group, its code averages, PEFT multiplies the average by the number of groups: three models from
/// the same file, told apart by [`pooling`](Self::pooling), which is recorded. At one learning rate they train at
/// different speeds, because an optimizer like Adam moves A and B by its rate whatever the factor behind them.
///
/// Before training A is uniform within √(6 / (d_input / g + r)) (Xavier's rule), B zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QaLora {
    /// Neighbouring inputs that become one, g.
    pub pool: usize,
    /// What becomes of them.
    pub pooling: Pooling,
}

/// Groups of 32 by their average, as in the released code.
impl Default for QaLora {
    fn default() -> Self {
        Self { pool: 32, pooling: Pooling::Average }
    }
}

impl QaLora {
    /// The numbers at rank `r`.
    pub fn geometry(&self, r: usize) -> Geometry {
        Geometry { pool: self.pool, repeat: 1, pooling: self.pooling, rank: Some(r) }
    }

    pub(super) fn initial_a([groups, r]: [usize; 2], rng: &mut ChaCha8Rng) -> Vec<f32> {
        uniform(rng, (6.0 / (groups + r) as f64).sqrt(), groups * r)
    }
}
