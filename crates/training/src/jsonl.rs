//! The rows of a `.jsonl` file: text, prompt and completion, or a conversation.

use serde_json::{Map, Value};

use crate::Message;
use crate::data::{DataOptions, DropReason, Example, TokenizeText};
use crate::error::Problem;

/// The form of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    Text,
    Completion,
    Chat,
}

impl Form {
    /// The keys of the form, for messages.
    pub(crate) fn keys(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completion => "prompt and completion",
            Self::Chat => "messages",
        }
    }

    fn of_key(key: &str) -> Option<Self> {
        match key {
            "text" => Some(Self::Text),
            "prompt" | "completion" => Some(Self::Completion),
            "messages" => Some(Self::Chat),
            _ => None,
        }
    }
}

/// A row's content.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Row {
    Text(String),
    Completion { prompt: String, completion: String },
    Chat(Vec<Message>),
}

type Found<T> = Result<T, Problem>;

impl Row {
    pub(crate) fn form(&self) -> Form {
        match self {
            Self::Text(_) => Form::Text,
            Self::Completion { .. } => Form::Completion,
            Self::Chat(_) => Form::Chat,
        }
    }

    /// The row and its keys that no form has.
    pub(crate) fn parse(line: &[u8]) -> Found<(Self, Vec<String>)> {
        let mut map: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| Problem::new("row", "a JSON object", error))?;
        let mut form: Option<(&str, Form)> = None;
        let mut ignored = Vec::new();
        for key in map.keys() {
            match (Form::of_key(key), form) {
                (None, _) => ignored.push(key.clone()),
                (Some(other), Some((first, form))) if other != form => {
                    return Err(Problem::new(key, format!("no second form beside \"{first}\""), "one"));
                }
                (Some(found), _) => form = Some((key, found)),
            }
        }
        let row = match form.map(|(_, form)| form) {
            None => {
                let found = match ignored.as_slice() {
                    [] => "no keys".to_owned(),
                    keys => keys.join(", "),
                };
                return Err(Problem::new("text, prompt and completion, or messages", "one of them", found));
            }
            Some(Form::Text) => Self::Text(string(&map, "text")?),
            Some(Form::Completion) => {
                Self::Completion { prompt: string(&map, "prompt")?, completion: string(&map, "completion")? }
            }
            Some(Form::Chat) => Self::Chat(messages(map.remove("messages").unwrap_or_default())?),
        };
        Ok((row, ignored))
    }

    /// Why nothing of the row is learned, where the row itself says it.
    pub(crate) fn drop_reason(&self) -> Option<DropReason> {
        let Self::Chat(messages) = self else { return None };
        let roles: Vec<String> = messages.iter().map(|message| message.role.clone()).collect();
        (!roles.iter().any(|role| role == "assistant")).then_some(DropReason::NoAssistant { roles })
    }

    pub(crate) fn encode(&self, tokenizer: &dyn TokenizeText, options: &DataOptions) -> Found<Example> {
        let refused = |key| move |reason| Problem::new(key, "text that the tokenizer accepts", reason);
        match self {
            Self::Text(text) => {
                let ids = tokenizer.encode(text, options.add_special).map_err(refused("text"))?;
                let scored = vec![true; ids.len()];
                Ok(ended(Example { ids, scored }, options.eos))
            }
            Self::Completion { prompt, completion } => {
                // Tokenised together, as the model will see them: a tokenizer may treat the start of a text in its own
                // way, and a token may reach across.
                let both = tokenizer.completion(prompt, completion, options.add_special);
                let (ids, scored) = both.map_err(refused("prompt and completion"))?;
                Ok(ended(Example { ids, scored }, options.eos))
            }
            Self::Chat(messages) => {
                let refused =
                    |reason| Problem::new("messages", "a conversation that the template accepts", reason);
                let (ids, scored) = tokenizer.chat(messages).map_err(refused)?;
                Ok(Example { ids, scored })
            }
        }
    }
}

/// The example with `eos` at the end, which is learned.
fn ended(mut example: Example, eos: Option<u32>) -> Example {
    if let Some(eos) = eos.filter(|eos| example.ids.last() != Some(eos)) {
        example.ids.push(eos);
        example.scored.push(true);
    }
    example
}

fn string(map: &Map<String, Value>, key: &str) -> Found<String> {
    match map.get(key) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(Problem::new(key, "a string", kind(other))),
        None => Err(Problem::new(key, "a string", "nothing")),
    }
}

fn messages(value: Value) -> Found<Vec<Message>> {
    let Value::Array(items) = value else {
        return Err(Problem::new("messages", "a list of messages", kind(&value)));
    };
    if items.is_empty() {
        return Err(Problem::new("messages", "at least one message", "none"));
    }
    let message = |(index, item)| {
        serde_json::from_value(item).map_err(|error| {
            Problem::new(format!("messages[{index}]"), "an object with the strings role and content", error)
        })
    };
    items.into_iter().enumerate().map(message).collect()
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

    #[test]
    fn rows_are_told_apart_by_their_keys() {
        let (row, ignored) = Row::parse(br#"{"source": 1, "completion": "c", "prompt": ""}"#).unwrap();
        assert_eq!(row, Row::Completion { prompt: String::new(), completion: "c".into() });
        assert_eq!(ignored, ["source"]);
        assert_eq!(Row::parse(br#"{"text": "x"}"#).unwrap().0.form(), Form::Text);
    }

    #[test]
    fn an_end_that_is_there_already_is_not_doubled() {
        let row = Row::Text("ab".into());
        let mut options = DataOptions::new(8, 300);
        options.eos = Some(u32::from(b'b'));
        assert_eq!(row.encode(&Bytes, &options).unwrap().ids, [256, 97, 98]);
        options.eos = Some(7);
        assert_eq!(row.encode(&Bytes, &options).unwrap().ids, [256, 97, 98, 7]);
    }

    proptest! {
        #[test]
        fn any_object_is_a_row_or_names_a_field(
            keys in prop::collection::vec("text|prompt|completion|messages|x", 0..4),
            values in prop::collection::vec("\"a\"|1|null|\\[\\]|\\[\\{\\}\\]|\\{\"role\": 1\\}", 4),
        ) {
            let fields: Vec<_> = keys.iter().zip(&values).map(|(k, v)| format!("\"{k}\": {v}")).collect();
            let text = format!("{{{}}}", fields.join(", "));
            if let Ok((row, _)) = Row::parse(text.as_bytes()) {
                prop_assert!(row.encode(&Bytes, &DataOptions::new(8, 300)).is_ok());
                prop_assert!(!keys.is_empty());
            }
        }
    }
}
