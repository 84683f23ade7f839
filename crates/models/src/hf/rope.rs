//! Rotary positions in `config.json`, as transformers 5 understands both spellings.

use super::json::Fields;
use crate::{
    Result,
    config::{RopeConfig, RopeScaling},
};

/// Base of the frequencies where the file names none.
const DEFAULT_THETA: f64 = 10_000.0;
const SUPPORTED: &str = "default, linear, dynamic, yarn, llama3";

/// Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (older), with the resolution that
/// transformers' `modeling_rope_utils.py` makes: `rope_scaling` before `rope_parameters`, values inside before those at
/// the top (for `original_max_position_embeddings` the reverse), `type` where `rope_type` is absent.
pub(crate) fn parse(config: &Fields<'_>, max_positions: usize, head_dim: usize) -> Result<RopeConfig> {
    let inner = dictionary(config)?;
    let rope = one(config, inner.as_ref(), max_positions, head_dim, DEFAULT_THETA)?;
    inner.into_iter().for_each(|inner| config.add_unknown(inner.unknown()));
    Ok(rope)
}

/// As [`parse`], for families with a table for full and one for sliding blocks, in this order; `thetas` are the bases
/// where the file is silent. Older files have one set for the full blocks, and `rope_local_base_freq` for the others,
/// whose frequencies are never scaled.
pub(crate) fn parse_by_layer_type(
    config: &Fields<'_>,
    max_positions: usize,
    head_dim: usize,
    thetas: [f64; 2],
) -> Result<Vec<RopeConfig>> {
    let inner = dictionary(config)?;
    let local = config.positive("rope_local_base_freq")?;
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    let nested = inner.as_ref().filter(|inner| KINDS.iter().any(|kind| inner.get(kind).is_some()));
    let tables = match nested {
        Some(sets) => KINDS
            .into_iter()
            .zip(thetas)
            .map(|(kind, theta)| {
                let Some(set) = sets.object(kind)? else {
                    return Ok(RopeConfig { theta, scaling: RopeScaling::Default });
                };
                let rope = one(config, Some(&set), max_positions, head_dim, theta)?;
                config.add_unknown(set.unknown());
                Ok(rope)
            })
            .collect::<Result<_>>()?,
        None => {
            let full = one(config, inner.as_ref(), max_positions, head_dim, thetas[0])?;
            let theta = checked_theta(config, local.unwrap_or(thetas[1]))?;
            vec![full, RopeConfig { theta, scaling: RopeScaling::Default }]
        }
    };
    inner.into_iter().for_each(|inner| config.add_unknown(inner.unknown()));
    Ok(tables)
}

/// The object with the parameters.
fn dictionary<'a>(config: &Fields<'a>) -> Result<Option<Fields<'a>>> {
    config.know(&["rope_scaling", "rope_parameters"]);
    config.refuse_unless("partial_rotary_factor", 1.0)?;
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
    default_theta: f64,
) -> Result<RopeConfig> {
    let top_theta = config.positive("rope_theta")?;
    let Some(rope) = inner else {
        let theta = checked_theta(config, top_theta.unwrap_or(default_theta))?;
        return Ok(RopeConfig { theta, scaling: RopeScaling::Default });
    };
    rope.refuse_unless("partial_rotary_factor", 1.0)?;
    rope.know(&["type"]);
    let theta = match rope.positive("rope_theta")? {
        Some(theta) => checked_theta(rope, theta)?,
        None => checked_theta(config, top_theta.unwrap_or(default_theta))?,
    };
    let original = match config.size("original_max_position_embeddings", super::config::MAX_POSITIONS)? {
        Some(original) => original,
        None => rope
            .size("original_max_position_embeddings", super::config::MAX_POSITIONS)?
            .unwrap_or(max_positions),
    };
    let scaling = scaling(rope, Positions { max: max_positions, original }, head_dim)?;
    Ok(RopeConfig { theta, scaling })
}

/// Positions the model may use, and those of its pre-training.
#[derive(Clone, Copy)]
struct Positions {
    max: usize,
    original: usize,
}

fn scaling(rope: &Fields<'_>, positions: Positions, head_dim: usize) -> Result<RopeScaling> {
    let key = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
    match rope.str(key)?.unwrap_or("default") {
        // Parameters per layer type: an object of objects without a type of its own.
        "default" if rope.get("full_attention").is_some() => {
            Err(rope.unsupported("full_attention", "one set of parameters for all layers"))
        }
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: required(rope, "factor")? }),
        "dynamic" => {
            if head_dim <= 2 {
                return Err(rope.unsupported(key, "dynamic scaling with a head_dim above 2"));
            }
            // transformers stretches from `max_position_embeddings`, whatever stands in the object.
            Ok(RopeScaling::Dynamic {
                factor: required(rope, "factor")?,
                original_max_position_embeddings: positions.max,
            })
        }
        "yarn" => yarn(rope, positions),
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
        parse(&fields, 4096, 64).map_err(|error| error.to_string())
    }

    fn scaling_of(config: Value) -> RopeScaling {
        read(config).unwrap().scaling
    }

    #[test]
    fn both_spellings_give_the_same() {
        let new = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}});
        let old = json!({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}});
        assert_eq!(read(new.clone()), read(old));
        assert_eq!(read(new), Ok(RopeConfig { theta: 5e5, scaling: RopeScaling::Linear { factor: 2.0 } }));
        let default = Ok(RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default });
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
            (json!({"rope_scaling": {"type": "longrope"}}), &["rope_scaling.type", "longrope"][..]),
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
