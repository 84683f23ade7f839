//! Classification: a score head on what the language model's head would see.

use std::path::Path;

use burn::{
    module::Module,
    nn::Linear,
    optim::{GradientsAccumulator, GradientsParams},
    tensor::{Int, Tensor, TensorData},
};
use kiln_models::{CausalLm, TokenBatch};
use kiln_quant_core::{fused, to_host};

use crate::{Backbone, Error, Result, SideConfig, SideTuned, files, init::Init};

/// A side-tuned model that classifies texts: a linear without bias on the mixed state of each row's last token that
/// isn't padding.
///
/// The last token is the last one whose segment isn't 0, so padding on either side, or none, makes no difference.
#[derive(Module, Debug)]
pub struct SideClassifier<M: Backbone> {
    /// Backbone and side network.
    pub model: SideTuned<M>,
    /// `[width, labels]`.
    pub score: Linear,
    #[module(skip)]
    labels: usize,
}

/// What a folder holds of a classifier.
#[derive(Module, Debug)]
struct Trained {
    side: crate::SideNetwork,
    score: Linear,
}

impl<M: Backbone> SideClassifier<M> {
    /// A classifier of `labels` classes.
    ///
    /// # Errors
    /// As [`SideTuned::new`]; fewer than two labels.
    pub fn new(backbone: M, labels: usize, config: &SideConfig, seed: u64) -> Result<Self> {
        if labels < 2 {
            return Err(Error::argument("labels", "at least 2", labels));
        }
        let init = Init { seed, device: backbone.device() };
        let width = backbone.model_config().hidden_size;
        let model = SideTuned::new(backbone, config, seed)?;
        Ok(Self { model, score: init.linear("score", [width, labels], false), labels })
    }

    /// Number of classes.
    pub fn labels(&self) -> usize {
        self.labels
    }

    /// A score for each row and class, `[batch, labels]`.
    ///
    /// # Errors
    /// Token ids beyond the vocabulary, positions beyond the model's, a row of padding only.
    pub fn forward(&self, tokens: &TokenBatch) -> Result<Tensor<2>> {
        let last = self.last_tokens(tokens)?;
        let x = self.model.residual(&self.model.context(tokens, None)?, None);
        let [batch, length, width] = x.dims();
        let index = Tensor::<1, Int>::from_data(TensorData::new(last, [batch]), &self.model.device());
        let rows = x.reshape([batch * length, width]).select(0, index);
        Ok(self.score.forward(self.model.final_norm(rows)))
    }

    /// Adds the gradients of the **sum** of the rows' negative log-likelihoods to `gradients`; returns that sum in nats.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); labels that don't fit.
    pub fn loss_and_gradients(
        &self,
        tokens: &TokenBatch,
        labels: &[usize],
        gradients: &mut GradientsAccumulator<Self>,
    ) -> Result<f64> {
        if labels.len() != tokens.batch {
            return Err(Error::argument(
                "labels",
                format!("one for each of {} rows", tokens.batch),
                labels.len(),
            ));
        }
        if let Some(label) = labels.iter().find(|&&label| label >= self.labels) {
            return Err(Error::argument("labels", format!("labels below {}", self.labels), label));
        }
        let ids: Vec<i64> = labels.iter().map(|&label| label as i64).collect();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [labels.len()]), &self.model.device());
        let losses = fused::cross_entropy(self.forward(tokens)?, ids);
        let sum = to_host("losses", losses.clone().inner())?.into_iter().map(f64::from).sum();
        gradients.accumulate(self, GradientsParams::from_grads(losses.sum().backward(), self));
        Ok(sum)
    }

    /// Place of each row's last token, in the flattened batch.
    fn last_tokens(&self, tokens: &TokenBatch) -> Result<Vec<i64>> {
        let (vocabulary, limit) = (self.model.vocab_size(), self.model.max_positions());
        if let Some(id) = tokens.ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(Error::argument("token ids", format!("ids below {vocabulary}, the vocabulary"), id));
        }
        if let Some(position) = tokens.positions.iter().find(|position| **position as usize >= limit) {
            return Err(Error::argument("positions", format!("positions below {limit}"), position));
        }
        let rows = tokens.segments.chunks_exact(tokens.length).enumerate();
        rows.map(|(row, segments)| {
            let last = segments.iter().rposition(|&segment| segment != 0);
            let last = last.ok_or_else(|| {
                Error::argument("rows", "at least one token that isn't padding", format!("none in row {row}"))
            })?;
            Ok((row * tokens.length + last) as i64)
        })
        .collect()
    }

    /// As [`SideTuned::save`], with the score head.
    ///
    /// # Errors
    /// As [`SideTuned::save`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let trained = Trained { side: self.model.side.clone(), score: self.score.clone() };
        let (model, labels) = (&self.model, Some(self.labels));
        files::save(folder.as_ref(), model.backbone(), model.config(), labels, &trained)
    }

    /// As [`SideTuned::load`], with the score head.
    ///
    /// # Errors
    /// As [`SideTuned::load`]; a language model's folder.
    pub fn load(backbone: M, folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let opened = files::open(folder, &backbone)?;
        let path = folder.join(files::CONFIG_FILE);
        let labels =
            opened.labels.ok_or_else(|| Error::file(&path, "labels", "a number of labels", "none"))?;
        // As many as the file can back: the score head is made before its tensor is compared.
        let stored =
            kiln_quant_core::safetensors_file::SafetensorsFile::open(folder.join(files::WEIGHTS_FILE))?;
        let found = stored.describe("score.weight")?.1.first().copied();
        if found != Some(labels) {
            return Err(Error::file(&path, "labels", format!("{found:?}, as score.weight has"), labels));
        }
        let mut model = Self::new(backbone, labels, &opened.config, 0)?;
        let trained = Trained { side: model.model.side, score: model.score };
        let trained = files::restore(folder, trained)?;
        (model.model.side, model.score) = (trained.side, trained.score);
        Ok(model)
    }
}
