//! What became of the rows of a data set.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::Serialize;

/// Lines that a report names; of more it has the number only.
const NAMED: usize = 1000;
/// Lines that a report's text names for each reason.
const SHOWN: usize = 5;

/// What became of the rows, or of the one text, of a data set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct DataReport {
    /// Rows read; 1 for a text or an id file.
    pub rows: usize,
    /// Examples made of them; a pair is two.
    pub examples: usize,
    /// Tokens in the examples.
    pub tokens: usize,
    /// Tokens that are learned; of texts with classes or numbers one each.
    pub targets: usize,
    /// Texts with a class or a number.
    pub values: usize,
    /// Rows that were cut: to `seq_len`, or to the limits of prompts and answers.
    pub truncated: usize,
    /// Lines of the first thousand of them.
    pub truncated_lines: Vec<usize>,
    /// Rows that became several examples.
    pub split: usize,
    /// Tokens left out: what was cut off, and examples without a token to learn.
    pub dropped_tokens: usize,
    /// Examples left out because no token of theirs is learned: a prompt that fills `seq_len`, a text of one token.
    pub without_targets: usize,
    /// Rows of which nothing is learned at all.
    pub dropped_rows: usize,
    /// The first thousand of them.
    pub dropped: Vec<DroppedRow>,
    /// Keys of rows that their form doesn't have, sorted.
    pub ignored_fields: BTreeSet<String>,
}

impl DataReport {
    pub(super) fn drop_row(&mut self, line: usize, reason: DropReason) {
        self.dropped_rows += 1;
        if self.dropped.len() < NAMED {
            self.dropped.push(DroppedRow { line, reason });
        }
    }

    pub(super) fn cut(&mut self, line: usize, tokens: usize) {
        self.dropped_tokens += tokens;
        self.truncated += 1;
        if self.truncated_lines.len() < NAMED {
            self.truncated_lines.push(line);
        }
    }

    /// Whether anything was cut, left out or ignored.
    pub fn has_losses(&self) -> bool {
        let Self { truncated, dropped_tokens, dropped_rows, ignored_fields, .. } = self;
        *truncated + *dropped_tokens + *dropped_rows > 0 || !ignored_fields.is_empty()
    }

    /// The rows of several sets as one; lines are those of each row's own file.
    pub(super) fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.examples += other.examples;
        self.tokens += other.tokens;
        self.targets += other.targets;
        self.values += other.values;
        self.truncated += other.truncated;
        self.split += other.split;
        self.dropped_tokens += other.dropped_tokens;
        self.without_targets += other.without_targets;
        self.dropped_rows += other.dropped_rows;
        let room = |have: usize| NAMED.saturating_sub(have);
        self.truncated_lines.extend(other.truncated_lines.iter().take(room(self.truncated_lines.len())));
        self.dropped.extend(other.dropped.iter().take(room(self.dropped.len())).cloned());
        self.ignored_fields.extend(other.ignored_fields.iter().cloned());
    }
}

/// A row of which nothing is learned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DroppedRow {
    /// The line of the file, or the number of the row, counted from 1.
    pub line: usize,
    /// Why.
    pub reason: DropReason,
}

/// Why nothing of a row is learned.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum DropReason {
    /// No message is the assistant's.
    NoAssistant {
        /// The roles of the messages.
        roles: Vec<String>,
    },
    /// The first token to learn lies beyond `seq_len`.
    TooLong {
        /// Tokens before it.
        before: usize,
    },
    /// There is no token to learn, or nothing before it.
    NoTarget,
    /// A side of a pair says nothing.
    EmptySide {
        /// `chosen` or `rejected`.
        side: &'static str,
    },
    /// Both sides of a pair say the same.
    EqualSides,
    /// Its weight is 0.
    NoWeight,
}

impl DropReason {
    /// Reasons of one kind are shown together.
    fn kind(&self) -> u8 {
        match self {
            Self::NoAssistant { .. } => 0,
            Self::TooLong { .. } => 1,
            Self::NoTarget => 2,
            Self::EmptySide { .. } => 3,
            Self::EqualSides => 4,
            Self::NoWeight => 5,
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAssistant { roles } => {
                write!(f, "no message has the role assistant; the roles are {}", roles.join(", "))
            }
            Self::TooLong { before } => {
                write!(f, "the {before} tokens before the first one to learn fill the sequence")
            }
            Self::NoTarget => f.write_str("it has no token to learn"),
            Self::EmptySide { side } => write!(f, "its side {side} is empty"),
            Self::EqualSides => f.write_str("its two sides are the same"),
            Self::NoWeight => f.write_str("its weight is 0"),
        }
    }
}

/// Some lines for a person: counts, then what was cut, left out or ignored, where there is any, by reason with the first
/// lines.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rows, examples, tokens, targets, truncated, split, dropped_tokens, .. } = self;
        write!(f, "{rows} rows became {examples} examples of {tokens} tokens, ")?;
        match self.values {
            0 => write!(f, "{targets} of them learned")?,
            _ => f.write_str("each with a class or a number")?,
        }
        if *truncated > 0 {
            write!(f, "\n{truncated} rows were cut: {}", lines(&self.truncated_lines, *truncated))?;
        }
        if *split > 0 {
            write!(f, "\n{split} rows were split")?;
        }
        if *dropped_tokens > 0 {
            write!(f, "\n{dropped_tokens} tokens were left out")?;
        }
        let mut kinds: BTreeMap<u8, Vec<&DroppedRow>> = BTreeMap::new();
        for row in &self.dropped {
            kinds.entry(row.reason.kind()).or_default().push(row);
        }
        for rows in kinds.values() {
            match rows.as_slice() {
                [DroppedRow { line, reason }] => {
                    write!(f, "\nrow in line {line} was left out: {reason}")?;
                }
                rows => {
                    let found: Vec<usize> = rows.iter().map(|row| row.line).collect();
                    let (count, reason) = (rows.len(), &rows[0].reason);
                    write!(f, "\n{count} rows were left out ({}): {reason}", lines(&found, count))?;
                }
            }
        }
        let unnamed = self.dropped_rows - self.dropped.len().min(self.dropped_rows);
        if unnamed > 0 {
            write!(f, "\n{unnamed} more rows were left out")?;
        }
        if !self.ignored_fields.is_empty() {
            let keys: Vec<&str> = self.ignored_fields.iter().map(String::as_str).collect();
            write!(f, "\nkeys without a meaning: {}", keys.join(", "))?;
        }
        Ok(())
    }
}

/// The first of `count` lines.
fn lines(lines: &[usize], count: usize) -> String {
    let shown: Vec<String> = lines.iter().take(SHOWN).map(usize::to_string).collect();
    let (word, more) =
        (if count == 1 { "line" } else { "lines" }, if count > shown.len() { ", .." } else { "" });
    format!("{word} {}{more}", shown.join(", "))
}
