//! Chat templates: conversations to text, as Hugging Face's `apply_chat_template` does it.
//!
//! Templates are Jinja with Python's methods on strings, lists and dictionaries, blocks trimmed, `raise_exception`, a
//! `tojson` that writes as Python does, and `strftime_now` where the caller supplies the time. Nothing is read from
//! the clock or the environment.

mod json;
mod time;

use std::ops::Range;

use minijinja::{Environment, ErrorKind, Value, syntax::SyntaxConfig};
use serde::{Deserialize, Serialize};

pub use self::time::CivilTime;
use crate::{Error, Result};

/// The name under which the template is compiled.
const NAME: &str = "chat_template";

/// Steps that rendering may take, so that a template from outside can't hang: some hundred times what a conversation of
/// a thousand turns needs.
const FUEL: u64 = 10_000_000;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What was said.
    pub content: String,
    /// Further fields that the template may look at (`tool_calls`, `name`).
    #[serde(flatten)]
    pub extra: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// A turn without further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: serde_json::Map::new() }
    }

    fn to_value(&self) -> Value {
        let fields = [("role", &self.role), ("content", &self.content)];
        let fields = fields.into_iter().map(|(key, text)| (key.to_owned(), Value::from(text)));
        Value::from_pairs(
            fields.chain(self.extra.iter().map(|(key, value)| (key.clone(), json::to_value(value)))),
        )
    }
}

/// What a template sees besides the messages.
///
/// | field | default | meaning |
/// | --- | --- | --- |
/// | `bos_token` | none | text of the begin-of-sequence token, `bos_token` in the template |
/// | `eos_token` | none | text of the end-of-sequence token, `eos_token` in the template |
/// | `now` | none | the time that `strftime_now` formats; without it the function is undefined, and templates that ask for it fall back to a fixed date |
/// | `extra` | empty | further variables, e.g. `tools`, `enable_thinking` |
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TemplateContext {
    /// Text of the begin-of-sequence token.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token.
    pub eos_token: Option<String>,
    /// The time that `strftime_now` formats.
    pub now: Option<CivilTime>,
    /// Further variables.
    pub extra: serde_json::Map<String, serde_json::Value>,
}

/// A conversation as text, with the parts that the assistant said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RenderedChat {
    /// The whole text.
    pub text: String,
    /// For each assistant message, the bytes of `text` from after its generation prompt to the end of its turn: what a
    /// model is trained to write.
    pub assistant: Vec<Range<usize>>,
}

/// A compiled chat template.
///
/// ```
/// use kiln_models::chat::{ChatTemplate, Message, TemplateContext};
/// let template = ChatTemplate::new(
///     "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}\
///      {% if add_generation_prompt %}<assistant>{% endif %}",
/// )?;
/// let question = [Message::new("user", "2+2?")];
/// assert_eq!(template.render(&question, true, &TemplateContext::default())?, "<user>2+2?\n<assistant>");
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles the Jinja `source`.
    ///
    /// # Errors
    /// [`Error::Template`] with the place that doesn't compile.
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(error)?;
        environment.set_syntax(syntax);
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_template_owned(NAME, without_generation_tags(source)).map_err(error)?;
        Ok(Self { environment })
    }

    /// The text of `messages`; with `add_generation_prompt`, also what opens the assistant's next turn.
    ///
    /// # Errors
    /// [`Error::Template`] if the template refuses the conversation or fails on it.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        context: &TemplateContext,
    ) -> Result<String> {
        // Defined in `transformers` whether or not there are any.
        let mut variables =
            vec![("tools".to_owned(), Value::from(())), ("documents".to_owned(), Value::from(()))];
        variables.extend(context.extra.iter().map(|(name, value)| (name.clone(), json::to_value(value))));
        let texts = [("bos_token", &context.bos_token), ("eos_token", &context.eos_token)];
        variables
            .extend(texts.into_iter().filter_map(|(name, text)| Some((name.into(), text.as_ref()?.into()))));
        if let Some(now) = context.now {
            let format = move |pattern: &str| now.format(pattern);
            variables.push(("strftime_now".into(), Value::from_function(format)));
        }
        variables.push(("messages".into(), messages.iter().map(Message::to_value).collect()));
        variables.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        let template = self.environment.get_template(NAME).map_err(error)?;
        template.render(Value::from_pairs(variables)).map_err(error)
    }

    /// The text of `messages` and which parts of it the assistant said, for completion-only losses.
    ///
    /// A turn's part is what the text up to and including it has beyond the text before it with the generation prompt.
    /// So the template must write a conversation's beginning as the beginning of its text.
    ///
    /// # Errors
    /// [`Error::Template`] as [`render`](Self::render), and if the template writes earlier turns otherwise once later
    /// ones follow, or opens an assistant's turn otherwise than its generation prompt does.
    pub fn render_with_assistant_ranges(
        &self,
        messages: &[Message],
        context: &TemplateContext,
    ) -> Result<RenderedChat> {
        let text = self.render(messages, false, context)?;
        let mut assistant = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.role != "assistant" {
                continue;
            }
            let before = self.render(&messages[..index], true, context)?;
            let after = self.render(&messages[..=index], false, context)?;
            if !after.starts_with(&before) {
                return Err(Error::Template(format!(
                    "message {index}: the assistant's turn doesn't begin with the generation prompt, so what it said can't \
                     be told apart"
                )));
            }
            if !text.starts_with(&after) {
                return Err(Error::Template(format!(
                    "message {index}: later messages change the text up to here, so what the assistant said can't be told \
                     apart"
                )));
            }
            assistant.push(before.len()..after.len());
        }
        Ok(RenderedChat { text, assistant })
    }
}

fn error(error: minijinja::Error) -> Error {
    Error::Template(error.to_string())
}

/// What templates call to refuse a conversation.
fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `source` with `transformers`' marks around what the assistant says, `{% generation %}` and `{% endgeneration %}`,
/// made an `if` that always holds: they write nothing themselves.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        result.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let (inside, after) = (&tag[2..end], &tag[end + 2..]);
        let word = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let statement = match word {
            "generation" => "if true",
            "endgeneration" => "endif",
            word => word,
        };
        result.push_str("{%");
        result.push_str(&inside.replacen(word, statement, usize::from(word != statement)));
        result.push_str("%}");
        rest = after;
    }
    result.push_str(rest);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> serde_json::Value {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/chat/templates.json");
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn a_template_that_would_not_end_is_an_error() {
        let nested = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(nested).unwrap();
        let message = template.render(&[], false, &TemplateContext::default()).unwrap_err().to_string();
        assert!(message.contains("fuel"), "{message}");
    }

    #[test]
    fn a_thousand_turns_render() {
        let source = "{% for m in messages %}{{ m.role ~ ': ' ~ (m.content | trim) }}\n{% endfor %}";
        let turn = Message::new("user", " hello ");
        let template = ChatTemplate::new(source).unwrap();
        let text = template.render(&vec![turn; 1000], false, &TemplateContext::default()).unwrap();
        assert_eq!(text.lines().count(), 1000);
    }

    #[test]
    fn all_cases_of_the_fixture_render_as_transformers_does() {
        let fixture = fixture();
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let context = TemplateContext {
            bos_token: text(&fixture["bos_token"]),
            eos_token: text(&fixture["eos_token"]),
            ..Default::default()
        };
        let cases = fixture["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 24);
        for case in cases {
            let source = &fixture["templates"][case["template"].as_u64().unwrap() as usize];
            let template = ChatTemplate::new(source.as_str().unwrap()).unwrap();
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let rendered =
                template.render(&messages, case["add_generation_prompt"].as_bool().unwrap(), &context);
            match case["rendered"].as_str() {
                Some(expected) => assert_eq!(rendered.unwrap(), expected),
                None => {
                    let message = rendered.unwrap_err().to_string();
                    assert!(message.contains("roles must alternate"), "{message}");
                }
            }
        }
    }

    fn render(source: &str, context: &TemplateContext) -> Result<String> {
        ChatTemplate::new(source)?.render(&[Message::new("user", "hi")], false, context)
    }

    #[test]
    fn assistant_ranges_cover_what_the_assistant_says_and_its_end() {
        let fixture = fixture();
        let template = ChatTemplate::new(fixture["templates"][0].as_str().unwrap()).unwrap();
        let messages = ["user", "assistant", "user", "assistant"]
            .map(|role| Message::new(role, format!("I am the {role}")));
        let chat = template.render_with_assistant_ranges(&messages, &TemplateContext::default()).unwrap();
        assert_eq!(chat.assistant.len(), 2);
        for range in chat.assistant {
            assert_eq!(&chat.text[range.clone()], "I am the assistant<|im_end|>\n");
            assert!(chat.text[..range.start].ends_with("<|im_start|>assistant\n"));
        }
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_gives_no_ranges() {
        let context = TemplateContext::default();
        let messages = [Message::new("user", "a"), Message::new("assistant", "b"), Message::new("user", "c")];
        let counting = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}";
        let template = ChatTemplate::new(counting).unwrap();
        let error = template.render_with_assistant_ranges(&messages, &context).unwrap_err().to_string();
        assert!(error.contains("message 1"), "{error}");
        let rewriting = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}";
        let template = ChatTemplate::new(rewriting).unwrap();
        assert!(template.render_with_assistant_ranges(&messages, &context).is_err());
    }

    #[test]
    fn generation_tags_leave_the_text_alone() {
        let source = "{% for m in messages %}\n  {%- generation -%}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}";
        assert_eq!(render(source, &TemplateContext::default()).unwrap(), "hi\n");
        assert_eq!(without_generation_tags("{%generation%}{% if a %}{%"), "{%if true%}{% if a %}{%");
    }

    #[test]
    fn the_time_is_the_callers_or_undefined() {
        let source =
            "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}26 Jul 2024{% endif %}";
        let mut context = TemplateContext::default();
        assert_eq!(render(source, &context).unwrap(), "26 Jul 2024");
        context.now = Some(CivilTime::from_unix(0));
        assert_eq!(render(source, &context).unwrap(), "01 Jan 1970");
        let error = render("{{ strftime_now('%Q') }}", &context).unwrap_err().to_string();
        assert!(error.contains("%Q"), "{error}");
    }

    #[test]
    fn python_methods_and_further_fields_work() {
        let mut message = Message::new("assistant", "<think>x</think>\n answer ");
        message.extra.insert("tool_calls".into(), serde_json::json!([{"name": "f", "arguments": {"a": 1}}]));
        let source = "{{ messages[0].content.split('</think>')[-1].lstrip('\\n') }}|\
                      {% for call in messages[0].tool_calls %}{{ call.arguments | tojson }}{% endfor %}|\
                      {{ messages[0].get('missing', 'none') }}|{{ tools is none }}";
        let text = ChatTemplate::new(source).unwrap().render(&[message], false, &TemplateContext::default());
        assert_eq!(text.unwrap(), " answer |{\"a\": 1}|none|True");
    }

    #[test]
    fn templates_that_do_not_compile_or_fail_are_errors() {
        let error = ChatTemplate::new("{% for m in %}").unwrap_err().to_string();
        assert!(error.starts_with("chat template: "), "{error}");
        assert!(render("{{ messages[0].a.b.c }}", &TemplateContext::default()).is_err());
        assert!(render("{{ nothing() }}", &TemplateContext::default()).is_err());
    }
}
