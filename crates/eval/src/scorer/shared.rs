//! Requests dealt out to ranks.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use kiln_distributed::{Communicator, gathered, share};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{GenerateRequest, OnAnswer, Scorer};
use crate::{Error, Response, Result};

/// A scorer that several ranks are, each with one of its own for the same model: rank 0 asks and is told, keeps the log and
/// makes the report, as with one scorer; the others [serve](Self::serve) until it has [finished](Self::finish).
///
/// ```
/// # use std::sync::Arc;
/// # use kiln_eval::{Scorer, SharedScorer};
/// # use kiln_distributed::Communicator;
/// # fn example(own: impl Scorer, ranks: Arc<dyn Communicator>) -> kiln_eval::Result<()> {
/// let scorer = SharedScorer::new(own, ranks.clone());
/// if ranks.rank() == 0 {
///     // As with any other scorer: evaluation.evaluate(&scorer, &tasks).
///     let found = Ok(());
///     scorer.finish(found)
/// } else {
///     scorer.serve()
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct SharedScorer<S> {
    scorer: S,
    ranks: Arc<dyn Communicator>,
    /// Tokens of all ranks.
    tokens: AtomicU64,
    /// Whether the ranks have gone apart after a failure.
    over: AtomicBool,
}

/// What rank 0 has to be answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Work {
    /// The number of the first request.
    first: usize,
    requests: Requests,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Requests {
    Pairs(Vec<(String, String)>),
    Rolling(Vec<String>),
    Texts(Vec<GenerateRequest>),
    Finished,
    /// Rank 0 has failed, and says how.
    Failed(String),
}

/// What a rank found.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    /// In the order of its requests.
    responses: Vec<Response>,
    /// Tokens that went through its model so far.
    tokens: u64,
}

/// Requests of a rank that are answered at once: what a run that is stopped has to ask again.
const AT_ONCE: usize = 256;

impl<S: Scorer> SharedScorer<S> {
    /// This rank's part: `scorer` is of the same model, with the same settings, on all of `ranks`.
    pub fn new(scorer: S, ranks: Arc<dyn Communicator>) -> Self {
        Self { scorer, ranks, tokens: AtomicU64::new(0), over: AtomicBool::new(false) }
    }

    /// Answers what rank 0 asks, until it has finished; of the other ranks.
    ///
    /// # Errors
    /// Whatever the scorer of any rank refuses, and ranks that have ended.
    pub fn serve(&self) -> Result<()> {
        loop {
            let work = self.told(None)?;
            match work.requests {
                Requests::Finished => return Ok(()),
                Requests::Failed(message) => {
                    return Err(kiln_distributed::Error::Failed { rank: 0, message }.into());
                }
                _ => self.answers(&work)?,
            };
        }
    }

    /// Lets the other ranks go, and says how the work ended that is behind them, which comes back; of rank 0, when nothing more
    /// is asked.
    ///
    /// # Errors
    /// That of `found`, and ranks that have ended.
    pub fn finish<T>(&self, found: Result<T>) -> Result<T> {
        if self.over.load(Ordering::Relaxed) {
            return found;
        }
        let requests = match &found {
            Ok(_) => Requests::Finished,
            Err(error) => Requests::Failed(error.to_string()),
        };
        let told = self.told(Some(&Work { first: 0, requests }));
        let found = found?;
        told?;
        Ok(found)
    }

    /// What rank 0, which says so, has to be done.
    fn told(&self, work: Option<&Work>) -> Result<Work> {
        let bytes = work.map_or(Ok(Vec::new()), |work| encoded("work", work))?;
        let told = self.ranks.broadcast(bytes).map_err(Error::from).and_then(|bytes| decoded("work", &bytes));
        self.over.fetch_or(told.is_err(), Ordering::Relaxed);
        told
    }

    /// All answers, in the requests' order.
    fn answers(&self, work: &Work) -> Result<Vec<Response>> {
        let answers = self.gathered(work);
        self.over.fetch_or(answers.is_err(), Ordering::Relaxed);
        answers
    }

    fn gathered(&self, work: &Work) -> Result<Vec<Response>> {
        let own = self.own_answers(work).and_then(|found| encoded("answers", &found));
        let (_, all) = gathered(&*self.ranks, own, Vec::clone)?;
        let found: Vec<Found> = all.iter().map(|bytes| decoded("answers", bytes)).collect::<Result<_>>()?;
        self.tokens.store(found.iter().map(|found| found.tokens).sum(), Ordering::Relaxed);
        Ok(found.into_iter().flat_map(|found| found.responses).collect())
    }

    fn own_answers(&self, work: &Work) -> Result<Found> {
        let mine = |count: usize| share(count, self.ranks.rank(), self.ranks.size());
        let mut found: Vec<(usize, Response)> = Vec::new();
        let mut keep = |index: usize, response: Response| {
            found.push((index, response));
            Ok(ControlFlow::Continue(()))
        };
        let scorer = &self.scorer;
        let (count, done) = match &work.requests {
            Requests::Pairs(all) => (all.len(), scorer.loglikelihood(&all[mine(all.len())], &mut keep)),
            Requests::Rolling(all) => {
                (all.len(), scorer.loglikelihood_rolling(&all[mine(all.len())], &mut keep))
            }
            Requests::Texts(all) => (all.len(), scorer.generate_until(&all[mine(all.len())], &mut keep)),
            Requests::Finished | Requests::Failed(_) => (0, Ok(())),
        };
        done.map_err(|error| match error {
            Error::Request { request, what, expected, found } => {
                let request = request + work.first + mine(count).start;
                Error::Request { request, what, expected, found }
            }
            other => other,
        })?;
        found.sort_by_key(|(index, _)| *index);
        let responses = found.into_iter().map(|(_, response)| response).collect();
        Ok(Found { responses, tokens: self.scorer.tokens() })
    }

    /// Asks all ranks for answers to `requests`, some at once.
    fn ask<R: Clone>(
        &self,
        requests: &[R],
        of: impl Fn(Vec<R>) -> Requests,
        on_answer: OnAnswer,
    ) -> Result<()> {
        let mut asked = 0;
        for requests in requests.chunks(AT_ONCE * self.ranks.size()) {
            let work = self.told(Some(&Work { first: asked, requests: of(requests.to_vec()) }))?;
            for response in self.answers(&work)? {
                if on_answer(asked, response)?.is_break() {
                    return Ok(());
                }
                asked += 1;
            }
        }
        Ok(())
    }
}

impl<S: Scorer> Scorer for SharedScorer<S> {
    fn loglikelihood(&self, requests: &[(String, String)], on_answer: OnAnswer) -> Result<()> {
        self.ask(requests, Requests::Pairs, on_answer)
    }

    fn loglikelihood_rolling(&self, requests: &[String], on_answer: OnAnswer) -> Result<()> {
        self.ask(requests, Requests::Rolling, on_answer)
    }

    fn generate_until(&self, requests: &[GenerateRequest], on_answer: OnAnswer) -> Result<()> {
        self.ask(requests, Requests::Texts, on_answer)
    }

    fn settings(&self) -> serde_json::Value {
        self.scorer.settings()
    }

    fn tokens(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }
}

fn encoded(what: &str, value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| unlike(what, error))
}

fn decoded<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| unlike(what, error))
}

fn unlike(what: &str, error: impl ToString) -> Error {
    let expected = "finite numbers and texts, as ranks of one version exchange them";
    Error::Data { what: format!("{what} of a rank"), expected: expected.into(), found: error.to_string() }
}
