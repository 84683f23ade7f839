//! Several adapters on one base, switched and weighted while the program runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLock},
};

use burn::{module::Module, tensor::Tensor};
use kiln_quant_core::{PackedTensor, Place, Projection};

use crate::{Adapted, Adapter, AdapterKind, AnyAdapter, Attacher, PackedMerge, Result, json_fields::Problem};

/// Which adapters of a model work, and how strongly: a handle that the sets in all slots share.
///
/// Clones are the same mix, those inside clones of the model too.
///
/// ```
/// use kiln_adapters::AdapterMix;
/// let mix = AdapterMix::new(["german", "sql"])?;
/// assert_eq!(mix.weights(), [("german".to_owned(), 0.0), ("sql".to_owned(), 0.0)]);
/// mix.select("sql")?;
/// mix.set(&[("german", 0.5), ("sql", 0.5)])?;
/// assert!(mix.select("french").is_err());
/// # Ok::<(), kiln_adapters::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct AdapterMix(Arc<RwLock<BTreeMap<String, f64>>>);

impl AdapterMix {
    /// A mix of the adapters `names`, none of which works yet.
    ///
    /// # Errors
    /// A name twice, or none at all.
    pub fn new<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Result<Self> {
        let mut weights = BTreeMap::new();
        for name in names {
            let name = name.into();
            if weights.insert(name.clone(), 0.0).is_some() {
                return Err(
                    Problem::new("adapters", "distinct names", format!("\"{name}\" twice")).argument()
                );
            }
        }
        if weights.is_empty() {
            return Err(Problem::new("adapters", "at least one", 0).argument());
        }
        Ok(Self(Arc::new(RwLock::new(weights))))
    }

    /// The adapter `name` works as it was trained, no other does.
    ///
    /// # Errors
    /// An unknown name.
    pub fn select(&self, name: &str) -> Result<()> {
        self.set(&[(name, 1.0)])
    }

    /// The base works alone.
    pub fn clear(&self) {
        let mut weights = self.0.write().unwrap_or_else(PoisonError::into_inner);
        weights.values_mut().for_each(|weight| *weight = 0.0);
    }

    /// Each adapter's change of the output counts by its weight; those not named don't count.
    ///
    /// # Errors
    /// An unknown name, a name twice, and a weight that isn't finite; the mix is then as it was before.
    pub fn set(&self, mix: &[(&str, f64)]) -> Result<()> {
        let mut weights = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed: BTreeMap<String, f64> = weights.keys().map(|name| (name.clone(), 0.0)).collect();
        for (i, (name, weight)) in mix.iter().enumerate() {
            let known = || weights.keys().cloned().collect::<Vec<_>>().join(", ");
            let Some(place) = changed.get_mut(*name) else {
                return Err(Problem::new("adapter", format!("one of {}", known()), name).argument());
            };
            if mix[..i].iter().any(|(other, _)| other == name) {
                return Err(Problem::new(*name, "one weight", "two").argument());
            }
            if !weight.is_finite() {
                return Err(Problem::new(*name, "a finite weight", weight).argument());
            }
            *place = *weight;
        }
        *weights = changed;
        Ok(())
    }

    /// Names and weights, sorted by name.
    pub fn weights(&self) -> Vec<(String, f64)> {
        let weights = self.0.read().unwrap_or_else(PoisonError::into_inner);
        weights.iter().map(|(name, weight)| (name.clone(), *weight)).collect()
    }

    fn weight(&self, name: &str) -> f64 {
        let weights = self.0.read().unwrap_or_else(PoisonError::into_inner);
        weights.get(name).copied().unwrap_or(0.0)
    }
}

/// The adapters of one slot: `y = b + Σ weight_i · (y_i - b)`, where b is the base's output and y_i that of the base
/// with adapter i alone. The weights are the shared [`AdapterMix`]'s.
///
/// For adapters that add to the output this is the weighted sum of their changes; DoRA's counts as a whole. One adapter
/// of weight 1 costs what it costs without a set; each of several costs three more passes over the output.
#[derive(Module, Debug)]
pub struct AdapterSet<A: Adapter> {
    /// The adapters, in the order of their names' addition.
    pub adapters: Vec<A>,
    #[module(skip)]
    names: Vec<String>,
    #[module(skip)]
    mix: AdapterMix,
}

impl<A: Adapter> AdapterSet<A> {
    /// The `adapters` of one slot under names that `mix` knows.
    ///
    /// # Errors
    /// A name that it doesn't know.
    pub fn new(adapters: Vec<(String, A)>, mix: &AdapterMix) -> Result<Self> {
        let known = mix.weights();
        for (name, _) in &adapters {
            if !known.iter().any(|(other, _)| other == name) {
                return Err(Problem::new("adapter", "a name of the mix", name).argument());
            }
        }
        let (names, adapters) = adapters.into_iter().unzip();
        Ok(Self { adapters, names, mix: mix.clone() })
    }

    /// The adapter `name`, if this slot has it.
    pub fn get(&self, name: &str) -> Option<&A> {
        let index = self.names.iter().position(|other| other == name)?;
        self.adapters.get(index)
    }

    /// The adapters that work, with their weights.
    fn active(&self) -> Vec<(&A, f64)> {
        let weights = self.names.iter().map(|name| self.mix.weight(name));
        self.adapters.iter().zip(weights).filter(|(_, weight)| *weight != 0.0).collect()
    }
}

impl<A: Adapter> Adapter for AdapterSet<A> {
    fn adapt<P: Projection>(&self, base: &P, x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
        match self.active().as_slice() {
            [] => y,
            [(adapter, weight)] if *weight == 1.0 => adapter.adapt(base, x, y),
            several => several.iter().fold(y.clone(), |sum, (adapter, weight)| {
                let change = adapter.adapt(base, x.clone(), y.clone()) - y.clone();
                sum + change.mul_scalar(*weight)
            }),
        }
    }

    fn forward_rows<P: Projection>(&self, base: &P, x: Tensor<2>) -> Tensor<2> {
        match self.active().as_slice() {
            [(adapter, weight)] if *weight == 1.0 => adapter.forward_rows(base, x),
            _ => {
                let y = base.forward(x.clone());
                self.adapt(base, x, y)
            }
        }
    }

    fn merged_weight<P: Projection>(&self, base: &P) -> Tensor<2> {
        let weight = base.weight();
        self.active().into_iter().fold(weight.clone(), |sum, (adapter, share)| {
            sum + (adapter.merged_weight(base) - weight.clone()).mul_scalar(share)
        })
    }

    fn at(&self, place: Place) {
        self.adapters.iter().for_each(|adapter| adapter.at(place));
    }
}

/// Exact where each working adapter is.
impl<A: AdapterKind> PackedMerge for AdapterSet<A> {
    fn merge_packed(self, base: PackedTensor) -> Result<PackedTensor> {
        self.active().into_iter().try_fold(base, |base, (adapter, weight)| match adapter.clone().into() {
            AnyAdapter::Pooled(pooled) => pooled.scaled(weight).merge_packed(base),
            other => other.merge_packed(base),
        })
    }
}

/// Gives each slot of one model its adapters of several sets.
///
/// ```no_run
/// # fn example(slots: Vec<(String, [usize; 2])>) -> Result<(), kiln_adapters::Error> {
/// use kiln_adapters::{AdapterSetAttacher, Lora, PeftFolder};
/// let open = |folder: &str| PeftFolder::open(folder)?.attacher::<Lora>(&slots, 0);
/// let attacher = AdapterSetAttacher::new(vec![
///     ("german".into(), open("german-adapter")?),
///     ("sql".into(), open("sql-adapter")?),
/// ])?;
/// // let model = model.try_map(|path, base| attacher.attach(path, base))?;
/// attacher.mix().select("german")?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct AdapterSetAttacher<A> {
    attachers: Vec<(String, Attacher<A>)>,
    mix: AdapterMix,
}

impl<A: AdapterKind> AdapterSetAttacher<A> {
    /// Joins the attachers of single adapters, by name.
    ///
    /// # Errors
    /// As [`AdapterMix::new`], and adapters that train something outside the slots: embedding, head or norms.
    pub fn new(attachers: Vec<(String, Attacher<A>)>) -> Result<Self> {
        if let Some((name, _)) = attachers.iter().find(|(_, attacher)| attacher.acts_outside()) {
            let expected = "adapters of linears in blocks only, in a set";
            return Err(Problem::new(name, expected, "one that trains embedding, head or norms").argument());
        }
        let mix = AdapterMix::new(attachers.iter().map(|(name, _)| name.clone()))?;
        Ok(Self { attachers, mix })
    }

    /// Which adapters work.
    pub fn mix(&self) -> &AdapterMix {
        &self.mix
    }

    /// Puts the adapters of the slot `path`, where it gets any, on `base`, which is frozen.
    ///
    /// # Errors
    /// As [`Attacher::attach`]; so adapters that change their base are refused.
    pub fn attach<P: Projection>(&self, path: &str, base: P) -> Result<Adapted<P, AdapterSet<A>>> {
        let (mut base, mut adapters) = (base, Vec::new());
        for (name, attacher) in &self.attachers {
            let adapted = attacher.attach(path, base)?;
            adapters.extend(adapted.adapter.map(|adapter| (name.clone(), adapter)));
            base = adapted.base;
        }
        let set = if adapters.is_empty() { None } else { Some(AdapterSet::new(adapters, &self.mix)?) };
        Ok(Adapted::new(base, set))
    }
}
