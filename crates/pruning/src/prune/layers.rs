//! Whole blocks.

use kiln_models::{CausalLm, Decoder, Windows};
use kiln_quant_core::QuantLinear;
use serde::{Deserialize, Serialize};

use super::{Pruned, Run};
use crate::{
    Error, Result, apply::CutOptions, importance::statistics, kept::Kept, selection::lowest,
    structure::Structure,
};

/// Removes whole blocks: those with the least influence on the residual stream (ShortGPT, arXiv 2403.03853). The result
/// is a model of fewer blocks and nothing else, so every checkpoint format holds it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerPruning {
    /// Blocks to remove.
    pub remove: usize,
    /// Blocks that stay, whatever their influence.
    #[serde(default)]
    pub protected: Vec<usize>,
}

impl LayerPruning {
    /// Removes `remove` blocks, none protected.
    pub fn new(remove: usize) -> Self {
        Self { remove, protected: Vec::new() }
    }

    /// Prunes `model`. Influences are measured once, on the whole model.
    ///
    /// # Errors
    /// [`Error::RemovesAll`] if no block would stay, [`Error::NothingToPrune`] if too many are protected, and as
    /// [`BlockPruning::prune`](super::BlockPruning::prune).
    pub fn prune(
        &self,
        model: Decoder<QuantLinear>,
        calibration: &Windows,
        options: &CutOptions,
    ) -> Result<Pruned> {
        model.check_one_device("pruning")?;
        let structure = Structure::of(model.config());
        if let Some(why) = structure.layers_stay {
            return Err(Error::mismatch("layers", format!("all blocks, as {why}"), "fewer"));
        }
        let count = structure.layers.len();
        if self.remove >= count {
            let ratio = self.remove as f64 / count as f64;
            let (group, units) = ("layers".into(), "blocks".into());
            return Err(Error::RemovesAll { group, ratio, count, units });
        }
        let free: Vec<usize> = (0..count).filter(|layer| !self.protected.contains(layer)).collect();
        if self.remove > free.len() {
            let reason = format!("{} blocks to remove, {} of {count} not protected", self.remove, free.len());
            return Err(Error::NothingToPrune { reason });
        }
        let mut run = Run::start(model, &structure, Some(calibration), self, &options.sharing)?;
        let influence = statistics(&run.model, &structure, calibration, &options.sharing, None)?.influence;
        let scores: Vec<f64> = free.iter().map(|&layer| influence[layer]).collect();
        let removed: Vec<usize> = lowest(&scores, self.remove).into_iter().map(|index| free[index]).collect();
        let mut kept = Kept::everything(&structure);
        kept.layers.retain(|layer| !removed.contains(&layer.layer));
        run.cut(&kept, options)?;
        run.finish()
    }
}
