//! Tensor names: GGUF's and those of Hugging Face checkpoints, by a family's tables.

use crate::families::{
    ExpertsPart, Family, FusedRows, LinearRole, NormKind, Part, Parts, VectorPart, VectorRole,
};

/// The factors by which LLaMA 3 divides its rotary frequencies; not a weight.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Names of the tensors of a model all of whose blocks are of one kind.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// The family.
    pub family: &'static Family,
    /// Which of its kinds of blocks.
    pub kind: usize,
}

/// The block that the tensor `name` belongs to.
pub(super) fn block(name: &str) -> Option<usize> {
    parts("blk", name).map(|(index, ..)| index as usize)
}

/// Index of the block, module and `weight` or `bias` of a name that begins with `prefix` and a dot; a tensor that is no
/// module's has only a name.
fn parts<'a>(prefix: &str, name: &'a str) -> Option<(u32, &'a str, &'a str)> {
    let (block, rest) = name.strip_prefix(prefix)?.strip_prefix('.')?.split_once('.')?;
    // Leading zeros or a sign would give two names to one tensor.
    let index = block.parse::<u32>().ok().filter(|index| index.to_string() == block)?;
    let (module, part) = rest.rsplit_once('.').unwrap_or((rest, ""));
    Some((index, module, part))
}

/// Module and part in one.
fn whole(module: &str, part: &str) -> String {
    if part.is_empty() { module.to_owned() } else { format!("{module}.{part}") }
}

/// The kind of the blocks of a file of this family with these tensors: of those that are there as a whole the one with the
/// most parts.
pub(super) fn kind_of<'a>(family: &Family, tensors: impl Iterator<Item = &'a str>) -> usize {
    let modules: Vec<&str> =
        tensors.filter_map(|name| parts("blk", name)).map(|(_, module, _)| module).collect();
    let is_whole = |kind: &&(usize, &Parts)| {
        kind.1.iter().all(|part| match part {
            Part::Vector(_) => true,
            part => !part.gguf().is_empty() && modules.contains(&part.gguf()),
        })
    };
    if family.gguf.is_some_and(|gguf| gguf.by_block.is_some()) {
        return 0;
    }
    let kinds: Vec<(usize, &Parts)> = family.blocks.iter().enumerate().collect();
    let most = |best: Option<(usize, usize)>, (kind, parts): &(usize, &Parts)| match best {
        Some((_, count)) if count >= parts.0.len() => best,
        _ => Some((*kind, parts.0.len())),
    };
    kinds.iter().filter(is_whole).fold(None, most).map_or(0, |(kind, _)| kind)
}

impl Names {
    /// The parts that a block may have: where keys say which kind each is of, those of all kinds.
    fn parts(self) -> impl Iterator<Item = &'static Part> {
        let of_kind = &self.family.blocks[self.kind..=self.kind];
        let blocks = match self.family.gguf.and_then(|gguf| gguf.by_block) {
            Some(_) => self.family.blocks,
            None => of_kind,
        };
        blocks.iter().flat_map(|parts| parts.iter())
    }

    fn experts(self) -> Option<&'static ExpertsPart> {
        self.parts().find_map(|part| match part {
            Part::Experts(experts) => Some(experts),
            _ => None,
        })
    }

    /// The part whose tensor has this Hugging Face name.
    fn part_of(self, name: &str) -> Option<&'static Part> {
        let (_, module, part) = parts(self.family.names.blocks, name)?;
        let whole = whole(module, part);
        self.parts().find(|entry| entry.name() == whole || entry.name() == module)
    }

    fn role(self, name: &str) -> Option<LinearRole> {
        match self.part_of(name)? {
            Part::Linear(linear) => Some(linear.role),
            _ => None,
        }
    }

    fn vector(self, name: &str) -> Option<VectorRole> {
        match self.part_of(name)? {
            Part::Vector(vector) => Some(vector.role),
            _ => None,
        }
    }

    /// Modules outside the blocks: GGUF's name and the path in checkpoints.
    fn outer(self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let names = &self.family.names;
        let positions = names.positions.map(|learned| ("position_embd", learned.path));
        let norm = names.embedding_norm.map(|path| ("token_embd_norm", path));
        let per_layer = names.per_layer.map(|paths| {
            [
                ("per_layer_token_embd", paths.embedding),
                ("per_layer_model_proj", paths.projection),
                ("per_layer_proj_norm", paths.norm),
            ]
        });
        let all =
            [("token_embd", names.embedding), ("output_norm", names.final_norm), ("output", names.head)];
        all.into_iter().chain(positions).chain(norm).chain(per_layer.into_iter().flatten())
    }

    /// The Hugging Face names of what the tensor `name` stacks, given the number of experts: of each one tensor, or gate and
    /// way in. `None` if it stacks none.
    pub(super) fn stacked(self, name: &str, count: usize) -> Option<Vec<Vec<String>>> {
        let (index, module, part) = parts("blk", name)?;
        let experts = self.experts().filter(|_| matches!(part, "weight" | "bias"))?;
        let kinds = match experts.gguf.iter().position(|gguf| *gguf == module) {
            Some(kind) => kind..kind + 1,
            None if module == "ffn_gate_up_exps" => 0..2,
            None => return None,
        };
        let path = |expert, kind| {
            format!("{}.{part}", self.family.path(index as usize, &experts.path(expert, kind)))
        };
        Some((0..count).map(|expert| kinds.clone().map(|kind| path(expert, kind)).collect()).collect())
    }

    /// The Hugging Face name of the tensor `name`; `None` if models of this family have no such tensor.
    pub(super) fn hugging_face(self, name: &str) -> Option<String> {
        let family = self.family;
        let known = |norm: bool, part: &str| match part {
            "weight" => true,
            "bias" => !norm || family.norm == NormKind::Layer,
            _ => false,
        };
        if let Some((index, module, part)) = parts("blk", name) {
            let path = |name: &str| family.path(index as usize, name);
            let whole = whole(module, part);
            let is_vector = |entry: &&Part| matches!(entry, Part::Vector(_)) && entry.gguf() == whole;
            if let Some(vector) = self.parts().find(is_vector) {
                return Some(path(vector.name()));
            }
            let entry = self.parts().find(|entry| entry.gguf() == module)?;
            let known = match entry {
                Part::Norm(_) => known(true, part),
                Part::Linear(linear) => part == "weight" || known(false, part) && !linear.role.stays_dense(),
                Part::Experts(_) | Part::Vector(_) => false,
            };
            return known.then(|| format!("{}.{part}", path(entry.name())));
        }
        let (module, part) = name.rsplit_once('.')?;
        let (gguf, path) = self.outer().find(|(gguf, _)| *gguf == module)?;
        let is_known = match gguf {
            "output_norm" | "token_embd_norm" | "per_layer_proj_norm" => known(true, part),
            "output" => known(false, part),
            _ => part == "weight",
        };
        is_known.then(|| format!("{path}.{part}"))
    }

    /// GGUF's name of the tensor with this Hugging Face name; all experts have one.
    pub(crate) fn gguf(self, name: &str) -> Option<String> {
        if let Some((index, module, part)) = parts(self.family.names.blocks, name) {
            let experts = self.experts();
            let expert = experts.and_then(|experts| Some(experts.gguf[experts.place(module)?.1]));
            let gguf = match expert {
                Some(gguf) => format!("{gguf}.{part}"),
                None => {
                    let whole = whole(module, part);
                    let entry = self.parts().find(|entry| entry.name() == whole || entry.name() == module)?;
                    if entry.name() == whole {
                        entry.gguf().to_owned()
                    } else {
                        format!("{}.{part}", entry.gguf())
                    }
                }
            };
            return Some(format!("blk.{index}.{gguf}"));
        }
        let (module, part) = name.rsplit_once('.')?;
        let (gguf, _) = self.outer().find(|(_, path)| *path == module)?;
        Some(format!("{gguf}.{part}"))
    }

    /// Whether the tensor with this Hugging Face name is an expert's, which files have in one with those of all.
    pub(crate) fn is_stacked(self, name: &str) -> bool {
        parts(self.family.names.blocks, name).is_some_and(|(_, module, _)| {
            self.experts().is_some_and(|experts| experts.place(module).is_some())
        })
    }

    /// Whether the tensor with this Hugging Face name is a norm's weight that stands in the file with 1 added.
    pub(crate) fn has_one_added(self, name: &str) -> bool {
        let is_norm = |path: &str| match parts(self.family.names.blocks, name) {
            Some(_) => matches!(self.part_of(name), Some(Part::Norm(_))),
            None => path == self.family.names.final_norm,
        };
        let path = name.strip_suffix(".weight");
        self.family.gguf.is_some_and(|gguf| gguf.norms_plus_one) && path.is_some_and(is_norm)
    }

    /// The vectors whose numbers of all blocks stand under a key, which no architecture precedes.
    pub(super) fn keyed(self) -> impl Iterator<Item = (&'static str, &'static VectorPart)> {
        self.parts().filter_map(|part| match part {
            Part::Vector(vector) => Some((vector.role.gguf_key()?, vector)),
            _ => None,
        })
    }

    /// The key that has the numbers of the tensor with this Hugging Face name.
    pub(crate) fn key_of(self, name: &str) -> Option<&'static str> {
        self.vector(name)?.gguf_key()
    }

    /// How the rows of the tensor with this Hugging Face name lie in the file, if otherwise than in checkpoints.
    pub(crate) fn order(self, name: &str) -> Option<RowOrder> {
        let interleaved = self.family.gguf.is_some_and(|gguf| gguf.interleaved);
        let tiles = match self.vector(name) {
            Some(VectorRole::DeltaConvolution) => Some(Tiles::Mixed),
            Some(VectorRole::DeltaLogRate | VectorRole::DeltaTimeBias) => Some(Tiles::Heads),
            _ => None,
        };
        if let Some(tiles) = tiles {
            return Some(RowOrder::Tiled(tiles));
        }
        match self.role(name)? {
            LinearRole::Query if interleaved => Some(RowOrder::Interleaved(Heads::Query)),
            LinearRole::Key if interleaved => Some(RowOrder::Interleaved(Heads::Key)),
            LinearRole::QueryKeyValue(FusedRows::Grouped) => Some(RowOrder::Concatenated),
            LinearRole::DeltaMixed => Some(RowOrder::Tiled(Tiles::Mixed)),
            LinearRole::DeltaGate => Some(RowOrder::Tiled(Tiles::Values)),
            LinearRole::DeltaStrength | LinearRole::DeltaDecay => Some(RowOrder::Tiled(Tiles::Heads)),
            _ => None,
        }
    }

    /// How the columns do.
    pub(crate) fn column_order(self, name: &str) -> Option<Tiles> {
        (self.role(name)? == LinearRole::DeltaOutput).then_some(Tiles::Values)
    }

    /// The dimension of size one that the tensor with this Hugging Face name lacks in the file.
    pub(crate) fn flat_axis(self, name: &str) -> Option<usize> {
        match (self.role(name), self.vector(name)) {
            (Some(LinearRole::SharedExpertGate), _) if name.ends_with(".weight") => Some(0),
            (_, Some(VectorRole::DeltaConvolution)) => Some(1),
            _ => None,
        }
    }

    /// Whether the file has, for each number of the tensor with this Hugging Face name, less its exponential.
    pub(crate) fn is_less_exponential(self, name: &str) -> bool {
        self.vector(name) == Some(VectorRole::DeltaLogRate)
    }
}

/// How the rows of a tensor lie in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowOrder {
    /// The two halves of each head alternate.
    Interleaved(Heads),
    /// Queries, keys and values follow each other, which stand group by group in checkpoints.
    Concatenated,
    /// Value heads of delta nets follow each other in another order.
    Tiled(Tiles),
}

/// What has value heads of delta nets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tiles {
    /// Queries, keys and values, of which the values.
    Mixed,
    /// The channels of values.
    Values,
    /// One number a head.
    Heads,
}

/// Whose heads the rows of a tensor belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heads {
    /// Query heads.
    Query,
    /// Key heads.
    Key,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(model_type: &str) -> Names {
        Names { family: Family::by_model_type(model_type).unwrap(), kind: 0 }
    }

    #[test]
    fn names_are_those_of_hugging_face_checkpoints() {
        let (llama, qwen3) = (names("llama"), names("qwen3"));
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
            assert_eq!(qwen3.hugging_face(gguf).as_deref(), Some(expected));
            assert_eq!(qwen3.gguf(expected).as_deref(), Some(gguf));
        }
        for unknown in ["blk.03.attn_q.weight", "blk.+3.attn_q.weight", "blk.3.ffn_gate_exps.weight", "a", ""]
        {
            assert_eq!(qwen3.hugging_face(unknown), None, "{unknown}");
        }
        assert_eq!(llama.hugging_face("blk.3.attn_q_norm.weight"), None);
        assert_eq!(llama.hugging_face("blk.3.attn_norm.bias"), None);
        assert_eq!(llama.hugging_face("output_norm.bias"), None);
    }

    #[test]
    fn rows_lie_as_llama_cpp_writes_them() {
        let query = "model.layers.3.self_attn.q_proj.weight";
        let interleaved = |heads| Some(RowOrder::Interleaved(heads));
        assert_eq!(names("llama").order(query), interleaved(Heads::Query));
        assert_eq!(names("mistral").order("model.layers.0.self_attn.k_proj.bias"), interleaved(Heads::Key));
        assert_eq!(names("llama").order("model.layers.3.self_attn.v_proj.weight"), None);
        assert_eq!(names("qwen3").order(query), None);
        let fused = "gpt_neox.layers.3.attention.query_key_value.bias";
        assert_eq!(names("gpt_neox").order(fused), Some(RowOrder::Concatenated));
        assert_eq!(names("gpt2").order("transformer.h.0.attn.c_attn.weight"), None);
    }

    #[test]
    fn kinds_of_blocks_are_told_by_their_tensors() {
        let kind = |model_type: &str, modules: &[&str]| {
            let tensors: Vec<String> =
                modules.iter().map(|module| format!("blk.0.{module}.weight")).collect();
            kind_of(names(model_type).family, tensors.iter().map(String::as_str))
        };
        let falcon = ["attn_norm", "attn_qkv", "attn_output", "ffn_up", "ffn_down", "attn_norm_2"];
        assert_eq!(kind("falcon", &falcon), 0);
        assert_eq!(kind("falcon", &falcon[..5]), 1);
        let stablelm = [
            "attn_norm",
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
            "ffn_norm",
        ];
        assert_eq!(kind("stablelm", &stablelm), 0);
        assert_eq!(kind("stablelm", &stablelm[..8]), 1);
        // What has no whole block is told elsewhere.
        assert_eq!(kind("stablelm", &stablelm[..3]), 0);
    }
}
