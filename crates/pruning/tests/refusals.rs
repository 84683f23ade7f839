//! Bad input.

use kiln_models::Windows;
use kiln_pruning::{
    BlockPruning, Budget, Criterion, CutOptions, Error, HiddenPruning, KeptLayer, LayerPruning, LayerRange,
    Normalise, Pruned, Result, Scope, Units,
};
use kiln_quant_core::Plan;

use super::*;

#[track_caller]
fn assert_error<T>(result: Result<T>, parts: &[&str]) {
    let Err(error) = result else { panic!("expected an error with {parts:?}") };
    let message = error.to_string();
    for part in parts {
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
}

fn prune(change: impl FnOnce(&mut BlockPruning)) -> Result<Pruned> {
    let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
    pruning.layers = LayerRange::All;
    change(&mut pruning);
    let calibration = calibration();
    pruning.prune(load("llama-untied-bf16"), Some(&calibration), &CutOptions::default())
}

#[test]
fn ratios_that_remove_everything_are_refused_by_group() {
    assert_error(
        prune(|p| p.ratio = Plan::uniform(1.0)),
        &["layers.0.self_attn", "all 2 key-value heads", "1"],
    );
    let mlp = Plan::uniform(0.0).with_override(r"layers\.1\.mlp", 0.9999).unwrap();
    assert_error(prune(|p| p.ratio = mlp), &["model.layers.1.mlp", "0.9999", "all 128 channels"]);
    assert_error(
        prune(|p| {
            p.ratio = Plan::uniform(1.0);
            p.scope = Scope::Global { normalise: Normalise::PerParameter, budget: Budget::Parameters };
        }),
        &["removes all"],
    );
    let options = CutOptions::default();
    let hidden = HiddenPruning::new(Criterion::L2, 1.0).prune(load("opt-f32"), None, &options);
    assert_error(hidden, &["hidden width", "all 64 channels"]);
    let layers = LayerPruning::new(2).prune(load("opt-f32"), &calibration(), &options);
    assert_error(layers, &["layers", "all 2 blocks"]);
}

#[test]
fn nothing_to_prune_is_an_error() {
    assert_error(prune(|p| p.protected = vec![0, 1]), &["nothing to prune", "all 2 blocks are protected"]);
    // The first of two blocks and the last: none is inner.
    assert_error(prune(|p| p.layers = LayerRange::Inner), &["nothing to prune"]);
    assert_error(prune(|p| p.protected = vec![2]), &["BlockPruning.protected", "below 2", "2"]);
    assert_error(prune(|p| p.layers = LayerRange::Between { start: 1, end: 3 }), &["0..2", "1..3"]);
    let layers = LayerPruning { remove: 1, protected: vec![0, 1] };
    assert_error(
        layers.prune(load("opt-f32"), &calibration(), &CutOptions::default()),
        &["nothing to prune", "0 of 2 not protected"],
    );
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    for ratio in [-0.1, 1.5, f64::NAN] {
        assert_error(prune(|p| p.ratio = Plan::uniform(ratio)), &["BlockPruning.ratio", "0..1"]);
        let hidden = HiddenPruning::new(Criterion::L2, ratio);
        assert_error(hidden.prune(load("opt-f32"), None, &CutOptions::default()), &["HiddenPruning.ratio"]);
    }
    assert_error(prune(|p| p.steps = 0), &["BlockPruning.steps"]);
    assert_error(prune(|p| p.round_to = 0), &["BlockPruning.round_to"]);
    assert_error(prune(|p| p.rerun = true), &["BlockPruning.rerun"]);
    assert_error(
        prune(|p| {
            p.scope = Scope::Global { normalise: Normalise::None, budget: Budget::Units };
            p.ratio = Plan::uniform(0.5).with_override("mlp", 0.1).unwrap();
        }),
        &["BlockPruning.ratio", "one ratio under a global scope"],
    );
    let hidden = HiddenPruning::new(Criterion::Wanda, 0.5);
    assert_error(
        hidden.prune(load("opt-f32"), Some(&calibration()), &CutOptions::default()),
        &["HiddenPruning.criterion", "Wanda"],
    );
    assert!(
        serde_json::from_str::<BlockPruning>(r#"{"criterion":"l2","ratio":{"default":0.5},"rounds":3}"#)
            .is_err()
    );
}

#[test]
fn calibration_that_is_missing_short_or_foreign_is_refused() {
    for criterion in [Criterion::TaylorFirst, Criterion::TaylorMixed, Criterion::Wanda, Criterion::FlapWifv] {
        let mut pruning = BlockPruning::new(criterion, 0.5);
        pruning.layers = LayerRange::All;
        let result = pruning.prune(load("opt-f32"), None, &CutOptions::default());
        assert_error(result, &["calibration data", "none"]);
    }
    let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
    (pruning.layers, pruning.bias_compensation) = (LayerRange::All, true);
    assert_error(pruning.prune(load("opt-f32"), None, &CutOptions::default()), &["calibration data"]);

    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, 0.5);
    pruning.layers = LayerRange::All;
    let with = |windows| {
        let calibration = Windows::new(windows).unwrap();
        pruning.prune(load("llama-untied-bf16"), Some(&calibration), &CutOptions::default())
    };
    assert_error(with(vec![vec![1, 256]]), &["windows", "ids below 256", "256"]);
    assert_error(with(vec![vec![1; 257]]), &["windows", "at most 256 tokens", "257"]);
}

#[test]
fn indices_that_do_not_fit_are_refused_by_group() {
    let model = load("llama-untied-bf16");
    let structure = Structure::of(model.config());
    let with = |change: &dyn Fn(&mut Kept)| {
        let mut kept = Kept::everything(&structure);
        change(&mut kept);
        kiln_pruning::apply(model.clone(), &kept, &CutOptions::default())
    };
    assert_error(
        with(&|k| k.layers[1].heads = vec![]),
        &["model.layers.1.self_attn", "at least one", "none"],
    );
    assert_error(
        with(&|k| k.layers[0].channels = vec![3, 3]),
        &["model.layers.0.mlp", "rising", "3 before 3"],
    );
    assert_error(with(&|k| k.layers[0].channels = vec![128]), &["model.layers.0.mlp", "below 128", "128"]);
    assert_error(with(&|k| k.layers[0].layer = 2), &["layers", "2"]);
    assert_error(with(&|k| k.layers.clear()), &["layers", "none"]);
    assert_error(with(&|k| k.hidden = vec![64]), &["hidden", "below 64"]);
    assert_error(with(&|k| k.layers[0].experts = vec![vec![0]]), &["experts", "none, as the block has none"]);
    let outer = Kept::everything(&structure);
    let mut inner = outer.clone();
    inner.layers[0].heads = vec![7];
    assert!(matches!(outer.then(&inner), Err(Error::Mismatch { .. })));
}

#[test]
fn channels_of_experts_that_do_not_fit_are_refused() {
    let model = architecture("qwen2_moe");
    let structure = Structure::of(model.config());
    let layer = &structure.layers[0];
    let count = |units| layer.group(units).unwrap().count;
    let (experts, channels) = (layer.experts, count(Units::ExpertChannels));
    let with = |change: &dyn Fn(&mut KeptLayer)| {
        let mut kept = Kept::everything(&structure);
        change(&mut kept.layers[0]);
        kiln_pruning::apply(model.clone(), &kept, &CutOptions::default())
    };
    let name = "model.layers.0.mlp.experts";
    assert_error(with(&|k| k.experts = vec![vec![0]; experts - 1]), &[name, &format!("{experts} experts")]);
    assert_error(with(&|k| k.experts = vec![vec![channels]; experts]), &[name, &format!("below {channels}")]);
    let uneven = |k: &mut KeptLayer| {
        k.experts = vec![vec![0, 1]; experts];
        k.experts[1].pop();
    };
    assert_error(with(&uneven), &[name, "2 channels of each expert", "1"]);
    let beyond = vec![count(Units::SharedExpertChannels)];
    assert_error(with(&|k| k.shared_expert = beyond.clone()), &["model.layers.0.mlp.shared_expert", "below"]);
}

/// What other blocks or a norm read stays, and the reason is said.
#[test]
fn groups_that_must_stay_are_refused_with_the_reason() {
    for (folder, reason) in [
        ("olmo2", "a norm runs over"),
        ("bloom", "by a head's place"),
        ("gemma4_text-shared", "keys of earlier"),
    ] {
        let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
        pruning.layers = LayerRange::All;
        let options = CutOptions::default();
        let refused = pruning.prune(architecture(folder), None, &options);
        assert_error(refused, &["BlockPruning.ratio", "a ratio of 0", "self_attn", reason]);
        // A global ranking leaves them out.
        pruning.scope = Scope::Global { normalise: Normalise::PerParameter, budget: Budget::Parameters };
        let kept = pruning.prune(architecture(folder), None, &options).unwrap().report.kept;
        let structure = Structure::of(architecture(folder).config());
        for (kept, groups) in kept.layers.iter().zip(&structure.layers) {
            assert_eq!(kept.heads.len(), groups.group(Units::Heads).unwrap().count, "{folder}");
        }
        assert!(
            kept.layers
                .iter()
                .zip(&structure.layers)
                .any(|(kept, groups)| kept.channels.len() < groups.shape.intermediate_size)
        );
    }
    let hidden = HiddenPruning::new(Criterion::L2, 0.5);
    for (folder, reason) in [("opt-post", "narrower"), ("gemma4_text", "inputs of their own")] {
        let refused = hidden.prune(architecture(folder), None, &CutOptions::default());
        assert_error(refused, &["hidden", "all channels", reason]);
    }
}
