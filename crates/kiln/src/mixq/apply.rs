//! A plan for those that use it: loading, calibration, training.

use kiln_adapters::{AdapterConfig, AnyAttacher, InitLoraWeights, Method};
use kiln_mixq_search::{Plan, Setting};
use kiln_models::{Decoder, LoadOptions, Slots};
use kiln_quant_core::{PathPattern, Plan as Schemes, QuantLinear, Scheme};

use crate::{AdaptedModel, Error, Result};

/// The weight format of a setting. A pruning ratio is [`Prunings`](super::Prunings)' to follow: a model has its shapes.
pub(super) fn scheme_of(path: &str, setting: &Setting) -> Result<Scheme> {
    match setting.prune {
        Some(ratio) => Err(Error::argument(
            path,
            "no pruning ratio, which Prunings::apply follows",
            format!("prune={ratio}"),
        )),
        None => Ok(setting.scheme.parse()?),
    }
}

/// The plan's schemes by path, as loading and [`CalibrationConfig`](kiln_calibration::CalibrationConfig) take them.
///
/// # Errors
/// A scheme that doesn't parse; [`Error::is_argument`] for a setting with a pruning ratio.
pub fn schemes(plan: &Plan) -> Result<Schemes<Scheme>> {
    plan.iter().try_fold(Schemes::uniform(Scheme::Dense), |schemes, (path, setting)| {
        Ok(schemes.with_path(path, scheme_of(path, setting)?))
    })
}

/// Options that load a checkpoint by the plan: the model that was searched, and the bytes that were predicted.
///
/// # Errors
/// Those of [`schemes`].
pub fn load_options(plan: &Plan) -> Result<LoadOptions<'static>> {
    Ok(LoadOptions::planned(schemes(plan)?))
}

/// `base` with the plan's ranks, where it has any; they win over `base`'s patterns, and the scaling of an adapter is what
/// `base`'s own rank and alpha give. Kinds of adapters differ by path and have no place in one configuration:
/// [`attach`] follows them.
pub fn adapters(plan: &Plan, base: &AdapterConfig) -> AdapterConfig {
    let (mut ranks, mut alphas) = (Vec::new(), Vec::new());
    for (path, setting) in plan.iter() {
        if let Some(rank) = setting.rank {
            let pattern = PathPattern::exact(path).to_string();
            ranks.push((pattern.clone(), rank as usize));
            alphas.push((pattern, alpha_of(base, rank)));
        }
    }
    // The first match wins.
    ranks.extend(base.rank_pattern.iter().cloned());
    alphas.extend(base.alpha_pattern.iter().cloned());
    let mut config = base.clone();
    (config.rank_pattern, config.alpha_pattern) = (ranks, alphas);
    config
}

/// The alpha that gives an adapter of `rank` the scaling of `base`'s own rank and alpha.
pub(super) fn alpha_of(base: &AdapterConfig, rank: u32) -> f64 {
    let ratio = f64::from(rank) / base.rank.max(1) as f64;
    base.alpha * if base.rslora { ratio.sqrt() } else { ratio }
}

/// Attaches adapters of the plan's ranks and kinds, `lora` or `dora`, to the quantized model; `base` decides where the
/// plan says nothing.
///
/// # Errors
/// [`Error::is_argument`] for another kind of adapter; adapters that don't fit the model.
pub fn attach(model: Decoder<QuantLinear>, plan: &Plan, base: &AdapterConfig) -> Result<AdaptedModel> {
    let config = adapters(plan, base);
    let slots = model.slot_shapes();
    let kind = |path: &str| plan.get(path).and_then(|setting| setting.adapter.as_deref());
    let is_dora = |path: &str| match kind(path) {
        Some("lora") => Ok(false),
        Some("dora") => Ok(true),
        Some(other) => Err(Error::argument(path, "adapter lora or dora", format!("\"{other}\""))),
        None => Ok(matches!(config.method, Method::Dora { .. })),
    };
    let mut attachers: [Option<AnyAttacher>; 2] = [None, None];
    for (path, _) in &slots {
        let dora = is_dora(path)?;
        if attachers[usize::from(dora)].is_none() {
            let method = if dora {
                Method::Dora { init: init(&config) }
            } else {
                Method::Lora { init: init(&config) }
            };
            let config = config.clone().with_method(method);
            attachers[usize::from(dora)] = Some(AnyAttacher::new(&config, &slots)?);
        }
    }
    model.try_map(|path, linear| {
        let attacher = attachers[usize::from(is_dora(path)?)].as_ref();
        Ok::<_, Error>(attacher.expect("made above for every slot").attach_to_residual(path, linear)?)
    })
}

/// The name that plans have for `base`'s kind of adapter.
///
/// # Errors
/// [`Error::is_argument`] for adapters other than LoRA and DoRA, which no calibration starts.
pub(super) fn kind_of(base: &AdapterConfig) -> Result<&'static str> {
    match base.method {
        Method::Lora { .. } => Ok("lora"),
        Method::Dora { .. } => Ok("dora"),
        other => Err(Error::argument("adapters", "LoRA or DoRA, for a calibrated start", other.name())),
    }
}

/// Whether a plan asks for the one kind of adapter that a calibration starts, `base`'s.
///
/// # Errors
/// [`Error::is_argument`] for a path that asks for another.
pub(super) fn check_kinds(plan: &Plan, base: &AdapterConfig) -> Result<()> {
    let kind = kind_of(base)?;
    plan.iter().try_for_each(|(path, setting)| match setting.adapter.as_deref() {
        Some(other) if other != kind => {
            let expected = format!("adapter {kind}, for a calibrated start of this kind");
            Err(Error::argument(path, expected, format!("\"{other}\"")))
        }
        _ => Ok(()),
    })
}

/// A and B before training.
fn init(config: &AdapterConfig) -> InitLoraWeights {
    match config.method {
        Method::Lora { init } | Method::Dora { init } => init,
        _ => InitLoraWeights::default(),
    }
}
