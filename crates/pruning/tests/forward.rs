//! A block's attention and MLP, dense and cut, against `testdata/vectors/pruning_forward.json`.

use std::convert::Infallible;

use burn::tensor::{Int, activation::softmax};
use kiln_models::{
    Block, BlockPart, Decoder, DenseEmbedding, Embedding, Norm, PartShape,
    config::ModelConfig,
    families::{LinearRole, NormKind},
};
use kiln_pruning::CutOptions;
use kiln_quant_core::{
    Compute,
    fused::{self, RotaryPairs},
};
use kiln_testkit::assert_close;
use serde_json::{Value, json};

use super::*;

const TOLERANCE: f32 = 1e-5;

fn vectors(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(testdata(&format!("vectors/pruning_{name}.json"))).unwrap())
        .unwrap()
}

fn matrix(rows: &Value) -> Tensor<2> {
    let rows: Vec<Vec<f32>> = serde_json::from_value(rows.clone()).unwrap();
    let sizes = [rows.len(), rows[0].len()];
    Tensor::from_data(TensorData::new(rows.concat(), sizes), &Device::flex())
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor)
}

/// The vectors' block inside a model, whose embedding and norms nothing here reads.
fn model() -> Decoder<QuantLinear> {
    let weights = &vectors("importance")["weights"];
    let device = Device::flex();
    let linear = |name: &str| {
        QuantLinear::Dense(Linear { weight: frozen(matrix(&weights[name]).transpose()), bias: None })
    };
    let norm = || Norm {
        weight: Some(frozen(Tensor::ones([4], &device))),
        bias: None,
        eps: 1e-6,
        kind: NormKind::Rms,
    };
    let config = json!({
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&config.to_string()).unwrap();
    let block = Block::build(&config, 0, |name, shape| {
        Ok::<_, Infallible>(match shape {
            PartShape::Norm(_) => BlockPart::Norm(norm()),
            PartShape::Vector(..) | PartShape::DenseLinear(..) => unreachable!("LLaMA has none"),
            PartShape::Linear(..) => BlockPart::Linear(linear(name.rsplit('.').next().unwrap())),
        })
    });
    let embed_tokens = Embedding::Dense(DenseEmbedding { weight: frozen(Tensor::ones([8, 4], &device)) });
    Decoder::from_parts(config, embed_tokens, None, None, vec![block.unwrap()], norm(), None).unwrap()
}

/// Attention by its definition, on the model's own weights and rotary tables.
fn attention(model: &Decoder<QuantLinear>, x: Tensor<2>) -> Tensor<2> {
    let [length, _] = x.dims();
    let project = |role, x| model.blocks[0].linear(role).unwrap().forward(x);
    let heads = model.config().layer(0).num_attention_heads;
    let context = model.context(&TokenBatch::new(&[vec![0; length]]).unwrap(), None).unwrap();
    let [cos, sin] = context.rotary[0].clone();
    let split = |y: Tensor<2>| y.reshape([1, length, heads, 2]);
    let q = fused::rotate(
        split(project(LinearRole::Query, x.clone())),
        cos.clone(),
        sin.clone(),
        RotaryPairs::Halves,
    );
    let k = fused::rotate(split(project(LinearRole::Key, x.clone())), cos, sin, RotaryPairs::Halves);
    let v = split(project(LinearRole::Value, x));
    let [q, k, v] = [q, k, v].map(|t| t.swap_dims(1, 2));
    let scores = q.matmul(k.transpose()).div_scalar(2f32.sqrt());
    let place = Tensor::<1, Int>::arange(0..length as i64, &Device::flex());
    let future = place.clone().unsqueeze_dim::<2>(1).lower(place.unsqueeze::<2>());
    let scores = scores.mask_fill(future.unsqueeze(), f32::NEG_INFINITY);
    let y = softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([length, heads * 2]);
    project(LinearRole::Output, y)
}

fn mlp(model: &Decoder<QuantLinear>, x: Tensor<2>) -> Tensor<2> {
    let project = |role, x| model.blocks[0].linear(role).unwrap().forward(x);
    let inner = fused::swiglu(project(LinearRole::Gate, x.clone()), project(LinearRole::Up, x), Compute::F32);
    project(LinearRole::Down, inner)
}

#[test]
fn attention_and_mlp_are_the_specification_s_before_and_after() {
    let vectors = vectors("forward");
    let check = |model: &Decoder<QuantLinear>, state: &str| {
        let x = matrix(&vectors["x"]);
        for (part, found) in [("mlp", mlp(model, x.clone())), ("attn", attention(model, x))] {
            let key = format!("{part}_{state}");
            assert_close(&key, &read(found), &read(matrix(&vectors[&key])), TOLERANCE);
        }
    };
    let model = model();
    check(&model, "dense");
    let mut kept = Kept::everything(&Structure::of(model.config()));
    let removed = |key: &str| -> Vec<usize> { serde_json::from_value(vectors[key].clone()).unwrap() };
    kept.layers[0].channels.retain(|channel| !removed("pruned_mlp_channels").contains(channel));
    kept.layers[0].heads.retain(|head| !removed("pruned_heads").contains(head));
    let (pruned, requantized) = kiln_pruning::apply(model, &kept, &CutOptions::default()).unwrap();
    assert!(requantized.is_empty());
    for (path, slot) in pruned.slots() {
        let path = path.as_str();
        let name = path.rsplit('.').next().unwrap();
        let expected: [usize; 2] = serde_json::from_value(vectors["pruned_shapes"][name].clone()).unwrap();
        assert_eq!(slot.shape(), [expected[1], expected[0]], "{path}");
    }
    check(&pruned, "pruned");
}
