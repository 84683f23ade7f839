//! Tests of whole files: written here, or SmolLM2's.

use proptest::prelude::*;
use safetensors::SafeTensors;

use super::{
    writer::{Writer, file},
    *,
};
use crate::config::{LlamaConfig, RopeScaling};

/// Relative to a row's largest value: two orders of f32 operations on one weight.
const ROUNDING: f32 = 3e-7;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Each type's name, bytes and values of `[8, 512]` weights.
fn with_block_fixture(mut visit: impl FnMut(BlockType, &[u8], &[f32])) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/gguf/blocks_8x512.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let fixture = SafeTensors::deserialize(&bytes).unwrap();
    let mut count = 0;
    for id in 0..64 {
        let Some(kind) = BlockType::from_id(id) else { continue };
        let Ok(data) = fixture.tensor(&format!("{}.bytes", kind.name())) else { continue };
        let values = floats(fixture.tensor(&format!("{}.values", kind.name())).unwrap().data());
        visit(kind, data.data(), &values);
        count += 1;
    }
    assert_eq!(count, 11);
}

fn open(writer: &Writer) -> Result<Gguf> {
    Gguf::open(writer.file().path())
}

fn llama() -> Writer {
    Writer::default()
        .str("general.architecture", "llama")
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
}

fn message(writer: &Writer) -> String {
    open(writer).unwrap_err().to_string()
}

#[test]
fn every_block_type_decodes_to_the_reference() {
    with_block_fixture(|kind, data, expected| {
        let writer = Writer::default().str("general.architecture", "qwen2");
        let file = open(&writer.tensor("blk.0.ffn_down.weight", &[8, 512], kind, data)).unwrap();
        let dense = file.dense("model.layers.0.mlp.down_proj.weight").unwrap();
        assert_eq!(dense.shape, [8, 512]);
        for (found, expected) in dense.values.chunks(512).zip(expected.chunks(512)) {
            let most = expected.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= ROUNDING * most, "{}: {found}, {expected}", kind.name());
            }
        }
    });
}

#[test]
fn packed_weights_hold_the_reference_values_exactly() {
    with_block_fixture(|kind, data, expected| {
        let writer = Writer::default().str("general.architecture", "qwen2");
        let file = open(&writer.tensor("blk.0.ffn_down.weight", &[8, 512], kind, data)).unwrap();
        let scheme = match file.weight("model.layers.0.mlp.down_proj").unwrap() {
            StoredWeight::Packed(weight) => {
                weight.validate("weight").unwrap();
                assert_eq!(weight.dequantize(), expected, "{}", kind.name());
                weight.scheme.to_string()
            }
            StoredWeight::Dense(_) => "dense".into(),
        };
        let expected = match kind {
            BlockType::Q4_0 => "affine4:32:sym:f16",
            BlockType::Q4_1 => "affine4:32:f16",
            BlockType::Q8_0 => "affine8:32:sym:f16",
            _ => "dense",
        };
        assert_eq!(scheme, expected);
    });
}

#[test]
fn rows_of_llama_queries_and_keys_are_put_back_in_order() {
    // Two query heads of four rows and one key head of eight: the file's row 2j + h is row h * half + j.
    let (query, key) = ([0, 2, 1, 3, 4, 6, 5, 7], [0, 2, 4, 6, 1, 3, 5, 7]);
    with_block_fixture(|kind, data, expected| {
        let writer = llama()
            .tensor("blk.0.attn_q.weight", &[8, 512], kind, data)
            .tensor("blk.0.attn_k.weight", &[8, 512], kind, data)
            .tensor("blk.0.attn_v.weight", &[8, 512], kind, data)
            .floats("blk.0.attn_q.bias", &[8], &[0., 1., 2., 3., 4., 5., 6., 7.]);
        let file = open(&writer).unwrap();
        let unordered = [0, 1, 2, 3, 4, 5, 6, 7];
        for (name, order) in [("q_proj", query), ("k_proj", key), ("v_proj", unordered)] {
            let module = format!("model.layers.0.self_attn.{name}");
            let dense = file.dense(&format!("{module}.weight")).unwrap().values;
            let weight = match file.weight(&module).unwrap() {
                StoredWeight::Packed(weight) => weight.dequantize(),
                StoredWeight::Dense(weight) => weight.values,
            };
            assert_eq!(dense, weight);
            let plain: Vec<f32> =
                order.iter().flat_map(|&row: &usize| &expected[row * 512..][..512]).copied().collect();
            let most = plain.iter().fold(0.0f32, |most, value| most.max(value.abs()));
            assert!(dense.iter().zip(&plain).all(|(a, b)| (a - b).abs() <= ROUNDING * most), "{name}");
        }
        let bias = file.dense("model.layers.0.self_attn.q_proj.bias").unwrap();
        assert_eq!((bias.shape, bias.values), (vec![8], query.map(|row| row as f32).to_vec()));
    });
}

#[test]
fn tensors_larger_than_a_chunk_are_read_whole() {
    // 1,200 rows of 256 floats: more than a mebibyte, and heads of 600 rows don't divide a chunk.
    let values: Vec<f32> = (0..1200 * 256).map(|i| i as f32).collect();
    let file = open(&llama().floats("blk.0.attn_q.weight", &[1200, 256], &values)).unwrap();
    let dense = file.dense("model.layers.0.self_attn.q_proj.weight").unwrap().values;
    for (row, found) in dense.chunks(256).enumerate() {
        let (head, within) = (row / 600, row % 600);
        let source = head * 600 + within % 300 * 2 + within / 300;
        assert_eq!(found, &values[source * 256..][..256]);
    }
}

#[test]
fn values_that_are_not_finite_are_errors() {
    let file = open(&llama().floats("blk.0.ffn_up.weight", &[1, 2], &[1.0, f32::NAN])).unwrap();
    let error = file.weight("model.layers.0.mlp.up_proj").unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_up.weight") && error.contains("NaN"), "{error}");
    let mut block = [0; 20];
    block[..2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    let file = open(&llama().tensor("blk.0.ffn_up.weight", &[1, 32], BlockType::Q4_1, &block)).unwrap();
    assert!(file.weight("model.layers.0.mlp.up_proj").unwrap_err().to_string().contains("inf"));
}

/// A whole model of one block: width 8, 2 heads, vocabulary 4.
fn model(architecture: &str) -> Writer {
    let key = |name: &str| format!("{architecture}.{name}");
    let tensor = |writer: Writer, (name, shape): (&str, &[usize])| {
        writer.floats(name, shape, &vec![0.5; shape.iter().product()])
    };
    let writer = Writer::default()
        .str("general.architecture", architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("context_length"), 64)
        .u32(&key("embedding_length"), 8)
        .u32(&key("feed_forward_length"), 16)
        .u32(&key("attention.head_count"), 2)
        .u32(&key("attention.head_count_kv"), 1)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-6);
    let tensors: [(&str, &[usize]); 3] =
        [("token_embd.weight", &[4, 8]), ("blk.0.attn_q.weight", &[8, 8]), ("output_norm.weight", &[8])];
    tensors.into_iter().fold(writer, tensor)
}

fn config(writer: &Writer) -> Result<LlamaConfig> {
    match open(writer)?.config()? {
        ModelConfig::Llama(config) => Ok(config),
        other => panic!("{other:?}"),
    }
}

#[test]
fn configuration_comes_from_keys_and_tensors() {
    let plain = config(&model("llama")).unwrap();
    let expected = LlamaConfig {
        vocab_size: 4,
        hidden_size: 8,
        intermediate_size: 16,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-6,
        rope: crate::config::RopeConfig { theta: 10_000.0, scaling: RopeScaling::Default },
        sliding_window: vec![None],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: true,
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
    assert!(qwen.qkv_bias && !qwen.o_bias && !qwen.tie_word_embeddings);
    let qwen = model("qwen3")
        .u32("qwen3.attention.key_length", 16)
        .u32("qwen3.attention.value_length", 16)
        .u32("qwen3.attention.sliding_window", 32)
        .f32("qwen3.rope.freq_base", 1e6)
        .floats("blk.0.attn_q_norm.weight", &[16], &[1.0; 16])
        .floats("blk.0.attn_k_norm.weight", &[16], &[1.0; 16]);
    let qwen = config(&qwen).unwrap();
    assert!(qwen.qk_norm);
    assert_eq!((qwen.head_dim, qwen.rope.theta), (16, 1e6));
    assert_eq!(qwen.sliding_window, [Some(32)]);
}

#[test]
fn what_changes_the_mathematics_is_refused_by_name() {
    let cases = [
        (model("llama").u32("llama.rope.dimension_count", 2), "llama.rope.dimension_count"),
        (model("llama").u32("llama.expert_count", 8), "llama.expert_count"),
        (model("llama").f32("llama.logit_scale", 2.0), "llama.logit_scale"),
        (model("llama").bool("llama.use_parallel_residual", true), "llama.use_parallel_residual"),
        (model("llama").str("llama.rope.scaling.type", "longrope"), "longrope"),
        (model("llama").u32("llama.vocab_size", 5), "llama.vocab_size"),
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
    let scaling = |writer: &Writer| config(writer).map(|config| config.rope.scaling);
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
    let cases: [(usize, usize, &[f32], f64, f64, f64); 3] = [
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
        assert_eq!(config.rope.scaling, expected);
    }
    let config = config(&with_factors(32, 32, &[], 1.0)).unwrap();
    assert_eq!(config.rope.scaling, RopeScaling::Default);
}

#[test]
fn files_that_are_not_whole_models_of_known_kinds_are_refused() {
    for (writer, part) in [
        (Writer::default(), "general.architecture"),
        (Writer::default().u32("general.architecture", 1), "general.architecture"),
        (Writer::default().str("general.architecture", "mamba"), "llama, qwen2, qwen3"),
        (llama().str("general.type", "adapter"), "general.type"),
        (llama().u32("split.count", 2), "split.count"),
        (llama().floats("blk.0.ffn_gate_exps.weight", &[1], &[0.0]), "blk.0.ffn_gate_exps.weight"),
        (llama().entry("output.weight", &[256], 16, 0), "tensor type 16"),
    ] {
        let error = message(&writer);
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn lying_headers_are_errors_that_name_the_field() {
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let nested: Vec<u8> = array(9, 1).repeat(1000);
    let cases = [
        (llama().raw("a", 13, &[]), "value type"),
        (llama().raw("a", 7, &[2]), "boolean"),
        (llama().raw("a", 8, &u64::MAX.to_le_bytes()), "string"),
        (llama().raw("a", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "UTF-8"),
        (llama().raw("a", 9, &array(4, u64::MAX)), "at most"),
        (llama().raw("a", 9, &array(8, 1 << 40)), "at most"),
        (llama().raw("a", 9, &array(77, 1)), "element type"),
        (llama().raw("a", 9, &nested), "deep"),
        (llama().u32("a", 1).u32("a", 1), "twice"),
        (llama().u32("general.alignment", 0), "general.alignment"),
        (llama().u32("general.alignment", 12), "general.alignment"),
        (llama().floats("output.weight", &[1], &[0.0]).floats("output.weight", &[1], &[0.0]), "twice"),
        (llama().entry("output.weight", &[], 0, 0), "dimensions"),
        (llama().entry("output.weight", &[1; 5], 0, 0), "dimensions"),
        (llama().entry("output.weight", &[0], 0, 0), "sizes"),
        (llama().entry("output.weight", &[1 << 40, 1 << 40], 0, 0), "2^48"),
        (llama().entry("output.weight", &[1 << 30, 1 << 10], 0, 0), "data within"),
        (llama().entry("output.weight", &[33], 3, 0), "blocks of 32"),
        (llama().entry("output.weight", &[1], 0, 1), "aligned"),
        (llama().entry("output.weight", &[1], 0, 1 << 20), "data within"),
        (llama().entry("output.weight", &[1], 0, u64::MAX - 31), "data within"),
        (llama().entry(&"a".repeat(65), &[1], 0, 0), "64 bytes"),
    ];
    for (writer, part) in cases {
        let error = message(&writer);
        assert!(error.contains(part), "{part}: {error}");
    }
    for (at, value, part) in
        [(0, u64::MAX, "magic"), (4, 1, "version"), (8, 1 << 60, "tensor count"), (16, 1 << 60, "key count")]
    {
        let mut bytes = llama().bytes();
        let length = if at < 8 { 4 } else { 8 };
        bytes[at..at + length].copy_from_slice(&value.to_le_bytes()[..length]);
        let error = Gguf::open(file(&bytes).path()).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

#[test]
fn a_missing_tensor_and_a_missing_file_are_errors() {
    let file = open(&llama()).unwrap();
    assert!(file.dense("lm_head.weight").unwrap_err().to_string().contains("lm_head.weight"));
    assert!(!file.contains("lm_head.weight"));
    let missing = Gguf::open("does/not/exist.gguf").unwrap_err();
    assert!(matches!(missing, Error::Io { .. }), "{missing}");
    let vector = open(&llama().floats("output_norm.weight", &[8], &[1.0; 8])).unwrap();
    assert!(vector.weight("model.norm").unwrap_err().to_string().contains("2 dimensions"));
    assert_eq!(vector.names(), ["model.norm.weight"]);
}

/// A file with a bit of everything.
fn everything() -> Vec<u8> {
    let tokens = ["<s>", "a", "b", "ab"].map(String::from);
    model("llama")
        .str("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &tokens)
        .f32s("tokenizer.ggml.scores", &[0.0, -1.0, -2.0, -0.5])
        .i32s("tokenizer.ggml.token_type", &[3, 1, 1, 1])
        .u32("tokenizer.ggml.bos_token_id", 0)
        .str("tokenizer.chat_template", "{{ messages }}")
        .tensor("blk.0.ffn_up.weight", &[2, 32], BlockType::Q4_1, &[1; 40])
        .bytes()
}

/// Reads all that a file has; errors are fine, panics are not.
fn read_all(bytes: &[u8]) {
    let Ok(file) = Gguf::open(file(bytes).path()) else { return };
    let _ =
        (file.config(), file.special_tokens(), file.tokenizer(), file.chat_template(), file.unknown_keys());
    for name in file.names() {
        let _ = file.dense(&name);
        let _ = file.weight(name.trim_end_matches(".weight"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn mutated_and_truncated_files_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        length in any::<prop::sample::Index>(),
        truncate in any::<bool>(),
    ) {
        let mut bytes = everything();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if truncate {
            bytes.truncate(length.index(bytes.len()));
        }
        read_all(&bytes);
    }

    #[test]
    fn large_numbers_anywhere_never_panic(at in any::<prop::sample::Index>(), shift in 0u32..64) {
        let mut bytes = everything();
        let at = at.index(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&(u64::MAX >> shift).to_le_bytes());
        read_all(&bytes);
    }
}

#[test]
fn the_file_with_everything_is_valid() {
    let file = Gguf::open(file(&everything()).path()).unwrap();
    file.config().unwrap();
    file.tokenizer().unwrap();
    assert_eq!(file.chat_template().as_deref(), Some("{{ messages }}"));
    assert_eq!(file.special_tokens().unwrap().bos, Some(0));
    assert_eq!(file.tensor("model.layers.0.mlp.up_proj.weight").unwrap().kind, BlockType::Q4_1);
}

#[test]
fn smollm2_is_read_as_its_model_card_says() {
    let Some(path) = std::env::var_os("KILN_SMOLLM2") else {
        println!("skipped: KILN_SMOLLM2 names no file");
        return;
    };
    let file = Gguf::open(path).unwrap();
    let ModelConfig::Llama(config) = file.config().unwrap() else { panic!("not of the LLaMA family") };
    let expected = LlamaConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        max_position_embeddings: 8192,
        rms_norm_eps: 1e-5,
        rope: crate::config::RopeConfig { theta: 100_000.0, scaling: RopeScaling::Default },
        sliding_window: vec![None; 30],
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tie_word_embeddings: true,
    };
    assert_eq!(config, expected);
    assert_eq!(file.unknown_keys(), Vec::<&str>::new());
    let mut packed = std::collections::BTreeMap::new();
    for name in file.names() {
        let tensor = file.tensor(&name).unwrap();
        let Some(module) = name.strip_suffix(".weight").filter(|_| tensor.shape.len() == 2) else { continue };
        let StoredWeight::Packed(weight) = file.weight(module).unwrap() else {
            panic!("{name} isn't packed")
        };
        *packed.entry(weight.scheme.to_string()).or_insert(0) += 1;
        if name.contains("layers.7.") {
            assert_eq!(weight.dequantize(), file.dense(&name).unwrap().values, "{name}");
        }
    }
    assert_eq!(
        packed.into_iter().collect::<Vec<_>>(),
        [("affine4:32:f16".into(), 210), ("affine8:32:sym:f16".into(), 1)]
    );
}
