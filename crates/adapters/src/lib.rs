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
//! | [`Adapter`], [`Adapted`], [`AnyAdapter`], [`AdapterKind`] | what an adapter is; base and adapter in one slot; the kind as a run-time choice |
//! | [`Lora`], [`Dora`] | low-rank adapters, with rank-stabilised scaling and dropout; the same with trained magnitudes |
//! | [`PooledAdapter`], [`Core`], [`Geometry`], [`Pooling`] | pool, map, repeat: what all balanced-rank adapters compute |
//! | [`Method`], [`QBara`], [`QaLora`], [`QaHira`], [`QaBlora`] | the methods: their numbers, initial values and what they merge into |
//! | [`AdapterConfig`], [`PeftConfig`], [`TargetModules`], [`InitLoraWeights`] | the configuration, with PEFT's names |
//! | [`Targets`], [`Target`], [`Unmatched`] | which modules of a model it selects, and with which rank and scaling |
//! | [`Attacher`], [`LoraAttacher`], [`AnyAttacher`] | makes the adapters of a model, new or loaded |
//! | [`low_rank()`], [`Factors`], [`Svd`] | the best approximation of a matrix by two factors |
//! | [`PackedMerge`] | merging into packed weights without touching a code |
//! | [`Adapted::requantize`], [`RequantizeError`] | merging with loss, and how much |
//! | [`AdapterSet`], [`AdapterMix`], [`AdapterSetAttacher`] | several adapters on one base, switched and weighted at run time |
//! | [`PeftFolder`], [`save_peft`] | PEFT's adapter folders: LoRA, rank-stabilised LoRA, DoRA, PiSSA, OLoRA, QA-LoRA |
//! | [`AdapterFolder`], [`save_adapters`] | own folders, for every method, tied to their base by its fingerprint |
//! | [`Dropout`], [`DropoutClock`] | dropout that recomputation and resumption repeat exactly |
//!
//! # Exact merges
//!
//! An adapter that adds one number to every block of weights that share a scale can be put into the blocks' offsets:
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use kiln_adapters::{Adapted, Core, Dropout, DropoutClock, PooledAdapter, QaHira};
//! use kiln_quant_core::{HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantLinear};
//!
//! let device = Device::flex();
//! let weight: Vec<f32> = (0..64 * 8).map(|i| (i as f32).sin()).collect();
//! let packed = MinMax.quantize("up_proj", &weight, 64, 8, &"affine4:32".parse()?)?;
//! let base = QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&packed, &device), bias: None });
//!
//! // Groups of 32 inputs, as the base has; H as after training.
//! let numbers = QaHira::for_groups(32).geometry();
//! let h = Tensor::<2>::ones(numbers.map_shape([64, 8]), &device);
//! let dropout = Dropout::new(0.0, "up_proj", DropoutClock::new(0));
//! let adapter = PooledAdapter::new(Core::full(h), [32, 1], numbers.pooling, 0.25, dropout);
//! let adapted = Adapted::new(base, Some(adapter));
//! let x = Tensor::<2>::ones([1, 64], &device);
//! let y = adapted.forward(x.clone());
//!
//! let QuantLinear::Packed(merged) = adapted.merge_packed("up_proj")? else { panic!("still packed") };
//! assert_eq!(merged.weight.to_host()?.codes, packed.codes);
//! assert!((merged.weight.forward(x) - y).abs().max().into_scalar::<f32>() < 1e-5);
//! # Ok::<(), kiln_adapters::Error>(())
//! ```
//!
//! # Features
//!
//! `flex` (default; CPU), `wgpu`, `vulkan`, `metal`, `rocm`, `cuda`, `cpu`: the backends of `kiln-quant-core`.
//!
//! # What it doesn't do
//!
//! It doesn't train, reads no base checkpoint, and adapts linear layers only: no embeddings, no biases, no trained
//! copies of whole modules (`modules_to_save`). A configuration that asks for them is refused by name. It writes adapters,
//! no models: `kiln-models` exports those.
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapted;
mod adapter;
mod adapter_folder;
mod adapter_set;
mod any;
mod attach;
mod config;
mod dora;
mod dropout;
mod error;
mod json_fields;
mod lora;
mod low_rank;
mod methods;
mod packed_merge;
mod part;
mod peft;
mod peft_config;
mod pooled;
mod random;
mod requantize;
mod residual;
mod store;
mod target;

pub use adapted::Adapted;
pub use adapter::Adapter;
pub use adapter_folder::{AdapterFolder, KILN_CONFIG_FILE, KILN_WEIGHTS_FILE, save_adapters};
pub use adapter_set::{AdapterMix, AdapterSet, AdapterSetAttacher};
pub use any::{AdapterKind, AnyAdapter};
pub use attach::{AnyAttacher, Attacher, LoraAttacher};
pub use config::AdapterConfig;
pub use dora::Dora;
pub use dropout::{Dropout, DropoutClock};
pub use error::{Error, Result};
pub use lora::Lora;
pub use low_rank::{Factors, Svd, low_rank};
pub use methods::{InitH, Method, QBara, QaBlora, QaHira, QaLora};
pub use packed_merge::PackedMerge;
pub use peft::{PeftFolder, WEIGHTS_FILE, save_peft};
pub use peft_config::{CONFIG_FILE, InitLoraWeights, MAX_RANK, PeftConfig, TargetModules};
pub use pooled::{Core, Full, Geometry, LowRank, PooledAdapter, Pooling};
pub use requantize::{OutputError, RequantizeError};
pub use target::{Target, Targets, Unmatched};
