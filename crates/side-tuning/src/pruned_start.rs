//! A start for side blocks: the backbone's own weights, less what the loss feels least.

use std::collections::HashMap;

use burn::{
    module::Param,
    nn::Linear,
    tensor::{Device, Tensor, TensorData},
};
use kiln_models::{
    Decoder, Norm, Windows,
    config::ModelConfig,
    families::{LinearRole, NormAxis, Part},
    squared_gradients,
};
use kiln_quant_core::{Projection, QuantLinear, Slots, fused::RotaryPairs, to_host};

use crate::{Error, Result, SideTuned};

/// A matrix `[d_input, d_output]` on the host.
struct Matrix {
    values: Vec<f32>,
    sizes: [usize; 2],
}

impl Matrix {
    fn of(name: &str, tensor: Tensor<2>) -> Result<Self> {
        let sizes = tensor.dims();
        Ok(Self { values: to_host(name, tensor)?, sizes })
    }

    /// Sums along the other axis, for each place of axis `axis`.
    fn sums(&self, axis: usize) -> Vec<f64> {
        let mut sums = vec![0.0; self.sizes[axis]];
        for (input, row) in self.values.chunks(self.sizes[1]).enumerate() {
            for (output, value) in row.iter().enumerate() {
                sums[[input, output][axis]] += f64::from(*value);
            }
        }
        sums
    }

    /// Rows and columns of these places.
    fn picked(&self, [inputs, outputs]: [&[usize]; 2], device: &Device) -> Tensor<2> {
        let row = |input: &usize| &self.values[input * self.sizes[1]..][..self.sizes[1]];
        let rows = inputs.iter().map(row);
        let values: Vec<f32> = rows.flat_map(|row| outputs.iter().map(|output| row[*output])).collect();
        Tensor::from_data(TensorData::new(values, [inputs.len(), outputs.len()]), device)
    }
}

/// What a block's channels lose: squared gradients, summed over the weights that read or write them.
struct BlockScores {
    hidden: Vec<f64>,
    /// Of queries and keys, key head by key head, and of values likewise.
    rotated: Vec<f64>,
    values: Vec<f64>,
    mlp: Vec<f64>,
}

/// The channels of a block that its side block takes over.
struct Chosen {
    queries: Vec<usize>,
    keys: Vec<usize>,
    values: Vec<usize>,
    /// What the output reads: values, once for each query head.
    mixed: Vec<usize>,
    mlp: Vec<usize>,
}

impl Chosen {
    fn axes<'a>(&'a self, role: LinearRole, hidden: &'a [usize]) -> Option<[&'a [usize]; 2]> {
        Some(match role {
            LinearRole::Query => [hidden, &self.queries],
            LinearRole::Key => [hidden, &self.keys],
            LinearRole::Value => [hidden, &self.values],
            LinearRole::Output => [&self.mixed, hidden],
            LinearRole::Gate | LinearRole::Up => [hidden, &self.mlp],
            LinearRole::Down => [&self.mlp, hidden],
            _ => return None,
        })
    }
}

/// The places of the `count` highest scores, ascending; of equal ones the first.
fn highest(scores: &[f64], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    places.truncate(count);
    places.sort_unstable();
    places
}

fn add(sum: &mut [f64], more: impl IntoIterator<Item = f64>) {
    sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
}

/// Sums over the query heads of each key head.
fn by_key_head(scores: &[f64], config: &ModelConfig) -> Vec<f64> {
    let width = config.head_dim;
    let group = config.num_attention_heads / config.num_key_value_heads * width;
    let of = |heads: &[f64]| {
        let mut sum = vec![0.0; width];
        heads.chunks(width).for_each(|head| add(&mut sum, head.iter().copied()));
        sum
    };
    scores.chunks(group).flat_map(of).collect()
}

impl BlockScores {
    fn of(index: usize, squares: &HashMap<String, Tensor<2>>, config: &ModelConfig) -> Result<Self> {
        let keys = vec![0.0; config.num_key_value_heads * config.head_dim];
        let mut found = Self {
            hidden: vec![0.0; config.hidden_size],
            rotated: keys.clone(),
            values: keys,
            mlp: vec![0.0; config.intermediate_size],
        };
        for part in config.parts(index).iter() {
            let path = config.family.path(index, part.name());
            let role = match part {
                Part::Linear(linear) => linear.role,
                Part::Norm(_) => continue,
                Part::Vector(_) | Part::Experts(_) => return Err(unlike(&path)),
            };
            let squares = squares.get(&path).ok_or_else(|| unlike(&path))?;
            let squares = Matrix::of(&path, squares.clone())?;
            let [inputs, outputs] = [squares.sums(0), squares.sums(1)];
            let hidden = match role {
                LinearRole::Query => {
                    add(&mut found.rotated, by_key_head(&outputs, config));
                    inputs
                }
                LinearRole::Key => {
                    add(&mut found.rotated, outputs);
                    inputs
                }
                LinearRole::Value => {
                    add(&mut found.values, outputs);
                    inputs
                }
                LinearRole::Output => {
                    add(&mut found.values, by_key_head(&inputs, config));
                    outputs
                }
                LinearRole::Gate | LinearRole::Up => {
                    add(&mut found.mlp, outputs);
                    inputs
                }
                LinearRole::Down => {
                    add(&mut found.mlp, inputs);
                    outputs
                }
                _ => return Err(unlike(&path)),
            };
            add(&mut found.hidden, hidden);
        }
        Ok(found)
    }

    fn choose(&self, config: &ModelConfig, side: &ModelConfig) -> Chosen {
        let group = config.num_attention_heads / config.num_key_value_heads;
        let heads = |scores: &[f64], pick: &dyn Fn(&[f64]) -> Vec<usize>| -> Vec<Vec<usize>> {
            scores.chunks(config.head_dim).map(pick).collect()
        };
        let rotated = heads(&self.rotated, &|scores| of_rotated(scores, config, side));
        let values = heads(&self.values, &|scores| highest(scores, side.head_dim));
        // Every head's channels, behind those of the heads before.
        let spread = |chosen: &[Vec<usize>], times: usize| -> Vec<usize> {
            let all = chosen.iter().flat_map(|head| std::iter::repeat_n(head, times));
            all.enumerate()
                .flat_map(|(head, channels)| channels.iter().map(move |c| head * config.head_dim + c))
                .collect()
        };
        Chosen {
            queries: spread(&rotated, group),
            keys: spread(&rotated, 1),
            values: spread(&values, 1),
            mixed: spread(&values, group),
            mlp: highest(&self.mlp, side.intermediate_size),
        }
    }
}

/// Channels of a head of queries and keys: whole pairs where they are turned, in the order in which the side network turns them.
fn of_rotated(scores: &[f64], config: &ModelConfig, side: &ModelConfig) -> Vec<usize> {
    let turned = |model: &ModelConfig| model.rope.first().map_or(0, |rope| rope.rotated(model.head_dim));
    let [of_backbone, of_side] = [turned(config), turned(side)];
    let pair = |at: usize| match config.family.rotary_pairs {
        RotaryPairs::Neighbours => [2 * at, 2 * at + 1],
        _ => [at, at + of_backbone / 2],
    };
    let sums: Vec<f64> = (0..of_backbone / 2).map(|at| pair(at).iter().map(|c| scores[*c]).sum()).collect();
    let pairs: Vec<[usize; 2]> = highest(&sums, of_side / 2).into_iter().map(pair).collect();
    let plain = highest(&scores[of_backbone..], side.head_dim - of_side);
    let turned: Vec<usize> = match config.family.rotary_pairs {
        RotaryPairs::Neighbours => pairs.concat(),
        _ => pairs.iter().map(|pair| pair[0]).chain(pairs.iter().map(|pair| pair[1])).collect(),
    };
    turned.into_iter().chain(plain.into_iter().map(|c| of_backbone + c)).collect()
}

fn unlike(path: &str) -> Error {
    let expected = "a start that is random, as blocks of this kind can't be cut by Fisher information";
    Error::argument("with_pruned_start", expected, format!("a backbone with {path}"))
}

fn picked_vector(name: &str, from: &Tensor<1>, places: &[usize], device: &Device) -> Result<Tensor<1>> {
    let values = to_host(name, from.clone())?;
    let values: Vec<f32> = places.iter().map(|place| values[*place]).collect();
    Ok(Tensor::from_data(TensorData::new(values, [places.len()]), device))
}

/// New values for a trained parameter.
fn set<const D: usize>(parameter: &mut Param<Tensor<D>>, value: Tensor<D>) {
    *parameter = parameter.clone().map(|old| value.set_require_grad(old.is_require_grad()));
}

fn take_norm(name: &str, into: &mut Norm, from: &Norm, places: &[usize], device: &Device) -> Result<()> {
    let pairs = [(&mut into.weight, &from.weight), (&mut into.bias, &from.bias)];
    for (into, from) in pairs {
        if let (Some(into), Some(from)) = (into, from) {
            set(into, picked_vector(name, &from.val(), places, device)?);
        }
    }
    Ok(())
}

fn take_linear(
    name: &str,
    into: &mut Linear,
    from: &QuantLinear,
    axes: [&[usize]; 2],
    device: &Device,
) -> Result<()> {
    set(&mut into.weight, Matrix::of(name, from.weight())?.picked(axes, device));
    if let (Some(into), Some(bias)) = (&mut into.bias, from.bias_parameter()) {
        set(into, picked_vector(name, &bias.val(), axes[1], device)?);
    }
    Ok(())
}

impl SideTuned<Decoder<QuantLinear>> {
    /// Starts the side blocks and their final norm at the backbone's own weights, cut to the side's widths, as
    /// [ladder side tuning](https://arxiv.org/abs/2206.06522) does: the channels of the most empirical Fisher information (the
    /// squared gradient of a window's loss, mean over `windows`; 1,024 samples as published) stay, of the residual stream the
    /// same in all blocks, of each head as many as of the others, of rotated ones whole pairs. Downsampling, gates and
    /// upsampling keep their start, and so do norms of heads.
    ///
    /// # Memory
    /// Three times the dense weights of the backbone, whose gradients it needs this once.
    ///
    /// # Errors
    /// A backbone with fused or gated projections, experts or recurrent blocks, or with heads or channels that were pruned away;
    /// a side network with fewer heads than the backbone; windows that don't fit.
    pub fn with_pruned_start(mut self, windows: &Windows) -> Result<Self> {
        let (config, side) = (self.backbone().config().clone(), self.side.model_config().clone());
        let own_shape = (0..config.num_hidden_layers).all(|index| {
            config.linear_shape(LinearRole::Query, index)
                == [config.hidden_size, config.num_attention_heads * config.head_dim]
                && config.linear_shape(LinearRole::Down, index)
                    == [config.intermediate_size, config.hidden_size]
        });
        if !own_shape {
            return Err(unlike("blocks of different widths"));
        }
        if side.num_attention_heads != config.num_attention_heads {
            let expected = format!("{}, the backbone's, for a pruned start", config.num_attention_heads);
            return Err(Error::argument("heads", expected, side.num_attention_heads));
        }
        let squares = squared_gradients(self.backbone(), windows)?;
        let scores: Vec<BlockScores> = (0..config.num_hidden_layers)
            .map(|index| BlockScores::of(index, &squares, &config))
            .collect::<Result<_>>()?;
        drop(squares);
        let mut all = vec![0.0; config.hidden_size];
        scores.iter().for_each(|block| add(&mut all, block.hidden.iter().copied()));
        let hidden = highest(&all, side.hidden_size);
        let backbone = self.backbone().clone();
        let device = kiln_models::CausalLm::device(&backbone);
        let slots: HashMap<String, &QuantLinear> = backbone.slots().into_iter().collect();
        for (index, block) in self.side.sides_mut() {
            let chosen = scores[index].choose(&config, &side);
            for part in config.parts(index).iter() {
                let path = config.family.path(index, part.name());
                match part {
                    Part::Linear(part) => {
                        let axes = chosen.axes(part.role, &hidden).ok_or_else(|| unlike(&path))?;
                        let (Some(into), Some(from)) = (block.linear_mut(part.role), slots.get(&path)) else {
                            return Err(unlike(&path));
                        };
                        take_linear(&path, into, from, axes, &device)?;
                    }
                    Part::Norm(part) if part.place.axis() == NormAxis::Hidden => {
                        let from = backbone.blocks[index].norm(part.place);
                        if let (Some(into), Some(from)) = (block.norm_mut(part.place), from) {
                            take_norm(&path, into, from, &hidden, &device)?;
                        }
                    }
                    _ => {}
                }
            }
        }
        take_norm("final norm", &mut self.side.norm, &backbone.final_norm, &hidden, &device)?;
        Ok(self)
    }
}
