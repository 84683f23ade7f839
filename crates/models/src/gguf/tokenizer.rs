//! A tokenizer from `tokenizer.ggml.*` keys.
//!
//! Two models are read: `gpt2`, byte-level BPE with merges, whose splitting into words goes by the name in
//! `tokenizer.ggml.pre`; and `llama`, SentencePiece's BPE, whose merges follow from the scores of the pieces.

use std::collections::HashMap;

use tokenizers::{
    AddedToken, DecoderWrapper, NormalizerWrapper, Tokenizer,
    decoders::{
        byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as DecoderSequence, strip::Strip,
    },
    models::bpe::{BPE, BpeBuilder, Merges, Vocab},
    normalizers::{Prepend, Replace, Sequence as NormalizerSequence, unicode::NFC},
    pre_tokenizers::byte_level::ByteLevel,
    processors::template::{SpecialToken, TemplateProcessing},
};

use super::{
    value::Metadata,
    words::{WORDS, Words},
};
use crate::{Error, Result, config::SpecialTokens};

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";

/// Bytes of the longest token; looking for a piece's merges takes time in its square.
const MAX_TOKEN: usize = 1024;

/// SentencePiece's mark for a space.
const SPACE: &str = "\u{2581}";

/// Token types, as `tokenizer.ggml.token_type` numbers them.
pub(crate) mod kind {
    pub(crate) const NORMAL: i64 = 1;
    pub(crate) const UNKNOWN: i64 = 2;
    pub(crate) const CONTROL: i64 = 3;
    pub(crate) const USER_DEFINED: i64 = 4;
    pub(crate) const UNUSED: i64 = 5;
    pub(crate) const BYTE: i64 = 6;
}

fn error(error: impl std::fmt::Display) -> Error {
    Error::Tokenizer(error.to_string())
}

/// Ids with a meaning; those beyond the vocabulary, if there is one, mean nothing, as in llama.cpp. What was passed over
/// is added to `notes`.
pub(super) fn special_tokens(metadata: &Metadata, notes: &mut Vec<String>) -> Result<SpecialTokens> {
    let size = metadata.strings(TOKENS)?.map(<[String]>::len);
    let mut id = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let id = metadata.u32(&key)?;
        Ok::<_, Error>(match (id, size) {
            (Some(id), Some(size)) if id as usize >= size => {
                notes.push(format!("{key} is {id}, beyond the {size} tokens, and was passed over"));
                None
            }
            _ => id,
        })
    };
    let mut eos = Vec::new();
    for name in ["eos", "eot", "eom"] {
        if let Some(id) = id(name)?.filter(|id| !eos.contains(id)) {
            eos.push(id);
        }
    }
    Ok(SpecialTokens { bos: id("bos")?, eos, pad: id("padding")? })
}

/// The tokenizer of a file.
pub(crate) fn build(metadata: &Metadata) -> Result<Tokenizer> {
    let vocabulary = Vocabulary::read(metadata)?;
    let (mut tokenizer, add_bos) = match metadata.require(MODEL, metadata.str(MODEL)?)? {
        "gpt2" => byte_level(metadata, &vocabulary)?,
        "llama" => sentence_piece(metadata, &vocabulary, merges_by_score(metadata, &vocabulary)?)?,
        "gemma4" => sentence_piece(metadata, &vocabulary, merges(metadata, &vocabulary)?)?,
        _ => return Err(metadata.unsupported_value(MODEL, "gpt2, llama, gemma4")),
    };
    finish(&mut tokenizer, metadata, &vocabulary, add_bos)?;
    Ok(tokenizer)
}

/// Gives a tokenizer of another model the tokens that are found before a text is split, and those around a text.
pub(crate) fn add_tokens(tokenizer: &mut Tokenizer, metadata: &Metadata) -> Result<()> {
    finish(tokenizer, metadata, &Vocabulary::read(metadata)?, false)
}

fn finish(
    tokenizer: &mut Tokenizer,
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    add_bos: bool,
) -> Result<()> {
    tokenizer.add_tokens(vocabulary.added()).map_err(error)?;
    let flag = |name: &str, default| {
        metadata.bool(&format!("tokenizer.ggml.add_{name}_token")).map(|flag| flag.unwrap_or(default))
    };
    if let Some(template) = template(metadata, vocabulary, flag("bos", add_bos)?, flag("eos", false)?)? {
        tokenizer.with_post_processor(Some(template));
    }
    Ok(())
}

/// What puts begin- and end-of-sequence tokens around a text.
fn template(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    bos: bool,
    eos: bool,
) -> Result<Option<TemplateProcessing>> {
    let special = special_tokens(metadata, &mut Vec::new())?;
    let token = |name: &str, id: Option<u32>| {
        let id = metadata.require(&format!("tokenizer.ggml.{name}_token_id"), id)?;
        let text = vocabulary.tokens[id as usize].clone();
        SpecialToken::new(name.into(), vec![id], vec![text]).map_err(error)
    };
    let (mut pattern, mut tokens) = (String::from("$A"), Vec::new());
    if bos {
        tokens.push(token("bos", special.bos)?);
        pattern.insert_str(0, "bos ");
    }
    if eos {
        tokens.push(token("eos", special.eos.first().copied())?);
        pattern.push_str(" eos");
    }
    if tokens.is_empty() {
        return Ok(None);
    }
    let mut builder = TemplateProcessing::builder();
    builder.try_single(pattern.as_str()).map_err(error)?.special_tokens(tokens);
    builder.build().map(Some).map_err(error)
}

/// Texts and types of all tokens.
struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<i64>,
    ids: HashMap<String, u32>,
}

impl Vocabulary {
    fn read(metadata: &Metadata) -> Result<Self> {
        let mut tokens = metadata.require(TOKENS, metadata.strings(TOKENS)?)?.to_vec();
        let kinds = metadata.ints(TYPES)?.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
        if kinds.len() != tokens.len() {
            return Err(metadata.error(TYPES, &format!("{} types", tokens.len()), kinds.len().to_string()));
        }
        if let Some(unknown) = kinds.iter().find(|kind| !(kind::NORMAL..=kind::BYTE).contains(kind)) {
            return Err(metadata.error(TYPES, "types in 1..=6", unknown.to_string()));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0..).zip(&mut tokens) {
            if token.is_empty() {
                // A gap in the ids: no text becomes such a token, which needs a name of its own all the same.
                *token = format!("[EMPTY_{id}]");
            }
            if token.len() > MAX_TOKEN {
                let expected = format!("tokens of at most {MAX_TOKEN} bytes");
                return Err(metadata.error(TOKENS, &expected, token.len().to_string()));
            }
            if ids.insert(token.clone(), id).is_some() {
                return Err(metadata.error(TOKENS, "each token once", format!("{token:?} twice")));
            }
        }
        Ok(Self { tokens, kinds, ids })
    }

    /// The map the tokenizer's model takes.
    fn map(&self) -> Vocab {
        self.ids.iter().map(|(token, &id)| (token.clone(), id)).collect()
    }

    /// Tokens that are found in a text before it is split: control tokens, and those a user defined.
    fn added(&self) -> impl Iterator<Item = AddedToken> {
        self.tokens.iter().zip(&self.kinds).filter_map(|(token, &kind)| {
            let control = kind == kind::CONTROL;
            (control || kind == kind::USER_DEFINED)
                .then(|| AddedToken::from(token.as_str(), control).normalized(false))
        })
    }
}

/// BPE over bytes; also says whether a begin-of-sequence token is customary.
fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<(Tokenizer, bool)> {
    let name = metadata.str(PRE)?.unwrap_or("default");
    let names = || WORDS.iter().flat_map(|words| words.names).copied().collect::<Vec<_>>().join(", ");
    let words = Words::named(name).ok_or_else(|| metadata.unsupported_value(PRE, &names()))?;
    let merges = merges(metadata, vocabulary)?;
    let builder = BPE::builder().vocab_and_merges(vocabulary.map(), merges);
    let mut tokenizer = Tokenizer::new(build_model(builder.ignore_merges(words.ignores_merges))?);
    if words.composes {
        tokenizer.with_normalizer(Some(NFC)).map_err(error)?;
    }
    tokenizer.with_pre_tokenizer(Some(words.pre_tokenizer().map_err(error)?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok((tokenizer, words.begins))
}

fn build_model(builder: BpeBuilder) -> Result<BPE> {
    builder.build().map_err(error)
}

/// Merges in the file's order.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Merges> {
    let mut merges = Merges::new();
    for merge in metadata.require(MERGES, metadata.strings(MERGES)?)? {
        // The space between the two tokens; one that belongs to a token is spelled otherwise.
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| metadata.error(MERGES, "two tokens and a space between", format!("{merge:?}")))?;
        for token in [left, right, &format!("{left}{right}")] {
            if !vocabulary.ids.contains_key(token) {
                return Err(metadata.error(MERGES, "merges of tokens into tokens", format!("{merge:?}")));
            }
        }
        merges.push((left.into(), right.into()));
    }
    Ok(merges)
}

/// BPE over characters with bytes as the way out; also says that a begin-of-sequence token is customary.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary, merges: Merges) -> Result<(Tokenizer, bool)> {
    for key in ["tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.treat_whitespace_as_suffix"] {
        if metadata.bool(key)?.unwrap_or(false) {
            return Err(metadata.unsupported_value(key, "false"));
        }
    }
    let charsmap = "tokenizer.ggml.precompiled_charsmap";
    if metadata.ints(charsmap)?.is_some_and(|map| !map.is_empty()) {
        return Err(metadata.unsupported_value(charsmap, "an empty one"));
    }
    let mut builder =
        BPE::builder().vocab_and_merges(vocabulary.map(), merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = vocabulary.kinds.iter().position(|&kind| kind == kind::UNKNOWN) {
        builder = builder.unk_token(vocabulary.tokens[unknown].clone());
    }
    let mut tokenizer = Tokenizer::new(build_model(builder)?);
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    write_spaces(&mut tokenizer, prefix)?;
    Ok((tokenizer, true))
}

/// Spaces as SentencePiece has them in its pieces, one before a text if `prefix`, and bytes that become text again.
pub(crate) fn write_spaces(tokenizer: &mut Tokenizer, prefix: bool) -> Result<()> {
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    let mut decoders: Vec<DecoderWrapper> =
        vec![Replace::new(SPACE, " ").map_err(error)?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        normalizers.push(Prepend::new(SPACE.into()).into());
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(error)?.into());
    tokenizer.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(error)?;
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(())
}

/// Merges in the order in which SentencePiece does them: whatever gives the piece of the highest score.
fn merges_by_score(metadata: &Metadata, vocabulary: &Vocabulary) -> Result<Merges> {
    let scores = metadata.require(SCORES, metadata.floats(SCORES)?)?;
    if scores.len() != vocabulary.tokens.len() {
        let expected = format!("{} scores", vocabulary.tokens.len());
        return Err(metadata.error(SCORES, &expected, scores.len().to_string()));
    }
    let is_piece = |id: u32| vocabulary.kinds[id as usize] == kind::NORMAL;
    let mut merges = Vec::new();
    for (id, token) in (0..).zip(&vocabulary.tokens).filter(|&(id, _)| is_piece(id)) {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            let ids = (vocabulary.ids.get(left).copied(), vocabulary.ids.get(right).copied());
            if let (Some(left_id), Some(right_id)) = ids
                && is_piece(left_id)
                && is_piece(right_id)
            {
                merges.push((scores[id as usize], left_id, right_id, left, right));
            }
        }
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}
