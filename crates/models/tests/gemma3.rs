//! gemma-3-270m from its GGUF file against transformers on the same values. Runs where `KILN_GEMMA3` names the file that
//! `scripts/fetch-gemma3` fetches.

use burn::tensor::Device;
use kiln_models::{CausalLm, Checkpoint, GenerateOptions, LoadOptions, TokenBatch, generate};
use kiln_testkit::{read, skipped};

/// `<bos>The capital of France is`.
const PROMPT: [u32; 6] = [2, 818, 5279, 529, 7001, 563];
/// transformers 5.23.0 on the dequantized weights, f32, greedy.
const GREEDY: [u32; 16] =
    [506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488, 3207, 528, 7001, 532];
/// Its five largest logits after the prompt.
const LARGEST: [(usize, f32); 5] =
    [(506, 19.0915), (496, 18.5476), (9079, 18.2686), (886, 18.1130), (3224, 17.7839)];

#[test]
fn gemma3_continues_as_transformers() {
    let Some(path) = std::env::var_os("KILN_GEMMA3") else {
        return skipped("KILN_GEMMA3 names no file");
    };
    let checkpoint = Checkpoint::open(path).unwrap();
    let (model, report) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    assert_eq!(report.notes, Vec::<String>::new());
    let context = model.context(&TokenBatch::new(&[PROMPT.to_vec()]).unwrap(), None).unwrap();
    let logits = read(model.forward(&context));
    let last = &logits[logits.len() - model.vocab_size()..];
    for (id, expected) in LARGEST {
        assert!((last[id] - expected).abs() < 2e-3, "{id}: {}, expected {expected}", last[id]);
    }
    let generated = generate(&model, &PROMPT, &GenerateOptions::new(GREEDY.len())).unwrap();
    assert_eq!(generated.ids, GREEDY);
}
