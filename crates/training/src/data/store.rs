//! Where examples are kept: in memory, or in a file that is read by position.

use std::{
    borrow::Cow,
    fs::File,
    io::{BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::Example;
use crate::{Error, Result};

/// Examples by number.
#[derive(Debug, Clone)]
pub(super) enum Store {
    Memory(Vec<Example>),
    File {
        file: Arc<TokenFile>,
        spans: Vec<Span>,
    },
    /// Several one after another, each with the number of its first example.
    Joined(Vec<(usize, Store)>),
}

/// Where an example is in a [`TokenFile`], and how long it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// In words of 4 bytes, which reaches 16 GiB.
    start: u32,
    tokens: u32,
}

/// A nameless file of examples: for each its weight, its label, its class or number, its ids and a bit for each id that is learned, in words of
/// 4 bytes. It is gone with the last data set that reads it.
#[derive(Debug)]
pub(super) struct TokenFile {
    file: Mutex<File>,
    /// The folder, for errors.
    folder: PathBuf,
}

/// A store that is being filled.
#[derive(Debug)]
pub(super) enum NewStore {
    Memory(Vec<Example>),
    File { file: BufWriter<File>, folder: PathBuf, spans: Vec<Span>, words: u64 },
}

impl NewStore {
    pub(super) fn in_memory() -> Self {
        Self::Memory(Vec::new())
    }

    pub(super) fn on_disk(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).map_err(Error::io(folder))?;
        Ok(Self::File { file: BufWriter::new(file), folder: folder.into(), spans: Vec::new(), words: 0 })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(examples) => examples.len(),
            Self::File { spans, .. } => spans.len(),
        }
    }

    pub(super) fn push(&mut self, example: Example) -> Result<()> {
        match self {
            Self::Memory(examples) => examples.push(example),
            Self::File { file, folder, spans, words } => {
                let tokens = example.ids.len();
                let start = u32::try_from(*words).map_err(|_| Error::File {
                    path: folder.clone(),
                    field: "tokens of the data set".into(),
                    expected: "at most 16 GiB".into(),
                    found: "more".into(),
                })?;
                let record = to_words(&example);
                *words += record.len() as u64;
                let bytes: Vec<u8> = record.into_iter().flat_map(u32::to_le_bytes).collect();
                file.write_all(&bytes).map_err(Error::io(folder.as_path()))?;
                spans.push(Span { start, tokens: tokens as u32 });
            }
        }
        Ok(())
    }

    pub(super) fn finished(self) -> Result<Store> {
        match self {
            Self::Memory(examples) => Ok(Store::Memory(examples)),
            Self::File { file, folder, spans, .. } => {
                let file =
                    file.into_inner().map_err(|error| Error::io(folder.as_path())(error.into_error()))?;
                let file = Arc::new(TokenFile { file: Mutex::new(file), folder });
                Ok(Store::File { file, spans })
            }
        }
    }
}

impl Store {
    pub(super) fn joined(stores: Vec<Self>) -> Self {
        let mut start = 0;
        let numbered = stores.into_iter().map(|store| {
            let first = start;
            start += store.len();
            (first, store)
        });
        Self::Joined(numbered.collect())
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Memory(examples) => examples.len(),
            Self::File { spans, .. } => spans.len(),
            Self::Joined(stores) => stores.last().map_or(0, |(start, store)| start + store.len()),
        }
    }

    pub(super) fn tokens(&self, index: usize) -> usize {
        match self {
            Self::Memory(examples) => examples[index].ids.len(),
            Self::File { spans, .. } => spans[index].tokens as usize,
            Self::Joined(stores) => {
                let (start, store) = holder(stores, index);
                store.tokens(index - start)
            }
        }
    }

    pub(super) fn get(&self, index: usize) -> Result<Cow<'_, Example>> {
        match self {
            Self::Memory(examples) => Ok(Cow::Borrowed(&examples[index])),
            Self::File { file, spans } => Ok(Cow::Owned(file.read(spans[index])?)),
            Self::Joined(stores) => {
                let (start, store) = holder(stores, index);
                store.get(index - start)
            }
        }
    }

    /// Some of the examples; `indices` ascend.
    pub(super) fn part(&self, indices: &[usize]) -> Self {
        match self {
            Self::Memory(examples) => {
                Self::Memory(indices.iter().map(|index| examples[*index].clone()).collect())
            }
            Self::File { file, spans } => {
                Self::File { file: file.clone(), spans: indices.iter().map(|index| spans[*index]).collect() }
            }
            Self::Joined(_) => unreachable!("mixtures aren't split"),
        }
    }
}

/// The store of an example, with the number of its first one.
fn holder(stores: &[(usize, Store)], index: usize) -> (usize, &Store) {
    let (start, store) = &stores[stores.partition_point(|(start, _)| *start <= index) - 1];
    (*start, store)
}

/// Words besides ids and bits.
const HEAD: usize = 3;
/// The label of an example without one.
const UNLABELLED: u32 = 2;
/// The label of an example with a class or number.
const VALUED: u32 = 3;

fn to_words(example: &Example) -> Vec<u32> {
    let label = match example.value {
        Some(_) => VALUED,
        None => example.label.map_or(UNLABELLED, u32::from),
    };
    let value = example.value.unwrap_or(0.0).to_bits();
    let bits = example
        .scored
        .chunks(32)
        .map(|flags| flags.iter().enumerate().fold(0, |word, (bit, flag)| word | u32::from(*flag) << bit));
    let head = [example.weight.to_bits(), label, value];
    head.into_iter().chain(example.ids.iter().copied()).chain(bits).collect()
}

impl TokenFile {
    fn read(&self, span: Span) -> Result<Example> {
        let tokens = span.tokens as usize;
        let mut bytes = vec![0; 4 * (HEAD + tokens + tokens.div_ceil(32))];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(4 * u64::from(span.start)))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io(self.folder.as_path()))?;
        let words: Vec<u32> = bytes
            .chunks_exact(4)
            .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        let (head, rest) = words.split_at(HEAD);
        let (ids, bits) = rest.split_at(tokens);
        let scored = (0..tokens).map(|index| bits[index / 32] >> (index % 32) & 1 == 1).collect();
        let label = (head[1] < UNLABELLED).then_some(head[1] == 1);
        let value = (head[1] == VALUED).then(|| f32::from_bits(head[2]));
        Ok(Example { ids: ids.to_vec(), scored, weight: f32::from_bits(head[0]), label, value })
    }
}
