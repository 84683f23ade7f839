//! Q-BaRA.

use serde::{Deserialize, Serialize};

use crate::{Geometry, Pooling};

/// [Q-BaRA](https://arxiv.org/abs/2407.17029) (Q-BLoRA in the revised paper):
/// `y = base(x) + alpha / r · repeat_λ(dropout(average_λ(x)) · A · B)`.
///
/// It gives up resolution at inputs and outputs for rank: A is `[d_input / λ, λr]` and B `[λr, d_output / λ]`, so that
/// trained values and multiplications are those of LoRA of rank r for every λ, and the change of the weight may have
/// rank λr. The scaling keeps the nominal rank: alpha / r, not alpha / (λr). Released code has λ = 2; other common
/// divisors of inputs and outputs are a generalisation.
///
/// Before training A is uniform within one over the root of `d_input / λ`, B zero. Merges into dense weights, and
/// exactly into packed ones whose blocks fit tiles of λ × λ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QBara {
    /// The compression factor λ.
    pub lambda: usize,
}

impl Default for QBara {
    fn default() -> Self {
        Self { lambda: 2 }
    }
}

impl QBara {
    /// The numbers at the nominal rank `r`.
    pub fn geometry(&self, r: usize) -> Geometry {
        Geometry {
            pool: self.lambda,
            repeat: self.lambda,
            pooling: Pooling::Average,
            rank: Some(self.lambda.saturating_mul(r)),
        }
    }
}
