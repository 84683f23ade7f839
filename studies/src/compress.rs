//! The stages of compression that studies of whole models share: pruning, a search for bits, and starts of adapters.

use kiln::{
    Base, FineTuned,
    adapters::AdapterConfig,
    calibration::{CalibrationConfig, LoftqConfig, Method, Rounding},
    mixq::{Choices, KlOptions, ModelObjective, Prunings, Variants, space_of},
    mixq_search::{Fidelity, Granularity, KlMix, Plan, SearchSettings, SearchSpace, TrialLog, search},
    models::Windows,
    pruning::{BlockPruning, Criterion, HeadRounding},
    quant::{Plan as Schemes, Scheme},
};
use kiln_examples::Result;

const RANK: usize = 16;

/// LoRA as all of these studies have it.
pub(crate) fn lora(seed: u64) -> AdapterConfig {
    AdapterConfig::lora(RANK, RANK as f64).with_seed(seed)
}

pub(crate) fn loftq() -> Method {
    Method::Loftq(LoftqConfig::default())
}

/// First-order Taylor scores, inner blocks, widths in multiples of 64.
fn pruning(ratio: f64) -> BlockPruning {
    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, ratio);
    (pruning.round_to, pruning.head_rounding) = (64, HeadRounding::Nearest);
    pruning
}

/// The model without `ratio` of the heads and channels of its inner blocks.
pub(crate) fn pruned(base: &Base, ratio: f64, windows: &Windows) -> Result<Base> {
    Ok(base.prune(&pruning(ratio), Some(windows))?.0)
}

/// The model without each of these shares.
pub(crate) fn prunings(base: &Base, ratios: &[f64], windows: &Windows) -> Result<Prunings> {
    Ok(Prunings::new(base.model(), &pruning(0.0), ratios.iter().copied(), Some(windows))?)
}

/// One of `schemes` for each block's attention and MLP, and one of `prunings`, if there are any.
pub(crate) fn space_by_block(
    base: &Base,
    schemes: &[&str],
    prunings: Option<&Prunings>,
) -> Result<SearchSpace> {
    space(base, schemes, Granularity::Block, prunings)
}

/// One of `schemes` for each unit of `granularity`, and one of `prunings`, if there are any.
pub(crate) fn space(
    base: &Base,
    schemes: &[&str],
    granularity: Granularity,
    prunings: Option<&Prunings>,
) -> Result<SearchSpace> {
    let schemes: std::result::Result<Vec<Scheme>, _> = schemes.iter().map(|text| text.parse()).collect();
    let choices = Choices::new(schemes?).with_granularity(granularity);
    let choices = match prunings {
        Some(prunings) => choices.with_prunings(prunings.clone()),
        None => choices,
    };
    Ok(space_of(base.model(), &choices)?)
}

/// Bytes of the model with every linear in `scheme`.
pub(crate) fn bytes_of(base: &Base, scheme: &str) -> Result<u64> {
    Ok(space_of(base.model(), &Choices::new([scheme.parse()?]))?.smallest())
}

/// The best plan within `limit` bytes, by the divergence of models that LoftQ starts.
pub(crate) fn searched(
    base: &Base,
    space: &SearchSpace,
    windows: &Windows,
    evaluations: usize,
    limit: u64,
    prunings: Option<&Prunings>,
) -> Result<Plan> {
    let variants = Variants::new(base.model().clone());
    let variants = match prunings {
        Some(prunings) => variants.with_prunings(prunings.clone())?,
        None => variants,
    };
    let mut objective =
        ModelObjective::new(variants, windows, &KlOptions::default())?.with_start(loftq(), lora(0))?;
    let settings = SearchSettings::new(evaluations, Fidelity::kl(objective.tokens()));
    let mut log = TrialLog::in_memory(space);
    let found = search(space, &mut objective, &mut log, &KlMix::default(), &settings)?;
    Ok(found.front.select(limit)?.plan.clone())
}

/// The model in `schemes`, with `adapters`, which start as `method` has it.
pub(crate) fn started_by(
    base: &Base,
    schemes: Schemes<Scheme>,
    method: Method,
    adapters: AdapterConfig,
    windows: &Windows,
) -> Result<FineTuned> {
    let mut config = CalibrationConfig::new(method, schemes);
    config.measured_windows = 0;
    Ok(base.calibrate(adapters, &config, windows)?)
}

/// Rounded to nearest, with LoRA's own start.
pub(crate) fn rounding() -> Method {
    Method::Rtn(Rounding::MinMax)
}
