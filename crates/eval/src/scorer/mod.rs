//! What answers requests.

mod encode;
mod generation;
mod model;
mod plan;
mod shared;

use std::ops::ControlFlow;

pub use model::ModelScorer;
use serde::{Deserialize, Serialize};
pub use shared::SharedScorer;

use crate::{Response, Result};

/// Told the answer to each request as soon as it is known, in any order, with the request's index; may end the work.
pub type OnAnswer<'a> = &'a mut dyn FnMut(usize, Response) -> Result<ControlFlow<()>>;

/// A text to be generated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// What goes before it.
    pub context: String,
    /// Texts that end it and aren't part of it.
    pub until: Vec<String>,
    /// Tokens at most.
    pub max_gen_toks: usize,
}

/// Something that says how likely texts are, and writes some: a model with its tokenizer, or a stand-in for one.
///
/// Each method calls `on_answer` once for each request and returns early if told to.
pub trait Scorer {
    /// Answers with [`Response::Pair`]: the log-likelihood, in nats, of the second text after the first, and whether each
    /// of its tokens is the most likely one.
    ///
    /// # Errors
    /// [`Error::Request`](crate::Error::Request) for what can't be answered, and `on_answer`'s error.
    fn loglikelihood(&self, requests: &[(String, String)], on_answer: OnAnswer) -> Result<()>;

    /// Answers with [`Response::Rolling`]: the log-likelihood, in nats, of a whole text.
    ///
    /// # Errors
    /// As [`loglikelihood`](Self::loglikelihood).
    fn loglikelihood_rolling(&self, requests: &[String], on_answer: OnAnswer) -> Result<()>;

    /// Answers with [`Response::Text`]: a greedy continuation.
    ///
    /// # Errors
    /// As [`loglikelihood`](Self::loglikelihood).
    fn generate_until(&self, requests: &[GenerateRequest], on_answer: OnAnswer) -> Result<()>;

    /// What changes the answers and isn't the model: part of reports, and compared when a run is resumed.
    fn settings(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    /// Tokens that went through the model so far.
    fn tokens(&self) -> u64 {
        0
    }
}
