//! Tests of whole files: written here, or SmolLM2's.

mod config;
mod header;

use safetensors::SafeTensors;

use super::{test_writer::Writer, *};
use crate::config::{DeltaNetConfig, LayerAttention, RopeScaling};

/// Relative to a row's largest value: two orders of f32 operations on one weight.
const ROUNDING: f32 = 3e-7;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Each type's name, bytes and values of `[8, 512]` weights.
fn with_block_fixture(visit: impl FnMut(BlockType, &[u8], &[f32])) {
    with_fixture("blocks_8x512", 11, visit);
}

/// Likewise of `[4, 512]` weights whose codes and integers are random bits.
fn with_random_blocks(visit: impl FnMut(BlockType, &[u8], &[f32])) {
    with_fixture("random_blocks_4x512", 13, visit);
}

#[test]
fn types_of_tables_decode_to_the_reference() {
    with_fixture("iq_blocks_1x256", 9, |kind, data, expected| {
        let writer = Writer::default().str("general.architecture", "qwen2");
        let file = open(&writer.tensor("blk.0.ffn_down.weight", &[1, 256], kind, data)).unwrap();
        let name = "model.layers.0.mlp.down_proj";
        assert_eq!(file.dense(&format!("{name}.weight")).unwrap().values, expected, "{}", kind.name());
        assert!(matches!(file.weight(name).unwrap(), StoredWeight::Dense(_)));
        let note = format!("1 tensors of {} are read to dense values", kind.name());
        assert_eq!(file.notes(), [note]);
    });
}

fn with_fixture(name: &str, types: usize, mut visit: impl FnMut(BlockType, &[u8], &[f32])) {
    let path = format!("{}/../../testdata/gguf/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
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
    assert_eq!(count, types);
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

/// A weight's scheme, and its values from both readings; `[rows, 512]`.
fn read(kind: BlockType, data: &[u8], rows: usize) -> (String, [Vec<f32>; 2]) {
    let writer = Writer::default().str("general.architecture", "qwen2");
    let file = open(&writer.tensor("blk.0.ffn_down.weight", &[rows, 512], kind, data)).unwrap();
    let dense = file.dense("model.layers.0.mlp.down_proj.weight").unwrap().values;
    match file.weight("model.layers.0.mlp.down_proj").unwrap() {
        StoredWeight::Packed(weight) => {
            weight.validate("weight").unwrap();
            (weight.scheme.to_string(), [weight.dequantize(), dense])
        }
        StoredWeight::Dense(weight) => ("dense".into(), [weight.values, dense]),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn packed_weights_hold_the_reference_values_bit_for_bit() {
    with_block_fixture(|kind, data, expected| {
        let (_, found) = read(kind, data, 8);
        assert!(found.iter().all(|found| bits(found) == bits(expected)), "{}", kind.name());
    });
    with_random_blocks(|kind, data, expected| {
        let (scheme, found) = read(kind, data, 4);
        assert!(found.iter().all(|found| bits(found) == bits(expected)), "{}", kind.name());
        let (expected, own_bits) = match kind {
            BlockType::Q4_0 => ("affine4:32:sym:f16", 4.5),
            BlockType::Q4_1 => ("affine4:32:f16", 5.0),
            BlockType::Q5_0 => ("affine5:32:sym:f16", 5.5),
            BlockType::Q5_1 => ("affine5:32:f16", 6.0),
            BlockType::Q8_0 => ("affine8:32:sym:f16", 8.5),
            BlockType::Q2K => ("affine2:16:super4", 2.625),
            BlockType::Q3K => ("affine3:16:sym:super8", 3.4375),
            BlockType::Q4K => ("affine4:32:super8", 4.5),
            BlockType::Q5K => ("affine5:32:super8", 5.5),
            BlockType::Q6K => ("affine6:16:sym:super8", 6.5625),
            BlockType::Iq4Nl => ("iq4nl:32:f16", 4.5),
            BlockType::Iq4Xs => ("iq4nl:32:super8", 4.25),
            BlockType::Mxfp4 => ("mxfp4:32:bf16", 4.25),
            kind => panic!("{}", kind.name()),
        };
        assert_eq!(scheme, expected);
        let packed = scheme.parse::<QuantScheme>().unwrap().bits_per_weight(512, 4);
        assert!(packed <= own_bits + 0.3, "{scheme}: {packed} bits a weight");
    });
}

#[test]
fn blocks_taken_apart_are_put_together_again_bit_for_bit() {
    let check = |kind: BlockType, data: &[u8], _: &[f32]| {
        let Some(blocks) = Blocks::new(kind) else { return };
        let (mut parts, mut found) = (blocks.parts(), vec![0; kind.bytes()]);
        for block in data.chunks_exact(kind.bytes()) {
            blocks.take_apart(block, &mut parts);
            blocks.put_together(&parts, &mut found).unwrap();
            assert_eq!(found, block, "{}", kind.name());
        }
        // What a type has no room for.
        parts.scale = 1.0 + f32::EPSILON;
        assert!(blocks.put_together(&parts, &mut found).is_none(), "{}", kind.name());
        (parts.scale, parts.scales[0]) = (1.0, 127);
        let fits = kind == BlockType::Q6K;
        assert_eq!(blocks.put_together(&parts, &mut found).is_some(), fits, "{}", kind.name());
    };
    with_block_fixture(check);
    with_random_blocks(check);
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
