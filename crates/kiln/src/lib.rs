#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

/// Tensors, devices and modules, at the version that this crate is built with.
pub use burn;
#[doc(inline)]
pub use kiln_adapters as adapters;
#[cfg(feature = "calibration")]
#[doc(inline)]
pub use kiln_calibration as calibration;
#[doc(inline)]
pub use kiln_distributed as distributed;
#[doc(inline)]
pub use kiln_eval as eval;
#[cfg(feature = "mixq-search")]
#[doc(inline)]
pub use kiln_mixq_search as mixq_search;
#[doc(inline)]
pub use kiln_models as models;
#[cfg(feature = "pruning")]
#[doc(inline)]
pub use kiln_pruning as pruning;
#[doc(inline)]
pub use kiln_quant_core as quant;
#[cfg(feature = "side-tuning")]
#[doc(inline)]
pub use kiln_side_tuning as side_tuning;
#[doc(inline)]
pub use kiln_training as training;

mod adapter_set;
mod base;
mod error;
mod finetune;
#[cfg(feature = "mixq-search")]
pub mod mixq;
pub mod prelude;
#[cfg(any(feature = "calibration", feature = "pruning"))]
mod stages;
mod stop_texts;
mod task_score;
mod tuned;

pub use adapter_set::{AdapterSetLinear, load_adapter_set};
pub use base::{Base, OpenBase};
pub use error::{Error, Result};
pub use finetune::{FineTune, FineTuned};
pub use kiln_quant_core::slots;
pub use tuned::{AdaptedLinear, AdaptedModel, Merged, Requantized, Tuned};

#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct RootReadme;

#[cfg(doctest)]
#[doc = include_str!("../../../docs/scaling.md")]
struct Scaling;
