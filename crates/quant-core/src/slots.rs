//! A module and the slots in it.

use std::collections::BTreeSet;

use burn::{
    module::{Module, ModuleDisplay},
    tensor::Tensor,
};

use crate::{Projection, TableUpdates, TokenTables};

/// A module whose linears can be visited and replaced by name: a language model, or any Burn module.
///
/// Paths of language models are the checkpoint's: `model.layers.3.self_attn.q_proj`. Own modules get it by
/// [`slots!`](macro@crate::slots).
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no slots that can be quantized or adapted",
    label = "not a module with slots",
    note = "make the module generic over `P: Projection` and write `slots!(Name {{ slot field, keep other }})`",
    note = "`QuantLinear` in the slots is what adapters are attached to; merged models have it again"
)]
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

    /// Paths and shapes `[d_input, d_output]` of all slots.
    fn slot_shapes(&self) -> Vec<(String, [usize; 2])> {
        self.slots().into_iter().map(|(path, slot)| (path, slot.shape())).collect()
    }

    /// Whether the slot `path` is one that no scheme is for: a router, whose scores decide which way tokens go. It can be
    /// adapted, but stays dense whatever becomes of the others.
    fn stays_dense(&self, _path: &str) -> bool {
        false
    }

    /// Paths of the slots that stay dense.
    fn dense_slots(&self) -> BTreeSet<String> {
        self.slots().into_iter().map(|(path, _)| path).filter(|path| self.stays_dense(path)).collect()
    }

    /// Parameters in which other programs hold several slots each, or one that is no linear there; of one module in the order
    /// in which it lists them.
    fn stacks(&self) -> Vec<Stack> {
        Vec::new()
    }

    /// The token embedding and the head, of a model that has them.
    fn token_tables(&self) -> Option<TokenTables> {
        None
    }

    /// What is trained beside embedding and head.
    fn table_updates(&self) -> Option<&TableUpdates> {
        None
    }

    /// With `updates` beside embedding and head, in place of those that are there.
    ///
    /// # Panics
    /// If there is an update, and no table for it or one of another shape.
    #[must_use]
    fn with_table_updates(self, updates: TableUpdates) -> Self {
        assert!(updates.is_empty(), "updates of tables of a module that has none");
        self
    }

    /// With embedding or head as dense frozen parameters of their own, for `vocab_size` tokens: a packed one is dequantized,
    /// and two that are the same part, unless they are to stay tied. New rows are the mean of the others.
    ///
    /// # Panics
    /// If there are no tables, or more rows than `vocab_size`.
    #[must_use]
    fn with_own_tables(self, own: OwnTables, _vocab_size: usize) -> Self {
        assert!(!own.any(), "tables of a module that has none");
        self
    }

    /// Rows of the embedding, `[ids, width]`, in f32.
    ///
    /// # Panics
    /// If there is no embedding, or an id is not in it.
    fn table_rows(&self, _ids: &[u32]) -> Tensor<2> {
        panic!("rows of the embedding of a module that has none")
    }

    /// The name in checkpoints of the parameter whose path in the module tree is `path`.
    fn checkpoint_name(&self, path: &str) -> String {
        path.to_owned()
    }

    /// Whether checkpoints have the parameter `name` as `[d_output, d_input]` and the module as `[d_input, d_output]`: dense
    /// linears outside the slots.
    fn is_stored_transposed(&self, _name: &str) -> bool {
        false
    }

    /// With embedding and head as their updates make them, and no updates; where there is one, that table is dense.
    #[must_use]
    fn with_merged_tables(self) -> Self {
        self
    }
}

/// A parameter in which other programs hold several slots, or one that is no linear there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// Its name there: `model.layers.0.mlp.experts.gate_up_proj`, `model.layers.0.mlp.gate.weight`.
    pub parameter: String,
    /// For each expert the slots whose outputs make up its own, one after another; of a router one with one.
    pub experts: Vec<Vec<String>>,
    /// Whether those outputs alternate in place of following each other.
    pub alternates: bool,
}

/// Which tables become parameters of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OwnTables {
    /// The embedding.
    pub embedding: bool,
    /// The head, apart from the embedding.
    pub head: bool,
    /// The embedding alone, which stays the head where it is.
    pub tied: bool,
}

impl OwnTables {
    /// Whether there is one.
    pub fn any(self) -> bool {
        self.embedding || self.head
    }
}

/// Implements [`Slots`](trait@crate::Slots) for a struct that is generic over the projection in its slots and over nothing
/// else. Every field is named, in the order in which data flows, with what it is:
///
/// | word | field |
/// | --- | --- |
/// | `slot` | a projection |
/// | `slots` | a `Vec` of projections |
/// | `module` | a module with slots of its own |
/// | `modules` | a `Vec` of such modules |
/// | `keep` | anything else; it stays as it is |
///
/// Paths are the fields' names joined by dots, with the index of an element: `blocks.2.up`.
///
/// ```
/// use burn::{module::Module, nn::{LayerNorm, Linear}};
/// use kiln_quant_core::{Projection, Slots, slots};
///
/// #[derive(Module, Debug)]
/// struct Classifier<P: Projection> {
///     layers: Vec<P>,
///     norm: LayerNorm,
///     output: P,
/// }
///
/// slots!(Classifier { slots layers, keep norm, slot output });
///
/// fn paths(model: &Classifier<Linear>) -> Vec<String> {
///     model.slots().into_iter().map(|(path, _)| path).collect()
/// }
/// # use burn::{nn::{LayerNormConfig, LinearConfig}, tensor::Device};
/// # let (device, linear) = (Device::flex(), LinearConfig::new(4, 4));
/// # let layers = vec![linear.init(&device), linear.init(&device)];
/// # let model = Classifier { layers, norm: LayerNormConfig::new(4).init(&device), output: linear.init(&device) };
/// assert_eq!(paths(&model), ["layers.0", "layers.1", "output"]);
/// ```
#[macro_export]
macro_rules! slots {
    (@map slot $self:ident $f:ident $field:ident) => {
        $f(stringify!($field), $self.$field)?
    };
    (@map slots $self:ident $f:ident $field:ident) => {{
        let slots = $self.$field.into_iter().enumerate();
        let mapped = slots.map(|(index, slot)| $f(&format!("{}.{index}", stringify!($field)), slot));
        mapped.collect::<::std::result::Result<::std::vec::Vec<_>, _>>()?
    }};
    (@map module $self:ident $f:ident $field:ident) => {
        $crate::Slots::try_map($self.$field, |path: &str, slot| {
            $f(&format!("{}.{path}", stringify!($field)), slot)
        })?
    };
    (@map modules $self:ident $f:ident $field:ident) => {{
        let mut mapped = ::std::vec::Vec::new();
        for (index, module) in $self.$field.into_iter().enumerate() {
            mapped.push($crate::Slots::try_map(module, |path: &str, slot| {
                $f(&format!("{}.{index}.{path}", stringify!($field)), slot)
            })?);
        }
        mapped
    }};
    (@map keep $self:ident $f:ident $field:ident) => {
        $self.$field
    };
    (@list slot $self:ident $found:ident $field:ident) => {
        $found.push((stringify!($field).to_owned(), &$self.$field))
    };
    (@list slots $self:ident $found:ident $field:ident) => {
        for (index, slot) in $self.$field.iter().enumerate() {
            $found.push((format!("{}.{index}", stringify!($field)), slot));
        }
    };
    (@list module $self:ident $found:ident $field:ident) => {
        for (path, slot) in $crate::Slots::slots(&$self.$field) {
            $found.push((format!("{}.{path}", stringify!($field)), slot));
        }
    };
    (@list modules $self:ident $found:ident $field:ident) => {
        for (index, module) in $self.$field.iter().enumerate() {
            for (path, slot) in $crate::Slots::slots(module) {
                $found.push((format!("{}.{index}.{path}", stringify!($field)), slot));
            }
        }
    };
    (@list keep $self:ident $found:ident $field:ident) => {};
    ($module:ident { $($kind:ident $field:ident),+ $(,)? }) => {
        impl<P: $crate::Projection> $crate::Slots for $module<P> {
            type Slot = P;
            type With<Q: $crate::Projection> = $module<Q>;

            fn try_map<Q: $crate::Projection, E>(
                self,
                mut f: impl FnMut(&str, P) -> ::std::result::Result<Q, E>,
            ) -> ::std::result::Result<$module<Q>, E> {
                ::std::result::Result::Ok($module { $($field: $crate::slots!(@map $kind self f $field)),+ })
            }

            fn slots(&self) -> ::std::vec::Vec<(::std::string::String, &P)> {
                let mut found = ::std::vec::Vec::new();
                $($crate::slots!(@list $kind self found $field);)+
                found
            }
        }
    };
}
