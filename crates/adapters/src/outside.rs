//! What an adapter may train outside a model's slots: embedding and head, by low-rank updates, by rows of some tokens or
//! whole, and norms.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{ModuleMapper, Param},
    tensor::{Tensor, TensorData},
};
use kiln_quant_core::{
    Dropout, HostValues, LowRankUpdate, OwnTables, Slots, TableUpdates, TokenRows, TokenTables,
    for_each_parameter,
    random::{Purpose, generator, normal, path_hash},
    safetensors_file::SafetensorsFile,
    to_host,
};

use crate::{
    AdapterConfig, InitLoraWeights, Method, Result, Target, Targets,
    any::tensor,
    json_fields::Problem,
    lora,
    store::{self, Layout},
};

/// What of a model a configuration can speak of.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outline {
    /// Paths and `[d_input, d_output]` of the slots.
    pub slots: Vec<(String, [usize; 2])>,
    /// Embedding and head.
    pub tables: Option<TokenTables>,
    /// All other parameters of floating-point numbers, by name, with their sizes.
    parameters: Vec<(String, Vec<usize>)>,
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
        let mut elsewhere: BTreeSet<String> = slots.iter().map(|(path, _)| path.clone()).collect();
        elsewhere.extend(tables.iter().flat_map(|tables| [tables.embedding.clone(), tables.head.clone()]));
        let mut parameters = Vec::new();
        let listed: std::result::Result<(), std::convert::Infallible> =
            for_each_parameter(model, |parameter| {
                let name = name_of(model, parameter.path);
                let inside = |path: &String| {
                    name.strip_prefix(path.as_str()).is_some_and(|rest| rest.starts_with('.'))
                };
                if !elsewhere.iter().any(inside) {
                    let mut shape = parameter.shape;
                    if model.is_stored_transposed(&name) {
                        shape.reverse();
                    }
                    parameters.push((name, shape));
                }
                Ok(())
            });
        let Ok(()) = listed;
        Self { slots, tables, parameters }
    }
}

/// A parameter's name in checkpoints. Variants of enums, which begin with a capital letter, have no part in it.
fn name_of<M: Slots, S: AsRef<str>>(model: &M, path: &[S]) -> String {
    let fields = path.iter().map(AsRef::as_ref);
    let fields = fields.filter(|part| !part.starts_with(|first: char| first.is_ascii_uppercase()));
    model.checkpoint_name(&fields.collect::<Vec<_>>().join("."))
}

/// A tensor of a file: name, sizes, values.
type Named = (String, Vec<usize>, Vec<f32>);

/// The values of a parameter as files have them.
#[derive(Debug, Clone)]
struct Stored {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// What is to be done to a model outside its slots.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outside {
    /// Names of parameters that are trained whole.
    trained: BTreeSet<String>,
    own: OwnTables,
    vocab_size: usize,
    /// Updates of embedding and head.
    embedding: Option<Target>,
    head: Option<Target>,
    tokens: Vec<u32>,
    /// From a file: whole parameters, A and B by the table's path, rows of tokens.
    stored: BTreeMap<String, Stored>,
    factors: Option<BTreeMap<String, [Vec<f32>; 2]>>,
    rows: Option<Vec<f32>>,
}

impl Outside {
    /// For new adapters.
    ///
    /// # Errors
    /// Modules that a configuration wants trained whole and that aren't there, or are slots; tokens that the model doesn't
    /// have.
    pub(crate) fn new(config: &AdapterConfig, outline: &Outline, targets: &Targets) -> Result<Self> {
        let (mut outside, unmatched) = Self::planned(config, outline, targets)?;
        if let Some(module) = unmatched.first() {
            let found = format!("\"{module}\", which is the end of no such module's name");
            return Err(Problem::new("modules_to_save", "embedding, head or norms", found).argument());
        }
        if let Some(tables) = outline.tables.as_ref().filter(|_| config.save_tables) {
            let parts = outside.own.any() && !outside.own.tied;
            outside.own.embedding = true;
            outside.own.tied = tables.tied && !parts;
            outside.own.head = !outside.own.tied;
        }
        outside.check_tokens(outline)?;
        Ok(outside)
    }

    /// What a configuration asks for, and its modules that are none.
    fn planned(config: &AdapterConfig, outline: &Outline, targets: &Targets) -> Result<(Self, Vec<String>)> {
        let mut outside = Self { tokens: config.trainable_tokens.clone(), ..Self::default() };
        let mut unmatched = Vec::new();
        // As PEFT: the end of the whole name, wherever it begins.
        for wanted in &config.modules_to_save {
            if let Some((path, _)) = outline.slots.iter().find(|(path, _)| path.ends_with(wanted.as_str())) {
                let found = format!("\"{wanted}\", the end of {path}");
                let expected = "embedding, head or norms; linears of blocks get adapters";
                return Err(Problem::new("modules_to_save", expected, found).argument());
            }
            let mut found = false;
            if let Some(tables) = &outline.tables {
                for (path, own) in
                    [(&tables.embedding, &mut outside.own.embedding), (&tables.head, &mut outside.own.head)]
                {
                    if path.ends_with(wanted.as_str()) {
                        (*own, found) = (true, true);
                        outside.trained.insert(format!("{path}.weight"));
                    }
                }
            }
            for (name, _) in &outline.parameters {
                let module = name.rsplit_once('.').map_or("", |(module, _)| module);
                if module.ends_with(wanted.as_str()) {
                    found = true;
                    outside.trained.insert(name.clone());
                }
            }
            if !found {
                unmatched.push(wanted.clone());
            }
        }
        let Some(tables) = &outline.tables else {
            if !config.trainable_tokens.is_empty() {
                let expected =
                    "none: this is no model with an embedding, or its adapters are attached without it";
                return Err(Problem::new("trainable_tokens", expected, "some").argument());
            }
            return Ok((outside, unmatched));
        };
        outside.vocab_size = tables.vocab_size;
        outside.embedding = targets.get(&tables.embedding).cloned();
        outside.head = targets.get(&tables.head).cloned();
        if tables.tied && config.keep_tied && outside.own.embedding {
            outside.own.head = false;
            outside.own.tied = true;
            outside.trained.remove(&format!("{}.weight", tables.head));
        }
        let trained = |path: &String| outside.trained.contains(&format!("{path}.weight"));
        let twice = [
            (&tables.embedding, outside.embedding.is_some() || !outside.tokens.is_empty()),
            (&tables.head, outside.head.is_some()),
        ];
        if let Some((path, _)) = twice.into_iter().find(|(path, updated)| *updated && trained(path)) {
            let expected = "a table that is trained whole or updated, not both";
            return Err(Problem::new("modules_to_save", expected, path).argument());
        }
        Ok((outside, unmatched))
    }

    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        let updated = self.embedding.is_some() || self.head.is_some() || !self.tokens.is_empty();
        !updated && self.trained.is_empty() && self.stored.is_empty() && !self.own.any()
    }

    /// Whether a folder held embedding or head although they aren't trained.
    pub(crate) fn has_frozen_tables(&self) -> bool {
        self.stored.keys().any(|name| !self.trained.contains(name))
    }

    fn check_tokens(&self, outline: &Outline) -> Result<()> {
        let known = self.vocab_size;
        match self.tokens.iter().find(|id| **id as usize >= known) {
            Some(id) if outline.tables.is_some() => {
                let expected = format!("ids below {known}, the rows of the embedding");
                Err(Problem::new("trainable_tokens", expected, id).argument())
            }
            _ => Ok(()),
        }
    }

    /// What the file of an adapter folder holds of it, and the names of its tensors.
    ///
    /// # Errors
    /// As [`new`](Self::new), and tensors that are missing or of another shape or type.
    pub(crate) fn read(
        file: &SafetensorsFile,
        layout: Layout,
        config: &AdapterConfig,
        outline: &Outline,
        targets: &Targets,
    ) -> Result<(Self, BTreeSet<String>)> {
        let (mut outside, _) = Self::planned(config, outline, targets)?;
        let mut used = BTreeSet::new();
        let mut read = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
            used.insert(name.to_owned());
            store::read_tensor(file, name, shape)
        };
        if let Some(tables) = &outline.tables {
            let width = tables.width;
            // The tables first: they say how many tokens there are.
            let mut whole = Vec::new();
            for path in [&tables.embedding, &tables.head] {
                let weight = format!("{path}.weight");
                let names = layout.tables(path).map(|name| store::in_file(file, name));
                let Some(name) = names.into_iter().find(|name| file.contains(name)) else {
                    // A head that stays the embedding may have no tensor.
                    if outside.trained.contains(&weight) {
                        return Err(store::missing(file, &layout.parameter(&weight)));
                    }
                    continue;
                };
                let (_, shape) = file.describe(&name)?;
                let rows = shape.first().copied().unwrap_or(0);
                if rows < tables.vocab_size {
                    let expected = format!("[{}, {width}] or more rows", tables.vocab_size);
                    return Err(file.wrong(&name, expected, format!("{shape:?}")).into());
                }
                whole.push((path, weight, name, rows));
            }
            if let Some((.., rows)) = whole.first() {
                outside.vocab_size = *rows;
            }
            for (path, weight, name, _) in whole {
                let shape = vec![outside.vocab_size, width];
                let values = read(&name, &shape)?;
                let is_head = *path == tables.head;
                // Of a tied model PEFT may store the same table twice.
                let same = || {
                    let embedding = outside.stored.get(&format!("{}.weight", tables.embedding));
                    embedding.is_some_and(|embedding| embedding.values == values)
                };
                if is_head && tables.tied && !outside.trained.contains(&weight) && same() {
                    outside.own.tied = true;
                    continue;
                }
                *(if is_head { &mut outside.own.head } else { &mut outside.own.embedding }) = true;
                outside.stored.insert(weight, Stored { shape, values });
            }
            let [embedding, head] = [&tables.embedding, &tables.head].map(|path| format!("{path}.weight"));
            if tables.tied && !outside.trained.contains(&embedding) && !outside.stored.contains_key(&head) {
                outside.own.tied = outside.own.embedding;
            }
            let mut factors = BTreeMap::new();
            let shapes = [[outside.vocab_size, width], [width, outside.vocab_size]];
            let updates = [(&tables.embedding, &outside.embedding), (&tables.head, &outside.head)];
            for ((path, target), [d_input, d_output]) in updates.into_iter().zip(shapes) {
                let Some(Target { r, .. }) = target else { continue };
                let [a, b] = layout.factors(path, *path == tables.embedding);
                let a = read(&store::in_file(file, a), &[*r, d_input])?;
                let b = read(&store::in_file(file, b), &[d_output, *r])?;
                factors.insert(path.clone(), [transposed(&a, *r), transposed(&b, d_output)]);
            }
            outside.factors = Some(factors);
            outside.check_tokens(outline)?;
            if !outside.tokens.is_empty() {
                let shape = [outside.tokens.len(), width];
                outside.rows = Some(read(&store::in_file(file, layout.rows(&tables.embedding)), &shape)?);
                let of_head = store::in_file(file, layout.rows(&tables.head));
                if tables.tied && file.contains(&of_head) {
                    read(&of_head, &shape)?;
                }
            }
        }
        for (name, shape) in &outline.parameters {
            if outside.trained.contains(name) {
                let values = read(&store::in_file(file, layout.parameter(name)), shape)?;
                outside.stored.insert(name.clone(), Stored { shape: shape.clone(), values });
            }
        }
        Ok((outside, used))
    }

    /// `model`, which is frozen, with what is trained outside its slots.
    pub(crate) fn attach<M: Slots>(&self, model: M, config: &AdapterConfig) -> Result<M> {
        let grows = |tables: &TokenTables| self.vocab_size > tables.vocab_size;
        let model = match model.token_tables() {
            Some(tables) if self.own.any() || grows(&tables) => {
                model.with_own_tables(self.own, self.vocab_size)
            }
            _ => model,
        };
        let tables = model.token_tables();
        let names = |path: &[String]| name_of(&model, path);
        let mut found = BTreeMap::new();
        let listed: std::result::Result<(), std::convert::Infallible> =
            for_each_parameter(&model, |parameter| {
                let name = names(parameter.path);
                if self.trained.contains(&name) || self.stored.contains_key(&name) {
                    let transposed = model.is_stored_transposed(&name);
                    found.insert(parameter.path.to_vec(), (name, transposed));
                }
                Ok(())
            });
        let Ok(()) = listed;
        let mut put = Put { path: Vec::new(), found, outside: self };
        let model = model.map(&mut put);
        let Some(tables) = tables else { return Ok(model) };
        let updates = self.updates(&model, &tables, config)?;
        Ok(if updates.is_empty() { model } else { model.with_table_updates(updates) })
    }

    fn updates<M: Slots>(
        &self,
        model: &M,
        tables: &TokenTables,
        config: &AdapterConfig,
    ) -> Result<TableUpdates> {
        let device = model.devices().into_iter().next().unwrap_or_default();
        let [of_embedding, of_head] = tables.shapes();
        let update = |target: &Option<Target>, (path, [d_input, d_output]): &(String, [usize; 2])| {
            let Some(Target { r, scaling, .. }) = target else { return Ok(None) };
            let stored = self.factors.as_ref().and_then(|factors| factors.get(path)).cloned();
            let init = || self.initial(config, path, [*d_input, *d_output], *r, *path == tables.embedding);
            let Some([a, b]) = stored.or_else(init) else {
                let expected = "Kaiming, Random or Gaussian for new adapters on embedding and head";
                return Err(Problem::new("init", expected, config.method.init()).argument());
            };
            let [a, b] = [(a, [*d_input, *r]), (b, [*r, *d_output])]
                .map(|(values, shape)| tensor(values, shape, &device));
            let dropout = Dropout::new(config.dropout, path, config.seed);
            Ok(Some(LowRankUpdate::new(a, b, *scaling, dropout)))
        };
        let rows = match (&self.rows, self.tokens.as_slice()) {
            (_, []) => None,
            (Some(rows), tokens) => Some(tensor(rows.clone(), [tokens.len(), tables.width], &device)),
            (None, tokens) => Some(model.table_rows(tokens)),
        };
        Ok(TableUpdates {
            embedding: update(&self.embedding, &of_embedding)?,
            head: update(&self.head, &of_head)?,
            rows: rows.map(|rows| TokenRows::new(self.tokens.clone(), rows)),
        })
    }

    /// A and B before training, as PEFT draws them. Of an embedding A is zero, so that B need not be.
    fn initial(
        &self,
        config: &AdapterConfig,
        path: &str,
        shape: [usize; 2],
        r: usize,
        is_embedding: bool,
    ) -> Option<[Vec<f32>; 2]> {
        let Method::Lora { init } = config.method else { return None };
        if !is_embedding {
            return lora::initial_values(init, shape, r, config.seed, path);
        }
        let mut rng = generator(Purpose::Initialization, config.seed, path_hash(path), 0, 0);
        let a = match init {
            InitLoraWeights::Kaiming | InitLoraWeights::Gaussian => vec![0.0; shape[0] * r],
            InitLoraWeights::Random => normal(&mut rng, 1.0, shape[0] * r),
            _ => return None,
        };
        Some([a, normal(&mut rng, 1.0, r * shape[1])])
    }
}

/// `[columns, rows]` of `[rows, columns]`.
fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let columns = values.len() / rows.max(1);
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Gives parameters their stored values, and gradients.
struct Put<'a> {
    path: Vec<String>,
    /// Names by paths, and whether files hold the parameter transposed.
    found: BTreeMap<Vec<String>, (String, bool)>,
    outside: &'a Outside,
}

impl ModuleMapper for Put<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some((name, is_transposed)) = self.found.get(&self.path) else { return param };
        let param = match self.outside.stored.get(name) {
            Some(Stored { shape, values }) => {
                let (id, tensor, mapper) = param.consume();
                let device = tensor.device();
                let mut data = TensorData::new(values.clone(), shape.clone());
                if *is_transposed {
                    let reversed: Vec<usize> = shape.iter().rev().copied().collect();
                    data = TensorData::new(transposed(values, shape[0]), reversed);
                }
                Param::from_mapped_value(id, Tensor::<D>::from_data(data, &device), mapper)
            }
            None => param,
        };
        param.set_require_grad(self.outside.trained.contains(name))
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }
}

/// What an adapter folder holds beside the adapters in slots: of embedding, head and norms what was trained.
#[derive(Debug, Default)]
pub struct OutsideTensors {
    tables: Option<TokenTables>,
    updates: TableUpdates,
    whole: BTreeMap<String, Stored>,
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
            wanted.extend([&tables.embedding, &tables.head].map(|path| format!("{path}.weight")));
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
        Ok(Self { tables: outline.tables, updates, whole })
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
        Outline { slots, tables: self.tables.clone(), parameters: Vec::new() }
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
            let path = tables.and_then(|tables| {
                let paths = [&tables.embedding, &tables.head];
                paths.into_iter().find(|path| name.strip_prefix(path.as_str()) == Some(".weight"))
            });
            let name = match (path, tables) {
                (Some(path), Some(tables)) => {
                    let is_embedding = *path == tables.embedding;
                    let update = if is_embedding { &self.updates.embedding } else { &self.updates.head };
                    layout.table(path, update.is_some(), is_embedding && self.updates.rows.is_some())
                }
                _ => layout.parameter(name),
            };
            tensors.push((name, stored.shape.clone(), stored.values.clone()));
        }
        let Some(tables) = tables else { return Ok(tensors) };
        let updates = [(&tables.embedding, &self.updates.embedding), (&tables.head, &self.updates.head)];
        for (path, update) in updates {
            let Some(update) = update else { continue };
            let [a, b] = layout.factors(path, *path == tables.embedding);
            tensors.push(host(a, update.lora_a.val().transpose())?);
            tensors.push(host(b, update.lora_b.val().transpose())?);
        }
        if let Some(rows) = &self.updates.rows {
            tensors.push(host(layout.rows(&tables.embedding), rows.token_rows.val())?);
            if tables.tied {
                tensors.push(host(layout.rows(&tables.head), rows.token_rows.val())?);
            }
        }
        Ok(tensors)
    }
}
