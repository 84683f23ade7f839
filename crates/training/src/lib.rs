#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod adamw;
mod batch;
mod checkpoint;
mod data;
mod error;
mod evaluate;
mod gradients;
mod jsonl;
mod run;
mod schedule;
mod tokenize;
mod trainable;
mod trainer;

pub use batch::{Batch, BatchOptions, Batches, Cursor, Order, in_order};
pub use data::{
    DataOptions, DataReport, Dataset, DropReason, DroppedRow, Example, LongSequences, TokenizeText,
};
pub use error::{Error, Result};
pub use evaluate::{DatasetLoss, evaluate};
pub use kiln_models::{Place, chat::Message};
pub use run::{Evaluation, Event, Observer, RunEnd, RunOptions, RunReport};
pub use schedule::{Schedule, ScheduleKind};
pub use tokenize::ModelTokenizer;
pub use trainer::{StepReport, Trainer, TrainerConfig};
