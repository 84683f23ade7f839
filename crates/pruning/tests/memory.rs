//! What measuring importances holds, as peak resident memory of a process of its own: the test runs this binary again.

use std::convert::Infallible;

use kiln_models::{
    Block, BlockPart, Decoder, DenseEmbedding, Embedding, Norm, PartShape, Windows, config::ModelConfig,
    families::NormKind,
};
use kiln_pruning::{BlockPruning, Criterion, CutOptions, LayerRange, SplitBlocks};
use kiln_quant_core::{HostQuantizer, MinMax, PackedLinear, PackedTensor};
use kiln_testkit::{peak, peak_of, report, resident, task};

use serde_json::json;

use super::*;

const WIDTH: usize = 512;
const INNER: usize = 2048;
const TOKENS: usize = 4 * 64;
const BLOCK_WEIGHTS: usize = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER;

/// A packed model of weights without a meaning.
fn model(blocks: usize) -> Decoder<QuantLinear> {
    let device = Device::flex();
    let linear = |seed: u64, [d_input, d_output]: [usize; 2]| {
        let values: Vec<f32> =
            kiln_testkit::values(seed, d_input * d_output).iter().map(|value| value * 0.05).collect();
        let packed =
            MinMax.quantize("w", &values, d_input, d_output, &"affine4:64".parse().unwrap()).unwrap();
        QuantLinear::Packed(PackedLinear { weight: PackedTensor::new(&packed, &device), bias: None })
    };
    let norm = || Norm {
        weight: Some(Param::initialized(ParamId::new(), Tensor::ones([WIDTH], &device))),
        bias: None,
        eps: 1e-5,
        kind: NormKind::Rms,
    };
    let config = json!({
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&config.to_string()).unwrap();
    let block = |index: usize| {
        let mut seed = 10 * index as u64;
        let block = Block::build(&config, index, |_, shape| {
            Ok::<_, Infallible>(match shape {
                PartShape::Norm(_) => BlockPart::Norm(norm()),
                PartShape::Vector(..) | PartShape::DenseLinear(..) => unreachable!("LLaMA has none"),
                PartShape::Linear(shape, _) => {
                    seed += 1;
                    BlockPart::Linear(linear(seed - 1, shape))
                }
            })
        });
        block.unwrap()
    };
    let table = kiln_testkit::tensor::<2>(99, [256, WIDTH], &device);
    let embed_tokens = Embedding::Dense(DenseEmbedding { weight: Param::initialized(ParamId::new(), table) });
    let blocks = (0..blocks).map(block).collect();
    Decoder::from_parts(config.clone(), embed_tokens, None, None, blocks, norm(), None).unwrap()
}

/// Growth of the peak while heads of the first block are chosen; all blocks are measured.
fn grown(blocks: usize, criterion: Criterion) -> f64 {
    let model = model(blocks);
    let rows = TOKENS / 64;
    let windows = (0..rows).map(|w| (0..64).map(|i| ((w * 61 + i * 7) % 256) as u32).collect()).collect();
    let calibration = Windows::new(windows).unwrap();
    let mut pruning = BlockPruning::new(criterion, 0.25);
    pruning.layers = LayerRange::Between { start: 0, end: 1 };
    pruning.ratio = kiln_quant_core::Plan::uniform(0.0).with_override("self_attn", 0.25).unwrap();
    // The peak so far is that of quantizing: fill up to it, so that growth is seen.
    let fill = vec![1u8; (peak() - resident()).max(0.0) as usize];
    let before = peak();
    let options = CutOptions { split_blocks: SplitBlocks::Refuse, ..CutOptions::default() };
    pruning.prune(model, Some(&calibration), &options).unwrap();
    let grown = peak() - before;
    assert_eq!(std::hint::black_box(&fill).iter().filter(|byte| **byte != 1).count(), 0);
    grown
}

#[test]
fn importance_holds_the_gradients_of_one_block() {
    if let Some(task) = task() {
        let (blocks, criterion) = task.split_once(' ').unwrap();
        let criterion = serde_json::from_value(criterion.into()).unwrap();
        return report(&[grown(blocks.parse().unwrap(), criterion)]);
    }
    let test = "memory::importance_holds_the_gradients_of_one_block";
    let (dense, input) = ((4 * BLOCK_WEIGHTS) as f64, (4 * TOKENS * WIDTH) as f64);
    for criterion in ["taylor_first", "taylor_mixed"] {
        let [few, many] = [2, 10].map(|blocks| peak_of(test, &format!("{blocks} {criterion}")));
        let slope = (many - few) / 8.0;
        println!(
            "{criterion}: {:.1} and {:.1} MB for 2 and 10 blocks; a block's weights have {:.1} MB, its input {:.1} MB",
            few / 1e6,
            many / 1e6,
            dense / 1e6,
            input / 1e6
        );
        // Another block costs its input. Its gradients, of the weights' dense size, are gone.
        assert!(slope < 2.0 * input + 0.1 * dense, "{criterion}: {slope} a block");
        // Gradients (twice with the Fisher), activations, and copies of one matrix on the host.
        assert!(few < 8.0 * dense, "{criterion}: {few}");
    }
}
