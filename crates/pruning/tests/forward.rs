//! A block's attention and MLP, dense and cut, against `testdata/vectors/pruning_forward.json`.

use burn::tensor::{Int, activation::softmax};
use kiln_models::{
    CausalLm, DenseEmbedding, Embedding, Llama, RmsNorm,
    config::{LlamaConfig, RopeConfig, RopeScaling},
    llama::{LlamaAttention, LlamaBlock, LlamaMlp, LlamaModel},
};
use kiln_pruning::CutOptions;
use kiln_quant_core::fused;
use kiln_testkit::assert_close;
use serde_json::Value;

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
fn model() -> Llama<QuantLinear> {
    let weights = &vectors("importance")["weights"];
    let device = Device::flex();
    let linear = |name: &str| {
        QuantLinear::Dense(Linear { weight: frozen(matrix(&weights[name]).transpose()), bias: None })
    };
    let norm = || RmsNorm { weight: frozen(Tensor::ones([4], &device)), eps: 1e-6 };
    let block = LlamaBlock {
        input_layernorm: norm(),
        self_attn: LlamaAttention {
            q_proj: linear("q_proj"),
            k_proj: linear("k_proj"),
            v_proj: linear("v_proj"),
            o_proj: linear("o_proj"),
            q_norm: None,
            k_norm: None,
        },
        post_attention_layernorm: norm(),
        mlp: LlamaMlp {
            gate_proj: linear("gate_proj"),
            up_proj: linear("up_proj"),
            down_proj: linear("down_proj"),
        },
    };
    let embed_tokens = Embedding::Dense(DenseEmbedding { weight: frozen(Tensor::ones([8, 4], &device)) });
    let config = LlamaConfig {
        vocab_size: 8,
        hidden_size: 4,
        intermediate_size: 4,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 2,
        head_dim: 2,
        max_position_embeddings: 16,
        rms_norm_eps: 1e-6,
        rope: RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default },
        sliding_window: vec![None],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: true,
        layer_shapes: Vec::new(),
    };
    Llama::from_parts(LlamaModel { embed_tokens, layers: vec![block], norm: norm() }, None, config).unwrap()
}

/// Attention by its definition, on the model's own weights and rotary tables.
fn attention(model: &Llama<QuantLinear>, x: Tensor<2>) -> Tensor<2> {
    let [length, _] = x.dims();
    let block = &model.model.layers[0].self_attn;
    let heads = model.config().layer(0).num_attention_heads;
    let context = model.context(&TokenBatch::new(&[vec![0; length]]).unwrap(), None);
    let [cos, sin] = context.rotary.clone().unwrap();
    let split = |y: Tensor<2>| y.reshape([1, length, heads, 2]);
    let q = fused::rotate(split(block.q_proj.forward(x.clone())), cos.clone(), sin.clone());
    let k = fused::rotate(split(block.k_proj.forward(x.clone())), cos, sin);
    let v = split(block.v_proj.forward(x));
    let [q, k, v] = [q, k, v].map(|t| t.swap_dims(1, 2));
    let scores = q.matmul(k.transpose()).div_scalar(2f32.sqrt());
    let place = Tensor::<1, Int>::arange(0..length as i64, &Device::flex());
    let future = place.clone().unsqueeze_dim::<2>(1).lower(place.unsqueeze::<2>());
    let scores = scores.mask_fill(future.unsqueeze(), f32::NEG_INFINITY);
    let y = softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([length, heads * 2]);
    block.o_proj.forward(y)
}

fn mlp(model: &Llama<QuantLinear>, x: Tensor<2>) -> Tensor<2> {
    let block = &model.model.layers[0].mlp;
    block.down_proj.forward(fused::swiglu(block.gate_proj.forward(x.clone()), block.up_proj.forward(x)))
}

#[test]
fn attention_and_mlp_are_the_specification_s_before_and_after() {
    let vectors = vectors("forward");
    let check = |model: &Llama<QuantLinear>, state: &str| {
        let x = matrix(&vectors["x"]);
        for (part, found) in [("mlp", mlp(model, x.clone())), ("attn", attention(model, x))] {
            let key = format!("{part}_{state}");
            assert_close(&key, &read(found), &read(matrix(&vectors[&key])), TOLERANCE);
        }
    };
    let model = model();
    check(&model, "dense");
    let model = AnyModel::Llama(model);
    let mut kept = Kept::everything(&Structure::of(model.config()));
    let removed = |key: &str| -> Vec<usize> { serde_json::from_value(vectors[key].clone()).unwrap() };
    kept.layers[0].channels.retain(|channel| !removed("pruned_mlp_channels").contains(channel));
    kept.layers[0].heads.retain(|head| !removed("pruned_heads").contains(head));
    let (pruned, requantized) = kiln_pruning::apply(model, &kept, &CutOptions::default()).unwrap();
    assert!(requantized.is_empty());
    pruned.for_each_slot(|path, slot| {
        let name = path.rsplit('.').next().unwrap();
        let expected: [usize; 2] = serde_json::from_value(vectors["pruned_shapes"][name].clone()).unwrap();
        assert_eq!(slot.shape(), [expected[1], expected[0]], "{path}");
    });
    let AnyModel::Llama(pruned) = pruned else { panic!("a LLaMA") };
    check(&pruned, "pruned");
}
