//! Tensor names: GGUF's and those of Hugging Face checkpoints, by a family's tables.

use crate::families::{Family, LinearRole, NormKind, Part};

/// The factors by which LLaMA 3 divides its rotary frequencies; not a weight.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Modules outside the blocks: GGUF's name and the path in checkpoints.
fn outer(family: &Family) -> impl Iterator<Item = (&'static str, &'static str)> {
    let names = &family.names;
    let positions = names.positions.map(|learned| ("position_embd", learned.path));
    let all = [("token_embd", names.embedding), ("output_norm", names.final_norm), ("output", names.head)];
    all.into_iter().chain(positions)
}

/// The Hugging Face names of the weights that the tensor `name` stacks, given their number; `None` if it stacks none.
pub(super) fn stacked(family: &Family, name: &str, count: usize) -> Option<Vec<String>> {
    let (index, module, part) = parts("blk", name)?;
    let experts = family.blocks[0].experts().filter(|_| part == "weight")?;
    let kind = experts.gguf.iter().position(|gguf| *gguf == module)?;
    let path = |expert| format!("{}.weight", family.path(index as usize, &experts.path(expert, kind)));
    Some((0..count).map(path).collect())
}

/// Index of the block, module and `weight` or `bias` of a name that begins with `prefix` and a dot.
fn parts<'a>(prefix: &str, name: &'a str) -> Option<(u32, &'a str, &'a str)> {
    let (block, rest) = name.strip_prefix(prefix)?.strip_prefix('.')?.split_once('.')?;
    // Leading zeros or a sign would give two names to one tensor.
    let index = block.parse::<u32>().ok().filter(|index| index.to_string() == block)?;
    let (module, part) = rest.rsplit_once('.')?;
    Some((index, module, part))
}

/// The Hugging Face name of the tensor `name`; `None` if models of this family have no such tensor.
pub(super) fn hugging_face(family: &Family, name: &str) -> Option<String> {
    let known = |norm: bool, part: &str| match part {
        "weight" => true,
        "bias" => !norm || family.norm == NormKind::Layer,
        _ => false,
    };
    if let Some((index, module, part)) = parts("blk", name) {
        let entry = family.blocks[0].iter().find(|entry| entry.gguf() == module)?;
        let known = match entry {
            Part::Norm(_) => known(true, part),
            Part::Linear(linear) => part == "weight" || known(false, part) && !linear.role.stays_dense(),
            Part::Experts(_) | Part::Vector(_) => false,
        };
        return known.then(|| format!("{}.{part}", family.path(index as usize, entry.name())));
    }
    let (module, part) = name.rsplit_once('.')?;
    let (gguf, path) = outer(family).find(|(gguf, _)| *gguf == module)?;
    (part == "weight" || gguf == "output_norm" && known(true, part)).then(|| format!("{path}.{part}"))
}

/// GGUF's name of the tensor with this Hugging Face name; all experts have one.
pub(crate) fn from_hugging_face(family: &Family, name: &str) -> Option<String> {
    if let Some((index, module, part)) = parts(family.names.blocks, name) {
        let experts = family.blocks[0].experts();
        let expert = experts.and_then(|experts| Some(experts.gguf[experts.place(module)?.1]));
        if let Some(gguf) = expert {
            return (part == "weight").then(|| format!("blk.{index}.{gguf}.weight"));
        }
        let entry = family.blocks[0].iter().find(|entry| entry.name() == module)?;
        return Some(format!("blk.{index}.{}.{part}", entry.gguf()));
    }
    let (module, part) = name.rsplit_once('.')?;
    let (gguf, _) = outer(family).find(|(_, path)| *path == module)?;
    Some(format!("{gguf}.{part}"))
}

/// Whether the tensor with this Hugging Face name is a norm's weight that stands in the file with 1 added.
pub(crate) fn has_one_added(family: &Family, name: &str) -> bool {
    let is_norm = |path: &str| match parts(family.names.blocks, name) {
        Some((_, module, _)) => family.blocks[0].norms().any(|norm| norm.name == module),
        None => path == family.names.final_norm,
    };
    let path = name.strip_suffix(".weight");
    family.gguf.is_some_and(|gguf| gguf.norms_plus_one) && path.is_some_and(is_norm)
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
pub(crate) fn interleaved(family: &Family, name: &str) -> Option<Heads> {
    if !family.gguf.is_some_and(|gguf| gguf.interleaved) {
        return None;
    }
    let (_, module, _) = parts(family.names.blocks, name)?;
    match family.blocks[0].linears().find(|linear| linear.name == module)?.role {
        LinearRole::Query => Some(Heads::Query),
        LinearRole::Key => Some(Heads::Key),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn family(model_type: &str) -> &'static Family {
        Family::by_model_type(model_type).unwrap()
    }

    #[test]
    fn names_are_those_of_hugging_face_checkpoints() {
        let (llama, qwen3) = (family("llama"), family("qwen3"));
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
            assert_eq!(hugging_face(qwen3, gguf).as_deref(), Some(expected));
            assert_eq!(from_hugging_face(qwen3, expected).as_deref(), Some(gguf));
        }
        for unknown in ["blk.03.attn_q.weight", "blk.+3.attn_q.weight", "blk.3.ffn_gate_exps.weight", "a", ""]
        {
            assert_eq!(hugging_face(qwen3, unknown), None, "{unknown}");
        }
        assert_eq!(hugging_face(llama, "blk.3.attn_q_norm.weight"), None);
        assert_eq!(hugging_face(llama, "blk.3.attn_norm.bias"), None);
        assert_eq!(hugging_face(llama, "output_norm.bias"), None);
    }

    #[test]
    fn rows_of_queries_and_keys_are_interleaved_in_llama_files_alone() {
        let query = "model.layers.3.self_attn.q_proj.weight";
        assert_eq!(interleaved(family("llama"), query), Some(Heads::Query));
        assert_eq!(interleaved(family("mistral"), "model.layers.0.self_attn.k_proj.bias"), Some(Heads::Key));
        assert_eq!(interleaved(family("llama"), "model.layers.3.self_attn.v_proj.weight"), None);
        assert_eq!(interleaved(family("qwen3"), query), None);
    }
}
