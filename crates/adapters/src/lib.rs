#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adapted;
mod adapter;
mod adapter_folder;
mod adapter_set;
mod any;
mod attach;
mod config;
mod dora;
mod error;
mod json_fields;
mod lora;
mod low_rank;
mod methods;
mod outline;
mod outside;
mod outside_tensors;
mod packed_merge;
mod part;
mod peft;
mod peft_config;
mod pooled;
mod requantize;
mod residual;
mod stacked;
mod store;
mod target;

pub use adapted::Adapted;
pub use adapter::Adapter;
pub use adapter_folder::{
    AdapterFolder, KILN_CONFIG_FILE, KILN_WEIGHTS_FILE, save_adapters, save_adapters_with,
};
pub use adapter_set::{AdapterMix, AdapterSet, AdapterSetAttacher};
pub use any::{AdapterKind, AnyAdapter};
pub use attach::{AnyAttacher, Attacher, LoraAttacher};
pub use config::{AdapterConfig, AdapterMetadata};
pub use dora::Dora;
pub use error::{Error, Result};
pub use kiln_quant_core::Dropout;
pub use lora::Lora;
pub use low_rank::{Factors, Svd, low_rank};
pub use methods::{InitH, Method, QBara, QaBlora, QaHira, QaLora};
pub use outside_tensors::OutsideTensors;
pub use packed_merge::PackedMerge;
pub use peft::{PeftFolder, WEIGHTS_FILE, save_peft, save_peft_with};
pub use peft_config::{CONFIG_FILE, InitLoraWeights, MAX_RANK, PeftConfig, TargetModules};
pub use pooled::{Core, Full, Geometry, LowRank, PooledAdapter, Pooling};
pub use requantize::{OutputError, RequantizeError};
pub use target::{Target, Targets, Unmatched};
