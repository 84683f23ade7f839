//! Cutting a model to what stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use burn::{
    module::{Param, ParamId},
    nn::Linear,
    tensor::{Device, Int, Tensor},
};
use kiln_distributed::Sharing;
use kiln_models::{
    Block, CausalLm, Decoder, DenseEmbedding, Embedding, Norm, Slots,
    config::{Biases, ModelConfig},
    families::{Family, NormAxis, NormKind, VectorRole},
};
use kiln_quant_core::{
    HostQuantizer, MinMax, PackedLinear, PackedTensor, Projection, QuantError, QuantLinear, QuantScheme,
};
use serde::{Deserialize, Serialize};

use crate::{Error, Result, kept::Kept, packed::cut_packed, structure::Structure};

/// What becomes of a packed weight whose blocks a cut would split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SplitBlocks {
    /// It is dequantized, cut and quantized again by the same scheme; the report tells the error.
    #[default]
    Requantize,
    /// It is dequantized and stays dense.
    Dense,
    /// The cut is refused.
    Refuse,
}

/// How a pruning is carried out: what becomes of packed weights, and who measures.
pub struct CutOptions<'a> {
    /// What becomes of weights whose blocks would be split.
    pub split_blocks: SplitBlocks,
    /// Quantizes them again.
    pub quantizer: &'a dyn HostQuantizer,
    /// The ranks that share the calibration data, batch by batch; all end up with the same model. Gradients are sums in
    /// [`Sharing::parts`] parts, on which their last bits depend; not on how many ranks there are.
    pub sharing: Sharing,
}

impl fmt::Debug for CutOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CutOptions")
            .field("split_blocks", &self.split_blocks)
            .field("sharing", &self.sharing)
            .finish_non_exhaustive()
    }
}

impl Default for CutOptions<'_> {
    fn default() -> Self {
        Self { split_blocks: SplitBlocks::Requantize, quantizer: &MinMax, sharing: Sharing::default() }
    }
}

/// A packed weight that could not be cut on its codes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Requantized {
    /// The weight's path.
    pub path: String,
    /// Its scheme now; `None` if it is dense.
    pub scheme: Option<QuantScheme>,
    /// Distance from the cut of the old weight; none if it is dense.
    pub error: Option<QuantError>,
}

/// Cuts `model` to what stays. Everything else is as it was, bit for bit, but for weights named in the result.
///
/// Under RMSNorm a narrower residual stream has another mean square: gains are multiplied by `sqrt(d / d')` and the
/// norms' epsilon by `d / d'`, which makes the result that of zeroing the channels. (Qwen3's norms over heads share the
/// epsilon in the checkpoint and get it too.) OPT's LayerNorm has no such correction: its mean and variance are those of
/// the channels that stay.
///
/// # Errors
/// [`Error::Mismatch`] if `kept` doesn't fit the model, or names a weight that must not be split.
pub fn apply(
    model: Decoder<QuantLinear>,
    kept: &Kept,
    options: &CutOptions,
) -> Result<(Decoder<QuantLinear>, Vec<Requantized>)> {
    model.check_one_device("pruning")?;
    let original = model.config().clone();
    let structure = Structure::of(&original);
    kept.validate(&structure)?;
    let mut cutter = Cutter { options, device: model.device(), requantized: Vec::new() };
    let linears = structure.by_path();
    let model = model.try_map(|path, slot| {
        let linear = linears.get(path).ok_or_else(|| Error::mismatch(path, "a known linear", "another"))?;
        let Some(place) = kept.layers.iter().position(|layer| layer.layer == linear.layer) else {
            return Ok(slot);
        };
        let positions = |channels| kept.positions(&structure, place, linear, channels);
        cutter.linear(path, slot, positions(linear.input), positions(linear.output))
    })?;
    let model = cutter.decoder(model, kept.config(&original), kept, &structure)?;
    Ok((model, cutter.requantized))
}

pub(crate) fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    // `Param::from_tensor` would ask for gradients.
    Param::initialized(ParamId::new(), tensor)
}

/// Indices as a tensor.
pub(crate) fn index_tensor(indices: &[usize], device: &Device) -> Tensor<1, Int> {
    let indices: Vec<i64> = indices.iter().map(|&index| index as i64).collect();
    Tensor::from_data(indices.as_slice(), device)
}

struct Cutter<'a> {
    options: &'a CutOptions<'a>,
    device: Device,
    requantized: Vec<Requantized>,
}

type Positions = Option<Vec<usize>>;

impl Cutter<'_> {
    fn select<const D: usize>(&self, tensor: Tensor<D>, axis: usize, positions: &Positions) -> Tensor<D> {
        match positions {
            Some(positions) => tensor.select(axis, index_tensor(positions, &self.device)),
            None => tensor,
        }
    }

    fn param<const D: usize>(
        &self,
        param: Param<Tensor<D>>,
        axis: usize,
        positions: &Positions,
    ) -> Param<Tensor<D>> {
        match positions {
            Some(_) => frozen(self.select(param.val().without_autodiff(), axis, positions)),
            None => param,
        }
    }

    fn linear(
        &mut self,
        path: &str,
        slot: QuantLinear,
        inputs: Positions,
        outputs: Positions,
    ) -> Result<QuantLinear> {
        if inputs.is_none() && outputs.is_none() {
            return Ok(slot);
        }
        Ok(match slot {
            QuantLinear::Dense(Linear { weight, bias }) => {
                let weight = self.param(self.param(weight, 0, &inputs), 1, &outputs);
                QuantLinear::Dense(Linear { weight, bias: bias.map(|bias| self.param(bias, 0, &outputs)) })
            }
            QuantLinear::Packed(PackedLinear { weight, bias }) => {
                let bias = bias.map(|bias| self.param(bias, 0, &outputs));
                match self.packed(path, weight, &inputs, &outputs)? {
                    Cut::Packed(weight) => QuantLinear::Packed(PackedLinear { weight, bias }),
                    Cut::Dense(weight) => QuantLinear::Dense(Linear { weight: frozen(weight), bias }),
                }
            }
        })
    }

    /// `[d_input, d_output]`, packed if it can be.
    fn packed(
        &mut self,
        path: &str,
        weight: PackedTensor,
        inputs: &Positions,
        outputs: &Positions,
    ) -> Result<Cut> {
        let host = weight.to_host()?;
        if let Some(cut) = cut_packed(&host, inputs.as_deref(), outputs.as_deref()) {
            return Ok(Cut::Packed(PackedTensor::new(&cut, &self.device)));
        }
        let scheme = host.scheme;
        if self.options.split_blocks == SplitBlocks::Refuse {
            let expected = format!("a cut along whole blocks of {scheme}");
            return Err(Error::mismatch(path, expected, "one through them"));
        }
        let dense = self.select(self.select(weight.dequantize(), 0, inputs), 1, outputs);
        if self.options.split_blocks == SplitBlocks::Dense {
            self.requantized.push(Requantized { path: path.into(), scheme: None, error: None });
            return Ok(Cut::Dense(dense));
        }
        let (packed, error) =
            PackedTensor::quantize_and_measure(path, dense, &scheme, self.options.quantizer)?;
        self.requantized.push(Requantized { path: path.into(), scheme: Some(scheme), error: Some(error) });
        Ok(Cut::Packed(packed))
    }

    fn embedding(&mut self, path: &str, table: Embedding, hidden: &Positions) -> Result<Embedding> {
        Ok(match table {
            table if hidden.is_none() => table,
            Embedding::Dense(table) => {
                Embedding::Dense(DenseEmbedding { weight: self.param(table.weight, 1, hidden) })
            }
            Embedding::Packed(table) => match self.packed(path, table, hidden, &None)? {
                Cut::Packed(table) => Embedding::Packed(table),
                Cut::Dense(weight) => Embedding::Dense(DenseEmbedding { weight: frozen(weight.transpose()) }),
            },
        })
    }

    fn norm(&self, norm: &mut Norm, hidden: &Positions, eps: f64) {
        let Some(kept) = hidden else { return };
        let width = norm.weight.as_ref().map_or(kept.len(), |weight| weight.lazy_shape().num_elements());
        let scale = (width as f64 / kept.len() as f64).sqrt();
        norm.weight = norm.weight.take().map(|weight| {
            let weight = self.select(weight.val().without_autodiff(), 0, hidden);
            frozen(match norm.kind {
                NormKind::Rms => weight.mul_scalar(scale),
                // The gain is 1 + w.
                NormKind::RmsOnePlus => weight.add_scalar(1.0).mul_scalar(scale).sub_scalar(1.0),
                NormKind::Layer | NormKind::LayerGain | NormKind::Identity => weight,
            })
        });
        norm.bias = norm.bias.take().map(|bias| self.param(bias, 0, hidden));
        norm.eps = eps;
    }

    /// Picks the blocks that stay and cuts everything that runs along the residual stream but the blocks' linears.
    fn decoder(
        &mut self,
        mut model: Decoder<QuantLinear>,
        config: ModelConfig,
        kept: &Kept,
        structure: &Structure,
    ) -> Result<Decoder<QuantLinear>> {
        let hidden = kept.hidden(structure);
        let mut blocks: Vec<_> = model.blocks.into_iter().map(Some).collect();
        model.blocks = kept.layers.iter().filter_map(|kept| blocks[kept.layer].take()).collect();
        for (kept, block) in kept.layers.iter().zip(&mut model.blocks) {
            let heads = kept.query_heads(&structure.layers[kept.layer]);
            if let Some(sinks) = block.vector_mut(VectorRole::Sinks).filter(|_| heads.is_some()) {
                let cut = self.param(sinks.clone(), 0, &heads);
                *sinks = cut;
            }
        }
        if hidden.is_some() {
            let names = config.family.names;
            model.embed_tokens = self.embedding(names.embedding, model.embed_tokens, &hidden)?;
            model.embed_positions = model.embed_positions.map(|table| self.param(table, 1, &hidden));
            if let Some(norm) = &mut model.embed_norm {
                self.norm(norm, &hidden, config.norm_eps);
            }
            for (place, norm) in model.blocks.iter_mut().flat_map(Block::norms_mut) {
                match place.axis() == NormAxis::Hidden {
                    false => norm.eps = config.norm_eps,
                    true => self.norm(norm, &hidden, config.norm_eps),
                }
            }
            self.norm(&mut model.final_norm, &hidden, config.norm_eps);
            let head = model.lm_head.map(|head| self.linear(names.head, head, hidden, None));
            model.lm_head = head.transpose()?;
        }
        Ok(model.with_config(config)?)
    }
}

/// A packed weight after a cut.
#[allow(clippy::large_enum_variant)] // one at a time
enum Cut {
    Packed(PackedTensor),
    Dense(Tensor<2>),
}

/// Adds to the biases of linears, by path. Blocks whose architecture has no biases get zeros wherever a checkpoint's
/// keys would ask for more of them.
///
/// # Errors
/// [`Error::Mismatch`] if a bias has another length than the outputs.
pub(crate) fn add_biases(
    model: Decoder<QuantLinear>,
    added: &BTreeMap<String, Vec<f32>>,
) -> Result<Decoder<QuantLinear>> {
    if added.is_empty() {
        return Ok(model);
    }
    let device = model.device();
    let mut config = model.config().clone();
    let had = config.biases.qkv;
    config.biases = Biases { qkv: true, o: true, mlp: true, ..config.biases };
    // One key may stand for the biases of q, k, v and o.
    config.biases.qkv = had || Family::expressing(&config).own_biases(config.biases).qkv;
    let blocks = 0..config.num_hidden_layers;
    let linears = blocks.flat_map(|layer| {
        let linears = config.linears(layer).into_iter();
        linears.map(move |(name, role)| (config.family.path(layer, &name), role))
    });
    let biased: BTreeSet<String> =
        linears.filter(|(_, role)| config.has_bias(*role)).map(|(path, _)| path).collect();
    let model = model.try_map(|path, slot| {
        let [_, d_output] = slot.shape();
        let bias = match added.get(path) {
            Some(values) if values.len() != d_output => {
                return Err(Error::mismatch(path, format!("a bias of {d_output} values"), values.len()));
            }
            Some(values) => Some(Tensor::<1>::from_floats(values.as_slice(), &device)),
            None if !biased.contains(path) => None,
            None => Some(Tensor::zeros([d_output], &device)),
        };
        let Some(bias) = bias else { return Ok(slot) };
        let sum = |old: Option<Param<Tensor<1>>>| match old {
            Some(old) => Some(frozen(old.val().without_autodiff() + bias)),
            None => Some(frozen(bias)),
        };
        Ok(match slot {
            QuantLinear::Packed(linear) => {
                QuantLinear::Packed(PackedLinear { weight: linear.weight, bias: sum(linear.bias) })
            }
            QuantLinear::Dense(linear) => {
                QuantLinear::Dense(Linear { weight: linear.weight, bias: sum(linear.bias) })
            }
        })
    })?;
    Ok(model.with_config(config)?)
}
