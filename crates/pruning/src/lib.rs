#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod aggregation;
mod apply;
mod checkpoint;
mod criterion;
mod error;
mod importance;
mod kept;
mod packed;
mod pad;
mod prune;
mod selection;
mod structure;
#[cfg(test)]
mod vectors;

pub use aggregation::{Aggregation, GqaFold, head_sums, standardise};
pub use apply::{CutOptions, Requantized, SplitBlocks, apply};
pub use checkpoint::{
    PruningRecord, RECORD_FILE, SaveFormat, SavedCheckpoint, load_pruned, save_padded, save_pruned,
};
pub use criterion::{Axis, Criterion, InputStatistics, Matrix};
pub use error::{Error, Result};
pub use importance::block_influence;
pub use kept::{Kept, KeptLayer};
pub use packed::cut_packed;
pub use pad::pad;
pub use prune::{BlockPruning, HiddenPruning, LayerPruning, Pruned, PruningReport, bias_of};
pub use selection::{
    Budget, HeadRounding, LayerRange, Normalise, Scope, removed_channels, removed_heads, removed_mlp_channels,
};
pub use structure::{Coupling, Group, Layer, Structure, Units};
