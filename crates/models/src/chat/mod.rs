//! Chat templates: conversations to text, as Hugging Face's `apply_chat_template` does it.
//!
//! Templates are Jinja with Python's methods on strings, lists and dictionaries, blocks trimmed, `raise_exception`, a
//! `tojson` that writes as Python does, and `strftime_now` where the caller supplies the time. Nothing is read from the
//! environment, and the clock only says when a rendering has taken too long: a template comes with a model from anywhere, so
//! its size, what it makes and how long it takes are bounded.

mod answers;
mod jinja;
mod json;
mod marks;
mod time;

use std::ops::Range;

use kiln_quant_core::hash::hex;
use minijinja::{
    Environment, ErrorKind, Value,
    syntax::SyntaxConfig,
    value::{Kwargs, Rest},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use self::time::CivilTime;
use crate::{
    Error, Result,
    jinja::{self as bounded, Budget},
};

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
    /// The bytes of `text` that a model is trained to write, ascending: what the template marks, or each answer with the
    /// end of its turn.
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
    /// Whether the template says itself what is learned.
    has_marks: bool,
    fingerprint: String,
}

impl ChatTemplate {
    /// Compiles the Jinja `source`.
    ///
    /// # Errors
    /// [`Error::Template`] with the place that doesn't compile, or with what can't be bounded: more than 256 KiB, 1000 tokens
    /// in a tag, 64 operators `+` and `~` in a tag, 500 `elif`; `*` without a whole number of at most 64 on one side;
    /// `include`, `import`, `extends`, `block`, `autoescape`; names that begin with `__kiln`.
    pub fn new(source: &str) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(error)?;
        environment.set_syntax(syntax.clone());
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        bounded::protect(&mut environment);
        jinja::complete(&mut environment);
        environment.add_filter("tojson", |value: &Value, positional: Rest<Value>, options: Kwargs| {
            bounded::within(json::to_json(value, positional, options)?)
        });
        environment.add_function("raise_exception", raise_exception);
        let fingerprint = hex(Sha256::digest(source));
        let (source, has_marks) = marks::as_variables(source);
        bounded::compile(&mut environment, NAME, &source, syntax).map_err(error)?;
        Ok(Self { environment, has_marks, fingerprint })
    }

    /// SHA-256 of the source, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
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
        self.render_with(messages, add_generation_prompt, context, ["", ""])
    }

    /// As [`render`](Self::render), with texts for the beginnings and ends of what the template marks.
    fn render_with(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        context: &TemplateContext,
        marks: [&str; 2],
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
        variables.extend(marks::VARIABLES.into_iter().map(str::to_owned).zip(marks.map(Value::from)));
        variables.push(("messages".into(), messages.iter().map(Message::to_value).collect()));
        variables.push(("add_generation_prompt".into(), add_generation_prompt.into()));
        let template = self.environment.get_template(NAME).map_err(error)?;
        let (bytes, parts) = input(messages, context);
        let budget = Budget::for_input(bytes, parts);
        budget.run(|| template.render(Value::from_pairs(variables))).map_err(error)
    }

    /// The text of `messages` and which parts of it are learned, for losses on what the assistant says.
    ///
    /// Where the template marks them with `{% generation %}`, the marked parts. Else each answer's text as the template
    /// writes it and what ends its turn: the text after the last answer, as far as it follows the others too.
    ///
    /// # Errors
    /// [`Error::Template`] as [`render`](Self::render), and for an answer that the template writes in another form than
    /// the message has it, naming the message.
    pub fn render_with_assistant_ranges(
        &self,
        messages: &[Message],
        context: &TemplateContext,
    ) -> Result<RenderedChat> {
        let text = self.render(messages, false, context)?;
        let assistant = match self.has_marks {
            true => self.marked(messages, context, &text)?,
            false => answers::find(self, messages, context, &text)?,
        };
        Ok(RenderedChat { text, assistant })
    }

    /// The parts that the template marks.
    fn marked(
        &self,
        messages: &[Message],
        context: &TemplateContext,
        text: &str,
    ) -> Result<Vec<Range<usize>>> {
        let marks = marks::unused(|mark| text.contains(mark))?;
        let marked = self.render_with(messages, false, context, marks)?;
        let (found, ranges) = marks::take_out(&marked, marks);
        match found == text {
            true => Ok(ranges),
            false => {
                let reason = "marks of what is learned ({% generation %}) change what the template writes";
                Err(Error::Template(reason.into()))
            }
        }
    }
}

/// Bytes of what a template gets, and its parts.
fn input(messages: &[Message], context: &TemplateContext) -> (usize, usize) {
    let fields = |fields: &serde_json::Map<String, serde_json::Value>| -> usize {
        fields.iter().map(|(name, value)| name.len() + value.to_string().len()).sum()
    };
    let of_messages =
        messages.iter().map(|message| message.content.len() + 64 + fields(&message.extra)).sum::<usize>();
    (of_messages + fields(&context.extra), messages.len())
}

fn error(error: minijinja::Error) -> Error {
    Error::Template(error.to_string())
}

/// What templates call to refuse a conversation.
fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
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

    /// In the manner of Qwen2.5: content and calls in one turn, the tools' answers as the user's.
    const WITH_CALLS: &str = "{% for m in messages %}\
        {% if m.role == 'assistant' and m.tool_calls %}<|im_start|>assistant{% if m.content %}\n{{ m.content }}{% endif %}\
        {% for call in m.tool_calls %}\n<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n\
        {% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n\
        {% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}\
        {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    #[test]
    fn answers_with_tool_calls_are_found_whole_and_nothing_else_is() {
        let call = || {
            let mut message = Message::new("assistant", "");
            let calls =
                serde_json::json!([{"type": "function", "function": {"name": "f", "arguments": {"x": 4}}}]);
            message.extra.insert("tool_calls".into(), calls);
            message
        };
        const CALL: &str =
            "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 4}}\n</tool_call><|im_end|>\n";
        let said = |role: &str, text: &str| Message::new(role, text);
        let cases: [(Vec<Message>, Vec<&str>); 3] = [
            (
                vec![
                    said("user", "Hello"),
                    said("assistant", "Hi!"),
                    said("user", "Weather in Rome?"),
                    call(),
                ],
                vec!["Hi!<|im_end|>\n", CALL],
            ),
            (
                vec![
                    said("user", "Which is right, 4 or 5?"),
                    call(),
                    said("tool", "2+2=4"),
                    said("assistant", "4"),
                ],
                vec![CALL, "4<|im_end|>\n"],
            ),
            (
                vec![said("user", "?"), call(), said("tool", "Sunny"), said("assistant", "Sunny")],
                vec![CALL, "Sunny<|im_end|>\n"],
            ),
        ];
        // With an empty thought in the last answer and in what asks for it; refusing what doesn't begin with the user or ends
        // in a call.
        let thought = "<think>\n</think>\n";
        let thinking = WITH_CALLS
            .replace(
                "<|im_start|>{{ m.role }}\n{{ m.content }}",
                "<|im_start|>{{ m.role }}\n\
                 {% if loop.last and m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content }}",
            )
            .replace(
                "<|im_start|>assistant\n{% endif %}",
                "<|im_start|>assistant\n<think>\n</think>\n{% endif %}",
            );
        let strict = format!(
            "{{% if messages[0].role != 'user' or messages[-1].tool_calls %}}{{{{ raise_exception('no') }}}}{{% endif %}}\
             {WITH_CALLS}"
        );
        for (source, refuses) in [(WITH_CALLS.to_owned(), false), (thinking, false), (strict, true)] {
            let template = ChatTemplate::new(&source).unwrap();
            for (messages, expected) in &cases {
                let rendered = template.render_with_assistant_ranges(messages, &TemplateContext::default());
                if refuses && messages.last().is_some_and(|message| message.content.is_empty()) {
                    assert!(rendered.is_err());
                    continue;
                }
                let rendered = rendered.unwrap();
                let found =
                    rendered.assistant.iter().map(|part| rendered.text[part.clone()].replace(thought, ""));
                assert_eq!(found.collect::<Vec<_>>(), *expected, "{source}");
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

    /// What is learned of a conversation of system, two questions and two answers.
    fn learned(source: &str, answers: [&str; 2]) -> Result<Vec<String>> {
        let messages = [
            Message::new("system", "s"),
            Message::new("user", "a question"),
            Message::new("assistant", answers[0]),
            Message::new("user", answers[0]),
            Message::new("assistant", answers[1]),
        ];
        let chat = ChatTemplate::new(source)?
            .render_with_assistant_ranges(&messages, &TemplateContext::default())?;
        Ok(chat.assistant.into_iter().map(|range| chat.text[range].to_owned()).collect())
    }

    #[test]
    fn answers_are_found_whatever_the_template_does_around_them() {
        let turns = |answer: &str| {
            format!(
                "{{% for m in messages %}}<{{{{ m.role }}}}>{{% if m.role == 'assistant' %}}{answer}{{% else %}}\
                 {{{{ m.content }}}}{{% endif %}}</>\n{{% endfor %}}"
            )
        };
        let cases = [
            ("{{ m.content }}", ["one", "two"], ["one</>\n", "two</>\n"]),
            ("{{ m.content | trim }}", [" one\n", "two "], ["one</>\n", "two</>\n"]),
            // Written otherwise in the last turn.
            ("{% if loop.last %}<t></t>{% endif %}{{ m.content }}", ["one", "two"], ["one</>\n", "two</>\n"]),
            // Earlier thoughts are taken out.
            (
                "{{ m.content if loop.last else m.content.split('</t>')[-1].lstrip() }}",
                ["<t>a</t> one", "<t>b</t> two"],
                ["one</>\n", "<t>b</t> two</>\n"],
            ),
            (
                "{% if m.content.startswith('<t>') %}{{ m.content.split('</t>')[-1] }}{% else %}{{ m.content }}{% endif %}",
                ["<t>a</t>one", "two"],
                ["one</>\n", "two</>\n"],
            ),
            // An answer that says nothing ends its turn all the same; spaces are said where they are written.
            ("{{ m.content }}", ["", "two"], ["</>\n", "two</>\n"]),
            ("{{ m.content }}", ["  ", " two "], ["  </>\n", " two </>\n"]),
        ];
        for (answer, answers, expected) in cases {
            assert_eq!(learned(&turns(answer), answers).unwrap(), expected, "{answer}");
        }
        // The last turn's end is the others' beginning.
        let inst = "{% for m in messages %}{{ ' ' + m.content + ' </s>' if m.role == 'assistant' else '<s>[' + m.content + ']' }}{% endfor %}";
        assert_eq!(learned(inst, ["one", "two"]).unwrap(), ["one </s>", "two </s>"]);
        let shouted = learned(&turns("{{ m.content | upper }}"), ["one", "two"]).unwrap_err().to_string();
        assert!(shouted.contains("message 2"), "{shouted}");
    }

    #[test]
    fn what_the_template_marks_is_learned_and_nothing_else() {
        let source = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{% if loop.last %}\
                      <t></t>{% endif %}{{ m.content }}</>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}";
        assert_eq!(learned(source, ["one", "two"]).unwrap(), ["one</>", "<t></t>two</>"]);
        // Marks of other roles are the template's own choice, as in `transformers`.
        let all = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}";
        assert_eq!(learned(all, ["one", "\u{fdd0}"]).unwrap(), ["s", "a question", "one", "one", "\u{fdd0}"]);
    }

    #[test]
    fn a_long_conversation_is_rendered_a_few_times_only() {
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}";
        let turns = ["user", "assistant"].map(|role| Message::new(role, "hello"));
        let messages: Vec<Message> = turns.iter().cycle().take(16_000).cloned().collect();
        let template = ChatTemplate::new(source).unwrap();
        let chat = template.render_with_assistant_ranges(&messages, &TemplateContext::default()).unwrap();
        assert_eq!(chat.assistant.len(), 8000);
        assert!(chat.assistant.iter().all(|range| &chat.text[range.clone()] == "hello</>"));
    }

    #[test]
    fn generation_tags_leave_the_text_alone() {
        let source = "{% for m in messages %}\n  {%- generation -%}\n{{ m.content }}\n{% endgeneration %}\n{% endfor %}";
        assert_eq!(render(source, &TemplateContext::default()).unwrap(), "hi\n");
        let indented = "a\n  {% generation %}\n  {{ messages[0].content }}\n  {% endgeneration %}\nb";
        assert_eq!(render(indented, &TemplateContext::default()).unwrap(), "a\n  hi\nb");
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

    // Expected texts are jinja2 3.1.6's in transformers' environment, but for the brackets of tuples.
    #[test]
    fn further_methods_filters_and_tests_are_pythons() {
        for (source, expected) in [
            (
                "{{ 'a b c'.partition(' ')[2] }}{{ 'a b c'.rpartition(' ')[0] }}{{ 'x'.partition('-')[0] }}",
                "b ca bx",
            ),
            (
                "{{ '7'.zfill(3) }}{{ '-7'.zfill(3) }}{{ 'aB'.swapcase() }}{{ [1, 2, 3].index(2) }}",
                "007-07Ab1",
            ),
            (
                "{{ 'hello world foo' | truncate(8) }}{{ 'hello world foo' | truncate(8, true, '') }}",
                "hello...hello wo",
            ),
            (
                "{{ 'hello world' | truncate(8) }}{{ 'x' | center(4) }}|{{ 'a b  c' | wordcount }}",
                "hello world x  |3",
            ),
            (
                "{{ none is iterable }}{{ 'a' is iterable }}{{ [] is sequence }}{{ 5 is sequence }}{{ range is callable }}",
                "FalseTrueTrueFalseTrue",
            ),
        ] {
            assert_eq!(render(source, &TemplateContext::default()).unwrap(), expected, "{source}");
        }
        for source in [
            "{{ 'a'.partition('') }}",
            "{{ 'a'.zfill(99999999) }}",
            "{{ [1].index(2) }}",
            "{{ 'a' | center(99999999) }}",
        ] {
            assert!(render(source, &TemplateContext::default()).is_err(), "{source}");
        }
    }

    #[test]
    fn templates_that_do_not_compile_or_fail_are_errors() {
        let error = ChatTemplate::new("{% for m in %}").unwrap_err().to_string();
        assert!(error.starts_with("chat template: "), "{error}");
        assert!(render("{{ messages[0].a.b.c }}", &TemplateContext::default()).is_err());
        assert!(render("{{ nothing() }}", &TemplateContext::default()).is_err());
    }
}
