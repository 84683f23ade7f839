//! Where factors can move between a model's parts without changing what it computes.

/// A place in a block where channels can be divided on the writing side and multiplied on the reading one: the block's
/// output stays what it is for any positive factors.
///
/// [AWQ](https://arxiv.org/abs/2306.00978) puts larger weights on inputs with large activations this way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScaleSite {
    /// What writes the channels.
    pub source: ScaleSource,
    /// Paths of all projections that read them, by their inputs.
    pub readers: Vec<String>,
}

/// The writing side of a [`ScaleSite`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScaleSource {
    /// A norm.
    Norm {
        /// Its parameters of one value a channel, by their names in the checkpoint; see
        /// [`ScaleSites::norm_parameter`](crate::ScaleSites::norm_parameter).
        parameters: Vec<String>,
        /// Whether its gains are 1 plus the parameter: it is that sum that is divided.
        one_plus: bool,
    },
    /// The outputs of the projection with this path, weight and bias.
    Projection(String),
}
