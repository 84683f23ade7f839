//! Models of published shapes with random weights.

use burn::{
    module::{Param, ParamId},
    tensor::{Device, FloatDType, Tensor},
};
use clap::ValueEnum;
use kiln::{
    models::{
        Block, BlockPart, Decoder, DenseEmbedding, Embedding, Norm, PartShape, config::ModelConfig,
        families::NormKind,
    },
    quant::{Compute, PackedLinear, PackedTensor, PackedWeight, QuantLinear, Scales, packing::code_rows},
};

use crate::{Result, random};

/// A published shape.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    /// A model for trying this program out.
    Tiny,
    /// Llama 3.2 1B.
    #[value(name = "llama-1b")]
    Llama1B,
    /// Qwen 2.5 7B.
    #[value(name = "qwen-7b")]
    Qwen7B,
}

impl Model {
    fn config(self) -> Result<ModelConfig> {
        let text = match self {
            Self::Tiny => {
                r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
                    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
                    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#
            }
            Self::Llama1B => {
                r#"{"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
                    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
                    "tie_word_embeddings": true}"#
            }
            Self::Qwen7B => {
                r#"{"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                    "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
                    "tie_word_embeddings": false}"#
            }
        };
        Ok(ModelConfig::from_json(text)?)
    }

    /// The model with linears of `affine4:64:f16`; embedding and head in the type of operands.
    pub(crate) fn build(self, device: &Device, compute: Compute) -> Result<Decoder<QuantLinear>> {
        let config = self.config()?;
        let table = || table([config.vocab_size, config.hidden_size], device, compute);
        let mut words = Words(1);
        let blocks = (0..config.num_hidden_layers).map(|index| {
            Block::build(&config, index, |_, shape| {
                Ok::<_, kiln::quant::Error>(match shape {
                    PartShape::Norm(width) => BlockPart::Norm(norm(width, config.norm_eps, device)),
                    PartShape::Vector(..) | PartShape::DenseLinear(..) => unreachable!("LLaMA has none"),
                    PartShape::Linear([d_input, d_output], bias) => {
                        let weight = packed([d_input, d_output], &mut words, device)?;
                        let bias = bias.then(|| frozen(Tensor::zeros([d_output], device)));
                        BlockPart::Linear(QuantLinear::Packed(PackedLinear { weight, bias }))
                    }
                })
            })
        });
        let blocks = blocks.collect::<Result<_, _>>()?;
        let embedding = Embedding::Dense(DenseEmbedding { weight: frozen(table()) });
        let head = (!config.tie_word_embeddings).then(|| {
            QuantLinear::Dense(burn::nn::Linear { weight: frozen(table().transpose()), bias: None })
        });
        let final_norm = norm(config.hidden_size, config.norm_eps, device);
        Ok(Decoder::from_parts(config, embedding, None, None, blocks, final_norm, head)?
            .with_compute(compute)?)
    }
}

/// A packed weight of random codes, as large as trained ones are.
pub(crate) fn packed(
    shape: [usize; 2],
    words: &mut Words,
    device: &Device,
) -> Result<PackedTensor, kiln::quant::Error> {
    let [d_input, d_output] = shape;
    let scheme: kiln::quant::QuantScheme = "affine4:64:f16".parse()?;
    let [rows, columns] = scheme.scale_shape(d_input, d_output);
    // Evenly spread codes deviate by 4.6 steps.
    let scale = 1.0 / (4.6 * (d_input as f32).sqrt());
    let weight = PackedWeight {
        scheme,
        d_input,
        d_output,
        codes: (0..code_rows(d_input, 4) * d_output).map(|_| words.next()).collect(),
        scales: Scales::Plain(vec![scale; rows * columns]),
        offsets: Some(vec![-7.5 * scale; rows * columns]),
        input_order: None,
    };
    Ok(PackedTensor::new(&weight, device))
}

/// Random words (xorshift).
pub(crate) struct Words(pub(crate) u64);

impl Words {
    pub(crate) fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    // `Param::from_tensor` would ask for gradients.
    Param::initialized(ParamId::new(), tensor)
}

fn norm(width: usize, eps: f64, device: &Device) -> Norm {
    Norm { weight: Some(frozen(Tensor::ones([width], device))), bias: None, eps, kind: NormKind::Rms }
}

/// A table made a piece at a time, so that no f32 table is needed.
fn table([rows, width]: [usize; 2], device: &Device, compute: Compute) -> Tensor<2> {
    let dtype = match compute {
        Compute::F32 => FloatDType::F32,
        Compute::Bf16 => FloatDType::BF16,
        Compute::F16 => FloatDType::F16,
    };
    let factor = (width as f64).sqrt().recip();
    let piece = |rows| random([rows, width], device).mul_scalar(factor).cast(dtype);
    const PIECE: usize = 1 << 14;
    let pieces = (0..rows).step_by(PIECE).map(|first| piece(PIECE.min(rows - first)));
    Tensor::cat(pieces.collect(), 0)
}
