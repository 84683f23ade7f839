//! `tokenizer.model`: SentencePiece's own file, BPE or unigram, of normalization `identity`.
//!
//! It is a Protocol Buffers message, of which a few fields matter. Source: `sentencepiece_model.proto`.

use std::path::Path;

use tokenizers::{
    NormalizerWrapper, Tokenizer,
    models::unigram::Unigram,
    normalizers::{Replace, Sequence as NormalizerSequence, replace::ReplacePattern},
};

use super::{check::check_model, error};
use crate::{
    Error, Result,
    gguf::{Array, Metadata, Value, add_tokens, build_tokenizer, token_kind, write_spaces},
};

/// Longest file.
pub(super) const MAX_BYTES: u64 = 64 << 20;
/// Values of `model_type`.
const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

/// What is read of the message.
struct Model {
    pieces: Vec<String>,
    scores: Vec<f64>,
    kinds: Vec<i64>,
    model_type: u64,
    byte_fallback: bool,
    /// Of unknown, begin and end.
    ids: [Option<u32>; 3],
    has_charsmap: bool,
    adds_prefix: bool,
    removes_spaces: bool,
}

/// The tokenizer of the file's bytes, with its begin token before texts if `add_bos`, its end token behind them if `add_eos`.
pub(super) fn read(path: &Path, bytes: &[u8], add_bos: bool, add_eos: bool) -> Result<Tokenizer> {
    let model = Model::parse(bytes).ok_or_else(|| Error::File {
        path: path.into(),
        field: "message".into(),
        expected: "SentencePiece's model".into(),
        found: "other bytes".into(),
    })?;
    let unsupported = |field: &str, found: String, supported: &str| Error::Unsupported {
        path: path.into(),
        field: field.into(),
        found,
        supported: supported.into(),
    };
    if model.has_charsmap {
        return Err(unsupported("normalizer_spec.precompiled_charsmap", "a map".into(), "identity"));
    }
    if ![UNIGRAM, BPE].contains(&model.model_type) {
        return Err(unsupported(
            "trainer_spec.model_type",
            model.model_type.to_string(),
            "1 (unigram), 2 (BPE)",
        ));
    }
    let metadata = model.metadata(path, add_bos, add_eos);
    let mut tokenizer = match model.model_type {
        BPE => build_tokenizer(&metadata)?,
        _ => {
            let mut tokenizer = model.unigram()?;
            add_tokens(&mut tokenizer, &metadata)?;
            tokenizer
        }
    };
    if model.removes_spaces {
        let replaced = |pattern: &str, by: &str| {
            Replace::new(ReplacePattern::Regex(pattern.into()), by)
                .map(NormalizerWrapper::from)
                .map_err(error)
        };
        // Spaces alone: other whitespace stays.
        let mut steps = vec![replaced("^ +| +$", "")?, replaced(" {2,}", " ")?];
        steps.extend(tokenizer.get_normalizer().cloned());
        tokenizer.with_normalizer(Some(NormalizerSequence::new(steps))).map_err(error)?;
    }
    Ok(tokenizer)
}

impl Model {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            model_type: UNIGRAM,
            byte_fallback: false,
            ids: [Some(0), Some(1), Some(2)],
            has_charsmap: false,
            adds_prefix: true,
            removes_spaces: true,
        };
        for field in Message(bytes) {
            match field? {
                (1, Content::Bytes(piece)) => model.add_piece(piece)?,
                (2, Content::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Content::Bytes(normalizer)) => model.read_normalizer(normalizer)?,
                _ => {}
            }
        }
        let known = |id: &Option<u32>| id.is_none_or(|id| (id as usize) < model.pieces.len());
        (!model.pieces.is_empty() && model.ids.iter().all(known)).then_some(model)
    }

    fn add_piece(&mut self, bytes: &[u8]) -> Option<()> {
        let (mut text, mut score, mut kind) = ("", 0.0, token_kind::NORMAL);
        for field in Message(bytes) {
            match field? {
                (1, Content::Bytes(bytes)) => text = std::str::from_utf8(bytes).ok()?,
                (2, Content::Fixed(bits)) => score = f64::from(f32::from_bits(bits)),
                (3, Content::Number(number)) => kind = i64::try_from(number).ok()?,
                _ => {}
            }
        }
        self.pieces.push(text.to_owned());
        self.scores.push(score);
        self.kinds.push(kind);
        Some(())
    }

    fn read_trainer(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Message(bytes) {
            match field? {
                (3, Content::Number(number)) => self.model_type = number,
                (35, Content::Number(number)) => self.byte_fallback = number != 0,
                // Negative ones, in ten bytes, mean none.
                (id @ 40..=42, Content::Number(number)) => {
                    self.ids[id as usize - 40] = u32::try_from(number).ok()
                }
                _ => {}
            }
        }
        Some(())
    }

    fn read_normalizer(&mut self, bytes: &[u8]) -> Option<()> {
        for field in Message(bytes) {
            match field? {
                (2, Content::Bytes(map)) => self.has_charsmap = !map.is_empty(),
                (3, Content::Number(number)) => self.adds_prefix = number != 0,
                (4, Content::Number(number)) => self.removes_spaces = number != 0,
                _ => {}
            }
        }
        Some(())
    }

    /// The same in GGUF's terms, which are SentencePiece's.
    fn metadata(&self, path: &Path, add_bos: bool, add_eos: bool) -> Metadata {
        let mut metadata = Metadata::new(path);
        let [_, bos, eos] = self.ids;
        let numbers = [("bos_token_id", bos), ("eos_token_id", eos)];
        let numbers = numbers.into_iter().filter_map(|(key, id)| Some((key, Value::Uint(id?.into()))));
        let others = [
            ("model", Value::String("llama".into())),
            ("tokens", Value::Array(Array::String(self.pieces.clone()))),
            ("scores", Value::Array(Array::Float(self.scores.clone()))),
            ("token_type", Value::Array(Array::Int(self.kinds.clone()))),
            ("add_space_prefix", Value::Bool(self.adds_prefix)),
            ("add_bos_token", Value::Bool(add_bos && bos.is_some())),
            ("add_eos_token", Value::Bool(add_eos && eos.is_some())),
        ];
        for (key, value) in numbers.chain(others) {
            metadata.insert(format!("tokenizer.ggml.{key}"), value);
        }
        metadata
    }

    fn unigram(&self) -> Result<Tokenizer> {
        let vocabulary = self.pieces.iter().cloned().zip(self.scores.iter().copied()).collect();
        let unknown = self.ids[0].map(|id| id as usize);
        let model = Unigram::from(vocabulary, unknown, self.byte_fallback).map_err(error)?;
        let mut tokenizer = Tokenizer::new(model);
        check_model(&tokenizer).map_err(|(field, expected, found)| {
            error(format!("{field}: expected {expected}, found {found}"))
        })?;
        write_spaces(&mut tokenizer, self.adds_prefix)?;
        Ok(tokenizer)
    }
}

/// What a field of a message holds.
enum Content<'a> {
    Number(u64),
    Fixed(u32),
    Bytes(&'a [u8]),
}

/// The fields of a message, by number; `None` and then nothing where the bytes are no message.
struct Message<'a>(&'a [u8]);

impl<'a> Message<'a> {
    fn number(&mut self) -> Option<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.0.split_first()?;
            self.0 = rest;
            number |= u64::from(byte & 127) << shift;
            if byte < 128 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn field(&mut self) -> Option<(u64, Content<'a>)> {
        let key = self.number()?;
        let content = match key & 7 {
            0 => Content::Number(self.number()?),
            1 => Content::Bytes(self.take(8)?),
            2 => {
                let length = usize::try_from(self.number()?).ok()?;
                Content::Bytes(self.take(length)?)
            }
            5 => Content::Fixed(u32::from_le_bytes(self.take(4)?.try_into().ok()?)),
            _ => return None,
        };
        Some((key >> 3, content))
    }
}

impl<'a> Iterator for Message<'a> {
    type Item = Option<(u64, Content<'a>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field)
    }
}
