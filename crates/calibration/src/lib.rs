#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod apiq;
mod awq;
mod block;
mod calibrator;
mod checkpoint;
mod clipping;
mod clipping_there;
mod config;
mod error;
mod exchange;
mod gptq;
mod hessian;
mod loftq;
mod original;
mod pass;
mod report;
mod solve;
mod station;
mod stream;
mod values;

pub use apiq::{ApiqConfig, ApiqLoss};
pub use awq::AwqConfig;
pub use calibrator::{Calibrated, Calibrator};
pub use clipping::{ClippedWeight, ClippingGrid, Levels};
pub use config::{CalibrationConfig, Method};
pub use error::{Error, Result};
pub use gptq::{Gptq, GptqConfig, gptq};
pub use hessian::Hessian;
pub use kiln_adapters::{Factors, Svd, low_rank};
pub use loftq::{LoftqConfig, QuantizedWithFactors, Rounding, loftq, pissa};
pub use pass::block_errors;
pub use report::{BlockReport, CalibrationReport, Observer, Progress, ProjectionReport, ScalingReport};
