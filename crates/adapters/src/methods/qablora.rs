//! QA-BLoRA.

use serde::{Deserialize, Serialize};

use crate::{Geometry, Pooling};

/// QA-BLoRA, QA-HiRA's name in the [revised paper](https://arxiv.org/abs/2407.17029v2):
/// `y = base(x) + alpha / r · repeat_q(dropout(average_p(x)) · A · B)`, A `[d_input / p, ρ]`, B `[ρ, d_output / q]`.
///
/// The paper's text and code for it could not be read; this is the form that its abstract describes. It lies between
/// the others: q = 1 is QA-LoRA, p = q = λ with ρ = λr is Q-BaRA, and QA-HiRA has H in place of A · B. Without a `rank`,
/// ρ is the largest one with no more trained values than LoRA of rank r, and at least 1: r (in + out) / (in / p + out / q).
///
/// Before training A is uniform within one over the root of `d_input / p`, B zero. Merges as [`QaHira`](super::QaHira).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QaBlora {
    /// Neighbouring inputs that become one, p.
    pub pool: usize,
    /// Neighbouring outputs that are the same, q.
    pub repeat: usize,
    /// The stored rank ρ; `None` takes as many values as LoRA.
    pub rank: Option<usize>,
}

impl QaBlora {
    /// The numbers beside a linear layer of `[d_input, d_output]` at the nominal rank `r`.
    pub fn geometry(&self, [d_input, d_output]: [usize; 2], r: usize) -> Geometry {
        let Self { pool, repeat, rank } = *self;
        let ends = d_input / pool.max(1) + d_output / repeat.max(1);
        let parity = || (r.saturating_mul(d_input + d_output) / ends.max(1)).max(1);
        Geometry { pool, repeat, pooling: Pooling::Average, rank: Some(rank.unwrap_or_else(parity)) }
    }
}
