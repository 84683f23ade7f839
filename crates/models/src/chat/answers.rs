//! Where a template that marks nothing has written what the assistant said.
//!
//! A character that stands for nothing is put behind each answer's text; where it comes out, the answer ends. The answer
//! begins where the text before agrees no longer with the message, so that a template may leave out an answer's beginning
//! (earlier thoughts) or whitespace around it; what it writes before an answer of nothing is no part of it, even if it
//! happens to agree. Where such a character changes what the template writes, answers are looked for as they are, one after
//! the other. In a conversation with tool calls each answer is all that the template writes between what stands before and
//! behind it when such a character stands in its place.

use std::ops::Range;

use super::{ChatTemplate, Message, TemplateContext, marks};
use crate::{Error, Result};

/// The role whose messages are answers.
const ROLE: &str = "assistant";

/// Each answer with what ends its turn, in `text`, which is how `messages` are rendered.
pub(super) fn find(
    template: &ChatTemplate,
    messages: &[Message],
    context: &TemplateContext,
    text: &str,
) -> Result<Vec<Range<usize>>> {
    let Some(last) = messages.iter().rposition(|message| message.role == ROLE) else { return Ok(Vec::new()) };
    let answers = match messages.iter().any(has_calls) {
        // What a template writes of calls is in no message's content, and nothing can be looked for by it.
        true => whole(template, messages, context, text)?,
        false => contents(template, messages, context, text)?,
    };
    let Some(end) = answers.last().map(|range| range.end) else { return Ok(answers) };
    // What follows the last answer when nothing else does.
    let alone = match last + 1 == messages.len() {
        true => None,
        // A template may refuse a conversation that ends in a call: then nothing is known of its end.
        false => Some(template.render(&messages[..=last], false, context).unwrap_or_default()),
    };
    let tail = match &alone {
        None => &text[end..],
        Some(alone) if alone.get(..end) == text.get(..end) => &alone[end..],
        // The template writes it otherwise once more follows: nothing is known of its end.
        Some(_) => "",
    };
    Ok(answers.into_iter().map(|range| range.start..range.end + common(&text[range.end..], tail)).collect())
}

fn has_calls(message: &Message) -> bool {
    message
        .extra
        .get("tool_calls")
        .and_then(serde_json::Value::as_array)
        .is_some_and(|calls| !calls.is_empty())
}

/// All that the template writes of each answer, calls included, without what ends its turn: what stands in the text where an
/// answer of one unused character would.
fn whole(
    template: &ChatTemplate,
    messages: &[Message],
    context: &TemplateContext,
    text: &str,
) -> Result<Vec<Range<usize>>> {
    /// More answers than this are looked for in one rendering only: each of its own takes the time of all.
    const ALONE: usize = 200;
    let used =
        |mark: char| text.contains(mark) || messages.iter().any(|message| message.content.contains(mark));
    let [_, mark] = marks::unused(used)?;
    let indices: Vec<usize> = (0..messages.len()).filter(|index| messages[*index].role == ROLE).collect();
    // What the template writes around the answers of these messages.
    let around = |replaced: &[usize]| -> Result<Vec<String>> {
        let mut changed = messages.to_vec();
        replaced.iter().for_each(|index| changed[*index] = Message::new(ROLE, mark));
        let found: Vec<String> =
            template.render(&changed, false, context)?.split(mark).map(str::to_owned).collect();
        match found.len() == replaced.len() + 1 {
            true => Ok(found),
            false => Err(unfound(replaced[0])),
        }
    };
    if let Some(ranges) = around(&indices).ok().and_then(|pieces| between(text, &pieces)) {
        return Ok(ranges);
    }
    if indices.len() > ALONE {
        return Err(unfound(indices[0]));
    }
    let alone = |index: &usize| {
        let pieces = around(&[*index])?;
        let (start, behind) = (common(text, &pieces[0]), common_suffix(text, &pieces[1]));
        let end = text.len() - behind;
        if start < end { Ok(start..end) } else { Err(unfound(*index)) }
    };
    indices.iter().map(alone).collect()
}

/// What stands in `text` between the pieces, where it has all of them one after another.
fn between(text: &str, pieces: &[String]) -> Option<Vec<Range<usize>>> {
    let (first, rest) = pieces.split_first()?;
    let (last, inner) = rest.split_last()?;
    let mut start = text.strip_prefix(first.as_str()).map(|_| first.len())?;
    let mut ranges = Vec::with_capacity(rest.len());
    for piece in inner {
        let end = start + text[start..].find(piece.as_str()).filter(|_| !piece.is_empty())?;
        ranges.push(start..end);
        start = end + piece.len();
    }
    let end = text.strip_suffix(last.as_str())?.len();
    ranges.push(start..end);
    (start <= end && ranges.iter().all(|range| !range.is_empty())).then_some(ranges)
}

/// The answers without what ends their turns.
fn contents(
    template: &ChatTemplate,
    messages: &[Message],
    context: &TemplateContext,
    text: &str,
) -> Result<Vec<Range<usize>>> {
    let used =
        |mark: char| text.contains(mark) || messages.iter().any(|message| message.content.contains(mark));
    let [_, mark] = marks::unused(used)?;
    let answers: Vec<(usize, &str)> = messages
        .iter()
        .enumerate()
        .filter(|(_, message)| message.role == ROLE)
        .map(|(index, message)| (index, message.content.as_str()))
        .collect();
    // What the template writes up to each answer's mark, with each answer changed so.
    let pieces = |change: &dyn Fn(&mut String)| {
        let mut changed = messages.to_vec();
        for message in changed.iter_mut().filter(|message| message.role == ROLE) {
            change(&mut message.content);
        }
        // A template may refuse what it doesn't know.
        let text = template.render(&changed, false, context).ok()?;
        let pieces: Vec<String> = text.split(mark).map(str::to_owned).collect();
        (pieces.len() == answers.len() + 1).then_some(pieces)
    };
    // Before whitespace at the end, which templates take off.
    let behind = pieces(&|content| content.insert_str(content.trim_end().len(), mark));
    if let Some(behind) = behind.filter(|pieces| pieces.concat() == text) {
        let (mut headers, mut end) = (None, 0);
        let mut ranges = Vec::with_capacity(answers.len());
        for (place, (&(index, answer), piece)) in answers.iter().zip(&behind).enumerate() {
            end += piece.len();
            let (answer, space) = answer.split_at(answer.trim_end().len());
            let mut agreeing = common_suffix(piece, answer);
            if agreeing == 0 && !answer.is_empty() {
                return Err(unfound(index));
            }
            if agreeing < answer.len() {
                let headers = headers.get_or_insert_with(|| pieces(&|content| *content = mark.to_owned()));
                let header = headers.as_ref().map_or("", |headers| headers[place].as_str());
                agreeing = agreeing.min(piece.strip_prefix(header).map_or(agreeing, str::len));
            }
            ranges.push(end - agreeing..end + common(&text[end..], space));
        }
        return Ok(ranges);
    }
    let mut from = 0;
    let ranges = answers.into_iter().map(|(index, answer)| {
        let answer = answer.trim();
        let start = from + text[from..].find(answer).ok_or_else(|| unfound(index))?;
        from = start + answer.len();
        Ok(start..from)
    });
    ranges.collect()
}

fn unfound(message: usize) -> Error {
    Error::Template(format!(
        "message {message}: the template doesn't write what the assistant said as the message has it, so it can't be found; \
         {{% generation %}} marks in the template would say where it is"
    ))
}

/// Bytes of the longest common beginning.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Bytes of the longest common end.
fn common_suffix(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
