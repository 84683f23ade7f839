//! AutoMixQ: which layer gets how many bits, chosen on the Pareto front of memory and quality.
//!
//! Given projections, the formats that each may get and their exact bytes, this crate searches the plans that no
//! other beats in both memory and score. It measures nothing itself: an [`Objective`] does, which sees plans and
//! returns scores of the *quantized* model. The crate knows no tensors and no framework; a [`Plan`] is a map from path
//! to setting string, which `kiln_quant_core::Scheme` parses.
//!
//! # Example
//!
//! Four layers, three formats, an additive proxy as the objective, and the default method:
//!
//! ```
//! use kiln_mixq_search::{
//!     AdditiveProxy, Cost, Fidelity, KlMix, MemoryModel, SearchSettings, Slot, SpaceBuilder, TrialLog, search,
//! };
//!
//! let slots = (0..4).map(|layer| Slot::new(format!("model.layers.{layer}.mlp.up_proj"), 64, 128)).collect();
//! let space = SpaceBuilder::new(slots).schemes(["affine2:64", "affine4:64", "affine8:64"]).build(
//!     MemoryModel::new(10_000),
//!     // In Kiln: the scheme's `storage_bytes`.
//!     |slot, setting| {
//!         let bits = match setting.scheme.as_str() { "affine2:64" => 3, "affine4:64" => 5, _ => 9 };
//!         Ok(Cost::storage((slot.d_input * slot.d_output * bits / 8) as u64))
//!     },
//! )?;
//! let harm = [8.0, 1.0, 2.0, 5.0].map(|weight| vec![weight, weight / 10.0, weight / 100.0]);
//! let mut objective = AdditiveProxy::new("example", harm.to_vec());
//!
//! let settings = SearchSettings::new(30, Fidelity::kl(1024));
//! let mut log = TrialLog::in_memory(&space);
//! let outcome = search(&space, &mut objective, &mut log, &KlMix::default(), &settings)?;
//! let best = outcome.front.select(10_000 + 20_480)?;
//! assert!(best.bytes <= 30_480);
//! println!("{}", outcome.front.to_markdown());
//! # Ok::<(), kiln_mixq_search::Error>(())
//! ```
//!
//! # Map
//!
//! | | |
//! | --- | --- |
//! | [`SpaceBuilder`], [`Granularity`], [`SearchSpace`], [`Config`], [`Plan`], [`Setting`] | what can be chosen, and one choice |
//! | [`MemoryModel`], [`MemoryReport`], [`Cost`], [`PublishedFormat`] | bytes |
//! | [`Objective`], [`Fidelity`], [`AdditiveProxy`], [`Divergence`] | scores |
//! | [`search()`], [`SearchSettings`], [`Outcome`], [`Front`] | a search and its result |
//! | [`SearchMethod`]: [`KlMix`], [`Paper`], [`Released`], [`Nsga2`], [`Bo`], [`Amq`], [`Random`], [`Uniform`] | the methods |
//! | [`Halving`], [`Finalists`] | what happens to the best plans afterwards |
//! | [`TrialLog`], [`Trial`] | what survives a kill and is shared by processes |
//! | [`hypervolume`], [`pareto_front`], [`non_dominated_ranks`], [`crowding_distances`], [`knapsack()`], [`ehvi`] | the mathematics |
//! | [`GaussianProcess`], [`MlpEnsemble`], [`Ridge`], [`CubicRbf`] | surrogates |
//!
//! # What it doesn't do
//!
//! It doesn't quantize, prune, train or evaluate. A choice's bytes must add up over units: a pruning ratio of one unit
//! that changes another's shape can't be searched. There is no random forest among the surrogates.

mod builder;
mod digest;
mod divergence;
mod error;
mod front;
mod halving;
mod knapsack;
mod log;
mod memory;
mod methods;
mod moves;
mod objective;
mod pareto;
mod plan;
mod plot;
mod search;
mod session;
mod setting;
mod space;
mod surrogate;
#[cfg(test)]
mod testing;
mod trial;

pub use builder::{Granularity, Slot, SpaceBuilder};
pub use divergence::Divergence;
pub use error::{Error, Result};
pub use front::{Front, FrontPoint};
pub use halving::{Finalist, Finalists, Halving, Rung};
pub use knapsack::{KnapsackPoint, knapsack};
pub use log::TrialLog;
pub use memory::{Cost, MemoryAxis, MemoryModel, MemoryReport, PublishedFormat};
pub use methods::{
    Amq, Bo, Individual, KlMix, METHODS, Nsga2, Nsga2State, Paper, Random, Released, Screen, SearchMethod,
    Uniform, method,
};
pub use objective::{
    AdditiveProxy, Direction, Evaluation, Fidelity, KeepGoing, Measure, Measurement, Objective, Request,
};
pub use pareto::{
    best_under_budget, crowding_distances, dominates, hypervolume, non_dominated_ranks, pareto_front,
};
pub use plan::Plan;
pub use search::{Outcome, SearchSettings, search};
pub use session::{Observation, Session};
pub use setting::Setting;
pub use space::{Choice, Config, SearchSpace, Unit};
pub use surrogate::{
    CubicRbf, GaussianProcess, Matern52, MlpEnsemble, Prediction, Ridge, Surrogate, SurrogateKind, ehvi::ehvi,
};
pub use trial::{Trial, TrialKey};
