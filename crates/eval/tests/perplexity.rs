//! Perplexities of the embedded model, of a tiny checkpoint, and, where it is at hand, of SmolLM2.

use std::{ops::ControlFlow, time::Instant};

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Device, Tensor},
};
use kiln_eval::{
    Error, Perplexity, RollingDocument, RollingPerplexity, StridedPerplexity, WindowedPerplexity,
};
use kiln_models::{CausalLm, Checkpoint, Decoder, LoadOptions};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, smollm2, testdata, u16le};

fn load(path: impl AsRef<std::path::Path>, scheme: Option<&str>) -> Decoder<QuantLinear> {
    let options = match scheme {
        Some(scheme) => LoadOptions::uniform(scheme.parse().unwrap()).in_f32(),
        None => LoadOptions::default().in_f32(),
    };
    Checkpoint::open(path).unwrap().load(&options, &Device::flex()).unwrap().0
}

/// Ids of a file of little-endian u16.
#[track_caller]
fn assert_near(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance,
        "{what}: found {found}, expected {expected} ± {tolerance}"
    );
}

/// The tiny checkpoint of the fixtures, its two rows of 24 tokens, and the negative log-likelihood of each row's
/// tokens from the second on, from transformers' logits in f64.
fn tiny() -> (Decoder<QuantLinear>, Vec<u32>, Vec<Vec<f64>>) {
    let golden = Golden::open("tiny/llama-untied-bf16/golden.safetensors");
    let ids: Vec<u32> = golden.ints("input_ids").into_iter().map(|id| id as u32).collect();
    let logits = golden.floats("logits");
    let nll = |place: usize| {
        let row = &logits[256 * place..256 * (place + 1)];
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        sum.ln() - f64::from(row[ids[place + 1] as usize])
    };
    let nll = [0, 24].map(|start| (start..start + 23).map(nll).collect()).to_vec();
    (load(testdata("tiny/llama-untied-bf16"), None), ids, nll)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The README of the model gives its figures to two digits after the point; a text's tolerance is what rounding and
/// the order of f32 sums may change.
#[test]
fn the_embedded_model_has_the_perplexities_of_its_readme() {
    let texts = [("indomain_heldout_sotu_2011", 0.05), ("shift_test_moby", 0.3)];
    for (scheme, expected) in [
        (None, [Some(50.09), Some(284.37)]),
        (Some("affine4:64:int"), [Some(50.42), Some(283.77)]),
        (Some("affine2:64:int"), [Some(62.28), None]),
    ] {
        let model = load(testdata("models/tiny-llama"), scheme);
        for ((text, tolerance), expected) in texts.into_iter().zip(expected) {
            let Some(expected) = expected else { continue };
            let ids = u16le(&format!("models/tiny-llama/text/{text}.u16le"));
            let found = WindowedPerplexity::new(256).with_batch(4).evaluate(&model, &ids).unwrap();
            assert_eq!((found.windows, found.tokens), (64, 64 * 255));
            assert_near(&format!("{scheme:?} {text}"), found.perplexity, expected, tolerance);
        }
    }
}

#[test]
fn windowed_perplexity_equals_a_calculation_by_hand() {
    let (model, ids, nll) = tiny();
    let all = nll.concat();
    for batch in [1, 2, 5] {
        let mut heard = Vec::new();
        let protocol = WindowedPerplexity::new(24).with_batch(batch);
        let found = protocol.evaluate_with(&model, &ids, &mut |progress| {
            heard.push((progress.windows, progress.total));
            ControlFlow::Continue(())
        });
        let found = found.unwrap();
        assert_near("nll", found.nll, mean(&all), 1e-5);
        assert_near("perplexity", found.perplexity, mean(&all).exp(), 1e-3 * mean(&all).exp());
        assert_eq!((found.tokens, found.windows), (46, 2));
        let difference = (mean(&nll[0]) - mean(&nll[1])).abs() / 2.0;
        assert_near("error over windows", found.standard_error.windows.unwrap(), difference, 1e-4);
        let squares: f64 = all.iter().map(|nll| (nll - mean(&all)).powi(2)).sum();
        assert_near(
            "error over tokens",
            found.standard_error.tokens.unwrap(),
            (squares / 45.0 / 46.0).sqrt(),
            1e-4,
        );
        assert_eq!(heard, if batch == 1 { vec![(1, 2), (2, 2)] } else { vec![(2, 2)] });
    }
    let first = WindowedPerplexity::new(24).with_max_windows(1).evaluate(&model, &ids).unwrap();
    assert_near("first window", first.nll, mean(&nll[0]), 1e-5);
    // What doesn't fill a window is dropped.
    let cut = WindowedPerplexity::new(24).evaluate(&model, &ids[..47]).unwrap();
    assert_eq!(cut, first);
}

#[test]
fn strided_perplexity_with_stride_window_equals_windowed() {
    let (model, ids, _) = tiny();
    let windowed = WindowedPerplexity::new(12).evaluate(&model, &ids).unwrap();
    let strided = StridedPerplexity::new(12, 12).evaluate(&model, &ids).unwrap();
    assert_eq!(strided, windowed);
}

#[test]
fn strided_perplexity_equals_a_calculation_by_hand() {
    let (model, ids, nll) = tiny();
    // One row in one window: the stride doesn't matter.
    let row = StridedPerplexity::new(24, 8).evaluate(&model, &ids[..24]).unwrap();
    assert_near("one window", row.nll, mean(&nll[0]), 1e-5);
    // Windows of 24 over the first 32 tokens, stride 8: 24 new ones, then 8 in the window 8..32; the guide counts 23 and 7.
    let found = StridedPerplexity::new(24, 8).evaluate(&model, &ids[..32]).unwrap();
    assert_eq!((found.tokens, found.windows), (30, 2));
    // The second window's logits aren't in the fixture; its last 8 tokens are those of a text of 24 whose last 8 count.
    let whole = WindowedPerplexity::new(24).evaluate(&model, &ids[8..32]).unwrap();
    let start = WindowedPerplexity::new(16).evaluate(&model, &ids[8..24]).unwrap();
    let last = (whole.nll * 23.0 - start.nll * 15.0) / 8.0;
    assert_near("two windows", found.nll, (mean(&nll[0]) * 23.0 + last * 7.0) / 30.0, 1e-5);
}

#[test]
fn rolling_perplexity_equals_a_calculation_by_hand() {
    let (model, ids, nll) = tiny();
    // The prefix is the row's first token: a document of the rest is scored as the fixture scores the row.
    let document = |row: usize, words, bytes| RollingDocument {
        ids: ids[24 * row + 1..24 * row + 24].to_vec(),
        words,
        bytes,
    };
    let found = RollingPerplexity::new(23, ids[0]).evaluate(&model, &[document(0, 5, 60)]).unwrap();
    let sum: f64 = nll[0].iter().sum();
    assert_eq!((found.token.tokens, found.token.windows, found.words, found.bytes), (23, 1, 5, 60));
    assert_near("per token", found.token.nll, sum / 23.0, 1e-5);
    assert_near("per word", found.word_perplexity.ln(), sum / 5.0, 1e-4);
    assert_near("per byte", found.byte_perplexity.ln(), sum / 60.0, 1e-5);
    assert_near("bits", found.bits_per_byte, sum / 60.0 / 2f64.ln(), 1e-5);

    // Windows of 10 over 23 tokens: 10, 10, and 3 that see ten.
    let found = RollingPerplexity::new(10, ids[0]).evaluate(&model, &[document(0, 5, 60)]).unwrap();
    let part = |range: std::ops::Range<usize>, last: usize| {
        let whole = &ids[range];
        let nll = |ids: &[u32]| {
            let found = WindowedPerplexity::new(ids.len()).evaluate(&model, ids).unwrap();
            found.nll * (ids.len() - 1) as f64
        };
        let before = whole.len() - last;
        nll(whole) - if before > 1 { nll(&whole[..before]) } else { 0.0 }
    };
    let expected = part(0..11, 10) + part(10..21, 10) + part(13..24, 3);
    assert_near("three windows", found.token.nll * 23.0, expected, 1e-3);

    // Two documents are two texts, whatever the batch.
    let documents = [document(0, 5, 60), document(1, 7, 80), RollingDocument::new(vec![], " a ")];
    let both =
        |batch| RollingPerplexity::new(10, ids[0]).with_batch(batch).evaluate(&model, &documents).unwrap();
    let second = RollingPerplexity::new(10, ids[0]).evaluate(&model, &documents[1..2]).unwrap();
    assert_near("two documents", both(1).token.nll, (found.token.nll + second.token.nll) / 2.0, 1e-6);
    assert_near("batch", both(3).token.nll, both(1).token.nll, 1e-6);
    assert_eq!((both(1).words, both(1).bytes, both(1).token.windows), (15, 143, 6));
}

#[test]
fn the_callback_ends_an_evaluation() {
    let (model, ids, _) = tiny();
    let result = WindowedPerplexity::new(4).evaluate_with(&model, &ids, &mut |progress| {
        assert!(progress.nll.is_finite());
        if progress.windows == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(Error::Cancelled { windows: 3, total: 12 })), "{result:?}");
}

#[test]
fn bad_options_and_data_are_errors_that_name_them() {
    let (model, ids, _) = tiny();
    let limit = model.max_positions();
    let windowed = |protocol: WindowedPerplexity, ids: &[u32]| message(protocol.evaluate(&model, ids));
    let strided = |protocol: StridedPerplexity, ids: &[u32]| message(protocol.evaluate(&model, ids));
    let rolling = |protocol: RollingPerplexity, documents: &[RollingDocument]| {
        message(protocol.evaluate(&model, documents))
    };
    let document = |ids: &[u32]| RollingDocument::new(ids.to_vec(), "two words");
    for (found, parts) in [
        (windowed(WindowedPerplexity::new(1), &ids), &["WindowedPerplexity.window", "found 1"][..]),
        (windowed(WindowedPerplexity::new(limit + 1), &ids), &["WindowedPerplexity.window", "model's limit"]),
        (windowed(WindowedPerplexity::new(8).with_batch(0), &ids), &["WindowedPerplexity.batch"]),
        (windowed(WindowedPerplexity::new(8).with_max_windows(0), &ids), &["WindowedPerplexity.max_windows"]),
        (windowed(WindowedPerplexity::new(8), &[]), &["tokens", "at least one window of 8", "found 0"]),
        (windowed(WindowedPerplexity::new(8), &ids[..7]), &["tokens", "found 7"]),
        (windowed(WindowedPerplexity::new(2), &[1, 2, 256]), &["token 2", "below 256", "found 256"]),
        (strided(StridedPerplexity::new(1, 1), &ids), &["StridedPerplexity.window"]),
        (strided(StridedPerplexity::new(limit + 1, 8), &ids), &["StridedPerplexity.window"]),
        (strided(StridedPerplexity::new(8, 1), &ids), &["StridedPerplexity.stride"]),
        (strided(StridedPerplexity::new(8, 9), &ids), &["StridedPerplexity.stride", "8", "found 9"]),
        (strided(StridedPerplexity::new(8, 4), &ids[..1]), &["tokens", "at least 2"]),
        (strided(StridedPerplexity::new(8, 4), &[1, 999]), &["token 1", "999"]),
        (rolling(RollingPerplexity::new(0, 0), &[document(&ids)]), &["RollingPerplexity.max_length"]),
        (rolling(RollingPerplexity::new(limit + 1, 0), &[document(&ids)]), &["RollingPerplexity.max_length"]),
        (rolling(RollingPerplexity::new(8, 256), &[document(&ids)]), &["prefix, token 0", "256"]),
        (rolling(RollingPerplexity::new(8, 0), &[]), &["tokens", "at least 1"]),
        (rolling(RollingPerplexity::new(8, 0), &[document(&[])]), &["tokens", "at least 1"]),
        (
            rolling(RollingPerplexity::new(8, 0), &[document(&[1]), document(&[2, 300])]),
            &["document 1, token 1"],
        ),
        (
            rolling(RollingPerplexity::new(8, 0), &[RollingDocument { bytes: 0, ..document(&[1]) }]),
            &["bytes", "at least 1"],
        ),
    ] {
        for part in parts {
            assert!(found.contains(part), "no \"{part}\" in: {found}");
        }
    }
}

/// Makes every parameter infinite.
struct Infinite;

impl ModuleMapper for Infinite {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.mul_scalar(f32::INFINITY))
    }
}

#[test]
fn a_model_that_gives_no_numbers_is_an_error() {
    let (model, ids, _) = tiny();
    let model = model.map(&mut Infinite);
    let result = WindowedPerplexity::new(8).evaluate(&model, &ids);
    assert!(matches!(result, Err(Error::NotFinite { window: 0, .. })), "{result:?}");
}

fn message<T: std::fmt::Debug>(result: kiln_eval::Result<T>) -> String {
    result.unwrap_err().to_string()
}

/// 20 windows of 512 tokens; the references are PyTorch's, in f32.
#[test]
fn smollm2_has_the_perplexities_of_the_fixtures() {
    let Some(path) = smollm2() else { return };
    let ids = u16le("text/moby_ch100_smollm2_10240.u16le");
    for (scheme, expected, tolerance) in
        [("dense", 48.357, 0.05), ("affine4:64:int", 61.78, 0.3), ("nf4:64", 61.12, 0.3)]
    {
        let model = load(&path, Some(scheme));
        let start = Instant::now();
        let found: Perplexity = WindowedPerplexity::new(512).evaluate(&model, &ids).unwrap();
        eprintln!("{scheme}: {found:?}, {:.1} s", start.elapsed().as_secs_f64());
        assert_eq!((found.windows, found.tokens), (20, 20 * 511));
        assert_near(scheme, found.perplexity, expected, tolerance);
    }
}
