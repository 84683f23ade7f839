#![doc = include_str!("../README.md")]
#![cfg_attr(docsrs, feature(doc_cfg))]

mod batch;
mod checkpoint;
mod config;
mod data;
mod error;
mod evaluate;
mod gradients;
mod optim;
mod predict;
mod preference;
mod ranks;
mod recipes;
mod reference;
mod run;
mod schedule;
mod tokenize;
mod trainable;
mod trainer;
mod watch;

pub use batch::{Batch, BatchOptions, Batches, Cursor, Order, Placed, in_order};
pub use config::{ParameterGroup, TrainerConfig};
pub use data::{
    Conversation, DataOptions, DataReport, Dataset, DropReason, DroppedRow, Example, Form, Learned,
    LongSequences, Preview, TokenizeText,
};
pub use error::{Error, Result};
pub use evaluate::{DatasetLoss, evaluate, evaluate_on};
pub use kiln_distributed::{self as distributed, Communicator};
pub use kiln_models::{Distillation, Place, TokenLoss, chat::Message};
pub use optim::OptimizerKind;
pub use predict::{Predictions, predict};
pub use preference::{PreferenceLoss, PreferenceReport};
pub use run::{Evaluation, Event, Figure, Observer, RunEnd, RunOptions, RunReport};
pub use schedule::{Decay, Schedule, ScheduleKind};
pub use tokenize::ModelTokenizer;
pub use trainable::with_trained;
pub use trainer::{StepReport, Trainer};
