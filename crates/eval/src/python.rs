//! Rules of Python's strings, where Rust's differ.

/// Python's `str.isspace`, which is also `\s` of its regular expressions: Rust's whitespace and four control characters.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// `str.strip()`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.capitalize()`: the first character in title case, the others in lower case.
pub(crate) fn capitalize(text: &str) -> String {
    let Some(first) = text.chars().next() else { return String::new() };
    // Lower case of the whole text, since a final sigma looks at what stands before it.
    let lower = text.to_lowercase();
    let mut result = title_case(first);
    result.extend(lower.chars().skip(first.to_lowercase().count()));
    result
}

/// Unicode's full title case of a character.
fn title_case(c: char) -> String {
    let single = match c {
        '\u{1c4}'..='\u{1c6}' => '\u{1c5}',
        '\u{1c7}'..='\u{1c9}' => '\u{1c8}',
        '\u{1ca}'..='\u{1cc}' => '\u{1cb}',
        '\u{1f1}'..='\u{1f3}' => '\u{1f2}',
        // Georgian letters have capitals for whole words only.
        '\u{10d0}'..='\u{10fa}' | '\u{10fd}'..='\u{10ff}' => c,
        // Greek letters with a written iota have a title case of one character.
        '\u{1f80}'..='\u{1f87}' | '\u{1f90}'..='\u{1f97}' | '\u{1fa0}'..='\u{1fa7}' => {
            char::from_u32(c as u32 + 8).unwrap_or(c)
        }
        '\u{1f88}'..='\u{1f8f}' | '\u{1f98}'..='\u{1f9f}' | '\u{1fa8}'..='\u{1faf}' => c,
        '\u{1fb3}' | '\u{1fc3}' | '\u{1ff3}' => char::from_u32(c as u32 + 9).unwrap_or(c),
        '\u{1fbc}' | '\u{1fcc}' | '\u{1ffc}' => c,
        _ => {
            let mut upper = c.to_uppercase();
            let first = upper.next().unwrap_or(c);
            // The iota of the rest of them becomes a mark, the second letter of a ligature a small one.
            let rest = upper.flat_map(|c| match c {
                '\u{399}' => vec!['\u{345}'],
                c if first.is_uppercase() => c.to_lowercase().collect(),
                c => vec![c],
            });
            return std::iter::once(first).chain(rest).collect();
        }
    };
    single.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whitespace_is_pythons() {
        assert_eq!(strip("\u{1c} a b\u{1f}\u{85}\n"), "a b");
        assert_eq!(strip("\u{200b}a"), "\u{200b}a");
    }

    #[test]
    fn letters_that_python_titles_otherwise() {
        // Python 3.11's `str.capitalize`.
        for (text, expected) in [
            ("ǰab", "J\u{30c}ab"),
            ("ﬀAB", "Ffab"),
            ("ﬃ", "Ffi"),
            ("և", "Եւ"),
            ("ᾀ", "ᾈ"),
            ("ᾳ", "ᾼ"),
            ("ᾴ", "Ά\u{345}"),
            ("ᾷ", "Α\u{342}\u{345}"),
            ("აბ", "აბ"),
            ("ΑΣ", "Ας"),
            ("İX", "İx"),
            ("ŉa", "ʼNa"),
        ] {
            assert_eq!(capitalize(text), expected, "{text:?}");
        }
    }
}
