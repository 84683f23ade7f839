//! Side blocks that are dropped, and side blocks that start from the backbone's weights.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc};

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::Tensor,
};
use kiln_models::{
    CausalLm, Decoder, GenerateOptions, Recompute, Slots, TokenBatch, Windows, families::LinearRole, generate,
};
use kiln_quant_core::{Projection, trained_values};
use kiln_side_tuning::{GateShape, HeadMix, HiddenCache, SideConfig, SideTuned, StatePrecision};
use kiln_testkit::{assert_close, ids, max_difference, read, testdata};

use crate::common::{Base, embedded, load, next_token_gradients};

const IDS: [u32; 12] = [5, 900, 17, 33, 2000, 8, 8, 450, 1023, 77, 6, 300];

fn logits<M: CausalLm>(model: &M) -> Vec<f32> {
    let tokens = TokenBatch::new(&[IDS.to_vec()]).unwrap();
    read(model.forward(&model.context(&tokens, None).unwrap()))
}

fn filled<const D: usize>(parameter: &Param<Tensor<D>>, value: f32) -> Param<Tensor<D>> {
    Param::from_tensor(parameter.val() * 0.0 + value)
}

/// `model` with side blocks that leave the side's state as it is.
fn passing(mut model: SideTuned<Base>, blocks: &[usize]) -> SideTuned<Base> {
    for &index in blocks {
        model.side.gates[index].gamma = filled(&model.side.gates[index].gamma, 1e4);
        for role in [LinearRole::Output, LinearRole::Down] {
            let linear = model.side.blocks[index].linear_mut(role).unwrap();
            linear.weight = filled(&linear.weight, 0.0);
        }
    }
    model
}

#[test]
fn a_dropped_block_passes_the_sides_state() {
    for (config, dropped) in [
        (SideConfig::qst().with_mix(HeadMix::Raw { init: 0.5 }, GateShape::Scalar), vec![1, 2]),
        (SideConfig::lst(), vec![3, 0]),
        (SideConfig::lst(), vec![]),
    ] {
        let model = SideTuned::new(embedded(), &config.clone().with_dropped(dropped.clone()), 7).unwrap();
        let all = passing(SideTuned::new(embedded(), &config, 7).unwrap(), &dropped);
        let expected = logits(&all);
        assert_close("logits", &logits(&model), &expected, 1e-5);
        assert_eq!(model.side.blocks.len(), 4 - dropped.len());
        let counts = model.config().parameter_counts(model.backbone().config()).unwrap();
        assert_eq!(trained_values(&model.clone().train()), counts.total());

        // Block by block again in the backward pass, with keys and values of tokens before, from the disk, and read again.
        let trained = model.clone().train();
        let [plain, again] =
            [Recompute::None, Recompute::Block].map(|how| next_token_gradients(&trained, &IDS, how));
        assert!((plain.0 - again.0).abs() < 1e-6 && plain.1.len() == again.1.len());
        for (name, values) in &plain.1 {
            assert!(max_difference(values, &again.1[name]) < 1e-6, "{name}");
        }
        let options = GenerateOptions::new(6);
        let next = |model: &SideTuned<Base>| generate(model, &IDS, &options).unwrap();
        assert_eq!(next(&model), next(&all));
        let folder = tempfile::tempdir().unwrap();
        let cache = HiddenCache::open(&model, folder.path().join("cache"), 1 << 30, StatePrecision::F32);
        let cached = model.clone().with_hidden_cache(Arc::new(cache.unwrap()));
        assert_eq!([logits(&cached), logits(&cached)], [logits(&model), logits(&model)]);
        model.save(folder.path().join("side")).unwrap();
        let loaded = SideTuned::load(embedded(), folder.path().join("side")).unwrap();
        assert_eq!(logits(&loaded), logits(&model));
    }
}

#[test]
fn blocks_that_cannot_be_dropped_are_refused() {
    for dropped in [vec![4], vec![1, 1], vec![0, 1, 2, 3]] {
        let config = SideConfig::lst().with_dropped(dropped);
        let error = SideTuned::new(embedded(), &config, 0).unwrap_err().to_string();
        assert!(error.contains("dropped") && error.contains("0 to 3"), "{error}");
    }
}

fn windows() -> Windows {
    let ids: Vec<u32> = ids("shift_test_moby").into_iter().map(|id| id % 250).collect();
    Windows::leading(&ids, 16, 3).unwrap()
}

/// Where each column of `part` stands in `whole`, both `[rows, columns]` with equal rows.
fn places(part: &[f32], whole: &[f32], rows: usize) -> Vec<usize> {
    let column = |values: &[f32], at: usize| -> Vec<f32> {
        values.chunks(values.len() / rows).map(|row| row[at]).collect()
    };
    let all: Vec<Vec<f32>> = (0..whole.len() / rows).map(|at| column(whole, at)).collect();
    (0..part.len() / rows)
        .map(|at| all.iter().position(|other| *other == column(part, at)).expect("a column of the backbone"))
        .collect()
}

#[test]
fn as_wide_as_the_backbone_the_side_blocks_are_the_backbones() {
    for base in [load(testdata("models/tiny-llama"), None), load(testdata("tiny/qwen2-tied-f32"), None)] {
        let config = SideConfig::lst().with_reduction(1).with_dropped([0]);
        let model = SideTuned::new(base, &config, 0).unwrap().with_pruned_start(&windows()).unwrap();
        for (side, block) in model.side.blocks.iter().zip(&model.backbone().blocks[1..]) {
            for ((path, mine), (_, other)) in side.linears().zip(block.linears()) {
                assert_eq!(read(mine.weight.val()), read(other.weight()), "{path}");
                let biases = (mine.bias.as_ref().map(|bias| read(bias.val())), other.bias().map(read));
                assert_eq!(biases.0.is_some(), biases.1.is_some(), "{path}");
                assert_eq!(biases.0, biases.1, "{path}");
            }
        }
        let [mine, other] = [&model.side.norm, &model.backbone().final_norm];
        assert_eq!(read(mine.weight.as_ref().unwrap().val()), read(other.weight.as_ref().unwrap().val()));
    }
}

/// Squared gradients, mean over the windows, of the backbone's linears, `[d_output, d_input]`.
fn fisher(base: &Base) -> BTreeMap<String, Vec<f64>> {
    let dense: Decoder<Linear> = base
        .clone()
        .try_map(|_, slot| {
            let bias = slot.bias().map(Param::from_tensor);
            Ok::<_, Infallible>(Linear { weight: Param::from_tensor(slot.weight()), bias })
        })
        .unwrap();
    let mut sums: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for window in windows().as_slice() {
        let (_, gradients) = next_token_gradients(&dense.clone().train(), window, Recompute::None);
        for (name, values) in gradients.into_iter().filter(|(name, _)| name.ends_with("proj.weight")) {
            let sum = sums.entry(name).or_insert_with(|| vec![0.0; values.len()]);
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(value).powi(2));
        }
    }
    sums
}

/// The chosen channels have the highest scores.
fn assert_highest(what: &str, chosen: &[usize], scores: &[f64]) {
    let least = chosen.iter().map(|at| scores[*at]).fold(f64::INFINITY, f64::min);
    let others = (0..scores.len()).filter(|at| !chosen.contains(at));
    let most = others.map(|at| scores[at]).fold(0.0, f64::max);
    assert!(least >= most, "{what}: {least} of what stays, {most} of what goes");
}

#[test]
fn the_channels_of_most_fisher_information_stay() {
    let base = load(testdata("models/tiny-llama"), None);
    let config = base.config().clone();
    let model = SideTuned::new(base.clone(), &SideConfig::lst().with_reduction(4), 0)
        .unwrap()
        .with_pruned_start(&windows())
        .unwrap();
    let side = model.side.model_config().clone();
    let fisher = fisher(&base);
    let (width, inner) = (config.hidden_size, config.intermediate_size);
    // By output and by input, of `[d_output, d_input]`.
    let sums = |index: usize, name: &str| -> [Vec<f64>; 2] {
        let suffix = format!(".{index}.{name}.weight");
        let (name, values) = fisher.iter().find(|(name, _)| name.ends_with(&suffix)).expect(&suffix);
        let inputs = if name.contains("down_proj") { inner } else { width };
        let outputs = values.chunks(inputs).map(|row| row.iter().sum()).collect();
        let of = |at: usize| values.chunks(inputs).map(|row| row[at]).sum();
        [outputs, (0..inputs).map(of).collect()]
    };
    let mut of_stream = vec![0.0; width];
    for index in 0..config.num_hidden_layers {
        for (name, axis) in [
            ("self_attn.q_proj", 1),
            ("self_attn.k_proj", 1),
            ("self_attn.v_proj", 1),
            ("self_attn.o_proj", 0),
            ("mlp.gate_proj", 1),
            ("mlp.up_proj", 1),
            ("mlp.down_proj", 0),
        ] {
            let found = &sums(index, name)[axis];
            of_stream.iter_mut().zip(found).for_each(|(sum, more)| *sum += more);
        }
    }
    let weights = |index: usize, role: LinearRole| {
        let whole = read(model.backbone().blocks[index].linear(role).unwrap().weight());
        (read(model.side.blocks[index].linear(role).unwrap().weight.val()), whole)
    };
    let stream: Vec<usize> = {
        let mut order: Vec<usize> = (0..width).collect();
        order.sort_by(|a, b| of_stream[*b].total_cmp(&of_stream[*a]));
        order.truncate(side.hidden_size);
        order.sort_unstable();
        order
    };
    let (turned, head) = (config.head_dim / 2, side.head_dim);
    for index in 0..config.num_hidden_layers {
        // What reads the stream: rows of the channels that stay, so that columns tell the others.
        let of_stream = |whole: &[f32]| -> Vec<f32> {
            let columns = whole.len() / width;
            stream.iter().flat_map(|at| whole[at * columns..][..columns].to_vec()).collect()
        };
        let chosen = |role| {
            let (mine, whole) = weights(index, role);
            places(&mine, &of_stream(&whole), side.hidden_size)
        };
        let mlp = chosen(LinearRole::Up);
        assert_eq!(mlp, chosen(LinearRole::Gate));
        let [gate, up, down] =
            ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"].map(|name| sums(index, name));
        let scores: Vec<f64> = (0..inner).map(|at| gate[0][at] + up[0][at] + down[1][at]).collect();
        assert_highest("mlp", &mlp, &scores);

        let [queries, keys, values] = [LinearRole::Query, LinearRole::Key, LinearRole::Value].map(chosen);
        let [q, k] = ["self_attn.q_proj", "self_attn.k_proj"].map(|name| sums(index, name)[0].clone());
        let group = config.num_attention_heads / config.num_key_value_heads;
        for (key_head, of_head) in keys.chunks(head).enumerate() {
            let first = key_head * config.head_dim;
            let of_head: Vec<usize> = of_head.iter().map(|at| at - first).collect();
            let pairs = &of_head[..head / 2];
            let partners: Vec<usize> = pairs.iter().map(|at| at + turned).collect();
            assert_eq!(partners, of_head[head / 2..], "pairs that are turned together");
            let score = |at: usize| {
                let heads = (0..group).map(|head| (key_head * group + head) * config.head_dim);
                [at, at + turned]
                    .iter()
                    .map(|at| k[first + at] + heads.clone().map(|head| q[head + at]).sum::<f64>())
                    .sum()
            };
            assert_highest("pairs", pairs, &(0..turned).map(score).collect::<Vec<_>>());
            for head_of_group in 0..group {
                let query_head = key_head * group + head_of_group;
                let expected: Vec<usize> =
                    of_head.iter().map(|at| query_head * config.head_dim + at).collect();
                assert_eq!(queries[query_head * head..][..head], expected);
                // The output reads what the values give.
                let (mine, whole) = weights(index, LinearRole::Output);
                let column = |values: &[f32], at: usize, columns: usize, picks: &[usize]| -> Vec<f32> {
                    picks.iter().map(|pick| values[at * columns + pick]).collect()
                };
                for (at, value) in values[key_head * head..][..head].iter().enumerate() {
                    let from = query_head * config.head_dim + (value - first);
                    let side_columns: Vec<usize> = (0..side.hidden_size).collect();
                    assert_eq!(
                        column(&mine, query_head * head + at, side.hidden_size, &side_columns),
                        column(&whole, from, width, &stream),
                    );
                }
            }
        }
    }
}

#[test]
fn backbones_that_cannot_be_cut_so_are_named() {
    let base = load(testdata("arch/phi3"), None);
    let error = SideTuned::new(base, &SideConfig::lst().with_reduction(2), 0)
        .unwrap()
        .with_pruned_start(&Windows::leading(&[1, 2, 3, 4, 5, 6, 7, 8], 4, 2).unwrap())
        .unwrap_err()
        .to_string();
    assert!(error.contains("qkv_proj"), "{error}");
    let fewer = SideConfig::lst().with_reduction(4).with_heads(3);
    let error = SideTuned::new(embedded(), &fewer, 0).unwrap().with_pruned_start(&windows()).unwrap_err();
    assert!(error.to_string().contains("heads"), "{error}");
}
