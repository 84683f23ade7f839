//! `{% generation %}` and `{% endgeneration %}`, `transformers`' marks around what is learned: they become variables that
//! write nothing, or a character by which the marked parts are found.

use std::ops::Range;

use crate::{Error, Result};

/// The variables for the beginning and the end of a marked part.
pub(super) const VARIABLES: [&str; 2] = ["_kiln_begin", "_kiln_end"];

/// `source` with the marks as variables, and whether there are any. The blocks around the variables keep what the marks'
/// own whitespace control does on either side.
pub(super) fn as_variables(source: &str) -> (String, bool) {
    let mut result = String::with_capacity(source.len());
    let (mut rest, mut found) = (source, false);
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        let (inside, after) = (&tag[2..end], &tag[end + 2..]);
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let control = |c: Option<char>| c.filter(|c| "-+".contains(*c)).map(String::from).unwrap_or_default();
        let (left, right) = (control(inside.chars().next()), control(inside.chars().next_back()));
        let [begin, end] = VARIABLES;
        match word {
            "generation" => {
                found = true;
                result += &format!("{{%{left} if true %}}{{{{ {begin} }}}}{{% if true {right}%}}");
            }
            "endgeneration" => result += &format!("{{%{left} endif %}}{{{{ {end} }}}}{{% endif {right}%}}"),
            _ => result += &format!("{{%{inside}%}}"),
        }
        rest = after;
    }
    result.push_str(rest);
    (result, found)
}

/// Two characters that stand for nothing (Unicode's noncharacters) and that no text has, as `is_used` says.
pub(super) fn unused(is_used: impl Fn(char) -> bool) -> Result<[&'static str; 2]> {
    const MARKS: [&str; 8] =
        ["\u{fdd0}", "\u{fdd1}", "\u{fdd2}", "\u{fdd3}", "\u{fdd4}", "\u{fdd5}", "\u{fdd6}", "\u{fdd7}"];
    let free: Vec<&str> = MARKS.into_iter().filter(|mark| !mark.chars().any(&is_used)).collect();
    match free.as_slice() {
        [first, second, ..] => Ok([first, second]),
        _ => Err(Error::Template("the conversation holds all of U+FDD0 to U+FDD7".into())),
    }
}

/// `marked` without the marks, and the parts between a beginning and the next end. What isn't ended ends with the text.
pub(super) fn take_out(marked: &str, [begin, end]: [&str; 2]) -> (String, Vec<Range<usize>>) {
    let mut text = String::with_capacity(marked.len());
    let (mut ranges, mut open) = (Vec::new(), None);
    for piece in marked.split_inclusive(|c: char| begin.contains(c) || end.contains(c)) {
        if let Some(piece) = piece.strip_suffix(begin) {
            text += piece;
            open.get_or_insert(text.len());
        } else if let Some(piece) = piece.strip_suffix(end) {
            text += piece;
            ranges.extend(open.take().map(|start| start..text.len()));
        } else {
            text += piece;
        }
    }
    ranges.extend(open.map(|start| start..text.len()));
    (text, ranges)
}
