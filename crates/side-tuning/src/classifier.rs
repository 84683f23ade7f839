//! Classification: a score head on what the language model's head would see.

use std::path::Path;

use burn::{module::Module, nn::Linear};
use kiln_models::Classifier;
use kiln_quant_core::safetensors_file::SafetensorsFile;

use crate::{Backbone, Error, Result, SideConfig, SideTuned, files, init::Init};

/// A side-tuned model that says classes or a number: a linear without bias on the mixed state of each row's last token. It
/// is trained as any [`CausalLm`](kiln_models::CausalLm), and made, saved and loaded by [`side_classifier`],
/// [`save_classifier`] and [`load_classifier`].
pub type SideClassifier<M> = Classifier<SideTuned<M>>;

/// What a folder holds of a classifier.
#[derive(Module, Debug)]
struct Trained {
    side: crate::SideNetwork,
    score: Linear,
}

/// A new side network on `backbone` with a score head of `labels` outputs; with 1 it is a regression.
///
/// # Errors
/// As [`SideTuned::new`]; no label.
pub fn side_classifier<M: Backbone>(
    backbone: M,
    labels: usize,
    config: &SideConfig,
    seed: u64,
) -> Result<SideClassifier<M>> {
    if labels == 0 {
        return Err(Error::argument("labels", "at least 1", labels));
    }
    let init = Init { seed, device: backbone.device() };
    let sizes = backbone.model_config();
    let width = sizes.embedding_width.unwrap_or(sizes.hidden_size);
    let model = SideTuned::new(backbone, config, seed)?;
    Ok(Classifier { model, score: init.linear("score", [width, labels], false) })
}

/// As [`SideTuned::save`], with the score head.
///
/// # Errors
/// As [`SideTuned::save`].
pub fn save_classifier<M: Backbone>(model: &SideClassifier<M>, folder: impl AsRef<Path>) -> Result<()> {
    let Classifier { model: side_tuned, score } = model;
    let trained = Trained { side: side_tuned.side.clone(), score: score.clone() };
    let labels = Some(model.outputs());
    files::save(folder.as_ref(), side_tuned.backbone(), side_tuned.config(), labels, &trained)
}

/// As [`SideTuned::load`], with the score head.
///
/// # Errors
/// As [`SideTuned::load`]; a language model's folder.
pub fn load_classifier<M: Backbone>(backbone: M, folder: impl AsRef<Path>) -> Result<SideClassifier<M>> {
    let folder = folder.as_ref();
    let opened = files::open(folder, &backbone)?;
    let path = folder.join(files::CONFIG_FILE);
    let labels = opened.labels.ok_or_else(|| Error::file(&path, "labels", "a number of labels", "none"))?;
    // As many as the file can back: the score head is made before its tensor is compared.
    let stored = SafetensorsFile::open(folder.join(files::WEIGHTS_FILE))?;
    let found = stored.describe("score.weight")?.1.first().copied();
    if found != Some(labels) {
        return Err(Error::file(&path, "labels", format!("{found:?}, as score.weight has"), labels));
    }
    let mut model = side_classifier(backbone, labels, &opened.config, 0)?;
    let trained = Trained { side: model.model.side, score: model.score };
    let trained = files::restore(folder, trained)?;
    (model.model.side, model.score) = (trained.side, trained.score);
    Ok(model)
}
