//! What a calibration found, and what it tells on the way.

use std::ops::ControlFlow;

use kiln_quant_core::Scheme;
use serde::{Deserialize, Serialize};

/// One projection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProjectionReport {
    /// Its path.
    pub path: String,
    /// How it is stored.
    pub scheme: Scheme,
    /// `‖W - Q - A · B‖ / ‖W‖` in the Frobenius norm, the adapter's scaling included and `W` as scaled, if it was; as all
    /// errors here `f64::MAX` where the original is zero and what was found is not.
    pub weight_error: f64,
    /// `‖y - y^q‖ / ‖y‖` over the measured windows, with `y` the projection's output in the original model and `y^q` in
    /// the model quantized so far, this block rounded to nearest. 0 where nothing was measured: of
    /// experts, who see other tokens in one model than in the other.
    pub activation_error_before: f64,
    /// The same with this block as calibrated.
    pub activation_error_after: f64,
    /// Time that solving took. Projections solved together share it by their weights, dense ones too.
    pub seconds: f64,
}

/// One place that [`AwqConfig`](crate::AwqConfig) scaled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScalingReport {
    /// What writes the scaled channels: a norm's parameter or a projection.
    pub source: String,
    /// The projections that read them.
    pub readers: Vec<String>,
    /// The exponent chosen; 0 changes nothing.
    pub exponent: f64,
    /// `‖y - y^q‖ / ‖y‖` of the readers' outputs together for original inputs, weights rounded to nearest, without scaling.
    pub error_before: f64,
    /// The same with scaling.
    pub error_after: f64,
}

/// One block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockReport {
    /// Its index.
    pub index: usize,
    /// `‖X - X^q‖ / ‖X‖` of the residual stream after the block, over all calibration windows.
    pub activation_error: f64,
    /// Mean loss of each epoch, where the block was optimised as a whole.
    pub losses: Vec<f64>,
    /// Time for everything, reading and measuring included.
    pub seconds: f64,
    /// Where it was scaled before.
    #[serde(default)]
    pub scalings: Vec<ScalingReport>,
    /// Its projections, in the order in which data flows.
    pub projections: Vec<ProjectionReport>,
}

/// The whole model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Its blocks, those of an interrupted run's first part included.
    pub blocks: Vec<BlockReport>,
}

/// Where a calibration stands.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Progress<'a> {
    /// ApiQ has made a step, on one window.
    Step {
        /// The block.
        block: usize,
        /// The projection, where they are optimised one by one.
        projection: Option<&'a str>,
        /// The epoch, counted from 0.
        epoch: usize,
        /// The window, counted from 0.
        window: usize,
        /// Its loss before the step.
        loss: f64,
    },
    /// An epoch of ApiQ has ended.
    Epoch {
        /// The block.
        block: usize,
        /// The projection, where they are optimised one by one.
        projection: Option<&'a str>,
        /// The epoch, counted from 0.
        epoch: usize,
        /// Its mean loss.
        loss: f64,
    },
    /// A projection's codes are chosen.
    Projection {
        /// The block.
        block: usize,
        /// Its path.
        path: &'a str,
    },
    /// A block is finished and, where a folder was given, saved.
    Block {
        /// What was found.
        report: &'a BlockReport,
        /// Blocks of the model.
        total: usize,
    },
}

/// Told of every step, epoch, projection and block; may end the calibration, which then fails with
/// [`Error::Cancelled`](crate::Error::Cancelled). Finished blocks are kept where a folder was given.
pub type Observer<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;
