//! Perplexity of language models, with the protocols that published numbers follow.
//!
//! "Perplexity" names several numbers that differ by tens of per cent on one model and text. Here the type says which:
//!
//! | type | windows | scored | divided by | numbers like it |
//! | --- | --- | --- | --- | --- |
//! | [`WindowedPerplexity`] | equal, side by side; the rest is dropped | all but each window's first token | tokens | GPTQ, ApiQ, QLoRA, LLM-Pruner ("WikiText-2 ppl") |
//! | [`StridedPerplexity`] | overlapping | each token once, with context | tokens | Hugging Face's guide |
//! | [`RollingPerplexity`] | one token of context, document by document | each token once | words, bytes or tokens | lm-evaluation-harness (`wikitext`) |
//!
//! Each `evaluate` takes any [`CausalLm`](kiln_models::CausalLm), packed or dense, with or without adapters, and returns
//! means with standard errors. Logits are f32 and made a few rows at a time, sums are f64; progress goes to a callback,
//! which can end the evaluation. [`wikitext`] prepares the text for the harness's task.
//!
//! ```
//! use std::ops::ControlFlow;
//! use burn::tensor::Device;
//! use kiln_eval::WindowedPerplexity;
//! use kiln_models::{Checkpoint, LoadOptions};
//!
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
//! let checkpoint = Checkpoint::open(folder)?;
//! let options = LoadOptions::uniform("affine4:64".parse()?);
//! let (model, _) = checkpoint.load(&options, &Device::flex())?;
//! let text = "My fellow citizens, the Union is strong, and the people of the United States are at peace.";
//! let ids = checkpoint.tokenizer()?.encode(text, false)?;
//! let protocol = WindowedPerplexity::new(16).with_max_windows(1);
//! let found = protocol.evaluate(&model, &ids, &mut |_| ControlFlow::Continue(()))?;
//! assert_eq!(found.tokens, 15);
//! assert!(found.perplexity < 200.0); // a model that knows nothing has 2048
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The crate reads no data sets and has no tasks with choices.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod error;
mod memory;
mod perplexity;
pub mod wikitext;

pub use error::{Error, Result};
pub use memory::peak_rss_bytes;
pub use perplexity::{
    OnProgress, Perplexity, Progress, RollingDocument, RollingPerplexity, RollingResult, StandardError,
    StridedPerplexity, WindowedPerplexity,
};
