//! The forms of rows, told apart by their keys.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Conversation, DataOptions, DropReason, Example, Learned, TokenizeText};
use crate::Message;
use crate::error::Problem;

/// The form of a data set's rows.
///
/// | form | keys | learned |
/// | --- | --- | --- |
/// | `Text` | `text` | everything |
/// | `Completion` | `prompt`, `completion` | the completion |
/// | `Chat` | `messages` (role, content), or `conversations` (from, value; ShareGPT); `system`, `tools`, `chat_template_kwargs` | what the assistant says |
/// | `Instruction` | `instruction`, `output`; `input`, `system` (Alpaca) | the output |
/// | `Pair` | `chosen`, `rejected`; `prompt` | for [`PreferenceLoss`](crate::PreferenceLoss) |
/// | `Label` | `prompt`, `completion`, `label` (true or false) | for [`PreferenceLoss::Kto`](crate::PreferenceLoss::Kto) |
/// | `Class` | a text or two, and `label`: a class from 0, a name of [`DataOptions::classes`](crate::DataOptions), or a number | the label, by a [`Classifier`](kiln_models::Classifier) |
///
/// The texts of `Class` are GLUE's: `text` and `text_pair`, `sentence1` and `sentence2`, `question1` and `question2`, `premise` and
/// `hypothesis`, `question` and `sentence`, or `sentence`. Two are joined by a line break; of what is too long the end is cut.
///
/// Prompts, completions and sides are texts or lists of messages. Every form may have `weight`, a number from 0 that the
/// row's losses are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Form {
    /// One text.
    Text,
    /// A prompt and its completion.
    Completion,
    /// A conversation.
    Chat,
    /// An instruction and its answer.
    Instruction,
    /// A better and a worse answer.
    Pair,
    /// An answer that is good or bad.
    Label,
    /// A text and its class, or a number.
    Class,
}

/// All forms that are read.
const FORMS: [Form; 7] =
    [Form::Class, Form::Label, Form::Pair, Form::Instruction, Form::Chat, Form::Completion, Form::Text];
/// Keys of a text that has a class, and of a second one.
const TEXTS: [(&str, &str); 6] = [
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("sentence", ""),
];
/// What else every form may have.
const WEIGHT: &str = "weight";

impl Form {
    /// The keys of the form, for messages.
    pub(super) fn keys(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completion => "prompt and completion",
            Self::Chat => "messages or conversations",
            Self::Instruction => "instruction and output",
            Self::Pair => "chosen and rejected",
            Self::Label => "prompt, completion and label",
            Self::Class => "text and label",
        }
    }

    /// Keys of which a row of this form has one of each list.
    fn required(self) -> &'static [&'static [&'static str]] {
        match self {
            Self::Text => &[&["text"]],
            Self::Completion => &[&["prompt"], &["completion"]],
            Self::Chat => &[&["messages", "conversations"]],
            Self::Instruction => &[&["instruction"], &["output"]],
            Self::Pair => &[&["chosen"], &["rejected"]],
            Self::Label => &[&["prompt"], &["completion"], &["label"]],
            Self::Class => &[&["text"], &["label"]],
        }
    }

    /// Keys that it may have besides.
    fn optional(self) -> &'static [&'static str] {
        match self {
            Self::Text => &[],
            Self::Completion | Self::Label => &["tools", "chat_template_kwargs"],
            Self::Chat => &["system", "tools", "chat_template_kwargs"],
            Self::Instruction => &["input", "system"],
            Self::Pair => &["prompt", "tools", "chat_template_kwargs"],
            Self::Class => &["text_pair"],
        }
    }

    /// Whether a row of this form has the key. The texts of a class are told by the row.
    fn has(self, key: &str, row: &Map<String, Value>) -> bool {
        if self == Self::Class {
            let (first, second) = texts_of_class(row).unwrap_or(TEXTS[0]);
            return [first, second, "label"].contains(&key);
        }
        self.required().iter().any(|keys| keys.contains(&key)) || self.optional().contains(&key)
    }

    fn fits(self, row: &Map<String, Value>) -> bool {
        if self == Self::Class {
            return row.contains_key("label") && texts_of_class(row).is_some();
        }
        self.required().iter().all(|keys| keys.iter().any(|key| row.contains_key(*key)))
    }

    /// The form of a row.
    pub(super) fn of(row: &Map<String, Value>) -> Found<Self> {
        let mut fitting: Vec<Self> = FORMS.into_iter().filter(|form| form.fits(row)).collect();
        // What other forms pass over may well be a label beside a question.
        if fitting.iter().any(|form| ![Self::Class, Self::Text].contains(form)) {
            fitting.retain(|form| *form != Self::Class);
        }
        // `Label` has what `Completion` needs, and so on: of those the one that leaves no key of another over.
        let uses = |form: &Self| row.keys().filter(|key| form.has(key, row)).count();
        let Some(form) = fitting.iter().copied().max_by_key(uses) else {
            let found = match row.len() {
                0 => "no keys".to_owned(),
                _ => row.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
            };
            let forms: Vec<&str> = FORMS.iter().rev().map(|form| form.keys()).collect();
            return Err(Problem::new("keys", format!("one of: {}", forms.join("; ")), found));
        };
        let rival = fitting.into_iter().find(|other| {
            other
                .required()
                .iter()
                .flat_map(|keys| keys.iter())
                .any(|key| row.contains_key(*key) && !form.has(key, row))
        });
        match rival {
            Some(rival) => {
                let expected = format!("one form, {}", form.keys());
                Err(Problem::new("keys", expected, format!("those of {} too", rival.keys())))
            }
            None => Ok(form),
        }
    }
}

/// A text, or messages.
#[derive(Debug, Clone, PartialEq)]
enum Said {
    Text(String),
    Messages(Vec<Message>),
}

impl Said {
    fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Messages(messages) => messages.iter().all(|message| {
                message.role != "assistant"
                    || message.content.is_empty() && !message.extra.contains_key("tool_calls")
            }),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Content {
    Text(String),
    Chat(Vec<Message>),
    Instruction { system: Option<String>, instruction: String, input: String, output: String },
    Completion { prompt: Said, completion: Said },
    Pair { prompt: Said, chosen: Said, rejected: Said },
    Class { text: String, value: f32 },
}

/// A row's content.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Row {
    content: Content,
    /// What the template gets besides messages.
    variables: Map<String, Value>,
    weight: f32,
    label: Option<bool>,
}

type Found<T> = Result<T, Problem>;

impl Row {
    /// The row and its keys that its form doesn't have.
    /// `classes` are the names of classes.
    pub(super) fn parse(
        mut row: Map<String, Value>,
        form: Form,
        classes: &[String],
    ) -> Found<(Self, Vec<String>)> {
        let ignored = row.keys().filter(|key| !form.has(key, &row) && *key != WEIGHT).cloned().collect();
        let weight = weight(row.get(WEIGHT))?;
        let variables = match form {
            Form::Text | Form::Instruction | Form::Class => Map::new(),
            _ => variables(&mut row)?,
        };
        let row = &mut row;
        let label = match form {
            Form::Label => Some(truth(row.get("label"))?),
            _ => None,
        };
        let content = match form {
            Form::Text => Content::Text(string(row, "text")?),
            Form::Chat => Content::Chat(conversation(row)?),
            Form::Class => {
                let value = value_of(row.get("label"), classes)?;
                Content::Class { text: text_of_class(row)?, value }
            }
            Form::Instruction => {
                let input = optional_string(row, "input")?.unwrap_or_default();
                let (instruction, output) = (string(row, "instruction")?, string(row, "output")?);
                let system = optional_string(row, "system")?.filter(|system| !system.is_empty());
                Content::Instruction { system, instruction, input, output }
            }
            Form::Completion | Form::Label => {
                let (prompt, completion) = (said(row, "prompt")?, said(row, "completion")?);
                same_kind("completion", &prompt, &completion)?;
                Content::Completion { prompt, completion }
            }
            Form::Pair => {
                let (chosen, rejected) = (said(row, "chosen")?, said(row, "rejected")?);
                same_kind("rejected", &chosen, &rejected)?;
                match row.contains_key("prompt") {
                    true => {
                        let prompt = said(row, "prompt")?;
                        same_kind("chosen", &prompt, &chosen)?;
                        Content::Pair { prompt, chosen, rejected }
                    }
                    false => without_prompt(chosen, rejected),
                }
            }
        };
        Ok((Self { content, variables, weight, label }, ignored))
    }

    /// Why nothing of the row is learned, where the row itself says it.
    pub(super) fn drop_reason(&self) -> Option<DropReason> {
        if self.weight == 0.0 {
            return Some(DropReason::NoWeight);
        }
        match &self.content {
            Content::Chat(messages) => no_assistant(messages),
            Content::Completion { completion: Said::Messages(messages), .. } => no_assistant(messages),
            Content::Pair { chosen, .. } if chosen.is_empty() => {
                Some(DropReason::EmptySide { side: "chosen" })
            }
            Content::Pair { rejected, .. } if rejected.is_empty() => {
                Some(DropReason::EmptySide { side: "rejected" })
            }
            Content::Pair { chosen, rejected, .. } if chosen == rejected => Some(DropReason::EqualSides),
            _ => None,
        }
    }

    /// One example, or, of a pair, two: chosen and rejected.
    pub(super) fn encode(&self, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Found<Vec<Example>> {
        let mut examples = match &self.content {
            Content::Text(text) => {
                let ids = tokenizer.encode(text, options.add_special).map_err(refused("text"))?;
                vec![ended(Example::all_scored(ids), options.eos)]
            }
            Content::Class { text, value } => {
                let ids = tokenizer.encode(text, options.add_special).map_err(refused("text"))?;
                vec![Example::valued(ids, *value)]
            }
            Content::Chat(messages) => vec![self.chat(messages.clone(), 0, tokenizer, options)?],
            Content::Instruction { system, instruction, input, output } => {
                vec![self.instruction([instruction, input, output], system.as_deref(), tokenizer, options)?]
            }
            Content::Completion { prompt, completion } => {
                vec![self.completion("prompt and completion", prompt, completion, tokenizer, options)?]
            }
            Content::Pair { prompt, chosen, rejected } => vec![
                self.completion("prompt and chosen", prompt, chosen, tokenizer, options)?,
                self.completion("prompt and rejected", prompt, rejected, tokenizer, options)?,
            ],
        };
        for example in &mut examples {
            (example.weight, example.label) = (self.weight, self.label);
        }
        Ok(examples)
    }

    fn completion(
        &self,
        keys: &'static str,
        prompt: &Said,
        completion: &Said,
        tokenizer: &dyn TokenizeText,
        options: &DataOptions,
    ) -> Found<Example> {
        match (prompt, completion) {
            (Said::Messages(prompt), Said::Messages(completion)) => {
                self.chat([&prompt[..], completion].concat(), prompt.len(), tokenizer, options)
            }
            (Said::Text(prompt), Said::Text(completion)) => {
                // Tokenised together, as the model will see them: a tokenizer may treat the start of a text in its own
                // way, and a token may reach across.
                let both = tokenizer.completion(prompt, completion, options.add_special);
                let (ids, scored) = both.map_err(refused(keys))?;
                // An end that the prompt has already isn't the answer's.
                let eos = options.eos.filter(|eos| !completion.is_empty() || ids.last() != Some(eos));
                Ok(ended(Example::new(ids, scored), eos))
            }
            _ => Err(Problem::new(keys, "texts, or lists of messages", "one of each")),
        }
    }

    /// The messages from `first` on are learned, where they are the assistant's.
    fn chat(
        &self,
        messages: Vec<Message>,
        first: usize,
        tokenizer: &dyn TokenizeText,
        options: &DataOptions,
    ) -> Found<Example> {
        let last = messages.iter().rposition(|message| message.role == "assistant");
        let is_learned = |index: usize, message: &Message| {
            let wanted = match options.learned {
                Learned::AllAnswers => true,
                Learned::LastAnswer => last == Some(index),
            };
            index >= first
                && wanted
                && message.extra.get(WEIGHT).is_none_or(|weight| weight.as_f64() != Some(0.0))
        };
        let learned =
            messages.iter().enumerate().map(|(index, message)| is_learned(index, message)).collect();
        let conversation = Conversation { messages, variables: self.variables.clone(), learned };
        let refused = |reason| Problem::new("messages", "a conversation that the template accepts", reason);
        let (ids, scored) = tokenizer.chat(&conversation).map_err(refused)?;
        Ok(Example::new(ids, scored))
    }

    /// A conversation of two turns where there is a template, else Alpaca's own text.
    fn instruction(
        &self,
        [instruction, input, output]: [&String; 3],
        system: Option<&str>,
        tokenizer: &dyn TokenizeText,
        options: &DataOptions,
    ) -> Found<Example> {
        if tokenizer.has_chat() {
            let request = match input.is_empty() {
                true => instruction.clone(),
                false => format!("{instruction}\n{input}"),
            };
            let turns = [Message::new("user", request), Message::new("assistant", output)];
            let messages = system.map(|system| Message::new("system", system)).into_iter().chain(turns);
            return self.chat(messages.collect(), 0, tokenizer, options);
        }
        let prompt = alpaca_prompt(instruction, input, system);
        let both = tokenizer.completion(&prompt, output, options.add_special);
        let (ids, scored) = both.map_err(refused("instruction and output"))?;
        Ok(ended(Example::new(ids, scored), options.eos))
    }
}

/// The text around instruction and input of Stanford Alpaca, and a line break, so that the answer's first token is its own.
fn alpaca_prompt(instruction: &str, input: &str, system: Option<&str>) -> String {
    let (task, with) = match input.is_empty() {
        true => ("Below is an instruction that describes a task. ", String::new()),
        false => (
            "Below is an instruction that describes a task, paired with an input that provides further context. ",
            format!("### Input:\n{input}\n\n"),
        ),
    };
    let task = match system {
        Some(system) => system.to_owned(),
        None => format!("{task}Write a response that appropriately completes the request."),
    };
    format!("{task}\n\n### Instruction:\n{instruction}\n\n{with}### Response:\n")
}

fn refused(key: &'static str) -> impl FnOnce(String) -> Problem {
    move |reason| Problem::new(key, "text that the tokenizer accepts", reason)
}

/// The example with `eos` at the end, which is learned.
fn ended(mut example: Example, eos: Option<u32>) -> Example {
    let Some(eos) = eos else { return example };
    if example.ids.last() != Some(&eos) {
        example.ids.push(eos);
        example.scored.push(true);
    } else if let Some(last) = example.scored.last_mut() {
        // The tokenizer put it there, which knows nothing of what is learned.
        *last = true;
    }
    example
}

fn no_assistant(messages: &[Message]) -> Option<DropReason> {
    let roles: Vec<String> = messages.iter().map(|message| message.role.clone()).collect();
    (!roles.iter().any(|role| role == "assistant")).then_some(DropReason::NoAssistant { roles })
}

/// The prompt of a pair whose sides begin with it: the messages that both have, or the text up to the first difference, less
/// a space before it, as TRL finds it.
fn without_prompt(chosen: Said, rejected: Said) -> Content {
    match (chosen, rejected) {
        (Said::Messages(mut chosen), Said::Messages(mut rejected)) => {
            let shared = chosen.iter().zip(&rejected).take_while(|(a, b)| a == b).count();
            // Of equal sides the last message is the answer.
            let shared = shared.min(chosen.len().saturating_sub(1)).min(rejected.len().saturating_sub(1));
            let (right, wrong) = (chosen.split_off(shared), rejected.split_off(shared));
            Content::Pair {
                prompt: Said::Messages(chosen),
                chosen: Said::Messages(right),
                rejected: Said::Messages(wrong),
            }
        }
        (Said::Text(chosen), Said::Text(rejected)) => {
            let same = |(a, b): &(char, char)| a == b;
            let mut shared: usize =
                chosen.chars().zip(rejected.chars()).take_while(same).map(|(a, _)| a.len_utf8()).sum();
            if chosen[..shared].ends_with(' ') {
                shared -= 1;
            }
            let (prompt, right) = chosen.split_at(shared);
            let (prompt, right, wrong) = (prompt.to_owned(), right.to_owned(), rejected[shared..].to_owned());
            Content::Pair {
                prompt: Said::Text(prompt),
                chosen: Said::Text(right),
                rejected: Said::Text(wrong),
            }
        }
        (chosen, rejected) => Content::Pair { prompt: Said::Text(String::new()), chosen, rejected },
    }
}

fn same_kind(key: &str, first: &Said, second: &Said) -> Found<()> {
    let name = |said: &Said| match said {
        Said::Text(_) => "a string",
        Said::Messages(_) => "a list of messages",
    };
    match name(first) == name(second) {
        true => Ok(()),
        false => Err(Problem::new(key, format!("{}, as beside it", name(first)), name(second))),
    }
}

fn said(row: &mut Map<String, Value>, key: &str) -> Found<Said> {
    match row.remove(key) {
        Some(Value::String(text)) => Ok(Said::Text(text)),
        Some(value @ Value::Array(_)) => Ok(Said::Messages(messages(key, value)?)),
        Some(other) => Err(Problem::new(key, "a string or a list of messages", kind(&other))),
        None => Err(Problem::new(key, "a string or a list of messages", "nothing")),
    }
}

fn string(row: &mut Map<String, Value>, key: &str) -> Found<String> {
    optional_string(row, key)?.ok_or_else(|| Problem::new(key, "a string", "nothing"))
}

fn optional_string(row: &mut Map<String, Value>, key: &str) -> Found<Option<String>> {
    match row.remove(key) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(Problem::new(key, "a string", kind(&other))),
        None => Ok(None),
    }
}

fn weight(value: Option<&Value>) -> Found<f32> {
    let Some(value) = value else { return Ok(1.0) };
    match value.as_f64() {
        Some(weight) if (0.0..=f64::from(f32::MAX)).contains(&weight) => Ok(weight as f32),
        _ => Err(Problem::new(WEIGHT, "a number, at least 0", value)),
    }
}

/// The keys of the text, or the two, that a row has; the second one of `text` may be missing.
fn texts_of_class(row: &Map<String, Value>) -> Option<(&'static str, &'static str)> {
    let has_second =
        |first: &str, second: &str| first == "text" || second.is_empty() || row.contains_key(second);
    TEXTS.into_iter().find(|(first, second)| row.contains_key(*first) && has_second(first, second))
}

/// One text, or two joined.
fn text_of_class(row: &mut Map<String, Value>) -> Found<String> {
    let (first, second) = texts_of_class(row).unwrap_or(TEXTS[0]);
    let text = string(row, first)?;
    Ok(match optional_string(row, second)? {
        Some(other) => format!("{text}\n{other}"),
        None => text,
    })
}

/// A class, or a number.
fn value_of(value: Option<&Value>, classes: &[String]) -> Found<f32> {
    let expected = || match classes {
        [] => {
            "a number, or a name of `classes`, of which there are none; to read the text alone, name the form"
                .to_owned()
        }
        _ => format!("a number, or one of {}", classes.join(", ")),
    };
    let wrong = |found: &Value| Problem::new("label", expected(), found);
    match value {
        Some(Value::Bool(label)) => Ok(f32::from(u8::from(*label))),
        Some(Value::Number(number)) => {
            let number = number.as_f64().map(|number| number as f32).filter(|number| number.is_finite());
            number.ok_or_else(|| Problem::new("label", expected(), "a number beyond f32's"))
        }
        Some(Value::String(name)) => {
            let place = classes.iter().position(|class| class == name);
            place.map(|place| place as f32).ok_or_else(|| wrong(&Value::String(name.clone())))
        }
        Some(other) => Err(wrong(other)),
        None => Err(Problem::new("label", expected(), "nothing")),
    }
}

fn truth(value: Option<&Value>) -> Found<bool> {
    match value {
        Some(Value::Bool(label)) => Ok(*label),
        Some(Value::Number(number)) if number.as_u64().is_some_and(|label| label < 2) => {
            Ok(number.as_u64() == Some(1))
        }
        Some(other) => Err(Problem::new("label", "true or false, or 1 or 0", other)),
        None => Err(Problem::new("label", "true or false", "nothing")),
    }
}

/// What the template gets besides messages: `tools`, as a list or as a text that holds one, and `chat_template_kwargs`.
fn variables(row: &mut Map<String, Value>) -> Found<Map<String, Value>> {
    let mut variables = match row.remove("chat_template_kwargs") {
        Some(Value::Object(variables)) => variables,
        Some(Value::Null) | None => Map::new(),
        Some(other) => return Err(Problem::new("chat_template_kwargs", "an object", kind(&other))),
    };
    let tools = match row.remove("tools") {
        Some(Value::String(text)) if text.trim().is_empty() => None,
        Some(Value::String(text)) => Some(
            serde_json::from_str(&text)
                .map_err(|error| Problem::new("tools", "a list of tools, or its JSON", error))?,
        ),
        Some(Value::Null) | None => None,
        Some(tools) => Some(tools),
    };
    match tools {
        Some(tools @ Value::Array(_)) => {
            variables.insert("tools".into(), tools);
        }
        Some(other) => return Err(Problem::new("tools", "a list of tools", kind(&other))),
        None => {}
    }
    Ok(variables)
}

fn conversation(row: &mut Map<String, Value>) -> Found<Vec<Message>> {
    let mut found = match row.remove("messages") {
        Some(list) => messages("messages", list)?,
        None => messages("conversations", row.remove("conversations").unwrap_or_default())?,
    };
    match optional_string(row, "system")?.filter(|system| !system.is_empty()) {
        Some(_) if found.first().is_some_and(|message| message.role == "system") => {
            Err(Problem::new("system", "no second one beside the first message's", "one"))
        }
        Some(system) => {
            found.insert(0, Message::new("system", system));
            Ok(found)
        }
        None => Ok(found),
    }
}

fn messages(key: &str, value: Value) -> Found<Vec<Message>> {
    let Value::Array(items) = value else {
        return Err(Problem::new(key, "a list of messages", kind(&value)));
    };
    if items.is_empty() {
        return Err(Problem::new(key, "at least one message", "none"));
    }
    items.into_iter().enumerate().map(|(index, item)| message(&format!("{key}[{index}]"), item)).collect()
}

/// A message of OpenAI's form (`role`, `content`) or of ShareGPT's (`from`, `value`).
fn message(place: &str, item: Value) -> Found<Message> {
    let Value::Object(mut fields) = item else {
        return Err(Problem::new(place, "an object with role and content, or from and value", kind(&item)));
    };
    // Files of tables have a column for every field that any message has.
    fields.retain(|key, value| !value.is_null() || key == "content" || key == "value");
    if let Some(from) = fields.remove("from") {
        let Value::String(from) = from else {
            return Err(Problem::new(format!("{place}.from"), "a string", kind(&from)));
        };
        let value = text(&format!("{place}.value"), fields.remove("value"), false)?;
        return share_gpt(place, &from, value, fields);
    }
    let role = match fields.remove("role") {
        Some(Value::String(role)) => role,
        other => {
            let found = other.as_ref().map_or("nothing", kind);
            return Err(Problem::new(format!("{place}.role"), "a string", found));
        }
    };
    let calls = fields.get("tool_calls").and_then(Value::as_array).is_some_and(|calls| !calls.is_empty());
    let content = text(&format!("{place}.content"), fields.remove("content"), calls)?;
    Ok(Message { role, content, extra: fields })
}

/// Content: a text, parts of type text, or, beside tool calls, nothing.
fn text(place: &str, content: Option<Value>, may_be_null: bool) -> Found<String> {
    match content {
        Some(Value::String(text)) => Ok(text),
        Some(Value::Null) | None if may_be_null => Ok(String::new()),
        Some(Value::Array(parts)) => {
            let part = |(index, part): (usize, &Value)| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text.to_owned()),
                (Some("text"), None) => {
                    Err(Problem::new(format!("{place}[{index}].text"), "a string", "none"))
                }
                (Some(other), _) => {
                    Err(Problem::new(format!("{place}[{index}]"), "a part of type text", other))
                }
                (None, _) => Err(Problem::new(format!("{place}[{index}]"), "a part with a type", kind(part))),
            };
            parts.iter().enumerate().map(part).collect()
        }
        Some(other) => Err(Problem::new(place, "a string, or a list of parts", kind(&other))),
        None => Err(Problem::new(place, "a string, or a list of parts", "nothing")),
    }
}

/// A message of ShareGPT's form; a `function_call` holds the JSON of a name and its arguments.
fn share_gpt(place: &str, from: &str, value: String, mut extra: Map<String, Value>) -> Found<Message> {
    let role = match from {
        "human" | "user" => "user",
        "gpt" | "assistant" | "bot" | "chatgpt" | "bing" | "bard" | "model" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        "function_call" => {
            let call: Value = serde_json::from_str(&value)
                .map_err(|error| Problem::new(format!("{place}.value"), "the JSON of a call", error))?;
            let calls = match call {
                Value::Array(calls) => calls,
                call => vec![call],
            };
            let wrapped =
                calls.into_iter().map(|call| serde_json::json!({"type": "function", "function": call}));
            extra.insert("tool_calls".into(), wrapped.collect());
            return Ok(Message { role: "assistant".into(), content: String::new(), extra });
        }
        other => {
            let expected = "human, gpt, system, function_call, observation, or another name of theirs";
            return Err(Problem::new(format!("{place}.from"), expected, other));
        }
    };
    Ok(Message { role: role.into(), content: value, extra })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::tests::Bytes;

    fn parse(text: &str) -> Found<(Row, Vec<String>)> {
        let row: Map<String, Value> = serde_json::from_str(text).unwrap();
        let form = Form::of(&row)?;
        Row::parse(row, form, &[])
    }

    fn messages_of(text: &str) -> Vec<Message> {
        match parse(text).unwrap().0.content {
            Content::Chat(messages) => messages,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn rows_are_told_apart_by_their_keys() {
        let (row, ignored) = parse(r#"{"source": 1, "completion": "c", "prompt": ""}"#).unwrap();
        let (prompt, completion) = (Said::Text(String::new()), Said::Text("c".into()));
        assert_eq!(row.content, Content::Completion { prompt, completion });
        assert_eq!(ignored, ["source"]);
        let form = |text: &str| Form::of(&serde_json::from_str(text).unwrap()).unwrap();
        assert_eq!(form(r#"{"text": "x"}"#), Form::Text);
        assert_eq!(form(r#"{"prompt": "x", "completion": "y", "label": true}"#), Form::Label);
        assert_eq!(form(r#"{"prompt": "x", "chosen": "y", "rejected": "z"}"#), Form::Pair);
        assert_eq!(form(r#"{"chosen": [], "rejected": []}"#), Form::Pair);
        assert_eq!(form(r#"{"instruction": "x", "input": "", "output": "z"}"#), Form::Instruction);
        assert_eq!(form(r#"{"conversations": []}"#), Form::Chat);
        for two in [
            r#"{"text": "x", "messages": []}"#,
            r#"{"prompt": "x", "completion": "y", "messages": []}"#,
            r#"{"prompt": "x", "completion": "y", "chosen": "", "rejected": ""}"#,
        ] {
            assert!(Form::of(&serde_json::from_str(two).unwrap()).is_err(), "{two}");
        }
    }

    #[test]
    fn share_gpt_is_a_conversation() {
        let found = messages_of(
            r#"{"system": "s", "conversations": [{"from": "human", "value": "a"},
                {"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {\"x\": 1}}"},
                {"from": "observation", "value": "o"}, {"from": "gpt", "value": "b"}]}"#,
        );
        let roles: Vec<&str> = found.iter().map(|message| message.role.as_str()).collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool", "assistant"]);
        assert_eq!(found[2].extra["tool_calls"][0]["function"]["arguments"]["x"], 1);
        assert_eq!(found[4].content, "b");
        let unknown = parse(r#"{"conversations": [{"from": "narrator", "value": "a"}]}"#).unwrap_err();
        assert!(unknown.in_line("f".as_ref(), 1).to_string().contains("conversations[0].from"));
    }

    #[test]
    fn content_may_be_parts_or_beside_calls_nothing() {
        let found = messages_of(
            r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}], "name": null}]}"#,
        );
        assert_eq!((found[0].content.as_str(), found[1].content.as_str()), ("ab", ""));
        assert!(found[1].extra.contains_key("tool_calls") && !found[1].extra.contains_key("name"));
        for (content, field) in [
            ("null", "messages[0].content"),
            (r#"[{"type": "image_url"}]"#, "messages[0].content[0]"),
            (r#"[{"type": "text"}]"#, "messages[0].content[0].text"),
            ("3", "messages[0].content"),
        ] {
            let text = format!(r#"{{"messages": [{{"role": "user", "content": {content}}}]}}"#);
            let error = parse(&text).unwrap_err().in_line("f".as_ref(), 1).to_string();
            assert!(error.contains(field), "{error}");
        }
    }

    #[test]
    fn tools_reach_the_template() {
        for tools in [r#"[{"name": "f"}]"#, r#""[{\"name\": \"f\"}]""#] {
            let text = format!(
                r#"{{"tools": {tools}, "messages": [{{"role": "assistant", "content": "a"}}],
                    "chat_template_kwargs": {{"enable_thinking": false}}}}"#
            );
            let row = parse(&text).unwrap().0;
            assert_eq!(row.variables["tools"][0]["name"], "f");
            assert_eq!(row.variables["enable_thinking"], false);
        }
        assert!(parse(r#"{"tools": 3, "messages": [{"role": "user", "content": "a"}]}"#).is_err());
    }

    #[test]
    fn a_pair_without_a_prompt_begins_with_it() {
        let pair = |text: &str| match parse(text).unwrap().0.content {
            Content::Pair { prompt, chosen, rejected } => [prompt, chosen, rejected],
            other => panic!("{other:?}"),
        };
        let text = |text: &str| Said::Text(text.into());
        let found = pair(r#"{"chosen": "Say é, b", "rejected": "Say é, c"}"#);
        assert_eq!(found, [text("Say é,"), text(" b"), text(" c")]);
        let found = pair(
            r#"{"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}"#,
        );
        let lengths = found.map(|said| match said {
            Said::Messages(messages) => messages.len(),
            Said::Text(_) => 0,
        });
        assert_eq!(lengths, [1, 1, 1]);
    }

    #[test]
    fn pairs_that_teach_nothing_say_why() {
        let reason = |text: &str| parse(text).unwrap().0.drop_reason();
        let same = reason(r#"{"prompt": "p", "chosen": "a", "rejected": "a"}"#);
        assert_eq!(same, Some(DropReason::EqualSides));
        let empty = reason(r#"{"prompt": "p", "chosen": "a", "rejected": ""}"#);
        assert_eq!(empty, Some(DropReason::EmptySide { side: "rejected" }));
        assert_eq!(reason(r#"{"text": "p", "weight": 0}"#), Some(DropReason::NoWeight));
        assert_eq!(reason(r#"{"prompt": "p", "chosen": "a", "rejected": "b"}"#), None);
    }

    #[test]
    fn texts_with_classes_have_the_keys_of_glue() {
        let read = |text: &str, classes: &[&str]| -> Found<(String, f32, Vec<String>)> {
            let row: Map<String, Value> = serde_json::from_str(text).unwrap();
            let form = Form::of(&row)?;
            let classes: Vec<String> = classes.iter().map(|class| (*class).into()).collect();
            let (row, ignored) = Row::parse(row, form, &classes)?;
            match row.content {
                Content::Class { text, value } => Ok((text, value, ignored)),
                other => panic!("{other:?}"),
            }
        };
        // `idx` stands for what is passed over.
        for (row, text, value) in [
            (r#"{"sentence": "a", "label": 1, "idx": 5}"#, "a", 1.0),
            (r#"{"sentence1": "a", "sentence2": "b", "label": 3.25}"#, "a\nb", 3.25),
            (r#"{"question1": "a", "question2": "b", "label": 0}"#, "a\nb", 0.0),
            (r#"{"premise": "a", "hypothesis": "b", "label": 2}"#, "a\nb", 2.0),
            (r#"{"question": "a", "sentence": "b", "label": 0}"#, "a\nb", 0.0),
            (r#"{"text": "a", "text_pair": "b", "label": true}"#, "a\nb", 1.0),
            (r#"{"text": "a", "label": "good"}"#, "a", 1.0),
            (r#"{"text": "a", "sentence2": "idx", "label": "good"}"#, "a", 1.0),
            (r#"{"question": "idx", "sentence": "a", "sentence2": "b", "label": 0}"#, "idx\na", 0.0),
        ] {
            let (found, number, ignored) = read(row, &["bad", "good"]).unwrap();
            assert_eq!((found.as_str(), number), (text, value), "{row}");
            assert_eq!(ignored.is_empty(), !row.contains("idx"));
        }
        for (row, what) in [
            (r#"{"text": "a", "label": "fine"}"#, "one of bad, good"),
            (r#"{"text": "a", "label": null}"#, "label"),
            (r#"{"text": "a", "label": [1]}"#, "label"),
            (r#"{"text": "a", "label": 1e300}"#, "beyond"),
            (r#"{"text": 3, "label": 1}"#, "text"),
        ] {
            let error = read(row, &["bad", "good"]).unwrap_err().in_line("f".as_ref(), 1).to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(read(r#"{"text": "a", "label": "good"}"#, &[]).is_err());
        // Half of a pair is none; a label beside another form is passed over.
        let form = |row: &str| Form::of(&serde_json::from_str(row).unwrap());
        assert!(form(r#"{"premise": "a", "label": 1}"#).is_err());
        assert!(form(r#"{"question": "a", "passage": "b", "label": 1}"#).is_err());
        let kto = r#"{"prompt": "a", "completion": "b", "label": true, "sentence": "c"}"#;
        assert_eq!(form(kto).unwrap(), Form::Label);
        let chat = r#"{"messages": [], "label": 1, "sentence": "c"}"#;
        assert_eq!(form(chat).unwrap(), Form::Chat);
    }

    #[test]
    fn labels_and_weights_out_of_range_are_named() {
        for (field, text) in [
            ("label", r#"{"prompt": "p", "completion": "a", "label": 2}"#),
            ("label", r#"{"prompt": "p", "completion": "a", "label": "yes"}"#),
            ("weight", r#"{"text": "p", "weight": -1}"#),
            ("weight", r#"{"text": "p", "weight": "1"}"#),
            ("rejected", r#"{"chosen": "p", "rejected": [{"role": "user", "content": "a"}]}"#),
        ] {
            let error = parse(text).unwrap_err().in_line("f".as_ref(), 1).to_string();
            assert!(error.contains(&format!("line 1: {field}")), "{error}");
        }
    }

    #[test]
    fn an_instruction_is_a_conversation_or_alpacas_text() {
        struct Plain;
        impl TokenizeText for Plain {
            fn encode(&self, text: &str, _: bool) -> Result<Vec<u32>, String> {
                Ok(text.bytes().map(u32::from).collect())
            }
            fn chat(&self, _: &Conversation) -> Result<(Vec<u32>, Vec<bool>), String> {
                Err("no template".into())
            }
            fn has_chat(&self) -> bool {
                false
            }
        }
        let row = parse(r#"{"instruction": "Add.", "input": "1 2", "output": "3"}"#).unwrap().0;
        let options = DataOptions::new(1000, 300);
        let chat = row.encode(&Bytes, &options).unwrap().remove(0);
        assert_eq!(chat.ids, [&[257][..], &b"Add.\n1 2".map(u32::from), &[258, 257, 51, 258]].concat());
        let text = row.encode(&Plain, &options).unwrap().remove(0);
        let bytes: Vec<u8> = text.ids.iter().map(|id| *id as u8).collect();
        let expected = "Below is an instruction that describes a task, paired with an input that provides further \
                        context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\
                        \n\n### Input:\n1 2\n\n### Response:\n3";
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
        assert_eq!(text.scored.iter().filter(|scored| **scored).count(), 1);
    }

    #[test]
    fn an_end_that_is_there_already_is_not_doubled() {
        let row = parse(r#"{"text": "ab"}"#).unwrap().0;
        let mut options = DataOptions::new(8, 300);
        options.eos = Some(u32::from(b'b'));
        assert_eq!(row.encode(&Bytes, &options).unwrap()[0].ids, [256, 97, 98]);
        options.eos = Some(7);
        assert_eq!(row.encode(&Bytes, &options).unwrap()[0].ids, [256, 97, 98, 7]);
    }

    proptest! {
        #[test]
        fn any_object_is_a_row_or_names_a_field(
            keys in prop::collection::vec(
                "text|prompt|completion|messages|conversations|chosen|rejected|label|instruction|output|system|tools|weight|x",
                0..5,
            ),
            values in prop::collection::vec(
                "\"a\"|1|null|true|\\[\\]|\\[\\{\\}\\]|\\{\"role\": 1\\}|\\[\\{\"role\":\"assistant\",\"content\":\"a\"\\}\\]", 5,
            ),
        ) {
            let fields: Vec<_> = keys.iter().zip(&values).map(|(k, v)| format!("\"{k}\": {v}")).collect();
            let text = format!("{{{}}}", fields.join(", "));
            if let Ok((row, _)) = parse(&text) {
                prop_assert!(row.encode(&Bytes, &DataOptions::new(8, 300)).is_ok());
                prop_assert!(!keys.is_empty());
            }
        }
    }
}
