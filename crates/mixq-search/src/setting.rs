//! What one projection gets: weight format and, where they are searched too, rank, adapter and pruning ratio.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Error;

/// What a plan says of one projection, e.g. `affine4:64` or `nf4:64 rank=8 adapter=lora prune=0.38`.
///
/// The scheme is the string that `kiln_quant_core::Scheme` parses (`dense` for packed by nothing); this crate compares
/// it and hands it on, but never looks into it.
///
/// ```
/// use kiln_mixq_search::Setting;
/// let setting: Setting = "affine4:64 rank=8".parse()?;
/// assert_eq!((setting.scheme.as_str(), setting.rank), ("affine4:64", Some(8)));
/// assert_eq!(setting.to_string(), "affine4:64 rank=8");
/// # Ok::<(), kiln_mixq_search::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Setting {
    /// Weight format.
    pub scheme: String,
    /// Rank of the adapter, if it is searched.
    pub rank: Option<u32>,
    /// Kind of the adapter, if it is searched.
    pub adapter: Option<String>,
    /// Share of the channels to prune, in `0.0..1.0`, if it is searched.
    pub prune: Option<f64>,
}

impl Setting {
    /// A weight format and nothing else.
    pub fn scheme(scheme: impl Into<String>) -> Self {
        Self { scheme: scheme.into(), rank: None, adapter: None, prune: None }
    }

    /// The same with a rank.
    #[must_use]
    pub fn with_rank(mut self, rank: u32) -> Self {
        self.rank = Some(rank);
        self
    }

    /// The same with a kind of adapter.
    #[must_use]
    pub fn with_adapter(mut self, adapter: impl Into<String>) -> Self {
        self.adapter = Some(adapter.into());
        self
    }

    /// The same with a pruning ratio.
    #[must_use]
    pub fn with_prune(mut self, ratio: f64) -> Self {
        self.prune = Some(ratio);
        self
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.scheme)?;
        if let Some(rank) = self.rank {
            write!(f, " rank={rank}")?;
        }
        if let Some(adapter) = &self.adapter {
            write!(f, " adapter={adapter}")?;
        }
        if let Some(prune) = self.prune {
            write!(f, " prune={prune}")?;
        }
        Ok(())
    }
}

impl FromStr for Setting {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let fail = |reason: String| Error::Setting { text: text.into(), reason };
        let mut words = text.split(' ');
        let scheme = words.next().filter(|scheme| !scheme.is_empty() && !scheme.contains('='));
        let mut setting = Self::scheme(scheme.ok_or_else(|| fail("expected a weight format first".into()))?);
        for word in words {
            let (key, value) =
                word.split_once('=').ok_or_else(|| fail(format!("expected key=value, found \"{word}\"")))?;
            let bad = || fail(format!("{key}: found \"{value}\""));
            let seen = match key {
                "rank" => setting.rank.replace(value.parse().map_err(|_| bad())?).is_some(),
                "adapter" if !value.is_empty() => setting.adapter.replace(value.into()).is_some(),
                "prune" => {
                    let ratio = value.parse().ok().filter(|ratio| (0.0..1.0).contains(ratio));
                    setting.prune.replace(ratio.ok_or_else(bad)?).is_some()
                }
                _ => return Err(fail(format!("expected rank, adapter or prune, found \"{word}\""))),
            };
            if seen {
                return Err(fail(format!("{key} occurs twice")));
            }
        }
        Ok(setting)
    }
}

impl Serialize for Setting {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Setting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_round_trip_as_strings() {
        for text in
            ["dense", "affine4:64", "nf4:64:double rank=8 adapter=lora prune=0.38", "affine2:8x4 prune=0"]
        {
            assert_eq!(text.parse::<Setting>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_settings_name_the_part() {
        for (text, part) in [
            ("", "weight format"),
            ("rank=8", "weight format"),
            ("dense  rank=8", "key=value"),
            ("dense rank=x", "\"x\""),
            ("dense rank=8 rank=8", "twice"),
            ("dense prune=1", "\"1\""),
            ("dense prune=NaN", "NaN"),
            ("dense adapter=", "adapter="),
            ("dense bits=4", "bits=4"),
        ] {
            let message = text.parse::<Setting>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
