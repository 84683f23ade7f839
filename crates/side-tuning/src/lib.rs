#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod backbone;
mod classifier;
mod config;
mod downsample;
mod error;
mod files;
mod hidden_cache;
mod init;
pub mod memory;
mod mixing;
mod network;
mod pruned_start;
mod side_tuned;
#[cfg(test)]
mod vectors;

pub use backbone::Backbone;
pub use classifier::{SideClassifier, load_classifier, save_classifier, side_classifier};
pub use config::{Downsample, GateConfig, GateShape, HeadMix, Share, SideConfig};
pub use downsample::Downsampler;
pub use error::{Error, Result};
pub use files::{CONFIG_FILE, WEIGHTS_FILE};
pub use hidden_cache::{HiddenCache, HiddenCacheReport, StatePrecision};
pub use mixing::{Gate, Mixer};
pub use network::{ParameterCounts, SideNetwork};
pub use side_tuned::SideTuned;
