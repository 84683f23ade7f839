//! Values per module path: bits, ranks, keep ratios.

use std::{fmt, hash, str::FromStr};

use regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Error;

/// A regular expression over module paths with the meaning of PEFT's pattern keys: `key` matches a path when
/// `^(.*\.)?(key)$` does, that is the whole path or what follows one of its dots.
///
/// A dot in the key is the regular expression's; write `\.` to mean only a dot. Serialized as the key.
///
/// ```
/// use kiln_quant_core::PathPattern;
/// let pattern: PathPattern = "[qv]_proj".parse()?;
/// assert!(pattern.matches("model.layers.3.self_attn.q_proj"));
/// assert!(!pattern.matches("model.layers.3.self_attn.q_proj.lora"));
/// # Ok::<(), kiln_quant_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct PathPattern {
    key: String,
    regex: Regex,
}

impl PathPattern {
    /// # Errors
    /// [`Error::Pattern`] if `key` is not a regular expression.
    pub fn new(key: impl Into<String>) -> Result<Self, Error> {
        let key = key.into();
        let compile = |regex: &str| {
            Regex::new(regex).map_err(|e| Error::Pattern { pattern: key.clone(), reason: e.to_string() })
        };
        // On its own first: inside the parentheses, `a)(b` would pass.
        compile(&key)?;
        let regex = compile(&format!(r"^(.*\.)?({key})$"))?;
        Ok(Self { key, regex })
    }

    /// The pattern of one path, whose characters mean themselves.
    ///
    /// # Panics
    /// If the path is so long (megabytes) that its regular expression exceeds the size that the regex crate allows.
    pub fn exact(path: &str) -> Self {
        Self::new(regex::escape(path)).expect("an escaped path is a regular expression")
    }

    /// Whether the pattern matches a module path such as `model.layers.3.self_attn.q_proj`.
    pub fn matches(&self, path: &str) -> bool {
        self.regex.is_match(path)
    }

    /// The key.
    pub fn as_str(&self) -> &str {
        &self.key
    }
}

impl FromStr for PathPattern {
    type Err = Error;

    fn from_str(key: &str) -> Result<Self, Error> {
        Self::new(key)
    }
}

impl fmt::Display for PathPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)
    }
}

impl PartialEq for PathPattern {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for PathPattern {}

impl hash::Hash for PathPattern {
    fn hash<H: hash::Hasher>(&self, state: &mut H) {
        self.key.hash(state);
    }
}

impl Serialize for PathPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.key)
    }
}

impl<'de> Deserialize<'de> for PathPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

/// A value for every module: the first override whose pattern matches the module's path, else the default.
///
/// ```
/// use kiln_quant_core::{Plan, Scheme};
/// let plan: Plan<Scheme> = serde_json::from_str(
///     r#"{"default": "affine2:64", "overrides": [["lm_head", "dense"], ["layers\\.0\\..*", "affine4:64"]]}"#,
/// )?;
/// assert_eq!(plan.get("lm_head").to_string(), "dense");
/// assert_eq!(plan.get("model.layers.0.mlp.up_proj").to_string(), "affine4:64");
/// assert_eq!(plan.get("model.layers.10.mlp.up_proj").to_string(), "affine2:64");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan<T> {
    default: T,
    #[serde(default = "Vec::new")]
    overrides: Vec<(PathPattern, T)>,
}

impl<T> Plan<T> {
    /// The same value everywhere.
    pub const fn uniform(default: T) -> Self {
        Self { default, overrides: Vec::new() }
    }

    /// Adds an override **behind** those already there: where both match, the earlier one wins.
    ///
    /// # Errors
    /// [`Error::Pattern`] if `pattern` is not a regular expression.
    pub fn with_override(mut self, pattern: &str, value: T) -> Result<Self, Error> {
        self.overrides.push((PathPattern::new(pattern)?, value));
        Ok(self)
    }

    /// Adds an override for one path, behind those already there.
    #[must_use]
    pub fn with_path(mut self, path: &str, value: T) -> Self {
        self.overrides.push((PathPattern::exact(path), value));
        self
    }

    /// The value for a module path.
    pub fn get(&self, path: &str) -> &T {
        self.overrides
            .iter()
            .find(|(pattern, _)| pattern.matches(path))
            .map_or(&self.default, |(_, value)| value)
    }

    /// The value where no override matches.
    pub const fn default_value(&self) -> &T {
        &self.default
    }

    /// The overrides, strongest first.
    pub fn overrides(&self) -> &[(PathPattern, T)] {
        &self.overrides
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_match_wins() {
        let plan = Plan::uniform(8)
            .with_override(r"layers\.0\.self_attn\.q_proj", 2)
            .unwrap()
            .with_override("q_proj", 3)
            .unwrap()
            .with_override(".*self_attn.*", 4)
            .unwrap();
        assert_eq!(*plan.get("model.layers.0.self_attn.q_proj"), 2);
        assert_eq!(*plan.get("model.layers.1.self_attn.q_proj"), 3);
        assert_eq!(*plan.get("model.layers.1.self_attn.v_proj"), 4);
        assert_eq!(*plan.get("model.layers.1.mlp.up_proj"), 8);
    }

    #[test]
    fn exact_patterns_mean_every_character_itself() {
        let path = r"layers.0.a+b[(c|\d)]{2}^$-#&~ *?.q_proj";
        let plan = Plan::uniform(8).with_path(path, 2);
        assert_eq!(*plan.get(path), 2);
        assert_eq!(*plan.get(&path.replace("layers.0", "layers.10")), 8);
        assert_eq!(*plan.get(&path.replace('.', "x")), 8);
    }

    #[test]
    fn a_key_matches_whole_path_parts_only() {
        let matches = |key: &str, path: &str| PathPattern::new(key).unwrap().matches(path);
        assert!(matches("q_proj", "q_proj"));
        assert!(matches("q_proj", "model.layers.0.self_attn.q_proj"));
        assert!(!matches("q_proj", "model.layers.0.self_attn.xq_proj"));
        assert!(!matches("q_proj", "model.layers.0.self_attn.q_proj.weight"));
        assert!(!matches("layers.1", "model.layers.11"));
        assert!(matches(r"layers\.1\..*", "model.layers.1.mlp.up_proj"));
        assert!(!matches(r"layers\.1\..*", "model.layers.11.mlp.up_proj"));
        // An unescaped dot is any character.
        assert!(matches("self.attn", "model.self_attn"));
        // Alternatives are bound by the key's own parentheses; anchors mean the path's ends.
        assert!(matches("q_proj|v_proj", "a.v_proj"));
        assert!(!matches("q_proj|v_proj", "a.q_proj.b"));
        assert!(matches("^model.norm", "model.norm"));
        assert!(!matches("^model.norm", "x.model.norm"));
    }

    #[test]
    fn plans_survive_json() {
        let text = r#"{"default":2,"overrides":[["lm_head",8],["layers\\.\\d\\..*",4]]}"#;
        let plan: Plan<u32> = serde_json::from_str(text).unwrap();
        assert_eq!(*plan.get("model.layers.7.mlp"), 4);
        assert_eq!(*plan.get("model.layers.17.mlp"), 2);
        assert_eq!(serde_json::to_string(&plan).unwrap(), text);
        assert_eq!(serde_json::from_str::<Plan<u32>>(r#"{"default":2}"#).unwrap(), Plan::uniform(2));
    }

    #[test]
    fn bad_patterns_are_errors_that_name_the_key() {
        for key in ["q_proj(", "a)(b", "*", "(?=x)", "(?x)a # "] {
            let message = PathPattern::new(key).unwrap_err().to_string();
            assert!(message.contains(&format!("pattern \"{key}\"")), "{message}");
            let json = serde_json::json!({ "default": 1, "overrides": [[key, 2]] });
            let message = serde_json::from_value::<Plan<u32>>(json).unwrap_err().to_string();
            assert!(message.contains(key), "{message}");
        }
        assert!(serde_json::from_str::<Plan<u32>>(r#"{"default":2,"override":[]}"#).is_err());
    }
}
