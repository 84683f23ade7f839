//! Tensor names: GGUF's and those of Hugging Face checkpoints.

/// An architecture that is read, by its `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Architecture {
    /// LLaMA, Mistral, SmolLM2. Rows of q and k are interleaved within each head.
    Llama,
    /// Qwen2, Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

impl Architecture {
    const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// The names of all, for errors.
    pub(super) fn list() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// The value of `general.architecture`, which is also the prefix of hyperparameters.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// The factors by which LLaMA 3 divides its rotary frequencies; not a weight.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The Hugging Face name of the tensor `name`; `None` if models of this architecture have no such tensor.
pub(super) fn hugging_face(architecture: Architecture, name: &str) -> Option<String> {
    let outer = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(outer) = outer {
        return Some(outer.into());
    }
    let (block, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    // Leading zeros or a sign would give two names to one tensor.
    let index = block.parse::<u32>().ok().filter(|index| index.to_string() == block)?;
    let (module, part) = rest.rsplit_once('.')?;
    let linear = matches!(part, "weight" | "bias");
    let norm = part == "weight";
    let module = match module {
        "attn_q" if linear => "self_attn.q_proj",
        "attn_k" if linear => "self_attn.k_proj",
        "attn_v" if linear => "self_attn.v_proj",
        "attn_output" if linear => "self_attn.o_proj",
        "ffn_gate" if linear => "mlp.gate_proj",
        "ffn_up" if linear => "mlp.up_proj",
        "ffn_down" if linear => "mlp.down_proj",
        "attn_norm" if norm => "input_layernorm",
        "ffn_norm" if norm => "post_attention_layernorm",
        "attn_q_norm" if norm && architecture == Architecture::Qwen3 => "self_attn.q_norm",
        "attn_k_norm" if norm && architecture == Architecture::Qwen3 => "self_attn.k_norm",
        _ => return None,
    };
    Some(format!("model.layers.{index}.{module}.{part}"))
}

/// Whose heads the rows of a tensor belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heads {
    /// Query heads.
    Query,
    /// Key heads.
    Key,
}

/// The heads within which rows of the tensor with this Hugging Face name are interleaved.
pub(super) fn interleaved(architecture: Architecture, name: &str) -> Option<Heads> {
    if architecture != Architecture::Llama {
        return None;
    }
    if name.contains(".q_proj.") {
        Some(Heads::Query)
    } else if name.contains(".k_proj.") {
        Some(Heads::Key)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_hugging_face_checkpoints() {
        for (gguf, expected) in [
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output_norm.weight", "model.norm.weight"),
            ("output.weight", "lm_head.weight"),
            ("blk.0.attn_norm.weight", "model.layers.0.input_layernorm.weight"),
            ("blk.12.ffn_norm.weight", "model.layers.12.post_attention_layernorm.weight"),
            ("blk.3.attn_q.weight", "model.layers.3.self_attn.q_proj.weight"),
            ("blk.3.attn_k.bias", "model.layers.3.self_attn.k_proj.bias"),
            ("blk.3.attn_v.weight", "model.layers.3.self_attn.v_proj.weight"),
            ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj.weight"),
            ("blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj.weight"),
            ("blk.3.ffn_up.weight", "model.layers.3.mlp.up_proj.weight"),
            ("blk.3.ffn_down.bias", "model.layers.3.mlp.down_proj.bias"),
            ("blk.3.attn_q_norm.weight", "model.layers.3.self_attn.q_norm.weight"),
        ] {
            assert_eq!(hugging_face(Architecture::Qwen3, gguf).as_deref(), Some(expected));
        }
        for unknown in ["blk.03.attn_q.weight", "blk.+3.attn_q.weight", "blk.3.ffn_gate_exps.weight", "a", ""]
        {
            assert_eq!(hugging_face(Architecture::Qwen3, unknown), None, "{unknown}");
        }
        assert_eq!(hugging_face(Architecture::Llama, "blk.3.attn_q_norm.weight"), None);
        assert_eq!(hugging_face(Architecture::Llama, "blk.3.attn_norm.bias"), None);
    }
}
