//! OPT, with pre-norm blocks.

use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor, activation::relu},
};
use kiln_quant_core::{Place, Projection, QuantLinear, fused};

use crate::{
    CausalLm, Context, Embedding, KvCache, LayerNorm, ScaleSite, ScaleSites, ScaleSource, Slots, TokenBatch,
    config::{OptConfig, check_count, check_shape},
};

/// Linears of a block.
const LINEARS: usize = 6;

/// The position table starts with two rows that no token uses.
const POSITION_OFFSET: i64 = 2;

/// An OPT model; every linear of every block is a `P`.
#[derive(Module, Debug)]
pub struct Opt<P: Projection> {
    /// The decoder (`model.decoder` in the checkpoint).
    pub decoder: OptDecoder<P>,
    /// The head; `None` when it is the embedding.
    pub lm_head: Option<QuantLinear>,
    #[module(skip)]
    pub(crate) config: OptConfig,
}

/// Embeddings, blocks and final norm.
#[derive(Module, Debug)]
pub struct OptDecoder<P: Projection> {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Learned positions, `[max_position_embeddings + 2, width]`.
    pub embed_positions: Param<Tensor<2>>,
    /// Blocks.
    pub layers: Vec<OptBlock<P>>,
    /// Final norm.
    pub final_layer_norm: LayerNorm,
}

/// One block. Fields are named as in the checkpoint.
#[derive(Module, Debug)]
pub struct OptBlock<P: Projection> {
    /// Norm before attention.
    pub self_attn_layer_norm: LayerNorm,
    /// Attention.
    pub self_attn: OptAttention<P>,
    /// Norm before the MLP.
    pub final_layer_norm: LayerNorm,
    /// MLP, in.
    pub fc1: P,
    /// MLP, out.
    pub fc2: P,
}

/// Multi-head attention.
#[derive(Module, Debug)]
pub struct OptAttention<P: Projection> {
    /// Queries.
    pub q_proj: P,
    /// Keys.
    pub k_proj: P,
    /// Values.
    pub v_proj: P,
    /// Output.
    pub out_proj: P,
}

impl<P: Projection> OptAttention<P> {
    fn forward(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &OptConfig,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let (heads, head_dim) = (config.layer(index).num_attention_heads, config.head_dim);
        let split = |x: Tensor<3>| x.reshape([batch, length, heads, head_dim]);
        let q = split(self.q_proj.forward(x.clone()));
        let (k, v) = (split(self.k_proj.forward(x.clone())), split(self.v_proj.forward(x)));
        let [k, v] = match cache {
            Some(cache) => cache.extend(index, k, v),
            None => [k, v],
        };
        let y = fused::attention(q, k, v, &context.attention(head_dim, None));
        self.out_proj.forward(y.reshape([batch, length, heads * head_dim]))
    }
}

impl<P: Projection> OptBlock<P> {
    /// Runs the block; `index` says which one it is of the model that `config` describes.
    ///
    /// # Shapes
    /// `[batch, length, hidden_size]` → the same.
    ///
    /// # Panics
    /// If `x` doesn't fit the context.
    pub fn forward(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &OptConfig,
    ) -> Tensor<3> {
        let normed = self.self_attn_layer_norm.forward(x.clone());
        let x = x + self.self_attn.forward(index, normed, context, cache, config);
        let normed = self.final_layer_norm.forward(x.clone());
        x + self.fc2.forward(relu(self.fc1.forward(normed)))
    }
}

impl<P: Projection> Opt<P> {
    /// A model of parts that were cut to another shape.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the first linear or table whose shape isn't that of `config`.
    pub fn from_parts(
        decoder: OptDecoder<P>,
        lm_head: Option<QuantLinear>,
        config: OptConfig,
    ) -> crate::Result<Self> {
        let opt = Self { decoder, lm_head, config };
        opt.check()?;
        Ok(opt)
    }

    fn check(&self) -> crate::Result<()> {
        let (config, parts) = (&self.config, &self.decoder);
        let hidden = config.hidden_size;
        check_count("blocks", config.num_hidden_layers, parts.layers.len())?;
        check_shape("model.decoder.embed_tokens", [config.vocab_size, hidden], parts.embed_tokens.shape())?;
        let positions = [config.max_position_embeddings + POSITION_OFFSET as usize, hidden];
        let found = parts.embed_positions.lazy_shape().dims();
        check_shape("model.decoder.embed_positions", positions, found)?;
        if let Some(head) = &self.lm_head {
            check_shape("lm_head", [hidden, config.vocab_size], head.shape())?;
        }
        for (place, (path, found)) in self.slot_shapes().into_iter().enumerate() {
            let shape = config.layer(place / LINEARS);
            let (heads, inner) = (shape.num_attention_heads * config.head_dim, shape.intermediate_size);
            let expected: [[usize; 2]; LINEARS] = [
                [hidden, heads],
                [hidden, heads],
                [hidden, heads],
                [heads, hidden],
                [hidden, inner],
                [inner, hidden],
            ];
            check_shape(&path, expected[place % LINEARS], found)?;
        }
        Ok(())
    }

    /// The model's shape.
    pub fn config(&self) -> &OptConfig {
        &self.config
    }
}

impl<P: Projection> CausalLm for Opt<P> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> Context {
        Context::new(tokens, cache.map_or(&[], |cache| &cache.segments), None, &self.device())
    }

    fn embed(&self, context: &Context) -> Tensor<3> {
        let x = self.decoder.embed_tokens.forward(context.ids.clone());
        let [batch, length, width] = x.dims();
        let rows = context.positions.clone().add_scalar(POSITION_OFFSET).reshape([batch * length]);
        x + self.decoder.embed_positions.val().select(0, rows).reshape([batch, length, width])
    }

    fn trains_embedding(&self) -> bool {
        self.decoder.embed_tokens.is_trained() || self.decoder.embed_positions.val().is_require_grad()
    }

    fn num_blocks(&self) -> usize {
        self.decoder.layers.len()
    }

    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.decoder.layers[index].forward(index, x, context, cache, &self.config)
    }

    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.decoder.final_layer_norm.forward(x)
    }

    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => self.decoder.embed_tokens.project(x),
        }
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn device(&self) -> Device {
        self.decoder.embed_positions.val().device().without_autodiff()
    }

    fn at(&self, place: Place) {
        self.for_each_slot(|_, slot| slot.at(place));
    }
}

impl<P: Projection> Slots for Opt<P> {
    type Slot = P;
    type With<Q: Projection> = Opt<Q>;

    fn try_map<Q: Projection, E>(self, mut f: impl FnMut(&str, P) -> Result<Q, E>) -> Result<Opt<Q>, E> {
        let map_block = |(index, block): (usize, OptBlock<P>)| {
            let attention = block.self_attn;
            let mut slot = |name: &str, slot| f(&format!("model.decoder.layers.{index}.{name}"), slot);
            Ok(OptBlock {
                self_attn_layer_norm: block.self_attn_layer_norm,
                self_attn: OptAttention {
                    q_proj: slot("self_attn.q_proj", attention.q_proj)?,
                    k_proj: slot("self_attn.k_proj", attention.k_proj)?,
                    v_proj: slot("self_attn.v_proj", attention.v_proj)?,
                    out_proj: slot("self_attn.out_proj", attention.out_proj)?,
                },
                final_layer_norm: block.final_layer_norm,
                fc1: slot("fc1", block.fc1)?,
                fc2: slot("fc2", block.fc2)?,
            })
        };
        let layers = self.decoder.layers.into_iter().enumerate().map(map_block).collect::<Result<_, E>>()?;
        Ok(Opt {
            decoder: OptDecoder {
                embed_tokens: self.decoder.embed_tokens,
                embed_positions: self.decoder.embed_positions,
                layers,
                final_layer_norm: self.decoder.final_layer_norm,
            },
            lm_head: self.lm_head,
            config: self.config,
        })
    }

    fn slots(&self) -> Vec<(String, &P)> {
        let mut slots = Vec::new();
        for (index, block) in self.decoder.layers.iter().enumerate() {
            let attention = &block.self_attn;
            let named = [
                ("self_attn.q_proj", &attention.q_proj),
                ("self_attn.k_proj", &attention.k_proj),
                ("self_attn.v_proj", &attention.v_proj),
                ("self_attn.out_proj", &attention.out_proj),
                ("fc1", &block.fc1),
                ("fc2", &block.fc2),
            ];
            slots.extend(named.map(|(name, slot)| (format!("model.decoder.layers.{index}.{name}"), slot)));
        }
        slots
    }
}

impl<P: Projection> ScaleSites for Opt<P> {
    fn scale_sites(&self, index: usize) -> Vec<ScaleSite> {
        let path = |name: &str| format!("model.decoder.layers.{index}.{name}");
        let site = |source, readers: &[&str]| ScaleSite {
            source,
            readers: readers.iter().copied().map(path).collect(),
        };
        let norm = |name: &str| {
            ScaleSource::Norm(vec![path(&format!("{name}.weight")), path(&format!("{name}.bias"))])
        };
        let block = &self.decoder.layers[index];
        let mut sites = Vec::new();
        if block.self_attn_layer_norm.has_parameters() {
            let attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
            sites.push(site(norm("self_attn_layer_norm"), &attention));
        }
        sites.push(site(ScaleSource::Projection(path("self_attn.v_proj")), &["self_attn.out_proj"]));
        if block.final_layer_norm.has_parameters() {
            sites.push(site(norm("final_layer_norm"), &["fc1"]));
        }
        // Factors pass through the ReLU between them.
        sites.push(site(ScaleSource::Projection(path("fc1")), &["fc2"]));
        sites
    }

    fn norm_parameter(&mut self, name: &str) -> Option<&mut Param<Tensor<1>>> {
        let (index, name) = name.strip_prefix("model.decoder.layers.")?.split_once('.')?;
        let block = self.decoder.layers.get_mut(index.parse::<usize>().ok()?)?;
        match name {
            "self_attn_layer_norm.weight" => block.self_attn_layer_norm.weight.as_mut(),
            "self_attn_layer_norm.bias" => block.self_attn_layer_norm.bias.as_mut(),
            "final_layer_norm.weight" => block.final_layer_norm.weight.as_mut(),
            "final_layer_norm.bias" => block.final_layer_norm.bias.as_mut(),
            _ => None,
        }
    }
}
