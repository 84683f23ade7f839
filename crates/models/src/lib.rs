#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod any_model;
mod batch;
mod causal_lm;
pub mod chat;
mod checkpoint;
pub mod config;
mod context;
mod driver;
mod embedding;
mod error;
pub mod export;
mod generate;
pub mod gguf;
pub mod hf;
pub mod llama;
mod load;
mod nll;
mod norm;
pub mod opt;
mod rope;
mod sampling;
mod scaling;
mod source;
mod tokenizer;

pub use any_model::AnyModel;
pub use batch::TokenBatch;
pub use causal_lm::{CausalLm, ScaleSites};
pub use kiln_quant_core::{Place, Slots};
pub use checkpoint::Checkpoint;
pub use context::{Context, KvCache};
pub use driver::{DriverOptions, Recompute, Targets, loss_and_gradients, residual_gradient};
pub use embedding::{DenseEmbedding, Embedding};
pub use error::{Error, Result};
pub use generate::{Finish, GenerateOptions, Generation, generate, generate_with};
pub use llama::Llama;
pub use load::{LoadOptions, LoadReport};
pub use nll::token_nll;
pub use norm::{LayerNorm, RmsNorm};
pub use opt::Opt;
pub use scaling::{ScaleSite, ScaleSource};
pub use source::{DenseTensor, StoredWeight, TensorSource};
pub use tokenizer::{DecodeStream, Tokenizer};
