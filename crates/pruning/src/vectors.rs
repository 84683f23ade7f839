//! The method specification's vectors: `testdata/vectors/pruning_*.json`.

use kiln_models::config::{LayerShape, ModelConfig};
use serde_json::{Value, json};

use crate::{
    Aggregation, Axis, Criterion, GqaFold, HeadRounding, InputStatistics, Matrix, bias_of, block_influence,
    head_sums, removed_channels, removed_heads, removed_mlp_channels, selection::lowest, standardise,
};

/// Values are exact or rounded to 10 digits.
const TOLERANCE: f64 = 1e-6;

pub(crate) fn vectors(name: &str) -> Value {
    let path = kiln_testkit::testdata(&format!("vectors/pruning_{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

pub(crate) fn list(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
}

/// Rows of a matrix.
pub(crate) fn rows(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(list).collect()
}

/// `[d_input, d_output]` of a checkpoint's `[out, in]`.
fn transposed(rows: &[Vec<f64>]) -> Vec<f32> {
    (0..rows[0].len()).flat_map(|input| rows.iter().map(move |row| row[input] as f32)).collect()
}

fn indices(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as usize).collect()
}

#[track_caller]
fn assert_near(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let near = (found - expected).abs() <= TOLERANCE * expected.abs().max(1e-3);
        assert!(near, "{what}: {found} instead of {expected}");
    }
}

const ATTENTION: [(&str, Axis); 4] =
    [("q_proj", Axis::Output), ("k_proj", Axis::Output), ("v_proj", Axis::Output), ("o_proj", Axis::Input)];
const MLP: [(&str, Axis); 3] =
    [("gate_proj", Axis::Output), ("up_proj", Axis::Output), ("down_proj", Axis::Input)];

/// Weight, mean gradient and mean square of the samples' gradients of one linear.
fn matrix(vectors: &Value, name: &str) -> Matrix {
    let weight = rows(&vectors["weights"][name]);
    let samples: Vec<Vec<f32>> = match vectors["per_sample_grads"].as_array() {
        Some(samples) => samples.iter().map(|sample| transposed(&rows(&sample[name]))).collect(),
        None => vec![transposed(&rows(&vectors["grad"][name]))],
    };
    let count = samples.len() as f32;
    let mean = |f: fn(f32) -> f32| {
        (0..samples[0].len()).map(|i| samples.iter().map(|s| f(s[i])).sum::<f32>() / count).collect()
    };
    Matrix {
        d_output: weight.len(),
        weight: transposed(&weight),
        gradient: mean(|g| g),
        fisher: mean(|g| g * g),
    }
}

#[test]
fn scores_of_every_criterion_and_aggregation_are_the_specification_s() {
    let vectors = vectors("importance");
    let criteria = [
        ("l1", Criterion::L1),
        ("l2", Criterion::L2),
        ("vectorize", Criterion::TaylorVector),
        ("param_first", Criterion::TaylorFirst),
        ("param_second", Criterion::TaylorSecond),
        ("param_mix", Criterion::TaylorMixed),
    ];
    let aggregations = [
        ("sum", Aggregation::Sum),
        ("mean", Aggregation::Mean),
        ("max", Aggregation::Max),
        ("prod", Aggregation::Prod),
        ("first", Aggregation::First),
        ("last", Aggregation::Last),
    ];
    for (name, criterion) in criteria {
        let expected = &vectors["expected"][name];
        let scores = |linears: &[(&str, Axis)], group: &str| -> Vec<Vec<f64>> {
            let one = |(linear, axis): &(&str, Axis)| {
                let found = matrix(&vectors, linear).scores(criterion, *axis);
                assert_near(&format!("{name} {linear}"), &found, &list(&expected[group][*linear]));
                found
            };
            linears.iter().map(one).collect()
        };
        let (attention, mlp) = (scores(&ATTENTION, "attn_per_matrix"), scores(&MLP, "mlp_per_matrix"));
        for (reduction, aggregation) in aggregations {
            let (what, expected) = (format!("{name} {reduction}"), &expected["reductions"][reduction]);
            let (channels, mlp) = (aggregation.apply(&attention), aggregation.apply(&mlp));
            let heads = head_sums(&channels, 2);
            assert_near(&what, &channels, &list(&expected["attn_channel"]));
            assert_near(&what, &heads, &list(&expected["head"]));
            assert_near(&what, &mlp, &list(&expected["mlp_channel"]));
            let heads = lowest(&heads, removed_heads(2, 2, 0.5, HeadRounding::Floor));
            assert_eq!(heads, indices(&expected["prune_heads_ratio_0_5"]), "{what}");
            for (ratio, key) in [(0.25, "prune_mlp_ratio_0_25"), (0.5, "prune_mlp_ratio_0_5")] {
                let removed = lowest(&mlp, removed_channels(4, ratio));
                assert_eq!(removed, indices(&expected[key]), "{what} {ratio}");
            }
        }
    }
}

#[test]
fn grouped_queries_go_with_their_key_value_head() {
    let vectors = vectors("gqa");
    let scores: Vec<Vec<f64>> = ATTENTION
        .iter()
        .map(|(name, axis)| matrix(&vectors, name).scores(Criterion::TaylorFirst, *axis))
        .collect();
    for (fold, importance, pruned) in [
        (GqaFold::Grouped, "kv_group_importance", "pruned_kv_heads"),
        (GqaFold::Modulo, "compat_modulo_fold", "compat_pruned_kv_heads"),
    ] {
        let folded: Vec<Vec<f64>> = [
            fold.apply(&scores[0], 2, 2),
            scores[1].clone(),
            scores[2].clone(),
            fold.apply(&scores[3], 2, 2),
        ]
        .into();
        let groups = head_sums(&Aggregation::Sum.apply(&folded), 2);
        assert_near(importance, &groups, &list(&vectors[importance]));
        let removed = removed_heads(2, 2, 0.5, HeadRounding::Floor);
        assert_eq!(lowest(&groups, removed), indices(&vectors[pruned]), "{pruned}");
    }
}

#[test]
fn counts_are_the_published_ones() {
    for row in vectors("counts")["rows"].as_array().unwrap() {
        let size = |key: &str| row[key].as_u64().unwrap() as usize;
        let (heads, kv_heads, channels) = (size("heads"), size("kv_heads"), size("intermediate"));
        let text = json!({
            "model_type": "llama",
            "vocab_size": size("vocab"),
            "hidden_size": size("hidden"),
            "intermediate_size": channels,
            "num_hidden_layers": size("layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": size("head_dim"),
            "tie_word_embeddings": row["tied_embeddings"],
        });
        let mut config = ModelConfig::from_json(&text.to_string()).unwrap();
        assert_eq!(config.parameters(), row["params_before"].as_u64().unwrap(), "{row}");
        let ratio = row["ratio"].as_f64().unwrap();
        let kept = kv_heads - removed_heads(kv_heads, config.head_dim, ratio, HeadRounding::Floor);
        let shape = LayerShape {
            num_attention_heads: kept * (heads / kv_heads),
            num_key_value_heads: kept,
            intermediate_size: channels - removed_mlp_channels(channels, ratio, 1),
            ..config.layer(0)
        };
        assert_eq!(shape.num_attention_heads, size("heads_kept"), "{row}");
        assert_eq!(shape.num_key_value_heads, size("kv_heads_kept"), "{row}");
        assert_eq!(shape.intermediate_size, size("intermediate_kept"), "{row}");
        let pruned = size("prune_layer_start")..size("prune_layer_end_exclusive");
        let shapes = (0..config.num_hidden_layers)
            .map(|layer| if pruned.contains(&layer) { shape } else { config.layer(layer) });
        config.set_layers(shapes.collect());
        assert_eq!(config.parameters(), row["params_after"].as_u64().unwrap(), "{row}");
    }
}

#[test]
fn criteria_of_activations_are_the_specification_s() {
    let vectors = vectors("alternatives");
    let x = rows(&vectors["X"]);
    let mut inputs = InputStatistics::default();
    inputs.add(&x.iter().flatten().map(|&v| v as f32).collect::<Vec<_>>(), 4);
    let weight = rows(&vectors["W_down"]);
    let matrix = Matrix { d_output: 4, weight: transposed(&weight), ..Matrix::default() };
    let scores = |criterion| matrix.input_scores(criterion, &inputs);
    assert_near("wanda", &scores(Criterion::Wanda), &list(&vectors["wanda_sp"]));
    assert_near("ifv", &scores(Criterion::FlapIfv), &list(&vectors["ifv"]));
    assert_near("wifv", &scores(Criterion::FlapWifv), &list(&vectors["wifv"]));
    let removed = lowest(&scores(Criterion::FlapWifv), 1);
    assert_eq!(removed, [vectors["pruned_channel_by_wifv"].as_u64().unwrap() as usize]);
    let bias = bias_of(&matrix, &removed, &inputs.mean);
    assert_near(
        "bias",
        &bias.iter().map(|&b| f64::from(b)).collect::<Vec<_>>(),
        &list(&vectors["bias_compensation"]),
    );
    // What the channel gave beyond the bias has mean zero.
    for (output, expected) in list(&vectors["mean_residual_after_bias"]).into_iter().enumerate() {
        let gave = x.iter().map(|token| token[removed[0]] * weight[output][removed[0]]).sum::<f64>();
        assert!((gave / x.len() as f64 - f64::from(bias[output]) - expected).abs() < TOLERANCE);
    }
    let stream = |key: &str| rows(&vectors[key]).concat().iter().map(|&v| v as f32).collect::<Vec<_>>();
    let influence = block_influence(&stream("h_in"), &stream("h_out"), 4);
    assert_near("influence", &[influence], &[vectors["block_influence"].as_f64().unwrap()]);
    let expected = rows(&vectors["flap_standardised"]);
    for (metric, expected) in rows(&vectors["flap_metric"]).iter().zip(&expected) {
        assert_near("standardised", &standardise(metric), expected);
    }
}
