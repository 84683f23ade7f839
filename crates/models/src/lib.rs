#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod balance;
mod batch;
mod block;
mod causal_lm;
pub mod chat;
mod checkpoint;
mod classifier;
pub mod config;
mod context;
mod decoder;
mod delta;
mod driver;
mod embedding;
mod error;
mod experts;
pub mod export;
pub mod families;
mod fingerprint;
mod fisher;
mod generate;
pub mod gguf;
pub mod hf;
#[cfg(feature = "hub")]
#[cfg_attr(docsrs, doc(cfg(feature = "hub")))]
pub mod hub;
#[doc(hidden)]
pub mod jinja;
mod load;
pub mod memory;
mod module_tree;
mod nll;
mod norm;
mod objective;
mod patience;
mod per_layer;
mod placement;
mod probe;
mod rope;
mod sampling;
mod scaling;
mod source;
mod stored_config;
mod tokenizer;
mod windows;

pub use batch::TokenBatch;
pub use block::{Block, BlockPart, PartShape};
pub use causal_lm::{CausalLm, PackedHead, ScaleSites};
pub use checkpoint::Checkpoint;
pub use classifier::Classifier;
pub use context::{Context, KvCache};
pub use decoder::Decoder;
pub use driver::{
    DriverOptions, PendingLoss, Recompute, Targets, loss_and_gradients, queue_gradients, residual_gradient,
};
pub use embedding::{DenseEmbedding, Embedding};
pub use error::{Error, Result};
pub use experts::Expert;
pub use fingerprint::fingerprint;
pub use fisher::squared_gradients;
pub use generate::{Finish, GenerateOptions, Generation, generate, generate_batch, generate_with};
pub use kiln_quant_core::{Place, Slots};
pub use load::{LoadOptions, LoadReport, Tables};
pub use nll::{scores_at, token_nll};
pub use norm::Norm;
pub use objective::{Distillation, EmbeddingNoise, Objective, Teacher, TokenLoss, Weigh, Weights};
pub use per_layer::PerLayerInputs;
pub use placement::Placement;
pub use probe::{Call, Keep, Probe, Tape};
pub use scaling::{ScaleSite, ScaleSource};
pub use source::{DenseTensor, Described, StoredWeight, TensorSource};
pub use tokenizer::{DecodeStream, Tokenizer};
pub use windows::Windows;
