//! Negative log-likelihoods against transformers' logits.

use burn::{module::Module, tensor::Device};
use kiln_models::{Checkpoint, Decoder, LoadOptions, Targets, TokenBatch, token_nll};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, assert_close, testdata};

/// The references are f32 arithmetic on the stored weights.
const TOLERANCE: f32 = 1e-4;

fn load(folder: &str) -> (Decoder<QuantLinear>, Golden) {
    let checkpoint = Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    (model, Golden::open(&format!("tiny/{folder}/golden.safetensors")))
}

/// The fixture's two rows of 24 tokens, and the ids that follow each (0 after a row's last).
fn tokens(golden: &Golden) -> (TokenBatch, Vec<u32>) {
    let ids: Vec<u32> = golden.ints("input_ids").into_iter().map(|id| id as u32).collect();
    let rows: Vec<Vec<u32>> = ids.chunks(24).map(<[u32]>::to_vec).collect();
    let targets = rows.iter().flat_map(|row| row[1..].iter().copied().chain([0])).collect();
    (TokenBatch::new(&rows).unwrap(), targets)
}

/// From the fixture's logits, in f64.
fn by_hand(logits: &[f32], target: u32) -> f32 {
    let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    (sum.ln() - f64::from(logits[target as usize])) as f32
}

#[test]
fn nll_equals_the_log_softmax_of_transformers_logits() {
    for folder in ["llama-untied-bf16", "llama-tied-f32-sharded", "opt-f32", "llama-untied-gptq4-v1"] {
        let (model, golden) = load(folder);
        let (tokens, ids) = tokens(&golden);
        let scored: Vec<bool> = (0..48).map(|place| place % 24 != 23).collect();
        let found = token_nll(&model, &tokens, Targets { ids: &ids, scored: &scored }).unwrap();
        let logits = golden.floats("logits");
        let logits: Vec<&[f32]> = logits.chunks(256).collect();
        let places = (0..48).filter(|place| scored[*place]);
        let expected: Vec<f32> = places.map(|place| by_hand(logits[place], ids[place])).collect();
        assert_close(folder, &found, &expected, TOLERANCE);
        if golden.contains("loss") {
            let mean = found.iter().sum::<f32>() / 46.0;
            assert_close(folder, &[mean], &golden.floats("loss"), 1e-5);
        }
        // A few places only, and a model in training.
        let few: Vec<bool> = (0..48).map(|place| place == 3 || place == 30).collect();
        let model = model.unfreeze().train();
        let found = token_nll(&model, &tokens, Targets { ids: &ids, scored: &few }).unwrap();
        assert_close(folder, &found, &[expected[3], expected[29]], 1e-5);
        assert!(token_nll(&model, &tokens, Targets { ids: &ids, scored: &[false; 48] }).unwrap().is_empty());
    }
}

#[test]
fn more_rows_than_a_chunk_are_scored_one_by_one() {
    let (model, _) = load("llama-untied-bf16");
    let ids: Vec<u32> = (0..200).map(|i| (i * 37 + 11) % 256).collect();
    let next: Vec<u32> = ids[1..].iter().copied().chain([0]).collect();
    let tokens = TokenBatch::new(std::slice::from_ref(&ids)).unwrap();
    let nll = |scored: &[bool]| token_nll(&model, &tokens, Targets { ids: &next, scored }).unwrap();
    let all = nll(&[true; 200]);
    for place in [0, 127, 128, 199] {
        let one: Vec<bool> = (0..200).map(|other| other == place).collect();
        assert_close("one place", &nll(&one), &[all[place]], 1e-5);
    }
}

#[test]
fn tokens_and_targets_that_do_not_fit_are_errors() {
    let (model, _) = load("llama-untied-bf16");
    let batch = |ids: &[u32]| TokenBatch::new(&[ids.to_vec()]).unwrap();
    let message = |tokens: &TokenBatch, ids: &[u32], scored: &[bool]| {
        token_nll(&model, tokens, Targets { ids, scored }).unwrap_err().to_string()
    };
    let (short, long) = (batch(&[1, 2]), batch(&[1; 257]));
    for (found, part) in [
        (message(&batch(&[1, 256]), &[2, 3], &[true; 2]), "token ids: expected ids below 256"),
        (message(&short, &[256, 3], &[true; 2]), "target ids: expected ids below 256"),
        (message(&short, &[2], &[true; 2]), "1 ids and 2 flags"),
        (message(&short, &[2, 3], &[true]), "2 ids and 1 flags"),
        (message(&long, &[1; 257], &[true; 257]), "positions: expected positions below 256"),
    ] {
        assert!(found.contains(part), "no \"{part}\" in: {found}");
    }
    // What isn't scored may be anything.
    assert_eq!(
        token_nll(&model, &short, Targets { ids: &[2, 999], scored: &[true, false] }).unwrap().len(),
        1
    );
}
