//! Regular expressions of tokenizers, which their engine may run for ever.
//!
//! `fancy-regex` hands what has no lookaround, back reference or possessive quantifier to the engine of the crate `regex`,
//! which takes time in proportion to the text. The rest it runs by trying and tracking back, up to a limit at which
//! `tokenizers` silently stops matching. Two of these constructs are common, and harmless as they are used: the lookahead
//! `\s+(?!\S)`, which holds at once or one character earlier, and possessive quantifiers, which don't track back at all. They
//! are let through where nothing else in their alternative can track back; all other such constructs are refused.

use regex::{Regex, RegexBuilder};

/// The lookahead that is let through, with what must stand before it.
const LOOKAHEAD: &str = r"(?!\S)";
const BEFORE: &str = r"\s+";

/// A pattern that takes time in proportion to a text, as the crate `regex` has it: what it finds may be longer.
pub(super) fn bounded(pattern: &str) -> Result<Regex, String> {
    let mut plain = String::with_capacity(pattern.len());
    let mut alternative = Alternative::default();
    let (mut rest, mut depth) = (pattern, 0usize);
    let mut last = "";
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix(LOOKAHEAD) {
            if !plain.ends_with(BEFORE) {
                return Err(format!("{LOOKAHEAD} behind something else than {BEFORE}"));
            }
            alternative.tracks = true;
            rest = after;
            continue;
        }
        let atom = atom(rest);
        rest = &rest[atom.len()..];
        plain.push_str(atom);
        match atom {
            "(" => depth += 1,
            ")" => depth = depth.saturating_sub(1),
            "|" if depth == 0 => std::mem::take(&mut alternative).check()?,
            "*" | "+" | "?" | "{" if !matches!(last, "" | "(" | "|") => {
                let bounds = if atom == "{" { rest.split_once('}').map(|(bounds, _)| bounds) } else { None };
                if let Some(bounds) = bounds {
                    plain.push_str(&rest[..bounds.len() + 1]);
                    rest = &rest[bounds.len() + 1..];
                }
                let is_long = match bounds {
                    None => atom != "?",
                    Some(bounds) => bounds
                        .rsplit(',')
                        .next()
                        .and_then(|most| most.parse().ok())
                        .is_none_or(|most: u32| most > 8),
                };
                if let Some(after) = rest.strip_prefix('+') {
                    alternative.tracks = true;
                    rest = after;
                } else if is_long {
                    alternative.long += 1;
                }
                alternative.groups |= last == ")";
            }
            _ => {}
        }
        last = atom;
    }
    alternative.check()?;
    let regex = RegexBuilder::new(&plain).size_limit(16 << 20).build();
    regex.map_err(|error| error.to_string().lines().last().unwrap_or_default().to_owned())
}

/// What was seen of an alternative that isn't in a group.
#[derive(Default)]
struct Alternative {
    /// Whether it has a construct for which the engine tracks back.
    tracks: bool,
    /// Quantifiers that may track back far.
    long: usize,
    /// Whether a group has a quantifier.
    groups: bool,
}

impl Alternative {
    fn check(self) -> Result<(), String> {
        match self.tracks && (self.long > 1 || self.groups) {
            true => Err(format!("{LOOKAHEAD} or a possessive quantifier beside others that track back")),
            false => Ok(()),
        }
    }
}

/// The first character of a pattern, escape sequence or class.
fn atom(pattern: &str) -> &str {
    let (mut escaped, mut depth) = (false, 0usize);
    for (index, c) in pattern.char_indices() {
        let end = index + c.len_utf8();
        match c {
            _ if escaped => {
                escaped = false;
                // `\p{Han}`, `\x{1F600}`.
                if matches!(c, 'p' | 'P' | 'x' | 'u') && pattern[end..].starts_with('{') && depth == 0 {
                    return &pattern
                        [..pattern[end..].find('}').map_or(pattern.len(), |close| end + close + 1)];
                }
            }
            '\\' => {
                escaped = true;
                continue;
            }
            '[' => depth += 1,
            ']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return &pattern[..end];
        }
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_real_tokenizers_are_let_through() {
        for pattern in [
            // GPT-2, LLaMA 3, Qwen 2, o200k, DeepSeek V3, BLOOM, Falcon, tiktoken's own spelling of cl100k.
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*|\s+(?!\S)|\s+",
            r" ?[^(\s|[.,!?…。，、।۔،])]+",
            r"[0-9][0-9][0-9]",
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
            r" {2,}",
        ] {
            bounded(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
        }
    }

    #[test]
    fn patterns_that_track_back_are_refused() {
        for pattern in [
            r"(?:(?=(a+))a)+b",
            r"(a*)*\1b",
            r"(?=(\d{3})+(?!\d))",
            r"(?<=a)b",
            r"(?>a*)*b",
            r"(a+)+\s+(?!\S)",
            r"(?:a|aa)*b++",
            r"a*a*a*\s++",
            r"(?:\s+(?!\S))*x",
            r"a*b*\s+(?!\S)",
            r"x(?!\S)",
            r"\s*(?!\S)",
            r"(?!a)b",
            r"\p{L",
            r"(",
            r"[",
            r"(?:x{1000}){1000}",
        ] {
            assert!(bounded(pattern).is_err(), "{pattern}");
        }
        assert_eq!(bounded(r"\p{L}++x").unwrap().as_str(), r"\p{L}+x");
    }
}
