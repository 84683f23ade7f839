//! Which modules of a model get an adapter, and with which rank, alpha and scaling.
//!
//! Source: PEFT 0.21, whose answers `testdata/peft/target_cases.json` holds. Regular expressions are those of the crate
//! `regex`: Python's without look-around and back references, which are refused.

use regex::{Regex, RegexBuilder};

use crate::error::Result;
use crate::json_fields::Problem;
use crate::{AdapterConfig, TargetModules};

/// The largest compiled regular expression, in bytes; bounds time and memory for patterns from files.
const MAX_REGEX_BYTES: usize = 256 << 10;

/// The largest number of entries of one `rank_pattern` or `alpha_pattern`, for the same reason.
const MAX_PATTERNS: usize = 1 << 16;

/// A module that gets an adapter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Target {
    /// Its name in the checkpoint, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Rank.
    pub r: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Factor of the adapter's output: alpha / r, or alpha / √r with rank-stabilised scaling.
    pub scaling: f64,
}

/// An entry of the configuration that no module of the model answers to.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unmatched {
    /// `targets`, `exclude`, `rank_pattern` or `alpha_pattern`.
    pub key: &'static str,
    /// The name or regular expression.
    pub entry: String,
}

/// The modules of one model that an [`AdapterConfig`] selects.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Targets {
    /// The selected modules, in the model's order; never empty.
    pub adapted: Vec<Target>,
    /// Entries without effect. PEFT ignores them, and a published adapter may list names of other architectures; in
    /// options of one's own they are mistakes: see [`require_all`](Self::require_all).
    pub unmatched: Vec<Unmatched>,
}

impl Targets {
    /// Selects among `linears`, the names of the model's linear layers. `output_head` is the one among them that
    /// `all-linear` leaves out.
    ///
    /// A listed name selects the module of that name and those that end in `.name`; a string must match a whole name as
    /// a regular expression. `exclude`, read in the same way, wins. `layers` drops modules whose
    /// first number in the name (or, with `layers_pattern`, the first number after a match of it) isn't listed, except
    /// modules that `targets` lists by their whole name. The first entry of `rank_pattern` and of
    /// `alpha_pattern` that matches the name, or its part after any dot, replaces `r` and `lora_alpha`.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the key, for a configuration that fails
    /// [`AdapterConfig::validate`], a regular expression that can't be expressed, and a selection without modules.
    pub fn resolve<S: AsRef<str>>(
        config: &AdapterConfig,
        linears: &[S],
        output_head: Option<&str>,
    ) -> Result<Self> {
        config.validate()?;
        let mut linears: Vec<&str> = linears.iter().map(AsRef::as_ref).collect();
        if config.targets == TargetModules::AllLinear {
            linears.retain(|name| Some(*name) != output_head);
        }
        let target = Selector::new("targets", &config.targets)?;
        let exclude = config.exclude.as_ref();
        let exclude = exclude.map(|modules| Selector::new("exclude", modules)).transpose()?;
        let layers = Layers::new(config)?;
        let adapted: Vec<&str> = linears
            .iter()
            .filter(|name| !exclude.as_ref().is_some_and(|exclude| exclude.matches(name)))
            .filter(|name| target.is_whole_name(name) || (target.matches(name) && layers.contains(name)))
            .copied()
            .collect();
        if adapted.is_empty() {
            let expected = format!("a selection of at least one of the model's {} linears", linears.len());
            let found = format!("{:?}, which selects none", config.targets);
            return Err(Problem::new("targets", expected, found).argument());
        }

        let mut unmatched = target.unmatched(&linears);
        unmatched.extend(exclude.map(|exclude| exclude.unmatched(&linears)).unwrap_or_default());
        let r = first_matches("rank_pattern", &config.rank_pattern, &adapted, &mut unmatched)?;
        let alpha = first_matches("alpha_pattern", &config.alpha_pattern, &adapted, &mut unmatched)?;
        let adapted = adapted.iter().zip(r.into_iter().zip(alpha)).map(|(path, (r, alpha))| {
            let (r, alpha) = (r.unwrap_or(config.rank), alpha.unwrap_or(config.alpha));
            let divisor = if config.rslora { (r as f64).sqrt() } else { r as f64 };
            Target { path: (*path).into(), r, alpha, scaling: alpha / divisor }
        });
        Ok(Self { adapted: adapted.collect(), unmatched })
    }

    /// The adapter of the module `path`, if it gets one.
    pub fn get(&self, path: &str) -> Option<&Target> {
        self.adapted.iter().find(|target| target.path == path)
    }

    /// Refuses entries without effect.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the first entry that matches no module.
    pub fn require_all(self) -> Result<Self> {
        match self.unmatched.first() {
            None => Ok(self),
            Some(Unmatched { key, entry }) => {
                let found = format!("\"{entry}\", which matches no module of the model");
                Err(Problem::new(*key, "names and patterns of the model's linears", found).argument())
            }
        }
    }
}

/// `targets` or `exclude`, ready to match.
struct Selector<'a> {
    key: &'static str,
    modules: &'a TargetModules,
    pattern: Option<Regex>,
}

impl<'a> Selector<'a> {
    fn new(key: &'static str, modules: &'a TargetModules) -> Result<Self> {
        let pattern = match modules {
            TargetModules::Pattern(pattern) => Some(regex(key, pattern, &format!(r"\A(?:{pattern})\z"))?),
            TargetModules::Names(_) | TargetModules::AllLinear => None,
        };
        Ok(Self { key, modules, pattern })
    }

    fn is_whole_name(&self, name: &str) -> bool {
        matches!(self.modules, TargetModules::Names(entries) if entries.iter().any(|entry| entry == name))
    }

    fn matches(&self, name: &str) -> bool {
        match self.modules {
            TargetModules::Names(entries) => entries.iter().any(|entry| names(entry, name)),
            TargetModules::Pattern(_) => self.pattern.as_ref().is_some_and(|pattern| pattern.is_match(name)),
            TargetModules::AllLinear => true,
        }
    }

    fn unmatched(&self, linears: &[&str]) -> Vec<Unmatched> {
        let TargetModules::Names(entries) = self.modules else { return Vec::new() };
        entries
            .iter()
            .filter(|entry| !linears.iter().any(|name| names(entry, name)))
            .map(|entry| Unmatched { key: self.key, entry: entry.clone() })
            .collect()
    }
}

/// Whether `entry` is `name` or what follows one of its dots.
fn names(entry: &str, name: &str) -> bool {
    name.strip_suffix(entry).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// `layers` and `layers_pattern`, ready to match.
struct Layers<'a> {
    wanted: &'a [usize],
    patterns: Vec<Regex>,
}

impl<'a> Layers<'a> {
    fn new(config: &'a AdapterConfig) -> Result<Self> {
        let wanted = config.layers.as_deref().unwrap_or_default();
        let any_name = [r"[^.]*".to_owned()];
        let (before, patterns) = match config.layers_pattern.as_slice() {
            // Without a pattern PEFT wants a dot before the numbered name, so `layers.3.` at the very start doesn't
            // count.
            [] => (r"\A.*?\.", any_name.as_slice()),
            patterns => (r"\A(?:^|.*?\.)", patterns),
        };
        let patterns = patterns
            .iter()
            .map(|pattern| {
                regex("layers_pattern", pattern, &format!(r"{before}(?:{pattern})\.(?<layer>[0-9]+)\."))
            })
            .collect::<Result<_>>()?;
        Ok(Self { wanted, patterns })
    }

    fn contains(&self, name: &str) -> bool {
        if self.wanted.is_empty() {
            return true;
        }
        let layer = self.patterns.iter().find_map(|pattern| pattern.captures(name));
        let layer = layer.and_then(|captures| captures["layer"].parse().ok());
        layer.is_some_and(|layer: usize| self.wanted.contains(&layer))
    }
}

/// For each of `modules` the value of the first pattern that matches; patterns that match none go to `unmatched`.
///
/// Goes pattern by pattern, so that one compiled expression is held at a time.
fn first_matches<T: Copy>(
    key: &'static str,
    patterns: &[(String, T)],
    modules: &[&str],
    unmatched: &mut Vec<Unmatched>,
) -> Result<Vec<Option<T>>> {
    if patterns.len() > MAX_PATTERNS {
        let expected = format!("at most {MAX_PATTERNS} entries");
        return Err(Problem::new(key, expected, patterns.len()).argument());
    }
    let mut values = vec![None; modules.len()];
    for (pattern, value) in patterns {
        let compiled = regex(key, pattern, &format!(r"\A(?:.*\.)?(?:{pattern})\z"))?;
        let mut used = false;
        for (slot, module) in values.iter_mut().zip(modules) {
            if (slot.is_none() || !used) && compiled.is_match(module) {
                used = true;
                slot.get_or_insert(*value);
            }
        }
        if !used {
            unmatched.push(Unmatched { key, entry: pattern.clone() });
        }
    }
    Ok(values)
}

/// Compiles `full`, made of `pattern`, which must be an expression on its own (`a)(b` is not).
fn regex(key: &str, pattern: &str, full: &str) -> Result<Regex> {
    let compile = |text: &str| RegexBuilder::new(text).size_limit(MAX_REGEX_BYTES).build();
    compile(pattern).and_then(|_| compile(full)).map_err(|error| {
        // The engine's message has several lines; the last one says what is wrong.
        let reason = error.to_string();
        let reason = reason.lines().last().unwrap_or_default().trim().to_owned();
        let expected = "a regular expression of bounded size, without look-around and back references";
        Problem::new(key, expected, format!("\"{pattern}\": {reason}")).argument()
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use serde_json::{Map, Value};

    use super::*;
    use crate::{PeftConfig, error::Error};

    const CASES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/peft/target_cases.json");

    fn names_of(targets: &Targets) -> Vec<&str> {
        targets.adapted.iter().map(|target| target.path.as_str()).collect()
    }

    fn list(names: &[&str]) -> TargetModules {
        TargetModules::Names(names.iter().map(|name| (*name).to_owned()).collect())
    }

    fn llama(layers: usize) -> Vec<String> {
        let parts = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"];
        let blocks = (0..layers).flat_map(|i| parts.map(|part| format!("model.layers.{i}.{part}")));
        blocks.chain(["lm_head".to_owned()]).collect()
    }

    /// Selection, rank, alpha and scaling as PEFT's own functions answered.
    #[test]
    fn selection_equals_peft() {
        let file: Value = serde_json::from_slice(&std::fs::read(CASES).unwrap()).unwrap();
        let cases = file["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 25);
        for case in cases {
            let mut map: Map<String, Value> = case["config"].as_object().unwrap().clone();
            map.insert("peft_type".into(), "LORA".into());
            map.insert("r".into(), 8.into());
            map.insert("lora_alpha".into(), 16.into());
            let text = serde_json::to_vec(&map).unwrap();
            let config = PeftConfig::from_json(&text, Path::new("case")).unwrap();
            let config = AdapterConfig::from_peft(&config).unwrap();
            let model = file["models"][case["model"].as_str().unwrap()].as_array().unwrap();
            let model: Vec<&str> = model.iter().map(|name| name.as_str().unwrap()).collect();
            let expected = case["adapted"].as_array().unwrap();
            if expected.is_empty() {
                let error = Targets::resolve(&config, &model, None).unwrap_err();
                assert!(error.to_string().contains("targets"), "{error}");
                continue;
            }
            let targets = Targets::resolve(&config, &model, None).unwrap();
            assert_eq!(targets.adapted.len(), expected.len(), "{}", case["config"]);
            for (target, expected) in targets.adapted.iter().zip(expected) {
                assert_eq!(target.path, expected["path"], "{}", case["config"]);
                assert_eq!(target.r as u64, expected["r"], "{} {}", case["config"], target.path);
                assert_eq!(
                    Some(target.alpha),
                    expected["alpha"].as_f64(),
                    "{} {}",
                    case["config"],
                    target.path
                );
                assert_eq!(Some(target.scaling), expected["scaling"].as_f64(), "{}", target.path);
            }
        }
    }

    #[test]
    fn all_linear_leaves_out_the_output_head_only() {
        let model = llama(2);
        let config = AdapterConfig::lora(4, 8.0);
        let targets = Targets::resolve(&config, &model, Some("lm_head")).unwrap();
        assert_eq!(names_of(&targets), model[..6]);
        assert_eq!(names_of(&Targets::resolve(&config, &model, None).unwrap()), model);
        assert_eq!(targets.get("model.layers.1.mlp.up_proj").unwrap().scaling, 2.0);
        assert_eq!(targets.get("lm_head"), None);
    }

    #[test]
    fn entries_without_effect_are_listed_and_can_be_refused() {
        let mut config = AdapterConfig::lora(4, 8.0).with_targets(list(&["q_proj", "c_attn"]));
        config.exclude = Some(list(&["absent"]));
        config.rank_pattern = vec![("q_proj".into(), 2), ("up_proj".into(), 3)];
        config.alpha_pattern = vec![("q_proj".into(), 2.0), ("model.layers.1.self_attn.q_proj".into(), 3.0)];
        let targets = Targets::resolve(&config, &llama(2), None).unwrap();
        let unmatched: Vec<_> = targets.unmatched.iter().map(|u| (u.key, u.entry.as_str())).collect();
        let expected = [("targets", "c_attn"), ("exclude", "absent"), ("rank_pattern", "up_proj")];
        assert_eq!(unmatched, expected);
        assert!(targets.require_all().unwrap_err().to_string().contains("c_attn"));
        let config = AdapterConfig::lora(4, 8.0).with_targets(list(&["q_proj"]));
        assert!(Targets::resolve(&config, &llama(2), None).unwrap().require_all().is_ok());
    }

    #[test]
    fn excluding_everything_is_an_error() {
        let mut config = AdapterConfig::lora(4, 8.0).with_targets(list(&["q_proj"]));
        config.exclude = Some(TargetModules::Pattern(".*".into()));
        assert!(Targets::resolve(&config, &llama(2), None).is_err());
    }

    #[test]
    fn expressions_that_cannot_be_expressed_name_their_key() {
        for bad in [r"(?!lm_head).*", r"(q)_\1", "(", "a)(b", r"\w{5000}"] {
            let pattern = TargetModules::Pattern(bad.into());
            let base = AdapterConfig::lora(4, 8.0).with_targets(list(&["q_proj"]));
            let target = AdapterConfig { targets: pattern.clone(), ..base.clone() };
            let exclude = AdapterConfig { exclude: Some(pattern), ..base.clone() };
            let rank =
                AdapterConfig { rank_pattern: vec![("q_proj".into(), 2), (bad.into(), 2)], ..base.clone() };
            let alpha = AdapterConfig { alpha_pattern: vec![(bad.into(), 2.0)], ..base.clone() };
            let layers = AdapterConfig { layers: Some(vec![1]), layers_pattern: vec![bad.into()], ..base };
            let configs = [
                ("targets", target),
                ("exclude", exclude),
                ("rank_pattern", rank),
                ("alpha_pattern", alpha),
                ("layers_pattern", layers),
            ];
            for (key, config) in configs {
                let error = Targets::resolve(&config, &llama(2), None).unwrap_err();
                assert!(matches!(&error, Error::Argument { name, .. } if name == key), "{bad}: {error}");
                assert!(error.to_string().contains(bad), "{error}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_pattern_gives_an_answer(pattern in ".{0,20}", layer in 0usize..4) {
            let mut config = AdapterConfig::lora(4, 8.0).with_targets(list(&["q_proj"]));
            config.rank_pattern = vec![(pattern.clone(), 2)];
            config.layers = Some(vec![layer]);
            config.layers_pattern = vec![pattern.clone()];
            let _ = Targets::resolve(&config, &llama(2), None);
            let config = AdapterConfig::lora(4, 8.0).with_targets(TargetModules::Pattern(pattern));
            let _ = Targets::resolve(&config, &llama(2), None);
        }

        #[test]
        fn a_listed_name_selects_exactly_the_names_that_end_in_it(part in "[a-z_.0-9]{1,12}") {
            let model = llama(3);
            let dotted = format!(".{part}");
            let expected: Vec<&str> =
                model.iter().map(String::as_str).filter(|n| **n == part || n.ends_with(&dotted)).collect();
            match Targets::resolve(&AdapterConfig::lora(4, 8.0).with_targets(list(&[&part])), &model, None) {
                Ok(targets) => prop_assert_eq!(names_of(&targets), expected),
                Err(_) => prop_assert!(expected.is_empty()),
            }
        }
    }
}
