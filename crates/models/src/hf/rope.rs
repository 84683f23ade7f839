//! Rotary positions in `config.json`, as transformers 5 understands both spellings.

use super::json::Fields;
use crate::{
    Result,
    config::{RopeConfig, RopeScaling},
    families::class::first,
};

const SUPPORTED: &str = "default, linear, dynamic, yarn, longrope, llama3, proportional";

/// What a class says of its rotary positions.
#[derive(Clone, Copy)]
pub(crate) struct RopeKeys {
    /// Base of the frequencies where the file names none.
    pub theta: f64,
    /// The share of rotated channels where the file names none; `None`: the class rotates all.
    pub partial: Option<f64>,
    /// The object that holds where the file has none.
    pub absent: Option<&'static str>,
    /// Keys of the object that the family reads itself, or that say nothing new.
    pub known: &'static [&'static str],
}

impl RopeKeys {
    /// LLaMA's.
    pub(crate) const DEFAULT: Self = Self { theta: 10_000.0, partial: None, absent: None, known: &[] };

    /// LLaMA's with another base.
    pub(crate) const fn based(theta: f64) -> Self {
        Self { theta, ..Self::DEFAULT }
    }
}

/// Old names of `rope_theta` and `partial_rotary_factor` outside the object.
const THETA: &[&str] = &["rope_theta", "rotary_emb_base"];
const PARTIAL: &[&str] = &["partial_rotary_factor", "rotary_pct", "rope_pct"];

/// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older), with the resolution that
/// transformers' `modeling_rope_utils.py` makes: `rope_scaling` before `rope_parameters`, values inside before those at
/// the top (for `original_max_position_embeddings` the reverse), `type` where `rope_type` is absent.
pub(crate) fn parse(
    config: &Fields<'_>,
    keys: &RopeKeys,
    max_positions: usize,
    head_dim: usize,
) -> Result<RopeConfig> {
    let inner = dictionary(config)?;
    let rope = match &inner {
        Some(inner) => one(config, Some(inner), max_positions, head_dim, keys)?,
        None => silent(config, keys, max_positions, head_dim)?,
    };
    inner.into_iter().for_each(|inner| config.add_unknown(inner.unknown()));
    Ok(rope)
}

/// The parameters where the file has no object of them.
fn silent(config: &Fields<'_>, keys: &RopeKeys, max_positions: usize, head_dim: usize) -> Result<RopeConfig> {
    let absent = keys.absent.map(serde_json::from_str::<serde_json::Map<_, _>>).transpose();
    let absent = absent.map_err(|error| config.wrong("rope_parameters", &error.to_string()))?;
    let path = config.path();
    let absent = absent.as_ref().map(|map| Fields::new(&path, "rope_parameters.", map));
    one(config, absent.as_ref(), max_positions, head_dim, keys)
}

/// As [`parse`], for families with a table for full and one for sliding blocks, in this order. Older files have one set for the full blocks, and `rope_local_base_freq` for the others,
/// whose frequencies are never scaled.
pub(crate) fn parse_by_layer_type(
    config: &Fields<'_>,
    max_positions: usize,
    head_dim: usize,
    keys: [RopeKeys; 2],
) -> Result<Vec<RopeConfig>> {
    let inner = dictionary(config)?;
    let local = config.positive("rope_local_base_freq")?;
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    let nested = inner.as_ref().filter(|inner| KINDS.iter().any(|kind| inner.get(kind).is_some()));
    let tables = match nested {
        Some(sets) => KINDS
            .into_iter()
            .zip(keys)
            .map(|(kind, keys)| {
                let Some(set) = sets.object(kind)? else {
                    return silent(config, &keys, max_positions, head_dim);
                };
                let rope = one(config, Some(&set), max_positions, head_dim, &keys)?;
                config.add_unknown(set.unknown());
                Ok(rope)
            })
            .collect::<Result<_>>()?,
        None => {
            let full = match &inner {
                Some(inner) => one(config, Some(inner), max_positions, head_dim, &keys[0])?,
                None => silent(config, &keys[0], max_positions, head_dim)?,
            };
            let theta = checked_theta(config, local.unwrap_or(keys[1].theta))?;
            vec![full, RopeConfig::plain(theta)]
        }
    };
    inner.into_iter().for_each(|inner| config.add_unknown(inner.unknown()));
    Ok(tables)
}

/// The object with the parameters.
fn dictionary<'a>(config: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    config.know(&["rope_scaling", "rope_parameters"]);
    config.refuse_unless("rope_interleaved", false)?;
    match config.object("rope_scaling")? {
        Some(scaling) => Ok(Some(scaling)),
        None => config.object("rope_parameters"),
    }
}

/// One set of parameters.
fn one(
    config: &Fields<'_>,
    inner: Option<&Fields<'_>>,
    max_positions: usize,
    head_dim: usize,
    keys: &RopeKeys,
) -> Result<RopeConfig> {
    let top_theta = first(THETA, |key| config.positive(key))?.unwrap_or(keys.theta);
    let partial_rotary_factor = partial_factor(config, inner, keys.partial)?;
    let Some(rope) = inner else {
        let theta = checked_theta(config, top_theta)?;
        return Ok(RopeConfig { theta, scaling: RopeScaling::Default, partial_rotary_factor });
    };
    rope.know(&["type", "original_max_position_embeddings"]);
    rope.know(keys.known);
    let theta = match rope.positive("rope_theta")? {
        Some(theta) => checked_theta(rope, theta)?,
        None => checked_theta(config, top_theta)?,
    };
    let original = match config.size("original_max_position_embeddings", super::config::MAX_POSITIONS)? {
        Some(original) => original,
        None => rope
            .size("original_max_position_embeddings", super::config::MAX_POSITIONS)?
            .unwrap_or(max_positions),
    };
    let mut config = RopeConfig { theta, scaling: RopeScaling::Default, partial_rotary_factor };
    config.scaling = scaling(rope, Positions { max: max_positions, original }, config.rotated(head_dim))?;
    Ok(config)
}

/// The share of rotated channels: in the object, else outside, else the class's. Classes that rotate all say `None`, and
/// another share is refused.
fn partial_factor(config: &Fields<'_>, inner: Option<&Fields<'_>>, default: Option<f64>) -> Result<f64> {
    let Some(default) = default else {
        for fields in std::iter::once(config).chain(inner) {
            fields.refuse_unless(PARTIAL[0], 1.0)?;
        }
        return Ok(1.0);
    };
    let inside = match inner {
        Some(inner) => inner.positive(PARTIAL[0])?,
        None => None,
    };
    let outside = first(PARTIAL, |key| config.positive(key))?;
    let factor = inside.or(outside).unwrap_or(default);
    match factor <= 1.0 {
        true => Ok(factor),
        false => Err(inner
            .filter(|_| inside.is_some())
            .unwrap_or(config)
            .wrong(PARTIAL[0], "a share of at most 1")),
    }
}

/// Positions the model may use, and those of its pre-training.
#[derive(Clone, Copy)]
struct Positions {
    max: usize,
    original: usize,
}

fn scaling(rope: &Fields<'_>, positions: Positions, rotated: usize) -> Result<RopeScaling> {
    let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    match rope.str(key)?.unwrap_or("default") {
        // Parameters per layer type: an object of objects without a type of its own.
        "default" if rope.get("full_attention").is_some() => {
            Err(rope.unsupported("full_attention", "one set of parameters for all layers"))
        }
        "default" => Ok(RopeScaling::Default),
        "proportional" => Ok(RopeScaling::Proportional { factor: rope.positive("factor")?.unwrap_or(1.0) }),
        "linear" => Ok(RopeScaling::Linear { factor: required(rope, "factor")? }),
        "dynamic" => {
            if rotated <= 2 {
                return Err(rope.unsupported(key, "dynamic scaling with a head_dim above 2"));
            }
            // HunYuan's: other keys are not looked at then.
            if let Some(alpha) = rope.f64("alpha")?.filter(|alpha| *alpha != 0.0) {
                rope.know(&["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]);
                return match alpha > 0.0 && alpha.is_finite() {
                    true => Ok(RopeScaling::Alpha { alpha }),
                    false => Err(rope.wrong("alpha", "a number above 0")),
                };
            }
            // transformers stretches from `max_position_embeddings`, whatever stands in the object.
            Ok(RopeScaling::Dynamic {
                factor: required(rope, "factor")?,
                original_max_position_embeddings: positions.max,
            })
        }
        "yarn" => yarn(rope, positions),
        "longrope" | "su" => long_rope(rope, positions, rotated),
        "llama3" => llama3(rope, positions.original),
        _ => Err(rope.unsupported(key, SUPPORTED)),
    }
}

fn yarn(rope: &Fields<'_>, positions: Positions) -> Result<RopeScaling> {
    let factor = rope.positive("factor")?.unwrap_or(positions.max as f64 / positions.original as f64);
    let (mscale, mscale_all_dim) = (nonzero(rope, "mscale")?, nonzero(rope, "mscale_all_dim")?);
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let attention_factor = match (rope.f64("attention_factor")?, mscale, mscale_all_dim) {
        (Some(given), _, _) => given,
        (None, Some(mscale), Some(all_dim)) => magnitude(mscale) / magnitude(all_dim),
        _ => magnitude(1.0),
    };
    if !attention_factor.is_finite() {
        return Err(rope.wrong("mscale_all_dim", "a value that leaves the attention factor finite"));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: positions.original,
        beta_fast: beta(rope, "beta_fast", 32.0)?,
        beta_slow: beta(rope, "beta_slow", 1.0)?,
        attention_factor,
        truncate: rope.bool("truncate")?.unwrap_or(true),
    })
}

fn long_rope(rope: &Fields<'_>, positions: Positions, rotated: usize) -> Result<RopeScaling> {
    let pairs = rotated / 2;
    let factors = |key: &str| {
        let wrong = || {
            rope.wrong(
                key,
                &format!("a list of {pairs} numbers above 0, one for each pair of rotated channels"),
            )
        };
        let list = rope.get(key).and_then(|value| value.as_array()).ok_or_else(wrong)?;
        let list: Option<Vec<f64>> =
            list.iter().map(|value| value.as_f64().filter(|factor| *factor > 0.0)).collect();
        list.filter(|list| list.len() == pairs).ok_or_else(wrong)
    };
    let original = positions.original;
    let factor = rope.positive("factor")?.unwrap_or(positions.max as f64 / original as f64);
    let attention_factor = match rope.positive("attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 || original <= 1 => 1.0,
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short_factor: factors("short_factor")?,
        long_factor: factors("long_factor")?,
        original_max_position_embeddings: original,
        attention_factor,
    })
}

fn llama3(rope: &Fields<'_>, original: usize) -> Result<RopeScaling> {
    let low_freq_factor = required(rope, "low_freq_factor")?;
    let high_freq_factor = required(rope, "high_freq_factor")?;
    // Their difference divides the smooth part.
    if high_freq_factor <= low_freq_factor {
        return Err(rope.wrong("high_freq_factor", &format!("more than low_freq_factor, {low_freq_factor}")));
    }
    Ok(RopeScaling::Llama3 {
        factor: required(rope, "factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: original,
    })
}

fn required(rope: &Fields<'_>, key: &str) -> Result<f64> {
    rope.positive(key)?.ok_or_else(|| rope.wrong(key, "a number above 0"))
}

/// transformers takes 0 for "not given".
fn nonzero(rope: &Fields<'_>, key: &str) -> Result<Option<f64>> {
    Ok(rope.f64(key)?.filter(|&value| value != 0.0))
}

fn beta(rope: &Fields<'_>, key: &str, default: f64) -> Result<f64> {
    match nonzero(rope, key)? {
        None => Ok(default),
        Some(value) if value > 0.0 => Ok(value),
        Some(_) => Err(rope.wrong(key, "a number of rotations above 0")),
    }
}

/// The logarithm of theta divides in YaRN, and theta 1 would turn every channel alike.
fn checked_theta(fields: &Fields<'_>, theta: f64) -> Result<f64> {
    if theta > 1.0 { Ok(theta) } else { Err(fields.wrong("rope_theta", "a number above 1")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::path::Path;

    fn read(config: Value) -> std::result::Result<RopeConfig, String> {
        let fields = Fields::new(Path::new("config.json"), "", config.as_object().unwrap());
        parse(&fields, &RopeKeys::DEFAULT, 4096, 64).map_err(|error| error.to_string())
    }

    fn scaling_of(config: Value) -> RopeScaling {
        read(config).unwrap().scaling
    }

    #[test]
    fn both_spellings_give_the_same() {
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}});
        assert_eq!(read(new.clone()), read(old));
        assert_eq!(
            read(new),
            Ok(RopeConfig { scaling: RopeScaling::Linear { factor: 2.0 }, ..RopeConfig::plain(5e5) })
        );
        let default = Ok(RopeConfig::plain(10_000.0));
        assert_eq!(read(json!({})), default);
        assert_eq!(read(json!({"rope_scaling": null})), default);
        assert_eq!(read(json!({"rope_parameters": {"rope_theta": 10000}})), default);
    }

    #[test]
    fn positions_of_pretraining_come_from_either_place() {
        let llama3 = |original| RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        let mut inner =
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0});
        assert_eq!(scaling_of(json!({"rope_scaling": inner})), llama3(4096));
        inner["original_max_position_embeddings"] = json!(1024);
        assert_eq!(scaling_of(json!({"rope_scaling": inner})), llama3(1024));
        assert_eq!(
            scaling_of(json!({"rope_scaling": inner, "original_max_position_embeddings": 512})),
            llama3(512)
        );
        let dynamic = json!({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 1024});
        assert_eq!(
            scaling_of(json!({"rope_scaling": dynamic})),
            RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 4096 }
        );
    }

    /// Attention factors worked out by hand from YaRN's formula `0.1 m ln(s) + 1`; ln 4 = 1.386294361119890618.
    #[test]
    fn yarn_resolves_its_attention_factor() {
        let yarn = |extra: Value| {
            let mut inner =
                json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024});
            inner.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            match scaling_of(json!({"rope_parameters": inner})) {
                RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, truncate, .. } => {
                    (factor, attention_factor, beta_fast, beta_slow, truncate)
                }
                other => panic!("{other:?}"),
            }
        };
        let (factor, attention, fast, slow, truncate) = yarn(json!({}));
        assert_eq!((factor, fast, slow, truncate), (4.0, 32.0, 1.0, true));
        assert!((attention - 1.138_629_436_111_989).abs() < 1e-15);
        assert_eq!(yarn(json!({"attention_factor": 1.5})).1, 1.5);
        assert_eq!(yarn(json!({"mscale": 1.0, "mscale_all_dim": 1.0})).1, 1.0);
        assert!(
            (yarn(json!({"mscale": 2.0, "mscale_all_dim": 1.0})).1
                - 1.277_258_872_223_978 / 1.138_629_436_111_989)
                .abs()
                < 1e-15
        );
        assert!((yarn(json!({"mscale": 2.0})).1 - 1.138_629_436_111_989).abs() < 1e-15);
        // 4096 / 1024 where the factor is absent.
        assert_eq!(
            yarn(json!({"factor": null, "beta_fast": 16, "truncate": false})),
            (4.0, attention, 16.0, 1.0, false)
        );
    }

    #[test]
    fn what_is_not_implemented_is_named() {
        for (config, parts) in [
            (json!({"rope_scaling": {"type": "longrope"}}), &["rope_scaling.short_factor", "32 numbers"][..]),
            (
                json!({"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}}),
                &["rope_scaling.short_factor", "32 numbers"],
            ),
            (json!({"rope_scaling": {"rope_type": "ntk"}}), &["rope_scaling.rope_type", "ntk"]),
            (json!({"rope_parameters": {"rope_type": "linear"}}), &["rope_parameters.factor"]),
            (
                json!({"rope_parameters": {"rope_type": "linear", "factor": -1}}),
                &["rope_parameters.factor", "-1"],
            ),
            (json!({"rope_parameters": {"partial_rotary_factor": 0.5}}), &["partial_rotary_factor", "0.5"]),
            (json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "0.5"]),
            (json!({"rope_interleaved": true}), &["rope_interleaved"]),
            (json!({"rope_theta": 1.0}), &["rope_theta"]),
            (json!({"rope_theta": "big"}), &["rope_theta"]),
            (json!({"rope_parameters": {"full_attention": {}}}), &["rope_parameters.full_attention"]),
            (
                json!({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}}),
                &["high_freq_factor"],
            ),
        ] {
            let message = read(config.clone()).unwrap_err();
            assert!(parts.iter().all(|part| message.contains(part)), "{config}: {message}");
        }
        assert!(read(json!({"partial_rotary_factor": 1})).is_ok());
    }
}
