//! What of a model a configuration can speak of, by name.

use std::{collections::BTreeSet, convert::Infallible};

use kiln_quant_core::{Slots, Stack, TokenTables, for_each_parameter, is_variant};

/// What of a model a configuration can speak of.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outline {
    /// Paths and `[d_input, d_output]` of the slots.
    pub slots: Vec<(String, [usize; 2])>,
    /// Those of them that no scheme is for.
    pub dense: BTreeSet<String>,
    /// Parameters in which PEFT finds several slots.
    pub stacks: Vec<Stack>,
    /// Embedding and head.
    pub tables: Option<TokenTables>,
    /// All other parameters of floating-point numbers, by name, with their sizes.
    pub parameters: Vec<(String, Vec<usize>)>,
}

/// Slots alone.
impl From<&[(String, [usize; 2])]> for Outline {
    fn from(slots: &[(String, [usize; 2])]) -> Self {
        Self { slots: slots.to_vec(), ..Self::default() }
    }
}

impl Outline {
    pub(crate) fn of<M: Slots>(model: &M) -> Self {
        let (slots, tables) = (model.slot_shapes(), model.token_tables());
        let mut elsewhere: BTreeSet<&str> = slots.iter().map(|(path, _)| path.as_str()).collect();
        elsewhere.extend(tables.iter().flat_map(|tables| tables.paths()));
        // A head's bias is a parameter like others.
        let bias = tables.as_ref().and_then(|tables| Some(format!("{}.bias", tables.head.as_ref()?)));
        let mut parameters = Vec::new();
        let listed: Result<(), Infallible> = for_each_parameter(model, |parameter| {
            let name = name_of(model, parameter.path);
            let mut modules = name.match_indices('.').map(|(dot, _)| &name[..dot]);
            if !modules.any(|module| elsewhere.contains(module)) || bias.as_ref() == Some(&name) {
                let mut shape = parameter.shape;
                if model.is_stored_transposed(&name) {
                    shape.reverse();
                }
                parameters.push((name, shape));
            }
            Ok(())
        });
        let Ok(()) = listed;
        Self { dense: model.dense_slots(), stacks: model.stacks(), slots, tables, parameters }
    }
}

/// A parameter's name in checkpoints. Variants of enums, which begin with a capital letter, have no part in it.
pub(crate) fn name_of<M: Slots, S: AsRef<str>>(model: &M, path: &[S]) -> String {
    let fields = path.iter().map(AsRef::as_ref);
    let fields = fields.filter(|part| !is_variant(part));
    model.checkpoint_name(&fields.collect::<Vec<_>>().join("."))
}
