//! What an adapter folder holds beside the adapters in slots.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use kiln_quant_core::{
    HostValues, Slots, Stack, TableUpdates, TokenRows, TokenTables, for_each_parameter, to_host,
};

use crate::{
    AdapterConfig, Result, Targets,
    json_fields::Problem,
    outline::{Outline, name_of},
    outside::{Outside, Stored, transposed, weight_of},
    store::{Layout, Named},
};

/// What an adapter folder holds beside the adapters in slots: of embedding, head and norms what was trained.
#[derive(Debug, Default)]
pub struct OutsideTensors {
    slots: Vec<(String, [usize; 2])>,
    stacks: Vec<Stack>,
    tables: Option<TokenTables>,
    updates: TableUpdates,
    whole: BTreeMap<String, Stored>,
    /// Whether a trained embedding stays the head, which PEFT's folders then hold once more.
    keeps_tied: bool,
    files: Vec<(String, Vec<u8>)>,
}

impl OutsideTensors {
    /// Those of a model to which adapters of `config` were attached as a whole. The host holds copies of what is trained
    /// whole.
    ///
    /// # Errors
    /// A device that can't be read.
    pub fn of<M: Slots>(model: &M, config: &AdapterConfig) -> Result<Self> {
        let outline = Outline::of(model);
        let updates = model.table_updates().cloned().unwrap_or_default();
        // Targets don't matter to what is whole.
        let none = Targets { adapted: Vec::new(), unmatched: Vec::new() };
        let (outside, _) = Outside::planned(config, &outline, &none)?;
        let mut wanted = outside.trained;
        if let Some(tables) = outline.tables.as_ref().filter(|_| config.save_tables) {
            let tied = tables.head.as_deref().filter(|_| tables.tied);
            wanted.extend(tables.paths().filter(|path| Some(*path) != tied).map(weight_of));
        }
        let mut whole = BTreeMap::new();
        for_each_parameter(model, |parameter| {
            let name = name_of(model, parameter.path);
            if !wanted.contains(&name) {
                return Ok(());
            }
            if let HostValues::Floats(values) = parameter.values()? {
                let mut stored = Stored { shape: parameter.shape.clone(), values };
                if model.is_stored_transposed(&name) {
                    stored = Stored {
                        values: transposed(&stored.values, stored.shape[0]),
                        shape: stored.shape.into_iter().rev().collect(),
                    };
                }
                whole.insert(name, stored);
            }
            Ok::<_, kiln_quant_core::Error>(())
        })?;
        if let Some(name) = wanted.iter().find(|name| !whole.contains_key(*name)) {
            let expected = "a dense table, which a folder can hold: attach with `save_tables`";
            return Err(Problem::new(name, expected, "a packed one").argument());
        }
        let Outline { slots, stacks, tables, .. } = outline;
        let keeps_tied = config.keep_tied && tables.as_ref().is_some_and(|tables| tables.tied);
        Ok(Self { slots, stacks, tables, updates, whole, keeps_tied, files: Vec::new() })
    }

    #[cfg(test)]
    pub(crate) fn stacked(slots: Vec<(String, [usize; 2])>, stacks: Vec<Stack>) -> Self {
        Self { slots, stacks, ..Self::default() }
    }

    /// With further files of these names, such as a tokenizer's, which are written together with the folder.
    #[must_use]
    pub fn with_files(mut self, files: Vec<(String, Vec<u8>)>) -> Self {
        self.files = files;
        self
    }

    /// The further files.
    pub(crate) fn files(&self) -> &[(String, Vec<u8>)] {
        &self.files
    }

    fn is_empty(&self) -> bool {
        self.updates.is_empty() && self.whole.is_empty()
    }

    /// Paths and shapes of the tables that have low-rank updates, and those as the configuration must describe them.
    pub(crate) fn updated(&self) -> Vec<(String, [usize; 2], usize, f64)> {
        let Some(tables) = &self.tables else { return Vec::new() };
        let updates = [&self.updates.embedding, &self.updates.head];
        let updates = tables.shapes().into_iter().zip(updates);
        updates
            .filter_map(|((path, shape), update)| {
                update.as_ref().map(|update| (path, shape, update.rank(), update.scaling()))
            })
            .collect()
    }

    /// An outline that has the tables, for a configuration to be checked against.
    pub(crate) fn outline(&self, slots: Vec<(String, [usize; 2])>) -> Outline {
        Outline { slots, tables: self.tables.clone(), ..Outline::default() }
    }

    /// All slots of the model, adapted or not; none where only the adapters are known.
    pub(crate) fn slots(&self) -> &[(String, [usize; 2])] {
        &self.slots
    }

    /// Parameters in which PEFT finds several slots.
    pub(crate) fn stacks(&self) -> &[Stack] {
        &self.stacks
    }

    /// A table that is among `targets` and has no update.
    pub(crate) fn without_update(&self, targets: &Targets) -> Option<&str> {
        let updates = [self.updates.embedding.is_some(), self.updates.head.is_some()];
        let mut tables = self.tables.iter().flat_map(TokenTables::paths).zip(updates);
        tables.find(|(path, updated)| !updated && targets.get(path).is_some()).map(|(path, _)| path)
    }

    /// Refuses a configuration that wants more than there is here, or less.
    pub(crate) fn check(&self, config: &AdapterConfig) -> Result<()> {
        let wants = !config.modules_to_save.is_empty() || !config.trainable_tokens.is_empty();
        let rows: &[u32] = self.updates.rows.as_ref().map_or(&[], TokenRows::ids);
        if wants && self.is_empty() {
            let expected = "none, or the tensors of the whole model with the adapters";
            return Err(
                Problem::new("modules_to_save", expected, "some, and no tensors of theirs").argument()
            );
        }
        if rows != config.trainable_tokens {
            let (expected, found) =
                (format!("{rows:?}, as trained"), format!("{:?}", config.trainable_tokens));
            return Err(Problem::new("trainable_tokens", expected, found).argument());
        }
        Ok(())
    }

    /// The tensors by their names in `layout`.
    pub(crate) fn tensors(&self, layout: Layout) -> Result<Vec<Named>> {
        let mut tensors = Vec::new();
        let tables = self.tables.as_ref();
        let host = |name: String, tensor: Tensor<2>| {
            let shape = tensor.dims().to_vec();
            let values = to_host(&name, tensor)?;
            Ok::<_, crate::Error>((name, shape, values))
        };
        for (name, stored) in &self.whole {
            let path = tables.and_then(|tables| tables.paths().find(|path| *name == weight_of(path)));
            let name = match (path, tables) {
                (Some(path), Some(tables)) => {
                    let is_embedding = path == tables.embedding;
                    if let Some(head) = tables
                        .head
                        .as_deref()
                        .filter(|_| is_embedding && self.keeps_tied && layout == Layout::Peft)
                    {
                        let name = layout.parameter(&weight_of(head));
                        tensors.push((name, stored.shape.clone(), stored.values.clone()));
                    }
                    let update = if is_embedding { &self.updates.embedding } else { &self.updates.head };
                    layout.table(path, update.is_some(), is_embedding && self.updates.rows.is_some())
                }
                _ => layout.parameter(name),
            };
            tensors.push((name, stored.shape.clone(), stored.values.clone()));
        }
        let Some(tables) = tables else { return Ok(tensors) };
        for (path, update) in tables.paths().zip([&self.updates.embedding, &self.updates.head]) {
            let Some(update) = update else { continue };
            let [a, b] = layout.factors(path, path == tables.embedding);
            tensors.push(host(a, update.lora_a.val().transpose())?);
            tensors.push(host(b, update.lora_b.val().transpose())?);
        }
        if let Some(rows) = &self.updates.rows {
            tensors.push(host(layout.rows(&tables.embedding), rows.token_rows.val())?);
            if let Some(head) = tables.head.as_deref().filter(|_| tables.tied) {
                tensors.push(host(layout.rows(head), rows.token_rows.val())?);
            }
        }
        Ok(tensors)
    }
}
