//! Experts and routers in PEFT's folders. With transformers 5 PEFT finds all experts of a block in one parameter and adapts
//! that ("target_parameters"): rank R of expert e are rows `e R ..` of A `[R experts, d_input]` and columns `ρ experts + e` of
//! B `[d_output, R experts]`. Of a module with several such parameters the last one's factors stand at the module's own path,
//! an earlier one's below `base_layer`. Gate and way in are one parameter, so that both share A: two adapters of rank r are
//! one of rank 2 r there, with B block by block.
//!
//! Source: PEFT 0.21 with transformers 5.24: their code, and the files that they write.

use std::collections::{BTreeMap, BTreeSet};

use kiln_quant_core::{Stack, safetensors_file::SafetensorsFile, to_host};

use crate::{
    AdapterConfig, AnyAdapter, Method, OutsideTensors, PeftConfig, Result, Target, TargetModules, Targets,
    Unmatched,
    json_fields::Problem,
    outline::Outline,
    part::{Part, Parts},
    store::{Named, in_file, read_tensor},
};

/// The key of PEFT's configuration.
const PARAMETERS: &str = "target_parameters";

/// Adapters that a file holds stacked.
#[derive(Default)]
pub(crate) struct Stacked {
    /// By slot.
    pub parts: BTreeMap<String, Parts>,
    /// The file's tensors that they came from.
    pub used: BTreeSet<String>,
}

/// A PEFT folder's configuration in terms of a model's slots, and what its file holds stacked.
pub(crate) struct Translated {
    pub config: AdapterConfig,
    /// Entries of the file that match nothing.
    pub unmatched: Vec<Unmatched>,
    pub stacked: Stacked,
}

/// Stacked factors as a file has them.
struct Factors<'a> {
    stack: &'a Stack,
    target: Target,
    d_input: usize,
    /// Of each slot of an expert.
    d_outputs: Vec<usize>,
    a: Vec<f32>,
    b: Vec<f32>,
}

impl Factors<'_> {
    /// The row of B that holds output `output` of an expert's slot `slot`.
    fn row(&self, slot: usize, output: usize) -> usize {
        row(self.stack, &self.d_outputs, slot, output)
    }

    fn b(&self, row: usize, rank: usize, expert: usize) -> f32 {
        let experts = self.stack.experts.len();
        self.b[row * self.target.r * experts + rank * experts + expert]
    }

    /// Whether each slot uses ranks of its own, as many as the others: two adapters, not one with a common A. Before training,
    /// when B is zero, ranks tell it: PEFT makes those of two adapters twice as large as the configuration's `r` (with patterns of
    /// other ranks nothing tells it, and they are taken for one).
    fn is_block_diagonal(&self, r: usize) -> bool {
        let slots = self.d_outputs.len();
        let own = self.target.r / slots;
        self.target.r.is_multiple_of(slots)
            && (self.target.r == slots * r || self.b.iter().any(|value| *value != 0.0))
            && (0..slots).all(|slot| {
                let others = || (0..self.target.r).filter(move |rank| rank / own != slot);
                (0..self.d_outputs[slot]).all(|output| {
                    let row = self.row(slot, output);
                    others().all(|rank| (0..self.stack.experts.len()).all(|e| self.b(row, rank, e) == 0.0))
                })
            })
    }

    /// A `[d_input, ranks]` and B `[ranks, d_output]` of one slot.
    fn of(&self, expert: usize, slot: usize, ranks: std::ops::Range<usize>) -> Parts {
        let first = expert * self.target.r;
        let a = (0..self.d_input)
            .flat_map(|input| ranks.clone().map(move |rank| self.a[(first + rank) * self.d_input + input]));
        let rows = || (0..self.d_outputs[slot]).map(|output| self.row(slot, output));
        let b = ranks.clone().flat_map(|rank| rows().map(move |row| self.b(row, rank, expert)));
        vec![(Part::A, a.collect()), (Part::B, b.collect())]
    }
}

fn row(stack: &Stack, d_outputs: &[usize], slot: usize, output: usize) -> usize {
    match stack.alternates {
        true => output * d_outputs.len() + slot,
        false => d_outputs[..slot].iter().sum::<usize>() + output,
    }
}

/// The paths of all slots in stacks.
fn stacked_slots(stacks: &[Stack]) -> BTreeSet<&str> {
    stacks.iter().flat_map(|stack| stack.experts.iter().flatten()).map(String::as_str).collect()
}

/// Paths in files, of each of `stacks`, which are all that are adapted.
fn keys<'a>(stacks: &[&'a Stack]) -> Vec<String> {
    let module = |stack: &&'a Stack| stack.parameter.rsplit_once('.').map_or("", |(module, _)| module);
    let later = |index: usize| {
        stacks[index + 1..].iter().filter(|stack| module(stack) == module(&stacks[index])).count()
    };
    (0..stacks.len())
        .map(|index| format!("{}{}", module(&stacks[index]), ".base_layer".repeat(later(index))))
        .collect()
}

/// What follows the block's number in a name.
fn within(name: &str) -> &str {
    let mut rest = name;
    while let Some((segment, after)) = rest.split_once('.') {
        if is_number(segment) {
            return after;
        }
        rest = after;
    }
    name
}

fn is_number(segment: &str) -> bool {
    !segment.is_empty() && segment.bytes().all(|byte| byte.is_ascii_digit())
}

/// Entries, ends of names, that select the `wanted` ones of `all` and no others.
fn entries(wanted: &BTreeSet<&str>, all: &[&str]) -> Vec<String> {
    let mut ends: BTreeMap<&str, bool> = BTreeMap::new();
    for name in all {
        let ends_of = name.match_indices('.').map(|(dot, _)| &name[dot + 1..]);
        for end in ends_of.chain([*name]) {
            *ends.entry(end).or_insert(true) &= wanted.contains(name);
        }
    }
    let mut entries: Vec<String> = Vec::new();
    let mut known = BTreeSet::new();
    for name in all.iter().filter(|name| wanted.contains(*name)) {
        let end = within(name);
        let entry = if ends.get(end) == Some(&true) { end } else { *name };
        if known.insert(entry) {
            entries.push(entry.to_owned());
        }
    }
    entries
}

/// Patterns of rank and alpha of `modules`, one for those that differ in numbers only where they agree.
fn patterns(modules: &[(&str, usize, f64)]) -> Vec<(String, usize, f64)> {
    let general = |path: &str| {
        let segments = path.split('.').map(|segment| match is_number(segment) {
            true => "[0-9]+".to_owned(),
            false => regex::escape(segment),
        });
        segments.collect::<Vec<_>>().join(r"\.")
    };
    let mut agreed: BTreeMap<String, Option<(usize, f64)>> = BTreeMap::new();
    for (path, r, alpha) in modules {
        let known = agreed.entry(general(path)).or_insert(Some((*r, *alpha)));
        *known = known.filter(|known| *known == (*r, *alpha));
    }
    let mut patterns = Vec::new();
    let mut done = BTreeSet::new();
    for (path, r, alpha) in modules {
        let general = general(path);
        match agreed[&general] {
            None => patterns.push((regex::escape(path), *r, *alpha)),
            Some(_) if done.insert(general.clone()) => patterns.push((general, *r, *alpha)),
            Some(_) => {}
        }
    }
    patterns
}

/// Whether adapters of experts or routers stand in `file` one by one, as older versions wrote them.
fn is_one_by_one(file: &SafetensorsFile, stacks: &[Stack]) -> bool {
    let mut slots = stacks.iter().flat_map(|stack| stack.experts.iter().flatten());
    slots.any(|slot| file.contains(&in_file(file, Part::A.peft_name(slot))))
}

/// Reads `config` and the stacked tensors of `file`, if there is anything stacked for the model with `outline`.
///
/// # Errors
/// Parameters that the model doesn't have stacked; tensors that aren't there or have another shape.
pub(crate) fn translated(
    file: &SafetensorsFile,
    config: &PeftConfig,
    outline: &Outline,
) -> Result<Option<Translated>> {
    let base = config.adapter();
    let in_stacks = stacked_slots(&outline.stacks);
    let mut unmatched = Vec::new();
    let mut modules: Vec<&str> = outline
        .slots
        .iter()
        .map(|(path, _)| path.as_str())
        .filter(|path| !in_stacks.contains(path))
        .collect();
    if base.targets != TargetModules::AllLinear {
        modules.extend(outline.tables.iter().flat_map(|tables| tables.paths()));
    }
    let none = TargetModules::Names(Vec::new());
    if config.target_parameters.is_empty() {
        let all: Vec<&str> = outline.slots.iter().map(|(path, _)| path.as_str()).collect();
        let selects = |path: &str| in_stacks.contains(path);
        let any = !in_stacks.is_empty()
            && Targets::resolve(&base, &all, None)
                .is_ok_and(|targets| targets.adapted.iter().any(|target| selects(&target.path)));
        if !any || is_one_by_one(file, &outline.stacks) {
            return Ok(None);
        }
    }
    let of_modules = match base.targets == none {
        true => Targets { adapted: Vec::new(), unmatched: Vec::new() },
        false => Targets::resolve(&base, &modules, None)?,
    };
    let weights: Vec<String> = outline.slots.iter().map(|(path, _)| format!("{path}.weight")).collect();
    let stacks = outline.stacks.iter().map(|stack| stack.parameter.as_str());
    let parameters: Vec<&str> = stacks.chain(weights.iter().map(String::as_str)).collect();
    let wanted = AdapterConfig {
        targets: TargetModules::Names(config.target_parameters.clone()),
        exclude: None,
        layers: None,
        layers_pattern: Vec::new(),
        ..base.clone()
    };
    let of_parameters = match config.target_parameters.is_empty() {
        true => Targets { adapted: Vec::new(), unmatched: Vec::new() },
        false => Targets::resolve(&wanted, &parameters, None).map_err(|_| {
            let expected = "parameters that hold experts or a router of the model";
            Problem::new(PARAMETERS, expected, format!("{:?}", config.target_parameters)).argument()
        })?,
    };

    let targeted: Vec<&Stack> =
        outline.stacks.iter().filter(|stack| of_parameters.get(&stack.parameter).is_some()).collect();
    let shapes: BTreeMap<&str, [usize; 2]> =
        outline.slots.iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
    let mut stacked = Stacked::default();
    let mut read = Vec::new();
    for (stack, key) in targeted.iter().zip(keys(&targeted)) {
        let Some(target) = of_parameters.get(&stack.parameter) else { continue };
        let sizes = stack.experts[0].iter().filter_map(|slot| shapes.get(slot.as_str()));
        let (d_inputs, d_outputs): (Vec<usize>, Vec<usize>) = sizes.map(|[i, o]| (*i, *o)).unzip();
        let (d_input, columns) = (d_inputs[0], target.r.saturating_mul(stack.experts.len()));
        let [a, b] = [Part::A, Part::B].map(|part| in_file(file, part.peft_name(&key)));
        read.push(Factors {
            stack,
            target: target.clone(),
            d_input,
            a: read_tensor(file, &a, &[columns, d_input])?,
            b: read_tensor(file, &b, &[d_outputs.iter().sum(), columns])?,
            d_outputs,
        });
        stacked.used.extend([a, b]);
    }
    let apart = read
        .iter()
        .filter(|factors| factors.d_outputs.len() > 1)
        .all(|factors| factors.is_block_diagonal(base.rank));
    let mut adapted: Vec<(&str, usize, f64)> = Vec::new();
    for factors in &read {
        let slots = factors.d_outputs.len();
        let share = if apart { slots } else { 1 };
        let r = factors.target.r / share;
        let alpha = factors.target.scaling * if base.rslora { (r as f64).sqrt() } else { r as f64 };
        for (expert, paths) in factors.stack.experts.iter().enumerate() {
            for (slot, path) in paths.iter().enumerate() {
                let first = if apart { slot * r } else { 0 };
                stacked.parts.insert(path.clone(), factors.of(expert, slot, first..first + r));
                adapted.push((path, r, alpha));
            }
        }
    }
    for target in &of_parameters.adapted {
        if let Some(path) = target.path.strip_suffix(".weight").filter(|path| shapes.contains_key(path))
            && !in_stacks.contains(path)
        {
            adapted.push((path, target.r, target.alpha));
        }
    }

    let chosen: BTreeSet<&str> = of_modules
        .adapted
        .iter()
        .map(|target| target.path.as_str())
        .chain(adapted.iter().map(|(path, ..)| *path))
        .collect();
    let tables = outline.tables.iter().flat_map(|tables| tables.paths());
    let all: Vec<&str> = outline.slots.iter().map(|(path, _)| path.as_str()).chain(tables).collect();
    let has_patterns = !base.rank_pattern.is_empty() || !base.alpha_pattern.is_empty();
    adapted.retain(|(_, r, alpha)| has_patterns || (*r, *alpha) != (base.rank, base.alpha));
    let own = patterns(&adapted);
    // Entries that matched parameters only have become slots' own.
    let is_of_modules = |key: &str, entry: &str| {
        let missing = |targets: &Targets| targets.unmatched.iter().any(|u| u.key == key && u.entry == entry);
        base.targets != none && !missing(&of_modules) || missing(&of_parameters)
    };
    let mut rank_pattern: Vec<_> = own.iter().map(|(pattern, r, _)| (pattern.clone(), *r)).collect();
    let of_base = base.rank_pattern.iter().filter(|(entry, _)| is_of_modules("rank_pattern", entry));
    rank_pattern.extend(of_base.cloned());
    let mut alpha_pattern: Vec<_> = own.iter().map(|(pattern, _, alpha)| (pattern.clone(), *alpha)).collect();
    let of_base = base.alpha_pattern.iter().filter(|(entry, _)| is_of_modules("alpha_pattern", entry));
    alpha_pattern.extend(of_base.cloned());
    let unused = |key: &str| key == "targets" || key == "exclude";
    unmatched.extend(of_modules.unmatched.into_iter().filter(|entry| unused(entry.key)));
    let of_parameters = of_parameters.unmatched.into_iter().filter(|entry| entry.key == "targets");
    unmatched.extend(of_parameters.map(|entry| Unmatched { key: PARAMETERS, ..entry }));
    let config = AdapterConfig {
        targets: TargetModules::Names(entries(&chosen, &all)),
        exclude: None,
        layers: None,
        layers_pattern: Vec::new(),
        rank_pattern,
        alpha_pattern,
        ..base
    };
    Ok(Some(Translated { config, unmatched, stacked }))
}

/// Adapters as PEFT's folders hold those of experts.
pub(crate) struct Joined {
    pub config: PeftConfig,
    /// The stacked tensors.
    pub tensors: Vec<Named>,
    /// The others.
    pub rest: Vec<(String, AnyAdapter)>,
}

/// Stacks the adapters of experts and routers among `adapters`, if there are some. An expert without one gets zeros, and
/// PEFT's rule that such adapters have no dropout is kept.
///
/// # Errors
/// Adapters of another kind than LoRA, or with an initialisation that changes the base; adapters of one stack that differ in
/// rank or scaling: Kiln's own folders hold them.
pub(crate) fn joined(
    config: &AdapterConfig,
    adapters: &[(String, AnyAdapter)],
    outside: &OutsideTensors,
) -> Result<Option<Joined>> {
    let in_stacks = stacked_slots(outside.stacks());
    let by_path: BTreeMap<&str, &AnyAdapter> =
        adapters.iter().map(|(path, adapter)| (path.as_str(), adapter)).collect();
    if !by_path.keys().any(|path| in_stacks.contains(path)) {
        return Ok(None);
    }
    if !matches!(config.method, Method::Lora { init } if !init.changes_base()) {
        let expected = "lora that leaves the base as it is, for experts and routers in PEFT's folders";
        return Err(Problem::new("method", expected, config.method.name()).argument());
    }
    let has_adapter =
        |stack: &&Stack| stack.experts.iter().flatten().any(|slot| by_path.contains_key(slot.as_str()));
    let targeted: Vec<&Stack> = outside.stacks().iter().filter(has_adapter).collect();
    let shapes: BTreeMap<&str, [usize; 2]> =
        outside.slots().iter().map(|(path, shape)| (path.as_str(), *shape)).collect();
    let (mut tensors, mut ranks) = (Vec::new(), Vec::new());
    for (stack, key) in targeted.iter().zip(keys(&targeted)) {
        let (target, [a, b]) = stacked(stack, &by_path, &shapes, config)?;
        for (part, (shape, values)) in [(Part::A, a), (Part::B, b)] {
            tensors.push((part.peft_name(&key), shape, values));
        }
        ranks.push(target);
    }
    let rest: Vec<_> =
        adapters.iter().filter(|(path, _)| !in_stacks.contains(path.as_str())).cloned().collect();
    let updated = outside.updated();
    let wanted: BTreeSet<&str> = rest
        .iter()
        .map(|(path, _)| path.as_str())
        .chain(updated.iter().map(|(path, ..)| path.as_str()))
        .collect();
    let slots = outside.slots().iter().map(|(path, _)| path.as_str());
    let modules: Vec<&str> = slots
        .filter(|path| !in_stacks.contains(path))
        .chain(updated.iter().map(|(path, ..)| path.as_str()))
        .collect();
    let parameters: Vec<&str> = outside.stacks().iter().map(|stack| stack.parameter.as_str()).collect();
    let adapted = targeted.iter().map(|stack| stack.parameter.as_str()).collect();
    let has_patterns = !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty();
    let own: Vec<_> = ranks
        .iter()
        .filter(|target| has_patterns || (target.r, target.alpha) != (config.rank, config.alpha))
        .map(|target| (target.path.as_str(), target.r, target.alpha))
        .collect();
    let own = patterns(&own);
    let mut peft = config.to_peft()?;
    peft.target_modules = TargetModules::Names(entries(&wanted, &modules));
    peft.target_parameters = entries(&adapted, &parameters);
    (peft.exclude_modules, peft.layers_to_transform, peft.layers_pattern) = (None, None, Vec::new());
    let of_ranks = own.iter().map(|(pattern, r, _)| (pattern.clone(), *r));
    peft.rank_pattern = of_ranks.chain(std::mem::take(&mut peft.rank_pattern)).collect();
    let of_alphas = own.iter().map(|(pattern, _, alpha)| (pattern.clone(), *alpha));
    peft.alpha_pattern = of_alphas.chain(std::mem::take(&mut peft.alpha_pattern)).collect();
    peft.lora_dropout = 0.0;
    Ok(Some(Joined { config: peft, tensors, rest }))
}

/// Shape and values of a tensor.
type Shaped = (Vec<usize>, Vec<f32>);

/// A and B of a stack, with the rank and alpha that PEFT has to know.
fn stacked(
    stack: &Stack,
    adapters: &BTreeMap<&str, &AnyAdapter>,
    shapes: &BTreeMap<&str, [usize; 2]>,
    config: &AdapterConfig,
) -> Result<(Target, [Shaped; 2])> {
    let experts = stack.experts.len();
    let places = || {
        let each = stack.experts.iter().enumerate();
        each.flat_map(|(expert, slots)| {
            slots.iter().enumerate().map(move |(slot, path)| (expert, slot, path))
        })
    };
    let adapted: Vec<_> =
        places().filter_map(|(e, slot, path)| Some((e, slot, path, *adapters.get(path.as_str())?))).collect();
    let description = adapted[0].3.describe();
    if let Some((.., path, other)) = adapted.iter().find(|(.., other)| other.describe() != description) {
        let expected = format!("{description}, as {} has, since PEFT holds both in one", adapted[0].2);
        return Err(Problem::new(*path, expected, other.describe()).argument());
    }
    let (one, scaling) = (description.geometry.rank.unwrap_or(0), description.scaling);
    let used: BTreeSet<usize> = adapted.iter().map(|(_, slot, ..)| *slot).collect();
    let r = one * used.len();
    let d_outputs: Vec<usize> =
        stack.experts[0].iter().filter_map(|path| Some(shapes.get(path.as_str())?[1])).collect();
    let (d_input, outputs) = (shapes[stack.experts[0][0].as_str()][0], d_outputs.iter().sum::<usize>());
    let columns = experts * r;
    let (mut a, mut b) = (vec![0.0; columns * d_input], vec![0.0; outputs * columns]);
    for (expert, slot, path, adapter) in adapted {
        let first = one * used.range(..slot).count();
        for (part, tensor) in adapter.parts() {
            let values = to_host(path, tensor)?;
            match part {
                Part::A => {
                    for (place, value) in values.into_iter().enumerate() {
                        let (input, rank) = (place / one, first + place % one);
                        a[(expert * r + rank) * d_input + input] = value;
                    }
                }
                _ => {
                    for (place, value) in values.into_iter().enumerate() {
                        let (rank, output) = (first + place / d_outputs[slot], place % d_outputs[slot]);
                        b[row(stack, &d_outputs, slot, output) * columns + rank * experts + expert] = value;
                    }
                }
            }
        }
    }
    let alpha = scaling * if config.rslora { (r as f64).sqrt() } else { r as f64 };
    let target = Target { path: stack.parameter.clone(), r, alpha, scaling };
    Ok((target, [(vec![columns, d_input], a), (vec![outputs, columns], b)]))
}

#[cfg(test)]
mod tests {
    use burn::{nn::LinearConfig, tensor::Device};

    use super::*;
    use crate::LoraAttacher;

    #[test]
    fn entries_select_what_is_wanted_and_nothing_else() {
        let all = ["a.0.q", "a.0.router.proj", "a.0.proj", "a.1.q", "a.1.router.proj", "a.1.proj", "head"];
        let found = |wanted: &[&str]| entries(&wanted.iter().copied().collect(), &all);
        assert_eq!(found(&["a.0.q", "a.1.q", "head"]), ["q", "head"]);
        assert_eq!(found(&["a.1.q"]), ["a.1.q"]);
        assert_eq!(found(&["a.0.router.proj", "a.1.router.proj"]), ["router.proj"]);
        // `proj` would select the routers' too.
        assert_eq!(found(&["a.0.proj", "a.1.proj"]), ["a.0.proj", "a.1.proj"]);
    }

    #[test]
    fn patterns_join_modules_that_agree() {
        let modules = [("a.0.e.0.up", 2, 4.0), ("a.0.e.1.up", 2, 4.0), ("a.0.q", 1, 1.0), ("a.1.q", 3, 1.0)];
        let expected = [(r"a\.[0-9]+\.e\.[0-9]+\.up", 2, 4.0), (r"a\.0\.q", 1, 1.0), (r"a\.1\.q", 3, 1.0)];
        assert_eq!(patterns(&modules), expected.map(|(pattern, r, alpha)| (pattern.to_owned(), r, alpha)));
    }

    #[test]
    fn adapters_of_one_stack_that_differ_are_refused_by_name() {
        let slots = [0, 1].map(|expert| (format!("m.0.experts.{expert}.down"), [6, 4]));
        let config = AdapterConfig::lora(2, 4.0).with_rank_of(r"1\.down", 3);
        let attacher = LoraAttacher::new(&config, &slots).unwrap();
        let adapters: Vec<(String, AnyAdapter)> = slots
            .iter()
            .map(|(path, [d_input, d_output])| {
                let linear = LinearConfig::new(*d_input, *d_output).init(&Device::flex());
                (path.clone(), attacher.attach(path, linear).unwrap().adapter.unwrap().into())
            })
            .collect();
        let experts = slots.iter().map(|(path, _)| vec![path.clone()]).collect();
        let stack = Stack { parameter: "m.0.experts.down_proj".into(), experts, alternates: false };
        let outside = OutsideTensors::stacked(slots.to_vec(), vec![stack]);
        let message = joined(&config, &adapters, &outside).err().unwrap().to_string();
        assert!(message.contains("m.0.experts.1.down") && message.contains("rank 3"), "{message}");
        // One expert alone: the other gets zeros.
        let alone = joined(&config, &adapters[..1], &outside).unwrap().unwrap();
        assert_eq!(alone.config.target_parameters, ["experts.down_proj"]);
        let [(_, a_shape, a), (_, b_shape, _)] = &alone.tensors[..] else {
            panic!("{} tensors", alone.tensors.len())
        };
        assert_eq!((&a_shape[..], &b_shape[..]), (&[4, 6][..], &[4, 4][..]));
        assert!(a[..12].iter().any(|value| *value != 0.0) && a[12..].iter().all(|value| *value == 0.0));
        // DoRA's lengths have no place there.
        let dora = config.with_method(Method::dora());
        assert!(joined(&dora, &adapters, &outside).err().unwrap().to_string().contains("dora"));
    }
}
