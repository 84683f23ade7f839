//! Headers that lie, and files changed at random.

use proptest::prelude::*;

use super::{super::test_writer::file, *};

#[test]
fn files_that_are_not_whole_models_of_known_kinds_are_refused() {
    for (writer, part) in [
        (Writer::default(), "general.architecture"),
        (Writer::default().u32("general.architecture", 1), "general.architecture"),
        (Writer::default().str("general.architecture", "mamba"), "llama, qwen2, qwen3"),
        (llama().str("general.type", "adapter"), "general.type"),
        (llama().u32("split.count", 2), "split.no"),
        (llama().floats("blk.0.ffn_gate_exps.weight", &[1], &[0.0]), "blk.0.ffn_gate_exps.weight"),
        (llama().entry("output.weight", &[256], 24, 0), "tensor type 24"),
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
