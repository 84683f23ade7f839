//! Rotary scaling: from `rope.scaling.*` keys, or from the frequency factors that LLaMA 3 files hold instead.

use std::f64::consts::TAU;

use super::{config::Keys, names::ROPE_FACTORS};
use crate::{Result, config::RopeScaling};

/// Relative error of a factor, which went through f32 several times.
const FACTOR_TOLERANCE: f64 = 1e-5;
/// Positions of LLaMA 3's pre-training. Only the ratios to the two frequency factors matter.
const LLAMA3_POSITIONS: usize = 8192;

/// Scaling that the keys describe.
pub(super) fn from_keys(keys: &Keys, max_position_embeddings: usize) -> Result<RopeScaling> {
    let factor = keys.positive("rope.scaling.factor")?;
    let either = match factor {
        Some(factor) => Some(factor),
        None => keys.positive("rope.scale_linear")?,
    };
    let kind_key = keys.key("rope.scaling.type");
    let require = |factor| keys.metadata.require(&keys.key("rope.scaling.factor"), factor);
    match keys.metadata.str(&kind_key)? {
        // Older files have a factor without a type.
        None => Ok(match either {
            Some(factor) if factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::Default,
        }),
        Some("none") => Ok(RopeScaling::Default),
        Some("linear") => Ok(RopeScaling::Linear { factor: require(either)? }),
        Some("yarn") => yarn(keys, require(factor)?, max_position_embeddings),
        Some(_) => Err(keys.metadata.unsupported_value(&kind_key, "none, linear, yarn")),
    }
}

fn yarn(keys: &Keys, factor: f64, max_position_embeddings: usize) -> Result<RopeScaling> {
    let multiplier = match keys.positive("rope.scaling.attn_factor")? {
        Some(multiplier) => multiplier,
        None => keys.positive("rope.scaling.yarn_attn_factor")?.unwrap_or(1.0),
    };
    // The keys hold a factor on the paper's own sharpening, 0.1 ln(factor) + 1 (YaRN, section 3.4).
    let sharpening = if factor > 1.0 { 0.1 * factor.ln() + 1.0 } else { 1.0 };
    // What Mistral's files take off it.
    let softening = match keys.metadata.f64(&keys.key("rope.scaling.yarn_log_multiplier"))? {
        Some(part) if factor > 1.0 => 0.1 * part * factor.ln() + 1.0,
        _ => 1.0,
    };
    if softening.is_nan() || softening < 1.0 {
        let key = keys.key("rope.scaling.yarn_log_multiplier");
        return Err(keys.metadata.error(&key, "a number from 0 on", softening.to_string()));
    }
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: keys
            .size("rope.scaling.original_context_length")?
            .unwrap_or(max_position_embeddings),
        beta_fast: keys.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: keys.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: multiplier * sharpening / softening,
        truncate: true,
    })
}

/// LLaMA 3's scaling, or a linear one, that gives the `factors` by which frequencies are divided.
pub(super) fn from_factors(keys: &Keys, factors: &[f32], theta: f64, head_dim: usize) -> Result<RopeScaling> {
    let error = |expected: &str, found: String| keys.metadata.error(ROPE_FACTORS, expected, found);
    if factors.len() != head_dim / 2 {
        return Err(error(&format!("{} factors", head_dim / 2), factors.len().to_string()));
    }
    let kind_key = keys.key("rope.scaling.type");
    if keys.metadata.str(&kind_key)?.is_some_and(|kind| kind != "none") {
        return Err(keys.metadata.unsupported_value(&kind_key, "none beside rope_freqs.weight"));
    }
    let positions = keys.size("rope.scaling.original_context_length")?.unwrap_or(LLAMA3_POSITIONS);
    let wanted: Vec<Point> = factors
        .iter()
        .enumerate()
        .map(|(i, &factor)| {
            let frequency = theta.powf(-(2.0 * i as f64) / head_dim as f64);
            Point { rotations: positions as f64 * frequency / TAU, factor: f64::from(factor) }
        })
        .collect();
    let most = wanted.iter().map(|point| point.factor).fold(0.0, f64::max);
    let least = wanted.iter().map(|point| point.factor).fold(f64::INFINITY, f64::min);
    if most - least <= FACTOR_TOLERANCE * most && least > 0.0 {
        let same = (most - 1.0).abs() <= FACTOR_TOLERANCE;
        return Ok(if same { RopeScaling::Default } else { RopeScaling::Linear { factor: most } });
    }
    // All published models have the first pair of frequency factors.
    let published = Some((1.0, 4.0));
    [published, fit(&wanted, most)]
        .into_iter()
        .flatten()
        .find(|&(low, high)| {
            low < high && wanted.iter().all(|point| point.agrees(llama3(point.rotations, most, low, high)))
        })
        .map(|(low_freq_factor, high_freq_factor)| RopeScaling::Llama3 {
            factor: most,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: positions,
        })
        .ok_or_else(|| error("factors that LLaMA 3's scaling gives", format!("others, up to {most}")))
}

/// The factors by which LLaMA 3's scaling divides the frequencies of heads of `head_dim`.
pub(crate) fn llama3_factors(
    theta: f64,
    head_dim: usize,
    positions: usize,
    [factor, low, high]: [f64; 3],
) -> Vec<f32> {
    let rotations = |i| positions as f64 * theta.powf(-(2.0 * i as f64) / head_dim as f64) / TAU;
    (0..head_dim / 2).map(|i| llama3(rotations(i), factor, low, high) as f32).collect()
}

/// A frequency, as rotations within the positions of pre-training, and its factor.
struct Point {
    rotations: f64,
    factor: f64,
}

impl Point {
    fn agrees(&self, factor: f64) -> bool {
        (self.factor - factor).abs() <= FACTOR_TOLERANCE * factor
    }
}

/// The factor of a frequency: `factor` below `low` rotations, 1 above `high`, and the harmonic mean weighted by the
/// distance between.
fn llama3(rotations: f64, factor: f64, low: f64, high: f64) -> f64 {
    let smooth = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
    1.0 / ((1.0 - smooth) / factor + smooth)
}

/// The low and high frequency factors from two frequencies between them: there the weight is a line in the rotations.
fn fit(points: &[Point], factor: f64) -> Option<(f64, f64)> {
    let between = |point: &&Point| {
        point.factor > 1.0 + FACTOR_TOLERANCE && point.factor < factor * (1.0 - FACTOR_TOLERANCE)
    };
    let weight = |point: &Point| (1.0 / point.factor - 1.0 / factor) / (1.0 - 1.0 / factor);
    let first = points.iter().find(between)?;
    let last = points.iter().rfind(between)?;
    let span = (first.rotations - last.rotations) / (weight(first) - weight(last));
    if !span.is_finite() {
        return None;
    }
    let low = first.rotations - weight(first) * span;
    // Files hold factors in f32; the config they came from had short decimals.
    let short = |value: f64| (value * 1e3).round() / 1e3;
    Some((short(low), short(low + span)))
}
