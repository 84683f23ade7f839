#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

pub use kiln_adapters as adapters;
pub use kiln_eval as eval;
pub use kiln_models as models;
pub use kiln_quant_core as quant;
pub use kiln_training as training;

mod lora;

pub use lora::{LoraModel, attach_lora, load_lora, save_lora};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct RootReadme;
