//! One test binary.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "what tests print is shown when they fail, or on request"
)]

mod behaviour;
mod checkpoints;
mod forward;
mod masking;
mod memory;
mod packed;
mod ranks;
mod refusals;

use std::collections::BTreeMap;

use burn::{
    module::Param,
    module::ParamId,
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use kiln_models::families::Channels;
use kiln_models::{CausalLm, Checkpoint, Decoder, LoadOptions, Slots, TokenBatch, Windows};
use kiln_pruning::{Kept, Structure};
use kiln_quant_core::{Projection, QuantLinear};
use kiln_testkit::{Golden, ids, read, testdata};

/// A checkpoint of each architecture, with and without biases, tied and untied, with a window.
pub(crate) const FOLDERS: [&str; 7] = [
    "llama-untied-bf16",
    "llama-rope3-headdim24-f32",
    "mistral-swa8-f32",
    "qwen2-tied-f32",
    "qwen3-untied-f32",
    "opt-f32",
    "gemma3-text-f32",
];

pub(crate) fn checkpoint(folder: &str) -> Checkpoint {
    Checkpoint::open(testdata(&format!("tiny/{folder}"))).unwrap()
}

pub(crate) fn load(folder: &str) -> Decoder<QuantLinear> {
    checkpoint(folder).load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

/// The checkpoints of `testdata/arch`.
pub(crate) fn architectures() -> Vec<String> {
    let entries = std::fs::read_dir(testdata("arch")).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut folders: Vec<String> = folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    folders.sort();
    assert!(folders.len() >= 46, "{folders:?}");
    folders
}

pub(crate) fn architecture(folder: &str) -> Decoder<QuantLinear> {
    let checkpoint = Checkpoint::open(testdata(&format!("arch/{folder}"))).unwrap();
    checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap().0
}

/// Its fixture's rows.
pub(crate) fn rows_of(folder: &str) -> TokenBatch {
    let ids = Golden::open(&format!("arch/{folder}/golden.safetensors")).ints("input_ids");
    let rows: Vec<Vec<u32>> = ids.chunks(24).map(|row| row.iter().map(|&id| id as u32).collect()).collect();
    TokenBatch::new(&rows).unwrap()
}

/// The model of the repository, and tokens it was not trained on.
pub(crate) fn embedded() -> (Decoder<QuantLinear>, Vec<u32>) {
    let checkpoint = Checkpoint::open(testdata("models/tiny-llama")).unwrap();
    let (model, _) = checkpoint.load(&LoadOptions::default().in_f32(), &Device::flex()).unwrap();
    (model, ids("indomain_heldout_sotu_2011"))
}

/// The fixtures' two rows of 24 tokens.
pub(crate) fn tokens(folder: &str) -> TokenBatch {
    let golden = Golden::open(&format!("tiny/{folder}/golden.safetensors"));
    let ids: Vec<u32> = golden.ints("input_ids").into_iter().map(|id| id as u32).collect();
    let rows: Vec<Vec<u32>> = ids.chunks(24).map(<[u32]>::to_vec).collect();
    TokenBatch::new(&rows).unwrap()
}

pub(crate) fn logits(model: &Decoder<QuantLinear>, tokens: &TokenBatch) -> Vec<f32> {
    read(model.forward(&model.context(tokens, None).unwrap()))
}

/// Windows of pseudo-random ids below 96, the smallest vocabulary.
pub(crate) fn calibration() -> Windows {
    Windows::new((0..6).map(|w| (0..16).map(|i| (w * 61 + i * 7 + i * i * 3) % 96).collect()).collect())
        .unwrap()
}

/// Replaces weights and biases by path; the function gets `[d_input, d_output]` values and the bias.
pub(crate) fn edit(
    model: Decoder<QuantLinear>,
    mut edit: impl FnMut(&str, [usize; 2], &mut [f32], Option<&mut Vec<f32>>),
) -> Decoder<QuantLinear> {
    let device = Device::flex();
    let dense = model.dense_slots();
    let done = model.try_map(|path, slot| {
        if dense.contains(path) {
            return Ok(slot);
        }
        let shape = slot.shape();
        let (mut weight, mut bias) = (read(slot.weight()), slot.bias().map(read));
        edit(path, shape, &mut weight, bias.as_mut());
        let param = |tensor| Param::initialized(ParamId::new(), tensor);
        let weight = Tensor::<2>::from_data(TensorData::new(weight, shape), &device);
        let bias = bias
            .map(|bias| Param::initialized(ParamId::new(), Tensor::from_floats(bias.as_slice(), &device)));
        Ok::<_, ()>(QuantLinear::Dense(Linear { weight: param(weight), bias }))
    });
    done.unwrap()
}

/// The original with removed heads and channels made inert: what they send to the residual stream is zero.
pub(crate) fn masked(model: Decoder<QuantLinear>, kept: &Kept) -> Decoder<QuantLinear> {
    let structure = Structure::of(model.config());
    let by_path: BTreeMap<_, _> =
        structure.linears.iter().map(|linear| (linear.path.clone(), linear)).collect();
    edit(model, |path, [_, outputs], weight, bias| {
        let linear = by_path[path];
        let layer = kept.layers.iter().find(|layer| layer.layer == linear.layer);
        let Some(layer) = layer else {
            if linear.output == Channels::Hidden {
                weight.fill(0.0);
                if let Some(bias) = bias {
                    bias.fill(0.0);
                }
            }
            return;
        };
        let groups = &structure.layers[linear.layer];
        let all_or = |list: &[usize], index: &usize| list.is_empty() || list.contains(index);
        let stays = |input: usize| match linear.input {
            Channels::Hidden | Channels::KeyValue | Channels::QueryKeyValue(_) | Channels::GateUp => true,
            Channels::Expert => {
                layer.experts.is_empty() || layer.experts[linear.expert.unwrap()].contains(&input)
            }
            Channels::SharedExpert => all_or(&layer.shared_expert, &input),
            Channels::PerLayer
            | Channels::Experts
            | Channels::One
            | Channels::GatedQuery
            | Channels::DeltaMixed
            | Channels::DeltaValue
            | Channels::DeltaHeads => true,
            Channels::Mlp => layer.channels.contains(&input),
            Channels::Query => layer.heads.contains(&(input / groups.head_dim / groups.queries_per_group())),
        };
        for (input, row) in weight.chunks_mut(outputs).enumerate() {
            if !stays(input) {
                row.fill(0.0);
            }
        }
    })
}
