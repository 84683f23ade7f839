//! What a calibration does.

use kiln_quant_core::{Plan, Scheme};
use serde::{Deserialize, Serialize};

use crate::{
    ApiqConfig, AwqConfig, Error, GptqConfig, LoftqConfig, Result, Rounding, Svd, clipping::affine_in_groups,
};

/// How codes, and with ApiQ, LoftQ and PiSSA the adapters' starting points, are chosen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Method {
    /// From the weight alone; with new adapters this is [QLoRA](https://arxiv.org/abs/2305.14314)'s start.
    Rtn(Rounding),
    /// [GPTQ](https://arxiv.org/abs/2210.17323), layer after layer.
    Gptq(GptqConfig),
    /// [LoftQ](https://arxiv.org/abs/2310.08659): weights and factors in turns.
    Loftq(LoftqConfig),
    /// [PiSSA](https://arxiv.org/abs/2404.02948) on a quantized residual.
    Pissa {
        /// The quantizer of the residual.
        rounding: Rounding,
        /// How singular vectors are found.
        svd: Svd,
    },
    /// Learned clipping alone, block by block, as [OmniQuant](https://arxiv.org/abs/2308.13137) has it: see
    /// [`ApiqConfig::omniquant`], whose rate and decay differ from the default's. Adapters keep their usual start.
    Clipping(ApiqConfig),
    /// [ApiQ](https://arxiv.org/abs/2402.05147) layer by layer, our reconstruction: each layer's output for quantized
    /// inputs approaches the original's for original inputs.
    ApiqLayer(ApiqConfig),
    /// ApiQ block by block.
    ApiqBlock(ApiqConfig),
}

impl Method {
    pub(crate) fn check(&self) -> Result<()> {
        match self {
            Self::Clipping(config) | Self::ApiqLayer(config) | Self::ApiqBlock(config) => config.check(),
            Self::Gptq(config) => config.check(),
            Self::Loftq(config) => config.check(),
            Self::Rtn(_) | Self::Pissa { .. } => Ok(()),
        }
    }

    /// Fails for a scheme whose ranges the method can't choose.
    pub(crate) fn check_scheme(&self, path: &str, scheme: &Scheme) -> Result<()> {
        match (self, scheme) {
            (Self::Rtn(_) | Self::Loftq(_) | Self::Pissa { .. }, _) | (_, Scheme::Dense) => Ok(()),
            (_, Scheme::Packed(scheme)) => affine_in_groups(path, scheme).map(|_| ()),
        }
    }

    /// Whether there is nothing of the method left without adapters.
    pub(crate) fn needs_adapters(&self) -> bool {
        matches!(self, Self::Loftq(_) | Self::Pissa { .. })
    }

    /// Whether it makes steps of an optimizer, each on one window.
    pub(crate) fn learns_by_windows(&self) -> bool {
        matches!(self, Self::Clipping(_) | Self::ApiqLayer(_) | Self::ApiqBlock(_))
    }

    /// Whether adapters are part of what the method finds.
    pub(crate) fn makes_adapters(&self) -> bool {
        matches!(self, Self::Loftq(_) | Self::Pissa { .. } | Self::ApiqLayer(_) | Self::ApiqBlock(_))
    }
}

/// Options of a [`Calibrator`](crate::Calibrator).
///
/// | option | default | meaning |
/// | --- | --- | --- |
/// | `method` | required | see [`Method`] |
/// | `schemes` | required | by projection; for ApiQ and GPTQ affine in groups of one output |
/// | `scaling` | none | AWQ's scaling of the original weights before the method sees them; changes norms too, see [`AwqConfig`] |
/// | `correction` | none | methods that leave adapters alone start them from the singular vectors of the weight's error |
/// | `measured_windows` | 4 | windows on which errors of single projections are measured; 0 measures none |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationConfig {
    /// How codes and factors are chosen.
    pub method: Method,
    /// The scheme of each projection; dense ones stay as they are.
    pub schemes: Plan<Scheme>,
    /// Scales each block's original weights, and the norms before them, by [AWQ](https://arxiv.org/abs/2306.00978)'s
    /// search. With [`Method::Rtn`] this is AWQ itself.
    #[serde(default)]
    pub scaling: Option<AwqConfig>,
    /// Starts adapters from what [`Method::Rtn`], [`Method::Gptq`] or [`Method::Clipping`] leave of the weight.
    #[serde(default)]
    pub correction: Option<Svd>,
    /// Windows on which single projections are measured.
    #[serde(default = "measured_windows")]
    pub measured_windows: usize,
}

fn measured_windows() -> usize {
    4
}

impl CalibrationConfig {
    /// `method` for `schemes`, everything else by default.
    pub fn new(method: Method, schemes: Plan<Scheme>) -> Self {
        Self { method, schemes, scaling: None, correction: None, measured_windows: measured_windows() }
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.method.check()?;
        if let Some(scaling) = &self.scaling {
            scaling.check()?;
        }
        if self.correction.is_some() && self.method.makes_adapters() {
            let expected = "none for a method that makes the adapters itself";
            return Err(Error::argument("CalibrationConfig.correction", expected, "one"));
        }
        Ok(())
    }
}
