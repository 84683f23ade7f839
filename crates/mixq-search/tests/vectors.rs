//! Reference values of the published method.

use kiln_mixq_search::{
    Choice, Cost, Granularity, MemoryAxis, MemoryModel, PublishedFormat, Ridge, SearchSpace, Setting, Slot,
    Surrogate, SurrogateKind, Unit, hypervolume, pareto_front,
};

const RELATIVE: f64 = 1e-6;

fn vector(name: &str) -> serde_json::Value {
    let path = format!("{}/../../testdata/vectors/{name}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn format(name: &str) -> PublishedFormat {
    match name {
        "bf16" => PublishedFormat::Half,
        "nf4" => PublishedFormat::Nf4,
        "nf4_dq" => PublishedFormat::Nf4Double,
        "int8_row" => PublishedFormat::Int8Row,
        "g128_4" => PublishedFormat::Affine128 { bits: 4 },
        "g128_8" => PublishedFormat::Affine128 { bits: 8 },
        _ => panic!("unknown format {name}"),
    }
}

/// LLaMA-7B's linears, `(d_input, d_output)`: 32 heads of 128, 11008 channels, kept as LLM-Pruner's counts leave them.
fn linears(heads: u64, channels: u64) -> [(u64, u64); 7] {
    let (hidden, attention) = (4096, heads * 128);
    [
        (hidden, attention),
        (hidden, attention),
        (hidden, attention),
        (attention, hidden),
        (hidden, channels),
        (hidden, channels),
        (channels, hidden),
    ]
}

const NAMES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// Layers 4 to 29 are pruned and searched; all others are frozen at 16 bits.
fn llama(ratio: f64, formats: &[(&str, PublishedFormat)]) -> SearchSpace {
    let (heads, channels) = if ratio == 0.38 { (20, 6824) } else { (12, 4128) };
    let mut lora = 0;
    let units = (0..32)
        .map(|layer| {
            let searched = (4..30).contains(&layer);
            let shapes = if searched { linears(heads, channels) } else { linears(32, 11008) };
            lora += shapes.iter().map(|(i, o)| 8 * (i + o)).sum::<u64>();
            let slots: Vec<Slot> = NAMES
                .iter()
                .zip(shapes)
                .map(|(name, (i, o))| {
                    Slot::new(format!("model.layers.{layer}.{name}"), i as usize, o as usize)
                })
                .collect();
            let bytes = |format: PublishedFormat| shapes.iter().map(|(i, o)| format.bytes(*i, *o)).sum();
            let choice = |(name, format): &(&str, PublishedFormat)| Choice {
                setting: Setting::scheme(*name),
                cost: Cost::storage(bytes(*format)),
            };
            let frozen = [("dense", PublishedFormat::Half)];
            Unit {
                name: Granularity::Layer.unit(&slots[0].path).into(),
                paths: slots.into_iter().map(|slot| slot.path).collect(),
                choices: if searched { formats } else { &frozen[..] }.iter().map(choice).collect(),
            }
        })
        .collect();
    // Embedding and head of 32,000 tokens, 65 norms.
    let fixed = 2 * (2 * 32_000 * 4096 + 65 * 4096);
    let memory = MemoryModel::new(fixed).with_trained(lora, 16).with_axis(MemoryAxis::Static);
    SearchSpace::new(units, memory).unwrap()
}

#[test]
fn static_memory_of_pruned_llama_7b_in_every_format_and_configuration() {
    let file = vector("automixq_memory.json");
    let trial2: Vec<u64> = serde_json::from_value(file["trial2_bits"].clone()).unwrap();
    let rows = file["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 26);
    for row in rows {
        let text = |field: &str| row[field].as_str().unwrap();
        let (four, eight) = (format(text("fmt4")), format(text("fmt8")));
        let both = [("four", four), ("eight", eight)];
        let formats = if text("config") == "none_16bit" { &both[..1] } else { &both[..] };
        let space = llama(row["ratio"].as_f64().unwrap(), formats);
        let config = match text("config") {
            "all4" | "none_16bit" => space.lowest(),
            "all8" => space.highest(),
            "trial2" => {
                let mut config = space.lowest();
                for (layer, &bits) in trial2.iter().enumerate() {
                    config.0[4 + layer] = u8::from(bits == 8);
                }
                config
            }
            other => panic!("unknown configuration {other}"),
        };
        let report = space.report(&config);
        let fixed = report.storage - report.searched;
        for (field, found) in [
            ("fixed_16bit_bytes", fixed),
            ("base_linear_bytes", report.searched),
            ("lora_train_bytes", report.adapters),
            ("lora_params", report.adapters / 16),
            ("total_static_bytes", report.total),
        ] {
            assert_eq!(Some(found), row[field].as_u64(), "{field} of {row}");
        }
        assert_eq!(space.bytes(&config), report.total);
    }
}

#[test]
fn reference_trials_have_the_reference_line_and_front() {
    let file = vector("automixq_reference_trials.json");
    let bits: Vec<Vec<f64>> = serde_json::from_value(file["bits"].clone()).unwrap();
    let list = |name: &str| -> Vec<f64> { serde_json::from_value(file[name].clone()).unwrap() };
    let (memory, score) = (list("memory_gib"), list("score"));

    let eights: Vec<Vec<f64>> =
        bits.iter().map(|bits| vec![bits.iter().filter(|&&bits| bits == 8.0).count() as f64]).collect();
    assert_eq!(eights.concat(), list("n_8bit"));
    let line = Ridge::fit(&eights, &memory, 1e-9).unwrap();
    let expected = |name: &str| file["least_squares_memory"][name].as_f64().unwrap();
    let close = |found: f64, expected: f64| assert!((found - expected).abs() <= RELATIVE * expected.abs());
    close(line.weights()[0], expected("slope_gib_per_8bit_layer"));
    close(line.predict(&[0.0]).mean, expected("intercept_gib"));
    let residual = |(x, y): (&Vec<f64>, &f64)| (line.predict(x).mean - y).abs();
    close(eights.iter().zip(&memory).map(residual).fold(0.0, f64::max), expected("max_abs_residual"));

    let points: Vec<[f64; 2]> = memory.iter().zip(&score).map(|(m, s)| [*m, -s]).collect();
    assert_eq!(pareto_front(&points), [2, 5]);
    assert!(hypervolume(&points, &[20.0, -0.44]) > 0.0);
}

#[test]
fn no_surrogate_finds_a_signal_in_the_reference_scores() {
    // The specification: the nine scores are noise. A surrogate that predicted left-out trials much better than their
    // mean would be reading something that isn't there.
    let file = vector("automixq_reference_trials.json");
    let bits: Vec<Vec<f64>> = serde_json::from_value(file["bits"].clone()).unwrap();
    let x: Vec<Vec<f64>> =
        bits.iter().map(|bits| bits.iter().map(|bits| (bits - 4.0) / 4.0).collect()).collect();
    let score: Vec<f64> = serde_json::from_value(file["score"].clone()).unwrap();
    for kind in [SurrogateKind::Mlp, SurrogateKind::Ridge, SurrogateKind::Gp] {
        let (mut model_error, mut mean_error) = (0.0, 0.0);
        for out in 0..score.len() {
            let others: Vec<usize> = (0..score.len()).filter(|&i| i != out).collect();
            let train: Vec<Vec<f64>> = others.iter().map(|&i| x[i].clone()).collect();
            let y: Vec<f64> = others.iter().map(|&i| score[i]).collect();
            let mean = y.iter().sum::<f64>() / y.len() as f64;
            let model = kind.fit(&train, &y, 1).unwrap();
            model_error += (model.predict(&x[out]).mean - score[out]).powi(2);
            mean_error += (mean - score[out]).powi(2);
        }
        assert!(model_error > 0.5 * mean_error, "{kind:?}: {model_error} against {mean_error}");
    }
}
