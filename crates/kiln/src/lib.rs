#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub use kiln_adapters as adapters;
#[cfg(feature = "calibration")]
pub use kiln_calibration as calibration;
pub use kiln_eval as eval;
#[cfg(feature = "mixq-search")]
pub use kiln_mixq_search as mixq_search;
pub use kiln_models as models;
#[cfg(feature = "pruning")]
pub use kiln_pruning as pruning;
pub use kiln_quant_core as quant;
#[cfg(feature = "side-tuning")]
pub use kiln_side_tuning as side_tuning;
pub use kiln_training as training;

mod adapt;
mod lora;
mod merge;
#[cfg(feature = "mixq-search")]
pub mod mixq;

pub use adapt::{
    AdaptedModel, AdapterSetModel, attach_adapters, base_fingerprint, load_adapter_set, load_adapters,
    save_adapters, save_peft,
};
pub use lora::{LoraModel, attach_lora, load_lora, save_lora};
pub use merge::{Requantized, merge_dense, merge_packed, requantize};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct RootReadme;
