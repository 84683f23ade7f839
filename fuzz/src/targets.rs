//! What is read, and by what.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use kiln::{
    Tuned,
    adapters::AdapterConfig,
    burn::tensor::Device,
    eval::{GenerateRequest, OnAnswer, Scorer, Task},
    mixq_search::{SearchSpace, TrialLog},
    models::{
        CausalLm, Checkpoint, Decoder, LoadOptions, TokenBatch, Tokenizer,
        chat::{ChatTemplate, Message, TemplateContext},
        export::{GgufOptions, export_gguf, save_model},
        gguf::Gguf,
        hf::SafetensorsFile,
    },
    quant::{QuantLinear, packed_file::PackedFile},
    side_tuning::{SideConfig, SideTuned},
    training::{DataOptions, Dataset, ModelTokenizer, Trainer, TrainerConfig},
};

/// A folder of files that are right.
pub(crate) struct Seed(pub(crate) Vec<(String, Vec<u8>)>);

pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) seeds: fn() -> Vec<Seed>,
    /// Reads the folder as far as it goes; what is refused is no matter.
    pub(crate) read: fn(&Path),
}

pub(crate) const TARGETS: [Target; 17] = [
    Target {
        name: "safetensors",
        seeds: || {
            files(&[
                "quantizer.safetensors=bnb/nf4_64x160_bs128_outlier.safetensors",
                "gptq.safetensors=gptq/gptq_4bit_64x32.safetensors",
            ])
        },
        read: safetensors,
    },
    Target { name: "folder", seeds: model_folders, read: folder },
    Target { name: "gguf", seeds: gguf_files, read: gguf },
    Target { name: "pytorch", seeds: || folders(&["forms/pytorch"]), read: folder },
    Target { name: "own-model", seeds: own_model, read: folder },
    Target { name: "packed", seeds: own_model, read: packed },
    Target { name: "peft", seeds: peft, read: adapter },
    Target {
        name: "peft-experts",
        seeds: || folders(&["peft/arch/mixtral-experts"]),
        read: |folder| {
            let _ = Tuned::load(mixture(), folder);
        },
    },
    Target { name: "own-adapter", seeds: own_adapter, read: adapter },
    Target { name: "side-network", seeds: side_network, read: side },
    Target { name: "checkpoint", seeds: checkpoints, read: checkpoint },
    Target { name: "tokenizer", seeds: tokenizers, read: tokenizer },
    Target {
        name: "older-tokenizers",
        seeds: || {
            folders(&[
                "tokenizer/spm-llama",
                "tokenizer/spm-unigram",
                "tokenizer/spm-gemma",
                "tokenizer/bpe-gpt2",
            ])
        },
        read: tokenizer,
    },
    Target { name: "template", seeds: templates, read: template },
    Target { name: "data", seeds: data, read: dataset },
    Target { name: "task", seeds: tasks, read: task },
    Target { name: "trial-log", seeds: trial_log, read: log },
];

fn testdata(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata")).join(path)
}

fn read_folder(path: &Path) -> Seed {
    let entries = fs::read_dir(path).expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut files: Vec<_> = entries
        .filter(|path| {
            path.is_file()
                && !path.to_string_lossy().contains("expected")
                && !path.to_string_lossy().contains("golden")
        })
        .map(|path| {
            (
                path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                fs::read(&path).expect("a file"),
            )
        })
        .collect();
    files.sort();
    Seed(files)
}

fn folders(paths: &[&str]) -> Vec<Seed> {
    paths.iter().map(|path| read_folder(&testdata(path))).collect()
}

/// A folder of one file each, `name=path`.
fn files(files: &[&str]) -> Vec<Seed> {
    let file = |file: &&str| {
        let (name, path) = file.split_once('=').expect("name=path");
        Seed(vec![(name.into(), fs::read(testdata(path)).expect("a file"))])
    };
    files.iter().map(file).collect()
}

/// What `write` leaves in a folder.
fn written(write: impl FnOnce(&Path)) -> Vec<Seed> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x");
    write(&path);
    vec![read_folder(&path)]
}

/// The only file of a folder.
fn only(folder: &Path) -> PathBuf {
    fs::read_dir(folder).expect("a folder").next().expect("a file").expect("an entry").path()
}

fn safetensors(folder: &Path) {
    let Ok(file) = SafetensorsFile::open(only(folder)) else { return };
    for name in file.names().map(str::to_owned).collect::<Vec<_>>() {
        let _ = (file.read(&name), file.read_f32(&name), file.read_u32(&name));
    }
}

fn model_folders() -> Vec<Seed> {
    folders(&[
        "forms/bnb-int8",
        "forms/compressed-w3-channel",
        "forms/compressed-w4-asymmetric",
        "forms/compressed-w4-group",
        "forms/compressed-w8-channel",
        "forms/fp8-blocks",
        "forms/fp8-outputs",
        "forms/hqq",
        "forms/no-prefix",
        "tiny/gemma3-text-f32",
        "arch/qwen3_5_text",
        "arch/gpt_oss",
    ])
}

fn load(path: &Path) {
    let Ok(checkpoint) = Checkpoint::open(path) else { return };
    let _ = (checkpoint.tokenizer(), checkpoint.chat_template(), checkpoint.notes());
    let Ok((model, _)) = checkpoint.load(&LoadOptions::default(), &Device::flex()) else { return };
    let tokens = TokenBatch::new(&[vec![1, 2, 3]]).expect("a row");
    if let Ok(context) = model.context(&tokens, None) {
        let _ = model.forward(&context).into_data();
    }
}

fn folder(folder: &Path) {
    load(folder);
}

fn dense(place: &str) -> (Checkpoint, Decoder<QuantLinear>) {
    let checkpoint = Checkpoint::open(testdata(place)).expect("a checkpoint");
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).expect("a model");
    (checkpoint, model)
}

fn mixture() -> Decoder<QuantLinear> {
    static MIXTURE: OnceLock<Decoder<QuantLinear>> = OnceLock::new();
    MIXTURE.get_or_init(|| dense("arch/mixtral").1).clone()
}

/// A packed file, and files of architectures that lay out blocks, rows or experts differently.
fn gguf_files() -> Vec<Seed> {
    let families = ["gemma4_text-moe", "gpt_oss", "falcon", "qwen2_moe", "qwen3_5_text"];
    let exports = families.into_iter().map(|family| {
        let (checkpoint, model) = dense(&format!("arch/{family}"));
        let folder = tempfile::tempdir().expect("a folder");
        let options = GgufOptions { tokenizer: false, ..GgufOptions::default() };
        export_gguf(&model, &checkpoint, folder.path().join("model.gguf"), &options).expect("a file");
        read_folder(folder.path())
    });
    files(&["model.gguf=gguf/llama-Q2_K.gguf"]).into_iter().chain(exports).collect()
}

fn gguf(folder: &Path) {
    let path = only(folder);
    if let Ok(file) = Gguf::open(&path) {
        let _ = (file.config(), file.special_tokens(), file.chat_template());
        let _ = file.tokenizer().map(|tokenizer| tokenizer.encode("The whale", true));
    }
    load(&path);
}

/// A small model, made once.
fn base() -> Decoder<QuantLinear> {
    static BASE: OnceLock<Decoder<QuantLinear>> = OnceLock::new();
    let load = || {
        let checkpoint = Checkpoint::open(testdata("forms/compressed-w4-group")).expect("a checkpoint");
        checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).expect("a model").0
    };
    BASE.get_or_init(load).clone()
}

fn own_model() -> Vec<Seed> {
    written(|path| {
        let checkpoint = Checkpoint::open(testdata("forms/compressed-w4-group")).expect("a checkpoint");
        save_model(&base(), &checkpoint, path).expect("a folder");
    })
}

fn packed(folder: &Path) {
    let Ok(file) = PackedFile::open(folder.join("model.safetensors")) else { return };
    let _ = file.verify();
}

fn lora() -> Tuned<Decoder<QuantLinear>> {
    Tuned::attach(base(), &AdapterConfig::lora(2, 4.0)).expect("adapters")
}

/// Adapters that train embedding, head and norms.
fn outside() -> [Tuned<Decoder<QuantLinear>>; 2] {
    let lora = || AdapterConfig::lora(2, 4.0);
    let configs = [
        lora().with_targets(["q_proj", "embed_tokens", "lm_head"]).with_modules_to_save(["model.norm"]),
        lora().with_targets(["q_proj"]).with_modules_to_save(["lm_head"]).with_trainable_tokens([1, 5]),
    ];
    configs.map(|config| Tuned::attach(base(), &config).expect("adapters"))
}

fn peft() -> Vec<Seed> {
    let of_others =
        outside().into_iter().flat_map(|tuned| written(|path| tuned.save_peft(path).expect("a folder")));
    folders(&["peft/tiny-lora-r8-all", "peft/tiny-dora-r4"]).into_iter().chain(of_others).collect()
}

fn own_adapter() -> Vec<Seed> {
    let bara = AdapterConfig::new(kiln::adapters::Method::QBara(kiln::adapters::QBara { lambda: 2 }), 2, 4.0);
    let bara = Tuned::attach(base(), &bara).expect("adapters");
    let all = [lora(), bara].into_iter().chain(outside());
    all.flat_map(|tuned| written(|path| tuned.save(path).expect("a folder"))).collect()
}

fn adapter(folder: &Path) {
    let _ = Tuned::load(base(), folder);
}

fn side_network() -> Vec<Seed> {
    written(|path| {
        SideTuned::new(base(), &SideConfig::qst().with_reduction(4), 0)
            .expect("a network")
            .save(path)
            .expect("a folder")
    })
}

fn side(folder: &Path) {
    let _ = SideTuned::load(base(), folder);
}

fn trainer() -> Trainer<kiln::AdaptedModel> {
    let ids = (0..64).map(|id| id % 30).collect();
    let data = Dataset::from_ids(ids, &DataOptions::new(8, base().vocab_size())).expect("data");
    let model = lora().into_model();
    Trainer::new(model, Arc::new(data), TrainerConfig::new(4, 2)).expect("a trainer")
}

fn checkpoints() -> Vec<Seed> {
    written(|path| {
        let mut trainer = trainer();
        trainer.step().expect("a step");
        trainer.save(path).expect("a folder");
    })
}

fn checkpoint(folder: &Path) {
    let _ = trainer().resumed(folder).map(|mut trainer| trainer.step());
}

/// A small tokenizer of every component.
fn tokenizers() -> Vec<Seed> {
    let parts = [
        (
            r#"{"type":"Sequence","normalizers":[{"type":"NFC"},{"type":"Replace","pattern":{"String":" "},"content":"_"},{"type":"Prepend","prepend":"_"},{"type":"Lowercase"}]}"#,
            r#"{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\s+(?!\\S)|[a-z]+|\\s+"},"behavior":"Isolated","invert":false},{"type":"Digits","individual_digits":true}]}"#,
            r#"{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"a","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],"special_tokens":{"a":{"id":"a","ids":[0],"tokens":["a"]}}}"#,
            r#"{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"_"},"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]}"#,
            r#"{"type":"BPE","dropout":null,"unk_token":"a","continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":true,"byte_fallback":true,"ignore_merges":false,"vocab":{"a":0,"b":1,"_":2,"c":3,"ab":4},"merges":[["a","b"]]}"#,
        ),
        (
            r#"{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true}"#,
            r#"{"type":"BertPreTokenizer"}"#,
            r#"{"type":"BertProcessing","sep":["b",1],"cls":["a",0]}"#,
            r###"{"type":"WordPiece","prefix":"##","cleanup":true}"###,
            r###"{"type":"WordPiece","unk_token":"a","continuing_subword_prefix":"##","max_input_chars_per_word":100,"vocab":{"a":0,"b":1,"##b":2}}"###,
        ),
        (
            r#"{"type":"Sequence","normalizers":[{"type":"NFKC"},{"type":"Strip","strip_left":true,"strip_right":true},{"type":"StripAccents"},{"type":"Nmt"}]}"#,
            r#"{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true}"#,
            r#"{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true}"#,
            r#"{"type":"Metaspace","replacement":"_","prepend_scheme":"always","split":true}"#,
            r#"{"type":"Unigram","unk_id":0,"vocab":[["a",-1.0],["b",-2.0],["_",-2.5],["ab",-3.0]],"byte_fallback":false}"#,
        ),
        (
            "null",
            r#"{"type":"Sequence","pretokenizers":[{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},{"type":"Punctuation","behavior":"Isolated"},{"type":"FixedLength","length":3},{"type":"CharDelimiterSplit","delimiter":"b"},{"type":"UnicodeScripts"},{"type":"Whitespace"}]}"#,
            r#"{"type":"RobertaProcessing","sep":["b",1],"cls":["a",0],"trim_offsets":true,"add_prefix_space":true}"#,
            r#"{"type":"CTC","pad_token":"a","word_delimiter_token":"b","cleanup":true}"#,
            r#"{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}"#,
        ),
    ];
    let seed = |(normalizer, pre_tokenizer, post_processor, decoder, model): (
        &str,
        &str,
        &str,
        &str,
        &str,
    )| {
        let whole = format!(
            r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{{"id":9,"content":"<s>","single_word":false,"lstrip":false,"rstrip":true,"normalized":false,"special":true}}],"normalizer":{normalizer},"pre_tokenizer":{pre_tokenizer},"post_processor":{post_processor},"decoder":{decoder},"model":{model}}}"#
        );
        let count = model.matches(&[',', ':'][..]).count();
        // The added token's id is the next free one: tried until it fits.
        let fits = |id: &usize| {
            let whole = whole.replace("\"id\":9", &format!("\"id\":{id}"));
            let folder = tempfile::tempdir().expect("a folder");
            fs::write(folder.path().join("tokenizer.json"), &whole).expect("a file");
            Tokenizer::from_folder(folder.path()).is_ok()
        };
        let id = (0..count).find(fits).expect("an id that is free");
        let config =
            r#"{"bos_token":"<s>","eos_token":{"content":"a"},"chat_template":"{{ messages[0].content }}"}"#;
        Seed(vec![
            ("tokenizer.json".into(), whole.replace("\"id\":9", &format!("\"id\":{id}")).into_bytes()),
            ("tokenizer_config.json".into(), config.into()),
        ])
    };
    parts.into_iter().map(seed).collect()
}

fn tokenizer(folder: &Path) {
    let Ok(tokenizer) = Tokenizer::from_folder(folder) else { return };
    let text = "The whale,  naïve 日本 ab_ab\n\n 12345 '' ".repeat(8);
    for text in [&text[..], "", "a"] {
        if let Ok(ids) = tokenizer.encode(text, true) {
            let _ = tokenizer.decode(&ids, false);
        }
    }
    let _ = (tokenizer.encode_with_offsets(&text, true), tokenizer.decode(&[0, 1, 2, u32::MAX], true));
}

fn templates() -> Vec<Seed> {
    let fixture = fs::read(testdata("chat/templates.json")).expect("a file");
    let fixture: serde_json::Value = serde_json::from_slice(&fixture).expect("JSON");
    let texts = fixture["templates"].as_array().expect("templates").iter().filter_map(|text| text.as_str());
    let more = [
        "{% set ns = namespace(x='', n=0) %}{% for m in messages %}{% if loop.first and m.role == 'system' %}{% set ns.x = m.content | trim %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}{{ '<|' ~ m['role'] ~ '|>' + m.content.split('</t>')[-1].strip() }}{% endfor %}{{ ns.x | tojson }}",
        "{% macro show(v, d=0) %}{% if v is mapping %}{% for k, w in v | dictsort %}{{ '  ' * 2 }}{{ k }}: {{ show(w, d + 1) }}{% endfor %}{% else %}{{ v | string | replace('a', 'b') | upper | indent(2) }}{% endif %}{% endmacro %}{{ show({'a': messages, 'b': [1, 2.5, none]}) }}{% set x %}{{ messages | map(attribute='role') | list | join(', ') }}{% endset %}{{ x[::-1] }}{% call(q) show(1) %}{{ q }}{% endcall %}",
        "{%- for m in messages | selectattr('role', 'in', ['user', 'assistant']) | batch(2) -%}{% with a = m[0], b = m | last %}{{ '%s-%03d' | format(a.role, loop.index) }}{{ '{:>5}'.format(b.content) }}{% endwith %}{% else %}{{ raise_exception('no') }}{%- endfor -%}{% filter upper %}x{% endfilter %}{% generation %}{{ eos_token }}{% endgeneration %}",
    ];
    texts.chain(more).map(|text| Seed(vec![("chat_template.jinja".into(), text.into())])).collect()
}

fn template(folder: &Path) {
    let Ok(source) = fs::read_to_string(only(folder)) else { return };
    let Ok(template) = ChatTemplate::new(&source) else { return };
    let messages = ["system", "user", "assistant", "user", "assistant"]
        .map(|role| Message::new(role, format!("some words of {role}\n")));
    let context = TemplateContext { eos_token: Some("</s>".into()), ..Default::default() };
    let _ = template.render(&messages, true, &context);
    let _ = template.render_with_assistant_ranges(&messages, &context);
}

fn data() -> Vec<Seed> {
    let rows = [
        (
            "g.jsonl",
            "{\"sentence1\": \"ab\", \"sentence2\": \"b\", \"label\": 1.5}\n{\"sentence1\": \"\", \"sentence2\": \"\", \"label\": 0}\n",
        ),
        ("a.jsonl", "{\"text\": \"ab ab\"}\n\n{\"text\": \"b\", \"id\": 3}\n"),
        (
            "b.jsonl",
            "{\"prompt\": \"ab\", \"completion\": \"ba\"}\n{\"prompt\": \"b\", \"completion\": \"\"}\n",
        ),
        (
            "c.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"ab\"}, {\"role\": \"assistant\", \"content\": \"ba\"}]}\n",
        ),
        (
            "f.jsonl",
            "{\"prompt\": \"ab\", \"chosen\": \"ba\", \"rejected\": \"b\", \"weight\": 0.5}\n{\"chosen\": \"a b\", \"rejected\": \"a a\"}\n",
        ),
        (
            "g.json",
            "[{\"prompt\": \"a\", \"completion\": \"b\", \"label\": true}, {\"prompt\": \"a\", \"completion\": \"b\", \"label\": 0}]",
        ),
        (
            "h.json",
            "{\"data\": [{\"instruction\": \"a\", \"input\": \"\", \"output\": \"b\", \"system\": \"s\"}]}",
        ),
        (
            "i.jsonl",
            "{\"tools\": \"[]\", \"conversations\": [{\"from\": \"human\", \"value\": \"ab\"}, {\"from\": \"function_call\", \"value\": \"{\\\"name\\\": 1}\"}, {\"from\": \"gpt\", \"value\": \"b\"}]}\n",
        ),
        ("d.txt", "ab ab abab \u{e9} ab\n"),
        ("e.u16le", "\u{1}\u{0}\u{2}\u{0}\u{3}\u{0}"),
    ];
    let table = include_bytes!("../../testdata/training/chat.parquet");
    let table = Seed(vec![("j.parquet".into(), table.to_vec())]);
    rows.map(|(name, text)| Seed(vec![(name.into(), text.into())])).into_iter().chain([table]).collect()
}

fn dataset(folder: &Path) {
    static PARTS: OnceLock<(Tokenizer, ChatTemplate)> = OnceLock::new();
    let (tokenizer, template) = PARTS.get_or_init(|| {
        let made = tempfile::tempdir().expect("a folder");
        for (name, bytes) in &tokenizers()[0].0 {
            fs::write(made.path().join(name), bytes).expect("a file");
        }
        let template = ChatTemplate::new("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
            .expect("a template");
        (Tokenizer::from_folder(made.path()).expect("a tokenizer"), template)
    });
    let text = ModelTokenizer::new(tokenizer, Some(template), TemplateContext::default());
    let _ =
        Dataset::open(only(folder), &text, &DataOptions::new(16, 300).with_eos(1).with_classes(["a", "b"]));
}

fn tasks() -> Vec<Seed> {
    let names = [
        "quiz_letters",
        "quiz_words",
        "quiz_generate",
        "quiz_last_word",
        "quiz_partial",
        "quiz_text",
        "quiz_yes_no",
    ];
    let seed = |name: &str| files(&[&format!("{name}.json=eval/quiz/{name}.json")]);
    names.iter().flat_map(|name| seed(name)).collect()
}

fn task(folder: &Path) {
    let Ok(task) = Task::from_file(only(folder)) else { return };
    let Ok(data) = kiln::eval::DataFolder::new(testdata("eval/quiz")).load(&task, 1) else { return };
    let _ = kiln::eval::Evaluation::new().with_limit(2).evaluate(&Nothing, &[(task, data)]);
}

/// A scorer that answers nothing.
struct Nothing;

impl Scorer for Nothing {
    fn loglikelihood(&self, _: &[(String, String)], _: OnAnswer) -> kiln::eval::Result<()> {
        Ok(())
    }

    fn loglikelihood_rolling(&self, _: &[String], _: OnAnswer) -> kiln::eval::Result<()> {
        Ok(())
    }

    fn generate_until(&self, _: &[GenerateRequest], _: OnAnswer) -> kiln::eval::Result<()> {
        Ok(())
    }
}

fn space() -> SearchSpace {
    let choices = kiln::mixq::Choices::new(
        ["affine2:64", "affine4:64"].map(|scheme| scheme.parse().expect("a scheme")),
    );
    kiln::mixq::space_of(&base(), &choices).expect("a space")
}

fn trial_log() -> Vec<Seed> {
    let space = space();
    written(|path| {
        fs::create_dir(path).expect("a folder");
        TrialLog::open(path.join("search.jsonl"), &space, "objective").expect("a log");
    })
}

fn log(folder: &Path) {
    static SPACE: OnceLock<SearchSpace> = OnceLock::new();
    let _ = TrialLog::open(only(folder), SPACE.get_or_init(space), "objective").map(|log| log.trials().len());
}
