//! Cutting gives what masking gives.

use kiln_models::export::{ExportOptions, FloatType};
use kiln_models::{
    Block, Decoder, Embedding,
    families::{NormAxis, NormKind},
};
use kiln_pruning::{
    BlockPruning, Criterion, CutOptions, HiddenPruning, LayerPruning, LayerRange, PruningRecord, SaveFormat,
    Structure, Units, load_pruned, save_pruned,
};
use kiln_quant_core::Plan;
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

fn relative(folder: &str, what: &str, found: &[f32], expected: &[f32]) {
    let largest = expected.iter().fold(0.0f32, |largest, logit| largest.max(logit.abs()));
    assert_close(&format!("{folder}, {what}"), found, expected, 1e-5 * largest);
}

/// Half of everything that may go, of every architecture: heads of fused matrices and with sinks and gates, channels of experts,
/// each its own, and of the one that all tokens go through. Whole blocks, too.
#[test]
fn what_every_architecture_loses_is_masked() {
    let mut lost = std::collections::BTreeSet::new();
    for folder in architectures() {
        let (model, tokens) = (architecture(&folder), rows_of(&folder));
        let structure = Structure::of(model.config());
        let mut ratio = Plan::uniform(0.5);
        for group in
            structure.layers.iter().flat_map(|layer| &layer.groups).filter(|group| group.stays.is_some())
        {
            ratio = ratio.with_override(&group.path.replace('.', r"\."), 0.0).unwrap();
        }
        let all = logits(&model, &tokens);
        for criterion in [Criterion::Random, Criterion::TaylorMixed, Criterion::FlapWifv] {
            let mut pruning = BlockPruning::new(criterion, 0.0);
            (pruning.ratio, pruning.layers) = (ratio.clone(), LayerRange::All);
            pruning.rerun = criterion == Criterion::FlapWifv;
            let pruned = pruning.prune(model.clone(), Some(&calibration()), &CutOptions::default()).unwrap();
            let kept = &pruned.report.kept;
            for (layer, groups) in kept.layers.iter().zip(&structure.layers) {
                for group in &groups.groups {
                    let found: Vec<usize> = match group.units {
                        Units::Heads => vec![layer.heads.len()],
                        Units::Channels => vec![layer.channels.len()],
                        Units::ExpertChannels => layer.experts.iter().map(Vec::len).collect(),
                        Units::SharedExpertChannels => vec![layer.shared_expert.len()],
                    };
                    let goes = group.stays.is_none();
                    let left = if goes { group.count.div_ceil(2) } else { group.count };
                    assert!(
                        !found.is_empty() && found.iter().all(|found| *found == left),
                        "{folder}: {group:?}, {found:?}"
                    );
                    if goes {
                        lost.insert(format!("{:?}", group.units));
                    }
                }
            }
            let expected = logits(&masked(model.clone(), kept), &tokens);
            relative(&folder, &format!("{criterion:?}"), &logits(&pruned.model, &tokens), &expected);
            assert!(kiln_testkit::max_difference(&expected, &all) > 1e-4, "{folder}");
            // Each expert has lost its own channels.
            if let Some(experts) =
                kept.layers.iter().map(|layer| &layer.experts).find(|experts| !experts.is_empty())
            {
                assert!(experts.iter().any(|channels| *channels != experts[0]), "{folder} {criterion:?}");
            }
        }
        let cut = LayerPruning::new(1).prune(model.clone(), &calibration(), &CutOptions::default());
        match (structure.layers_stay, folder.as_str()) {
            (Some(why), _) => assert!(cut.unwrap_err().to_string().contains(why), "{folder}"),
            // A norm over the residual stream behind each branch is lost with the block.
            (None, "opt-post") => assert!(cut.is_ok()),
            (None, _) => {
                let cut = cut.unwrap();
                let expected = logits(&masked(model, &cut.report.kept), &tokens);
                relative(&folder, "blocks", &logits(&cut.model, &tokens), &expected);
            }
        }
    }
    assert_eq!(
        lost.into_iter().collect::<Vec<_>>(),
        ["Channels", "ExpertChannels", "Heads", "SharedExpertChannels"]
    );
}

/// Experts that are narrower, and differently so block by block, come back from folders.
#[test]
fn pruned_mixtures_come_back_from_folders() {
    for folder in ["mixtral", "qwen2_moe", "qwen3_moe-mixed", "gpt_oss", "gemma4_text-moe", "qwen3_5_text"] {
        let (model, tokens) = (architecture(folder), rows_of(folder));
        for layers in [LayerRange::All, LayerRange::Between { start: 1, end: 2 }] {
            let mut pruning = BlockPruning::new(Criterion::L2, 0.5);
            pruning.ratio = Plan::uniform(0.5).with_override("self_attn", 0.0).unwrap();
            pruning.layers = layers;
            let pruned = pruning.prune(model.clone(), None, &CutOptions::default()).unwrap();
            let record = PruningRecord::new(model.config().clone(), &pruning, &pruned.report).unwrap();
            let source = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
            for format in [SaveFormat::AsIs, SaveFormat::HuggingFace(ExportOptions::new(FloatType::F32))] {
                let place = tempfile::tempdir().unwrap();
                save_pruned(&pruned.model, &record, &source, &format, place.path()).unwrap();
                let options = LoadOptions::default().in_f32();
                let (again, _, read) = load_pruned(place.path(), &options, &Device::flex()).unwrap();
                assert_eq!(read, record, "{folder}");
                let expected = logits(&pruned.model, &tokens);
                assert_eq!(logits(&again, &tokens), expected, "{folder}, {layers:?}, {format:?}");
            }
        }
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
