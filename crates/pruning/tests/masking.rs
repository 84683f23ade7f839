//! Cutting gives what masking gives.

use kiln_models::{
    Block, Decoder, Embedding,
    families::{NormAxis, NormKind},
};
use kiln_pruning::{BlockPruning, Criterion, CutOptions, HiddenPruning, LayerPruning, LayerRange, Structure};
use kiln_testkit::{Golden, assert_close, read};

use super::*;

/// Sums of a few dozen f32 terms in another order; logits are below 5.
const TOLERANCE: f32 = 2e-5;

const CRITERIA: [Criterion; 11] = [
    Criterion::Random,
    Criterion::L1,
    Criterion::L2,
    Criterion::TaylorVector,
    Criterion::TaylorFirst,
    Criterion::TaylorSecond,
    Criterion::TaylorMixed,
    Criterion::Wanda,
    Criterion::FlapWifv,
    Criterion::FlapIfv,
    Criterion::FlapWifn,
];

#[test]
fn heads_and_channels_cut_are_heads_and_channels_masked() {
    let calibration = calibration();
    for folder in FOLDERS {
        let (model, tokens) = (load(folder), tokens(folder));
        for criterion in CRITERIA {
            let mut pruning = BlockPruning::new(criterion, 0.5);
            pruning.layers = LayerRange::Between { start: 0, end: 2 };
            let pruned = pruning.prune(model.clone(), Some(&calibration), &CutOptions::default()).unwrap();
            let kept = &pruned.report.kept;
            let shape = model.config().layer(0);
            let half = (shape.num_key_value_heads / 2, shape.intermediate_size / 2);
            for layer in &kept.layers {
                assert_eq!((layer.heads.len(), layer.channels.len()), half, "{folder} {criterion:?}");
            }
            let what = format!("{folder} {criterion:?}");
            let expected = logits(&masked(model.clone(), kept), &tokens);
            assert_close(&what, &logits(&pruned.model, &tokens), &expected, TOLERANCE);
            // And something was lost.
            assert!(kiln_testkit::max_difference(&expected, &logits(&model, &tokens)) > 1e-3, "{what}");
        }
    }
}

#[test]
fn blocks_that_differ_in_width_are_masked_blocks_too() {
    for folder in FOLDERS {
        let (model, tokens) = (load(folder), tokens(folder));
        let mut pruning = BlockPruning::new(Criterion::L1, 0.5);
        pruning.layers = LayerRange::Between { start: 1, end: 2 };
        let pruned = pruning.prune(model.clone(), None, &CutOptions::default()).unwrap();
        let channels = model.config().intermediate_size;
        let found = [0, 1].map(|index| pruned.model.config().layer(index).intermediate_size);
        assert_eq!(found, [channels, channels / 2]);
        let expected = logits(&masked(model, &pruned.report.kept), &tokens);
        assert_close(folder, &logits(&pruned.model, &tokens), &expected, TOLERANCE);
    }
}

#[test]
fn blocks_cut_are_blocks_masked() {
    for folder in FOLDERS {
        let (model, tokens) = (load(folder), tokens(folder));
        let pruned =
            LayerPruning::new(1).prune(model.clone(), &calibration(), &CutOptions::default()).unwrap();
        assert_eq!(pruned.report.kept.layers.len(), 1);
        let expected = logits(&masked(model, &pruned.report.kept), &tokens);
        assert_close(folder, &logits(&pruned.model, &tokens), &expected, TOLERANCE);
    }
}

/// Zeroes channels of the residual stream wherever something is written to it.
fn masked_stream(model: Decoder<QuantLinear>, gone: &[usize]) -> Decoder<QuantLinear> {
    let structure = Structure::of(model.config());
    let writes: Vec<String> = structure
        .linears
        .iter()
        .filter(|linear| linear.output == Channels::Hidden)
        .map(|linear| linear.path.clone())
        .collect();
    let model = edit(model, |path, [_, outputs], weight, bias| {
        if !writes.iter().any(|write| write == path) {
            return;
        }
        for row in weight.chunks_mut(outputs) {
            gone.iter().for_each(|&channel| row[channel] = 0.0);
        }
        if let Some(bias) = bias {
            gone.iter().for_each(|&channel| bias[channel] = 0.0);
        }
    });
    let mut model = model;
    let Embedding::Dense(table) = &mut model.embed_tokens else { panic!("a dense table") };
    let [rows, width] = table.weight.val().dims();
    let mut values = read(table.weight.val());
    for row in values.chunks_mut(width) {
        gone.iter().for_each(|&channel| row[channel] = 0.0);
    }
    let data = TensorData::new(values, [rows, width]);
    table.weight = Param::initialized(ParamId::new(), Tensor::from_data(data, &Device::flex()));
    model
}

#[test]
fn a_narrower_stream_under_rms_norm_is_the_masked_one() {
    for folder in FOLDERS.iter().filter(|folder| **folder != "opt-f32") {
        for criterion in [Criterion::Random, Criterion::L2, Criterion::TaylorFirst, Criterion::TaylorMixed] {
            let (model, tokens) = (load(folder), tokens(folder));
            let pruning = HiddenPruning::new(criterion, 0.25);
            let pruned = pruning.prune(model.clone(), Some(&calibration()), &CutOptions::default()).unwrap();
            let kept = &pruned.report.kept.hidden;
            let width = model.config().hidden_size;
            assert_eq!(kept.len(), width / 4 * 3);
            let gone: Vec<usize> = (0..width).filter(|channel| !kept.contains(channel)).collect();
            let mut masked = masked_stream(model.clone(), &gone);
            let (old, new) = (&mut masked, &pruned.model);
            let (before, after) = (&old.final_norm, &new.final_norm);
            assert!((after.eps / before.eps - 4.0 / 3.0).abs() < 1e-12);
            let gains: Vec<f32> = read(before.weight.as_ref().unwrap().val());
            // Gemma's gains are 1 + w.
            let one = if before.kind == NormKind::RmsOnePlus { 1.0 } else { 0.0 };
            let scaled: Vec<f32> =
                kept.iter().map(|&c| (gains[c] + one) * (4.0f32 / 3.0).sqrt() - one).collect();
            assert_close(folder, &read(after.weight.as_ref().unwrap().val()), &scaled, 1e-6);
            // Norms over heads share the epsilon in the checkpoint.
            for (_, norm) in
                old.blocks.iter_mut().flat_map(Block::norms_mut).filter(|(p, _)| p.axis() == NormAxis::Head)
            {
                norm.eps = after.eps;
            }
            let what = format!("{folder} {criterion:?}");
            assert_close(&what, &logits(&pruned.model, &tokens), &logits(&masked, &tokens), TOLERANCE);
        }
    }
}

#[test]
fn a_narrower_stream_under_layer_norm_is_torch_s_reference() {
    let golden = Golden::open("pruning/opt_hidden.safetensors");
    let (model, tokens) = (load("opt-f32"), tokens("opt-f32"));
    let structure = Structure::of(model.config());
    let mut kept = Kept::everything(&structure);
    kept.hidden = golden.ints("kept").into_iter().map(|channel| channel as usize).collect();
    let (pruned, _) = kiln_pruning::apply(model, &kept, &CutOptions::default()).unwrap();
    let last: Vec<f32> =
        logits(&pruned, &tokens).chunks(24 * 256).flat_map(|row| row[20 * 256..].to_vec()).collect();
    assert_close("opt", &last, &golden.floats("logits_last4"), TOLERANCE);
}
