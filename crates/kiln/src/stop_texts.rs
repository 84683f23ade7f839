//! Texts that end a text, looked for as it comes.

/// What has come, and how much of it was shown: never a part of a stop text.
#[derive(Debug)]
pub(crate) struct StopTexts {
    stops: Vec<String>,
    text: String,
    shown: usize,
    found: bool,
}

impl StopTexts {
    pub(crate) fn new(stops: Vec<String>) -> Self {
        Self { stops, text: String::new(), shown: 0, found: false }
    }

    /// What can be shown now that `piece` has come.
    pub(crate) fn push(&mut self, piece: &str) -> &str {
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.text.len().saturating_sub(longest).max(self.shown);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.text[from..].find(stop)).min();
        let end = match found {
            Some(place) => {
                self.found = true;
                self.text.truncate(from + place);
                self.text.len()
            }
            None => self.text.len() - self.held(),
        };
        let start = std::mem::replace(&mut self.shown, end);
        &self.text[start..end]
    }

    /// Bytes at the end that may become a stop text.
    fn held(&self) -> usize {
        let begins = |stop: &String| {
            let shares = stop.char_indices().map(|(index, _)| index).rev();
            shares
                .filter(|share| *share <= self.text.len() - self.shown)
                .find(|share| self.text.ends_with(&stop[..*share]))
        };
        self.stops.iter().filter_map(begins).max().unwrap_or(0)
    }

    /// Whether a stop text came.
    pub(crate) fn is_found(&self) -> bool {
        self.found
    }

    /// What was held back, once nothing more comes.
    pub(crate) fn rest(&mut self) -> &str {
        let start = std::mem::replace(&mut self.shown, self.text.len());
        &self.text[start..]
    }

    /// All that came before the stop text.
    pub(crate) fn into_text(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown of pieces, piece by piece, and whether a stop text came.
    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, bool) {
        let mut texts = StopTexts::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
        let mut shown = Vec::new();
        for piece in pieces {
            shown.push(texts.push(piece).to_owned());
            if texts.is_found() {
                return (shown, true);
            }
        }
        shown.push(texts.rest().to_owned());
        (shown, false)
    }

    #[test]
    fn no_part_of_a_stop_text_is_shown() {
        assert_eq!(shown(&[], &["a", "é"]), (vec!["a".into(), "é".into(), String::new()], false));
        assert_eq!(
            shown(&["END"], &["aE", "N", "D b"]),
            (vec!["a".into(), String::new(), String::new()], true)
        );
        let (pieces, found) = shown(&["END"], &["aE", "N", "x"]);
        assert_eq!((pieces.concat().as_str(), found), ("aENx", false));
        assert_eq!(
            shown(&["\n\n", "é!"], &["aé", "\n", "\nb"]),
            (vec!["a".into(), "é".into(), String::new()], true)
        );
        assert_eq!(shown(&["ab", "b"], &["xab"]), (vec!["x".into()], true), "the earliest");
        let (pieces, found) = shown(&["aab"], &["a", "a", "a", "b", "c"]);
        assert_eq!((pieces.concat().as_str(), found), ("a", true));
    }
}
