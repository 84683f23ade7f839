//! Several adapters on one model.

use std::path::Path;

use kiln_adapters::{Adapted, AdapterMix, AdapterSet, AdapterSetAttacher, AnyAdapter};
use kiln_quant_core::{QuantLinear, Slots};

use crate::{
    Result,
    tuned::{check_base, open},
};

/// What stands in the slots of a model with several adapters.
pub type AdapterSetLinear = Adapted<QuantLinear, AdapterSet<AnyAdapter>>;

/// Attaches the adapters of several folders to one model, by name. None works until the [`AdapterMix`] says so.
///
/// # Errors
/// As [`Tuned::load`](crate::Tuned::load); a name twice; adapters that changed their base, or that train embedding, head or norms.
///
/// # Example
/// ```no_run
/// # fn example(model: kiln::models::Decoder<kiln::quant::QuantLinear>) -> kiln::Result<()> {
/// let (model, mix) = kiln::load_adapter_set(model, &[("german", "adapters/german"), ("sql", "adapters/sql")])?;
/// mix.select("german")?;
/// mix.set(&[("german", 0.7), ("sql", 0.3)])?;
/// # Ok(()) }
/// ```
pub fn load_adapter_set<M: Slots<Slot = QuantLinear>, S: AsRef<str>, F: AsRef<Path>>(
    model: M,
    folders: &[(S, F)],
) -> Result<(M::With<AdapterSetLinear>, AdapterMix)> {
    let (mut attachers, mut own) = (Vec::new(), Vec::new());
    for (name, folder) in folders {
        let (attacher, folder) = open(folder.as_ref(), &model)?;
        attachers.push((name.as_ref().to_owned(), attacher));
        own.extend(folder);
    }
    let attacher = AdapterSetAttacher::new(attachers)?;
    let model = model.try_map(|path, base| attacher.attach(path, base))?;
    own.iter().try_for_each(|folder| check_base(folder, &model))?;
    Ok((model, attacher.mix().clone()))
}
