//! A model with its adapters and what they are: attached, loaded, saved, merged.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    path::Path,
};

use burn::tensor::Tensor;
use kiln_adapters::{
    Adapted, Adapter, AdapterConfig, AdapterFolder, AnyAdapter, AnyAttacher, KILN_CONFIG_FILE,
    OutsideTensors, PeftFolder, RequantizeError, save_adapters_with, save_peft_with,
};
use kiln_models::Decoder;
use kiln_quant_core::{
    HostQuantizer, PackedWeight, Plan, Projection, QuantLinear, Scheme, Slots, files::whole_folder,
    packed_file::fingerprint,
};

use crate::{Error, Result};

/// Names and contents of files.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

/// What stands in the slots of a model with adapters.
pub type AdaptedLinear = Adapted<QuantLinear, AnyAdapter>;

/// A language model whose blocks' linears carry adapters, where the configuration says so.
pub type AdaptedModel = Decoder<AdaptedLinear>;

/// The model of slots `QuantLinear` that is left when the adapters of `M` were merged: `M` again.
pub type Merged<M> = <<M as Slots>::With<AdaptedLinear> as Slots>::With<QuantLinear>;

/// A model quantized again, and what that lost of each linear, by path.
pub type Requantized<M> = (Merged<M>, Vec<(String, RequantizeError)>);

/// A model with adapters in its slots, and the configuration that they were made with.
///
/// `M` is the model before that: one of [`kiln::models`](kiln_models), or any Burn module with [`Slots`] (see
/// [`slots!`](kiln_quant_core::slots)). What stands outside the adapters is frozen, but for what the configuration wants
/// trained of embedding, head and norms (`modules_to_save`, `trainable_tokens`, and targets that name embedding or head);
/// what is unfrozen afterwards is trained, too, but has to be saved elsewhere. Merging puts low-rank updates of embedding
/// and head into dense tables.
///
/// ```
/// use kiln::{adapters::AdapterConfig, burn::tensor::Device, Tuned};
/// # use kiln::models::{Checkpoint, LoadOptions};
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/models/tiny-llama");
/// # let load = || Checkpoint::open(folder)?.load(&LoadOptions::uniform("affine4:64".parse()?), &Device::flex());
/// let (model, _) = load()?;
/// let tuned = Tuned::attach(model, &AdapterConfig::lora(8, 16.0).with_targets(["q_proj", "v_proj"]))?;
/// // ... training ...
/// # let folder = tempfile::tempdir().unwrap();
/// # let folder = folder.path().join("my-adapter");
/// tuned.save_peft(&folder)?;
/// let (model, _) = load()?;
/// let tuned = Tuned::load(model, &folder)?;
/// let merged = tuned.merge_dense();
/// # Ok::<(), kiln::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Tuned<M: Slots<Slot = QuantLinear>> {
    model: M::With<AdaptedLinear>,
    config: AdapterConfig,
}

impl<M: Slots<Slot = QuantLinear>> Tuned<M> {
    /// Attaches new adapters.
    ///
    /// PiSSA and OLoRA replace the weights of the adapted linears by what the adapters' first values leave of them.
    ///
    /// # Errors
    /// A configuration that asks for what isn't implemented, selects no module, or has sizes that don't divide a layer's.
    pub fn attach(model: M, config: &AdapterConfig) -> Result<Self> {
        let attacher = AnyAttacher::for_model(config, &model)?;
        Self::attached(model, &attacher)
    }

    fn attached(model: M, attacher: &AnyAttacher) -> Result<Self> {
        let model = model.freeze().try_map(|path, base| attacher.attach_to_residual(path, base))?;
        Ok(Self { model: attacher.attach_outside(model)?, config: attacher.config().clone() })
    }

    /// Attaches the adapters of a folder: Kiln's own if there is a [`KILN_CONFIG_FILE`], PEFT's otherwise.
    ///
    /// Dropout of further training has seed 0.
    ///
    /// # Errors
    /// Files that are missing or malformed, or that don't fit the model; adapters of an own folder that were trained on
    /// another packed base.
    pub fn load(model: M, folder: impl AsRef<Path>) -> Result<Self> {
        let (attacher, own) = open(folder.as_ref(), &model)?;
        let tuned = Self::attached(model, &attacher)?;
        if let Some(own) = own {
            check_base(&own, &tuned.model)?;
        }
        Ok(tuned)
    }

    /// A model and the configuration of its adapters, as [`into_parts`](Self::into_parts) gives them.
    pub fn from_parts(model: M::With<AdaptedLinear>, config: AdapterConfig) -> Self {
        Self { model, config }
    }

    /// The model and the configuration of its adapters.
    pub fn into_parts(self) -> (M::With<AdaptedLinear>, AdapterConfig) {
        (self.model, self.config)
    }

    /// The same adapters after `f` trained them.
    ///
    /// # Errors
    /// `f`'s.
    pub fn try_map_model<E>(
        self,
        f: impl FnOnce(M::With<AdaptedLinear>) -> Result<M::With<AdaptedLinear>, E>,
    ) -> Result<Self, E> {
        Ok(Self { model: f(self.model)?, config: self.config })
    }

    /// As [`try_map_model`](Self::try_map_model), for what can't fail.
    #[must_use]
    pub fn map_model(self, f: impl FnOnce(M::With<AdaptedLinear>) -> M::With<AdaptedLinear>) -> Self {
        Self { model: f(self.model), config: self.config }
    }

    /// The model.
    pub fn model(&self) -> &M::With<AdaptedLinear> {
        &self.model
    }

    /// The model, without the configuration of its adapters.
    pub fn into_model(self) -> M::With<AdaptedLinear> {
        self.model
    }

    /// The configuration of the adapters.
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The adapters by path; clones share their tensors.
    pub fn adapters(&self) -> Vec<(String, AnyAdapter)> {
        let slots = self.model.slots().into_iter();
        slots.filter_map(|(path, slot)| Some((path, slot.adapter.clone()?))).collect()
    }

    /// The fingerprint of the packed weights under the adapters; `None` if all are dense. The host holds a copy of the
    /// packed weights meanwhile.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn base_fingerprint(&self) -> Result<Option<String>> {
        base_fingerprint(&self.model)
    }

    /// What must be the same when training goes on, for
    /// [`Trainer::with_identity`](kiln_training::Trainer::with_identity): the adapters' configuration and their seed, the
    /// base's schemes, and what operands of products are rounded to.
    pub fn identity(&self) -> BTreeMap<String, String> {
        let AdapterConfig { method, rank, alpha, rslora, dropout, seed, .. } = &self.config;
        let patterns = format!("{:?} {:?}", self.config.rank_pattern, self.config.alpha_pattern);
        let mut identity = BTreeMap::from([
            ("adapters.method".to_owned(), format!("{method:?}")),
            ("adapters.rank".to_owned(), rank.to_string()),
            ("adapters.alpha".to_owned(), alpha.to_string()),
            ("adapters.rslora".to_owned(), rslora.to_string()),
            ("adapters.patterns".to_owned(), patterns),
            ("adapters.dropout".to_owned(), dropout.to_string()),
            ("adapters.modules_to_save".to_owned(), self.config.modules_to_save.join(", ")),
            ("adapters.trainable_tokens".to_owned(), format!("{:?}", self.config.trainable_tokens)),
            ("adapters.keep_tied".to_owned(), self.config.keep_tied.to_string()),
            ("adapters.seed".to_owned(), seed.to_string()),
        ]);
        identity.extend(linears_identity(self.model.slots().into_iter().map(|(_, slot)| &slot.base)));
        identity
    }

    /// Writes the adapters, of any kind, as Kiln's own folder, with the fingerprint of their base.
    ///
    /// # Errors
    /// As [`save_adapters`](kiln_adapters::save_adapters).
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_with(folder.as_ref(), Vec::new())
    }

    /// As [`save`](Self::save), with further files.
    pub(crate) fn save_with(&self, folder: &Path, files: Files) -> Result<()> {
        let (adapters, base) = (self.adapters(), self.base_fingerprint()?);
        let adapters = adapters.iter().map(|(path, adapter)| (path, adapter));
        let outside = OutsideTensors::of(&self.model, &self.config)?.with_files(files);
        Ok(save_adapters_with(folder, &self.config, base.as_deref(), adapters, &outside)?)
    }

    /// Writes adapters that PEFT can express (LoRA in all its kinds, DoRA, QA-LoRA) as a folder that it opens.
    ///
    /// # Errors
    /// Another method, and as [`save_peft`](kiln_adapters::save_peft).
    pub fn save_peft(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.save_peft_with(folder.as_ref(), Vec::new())
    }

    /// As [`save_peft`](Self::save_peft), with further files.
    pub(crate) fn save_peft_with(&self, folder: &Path, files: Files) -> Result<()> {
        let adapters = self.adapters();
        let adapters = adapters.iter().map(|(path, adapter)| (path, adapter));
        let outside = OutsideTensors::of(&self.model, &self.config)?.with_files(files);
        Ok(save_peft_with(folder, &self.config, adapters, &outside)?)
    }

    /// The model without adapters, which are in the packed weights' offsets: codes and scales as they were, outputs the
    /// same to rounding ([`PackedMerge`](kiln_adapters::PackedMerge)). Dense linears take their adapters into the dense
    /// weight.
    ///
    /// Only adapters that pool can do this (Q-BaRA, QA-LoRA, QA-HiRA, QA-BLoRA); LoRA and DoRA merge by
    /// [`merge_dense`](Self::merge_dense) or, with loss, [`requantize`](Self::requantize).
    ///
    /// # Errors
    /// The first linear that can't take its adapter exactly, by path, with the sizes that would fit.
    pub fn merge_packed(self) -> Result<Merged<M>> {
        Ok(self.model.try_map(|path, slot| slot.merge_packed(path))?.with_merged_tables())
    }

    /// The model without adapters; every linear that had one is dense. Rounds once, in the type of the base's dense
    /// weight.
    pub fn merge_dense(self) -> Merged<M> {
        let merged = self.model.try_map(|_, slot| {
            Ok::<_, Infallible>(match slot.adapter {
                Some(_) => QuantLinear::Dense(slot.merge_dense()),
                None => slot.into_base(),
            })
        });
        match merged {
            Ok(model) => model.with_merged_tables(),
            Err(never) => match never {},
        }
    }

    /// The model without adapters, its adapted linears quantized again, and what that lost of each. **Lossy**: light
    /// fine-tuning may drown in the rounding. Linears that `schemes` wants dense stay dense.
    ///
    /// # Errors
    /// As [`HostQuantizer::quantize`].
    pub fn requantize(self, schemes: &Plan<Scheme>, quantizer: &dyn HostQuantizer) -> Result<Requantized<M>> {
        self.requantize_with(schemes, quantizer, &mut |_| None)
    }

    /// As [`requantize`](Self::requantize), with the loss of outputs measured where `inputs` gives typical inputs
    /// `[rows, d_input]` of a linear.
    ///
    /// # Errors
    /// As [`requantize`](Self::requantize).
    pub fn requantize_with(
        self,
        schemes: &Plan<Scheme>,
        quantizer: &dyn HostQuantizer,
        inputs: &mut dyn FnMut(&str) -> Option<Tensor<2>>,
    ) -> Result<Requantized<M>> {
        let mut errors = Vec::new();
        let dense = self.model.dense_slots();
        let wanted = |path: &str| if dense.contains(path) { Scheme::Dense } else { *schemes.get(path) };
        let model = self.model.try_map(|path, slot| match wanted(path) {
            Scheme::Dense if slot.adapter.is_some() => Ok(QuantLinear::Dense(slot.merge_dense())),
            Scheme::Dense => Ok(slot.into_base()),
            Scheme::Packed(scheme) => {
                let (layer, error) = slot.requantize(path, &scheme, quantizer, inputs(path))?;
                errors.extend(error.map(|error| (path.to_owned(), error)));
                Ok::<_, Error>(layer)
            }
        })?;
        Ok((model.with_merged_tables(), errors))
    }
}

/// Schemes of a model's linears, and what operands of their products are rounded to.
pub(crate) fn linears_identity<'a>(linears: impl Iterator<Item = &'a QuantLinear>) -> [(String, String); 2] {
    let (mut schemes, mut computes) = (BTreeMap::new(), BTreeSet::new());
    for linear in linears {
        *schemes.entry(linear.scheme().to_string()).or_insert(0) += 1;
        computes.insert(linear.compute().to_string());
    }
    let schemes = schemes.into_iter().map(|(scheme, count)| format!("{count} of {scheme}"));
    [
        ("base.linears".to_owned(), schemes.collect::<Vec<_>>().join(", ")),
        ("compute".to_owned(), computes.into_iter().collect::<Vec<_>>().join(", ")),
    ]
}

/// The adapters of a folder; of an own one the folder too, which knows its base.
pub(crate) fn open<M: Slots>(folder: &Path, model: &M) -> Result<(AnyAttacher, Option<AdapterFolder>)> {
    if whole_folder(folder).join(KILN_CONFIG_FILE).exists() {
        let own = AdapterFolder::open(folder)?;
        return Ok((own.attacher_for(model, 0)?, Some(own)));
    }
    Ok((PeftFolder::open(folder)?.attacher_for(model, 0)?, None))
}

/// Refuses a model that isn't the one that the folder's adapters were trained on.
pub(crate) fn check_base<A, M>(folder: &AdapterFolder, model: &M) -> Result<()>
where
    A: Adapter,
    M: Slots<Slot = Adapted<QuantLinear, A>>,
{
    if folder.base_fingerprint().is_none() {
        return Ok(());
    }
    Ok(folder.check_base(base_fingerprint(model)?.as_deref())?)
}

fn base_fingerprint<A, M>(model: &M) -> Result<Option<String>>
where
    A: Adapter,
    M: Slots<Slot = Adapted<QuantLinear, A>>,
{
    let packed = model.slots().into_iter().filter_map(|(path, slot)| match &slot.base {
        QuantLinear::Packed(linear) => Some((path, linear.weight.to_host())),
        QuantLinear::Dense(_) => None,
    });
    let weights = packed
        .map(|(path, weight)| Ok((path, weight?)))
        .collect::<kiln_quant_core::Result<Vec<(String, PackedWeight)>>>()?;
    let named = weights.iter().map(|(path, weight)| (path.as_str(), weight));
    Ok((!weights.is_empty()).then(|| fingerprint(named)))
}
