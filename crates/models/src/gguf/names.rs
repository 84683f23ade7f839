//! Tensor names: GGUF's and those of Hugging Face checkpoints.

/// An architecture that is read, by its `general.architecture`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Architecture {
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
    pub(crate) fn list() -> String {
        Self::ALL.map(Self::name).join(", ")
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// The value of `general.architecture`, which is also the prefix of hyperparameters.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// The factors by which LLaMA 3 divides its rotary frequencies; not a weight.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Tensors outside the blocks: GGUF's name and Hugging Face's.
const OUTER: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// Which tensors a module has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A weight, and maybe a bias.
    Linear,
    /// A weight.
    Norm,
    /// A weight, in Qwen3.
    HeadNorm,
}

/// Modules of a block: GGUF's name and Hugging Face's.
const MODULES: [(&str, &str, Kind); 11] = [
    ("attn_q", "self_attn.q_proj", Kind::Linear),
    ("attn_k", "self_attn.k_proj", Kind::Linear),
    ("attn_v", "self_attn.v_proj", Kind::Linear),
    ("attn_output", "self_attn.o_proj", Kind::Linear),
    ("ffn_gate", "mlp.gate_proj", Kind::Linear),
    ("ffn_up", "mlp.up_proj", Kind::Linear),
    ("ffn_down", "mlp.down_proj", Kind::Linear),
    ("attn_norm", "input_layernorm", Kind::Norm),
    ("ffn_norm", "post_attention_layernorm", Kind::Norm),
    ("attn_q_norm", "self_attn.q_norm", Kind::HeadNorm),
    ("attn_k_norm", "self_attn.k_norm", Kind::HeadNorm),
];

/// Index of the block, module and `weight` or `bias` of a name that begins with `prefix`.
fn parts<'a>(prefix: &str, name: &'a str) -> Option<(u32, &'a str, &'a str)> {
    let (block, rest) = name.strip_prefix(prefix)?.split_once('.')?;
    // Leading zeros or a sign would give two names to one tensor.
    let index = block.parse::<u32>().ok().filter(|index| index.to_string() == block)?;
    let (module, part) = rest.rsplit_once('.')?;
    Some((index, module, part))
}

/// The Hugging Face name of the tensor `name`; `None` if models of this architecture have no such tensor.
pub(super) fn hugging_face(architecture: Architecture, name: &str) -> Option<String> {
    if let Some((_, outer)) = OUTER.iter().find(|(gguf, _)| *gguf == name) {
        return Some((*outer).into());
    }
    let (index, module, part) = parts("blk.", name)?;
    let &(_, module, kind) = MODULES.iter().find(|(gguf, ..)| *gguf == module)?;
    let known = match kind {
        Kind::Linear => matches!(part, "weight" | "bias"),
        Kind::Norm => part == "weight",
        Kind::HeadNorm => part == "weight" && architecture == Architecture::Qwen3,
    };
    known.then(|| format!("model.layers.{index}.{module}.{part}"))
}

/// GGUF's name of the tensor with this Hugging Face name.
pub(crate) fn from_hugging_face(name: &str) -> Option<String> {
    if let Some((outer, _)) = OUTER.iter().find(|(_, hugging_face)| *hugging_face == name) {
        return Some((*outer).into());
    }
    let (index, module, part) = parts("model.layers.", name)?;
    let &(module, ..) = MODULES.iter().find(|(_, hugging_face, _)| *hugging_face == module)?;
    Some(format!("blk.{index}.{module}.{part}"))
}

/// Whose heads the rows of a tensor belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heads {
    /// Query heads.
    Query,
    /// Key heads.
    Key,
}

/// The heads within which rows of the tensor with this Hugging Face name are interleaved.
pub(crate) fn interleaved(architecture: Architecture, name: &str) -> Option<Heads> {
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
            assert_eq!(from_hugging_face(expected).as_deref(), Some(gguf));
        }
        for unknown in ["blk.03.attn_q.weight", "blk.+3.attn_q.weight", "blk.3.ffn_gate_exps.weight", "a", ""]
        {
            assert_eq!(hugging_face(Architecture::Qwen3, unknown), None, "{unknown}");
        }
        assert_eq!(hugging_face(Architecture::Llama, "blk.3.attn_q_norm.weight"), None);
        assert_eq!(hugging_face(Architecture::Llama, "blk.3.attn_norm.bias"), None);
    }
}
