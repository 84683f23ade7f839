//! A plan for those that use it: loading, calibration, training.

use kiln_adapters::PeftConfig;
use kiln_mixq_search::Plan;
use kiln_models::LoadOptions;
use kiln_quant_core::{Plan as Schemes, QuantScheme, Scheme};

use super::Result;

/// A path as a pattern that matches nothing else of the model.
fn pattern(path: &str) -> String {
    path.replace('.', r"\.")
}

/// The plan's schemes by path, as loading and [`CalibrationConfig`](kiln_calibration::CalibrationConfig) take them.
///
/// # Errors
/// A scheme that doesn't parse.
pub fn schemes(plan: &Plan) -> Result<Schemes<Scheme>> {
    // Nothing falls back to it, but a dense one would make embedding and head dense too.
    let default = Scheme::Packed(QuantScheme::affine(8, 64));
    plan.iter().try_fold(Schemes::uniform(default), |schemes, (path, setting)| {
        Ok(schemes.with_override(&pattern(path), setting.scheme.parse()?)?)
    })
}

/// Options that load a checkpoint by the plan: the model that was searched, and the bytes that were predicted.
///
/// # Errors
/// A scheme that doesn't parse.
pub fn load_options(plan: &Plan) -> Result<LoadOptions<'static>> {
    Ok(LoadOptions { schemes: Some(schemes(plan)?), ..LoadOptions::default() })
}

/// `base` with the plan's ranks, where it has any; they win over `base`'s patterns, and the scaling of an adapter is what
/// `base`'s own rank and alpha give.
pub fn peft(plan: &Plan, base: &PeftConfig) -> PeftConfig {
    let (mut ranks, mut alphas) = (Vec::new(), Vec::new());
    for (path, setting) in plan.iter() {
        if let Some(rank) = setting.rank {
            let ratio = f64::from(rank) / base.r.max(1) as f64;
            let ratio = if base.use_rslora { ratio.sqrt() } else { ratio };
            ranks.push((pattern(path), rank as usize));
            alphas.push((pattern(path), base.lora_alpha * ratio));
        }
    }
    // The first match wins.
    ranks.extend(base.rank_pattern.iter().cloned());
    alphas.extend(base.alpha_pattern.iter().cloned());
    let mut config = base.clone();
    (config.rank_pattern, config.alpha_pattern) = (ranks, alphas);
    config
}
