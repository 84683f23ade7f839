//! Adapters of every kind on whole models: attached, loaded, saved.

use std::path::Path;

use kiln_adapters::{
    Adapted, Adapter, AdapterConfig, AdapterFolder, AdapterMix, AdapterSet, AdapterSetAttacher, AnyAdapter,
    AnyAttacher, KILN_CONFIG_FILE, PeftFolder, Result,
};
use kiln_models::{AnyModel, Slots};
use kiln_quant_core::{PackedWeight, QuantLinear, packed_file::fingerprint};

/// A model whose blocks' linears carry adapters, where the configuration says so.
pub type AdaptedModel = AnyModel<Adapted<QuantLinear, AnyAdapter>>;

/// A model whose blocks' linears carry several adapters each.
pub type AdapterSetModel = AnyModel<Adapted<QuantLinear, AdapterSet<AnyAdapter>>>;

/// Attaches new adapters to a loaded model: of the method that an [`AdapterConfig`] names, or as a
/// [`PeftConfig`](kiln_adapters::PeftConfig) says.
///
/// PiSSA and OLoRA replace the weights of the adapted linears by what the adapters' first values leave of them.
///
/// The attacher keeps the configuration (for [`save_adapters`] and [`save_peft`]) and the dropout's clock (for the
/// trainer).
///
/// # Errors
/// A configuration that asks for what isn't implemented, selects no module, or has sizes that don't divide a layer's.
pub fn attach_adapters<C: Clone + Into<AdapterConfig>>(
    model: AnyModel<QuantLinear>,
    config: &C,
    seed: u64,
) -> Result<(AdaptedModel, AnyAttacher)> {
    let attacher = AnyAttacher::new(config, &model.slot_shapes(), seed)?;
    Ok((attach(model, &attacher)?, attacher))
}

fn attach(model: AnyModel<QuantLinear>, attacher: &AnyAttacher) -> Result<AdaptedModel> {
    model.try_map(|path, base| attacher.attach_to_residual(path, base))
}

/// Attaches the adapters of a folder to a loaded model: Kiln's own if there is a [`KILN_CONFIG_FILE`], PEFT's otherwise.
///
/// # Errors
/// Files that are missing or malformed, or that don't fit the model; adapters of an own folder that were trained on
/// another packed base.
pub fn load_adapters(
    model: AnyModel<QuantLinear>,
    folder: impl AsRef<Path>,
    seed: u64,
) -> Result<(AdaptedModel, AnyAttacher)> {
    let (attacher, own) = open(folder.as_ref(), &model.slot_shapes(), seed)?;
    let model = attach(model, &attacher)?;
    if let Some(own) = own {
        check_base(&own, &model)?;
    }
    Ok((model, attacher))
}

type Slot = (String, [usize; 2]);

fn open(folder: &Path, slots: &[Slot], seed: u64) -> Result<(AnyAttacher, Option<AdapterFolder>)> {
    if folder.join(KILN_CONFIG_FILE).exists() {
        let own = AdapterFolder::open(folder)?;
        return Ok((own.attacher(slots, seed)?, Some(own)));
    }
    Ok((PeftFolder::open(folder)?.attacher_of(slots, seed)?, None))
}

fn check_base<A: Adapter>(folder: &AdapterFolder, model: &AnyModel<Adapted<QuantLinear, A>>) -> Result<()> {
    if folder.base_fingerprint().is_none() {
        return Ok(());
    }
    folder.check_base(base_fingerprint(model)?.as_deref())
}

/// The fingerprint of the packed weights under a model's adapters; `None` if all are dense. The host holds a copy of
/// the packed weights meanwhile.
///
/// # Errors
/// A device that can't be read.
pub fn base_fingerprint<A: Adapter>(model: &AnyModel<Adapted<QuantLinear, A>>) -> Result<Option<String>> {
    let mut weights: Vec<(String, kiln_quant_core::Result<PackedWeight>)> = Vec::new();
    model.for_each_slot(|path, slot| {
        if let QuantLinear::Packed(linear) = &slot.base {
            weights.push((path.to_owned(), linear.weight.to_host()));
        }
    });
    let weights = weights
        .into_iter()
        .map(|(path, weight)| Ok((path, weight?)))
        .collect::<Result<Vec<(String, PackedWeight)>>>()?;
    let named = weights.iter().map(|(path, weight)| (path.as_str(), weight));
    Ok((!weights.is_empty()).then(|| fingerprint(named)))
}

/// The adapters by path; clones share their tensors.
fn adapters(model: &AdaptedModel) -> Vec<(String, AnyAdapter)> {
    let mut adapters = Vec::new();
    model.for_each_slot(|path, slot| {
        adapters.extend(slot.adapter.clone().map(|adapter| (path.to_owned(), adapter)));
    });
    adapters
}

/// Writes adapters of any kind as an own folder, with the fingerprint of their base.
///
/// # Errors
/// As [`kiln_adapters::save_adapters`].
pub fn save_adapters(model: &AdaptedModel, config: &AdapterConfig, folder: impl AsRef<Path>) -> Result<()> {
    let (adapters, base) = (adapters(model), base_fingerprint(model)?);
    let adapters = adapters.iter().map(|(path, adapter)| (path, adapter));
    kiln_adapters::save_adapters(folder.as_ref(), config, base.as_deref(), adapters)
}

/// Writes adapters that PEFT can express (LoRA in all its kinds, QA-LoRA) as a folder that it opens.
///
/// # Errors
/// Another method, and as [`kiln_adapters::save_peft`].
pub fn save_peft(model: &AdaptedModel, config: &AdapterConfig, folder: impl AsRef<Path>) -> Result<()> {
    let (adapters, config) = (adapters(model), config.to_peft()?);
    let adapters = adapters.iter().map(|(path, adapter)| (path, adapter));
    kiln_adapters::save_peft(folder.as_ref(), &config, adapters)
}

/// Attaches the adapters of several folders to one loaded model, by name. None works until the [`AdapterMix`] says so.
///
/// # Errors
/// As [`load_adapters`]; a name twice; adapters that changed their base.
///
/// # Example
/// ```no_run
/// # fn example(model: kiln::models::AnyModel<kiln::quant::QuantLinear>) -> Result<(), kiln::adapters::Error> {
/// let (model, mix) = kiln::load_adapter_set(model, &[("german", "adapters/german"), ("sql", "adapters/sql")])?;
/// mix.select("german")?;
/// mix.set(&[("german", 0.7), ("sql", 0.3)])?;
/// # Ok(()) }
/// ```
pub fn load_adapter_set<S: AsRef<str>, F: AsRef<Path>>(
    model: AnyModel<QuantLinear>,
    folders: &[(S, F)],
) -> Result<(AdapterSetModel, AdapterMix)> {
    let (slots, mut attachers, mut own) = (model.slot_shapes(), Vec::new(), Vec::new());
    for (name, folder) in folders {
        // Dropout, which the seed is for, belongs to training.
        let (attacher, folder) = open(folder.as_ref(), &slots, 0)?;
        attachers.push((name.as_ref().to_owned(), attacher));
        own.extend(folder);
    }
    let attacher = AdapterSetAttacher::new(attachers)?;
    let model = model.try_map(|path, base| attacher.attach(path, base))?;
    own.iter().try_for_each(|folder| check_base(folder, &model))?;
    Ok((model, attacher.mix().clone()))
}
