//! The text of WikiText-2 as the lm-evaluation-harness's task `wikitext` sees it: pages, words, and spelling undone.
//!
//! The task scores [`detokenize`]d pages and divides by the words and bytes of the pages as they were. Rules of release
//! 0.4.13; whitespace is Python's, which has four control characters (U+001C to U+001F) more than Rust's.
//!
//! ```
//! use kiln_eval::wikitext::{count_words, detokenize, pages};
//! let file = " \n = Iron = \n \n Iron is a metal , number 26 . \n = Gold = \n Gold is , too . \n";
//! let pages = pages(file);
//! assert_eq!(pages.len(), 2);
//! assert_eq!(detokenize(&pages[1]), " = Gold =\nGold is, too.\n");
//! assert_eq!(count_words(&pages[1]), 10);
//! ```

use crate::python::is_space;

/// Replaced before brackets and quotes, in this order.
const BEFORE: [(&str, &str); 10] = [
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
];

/// What stands between them loses the spaces at its ends.
const PAIRS: [(char, char); 5] = [('(', ')'), ('[', ']'), ('{', '}'), ('"', '"'), ('\'', '\'')];

/// Replaced after them.
const AFTER: [(&str, &str); 8] = [
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \u{b0} ", "\u{b0}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
];

/// Cuts the raw test file into pages, which begin at headings of the first level.
///
/// Pages of nothing but whitespace are dropped, except for the last.
pub fn pages(file: &str) -> Vec<String> {
    let mut pages = Vec::new();
    let mut lines: Vec<&str> = Vec::new();
    for line in file.split('\n') {
        let heading = line.replace("= = =", "===").replace("= =", "==");
        let heading = heading.trim_matches(is_space);
        if heading.starts_with("= ") && heading.ends_with(" =") {
            let page = lines.join("\n");
            if !page.chars().all(is_space) {
                pages.push(page);
            }
            lines.clear();
        }
        lines.push(line);
    }
    pages.push(lines.join("\n"));
    pages
}

/// Undoes the data set's spaces around punctuation, and its other marks.
pub fn detokenize(page: &str) -> String {
    let replace = |text: String, rules: &[(&str, &str)]| {
        rules.iter().fold(text, |text, (from, to)| text.replace(from, to))
    };
    let text = replace(page.to_owned(), &BEFORE);
    let text = PAIRS.iter().fold(text, |text, &(open, close)| tighten(&text, open, close));
    replace(text, &AFTER)
}

/// Trims what stands between each `open` and the next `close`, over line ends too.
fn tighten(text: &str, open: char, close: char) -> String {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, inside)) = rest.split_once(open) {
        let Some((inside, after)) = inside.split_once(close) else { break };
        result.push_str(before);
        result.push(open);
        result.push_str(inside.trim_matches(is_space));
        result.push(close);
        rest = after;
    }
    result + rest
}

/// Pieces between runs of whitespace; empty ones at the ends count, as in Python's `re.split(r"\s+", text)`.
pub fn count_words(text: &str) -> usize {
    let mut runs = 0;
    let mut in_run = false;
    for c in text.chars() {
        runs += usize::from(is_space(c) && !in_run);
        in_run = is_space(c);
    }
    runs + 1
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn golden() -> Vec<Value> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/eval/harness.jsonl");
        std::fs::read_to_string(path)
            .unwrap()
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn pages_are_detokenized_and_counted_as_by_the_harness() {
        let mut seen = 0;
        for line in golden().iter().filter(|line| line["task"] == "wikitext") {
            let page = line["doc"]["page"].as_str().unwrap();
            assert_eq!(detokenize(page), line["text"].as_str().unwrap());
            let count = |metric: &str| line["result"][metric][1].as_u64().unwrap() as usize;
            assert_eq!(count_words(page), count("word_perplexity"));
            assert_eq!(page.len(), count("byte_perplexity"));
            seen += 1;
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn words_are_split_as_in_python() {
        let golden = golden();
        let line = golden.iter().find(|line| line["vector"] == "re.split words").unwrap();
        for (text, count) in line["value"].as_object().unwrap() {
            assert_eq!(count_words(text), count.as_u64().unwrap() as usize, "{text:?}");
        }
    }

    #[test]
    fn pages_begin_at_headings_of_the_first_level() {
        let file = " \n = A = \n \n = = B = = \n text \n = = = C = = = \n = D = \n more\n";
        assert_eq!(pages(file), [" = A = \n \n = = B = = \n text \n = = = C = = = ", " = D = \n more\n"]);
        assert_eq!(pages(""), [""]);
        assert_eq!(pages("\n = A = "), [" = A = "]);
    }
}
