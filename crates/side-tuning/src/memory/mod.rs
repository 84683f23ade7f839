//! What a training step holds, with a side network beside the methods of [`kiln_models::memory`].
//!
//! [`estimate`] counts the tensors of Kiln's own steps. [`paper`] has the formula behind the published figures: 16 bits,
//! stored scores, no logits.
//!
//! In values for each token and block (d the backbone's width, d' the side's, k the rank of the downsampling), side
//! tuning keeps what [`kiln_models::memory`] says of the side block, and `3 d'` (gate and LayerNorm), `d + 2 k`
//! (adapter: the backbone's state and two low-rank ones). With recomputation a block keeps its input only, `d + d'`.

mod flops;
pub mod paper;

pub use flops::step_macs;
pub use kiln_models::memory::{Halves, MemoryEstimate, ProcessConstants, Step};
use kiln_models::{
    config::ModelConfig,
    memory::{self, BlockSizes, Work},
};

use crate::{Downsample, Result, SideConfig};

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// Every weight.
    Full,
    /// LoRA on every linear of the blocks; over packed weights it is QLoRA.
    Lora {
        /// Rank of the adapters.
        rank: usize,
    },
    /// A side network: QST over packed weights, LST over dense ones.
    Side(SideConfig),
}

/// Bytes of a step of `method` on a model whose weights take `weight_bytes` as loaded
/// ([`StorageReport::total_bytes`](kiln_quant_core::StorageReport::total_bytes)).
///
/// # Errors
/// A side network that doesn't fit the model.
pub fn estimate(
    model: &ModelConfig,
    weight_bytes: usize,
    method: &Method,
    step: &Step,
) -> Result<MemoryEstimate> {
    let work = match method {
        Method::Full => Work::full(model, weight_bytes, step),
        Method::Lora { rank } => Work::lora(model, *rank, step),
        Method::Side(config) => {
            let (block, side) = (BlockSizes::of(model), BlockSizes::of(&config.side_model(model)?));
            let share = config.kept(model.num_hidden_layers)?.len() as f64 / model.num_hidden_layers as f64;
            let input = block.input() + side.width;
            Work {
                added: config.parameter_counts(model)?.total() as f64,
                trained_weights: 0.0,
                largest: 0.0,
                kept: share
                    * (side.kept(true, step.halves.min(Halves::Attention))
                        + downsampling(config, &block, &side)),
                input,
                forward: block.passing(),
                backward: side.passing() + 2.0 * input,
            }
        }
    };
    Ok(memory::estimate(model, weight_bytes, &work, step))
}

/// Values that a token keeps for the downsampling and the gate of a block.
fn downsampling(config: &SideConfig, block: &BlockSizes, side: &BlockSizes) -> f64 {
    let weights = match config.downsample {
        Downsample::Linear => block.width,
        Downsample::Lora => block.width + config.rank as f64,
        Downsample::Adapter => block.width + 2.0 * config.rank as f64,
        Downsample::MaxPool | Downsample::AvgPool => 0.0,
    };
    weights + side.width * if config.downsample_norm { 3.0 } else { 1.0 }
}
