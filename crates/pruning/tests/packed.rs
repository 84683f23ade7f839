//! Packed bases.

use kiln_models::{Checkpoint, LoadOptions};
use kiln_pruning::{BlockPruning, Criterion, CutOptions, Error, HiddenPruning, LayerRange, SplitBlocks};
use kiln_testkit::assert_close;

use super::*;

const TOLERANCE: f32 = 2e-5;

fn packed(folder: &str, scheme: &str) -> Decoder<QuantLinear> {
    let checkpoint: Checkpoint = checkpoint(folder);
    checkpoint.load(&LoadOptions::uniform(scheme.parse().unwrap()).in_f32(), &Device::flex()).unwrap().0
}

fn prune(
    model: &Decoder<QuantLinear>,
    split_blocks: SplitBlocks,
) -> kiln_pruning::Result<kiln_pruning::Pruned> {
    let mut pruning = BlockPruning::new(Criterion::TaylorFirst, 0.5);
    pruning.layers = LayerRange::All;
    let options = CutOptions { split_blocks, ..CutOptions::default() };
    pruning.prune(model.clone(), Some(&calibration()), &options)
}

#[test]
fn whole_groups_go_without_touching_a_code() {
    // One group a column: inputs go exactly too.
    for (folder, scheme) in [
        ("llama-untied-bf16", "affine4:col"),
        ("qwen2-tied-f32", "affine3:col:int"),
        ("opt-f32", "affine8:col:sym"),
    ] {
        let (model, tokens) = (packed(folder, scheme), tokens(folder));
        let pruned = prune(&model, SplitBlocks::Refuse).unwrap();
        assert!(pruned.report.requantized.is_empty());
        for (path, slot) in pruned.model.slots() {
            assert!(matches!(slot, QuantLinear::Packed(_)), "{path}");
        }
        let expected = logits(&masked(model, &pruned.report.kept), &tokens);
        assert_close(folder, &logits(&pruned.model, &tokens), &expected, TOLERANCE);
        assert!(pruned.report.bytes_after < pruned.report.bytes_before);
    }
}

#[test]
fn outputs_go_on_the_codes_and_split_inputs_are_quantized_again_with_their_error() {
    let (model, tokens) = (packed("llama-untied-bf16", "affine4:32"), tokens("llama-untied-bf16"));
    let pruned = prune(&model, SplitBlocks::Requantize).unwrap();
    // o's heads are whole groups of 2 · 16 inputs; single channels of down are not.
    let paths: Vec<&str> = pruned.report.requantized.iter().map(|r| r.path.as_str()).collect();
    assert_eq!(paths, ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]);
    for requantized in &pruned.report.requantized {
        let error = requantized.error.unwrap();
        assert!(error.relative > 0.0 && error.relative < 0.1, "{error:?}");
    }
    // Left dense instead, nothing is lost.
    let exact = prune(&model, SplitBlocks::Dense).unwrap();
    assert_eq!(exact.report.kept, pruned.report.kept);
    let expected = logits(&masked(model.clone(), &exact.report.kept), &tokens);
    assert_close("dense", &logits(&exact.model, &tokens), &expected, TOLERANCE);
    let error = prune(&model, SplitBlocks::Refuse).unwrap_err();
    assert!(
        matches!(&error, Error::Mismatch { name, .. } if name == "model.layers.0.mlp.down_proj"),
        "{error}"
    );
}

#[test]
fn a_packed_stream_narrows_with_the_outputs_exact() {
    let model = packed("llama-untied-bf16", "affine4:col");
    let pruned = HiddenPruning::new(Criterion::L2, 0.25).prune(model, None, &CutOptions::default()).unwrap();
    assert!(pruned.report.requantized.is_empty());
    assert_eq!(pruned.report.kept.hidden.len(), 48);
    assert!(logits(&pruned.model, &tokens("llama-untied-bf16")).iter().all(|logit| logit.is_finite()));
}

#[test]
fn importance_of_a_packed_base_is_that_of_its_dequantized_weights() {
    let model = packed("llama-untied-bf16", "nf4:64:double");
    let dense = edit(model.clone(), |_, _, _, _| {});
    let [packed, dense] = [&model, &dense].map(|model| prune(model, SplitBlocks::Dense).unwrap());
    assert_eq!(packed.report.kept, dense.report.kept);
    let tokens = tokens("llama-untied-bf16");
    assert_close("logits", &logits(&packed.model, &tokens), &logits(&dense.model, &tokens), TOLERANCE);
}
