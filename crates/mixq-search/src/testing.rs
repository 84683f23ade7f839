//! What unit tests share.

use crate::{Choice, Config, Cost, MemoryModel, SearchSpace, Setting, Unit};

/// Vectors are rounded to 10 decimals; the specification compares them at 1e-6 relative.
const RELATIVE: f64 = 1e-6;
const ROUNDING: f64 = 1e-10;

#[track_caller]
pub(crate) fn close(found: f64, expected: f64) {
    assert!((found - expected).abs() <= RELATIVE * expected.abs() + ROUNDING, "{found} against {expected}");
}

/// A file of reference values.
pub(crate) fn vector(name: &str) -> serde_json::Value {
    let path = format!("{}/../../testdata/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// `units` units with `choices` choices each, of different sizes: choice `c` of unit `u` takes `(c + 1) * (20 + 3 u)`.
pub(crate) fn toy_space(units: usize, choices: usize) -> SearchSpace {
    let unit = |u: usize| Unit {
        name: format!("layers.{u}"),
        paths: vec![format!("layers.{u}.q"), format!("layers.{u}.v")],
        choices: (0..choices)
            .map(|c| Choice {
                setting: Setting::scheme(format!("affine{}:64", c + 2)),
                cost: Cost::storage(((c + 1) * (20 + 3 * u)) as u64),
            })
            .collect(),
    };
    SearchSpace::new((0..units).map(unit).collect(), MemoryModel::new(100)).unwrap()
}

/// A loss with a known formula: halving per choice, weights from `weight`, neighbours that amplify each other.
pub(crate) fn toy_loss(config: &Config, weight: impl Fn(usize) -> f64) -> f64 {
    let harm = |u: usize| weight(u) * 0.3f64.powi(i32::from(config.0[u]));
    let single: f64 = (0..config.0.len()).map(harm).sum();
    let pairs: f64 = (1..config.0.len()).map(|u| 0.5 * harm(u) * harm(u - 1)).sum();
    single + pairs
}
