#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod batch;
mod checkpoint;
mod data;
mod error;
mod gradients;
mod jsonl;
mod schedule;
mod tokenize;
mod trainable;
mod trainer;

pub use batch::{Batch, BatchOptions, Batches, Cursor, Order, in_order};
pub use data::{DataOptions, DataReport, Dataset, Example, LongSequences, Message, TokenizeText};
pub use error::{Error, Result};
pub use kiln_models::Place;
pub use schedule::{Schedule, ScheduleKind};
pub use tokenize::ModelTokenizer;
pub use trainer::{Observer, RunOptions, StepReport, Trainer, TrainerConfig};
