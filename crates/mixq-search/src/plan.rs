//! The answer of a search: a setting for every projection.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
};

use crate::Setting;

/// A setting per projection, in the model's order; as JSON an object from path to setting string.
///
/// ```
/// use kiln_mixq_search::Plan;
/// let json = r#"{"model.layers.0.mlp.up_proj":"affine4:64","model.layers.1.mlp.up_proj":"dense"}"#;
/// let plan: Plan = serde_json::from_str(json)?;
/// assert_eq!(plan.get("model.layers.1.mlp.up_proj").unwrap().scheme, "dense");
/// assert_eq!(serde_json::to_string(&plan)?, json);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    settings: Vec<(String, Setting)>,
}

impl Plan {
    /// A plan of these settings; the paths must differ.
    pub(crate) fn new(settings: Vec<(String, Setting)>) -> Self {
        Self { settings }
    }

    /// The setting of a path.
    pub fn get(&self, path: &str) -> Option<&Setting> {
        self.settings.iter().find(|(known, _)| known == path).map(|(_, setting)| setting)
    }

    /// Paths and settings in the model's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Setting)> {
        self.settings.iter().map(|(path, setting)| (path.as_str(), setting))
    }

    /// The same paths with other settings.
    #[must_use]
    pub fn map(&self, mut setting: impl FnMut(&str, &Setting) -> Setting) -> Self {
        Self { settings: self.iter().map(|(path, old)| (path.to_owned(), setting(path, old))).collect() }
    }

    /// Number of paths.
    pub fn len(&self) -> usize {
        self.settings.len()
    }

    /// Whether the plan has no path.
    pub fn is_empty(&self) -> bool {
        self.settings.is_empty()
    }
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.settings.iter().map(|(path, setting)| (path, setting)))
    }
}

impl<'de> Deserialize<'de> for Plan {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Settings;
        impl<'de> Visitor<'de> for Settings {
            type Value = Vec<(String, Setting)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object from path to setting")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut settings = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some((path, setting)) = map.next_entry::<String, Setting>()? {
                    if !seen.insert(path.clone()) {
                        return Err(serde::de::Error::custom(format!("path \"{path}\" occurs twice")));
                    }
                    settings.push((path, setting));
                }
                Ok(settings)
            }
        }
        Ok(Self { settings: deserializer.deserialize_map(Settings)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_json_and_a_repeated_path_is_refused() {
        let json = r#"{"layers.10.q":"dense","layers.2.q":"affine4:64 rank=4"}"#;
        let plan: Plan = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_string(&plan).unwrap(), json);
        let twice = r#"{"a":"dense","a":"dense"}"#;
        assert!(serde_json::from_str::<Plan>(twice).unwrap_err().to_string().contains("twice"));
    }
}
