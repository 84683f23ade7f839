//! Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Factors are stored as `base_model.model.PATH.lora_A.weight` `[r, d_input]` and `.lora_B.weight` `[d_output, r]`,
//! DoRA's magnitudes as `.lora_magnitude_vector` `[d_output]`, where PATH is the module's name in the checkpoint.
//! QA-LoRA's A is `[r, d_input / group]`. Of an embedding they are `.lora_embedding_A` `[r, vocabulary]` and
//! `.lora_embedding_B` `[width, r]`; what is trained whole is `base_model.model.PATH.weight`, rows of some tokens are
//! `.token_adapter.trainable_tokens_delta`, experts' stand stacked (see `stacked.rs`), and a frozen table that goes along is `.base_layer.weight`.
//! Source: PEFT 0.21's files and code.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use kiln_quant_core::{Slots, files::whole_folder, safetensors_file::SafetensorsFile};

use crate::{
    AdapterConfig, AdapterKind, AnyAdapter, Attacher, CONFIG_FILE, OutsideTensors, PeftConfig, Pooling,
    error::Result,
    outline::Outline,
    peft_config::in_file,
    stacked::{self, Stacked, Translated},
    store::{self, Layout},
};

/// The name of the file of weights in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// An adapter folder on disk, open.
///
/// ```no_run
/// # fn example(slot_shapes: Vec<(String, [usize; 2])>) -> Result<(), kiln_adapters::Error> {
/// use kiln_adapters::{AnyAdapter, PeftFolder};
/// let folder = PeftFolder::open("my-adapter")?;
/// for key in &folder.config().unknown_keys {
///     println!("unknown key {key}");
/// }
/// let attacher = folder.attacher::<AnyAdapter>(&slot_shapes, 42)?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct PeftFolder {
    config: PeftConfig,
    config_path: PathBuf,
    weights: SafetensorsFile,
}

impl PeftFolder {
    /// Reads the configuration in `folder` and the weights' header.
    ///
    /// # Errors
    /// A file that is missing or isn't what its name says, and a configuration that asks for what isn't implemented.
    pub fn open(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = whole_folder(folder.as_ref());
        let config_path = folder.join(CONFIG_FILE);
        let config = PeftConfig::read(&config_path)?;
        let weights = SafetensorsFile::open(folder.join(WEIGHTS_FILE))?;
        Ok(Self { config, config_path, weights })
    }

    /// The configuration; its `unknown_keys` belong into a report.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// Reads the adapters for `model`, with what they train outside its slots: [`Attacher::attach_outside`] puts that into
    /// the model after [`Attacher::attach`] filled the slots. They are of the kind `A`: [`AnyAdapter`] takes what the folder
    /// holds. `seed` decides the dropout of further training.
    ///
    /// # Errors
    /// As [`attacher`](Self::attacher), and modules that are trained whole and aren't there.
    pub fn attacher_for<A: AdapterKind, M: Slots>(&self, model: &M, seed: u64) -> Result<Attacher<A>> {
        self.attacher_of(&Outline::of(model), seed)
    }

    /// Reads the adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. They are of the
    /// kind `A`: [`AnyAdapter`] takes what the folder holds. `seed` decides the dropout of further training.
    ///
    /// Entries of the configuration that match no slot belong into a report: [`Attacher::targets`] lists them.
    ///
    /// # Errors
    /// A folder of another kind of adapter; a configuration that selects none of `slots`; groups of inputs that don't
    /// divide a layer's; a module that it selects and that lacks one of its tensors, or has one of another shape or
    /// type; values that aren't finite; a tensor that no selected module uses.
    pub fn attacher<A: AdapterKind>(&self, slots: &[(String, [usize; 2])], seed: u64) -> Result<Attacher<A>> {
        self.attacher_of(&slots.into(), seed)
    }

    fn attacher_of<A: AdapterKind>(&self, outline: &Outline, seed: u64) -> Result<Attacher<A>> {
        let at = |error| in_file(error, &self.config_path);
        let translated = stacked::translated(&self.weights, &self.config, outline).map_err(at)?;
        let (config, unmatched, stacked) = match translated {
            Some(Translated { config, unmatched, stacked }) => (config, unmatched, stacked),
            None => (AdapterConfig::from_peft(&self.config).map_err(at)?, Vec::new(), Stacked::default()),
        };
        let config = config.with_seed(seed);
        A::accept(&config).map_err(at)?;
        let mut targets = config.select(outline).map_err(at)?;
        targets.unmatched.extend(unmatched);
        let (parts, outside) =
            store::read(&self.weights, &config, &targets, outline, stacked, Layout::Peft, CONFIG_FILE)
                .map_err(at)?;
        Ok(Attacher::stored(config, targets, parts, outside))
    }
}

/// Writes `adapters`, by the paths of their modules, and the `config` that they were made with as a PEFT folder, which
/// is created if missing.
///
/// The folder is written beside its place and renamed: an earlier adapter in it, of either kind, goes as a whole, other files
/// stay. Weights are written as F32, which the host holds meanwhile.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::Device};
/// # use kiln_adapters::{AdapterConfig, LoraAttacher, save_peft};
/// # let config = AdapterConfig::lora(4, 8.0).with_targets(["up_proj"]);
/// # let attacher = LoraAttacher::new(&config, &[("up_proj".to_owned(), [16, 32])])?;
/// # let slot = attacher.attach("up_proj", LinearConfig::new(16, 32).init(&Device::flex()))?;
/// # let slots = [("up_proj", slot)];
/// # let folder = tempfile::tempdir().unwrap();
/// // Of a model: `model.slots()`.
/// let adapters = slots.iter().filter_map(|(path, slot)| Some((path, slot.adapter.as_ref()?)));
/// save_peft(folder.path(), attacher.config(), adapters)?;
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
///
/// QA-LoRA adapters are converted to PEFT's pooling: B takes the difference.
///
/// # Errors
/// A method that PEFT doesn't know; an adapter that `config` doesn't select, or of another kind, rank or scaling, because
/// the folder could then not be loaded again; two adapters of one path; values that aren't finite; the operating system's
/// errors.
pub fn save_peft<'a, S: AsRef<str>, A: AdapterKind + 'a>(
    folder: impl AsRef<Path>,
    config: &AdapterConfig,
    adapters: impl IntoIterator<Item = (S, &'a A)>,
) -> Result<()> {
    save(folder.as_ref(), config, store::collect(adapters), &OutsideTensors::default())
}

/// As [`save_peft`], with what the adapters train outside a model's slots.
///
/// # Errors
/// As [`save_peft`].
pub fn save_peft_with<'a, S: AsRef<str>, A: AdapterKind + 'a>(
    folder: impl AsRef<Path>,
    config: &AdapterConfig,
    adapters: impl IntoIterator<Item = (S, &'a A)>,
    outside: &OutsideTensors,
) -> Result<()> {
    save(folder.as_ref(), config, store::collect(adapters), outside)
}

fn save(
    folder: &Path,
    config: &AdapterConfig,
    mut adapters: Vec<(String, AnyAdapter)>,
    outside: &OutsideTensors,
) -> Result<()> {
    let config_path = folder.join(CONFIG_FILE);
    let joined = stacked::joined(config, &adapters, outside)?;
    let peft = joined.as_ref().map_or_else(|| config.to_peft(), |joined| Ok(joined.config.clone()))?;
    peft.supported(&config_path)?;
    for (_, adapter) in &mut adapters {
        if let AnyAdapter::Pooled(pooled) = adapter {
            *pooled = pooled.clone().with_pooling(Pooling::AverageTimesGroups);
        }
    }
    let (described, further) = match joined {
        // As it was before it came into PEFT's terms.
        Some(joined) => (config.clone(), Some((joined.rest, joined.tensors))),
        None => (AdapterConfig::from_peft(&peft)?, None),
    };
    store::check_adapters(&described, &adapters, outside, Layout::Peft)?;
    let (adapters, further) = further.unwrap_or((adapters, Vec::new()));
    let new = store::new_folder(folder, outside)?;
    // As PEFT marks its files.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    store::write(&new.path().join(WEIGHTS_FILE), &adapters, further, outside, Layout::Peft, &metadata)?;
    peft.write(new.path().join(CONFIG_FILE))?;
    Ok(new.commit()?)
}
