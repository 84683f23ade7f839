//! The load-balancing loss of mixtures of experts: it is least where all experts get equally many tokens.
//!
//! Source: Switch Transformers, section 2.2 ([arXiv:2101.03961](https://arxiv.org/abs/2101.03961)), over all blocks together, as
//! transformers' `load_balancing_loss_func` has it.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Tensor, activation::softmax};

use crate::TokenBatch;

/// What a block's router said.
#[derive(Debug, Clone)]
pub(crate) struct Routed {
    /// Scores `[tokens, experts]`.
    pub scores: Tensor<2>,
    /// The chosen experts, token by token.
    pub chosen: Arc<[usize]>,
}

/// Where the blocks of a pass leave what their routers said, for whoever asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct RouterLog(Arc<Mutex<Vec<Routed>>>);

impl RouterLog {
    pub(crate) fn add(&self, routed: Routed) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(routed);
    }

    /// All since it was asked last.
    pub(crate) fn take(&self) -> Vec<Routed> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How often each expert was chosen in a pass, as the loss counts it.
pub(crate) struct Balance {
    /// For each expert: experts / N² times the number of choices, for N routers' rows. Padding is not counted.
    shares: Vec<f32>,
    /// 1 for each token that is none, `[tokens]`.
    counted: Vec<f32>,
}

impl Balance {
    /// Of all blocks of a pass over `tokens`; `None` if none has a router.
    pub(crate) fn of(routed: &[Routed], tokens: &TokenBatch) -> Option<Self> {
        let [_, experts] = routed.first()?.scores.dims();
        let counted: Vec<f32> =
            tokens.segments.iter().map(|segment| f32::from(u8::from(*segment != 0))).collect();
        let mut chosen = vec![0u64; experts];
        for Routed { chosen: of_block, .. } in routed {
            let per_token = of_block.len() / counted.len();
            let rows = of_block.chunks_exact(per_token).zip(&counted);
            rows.filter(|(_, counted)| **counted > 0.0).for_each(|(row, _)| {
                row.iter().for_each(|expert| chosen[*expert] += 1);
            });
        }
        let rows = routed.len() as f64 * counted.iter().map(|one| f64::from(*one)).sum::<f64>();
        let share = |count: u64| (experts as f64 * count as f64 / (rows * rows)) as f32;
        Some(Self { shares: chosen.into_iter().map(share).collect(), counted })
    }

    /// The part of the loss that comes from one block. The choices are counts: no gradient goes through them.
    pub(crate) fn loss(&self, scores: &Tensor<2>) -> Tensor<1> {
        let device = scores.device();
        let row = |values: &[f32]| Tensor::<1>::from_data(values, &device);
        let weighted = softmax(scores.clone(), 1) * row(&self.shares).unsqueeze_dim(0);
        (weighted * row(&self.counted).unsqueeze_dim(1)).sum()
    }
}
