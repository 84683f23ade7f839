//! Adapters: small trained parts beside frozen linear layers, whatever those are made of.
//!
//! Use it to fine-tune a model whose weights stay as they are, packed or dense. An [`Adapter`] sees its base only as a
//! [`Projection`](kiln_quant_core::Projection), so it knows neither the weight format nor the model; [`Adapted`] puts
//! the two together and is a projection again, which fits wherever the base did.
//!
//! # Example
//!
//! One linear layer gets a LoRA adapter, which is saved as a PEFT folder, loaded again and merged. For a model of
//! `kiln-models`, `model.slot_shapes()` gives the slots and
//! `model.try_map(|path, base| attacher.attach(path, base))` the adapted model.
//!
//! ```
//! use burn::{nn::LinearConfig, tensor::{Device, Tensor}};
//! use kiln_adapters::{LoraAttacher, PeftConfig, PeftFolder, TargetModules, save_peft};
//! use kiln_quant_core::Projection;
//!
//! let device = Device::flex();
//! let base = LinearConfig::new(16, 32).init(&device);
//! let x = Tensor::<2>::ones([3, 16], &device);
//!
//! // Rank 4, alpha 8, on every module whose name ends in `up_proj`; the names are the checkpoint's.
//! let config = PeftConfig::new(4, 8.0, TargetModules::Names(vec!["up_proj".into()]));
//! let slots = [("mlp.up_proj".to_owned(), [16, 32])];
//! let up_proj = LoraAttacher::new(&config, &slots, 42)?.attach("mlp.up_proj", base.clone())?;
//! let y = up_proj.forward(x.clone());
//!
//! // ... training, which changes `lora_a` and `lora_b` only ...
//!
//! let folder = tempfile::tempdir().unwrap();
//! save_peft(folder.path(), &config, up_proj.adapter.iter().map(|lora| ("mlp.up_proj", lora)))?;
//!
//! let attacher = PeftFolder::open(folder.path())?.attacher(&slots, 42)?;
//! let loaded = attacher.attach("mlp.up_proj", base)?;
//! assert_eq!(loaded.forward(x.clone()).into_data(), y.into_data());
//! let merged: burn::nn::Linear = loaded.merge_dense();
//! # assert_eq!(merged.forward(x).dims(), [3, 32]);
//! # Ok::<(), kiln_adapters::Error>(())
//! ```
//!
//! # Map
//!
//! | | |
//! | --- | --- |
//! | [`Adapter`], [`Adapted`], [`AnyAdapter`] | what an adapter is; base and adapter in one slot; the kind as a run-time choice |
//! | [`Lora`] | low-rank adapters, with rank-stabilised scaling and dropout |
//! | [`PeftConfig`], [`TargetModules`], [`InitLoraWeights`] | the configuration, with PEFT's names |
//! | [`Targets`], [`Target`], [`Unmatched`] | which modules of a model it selects, and with which rank and scaling |
//! | [`LoraAttacher`] | makes the adapters of a model, new or loaded |
//! | [`PeftFolder`], [`save_peft`] | reading and writing PEFT's adapter folders |
//! | [`Dropout`], [`DropoutClock`] | dropout that recomputation and resumption repeat exactly |
//!
//! # Features
//!
//! `flex` (default; CPU), `wgpu`, `vulkan`, `metal`, `rocm`, `cuda`, `cpu`: the backends of `kiln-quant-core`.
//!
//! # What it doesn't do
//!
//! It doesn't train, reads no base checkpoint, and adapts linear layers only: no embeddings, no biases, no trained
//! copies of whole modules (`modules_to_save`). A configuration that asks for them is refused by name.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapted;
mod adapter;
mod any;
mod attach;
mod dropout;
mod error;
mod json_fields;
mod lora;
mod peft;
mod peft_config;
mod random;
mod target;

pub use adapted::Adapted;
pub use adapter::Adapter;
pub use any::AnyAdapter;
pub use attach::LoraAttacher;
pub use dropout::{Dropout, DropoutClock};
pub use error::{Error, Result};
pub use lora::Lora;
pub use peft::{PeftFolder, WEIGHTS_FILE, save_peft};
pub use peft_config::{CONFIG_FILE, InitLoraWeights, MAX_RANK, PeftConfig, TargetModules};
pub use target::{Target, Targets, Unmatched};
