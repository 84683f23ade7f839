//! Adapter folders as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Factors are stored as `base_model.model.PATH.lora_A.weight` `[r, d_input]` and `.lora_B.weight` `[d_output, r]`,
//! DoRA's magnitudes as `.lora_magnitude_vector` `[d_output]`, where PATH is the module's name in the checkpoint.
//! QA-LoRA's A is `[r, d_input / group]`. Source: PEFT 0.21's files and code.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use kiln_quant_core::safetensors_file::SafetensorsFile;

use crate::{
    AdapterConfig, AdapterKind, AnyAdapter, Attacher, CONFIG_FILE, LoraAttacher, PeftConfig, Pooling,
    error::{Error, Result},
    json_fields::Problem,
    part::Part,
    store,
};

/// The name of the file of weights in an adapter folder.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// An adapter folder on disk, open.
///
/// ```no_run
/// # fn example(slot_shapes: Vec<(String, [usize; 2])>) -> Result<(), kiln_adapters::Error> {
/// use kiln_adapters::PeftFolder;
/// let folder = PeftFolder::open("my-adapter")?;
/// for key in &folder.config().unknown_keys {
///     println!("unknown key {key}");
/// }
/// let attacher = folder.attacher(&slot_shapes, 42)?;
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
        let config_path = folder.as_ref().join(CONFIG_FILE);
        let config = PeftConfig::read(&config_path)?;
        let weights = SafetensorsFile::open(folder.as_ref().join(WEIGHTS_FILE))?;
        Ok(Self { config, config_path, weights })
    }

    /// The configuration; its `unknown_keys` belong into a report.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// Reads the LoRA adapters for a model with the linears `slots`: their paths and `[d_input, d_output]`. `seed`
    /// decides the dropout of further training.
    ///
    /// Entries of the configuration that match no slot belong into a report: [`Attacher::targets`] lists them.
    ///
    /// # Errors
    /// A folder of another kind of adapter; a configuration that selects none of `slots`; a module that it selects and
    /// that lacks one of its tensors, or has one of another shape or type; values that aren't finite; a tensor that no
    /// selected module uses.
    pub fn attacher(&self, slots: &[(String, [usize; 2])], seed: u64) -> Result<LoraAttacher> {
        self.attacher_of(slots, seed)
    }

    /// As [`attacher`](Self::attacher), for adapters of the kind `A`: [`AnyAdapter`] takes what the folder holds.
    ///
    /// # Errors
    /// As [`attacher`](Self::attacher), and groups of inputs that don't divide a layer's.
    pub fn attacher_of<A: AdapterKind>(
        &self,
        slots: &[(String, [usize; 2])],
        seed: u64,
    ) -> Result<Attacher<A>> {
        let config = AdapterConfig::from(self.config.clone());
        let in_file = |error| match error {
            Error::Argument { name, expected, found } => {
                Problem::new(name, expected, found).in_file(&self.config_path)
            }
            other => other,
        };
        A::accept(&config).map_err(in_file)?;
        let targets = config.targets(slots).map_err(in_file)?;
        let parts = store::read(&self.weights, &config, &targets, slots, Part::peft_name, CONFIG_FILE)?;
        Ok(Attacher::stored(config, targets, parts, seed))
    }
}

/// Writes `adapters`, by the paths of their modules, and the `config` that they were made with as a PEFT folder, which
/// is created if missing.
///
/// Each file is written to a temporary sibling and renamed, so that none is ever half-written. Weights are written as
/// F32, which the host holds meanwhile.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::Device};
/// # use kiln_adapters::{Adapted, Lora, LoraAttacher, PeftConfig, TargetModules, save_peft};
/// # let config = PeftConfig::new(4, 8.0, TargetModules::Names(vec!["up_proj".into()]));
/// # let attacher = LoraAttacher::new(&config, &[("up_proj".to_owned(), [16, 32])], 42)?;
/// # let slot = attacher.attach("up_proj", LinearConfig::new(16, 32).init(&Device::flex()))?;
/// # let model = [("up_proj", slot)];
/// # let for_each_slot = |mut f: Box<dyn FnMut(&str, &Adapted<_, Lora>) + '_>| model.iter().for_each(|(p, s)| f(p, s));
/// # let folder = tempfile::tempdir().unwrap();
/// let mut adapters = Vec::new();
/// // For a model of kiln-models: `model.for_each_slot(|path, slot| ..)`. Clones share their tensors.
/// # for_each_slot(Box::new(
/// |path, slot| adapters.extend(slot.adapter.clone().map(|lora| (path.to_owned(), lora)))
/// # ));
/// # ;
/// save_peft(folder.path(), attacher.config(), adapters.iter().map(|(path, lora)| (path, lora)))?;
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
///
/// QA-LoRA adapters are converted to PEFT's pooling: B takes the difference.
///
/// # Errors
/// An adapter that `config` doesn't select, or of another kind, rank or scaling, because the folder could then not be
/// loaded again; two adapters of one path; values that aren't finite; the operating system's errors.
pub fn save_peft<'a, S: AsRef<str>, A: AdapterKind + 'a>(
    folder: &Path,
    config: &PeftConfig,
    adapters: impl IntoIterator<Item = (S, &'a A)>,
) -> Result<()> {
    let config_path = folder.join(CONFIG_FILE);
    config.supported(&config_path)?;
    let mut adapters = store::collect(adapters);
    for (_, adapter) in &mut adapters {
        if let AnyAdapter::Pooled(pooled) = adapter {
            *pooled = pooled.clone().with_pooling(Pooling::AverageTimesGroups);
        }
    }
    let stored = AdapterConfig::from(config.clone());
    A::accept(&stored)?;
    store::check_adapters(&stored, &adapters)?;
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // As PEFT marks its files.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    store::write(&folder.join(WEIGHTS_FILE), &adapters, Part::peft_name, &metadata)?;
    config.write(&config_path)
}
