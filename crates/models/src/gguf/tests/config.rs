//! What metadata and tensors say about the model.

use super::*;

fn config(writer: &Writer) -> Result<ModelConfig> {
    open(writer)?.config()
}

#[test]
fn configuration_comes_from_keys_and_tensors() {
    let plain = config(&model("llama")).unwrap();
    let expected = ModelConfig {
        vocab_size: 4,
        hidden_size: 8,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: 64,
        norm_eps: 1e-6,
        rope: vec![crate::config::RopeConfig::plain(10_000.0)],
        layer_attention: vec![LayerAttention { sliding_window: None, rope: Some(0) }],
        tie_word_embeddings: true,
        ..ModelConfig::bare(Family::by_model_type("llama").unwrap())
    };
    assert_eq!(plain, expected);
    let bias = [0.0; 8];
    let qwen = model("qwen2")
        .floats("output.weight", &[4, 8], &[0.5; 32])
        .floats("blk.0.attn_q.bias", &[8], &bias)
        .floats("blk.0.attn_k.bias", &[4], &bias[..4]);
    let error = config(&qwen).unwrap_err().to_string();
    assert!(error.contains("v_proj.bias"), "{error}");
    let qwen = config(&qwen.floats("blk.0.attn_v.bias", &[4], &bias[..4])).unwrap();
    assert!(qwen.biases.qkv && !qwen.biases.o && !qwen.tie_word_embeddings);
    let qwen = model("qwen3")
        .u32("qwen3.attention.key_length", 16)
        .u32("qwen3.attention.value_length", 16)
        .u32("qwen3.attention.sliding_window", 32)
        .f32("qwen3.rope.freq_base", 1e6)
        .floats("blk.0.attn_q_norm.weight", &[16], &[1.0; 16])
        .floats("blk.0.attn_k_norm.weight", &[16], &[1.0; 16]);
    let qwen = config(&qwen).unwrap();
    assert_eq!((qwen.family.model_type, qwen.head_dim, qwen.rope[0].theta), ("qwen3", 16, 1e6));
    assert_eq!(qwen.sliding_windows(), [Some(32)]);
}

#[test]
fn every_fourth_block_of_smollm3_is_not_rotated() {
    let writer = (1..5).fold(model_of("smollm3", 5), |writer, block| {
        writer.floats(&format!("blk.{block}.attn_norm.weight"), &[8], &[1.0; 8])
    });
    let rope: Vec<_> = config(&writer).unwrap().layer_attention.iter().map(|layer| layer.rope).collect();
    assert_eq!(rope, [Some(0), Some(0), Some(0), None, Some(0)]);
}

#[test]
fn windows_are_those_that_a_file_lists() {
    let writer = (1..3).fold(model_of("cohere2", 3), |writer, block| {
        writer.floats(&format!("blk.{block}.attn_norm.weight"), &[8], &[1.0; 8])
    });
    let writer = writer.u32("cohere2.attention.sliding_window", 5);
    let writer = writer.f32("cohere2.attention.layer_norm_epsilon", 1e-5).f32("cohere2.logit_scale", 0.25);
    let windows = |writer: &Writer| config(writer).map(|config| config.sliding_windows());
    let [slides, sees] = [Some(5), None];
    assert_eq!(windows(&writer).unwrap(), [slides; 3]);
    let none = model("llama").u32("llama.attention.sliding_window", 0);
    assert_eq!(windows(&none).unwrap(), [None]);
    let key = "cohere2.attention.sliding_window_pattern";
    let listed = writer.clone().bools(key, &[false, true, false]);
    assert_eq!(windows(&listed).unwrap(), [sees, slides, sees]);
    // Of this family what doesn't slide isn't rotated.
    let rope: Vec<_> = config(&listed).unwrap().layer_attention.iter().map(|layer| layer.rope).collect();
    assert_eq!(rope, [None, Some(0), None]);
    assert_eq!(windows(&writer.clone().u32(key, 2)).unwrap(), [slides, sees, slides]);
    for wrong in [writer.clone().bools(key, &[true]), writer.clone().u32(key, 0), writer.bool(key, true)] {
        assert!(windows(&wrong).unwrap_err().to_string().contains("sliding_window_pattern"));
    }
}

#[test]
fn blocks_of_gemma_4_are_what_its_keys_say_of_each() {
    let key = |key: &str| format!("gemma4.{key}");
    let bare = model_of("gemma4", 2)
        .floats("blk.1.attn_norm.weight", &[8], &[1.0; 8])
        .u32(&key("attention.key_length"), 8)
        .u32(&key("attention.key_length_swa"), 4)
        .u32(&key("attention.sliding_window"), 5);
    let pattern = key("attention.sliding_window_pattern");
    let without_rope = bare.clone().bools(&pattern, &[true, false]);
    let rope = |factors: [f32; 4]| without_rope.clone().floats("rope_freqs.weight", &[4], &factors);
    let good = rope([1.0, 1e30, 1e30, 1e30]).f32(&key("final_logit_softcapping"), 0.0);
    let found = config(&good).unwrap();
    assert_eq!(found.sliding_windows(), [Some(5), None]);
    assert_eq!([0, 1].map(|index| found.head_dim_of(index)), [4, 8]);
    assert_eq!(found.rope[0].partial_rotary_factor, 0.25);
    assert_eq!((found.logit_softcap, found.per_layer_input, found.experts), (None, None, None));
    let wrong = [
        (bare.clone(), "sliding_window_pattern"),
        (bare.bools(&pattern, &[true]), "sliding_window_pattern"),
        (rope([1.0, 2.0, 3.0, 4.0]), "rope_freqs.weight"),
        (rope([1e30; 4]), "rope_freqs.weight"),
        (good.clone().u32(&key("rope.dimension_count"), 4), "rope.dimension_count"),
        (good.clone().f32(&key("rope.scaling.factor"), 8.0), "rope.scaling"),
        (good.clone().u32(&key("attention.value_length"), 4), "attention.value_length"),
        (good.clone().u32(&key("attention.shared_kv_layers"), 2), "num_kv_shared_layers"),
        (good.clone().u32(&key("expert_count"), 2), "expert_used_count"),
        (good.f32(&key("attention.scale"), 2.0), "attention.scale"),
    ];
    for (writer, part) in wrong {
        let error = config(&writer).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn blocks_of_qwen_3_5_are_what_its_keys_say_of_each() {
    let key = |key: &str| format!("qwen35.{key}");
    let model = |blocks: u32| {
        let sizes = [
            ("conv_kernel", 4),
            ("state_size", 8),
            ("group_count", 2),
            ("time_step_rank", 4),
            ("inner_size", 24),
        ];
        let model = model_of("qwen35", blocks)
            .u32(&key("attention.key_length"), 8)
            .u32(&key("rope.dimension_count"), 2)
            .i32s(&key("rope.dimension_sections"), &[11, 11, 10, 0]);
        let model =
            sizes.iter().fold(model, |model, (size, value)| model.u32(&key(&format!("ssm.{size}")), *value));
        (1..blocks).fold(model, |model, block| {
            model.floats(&format!("blk.{block}.attn_norm.weight"), &[8], &[1.0; 8])
        })
    };
    let kinds = |writer: &Writer| config(writer).map(|config| config.block_kinds);
    let found = config(&model(5)).unwrap();
    assert_eq!(found.block_kinds, [1, 1, 1, 0, 1]);
    let expected = DeltaNetConfig { key_heads: 2, value_heads: 4, key_dim: 8, value_dim: 6, convolution: 4 };
    assert_eq!((found.delta_net, found.rope[0].partial_rotary_factor), (Some(expected), 0.25));
    assert_eq!(kinds(&model(3).u32(&key("full_attention_interval"), 2)).unwrap(), [1, 0, 1]);
    let listed = key("attention.recurrent_layers");
    assert_eq!(kinds(&model(3).bools(&listed, &[false, true, true])).unwrap(), [0, 1, 1]);
    // The last of the blocks predict further tokens and are left out, whatever tensors they have.
    let further = model(3).u32(&key("nextn_predict_layers"), 1).bools(&listed, &[true, false, false]);
    let further = further.floats("blk.2.nextn.eh_proj.weight", &[8, 16], &[0.5; 128]);
    assert_eq!(kinds(&further).unwrap(), [1, 0]);
    assert_eq!(open(&further).unwrap().notes(), ["1 blocks that predict further tokens were left out"]);
    let wrong = [
        (model(3).bools(&listed, &[true]), "recurrent_layers"),
        (model(3).u32(&key("nextn_predict_layers"), 3), "nextn_predict_layers"),
        (model(3).u32(&key("attention.value_length"), 4), "attention.value_length"),
        (model(3).f32(&key("rope.scaling.factor"), 8.0), "rope.scaling"),
        (model(3).u32(&key("expert_count"), 2), "expert_count"),
        (super::model("qwen3").u32("qwen3.nextn_predict_layers", 1), "qwen3.nextn_predict_layers"),
    ];
    for (writer, part) in wrong {
        let error = config(&writer).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    let experts = |count: u32, used: u32| {
        model("llama").u32("llama.expert_count", count).u32("llama.expert_used_count", used)
    };
    let cases = [
        (model("llama").u32("llama.rope.dimension_count", 2), "llama.rope.dimension_count"),
        (model("qwen3").u32("qwen3.expert_count", 8), "qwen3.expert_count"),
        (model("granite").bool("granite.rope.scaling.finetuned", false), "rope.scaling.finetuned"),
        (model("llama").u32("llama.expert_count", 8), "llama.expert_used_count"),
        (experts(2, 3), "llama.expert_used_count"),
        (experts(1 << 20, 1), "llama.expert_count"),
        (experts(2, 1).f32("llama.expert_weights_scale", 2.5), "llama.expert_weights_scale"),
        (experts(2, 1).u32("llama.expert_gating_func", 2), "llama.expert_gating_func"),
        (experts(2, 1).floats("blk.0.ffn_gate_inp.bias", &[2], &[0.5; 2]), "ffn_gate_inp.bias"),
        // Not as many as the key says.
        (experts(2, 1).floats("blk.0.ffn_gate_exps.weight", &[3, 8, 8], &[0.5; 192]), "ffn_gate_exps"),
        (model("llama").f32("llama.logit_scale", 2.0), "llama.logit_scale"),
        (model("llama").u32("llama.attention.key_length_swa", 2), "llama.attention.key_length_swa"),
        (model("llama").u32("llama.attention.shared_kv_layers", 1), "llama.attention.shared_kv_layers"),
        (model("llama").bools("llama.attention.sliding_window_pattern", &[true]), "sliding_window_pattern"),
        (model("llama").bool("llama.use_parallel_residual", true), "llama.use_parallel_residual"),
        (model("llama").str("llama.rope.scaling.type", "longrope"), "longrope"),
        (model("llama").u32("llama.vocab_size", 5), "llama.vocab_size"),
        (
            model_of("llama", u32::MAX).floats("blk.4294967294.attn_norm.weight", &[8], &[1.0; 8]),
            "block_count",
        ),
        (model("llama").floats("blk.1.attn_norm.weight", &[8], &[1.0; 8]), "llama.block_count"),
        (model("llama").floats("rope_freqs.weight", &[3], &[1.0; 3]), "rope_freqs.weight"),
        (model("llama").floats("rope_freqs.weight", &[2], &[3.0, 2.0]), "rope_freqs.weight"),
        (model("llama").floats("rope_freqs.weight", &[2], &[0.0, -1.0]), "rope_freqs.weight"),
        (Writer::default().str("general.architecture", "llama"), "llama.embedding_length"),
    ];
    for (writer, part) in cases {
        let error = config(&writer).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    let harmless =
        model("llama").u32("llama.expert_count", 0).f32("llama.logit_scale", 1.0).u32("llama.new", 1);
    config(&harmless).unwrap();
    assert_eq!(open(&harmless).unwrap().unknown_keys(), ["llama.new"]);
}

#[test]
fn rotary_scaling_comes_from_keys() {
    let scaling = |writer: &Writer| config(writer).map(|config| config.rope[0].scaling.clone());
    let linear =
        model("llama").str("llama.rope.scaling.type", "linear").f32("llama.rope.scaling.factor", 2.5);
    assert_eq!(scaling(&linear).unwrap(), RopeScaling::Linear { factor: 2.5 });
    let yarn = model("llama").str("llama.rope.scaling.type", "yarn").f32("llama.rope.scaling.factor", 4.0);
    let yarn = scaling(&yarn.u32("llama.rope.scaling.original_context_length", 16)).unwrap();
    // 0.1 ln 4 + 1, as YaRN's paper gives it.
    let attention_factor = 1.138_629_436_111_989;
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 16,
        beta_fast: 32.0,
        beta_slow: 1.0,
        attention_factor,
        truncate: true,
    };
    assert_eq!(yarn, expected);
    let missing = model("llama").str("llama.rope.scaling.type", "yarn");
    assert!(scaling(&missing).unwrap_err().to_string().contains("llama.rope.scaling.factor"));
}

/// A model whose head has `2 * factors` dimensions and whose frequencies are divided by `ones` ones, `middle`, then `most`.
fn with_factors(count: usize, ones: usize, middle: &[f32], most: f32) -> Writer {
    let mut factors = vec![1.0; ones];
    factors.extend(middle);
    factors.resize(count, most);
    model("llama")
        .f32("llama.rope.freq_base", 500_000.0)
        .u32("llama.attention.key_length", 2 * count as u32)
        .floats("rope_freqs.weight", &[count], &factors)
}

// The factors are those that LLaMA 3's rule, written with wavelengths in NumPy's f32, gives for theta 500,000.
#[test]
fn frequency_factors_become_llama3_scaling() {
    // Count of factors, ones among them, those between, the rest; low and high factor.
    type Case<'a> = (usize, usize, &'a [f32], f64, f64, f64);
    let cases: [Case; 3] = [
        (32, 15, &[1.6513293, 3.2922628, 9.666731], 32.0, 1.0, 4.0),
        (64, 29, &[1.2074839, 1.5534146, 2.026313, 2.69453, 3.6842532, 5.257327], 8.0, 1.0, 4.0),
        (
            64,
            24,
            &[
                1.0453668, 1.2483239, 1.4828465, 1.7507918, 2.0529883, 2.3888836, 2.7562404, 3.150961,
                3.5671034, 3.9971364,
            ],
            4.0,
            1.5,
            10.0,
        ),
    ];
    for (count, ones, middle, factor, low_freq_factor, high_freq_factor) in cases {
        let config = config(&with_factors(count, ones, middle, factor as f32)).unwrap();
        let expected = RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: 8192,
        };
        assert_eq!(config.rope[0].scaling, expected);
    }
    let config = config(&with_factors(32, 32, &[], 1.0)).unwrap();
    assert_eq!(config.rope[0].scaling, RopeScaling::Default);
}
