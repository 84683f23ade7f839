//! What an adapter may train outside a model's slots: embedding and head, by low-rank updates, by rows of some tokens or
//! whole, and norms.

use std::collections::{BTreeMap, BTreeSet};

use burn::{
    module::{ModuleMapper, Param},
    tensor::{Tensor, TensorData},
};
use kiln_quant_core::{
    Dropout, LowRankUpdate, OwnTables, Slots, TableUpdates, TokenRows, TokenTables, for_each_parameter,
    random::{Purpose, generator, normal, path_hash},
    safetensors_file::SafetensorsFile,
};

use crate::{
    AdapterConfig, InitLoraWeights, Method, Result, Target, Targets,
    any::tensor,
    json_fields::Problem,
    lora,
    outline::{Outline, name_of},
    store::{self, Layout},
};

/// The values of a parameter as files have them.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// The module of a classifier's head.
const SCORE: &str = "score";

/// What is to be done to a model outside its slots.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outside {
    /// Names of parameters that are trained whole.
    pub trained: BTreeSet<String>,
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
        let score = weight_of(SCORE);
        if outline.parameters.iter().any(|(name, _)| *name == score) && !outside.trained.contains(&score) {
            let expected = "\"score\" among them, which is new: `with_score_head`";
            let found = format!("{:?}", config.modules_to_save);
            return Err(Problem::new("modules_to_save", expected, found).argument());
        }
        Ok(outside)
    }

    /// What a configuration asks for, and its modules that are none.
    pub(crate) fn planned(
        config: &AdapterConfig,
        outline: &Outline,
        targets: &Targets,
    ) -> Result<(Self, Vec<String>)> {
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
                let owned = [&mut outside.own.embedding, &mut outside.own.head];
                for (path, own) in tables.paths().zip(owned) {
                    if path.ends_with(wanted.as_str()) {
                        (*own, found) = (true, true);
                        outside.trained.insert(weight_of(path));
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
        let head = tables.head.as_deref();
        outside.vocab_size = tables.vocab_size;
        outside.embedding = targets.get(&tables.embedding).cloned();
        outside.head = head.and_then(|head| targets.get(head)).cloned();
        if tables.tied && config.keep_tied {
            if outside.embedding.is_some() {
                // PEFT would tie the head's update to it.
                let expected = "false for an embedding with LoRA";
                return Err(Problem::new("keep_tied", expected, true).argument());
            }
            if outside.own.embedding {
                (outside.own.head, outside.own.tied) = (false, true);
                head.map(|head| outside.trained.remove(&weight_of(head)));
            }
        }
        let updated = [outside.embedding.is_some() || !outside.tokens.is_empty(), outside.head.is_some()];
        let mut twice = tables.paths().zip(updated);
        if let Some((path, _)) =
            twice.find(|(path, updated)| *updated && outside.trained.contains(&weight_of(path)))
        {
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
            let (embedding, head) = (weight_of(&tables.embedding), tables.head.as_deref().map(weight_of));
            // The tables first: they say how many tokens there are.
            let mut whole = Vec::new();
            for path in tables.paths() {
                let names = layout.tables(path).map(|name| store::in_file(file, name));
                let Some(name) = names.into_iter().find(|name| file.contains(name)) else {
                    // A head that stays the embedding may have no tensor.
                    if outside.trained.contains(&weight_of(path)) {
                        return Err(store::missing(file, &layout.parameter(&weight_of(path))));
                    }
                    continue;
                };
                let (_, shape) = file.describe(&name)?;
                let rows = shape.first().copied().unwrap_or(0);
                if rows < tables.vocab_size {
                    let expected = format!("[{}, {width}] or more rows", tables.vocab_size);
                    return Err(file.wrong(&name, expected, format!("{shape:?}")).into());
                }
                whole.push((weight_of(path), name, rows));
            }
            if let Some((.., rows)) = whole.first() {
                outside.vocab_size = *rows;
            }
            let parts = |outside: &Self| outside.trained.contains(&embedding) && !config.keep_tied;
            for (weight, name, _) in whole {
                let shape = vec![outside.vocab_size, width];
                let values = read(&name, &shape)?;
                let is_head = head.as_ref() == Some(&weight);
                if is_head && tables.tied && !outside.trained.contains(&weight) && !parts(&outside) {
                    // Of a tied model PEFT stores the same table twice.
                    let first = outside.stored.get(&embedding);
                    if first.is_some_and(|embedding| embedding.values == values) {
                        outside.own.tied = true;
                        continue;
                    }
                    if outside.own.tied {
                        let expected = "the values of the embedding, which stays the head";
                        return Err(file.wrong(&name, expected, "others").into());
                    }
                }
                *(if is_head { &mut outside.own.head } else { &mut outside.own.embedding }) = true;
                outside.stored.insert(weight, Stored { shape, values });
            }
            let has_head = head.as_ref().is_some_and(|head| outside.stored.contains_key(head));
            if tables.tied && !outside.trained.contains(&embedding) && !has_head {
                outside.own.tied = outside.own.embedding;
            }
            let mut factors = BTreeMap::new();
            let shapes = [[outside.vocab_size, width], [width, outside.vocab_size]];
            let updates = [&mut outside.embedding, &mut outside.head];
            for ((path, target), [d_input, d_output]) in tables.paths().zip(updates).zip(shapes) {
                let Some(Target { r, .. }) = target else { continue };
                let r = *r;
                let names = layout.factors(path, path == tables.embedding);
                let [a, b] = names.map(|name| store::in_file(file, name));
                if layout == Layout::Kiln && !file.contains(&a) && !file.contains(&b) {
                    // A pattern may select more than adapters were made for.
                    *target = None;
                    continue;
                }
                let (a, b) = (read(&a, &[r, d_input])?, read(&b, &[d_output, r])?);
                factors.insert(path.to_owned(), [transposed(&a, r), transposed(&b, d_output)]);
            }
            outside.factors = Some(factors);
            outside.check_tokens(outline)?;
            if !outside.tokens.is_empty() {
                let shape = [outside.tokens.len(), width];
                outside.rows = Some(read(&store::in_file(file, layout.rows(&tables.embedding)), &shape)?);
                let of_head = tables.head.as_deref().map(|head| store::in_file(file, layout.rows(head)));
                if let Some(of_head) = of_head.filter(|name| tables.tied && file.contains(name)) {
                    read(&of_head, &shape)?;
                }
            }
        }
        for (name, shape) in &outline.parameters {
            if outside.trained.contains(name) {
                let head = outline.tables.as_ref().and_then(|tables| tables.head.as_ref());
                let is_bias = head.is_some_and(|head| name.strip_prefix(head.as_str()) == Some(".bias"));
                let shape = if is_bias { &vec![outside.vocab_size] } else { shape };
                let values = read(&store::in_file(file, layout.parameter(name)), shape)?;
                outside.stored.insert(name.clone(), Stored { shape: shape.clone(), values });
            }
        }
        Ok((outside, used))
    }

    /// `model`, which is frozen, with what is trained outside its slots.
    pub(crate) fn attach<M: Slots>(&self, model: M, config: &AdapterConfig) -> Result<M> {
        if !self.is_empty() && model.table_updates().is_some_and(|updates| !updates.is_empty()) {
            let expected = "a model whose embedding and head have no updates yet, or merged ones";
            return Err(Problem::new("model", expected, "updates beside them").argument());
        }
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
        let shapes = tables.shapes();
        let update = |target: &Option<Target>, place: usize| {
            let (Some(Target { r, scaling, .. }), Some((path, [d_input, d_output]))) =
                (target, shapes.get(place))
            else {
                return Ok(None);
            };
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
            embedding: update(&self.embedding, 0)?,
            head: update(&self.head, 1)?,
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

/// The weight of the module at `path`.
pub(crate) fn weight_of(path: &str) -> String {
    format!("{path}.weight")
}

/// `[columns, rows]` of `[rows, columns]`.
pub(crate) fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
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
