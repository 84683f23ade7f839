//! The LLaMA family: LLaMA 1–3, Mistral, Qwen2, Qwen3, SmolLM2.

use burn::{
    module::{Module, Param},
    tensor::{Device, Tensor},
};
use kiln_quant_core::{Place, Projection, QuantLinear, fused};

use crate::{
    CausalLm, Context, Embedding, KvCache, RmsNorm, ScaleSite, ScaleSites, ScaleSource, Slots, TokenBatch,
    config::{LlamaConfig, check_count, check_shape},
    rope,
};

/// Linears of a block.
const LINEARS: usize = 7;

/// A LLaMA-family model; every linear of every block is a `P`. Fields are named as in the checkpoint.
#[derive(Module, Debug)]
pub struct Llama<P: Projection> {
    /// Everything below the head.
    pub model: LlamaModel<P>,
    /// The head; `None` when it is the embedding.
    pub lm_head: Option<QuantLinear>,
    #[module(skip)]
    pub(crate) config: LlamaConfig,
}

/// Embedding, blocks and final norm.
#[derive(Module, Debug)]
pub struct LlamaModel<P: Projection> {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Blocks.
    pub layers: Vec<LlamaBlock<P>>,
    /// Final norm.
    pub norm: RmsNorm,
}

/// One block: attention and MLP, each behind a norm and beside a residual path.
#[derive(Module, Debug)]
pub struct LlamaBlock<P: Projection> {
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: LlamaAttention<P>,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// MLP.
    pub mlp: LlamaMlp<P>,
}

/// Grouped-query attention with rotary positions.
#[derive(Module, Debug)]
pub struct LlamaAttention<P: Projection> {
    /// Queries.
    pub q_proj: P,
    /// Keys.
    pub k_proj: P,
    /// Values.
    pub v_proj: P,
    /// Output.
    pub o_proj: P,
    /// Norm over each query head (Qwen3).
    pub q_norm: Option<RmsNorm>,
    /// Norm over each key head (Qwen3).
    pub k_norm: Option<RmsNorm>,
}

/// SwiGLU: `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct LlamaMlp<P: Projection> {
    /// Gate.
    pub gate_proj: P,
    /// Up.
    pub up_proj: P,
    /// Down.
    pub down_proj: P,
}

impl<P: Projection> LlamaAttention<P> {
    fn forward(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &LlamaConfig,
    ) -> Tensor<3> {
        let [batch, length, _] = x.dims();
        let shape = config.layer(index);
        let heads = |x: Tensor<3>, heads: usize, norm: &Option<RmsNorm>| {
            let x = x.reshape([batch, length, heads, config.head_dim]);
            match norm {
                Some(norm) => norm.forward(x),
                None => x,
            }
        };
        let q = heads(self.q_proj.forward(x.clone()), shape.num_attention_heads, &self.q_norm);
        let k = heads(self.k_proj.forward(x.clone()), shape.num_key_value_heads, &self.k_norm);
        let v = heads(self.v_proj.forward(x), shape.num_key_value_heads, &None);
        let [cos, sin] = context.rotary.clone().expect("a context made by this model");
        let (q, k) = (fused::rotate(q, cos.clone(), sin.clone()), fused::rotate(k, cos, sin));
        let [k, v] = match cache {
            Some(cache) => cache.extend(index, k, v),
            None => [k, v],
        };
        let spec = context.attention(config.head_dim, config.sliding_window[index]);
        let y = fused::attention(q, k, v, &spec);
        self.o_proj.forward(y.reshape([batch, length, shape.num_attention_heads * config.head_dim]))
    }
}

impl<P: Projection> LlamaMlp<P> {
    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let (gate, up) = (self.gate_proj.forward(x.clone()), self.up_proj.forward(x));
        self.down_proj.forward(fused::swiglu(gate, up))
    }
}

impl<P: Projection> LlamaBlock<P> {
    /// Runs the block; `index` says which one it is of the model that `config` describes.
    ///
    /// # Shapes
    /// `[batch, length, hidden_size]` → the same.
    ///
    /// # Panics
    /// If `context` has no rotary tables for the config's heads, or `x` doesn't fit it.
    pub fn forward(
        &self,
        index: usize,
        x: Tensor<3>,
        context: &Context,
        cache: Option<&mut KvCache>,
        config: &LlamaConfig,
    ) -> Tensor<3> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(index, normed, context, cache, config);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
    }
}

impl<P: Projection> Llama<P> {
    /// A model of parts that were cut to another shape.
    ///
    /// # Errors
    /// [`Error::Argument`](crate::Error::Argument) naming the first linear, norm or table whose shape isn't that of `config`.
    pub fn from_parts(
        model: LlamaModel<P>,
        lm_head: Option<QuantLinear>,
        config: LlamaConfig,
    ) -> crate::Result<Self> {
        let llama = Self { model, lm_head, config };
        llama.check()?;
        Ok(llama)
    }

    fn check(&self) -> crate::Result<()> {
        let (config, parts) = (&self.config, &self.model);
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        check_count("blocks", config.num_hidden_layers, parts.layers.len())?;
        check_count("sliding windows", config.num_hidden_layers, config.sliding_window.len())?;
        check_shape("model.embed_tokens", [config.vocab_size, hidden], parts.embed_tokens.shape())?;
        if let Some(head) = &self.lm_head {
            check_shape("lm_head", [hidden, config.vocab_size], head.shape())?;
        }
        check_count("model.norm", hidden, parts.norm.weight.lazy_shape().num_elements())?;
        for (index, block) in parts.layers.iter().enumerate() {
            for norm in [&block.input_layernorm, &block.post_attention_layernorm] {
                let path = format!("norms of model.layers.{index}");
                check_count(&path, hidden, norm.weight.lazy_shape().num_elements())?;
            }
        }
        for (place, (path, found)) in self.slot_shapes().into_iter().enumerate() {
            let shape = config.layer(place / LINEARS);
            let (query, key) = (shape.num_attention_heads * head_dim, shape.num_key_value_heads * head_dim);
            let inner = shape.intermediate_size;
            let expected: [[usize; 2]; LINEARS] = [
                [hidden, query],
                [hidden, key],
                [hidden, key],
                [query, hidden],
                [hidden, inner],
                [hidden, inner],
                [inner, hidden],
            ];
            check_shape(&path, expected[place % LINEARS], found)?;
        }
        Ok(())
    }

    /// The model's shape.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }
}

impl<P: Projection> CausalLm for Llama<P> {
    fn context(&self, tokens: &TokenBatch, cache: Option<&KvCache>) -> Context {
        let device = self.device();
        let tables = rope::tables(&self.config.rope, self.config.head_dim, &tokens.positions, &device);
        Context::new(tokens, cache.map_or(&[], |cache| &cache.segments), Some(tables), &device)
    }

    fn embed(&self, context: &Context) -> Tensor<3> {
        self.model.embed_tokens.forward(context.ids.clone())
    }

    fn trains_embedding(&self) -> bool {
        self.model.embed_tokens.is_trained()
    }

    fn num_blocks(&self) -> usize {
        self.model.layers.len()
    }

    fn block(&self, index: usize, x: Tensor<3>, context: &Context, cache: Option<&mut KvCache>) -> Tensor<3> {
        self.model.layers[index].forward(index, x, context, cache, &self.config)
    }

    fn final_norm<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        self.model.norm.forward(x)
    }

    fn lm_head<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.lm_head {
            Some(head) => head.forward(x),
            None => self.model.embed_tokens.project(x),
        }
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_positions(&self) -> usize {
        self.config.max_position_embeddings
    }

    fn device(&self) -> Device {
        self.model.norm.weight.val().device().without_autodiff()
    }

    fn at(&self, place: Place) {
        self.for_each_slot(|_, slot| slot.at(place));
    }
}

impl<P: Projection> Slots for Llama<P> {
    type Slot = P;
    type With<Q: Projection> = Llama<Q>;

    fn try_map<Q: Projection, E>(self, mut f: impl FnMut(&str, P) -> Result<Q, E>) -> Result<Llama<Q>, E> {
        let map_block = |(index, block): (usize, LlamaBlock<P>)| {
            let (attention, mlp) = (block.self_attn, block.mlp);
            let mut slot = |name: &str, slot| f(&format!("model.layers.{index}.{name}"), slot);
            Ok(LlamaBlock {
                input_layernorm: block.input_layernorm,
                self_attn: LlamaAttention {
                    q_proj: slot("self_attn.q_proj", attention.q_proj)?,
                    k_proj: slot("self_attn.k_proj", attention.k_proj)?,
                    v_proj: slot("self_attn.v_proj", attention.v_proj)?,
                    o_proj: slot("self_attn.o_proj", attention.o_proj)?,
                    q_norm: attention.q_norm,
                    k_norm: attention.k_norm,
                },
                post_attention_layernorm: block.post_attention_layernorm,
                mlp: LlamaMlp {
                    gate_proj: slot("mlp.gate_proj", mlp.gate_proj)?,
                    up_proj: slot("mlp.up_proj", mlp.up_proj)?,
                    down_proj: slot("mlp.down_proj", mlp.down_proj)?,
                },
            })
        };
        let layers = self.model.layers.into_iter().enumerate().map(map_block).collect::<Result<_, E>>()?;
        Ok(Llama {
            model: LlamaModel { embed_tokens: self.model.embed_tokens, layers, norm: self.model.norm },
            lm_head: self.lm_head,
            config: self.config,
        })
    }

    fn slots(&self) -> Vec<(String, &P)> {
        let mut slots = Vec::new();
        for (index, block) in self.model.layers.iter().enumerate() {
            let (attention, mlp) = (&block.self_attn, &block.mlp);
            let named = [
                ("self_attn.q_proj", &attention.q_proj),
                ("self_attn.k_proj", &attention.k_proj),
                ("self_attn.v_proj", &attention.v_proj),
                ("self_attn.o_proj", &attention.o_proj),
                ("mlp.gate_proj", &mlp.gate_proj),
                ("mlp.up_proj", &mlp.up_proj),
                ("mlp.down_proj", &mlp.down_proj),
            ];
            slots.extend(named.map(|(name, slot)| (format!("model.layers.{index}.{name}"), slot)));
        }
        slots
    }
}

impl<P: Projection> ScaleSites for Llama<P> {
    fn scale_sites(&self, index: usize) -> Vec<ScaleSite> {
        let path = |name: &str| format!("model.layers.{index}.{name}");
        let site = |source, readers: &[&str]| ScaleSite {
            source,
            readers: readers.iter().copied().map(path).collect(),
        };
        let norm = |name: &str| ScaleSource::Norm(vec![path(name)]);
        let LlamaAttention { v_proj, o_proj, .. } = &self.model.layers[index].self_attn;
        let attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
        let mut sites = vec![site(norm("input_layernorm.weight"), &attention)];
        // Where several query heads share a value head, its channel has several readers.
        if v_proj.shape()[1] == o_proj.shape()[0] {
            sites.push(site(ScaleSource::Projection(path("self_attn.v_proj")), &["self_attn.o_proj"]));
        }
        let gated = ["mlp.gate_proj", "mlp.up_proj"];
        sites.push(site(norm("post_attention_layernorm.weight"), &gated));
        sites.push(site(ScaleSource::Projection(path("mlp.up_proj")), &["mlp.down_proj"]));
        sites
    }

    fn norm_parameter(&mut self, name: &str) -> Option<&mut Param<Tensor<1>>> {
        let (index, name) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let block = self.model.layers.get_mut(index.parse::<usize>().ok()?)?;
        match name {
            "input_layernorm.weight" => Some(&mut block.input_layernorm.weight),
            "post_attention_layernorm.weight" => Some(&mut block.post_attention_layernorm.weight),
            _ => None,
        }
    }
}
