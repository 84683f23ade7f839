//! Tokenizers that ask for what can't be bounded, and long texts.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Tokenizer, pieces, tests::tiny_llama};

/// A small tokenizer with one part exchanged.
fn with(part: &str, value: Value) -> String {
    let letters = "abcdefghijklmnopqrstuvwxyz _▁019\n";
    let vocab: serde_json::Map<String, Value> =
        letters.chars().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
    let mut whole = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": null,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    });
    whole[part] = value;
    whole.to_string()
}

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn replace(pattern: Value, content: &str) -> Value {
    json!({"type": "Replace", "pattern": pattern, "content": content})
}

/// By kind: a file that must be refused when it is opened.
fn refused() -> Vec<(&'static str, String)> {
    let mut all = Vec::new();
    for pattern in [
        "(?:(?=(a+))a)+b",
        "(?=(a+))b",
        "(?!a)b",
        "(?<=a)b",
        "(?<!a)b",
        r"(a+)\1",
        r"(a)(b)\2\1+",
        "(?>a+)+b",
        "(?>a*)*b",
        r"a*a*a*a*b++",
        r"(?:a|aa)+b++",
        r"(a*)*\s+(?!\S)",
        r"(?:\s+(?!\S))+x",
        r"(?(1)a|b)",
        r"(?=(\d{3})+(?!\d))",
        r"(?=(?:a|b)+c)",
        r"((?=a)a)*b",
        "(?:a{1000}){1000}",
        "(",
        "[",
        "a{2,1}",
        r"\p{Nope}",
    ] {
        all.push(("pattern", with("pre_tokenizer", split(pattern))));
        all.push(("pattern", with("normalizer", replace(json!({"Regex": pattern}), "x"))));
        all.push(("pattern", with("decoder", replace(json!({"Regex": pattern}), "x"))));
    }
    all.push(("pattern", with("pre_tokenizer", split(&"a|".repeat(10_000)))));
    for empty in [
        json!({"String": ""}),
        json!({"Regex": ""}),
        json!({"Regex": "a*"}),
        json!({"Regex": "|a"}),
        json!({"Regex": r"\b"}),
        json!({"Regex": "^"}),
        json!({"Regex": "(a?)(b?)"}),
    ] {
        all.push(("nothing replaced", with("normalizer", replace(empty.clone(), "xx"))));
        all.push(("nothing replaced", with("decoder", replace(empty, "xx"))));
    }
    let many = |count: usize, item: Value| json!({"type": "Sequence", "normalizers": vec![item; count]});
    for (count, item) in [
        (40, replace(json!({"String": "a"}), "aa")),
        (7, replace(json!({"String": "a"}), "aa")),
        (1, replace(json!({"String": "a"}), &"a".repeat(100))),
        (2, json!({"type": "NFKD"})),
        (20, json!({"type": "ByteLevel"})),
        (2, replace(json!({"Regex": "."}), &"ab".repeat(8))),
        (1000, json!({"type": "Strip", "strip_left": true, "strip_right": true})),
    ] {
        all.push(("growth", with("normalizer", many(count, item))));
    }
    all.push(("growth", with("normalizer", replace(json!({"String": "a"}), &"a".repeat(10_000)))));
    all.push(("growth", with("normalizer", json!({"type": "Prepend", "prepend": "a".repeat(200_000)}))));
    let template = |single: Value, special: Value| json!({"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special});
    let token =
        json!([{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]);
    all.push(("template", with("post_processor", template(token.clone(), json!({})))));
    all.push((
        "template",
        with("post_processor", template(json!([{"Sequence": {"id": "B", "type_id": 0}}]), json!({}))),
    ));
    let ids = vec![1; 100_000];
    let special = json!({"[X]": {"id": "[X]", "ids": ids, "tokens": vec!["a"; 100_000]}});
    all.push(("template", with("post_processor", template(token, special))));
    all.push(("length", with("pre_tokenizer", json!({"type": "FixedLength", "length": 0}))));
    all.push(("decoder", with("decoder", json!({"type": "Strip", "content": " ", "start": 0, "stop": 9}))));
    for map in ["AAAA/////w==", "AAAAgAA=", "", "!", "AAAA", "BAAAAAAAAAA=", "CAAAAAAAAAAAAAAA"] {
        all.push((
            "charsmap",
            with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": map})),
        ));
        all.push((
            "charsmap",
            with("normalizer", many(1, json!({"type": "Precompiled", "precompiled_charsmap": map}))),
        ));
    }
    for seed in 0..40u64 {
        // Tries of random words, whose texts are there.
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut word = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u32
        };
        let mut bytes = 1024u32.to_le_bytes().to_vec();
        bytes.extend((0..256).flat_map(|_| (word() >> (word() % 24)).to_le_bytes()));
        bytes.extend(b"abc\0defg\0");
        let map = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, bytes);
        all.push((
            "random charsmap",
            with("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": map})),
        ));
    }
    for unknown in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        all.push(("unknown", with(unknown, json!({"type": "Quantum"}))));
        all.push(("unknown", with(unknown, json!({"pattern": {"String": ""}, "content": "a"}))));
        all.push(("unknown", with(unknown, json!([]))));
    }
    let piece = |length: usize| json!(["a".repeat(length), -1.0]);
    let pieces: Vec<Value> = (1..2000).map(piece).collect();
    all.push((
        "unigram",
        with("model", json!({"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": false})),
    ));
    let words = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100_000_000, "vocab": {"a": 0, "b": 1}});
    all.push(("wordpiece", with("model", words)));
    for id in [3, 40, 1000, u32::MAX] {
        let added = json!([{"id": id, "content": "<new>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]);
        all.push(("added token", with("added_tokens", added)));
    }
    let dropout = json!({"type": "BPE", "dropout": 0.5, "vocab": {"a": 0}, "merges": []});
    all.push(("dropout", with("model", dropout)));
    all.push(("json", "[".repeat(100_000)));
    all.push((
        "json",
        r#"{"normalizer":"#.to_owned() + &r#"{"type":"Sequence","normalizers":["#.repeat(100_000),
    ));
    all
}

/// What is accepted or not, and encodes the text or doesn't: without a panic, in time.
fn outcome(file: &str, text: &str) -> Result<usize, String> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), file).unwrap();
    let encode = || {
        let tokenizer = Tokenizer::from_folder(folder.path())?;
        let ids = tokenizer.encode(text, true)?;
        tokenizer.decode(&ids, false)?;
        Ok(ids.len())
    };
    encode().map_err(|error: crate::Error| error.to_string())
}

#[test]
fn hostile_tokenizers_are_refused_at_once() {
    let text = "a".repeat(20_000) + " ab 019\n" + &"ａﷺ".repeat(100);
    let all = refused();
    let mut random = 0;
    for (kind, file) in &all {
        let start = Instant::now();
        let result = outcome(file, &text);
        let name: String = file.chars().take(200).collect();
        assert!(start.elapsed() < Duration::from_secs(4), "{kind}: {:?} for {name}", start.elapsed());
        match *kind {
            // A random trie may be whole.
            "random charsmap" => random += usize::from(result.is_err()),
            _ => {
                let error = result.expect_err(&format!("{kind}: {name}"));
                assert!(error.contains("tokenizer.json") && error.len() < 20_000, "{kind}: {error}");
            }
        }
    }
    assert!(all.len() > 150 && random > 10, "{} {random}", all.len());
}

/// Patterns that are let through but take the square of a text: given up, not waited for.
#[test]
fn a_text_that_takes_too_long_is_an_error() {
    let text = "a".repeat(200_000);
    for pattern in ["a*b|a", "(a|aa)*b|a", "[a-z]*[0-9]|[a-z]"] {
        let start = Instant::now();
        let result = outcome(&with("pre_tokenizer", split(pattern)), &text);
        assert!(result.is_ok() || result.unwrap_err().contains("to take less than"), "{pattern}");
        assert!(start.elapsed() < Duration::from_secs(10), "{pattern}: {:?}", start.elapsed());
    }
}

/// Texts longer than a piece, of many kinds: the same ids, and the same bytes, as all at once.
#[test]
fn a_long_text_has_the_ids_of_the_whole() {
    let testdata = |path: &str| format!("{}/../../testdata/{path}", env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| std::fs::read_to_string(testdata(path)).unwrap();
    let prose = read("models/tiny-llama/text/shift_train_moby.txt");
    let mut state = 7u64;
    let mut next = |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let alphabet: Vec<char> = "ab cd  e\n\n\tfé漢字👍🏽é.,;:'\"0123ÅЖ\u{200b}".chars().collect();
    let random: String = (0..120_000).map(|_| alphabet[next(alphabet.len() as u64) as usize]).collect();
    let lines: String = (0..4000).map(|i| format!("{}{}\n", " ".repeat(i % 90), i * i)).collect();
    let texts = [
        ("prose", prose[..150_000].to_owned()),
        ("random", random),
        ("lines", lines),
        ("one letter", "a".repeat(100_000)),
        ("spaces", " ".repeat(100_000)),
        ("newlines", "\n".repeat(70_000) + "x"),
        ("one word", "abcdefgh".repeat(12_000)),
        ("digits", "0123456789".repeat(9000)),
        ("emoji", "👍🏽".repeat(10_000)),
    ];
    let folders = ["spm-gemma", "spm-llama", "spm-squeezed", "spm-unigram", "bpe-gpt2", "bpe-qwen2"];
    let mut all = vec![("tiny-llama", tiny_llama())];
    all.extend(
        folders.map(|name| (name, Tokenizer::from_folder(testdata(&format!("tokenizer/{name}"))).unwrap())),
    );
    for (name, tokenizer) in &all {
        for (kind, text) in &texts {
            let whole = tokenizer.inner.encode(text.as_str(), false).unwrap();
            let mut found = Vec::new();
            pieces::encode(tokenizer, text, |token| found.push(token)).unwrap();
            let ids: Vec<u32> = found.iter().map(|(id, _)| *id).collect();
            let first = ids.iter().zip(whole.get_ids()).position(|(a, b)| a != b);
            assert!(
                ids == whole.get_ids(),
                "{name}, {kind}: {} and {} ids, first at {first:?}",
                ids.len(),
                whole.len()
            );
            for ((_, range), (start, end)) in found.iter().zip(whole.get_offsets()) {
                assert_eq!((range.start, range.end), (*start, *end), "{name}, {kind}");
            }
        }
        let (text, special) = (&texts[0].1, tokenizer.inner.encode(texts[0].1.as_str(), true).unwrap());
        assert_eq!(tokenizer.encode(text, true).unwrap(), special.get_ids(), "{name}");
        let ids: Vec<u32> =
            tokenizer.encode_with_offsets(text, true).unwrap().into_iter().map(|(id, _)| id).collect();
        assert_eq!(ids, special.get_ids(), "{name}");
    }
}
