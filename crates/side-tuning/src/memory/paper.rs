//! The memory formula behind the published figures of QST.
//!
//! It counts 16-bit activations of a block as `34 + 5 a T / h` bytes for each of its h channels (a heads, T tokens a
//! row): no recomputation, and attention scores that are stored. It leaves out embeddings and head in 16 bits, logits,
//! and the backbone's states that a trained downsampling keeps. A framework with fused attention holds less, and the
//! ratio between methods is another one: see `fused`.

/// A model, as the formula sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaperModel {
    /// All parameters.
    pub parameters: f64,
    /// Channels of the residual stream.
    pub width: f64,
    /// Blocks.
    pub layers: f64,
    /// Attention heads; a side network has as many.
    pub heads: f64,
}

/// A method, as the formula sees it; the numbers are trained parameters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PaperMethod {
    /// Full fine-tuning, with 6 bytes of optimizer state a parameter.
    Full,
    /// Adapters over 16-bit weights.
    Lora(f64),
    /// Adapters over NF4 weights.
    Qlora(f64),
    /// A side network over 16-bit weights, narrower by this factor.
    Lst(f64, f64),
    /// A side network over NF4 weights, narrower by this factor.
    Qst(f64, f64),
}

/// Bytes by the formula.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaperMemory {
    /// Weights: 4.127 bits each in NF4 (blocks of 64, double quantization), else 16.
    pub weights: f64,
    /// 14 bytes for each trained parameter.
    pub optimizer: f64,
    /// What the backward pass needs.
    pub activations: f64,
}

impl PaperMemory {
    /// The formula for rows of `seq_len` tokens; `fused` leaves out the attention scores.
    pub fn new(model: &PaperModel, method: PaperMethod, batch: f64, seq_len: f64, fused: bool) -> Self {
        let (bits, optimizer, reduction) = match method {
            PaperMethod::Full => (16.0, 6.0 * model.parameters, 1.0),
            PaperMethod::Lora(trained) => (16.0, 14.0 * trained, 1.0),
            PaperMethod::Qlora(trained) => (4.127, 14.0 * trained, 1.0),
            PaperMethod::Lst(trained, reduction) => (16.0, 14.0 * trained, reduction),
            PaperMethod::Qst(trained, reduction) => (4.127, 14.0 * trained, reduction),
        };
        let width = model.width / reduction;
        let scores = if fused { 0.0 } else { 5.0 * model.heads * seq_len / width };
        Self {
            weights: model.parameters * bits / 8.0,
            optimizer,
            activations: batch * seq_len * width * model.layers * (34.0 + scores),
        }
    }

    /// All together.
    pub fn total(&self) -> f64 {
        self.weights + self.optimizer + self.activations
    }
}

/// Bytes of the backbone's states that a trained downsampling keeps in 16 bits; zero with pools.
pub fn kept_states(model: &PaperModel, batch: f64, seq_len: f64) -> f64 {
    2.0 * batch * seq_len * model.width * (model.layers + 1.0)
}
