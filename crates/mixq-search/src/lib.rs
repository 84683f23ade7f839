#![doc = include_str!("../README.md")]

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
