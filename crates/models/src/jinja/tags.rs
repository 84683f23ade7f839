//! A template before it is compiled: what is refused, and where the budget is asked.

use minijinja::{
    Error, ErrorKind,
    machinery::{Span, Token, tokenize},
    syntax::SyntaxConfig,
};

use super::{
    MAX_ELIF, MAX_GROWTH, MAX_SOURCE, MAX_TOKENS,
    budget::{BEGIN, KEEP, KEEP_IN_FIELD, PASS},
    refused,
};

/// Largest whole number that a text may be multiplied by.
const MAX_FACTOR: u64 = 64;
/// Bytes of a loop's or a macro's text that aren't counted.
const MAX_UNCOUNTED: usize = 4;
/// Statements that chats and tasks have no use for.
const UNUSED: [&str; 6] = ["include", "import", "from", "extends", "block", "autoescape"];

type Tokens<'t, 's> = &'t [(Token<'s>, Span)];

/// A part of the source, and what stands there instead.
struct Edit {
    start: usize,
    end: usize,
    text: String,
}

/// A block that is open.
enum Open {
    /// A loop or a macro, with the edit that counts its text, and the bytes of that.
    Repeated { edit: usize, names: Vec<String>, bytes: usize },
    /// A `set` block of these names.
    Set(Vec<String>),
}

struct Preparation<'s> {
    source: &'s str,
    edits: Vec<Edit>,
    open: Vec<Open>,
    elifs: usize,
}

/// The source with calls that look at the [`Budget`](super::Budget).
///
/// # Errors
/// What can't be bounded, with its line, and what isn't Jinja.
pub fn prepare(source: &str, syntax: SyntaxConfig) -> Result<String, Error> {
    if source.len() > MAX_SOURCE {
        return Err(refused(format!("expected at most {MAX_SOURCE} bytes, found {}", source.len())));
    }
    if source.contains("__kiln") {
        return Err(refused("names can't begin with __kiln"));
    }
    let mut preparation = Preparation { source, edits: Vec::new(), open: Vec::new(), elifs: 0 };
    let mut tag = Vec::new();
    for token in tokenize(source, false, syntax) {
        let (token, span) = token?;
        match token {
            Token::TemplateData(text) => preparation.text(text),
            Token::VariableStart | Token::BlockStart => tag.clear(),
            Token::VariableEnd => check(&tag)?,
            Token::BlockEnd => {
                check(&tag)?;
                preparation.block(&tag, span)?;
            }
            other => {
                tag.push((other, span));
                if tag.len() > MAX_TOKENS {
                    let line = span.start_line;
                    return Err(refused(format!("line {line}: a tag has more than {MAX_TOKENS} tokens")));
                }
            }
        }
    }
    Ok(preparation.finished())
}

/// Refuses an expression that can't be bounded.
///
/// # Errors
/// As [`prepare`].
pub fn check_expression(source: &str, syntax: SyntaxConfig) -> Result<(), Error> {
    if source.len() > MAX_SOURCE {
        return Err(refused(format!("expected at most {MAX_SOURCE} bytes, found {}", source.len())));
    }
    let mut tokens = Vec::new();
    for token in tokenize(source, true, syntax) {
        tokens.push(token?);
        if tokens.len() > MAX_TOKENS {
            return Err(refused(format!("an expression has more than {MAX_TOKENS} tokens")));
        }
    }
    check(&tokens)
}

/// The operators of a tag.
fn check(tokens: Tokens) -> Result<(), Error> {
    let growth = tokens.iter().filter(|(token, _)| matches!(token, Token::Plus | Token::Tilde)).count();
    let line = tokens.first().map_or(0, |(_, span)| span.start_line);
    if growth > MAX_GROWTH {
        return Err(refused(format!("line {line}: a tag has more than {MAX_GROWTH} operators + and ~")));
    }
    let mut factors = 1u64;
    for (index, (token, _)) in tokens.iter().enumerate() {
        if !matches!(token, Token::Mul) {
            continue;
        }
        let number = |index: usize| match tokens.get(index) {
            Some((Token::Int(number), _)) => Some(*number),
            _ => None,
        };
        let factor = index.checked_sub(1).and_then(number).or_else(|| number(index + 1));
        factors = factor.and_then(|factor| factors.checked_mul(factor.max(1))).unwrap_or(u64::MAX);
        if factors > MAX_FACTOR {
            return Err(refused(format!(
                "line {line}: `*` needs a whole number of at most {MAX_FACTOR} on one side, and no more together"
            )));
        }
    }
    Ok(())
}

/// Whether a part of a tag may take long or make something long.
fn is_costly(tokens: Tokens) -> bool {
    let is_call = |index: usize| match index.checked_sub(1).map(|before| &tokens[before].0) {
        // Brackets behind a word of Jinja's own are around something.
        Some(Token::Ident(name)) => !["not", "and", "or", "if", "else", "is"].contains(name),
        Some(Token::ParenClose | Token::BracketClose | Token::Str(_) | Token::String(_)) => true,
        _ => false,
    };
    tokens.iter().enumerate().any(|(index, (token, _))| match token {
        Token::Plus | Token::Tilde | Token::Mul | Token::Pipe | Token::Colon | Token::Ident("in") => true,
        Token::ParenOpen => is_call(index),
        // Two lists may be compared to their ends; what is compared with a constant ends with that.
        token if is_comparison(token) => {
            !ends_early(&tokens[..index], true) && !ends_early(&tokens[index + 1..], false)
        }
        _ => false,
    })
}

fn is_comparison(token: &Token) -> bool {
    matches!(token, Token::Eq | Token::Ne | Token::Lt | Token::Lte | Token::Gt | Token::Gte)
}

/// Whether a side of a comparison, at the end or the beginning of these tokens, is a constant or a comparison in brackets.
fn ends_early(tokens: Tokens, at_end: bool) -> bool {
    let nearest = if at_end { tokens.last() } else { tokens.first() };
    match nearest.map(|(token, _)| token) {
        Some(Token::Str(_) | Token::String(_) | Token::Int(_) | Token::Float(_)) => true,
        Some(Token::Ident(name)) => ["true", "false", "none", "True", "False", "None"].contains(name),
        Some(Token::ParenOpen | Token::ParenClose) => bracketed(tokens, at_end).is_some_and(|inside| {
            // Whatever else may stand beside a comparison makes something that needn't be true or false.
            let other =
                |token: &Token| matches!(token, Token::Comma | Token::Ident("and" | "or" | "if" | "else"));
            find(inside, 0, is_comparison).is_some() && find(inside, 0, other).is_none()
        }),
        _ => false,
    }
}

/// What stands in the brackets that end, or begin, these tokens.
fn bracketed<'t, 's>(tokens: Tokens<'t, 's>, at_end: bool) -> Option<Tokens<'t, 's>> {
    let mut depth = 0isize;
    let mut is_outside = |(token, _): &(Token, Span)| {
        depth += match token {
            Token::ParenOpen => 1,
            Token::ParenClose => -1,
            _ => 0,
        };
        depth == 0
    };
    if at_end {
        let open = tokens.iter().rposition(&mut is_outside)?;
        tokens.get(open + 1..tokens.len() - 1)
    } else {
        let close = tokens.iter().position(is_outside)?;
        tokens.get(1..close)
    }
}

/// Whether a part of a tag is more than a constant or a variable.
fn makes_a_value(tokens: Tokens) -> bool {
    is_costly(tokens)
        || tokens.iter().any(|(token, _)| matches!(token, Token::BracketOpen | Token::BraceOpen))
}

/// `a.b + 1` or `a.b - 1`: a number, or nothing that can be computed.
fn is_count(tokens: Tokens) -> bool {
    match tokens {
        [name @ .., (Token::Plus | Token::Minus, _), (Token::Int(_), _)] => {
            !name.is_empty()
                && name.iter().enumerate().all(|(index, (token, _))| match index % 2 {
                    0 => matches!(token, Token::Ident(_)),
                    _ => matches!(token, Token::Dot),
                })
        }
        _ => false,
    }
}

/// The first token outside of brackets, from `start` on, that is one of those.
fn find(tokens: Tokens, start: usize, is_wanted: impl Fn(&Token) -> bool) -> Option<usize> {
    let mut depth = 0usize;
    for (index, (token, _)) in tokens.iter().enumerate().skip(start) {
        match token {
            token if depth == 0 && is_wanted(token) => return Some(index),
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => depth += 1,
            Token::ParenClose | Token::BracketClose | Token::BraceClose => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    None
}

/// The names that stand before a `,`, a `=` or the end, in at most `deepest` brackets.
fn names(tokens: Tokens, deepest: usize) -> Vec<String> {
    let (mut names, mut depth, mut expected) = (Vec::new(), 0usize, true);
    for (token, _) in tokens {
        match token {
            Token::Ident(name) if expected && depth <= deepest => {
                names.push((*name).to_owned());
                expected = false;
            }
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => depth += 1,
            Token::ParenClose | Token::BracketClose | Token::BraceClose => depth = depth.saturating_sub(1),
            Token::Comma if depth <= deepest => expected = true,
            _ => {}
        }
    }
    names
}

impl<'s> Preparation<'s> {
    /// Text of the template is counted where it is repeated.
    fn text(&mut self, text: &str) {
        let repeated = self.open.iter_mut().rev().find_map(|open| match open {
            Open::Repeated { bytes, .. } => Some(bytes),
            Open::Set(_) => None,
        });
        if let Some(bytes) = repeated {
            *bytes += text.len();
        }
    }

    fn block(&mut self, tag: Tokens<'_, 's>, end: Span) -> Result<(), Error> {
        let Some((Token::Ident(statement), span)) = tag.first() else { return Ok(()) };
        let (statement, tokens) = (*statement, &tag[1..]);
        match statement {
            "set" => match find(tokens, 0, |token| matches!(token, Token::Assign)) {
                Some(assign) => {
                    let (targets, value) = (&tokens[..assign], &tokens[assign + 1..]);
                    if is_count(value) {
                        return Ok(());
                    }
                    let is_field = targets.iter().any(|(token, _)| matches!(token, Token::Dot));
                    let is_name = value.iter().any(|(token, _)| matches!(token, Token::Ident(_)));
                    if is_field && (is_name || makes_a_value(value)) {
                        self.wrap(value, KEEP_IN_FIELD);
                    } else if makes_a_value(value) {
                        self.wrap(value, KEEP);
                    }
                }
                None => {
                    let pipe = find(tokens, 0, |token| matches!(token, Token::Pipe)).unwrap_or(tokens.len());
                    self.open.push(Open::Set(names(&tokens[..pipe], 1)));
                }
            },
            "endset" => {
                if let Some(Open::Set(names)) = self.open.pop() {
                    let keep =
                        names.iter().map(|name| format!("{{% set {name} = {KEEP}({name}) %}}")).collect();
                    self.append(end, keep);
                }
            }
            "with" => {
                let mut assigned = Vec::new();
                let mut start = 0;
                while let Some(assign) = find(tokens, start, |token| matches!(token, Token::Assign)) {
                    let from =
                        (start..assign).rev().find(|&at| matches!(tokens[at].0, Token::Comma) && at > start);
                    let from = if matches!(tokens[..assign].last(), Some((Token::ParenClose, _))) {
                        start
                    } else {
                        from.map_or(start, |at| at + 1)
                    };
                    assigned.extend(names(&tokens[from..assign], 1));
                    start = assign + 1;
                }
                let keep =
                    assigned.iter().map(|name| format!("{{% set {name} = {KEEP}({name}) %}}")).collect();
                self.append(end, keep);
            }
            "for" => {
                let Some(start) = tokens.iter().position(|(token, _)| matches!(token, Token::Ident("in")))
                else {
                    return Ok(());
                };
                let is_end = |token: &Token| matches!(token, Token::Ident("if" | "recursive"));
                let stop = find(tokens, start + 2, is_end).unwrap_or(tokens.len());
                let iterated = &tokens[start + 1..stop];
                if is_costly(iterated) {
                    self.wrap(iterated, PASS);
                }
                // A condition on items ends the tag, or stands before `recursive`.
                let condition = tokens.get(stop + 1..).unwrap_or_default();
                let condition = match condition {
                    [condition @ .., (Token::Ident("recursive"), _)] => condition,
                    condition => condition,
                };
                if matches!(tokens.get(stop), Some((Token::Ident("if"), _))) && is_costly(condition) {
                    self.wrap(condition, PASS);
                }
                self.repeated(end, Vec::new());
            }
            "macro" | "call" => {
                let arguments = match tokens.iter().position(|(token, _)| matches!(token, Token::ParenOpen)) {
                    // A call block without arguments of its own begins with the macro's name.
                    Some(open) if statement == "macro" || open == 0 => {
                        let close = find(tokens, open + 1, |token| matches!(token, Token::ParenClose));
                        names(&tokens[open + 1..close.unwrap_or(tokens.len())], 0)
                    }
                    _ => Vec::new(),
                };
                self.repeated(end, arguments);
            }
            "endfor" | "endmacro" | "endcall" => {
                if let Some(Open::Repeated { edit, names, bytes }) = self.open.pop() {
                    // Less costs more steps than a rendering has.
                    let counted = (bytes > MAX_UNCOUNTED).then(|| format!("{{% do {BEGIN}({bytes}) %}}"));
                    let mut tags = Vec::from_iter(counted);
                    tags.extend(names.iter().map(|name| format!("{{% set {name} = {KEEP}({name}) %}}")));
                    if !tags.is_empty() {
                        self.edits[edit].text = with_end(&tags.concat(), &self.edits[edit].text);
                    }
                }
            }
            "if" | "elif" => {
                self.elifs += usize::from(statement == "elif");
                if self.elifs > MAX_ELIF {
                    return Err(refused(format!("more than {MAX_ELIF} elif")));
                }
                if is_costly(tokens) {
                    self.wrap(tokens, PASS);
                }
            }
            "do" => self.wrap(tokens, PASS),
            _ if UNUSED.contains(&statement) => {
                let line = span.start_line;
                return Err(Error::new(
                    ErrorKind::SyntaxError,
                    format!("line {line}: `{statement}` isn't supported here"),
                ));
            }
            _ => {}
        }
        Ok(())
    }

    /// Hands what the tokens compute to a function.
    fn wrap(&mut self, tokens: Tokens, function: &str) {
        if let (Some((_, first)), Some((_, last))) = (tokens.first(), tokens.last()) {
            let (start, end) = (first.start_offset as usize, last.end_offset as usize);
            self.edits.push(Edit { start, end: start, text: format!("{function}((") });
            self.edits.push(Edit { start: end, end, text: "))".into() });
        }
    }

    /// Puts tags behind one that ends at `end`; the last of them does what that end does with the whitespace behind.
    fn append(&mut self, end: Span, tags: String) {
        let (start, end) = (end.start_offset as usize, end.end_offset as usize);
        let text = if tags.is_empty() {
            self.source[start..end].into()
        } else {
            with_end(&tags, &self.source[start..end])
        };
        self.edits.push(Edit { start, end, text });
    }

    /// Opens a loop or a macro, behind whose tag its text is counted; how much that is, its end tells.
    fn repeated(&mut self, end: Span, names: Vec<String>) {
        self.open.push(Open::Repeated { edit: self.edits.len(), names, bytes: 0 });
        self.append(end, String::new());
    }

    fn finished(mut self) -> String {
        self.edits.sort_by_key(|edit| (edit.start, edit.end));
        let (mut text, mut done) = (String::with_capacity(self.source.len() * 2), 0);
        for edit in self.edits {
            text += &self.source[done..edit.start];
            text += &edit.text;
            done = edit.end;
        }
        text += &self.source[done..];
        text
    }
}

/// `%}`, then tags of which the last ends as `end` does.
fn with_end(tags: &str, end: &str) -> String {
    format!("%}}{}{end}", tags.strip_suffix("%}").unwrap_or(tags))
}
