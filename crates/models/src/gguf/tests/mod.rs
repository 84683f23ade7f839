//! Tests of whole files: written here, or SmolLM2's.

mod config;
mod header;

use safetensors::SafeTensors;

use super::{test_writer::Writer, *};
use crate::config::{LayerAttention, RopeScaling};

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

/// A whole model of one block: width 8, 2 heads, vocabulary 4.
fn model(architecture: &str) -> Writer {
    model_of(architecture, 1)
}

/// The same, with a claim about the number of blocks.
fn model_of(architecture: &str, block_count: u32) -> Writer {
    let key = |name: &str| format!("{architecture}.{name}");
    let tensor = |writer: Writer, (name, shape): (&str, &[usize])| {
        writer.floats(name, shape, &vec![0.5; shape.iter().product()])
    };
    let writer = Writer::default()
        .str("general.architecture", architecture)
        .u32(&key("block_count"), block_count)
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

#[test]
fn smollm2_is_read_as_its_model_card_says() {
    let Some(path) = kiln_testkit::smollm2() else { return };
    let file = Gguf::open(path).unwrap();
    let expected = ModelConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        max_position_embeddings: 8192,
        norm_eps: 1e-5,
        rope: vec![crate::config::RopeConfig::plain(100_000.0)],
        layer_attention: vec![LayerAttention { sliding_window: None, rope: Some(0) }; 30],
        tie_word_embeddings: true,
        ..ModelConfig::bare(Family::by_model_type("llama").unwrap())
    };
    assert_eq!(file.config().unwrap(), expected);
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
