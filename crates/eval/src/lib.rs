#![doc = include_str!("../README.md")]
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
