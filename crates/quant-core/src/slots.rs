//! A module and the slots in it.

use burn::module::{Module, ModuleDisplay};

use crate::Projection;

/// A module whose linears can be visited and replaced by name: a language model, or any Burn module.
///
/// Paths of language models are the checkpoint's: `model.layers.3.self_attn.q_proj`.
pub trait Slots: Module + ModuleDisplay {
    /// What stands in the slots now.
    type Slot: Projection;
    /// The same module with another projection.
    type With<Q: Projection>: Slots<Slot = Q>;

    /// Replaces every projection, in the order in which data flows.
    ///
    /// # Errors
    /// The first error of `f`.
    fn try_map<Q: Projection, E>(
        self,
        f: impl FnMut(&str, Self::Slot) -> Result<Q, E>,
    ) -> Result<Self::With<Q>, E>;

    /// Every projection by its path, in the order in which data flows.
    fn slots(&self) -> Vec<(String, &Self::Slot)>;

    /// Visits every projection, in the order in which data flows.
    fn for_each_slot(&self, mut f: impl FnMut(&str, &Self::Slot)) {
        for (path, slot) in self.slots() {
            f(&path, slot);
        }
    }

    /// Paths and shapes `[d_input, d_output]` of all slots.
    fn slot_shapes(&self) -> Vec<(String, [usize; 2])> {
        self.slots().into_iter().map(|(path, slot)| (path, slot.shape())).collect()
    }
}
