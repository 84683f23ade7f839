//! How byte-level BPE splits a text into words, by the names that `tokenizer.ggml.pre` has.
//!
//! Sources: the `tokenizer.json` of the models that the ways are named after, and llama.cpp, which also says which other names
//! stand for the same.

use tokenizers::{
    PreTokenizerWrapper, SplitDelimiterBehavior,
    pre_tokenizers::{
        byte_level::ByteLevel,
        digits::Digits,
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Contractions, letters with one leading sign, up to three digits, signs, line ends, spaces.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As LLaMA 3's, but each digit alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Qwen 2's, with marks among the letters.
const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words that begin with capital letters apart from those that don't, each digit alone.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// As Tekken's, with contractions at the end of words and up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

/// What splits a text, or the words that another step has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// What matches this pattern, and what lies between.
    Pattern(&'static str),
    /// Digits, one by one.
    Digits,
}

/// A way of splitting.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Words {
    /// Its names; files are written with the first.
    pub names: &'static [&'static str],
    /// What splits before bytes become characters.
    pub steps: &'static [Step],
    /// Whether GPT-2's pattern splits then.
    pub as_gpt2: bool,
    /// Whether a word that is a token is one, whatever the merges say.
    pub ignores_merges: bool,
    /// Whether a begin-of-sequence token is customary.
    pub begins: bool,
    /// Whether text is composed (NFC) before.
    pub composes: bool,
}

const fn words(names: &'static [&'static str], steps: &'static [Step]) -> Words {
    Words { names, steps, as_gpt2: false, ignores_merges: false, begins: false, composes: false }
}

const fn as_gpt2(names: &'static [&'static str], steps: &'static [Step]) -> Words {
    Words { as_gpt2: true, ..words(names, steps) }
}

/// All that are known.
pub(crate) static WORDS: [Words; 14] = [
    as_gpt2(&["gpt-2", "default", "phi-2", "olmo", "exaone4", "mpt", "jais"], &[]),
    as_gpt2(&["smollm", "starcoder", "refact", "command-r", "exaone", "codeshell"], &[Step::Digits]),
    Words {
        ignores_merges: true,
        begins: true,
        ..words(&["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"], &[Step::Pattern(LLAMA3)])
    },
    words(&["smaug-bpe", "dbrx", "chatglm-bpe"], &[Step::Pattern(LLAMA3)]),
    Words { ignores_merges: true, ..words(&["glm4"], &[Step::Pattern(LLAMA3)]) },
    Words { composes: true, ..words(&["qwen2", "deepseek-r1-qwen", "megrez"], &[Step::Pattern(QWEN2)]) },
    words(&["stablelm2", "hunyuan", "grok-2"], &[Step::Pattern(QWEN2)]),
    Words { composes: true, ..words(&["qwen35"], &[Step::Pattern(QWEN3_5)]) },
    Words { ignores_merges: true, begins: true, ..words(&["tekken"], &[Step::Pattern(TEKKEN)]) },
    words(&["gpt-4o", "llama4"], &[Step::Pattern(GPT4O)]),
    words(&["seed-coder"], &[Step::Pattern(SEED)]),
    words(
        &["deepseek-v3", "hunyuan-dense"],
        &[Step::Pattern(r"\p{N}{1,3}"), Step::Pattern("[一-龥぀-ゟ゠-ヿ]+"), Step::Pattern(DEEPSEEK3)],
    ),
    words(&["bloom"], &[Step::Pattern(BLOOM)]),
    words(
        &["falcon"],
        &[Step::Pattern(r"[\p{P}\$\+<=>\^~\|`]+"), Step::Pattern(GPT2), Step::Pattern("[0-9][0-9][0-9]")],
    ),
];

impl Words {
    /// The way of that name.
    pub(crate) fn named(name: &str) -> Option<&'static Self> {
        WORDS.iter().find(|words| words.names.contains(&name))
    }

    pub(crate) fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper, tokenizers::Error> {
        let mut parts: Vec<PreTokenizerWrapper> = Vec::new();
        for step in self.steps {
            parts.push(match *step {
                Step::Digits => Digits::new(true).into(),
                Step::Pattern(pattern) => {
                    let pattern = SplitPattern::Regex(pattern.into());
                    Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into()
                }
            });
        }
        parts.push(ByteLevel::new(false, true, self.as_gpt2).into());
        Ok(Sequence::new(parts).into())
    }
}
