//! Generation with the tiny checkpoints.

use std::ops::ControlFlow;

use burn::{module::Module, tensor::Device};
use kiln_models::{
    CausalLm, Checkpoint, Decoder, Finish, GenerateOptions, LoadOptions, generate, generate_batch,
    generate_with,
};
use kiln_quant_core::QuantLinear;
use kiln_testkit::{Golden, testdata};

const FOLDERS: [&str; 6] = [
    "llama-tied-f32-sharded",
    "llama-untied-bf16",
    "llama-rope3-headdim24-f32",
    "qwen2-tied-f32",
    "mistral-swa8-f32",
    "opt-f32",
];

fn load(folder: &str) -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap();
    checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

/// The fixture's prompt and transformers' 16 greedy tokens.
fn reference(folder: &str) -> (Vec<u32>, Vec<u32>) {
    let golden = Golden::open(&format!("tiny/{folder}/golden.safetensors"));
    let ids = |name| golden.ints(name).into_iter().map(|id| id as u32).collect::<Vec<_>>();
    let (prompt, whole) = (ids("greedy.prompt"), ids("greedy.out"));
    let new = whole[prompt.len()..].to_vec();
    (prompt, new)
}

fn run<M: CausalLm>(model: &M, prompt: &[u32], options: &GenerateOptions) -> (Vec<u32>, Finish) {
    let mut heard = Vec::new();
    let generation = generate_with(model, prompt, options, &mut |id| {
        heard.push(id);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(heard, generation.ids);
    (generation.ids, generation.finish)
}

#[test]
fn greedy_generation_equals_transformers() {
    for folder in FOLDERS {
        let (model, (prompt, expected)) = (load(folder), reference(folder));
        let greedy = GenerateOptions::new(expected.len());
        assert_eq!(run(&model, &prompt, &greedy), (expected.clone(), Finish::Length), "{folder}");
        let top_1 = greedy.clone().with_temperature(1.7).with_top_k(1).with_seed(9);
        assert_eq!(run(&model, &prompt, &top_1), (expected.clone(), Finish::Length), "{folder}");
        let narrow = greedy.with_temperature(0.9).with_top_p(1e-6);
        assert_eq!(run(&model, &prompt, &narrow), (expected, Finish::Length), "{folder}");
    }
}

/// By transformers' `generate` with `repetition_penalty`.
#[test]
fn greedy_generation_with_a_penalty_equals_transformers() {
    let (model, (prompt, _)) = (load(FOLDERS[0]), reference(FOLDERS[0]));
    for (penalty, expected) in [
        (1.3, [208, 110, 170, 70, 187, 187, 5, 120, 115, 115, 169, 24, 156, 82, 2, 102]),
        (2.0, [208, 110, 170, 70, 187, 84, 90, 46, 160, 40, 93, 102, 48, 182, 112, 158]),
    ] {
        let options = GenerateOptions::new(16).with_repetition_penalty(penalty);
        assert_eq!(run(&model, &prompt, &options).0, expected, "{penalty}");
    }
}

/// Rows of different lengths, of which some end early, are what they are alone.
#[test]
fn a_batch_is_its_rows() {
    for folder in FOLDERS {
        let (model, (prompt, expected)) = (load(folder), reference(folder));
        let prompts = [&prompt[..], &prompt[..3], &prompt[2..5], &expected[..7]];
        let stops = expected[3];
        for options in [
            GenerateOptions::new(12),
            GenerateOptions::new(12).with_stop([stops]),
            GenerateOptions::new(12).with_repetition_penalty(1.5).with_stop([stops]),
        ] {
            let found = generate_batch(&model, &prompts, &options).unwrap();
            for (found, prompt) in found.iter().zip(prompts) {
                assert_eq!(*found, generate(&model, prompt, &options).unwrap(), "{folder} {options:?}");
            }
        }
        let drawn = GenerateOptions::new(8).with_temperature(1.0).with_seed(4);
        let found = generate_batch(&model, &prompts, &drawn).unwrap();
        for (row, (found, prompt)) in (4..).zip(found.iter().zip(prompts)) {
            let alone = generate(&model, prompt, &drawn.clone().with_seed(row)).unwrap();
            assert_eq!(*found, alone, "{folder}");
        }
    }
    let model = load(FOLDERS[0]);
    assert!(generate_batch(&model, &[[1u32; 2]; 0], &GenerateOptions::new(1)).unwrap().is_empty());
    let empty: [&[u32]; 2] = [&[1], &[]];
    assert!(generate_batch(&model, &empty, &GenerateOptions::new(1)).is_err());
}

#[test]
fn a_model_in_training_generates_the_same() {
    let (model, (prompt, expected)) = (load(FOLDERS[0]), reference(FOLDERS[0]));
    let model = model.unfreeze().train();
    assert_eq!(run(&model, &prompt, &GenerateOptions::new(16)).0, expected);
}

#[test]
fn the_seed_decides_what_is_drawn() {
    let (model, (prompt, greedy)) = (load(FOLDERS[0]), reference(FOLDERS[0]));
    let draw = |seed| run(&model, &prompt, &GenerateOptions::new(16).with_temperature(1.0).with_seed(seed)).0;
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert_ne!(draw(1), greedy);
}

#[test]
fn stop_tokens_and_the_callback_end_the_text() {
    let (model, (prompt, expected)) = (load(FOLDERS[0]), reference(FOLDERS[0]));
    let end = expected.iter().position(|id| *id == expected[5]).unwrap();
    let options = GenerateOptions::new(16).with_stop([9999, expected[5]]);
    assert_eq!(run(&model, &prompt, &options), (expected[..=end].to_vec(), Finish::Stop));

    let mut left = 3;
    let generation = generate_with(&model, &prompt, &GenerateOptions::new(16), &mut |_| {
        left -= 1;
        if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!(generation.ids, expected[..3]);
    assert_eq!(generation.finish, Finish::Cancelled);
}

#[test]
fn bad_prompts_and_options_are_errors_that_name_them() {
    let model = load(FOLDERS[0]);
    let limit = model.max_positions();
    let options = GenerateOptions::new;
    let long = vec![1; limit];
    for (prompt, options, part) in [
        (&[][..], options(4), "prompt_ids"),
        (&[1, 256][..], options(4), "256"),
        (&long[..], options(1), "the model's limit"),
        (&[1][..], options(limit), "GenerateOptions.max_new_tokens: expected at most"),
        (&[1][..], options(usize::MAX), "max_new_tokens"),
        (&[1][..], options(0), "max_new_tokens"),
        (&[1][..], options(4).with_temperature(-0.1), "temperature"),
        (&[1][..], options(4).with_temperature(f64::NAN), "temperature"),
        (&[1][..], options(4).with_temperature(f64::INFINITY), "temperature"),
        (&[1][..], options(4).with_top_k(0), "top_k"),
        (&[1][..], options(4).with_top_p(0.0), "top_p"),
        (&[1][..], options(4).with_top_p(1.01), "top_p"),
        (&[1][..], options(4).with_top_p(f64::NAN), "top_p"),
    ] {
        let result = generate(&model, prompt, &options);
        let message = result.unwrap_err().to_string();
        assert!(message.contains(part), "no \"{part}\" in: {message}");
    }
    // The whole of the positions can be used.
    assert_eq!(run(&model, &long[..limit - 2], &options(2)).0.len(), 2);
}
