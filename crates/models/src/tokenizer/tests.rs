//! Tests of tokenizers from folders and from GGUF files.

use serde_json::Value;

use kiln_testkit::testdata;

use super::*;
use crate::{
    export::describe_tokenizer,
    gguf::{Array, Metadata, Value as Key, WORDS, Words, build_tokenizer, test_writer::Writer},
};

const TESTDATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata");

fn fixture(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(format!("{TESTDATA}/{name}")).unwrap()).unwrap()
}

pub(super) fn tiny_llama() -> Tokenizer {
    Tokenizer::from_folder(format!("{TESTDATA}/models/tiny-llama")).unwrap()
}

fn check_cases(tokenizer: &Tokenizer, cases: &Value) {
    for case in cases.as_array().unwrap() {
        let (text, decoded) = (case["text"].as_str().unwrap(), case["decoded"].as_str().unwrap());
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), decoded, "{text:?}");
        let mut stream = tokenizer.decode_stream(false);
        let mut streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        streamed += &stream.finish().unwrap();
        assert_eq!(streamed, decoded, "{text:?}");
    }
}

#[test]
fn tiny_llama_gives_the_ids_its_training_used() {
    let tokenizer = tiny_llama();
    assert_eq!(tokenizer.vocab_size(), 2048);
    let expected = SpecialTokens { bos: Some(0), eos: vec![0], pad: Some(1) };
    assert_eq!((tokenizer.special(), tokenizer.chat_template()), (&expected, None));
    for name in ["shift_test_moby", "indomain_heldout_sotu_2011"] {
        let path = format!("{TESTDATA}/models/tiny-llama/text/{name}.txt");
        let text = std::fs::read_to_string(path).unwrap();
        let ids = kiln_testkit::ids(name);
        let found = tokenizer.encode(&text, false).unwrap();
        assert_eq!(ids[0], 0);
        assert_eq!(found[..ids.len() - 1], ids[1..], "{name}");
    }
}

#[test]
fn offsets_are_the_bytes_of_the_text() {
    let text = "Ünder the \u{1f980}<|endoftext|>x";
    let tokens = tiny_llama().encode_with_offsets(text, true).unwrap();
    assert_eq!(tokens.first().unwrap().1.start, 0);
    assert_eq!(tokens.last().unwrap().1, text.len() - 1..text.len());
    let end = tokens.iter().find(|(id, _)| *id == 0).unwrap();
    assert_eq!(&text[end.1.clone()], "<|endoftext|>");
}

#[test]
fn a_character_in_several_tokens_streams_whole() {
    let tokenizer = tiny_llama();
    let ids = tokenizer.encode("\u{1f980}!", false).unwrap();
    assert!(ids.len() > 2);
    let mut stream = tokenizer.decode_stream(true);
    let parts: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).filter(|part| !part.is_empty()).collect();
    assert_eq!(parts, ["\u{1f980}", "!"]);
    let mut stream = tokenizer.decode_stream(true);
    assert_eq!(stream.push(ids[0]).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{fffd}");
}

/// The GGUF file of one entry of the fixture.
fn gguf(tokenizer: &Value) -> Writer {
    let strings = |key: &str| -> Vec<String> { serde_json::from_value(tokenizer[key].clone()).unwrap() };
    let types: Vec<i32> = serde_json::from_value(tokenizer["types"].clone()).unwrap();
    let writer = Writer::default()
        .str("general.architecture", "llama")
        .str("tokenizer.ggml.model", tokenizer["model"].as_str().unwrap())
        .strings("tokenizer.ggml.tokens", &strings("tokens"))
        .i32s("tokenizer.ggml.token_type", &types)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2);
    match tokenizer["pre"].as_str() {
        Some(pre) => {
            writer.str("tokenizer.ggml.pre", pre).strings("tokenizer.ggml.merges", &strings("merges"))
        }
        None => {
            let scores: Vec<f32> = serde_json::from_value(tokenizer["scores"].clone()).unwrap();
            writer.f32s("tokenizer.ggml.scores", &scores)
        }
    }
}

fn from_gguf(writer: &Writer) -> Result<Tokenizer> {
    Gguf::open(writer.file().path())?.tokenizer()
}

#[test]
fn gguf_tokenizers_give_the_ids_of_the_original_libraries() {
    let fixture = fixture("tokenizer/gguf_tokenizers.json");
    let all = fixture.as_array().unwrap();
    assert_eq!(all.len(), 5);
    for expected in all {
        let tokenizer = from_gguf(&gguf(expected)).unwrap();
        assert_eq!(tokenizer.vocab_size(), expected["tokens"].as_array().unwrap().len());
        check_cases(&tokenizer, &expected["cases"]);
    }
}

/// Every way of splitting words, by llama.cpp's ids of the embedded model's vocabulary; and its keys are written again.
#[test]
fn words_are_split_as_llama_cpp_splits_them() {
    let (fixture, json) = (fixture("tokenizer/words.json"), fixture("models/tiny-llama/tokenizer.json"));
    let vocabulary = json["model"]["vocab"].as_object().unwrap();
    let mut tokens = vec![String::new(); vocabulary.len()];
    for (token, id) in vocabulary {
        tokens[id.as_u64().unwrap() as usize] = token.clone();
    }
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge.as_array() {
        Some(pair) => format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()),
        None => merge.as_str().unwrap().to_owned(),
    });
    let merges: Vec<String> = merges.collect();
    let names = fixture["ids"].as_object().unwrap();
    let ways = WORDS.iter().filter(|way| way.names.iter().any(|name| names.contains_key(*name)));
    assert_eq!(ways.count(), WORDS.len());
    for (name, ids) in names {
        let metadata = |name: &str| {
            let mut metadata = Metadata::new("words".as_ref());
            let list = |texts: &[String]| Key::Array(Array::String(texts.to_vec()));
            for (key, value) in [
                ("model", Key::String("gpt2".into())),
                ("pre", Key::String(name.into())),
                ("tokens", list(&tokens)),
                ("merges", list(&merges)),
                ("add_bos_token", Key::Bool(false)),
            ] {
                metadata.insert(format!("tokenizer.ggml.{key}"), value);
            }
            metadata
        };
        let tokenizer = |name: &str| {
            let inner = build_tokenizer(&metadata(name)).unwrap();
            Tokenizer { inner, special: SpecialTokens::default(), chat_template: None }
        };
        let found = tokenizer(name);
        let composes = Words::named(name).unwrap().composes;
        for (text, ids) in fixture["texts"].as_array().unwrap().iter().zip(ids.as_array().unwrap()) {
            let (text, ids) =
                (text.as_str().unwrap(), serde_json::from_value::<Vec<u32>>(ids.clone()).unwrap());
            // llama.cpp doesn't compose where these models' own tokenizers do.
            if !(composes && text.contains('\u{301}')) {
                assert_eq!(found.encode(text, false).unwrap(), ids, "{name}: {text:?}");
            }
        }
        let keys = describe_tokenizer(&found, found.special(), tokens.len(), &mut Vec::new()).unwrap();
        let (_, written) = keys.iter().find(|(key, _)| key == "tokenizer.ggml.pre").unwrap();
        let Key::String(written) = written else { panic!("{written:?}") };
        let (again, way) = (tokenizer(written), Words::named(written).unwrap());
        assert_eq!(way.steps, Words::named(name).unwrap().steps);
        for text in fixture["texts"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()) {
            assert_eq!(
                again.encode(text, false).unwrap(),
                found.encode(text, false).unwrap(),
                "{name}: {text:?}"
            );
        }
    }
}

/// GGUF to folder to GGUF's keys again, with three rows of the embedding that have no token.
#[test]
fn tokenizers_survive_folders_and_gguf_keys() {
    let fixture = fixture("tokenizer/gguf_tokenizers.json");
    for expected in fixture.as_array().unwrap() {
        let original = from_gguf(&gguf(expected)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        original.save_folder(folder.path()).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert_eq!(tokenizer.special(), original.special());
        check_cases(&tokenizer, &expected["cases"]);
        let rows = tokenizer.vocab_size() + 3;
        let keys = describe_tokenizer(&tokenizer, tokenizer.special(), rows, &mut Vec::new()).unwrap();
        let mut metadata = Metadata::new(folder.path());
        for (key, value) in keys {
            assert!(metadata.insert(key, value));
        }
        let strings = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
        assert_eq!(
            (strings.len(), strings[rows - 1].as_str()),
            (rows, format!("[PAD{}]", rows - 1).as_str())
        );
        let inner = build_tokenizer(&metadata).unwrap();
        let rebuilt = Tokenizer { inner, special: tokenizer.special.clone(), chat_template: None };
        check_cases(&rebuilt, &expected["cases"]);
        for text in ["the whale", ""] {
            assert_eq!(rebuilt.encode(text, true).unwrap(), original.encode(text, true).unwrap());
        }
        // Fewer rows than tokens.
        let message = describe_tokenizer(&tokenizer, tokenizer.special(), rows - 4, &mut Vec::new())
            .unwrap_err()
            .to_string();
        assert!(message.contains("GGUF: tokenizer tokens"), "{message}");
    }
    // A way of splitting words that GGUF has no name for.
    let folder = tempfile::tempdir().unwrap();
    let mut json = self::fixture("models/tiny-llama/tokenizer.json");
    json["pre_tokenizer"] = serde_json::json!({"type": "Whitespace"});
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    let message =
        describe_tokenizer(&tokenizer, tokenizer.special(), 2048, &mut Vec::new()).unwrap_err().to_string();
    assert!(message.contains("GGUF: tokenizer pre_tokenizer") && message.contains("Whitespace"), "{message}");
}

#[test]
fn gguf_flags_say_what_goes_around_a_text() {
    let fixture = fixture("tokenizer/gguf_tokenizers.json");
    // By default LLaMA 3 and SentencePiece begin with a token, GPT-2 and Qwen don't.
    for (entry, begins) in fixture.as_array().unwrap().iter().zip([false, false, true, false, true]) {
        let tokenizer = from_gguf(&gguf(entry)).unwrap();
        let plain = tokenizer.encode("the whale", false).unwrap();
        let with =
            |bos: bool, eos: bool| [&[1][..usize::from(bos)], &plain, &[2][..usize::from(eos)]].concat();
        assert_eq!(tokenizer.encode("the whale", true).unwrap(), with(begins, false));
        let both =
            gguf(entry).bool("tokenizer.ggml.add_bos_token", true).bool("tokenizer.ggml.add_eos_token", true);
        assert_eq!(from_gguf(&both).unwrap().encode("the whale", true).unwrap(), with(true, true));
        let none = from_gguf(&gguf(entry).bool("tokenizer.ggml.add_bos_token", false)).unwrap();
        assert_eq!(none.encode("the whale", true).unwrap(), plain);
    }
}

#[test]
fn gaps_and_ids_beyond_the_vocabulary_are_passed_over() {
    let tokens = ["a", "", "b", ""];
    let strings = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
    let file = Writer::default()
        .str("general.architecture", "llama")
        .str("tokenizer.ggml.model", "gpt2")
        .strings("tokenizer.ggml.tokens", &strings(&tokens))
        .strings("tokenizer.ggml.merges", &[])
        .u32("tokenizer.ggml.padding_token_id", u32::MAX)
        .u32("tokenizer.ggml.eos_token_id", 2);
    let tokenizer = from_gguf(&file).unwrap();
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [0, 2]);
    assert_eq!(tokenizer.special(), &SpecialTokens { bos: None, eos: vec![2], pad: None });
    let notes = Gguf::open(file.file().path()).unwrap().notes();
    assert!(
        matches!(notes.as_slice(), [note] if note.contains("padding_token_id") && note.contains("4294967295"))
    );
}

#[test]
fn gguf_tokenizers_that_do_not_fit_are_errors() {
    let strings = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect::<Vec<_>>();
    let base = |model: &str, tokens: &[&str]| {
        Writer::default()
            .str("general.architecture", "llama")
            .str("tokenizer.ggml.model", model)
            .strings("tokenizer.ggml.tokens", &strings(tokens))
    };
    let merges = "tokenizer.ggml.merges";
    let gpt2 = || base("gpt2", &["a", "b", "ab"]).strings(merges, &strings(&["a b"]));
    assert_eq!(from_gguf(&gpt2()).unwrap().encode("abab", false).unwrap(), [2, 2]);
    for (writer, part) in [
        (base("bert", &["a"]), "\"bert\""),
        (base("gpt2", &["a"]), merges),
        (gpt2().str("tokenizer.ggml.pre", "kimi-k2"), "kimi-k2"),
        (base("gpt2", &["a", "a"]), "twice"),
        (base("gpt2", &["a", "b"]).strings(merges, &strings(&["a b"])), "a b"),
        (base("gpt2", &["a", "b"]).strings(merges, &strings(&["ab"])), "space between"),
        (base("llama", &["a", "b"]), "scores"),
        (base("llama", &["a", "b"]).f32s("tokenizer.ggml.scores", &[0.0]), "2 scores"),
        (gpt2().i32s("tokenizer.ggml.token_type", &[1]), "3 types"),
        (gpt2().i32s("tokenizer.ggml.token_type", &[1, 1, 9]), "1..=6"),
        (
            gpt2().u32("tokenizer.ggml.eos_token_id", 3).bool("tokenizer.ggml.add_eos_token", true),
            "eos_token_id",
        ),
        (gpt2().bool("tokenizer.ggml.add_bos_token", true), "bos_token_id"),
        (Writer::default().str("general.architecture", "llama"), "tokenizer.ggml.tokens"),
    ] {
        let error = from_gguf(&writer).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
}

/// A folder with tiny-llama's tokenizer and these files.
fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = format!("{TESTDATA}/models/tiny-llama/tokenizer.json");
    std::fs::copy(tokenizer, folder.path().join("tokenizer.json")).unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

#[test]
fn folders_add_tokens_templates_and_end_ids() {
    let config = r#"{"eos_token": {"content": "<|end|>", "special": true}, "bos_token": null,
        "chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
        "added_tokens_decoder": {"2048": {"content": "<|end|>", "special": true, "normalized": false},
                                 "0": {"content": "<|endoftext|>", "special": true}}}"#;
    let files =
        [("tokenizer_config.json", config), ("generation_config.json", r#"{"eos_token_id": [2048, 0]}"#)];
    let tokenizer = Tokenizer::from_folder(folder(&files).path()).unwrap();
    assert_eq!(tokenizer.special(), &SpecialTokens { bos: None, eos: vec![2048, 0], pad: None });
    assert_eq!(tokenizer.chat_template(), Some("d"));
    assert_eq!(tokenizer.vocab_size(), 2049);
    let ids = tokenizer.encode("a<|end|>", false).unwrap();
    assert_eq!(ids[1..], [2048]);
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), "a");
    let files = [
        ("tokenizer_config.json", config),
        ("chat_template.jinja", "j"),
        ("config.json", r#"{"eos_token_id": 1}"#),
    ];
    let tokenizer = Tokenizer::from_folder(folder(&files).path()).unwrap();
    assert_eq!((tokenizer.chat_template(), &tokenizer.special().eos), (Some("j"), &vec![2048, 1]));
}

#[test]
fn folders_that_do_not_fit_are_errors() {
    for (name, text, part) in [
        ("tokenizer.json", "{", "tokenizer.json"),
        (
            "tokenizer.json",
            r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#,
            "tokenizer.json",
        ),
        (
            "tokenizer.json",
            r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["b", "a"]]}}"#,
            "tokenizer.json",
        ),
        ("tokenizer_config.json", r#"{"bos_token": "<none>"}"#, "<none>"),
        ("tokenizer_config.json", r#"{"bos_token": 3}"#, "tokenizer_config.json"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"7": {"content": "<|pad|>"}}}"#, "id 1"),
        ("tokenizer_config.json", r#"{"added_tokens_decoder": {"9000": {"content": "<x>"}}}"#, "9000"),
        ("generation_config.json", r#"{"eos_token_id": "a"}"#, "eos_token_id"),
        ("config.json", r#"{"eos_token_id": -1}"#, "eos_token_id"),
    ] {
        let error = Tokenizer::from_folder(folder(&[(name, text)]).path()).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(matches!(Tokenizer::from_folder("does/not/exist"), Err(Error::Io { .. })));
}

#[test]
fn smollm2_gives_the_ids_of_its_python_tokenizer() {
    let Some(path) = kiln_testkit::smollm2() else { return };
    let tokenizer = Gguf::open(path).unwrap().tokenizer().unwrap();
    assert_eq!(tokenizer.vocab_size(), 49_152);
    assert_eq!(tokenizer.special(), &SpecialTokens { bos: Some(1), eos: vec![2], pad: Some(2) });
    check_cases(&tokenizer, &fixture("smollm2_tokenizer_cases.json"));
    assert!(tokenizer.chat_template().unwrap().contains("<|im_start|>"));
    assert_eq!(
        tokenizer.encode("Hello world", true).unwrap(),
        tokenizer.encode("Hello world", false).unwrap()
    );
}

#[test]
fn older_files_give_the_ids_of_their_own_programs() {
    let cases: Value =
        serde_json::from_slice(&std::fs::read(testdata("tokenizer/files.json")).unwrap()).unwrap();
    let cases = cases.as_object().unwrap();
    assert_eq!(cases.len(), 6);
    for (name, cases) in cases {
        let tokenizer = Tokenizer::from_folder(testdata(&format!("tokenizer/{name}"))).unwrap();
        for case in cases.as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{name}: {text:?}");
            // SentencePiece shows what it doesn't know in its own way.
            if name != "spm-squeezed" {
                let decoded = tokenizer.decode(&expected, false).unwrap();
                assert_eq!(decoded, case["decoded"].as_str().unwrap(), "{name}: {text:?}");
            }
        }
    }
    let llama = Tokenizer::from_folder(testdata("tokenizer/spm-llama")).unwrap();
    assert_eq!(llama.special(), &SpecialTokens { bos: Some(1), eos: vec![2], pad: None });
    assert_eq!(llama.encode("a", true).unwrap()[0], 1);
}

#[test]
fn broken_older_files_are_errors_and_never_panic() {
    let bytes = std::fs::read(testdata("tokenizer/spm-llama/tokenizer.model")).unwrap();
    let read = |bytes: &[u8]| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.model"), bytes).unwrap();
        Tokenizer::from_folder(folder.path()).and_then(|tokenizer| tokenizer.encode("the whale", true))
    };
    assert!(read(&bytes).is_ok());
    for cut in [0, 1, 7, bytes.len() / 2] {
        if let Err(error) = read(&bytes[..cut]) {
            assert!(error.to_string().contains("tokenizer.model"), "{error}");
        }
    }
    assert!(read(&[]).is_err() && read(&[0xff; 40]).is_err());
    for place in (0..bytes.len()).step_by(31) {
        let mut changed = bytes.clone();
        changed[place] ^= 0x3f;
        let _ = read(&changed);
    }
    let files = |vocabulary: &str, merges: &str, class: &str| {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in
            [("vocab.json", vocabulary), ("merges.txt", merges), ("tokenizer_config.json", class)]
        {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        Tokenizer::from_folder(folder.path()).map(|_| ()).unwrap_err().to_string()
    };
    for (vocabulary, merges, class, part) in [
        (r#"{"a": 0, "b": 0}"#, "", "{}", "vocab.json"),
        (r#"{"a": 4294967295}"#, "", "{}", "vocab.json"),
        (r#"{"a": -1}"#, "", "{}", "vocab.json"),
        (r#"{"a": 0}"#, "ab", "{}", "merges"),
        (r#"{"a": 0, "b": 1}"#, "a b", "{}", "merges"),
        (r#"{"a": 0}"#, "", r#"{"tokenizer_class": "BartTokenizer"}"#, "BartTokenizer"),
    ] {
        let error = files(vocabulary, merges, class);
        assert!(error.contains(part), "{part}: {error}");
    }
}
