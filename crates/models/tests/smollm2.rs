//! SmolLM2-135M from its GGUF file against transformers on the same values. Runs where `KILN_SMOLLM2` names the file.

use burn::{
    module::Module,
    tensor::{Device, Tensor},
};
use kiln_models::{
    CausalLm, Checkpoint, GenerateOptions, LoadOptions, Slots, TokenBatch, families::NormPlace, generate,
};
use kiln_quant_core::{Projection, Scheme, fused};
use kiln_testkit::{Golden, assert_close, read, relative_difference, smollm2};

/// Two correct f32 implementations differ by up to 6e-5 in a logit.
const TOLERANCE: f32 = 2e-3;

fn checkpoint() -> Option<Checkpoint> {
    smollm2().map(|path| Checkpoint::open(path).unwrap())
}

fn prompts() -> (Golden, Vec<Vec<u32>>) {
    let golden = Golden::open("smollm2_forward_f32.safetensors");
    let ids = |k| golden.ints(&format!("p{k}.ids")).into_iter().map(|id| id as u32).collect();
    let prompts = (0..3).map(ids).collect();
    (golden, prompts)
}

fn norms(x: Tensor<3>) -> Vec<f32> {
    read(x.square().sum_dim(2).sqrt())
}

#[test]
fn smollm2_gives_the_logits_of_transformers() {
    let Some(checkpoint) = checkpoint() else { return };
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let (golden, prompts) = prompts();
    for (k, ids) in prompts.iter().enumerate() {
        let name = |part: &str| format!("p{k}.{part}");
        let states = model.hidden_states(
            &model.context(&TokenBatch::new(std::slice::from_ref(ids)).unwrap(), None).unwrap(),
        );
        let lengths: Vec<f32> = states.iter().flat_map(|state| norms(state.clone())).collect();
        // Norms grow to thousands: compare relatively.
        assert!(relative_difference(&lengths, &golden.floats(&name("hidden_l2"))) < 1e-5);
        let length = ids.len();
        let logits = model.lm_head(states[30].clone()).squeeze_dim::<2>(0);
        let last = read(logits.clone().narrow(0, length - 4, 4));
        let every: Vec<f32> = last.chunks(49152).flat_map(|row| row.iter().copied().step_by(64)).collect();
        assert_close("logits", &every, &golden.floats(&name("logits_last4_every64")), TOLERANCE);
        let (top, ids_of_top) =
            (golden.floats(&name("top32_values_last4")), golden.ints(&name("top32_ids_last4")));
        let found: Vec<f32> =
            ids_of_top.iter().enumerate().map(|(i, &id)| last[i / 32 * 49152 + id as usize]).collect();
        assert_close("largest logits", &found, &top, TOLERANCE);
        let targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
        let targets = Tensor::from_data(targets.as_slice(), &Device::flex());
        let nll = read(fused::cross_entropy(logits.narrow(0, 0, length - 1), targets));
        assert_close("nll", &nll, &golden.floats(&name("nll_per_token")), TOLERANCE);
    }
}

#[test]
fn smollm2_continues_as_transformers_does() {
    let Some(checkpoint) = checkpoint() else { return };
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let expected = [
        " Paris.\n\nThe answer is: 2018-01",
        "To find the prime numbers greater than 10, we need to find the",
        " n * fibonacci(n - 1)\n```\n\nThis implementation",
    ];
    for (ids, expected) in prompts().1.iter().zip(expected) {
        let found = generate(&model, ids, &GenerateOptions::new(16)).unwrap();
        assert_eq!(tokenizer.decode(&found.ids, true).unwrap(), expected);
    }
}

#[test]
fn smollm2_has_the_gradients_of_torch() {
    let Some(checkpoint) = checkpoint() else { return };
    let options = LoadOptions::uniform(Scheme::Dense).in_f32();
    let (model, _) = checkpoint.load(&options, &Device::flex()).unwrap();
    let model = model.unfreeze().train();
    let (golden, prompts) = prompts();
    for (k, ids) in prompts.iter().enumerate() {
        let logits = model
            .forward(&model.context(&TokenBatch::new(std::slice::from_ref(ids)).unwrap(), None).unwrap());
        let targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
        let targets = Tensor::from_data(targets.as_slice(), &Device::flex());
        let logits = logits.squeeze_dim::<2>(0).narrow(0, 0, ids.len() - 1);
        let gradients = fused::cross_entropy(logits, targets).mean().backward();
        let norm = |x: Tensor<2>| read(x.grad(&gradients).unwrap().square().sum().sqrt())[0];
        let linears: Vec<f32> = model.slots().into_iter().map(|(_, slot)| norm(slot.weight())).collect();
        let gain = |x: Tensor<1>| read(x.grad(&gradients).unwrap().square().sum().sqrt())[0];
        let found: Vec<f32> = linears
            .chunks(7)
            .zip(&model.blocks)
            .flat_map(|(linears, block)| {
                let norms =
                    [NormPlace::PreAttention, NormPlace::PreMlp].map(|place| block.norm(place).unwrap());
                linears
                    .iter()
                    .copied()
                    .chain(norms.map(|norm| gain(norm.weight.as_ref().unwrap().val())))
                    .collect::<Vec<_>>()
            })
            .collect();
        let expected = golden.floats(&format!("p{k}.grad_l2_by_layer"));
        assert!(relative_difference(&found, &expected) < 1e-4, "p{k}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found / expected - 1.0).abs() < 1e-3, "p{k}: {found} {expected}");
        }
        let expected = golden.floats(&format!("p{k}.grad_l2_embed_norm"))[1];
        assert!((gain(model.final_norm.weight.as_ref().unwrap().val()) / expected - 1.0).abs() < 1e-3);
    }
}
