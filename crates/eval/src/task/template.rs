//! Jinja over a document's fields, as the harness evaluates it.

use std::collections::HashSet;

use kiln_models::jinja::{self as bounded, Budget};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::ValueKind};
use serde_json::Value as Json;

use crate::{error::Problem, python, wikitext};

/// A document: a row of a data set.
pub type Document = serde_json::Map<String, Json>;

/// What a template gives.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Rendered {
    Text(String),
    /// A whole number that isn't text, or text of digits where the task has choices.
    Number(i64),
    List(Vec<Rendered>),
}

impl Rendered {
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Text(text) => format!("{text:?}"),
            Self::Number(number) => number.to_string(),
            Self::List(items) => format!("a list of {}", items.len()),
        }
    }

    pub(crate) fn into_text(self) -> Result<String, Self> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Number(number) => Ok(number.to_string()),
            list => Err(list),
        }
    }
}

/// Steps that a rendering may take.
const FUEL: u64 = 1_000_000;

/// Jinja2's defaults, but for the newline that ends a template.
fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder().keep_trailing_newline(true).build().unwrap_or_default()
}

/// What a rendering of a document may take.
fn budget(document: &Document) -> Budget {
    let bytes = document.iter().map(|(name, value)| name.len() + value.to_string().len()).sum();
    Budget::for_input(bytes, document.len())
}

/// A task's templates, compiled.
#[derive(Debug)]
pub(crate) struct Templates(Environment<'static>);

/// One of them.
#[derive(Debug, Clone)]
pub(crate) enum Template {
    /// A field by its name.
    Field(String),
    /// An expression, whose value needn't be text.
    Expression(String),
    /// Anything else, by its name in the environment.
    Source(String),
}

impl Templates {
    pub(crate) fn new() -> Self {
        let mut environment = Environment::new();
        environment.set_syntax(syntax());
        environment.set_fuel(Some(FUEL));
        bounded::protect(&mut environment);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_debug(false);
        environment.set_recursion_limit(100);
        environment.set_unknown_method_callback(methods);
        environment.add_filter("regex_replace", regex_replace);
        environment.add_filter("wikihow_clean", |text: &str| wikihow_clean(text));
        environment.add_filter("wikitext_detokenize", |text: &str| wikitext::detokenize(text));
        Self(environment)
    }

    /// Compiles `source`, which the description has under `field`.
    pub(crate) fn compile(&mut self, field: &str, source: &str) -> Result<Template, Problem> {
        let refused = |error: minijinja::Error| Problem::new(field, "a Jinja template", reason(&error));
        let is_name = |text: &str| {
            text.starts_with(|c: char| c.is_alphabetic() || c == '_')
                && text.chars().all(|c| c.is_alphanumeric() || c == '_')
        };
        if is_name(source) {
            return Ok(Template::Field(source.into()));
        }
        if let Some(inside) = source.strip_prefix("{{").and_then(|rest| rest.strip_suffix("}}"))
            && !inside.contains("{{")
            && !inside.contains("}}")
            && !inside.contains("{%")
        {
            bounded::check_expression(inside, syntax()).map_err(refused)?;
            self.0.compile_expression_owned(inside.to_owned()).map_err(refused)?;
            return Ok(Template::Expression(inside.into()));
        }
        bounded::compile(&mut self.0, field, source, syntax()).map_err(refused)?;
        Ok(Template::Source(field.into()))
    }

    /// The value of `template`, which the description has under `field`; where `digits`, text of digits is a number.
    pub(crate) fn evaluate(
        &self,
        field: &str,
        template: &Template,
        document: &Document,
        digits: bool,
    ) -> Result<Rendered, Problem> {
        let rendered = match template {
            Template::Field(name) => {
                let value = document.get(name).ok_or_else(|| missing(name))?;
                // A field's own digits stay text.
                return rendered(field, to_value(value));
            }
            Template::Expression(source) => {
                let expression = self.0.compile_expression(source);
                let expression = expression.map_err(|error| refusal(field, &error))?;
                let value = budget(document).run(|| bounded::stored(expression.eval(fields(document))?));
                let value = value.map_err(|error| refusal(field, &error));
                value.and_then(|value| rendered(field, value)).map_err(|problem| {
                    name_missing(problem, document, expression.undeclared_variables(false))
                })?
            }
            Template::Source(name) => {
                let compiled = self.0.get_template(name).map_err(|error| refusal(field, &error))?;
                let text = budget(document).run(|| compiled.render(fields(document))).map_err(|error| {
                    let names = compiled.undeclared_variables(false);
                    name_missing(refusal(field, &error), document, names)
                })?;
                Rendered::Text(text)
            }
        };
        Ok(match rendered {
            Rendered::Text(text)
                if digits && !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) =>
            {
                text.parse().map_or(Rendered::Text(text), Rendered::Number)
            }
            other => other,
        })
    }
}

fn rendered(field: &str, value: Value) -> Result<Rendered, Problem> {
    match value.kind() {
        ValueKind::Bool => Ok(Rendered::Number(i64::from(value.is_true()))),
        ValueKind::Number => match i64::try_from(value.clone()) {
            Ok(number) if value.is_integer() => Ok(Rendered::Number(number)),
            _ => Ok(Rendered::Text(value.to_string())),
        },
        ValueKind::Seq | ValueKind::Iterable => {
            let items = value.try_iter();
            let items = items.map_err(|error| Problem::new(field, "a list", reason(&error)))?;
            items.map(|item| rendered(field, item)).collect::<Result<_, _>>().map(Rendered::List)
        }
        ValueKind::String => Ok(Rendered::Text(value.as_str().unwrap_or_default().into())),
        kind => Err(Problem::new(field, "text, a number or a list", kind)),
    }
}

fn fields(document: &Document) -> Value {
    Value::from_pairs(document.iter().map(|(name, value)| (name.clone(), to_value(value))))
}

fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => (*value).into(),
        Json::Number(number) => match number.as_i64() {
            Some(whole) => whole.into(),
            None => number.as_u64().map_or_else(|| number.as_f64().into(), Value::from),
        },
        Json::String(text) => text.into(),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(object) => fields(object),
    }
}

fn missing(name: &str) -> Problem {
    Problem::new(name, "the field", "none")
}

fn refusal(field: &str, error: &minijinja::Error) -> Problem {
    Problem::new(field, "a document that the template accepts", reason(error))
}

/// A template fails on a document that lacks one of its fields for many reasons; the field is what is to be named.
fn name_missing(problem: Problem, document: &Document, names: HashSet<String>) -> Problem {
    let absent = names.into_iter().filter(|name| !document.contains_key(name)).min();
    absent.map_or(problem, |name| missing(&name))
}

fn reason(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

/// Python's methods, as far as their results may be.
fn methods(
    state: &mut minijinja::State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    bounded::measured(method, value, args)?;
    bounded::within(python_method(state, value, method, args)?)
}

/// Those in which minijinja-contrib's differ from Python's or that it lacks, then its own.
fn python_method(
    state: &mut minijinja::State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let none = args.is_empty();
    match (value.as_str(), method) {
        (Some(text), "strip") if none => Ok(python::strip(text).into()),
        (Some(text), "lstrip") if none => Ok(text.trim_start_matches(python::is_space).into()),
        (Some(text), "rstrip") if none => Ok(text.trim_end_matches(python::is_space).into()),
        (Some(text), "capitalize") if none => Ok(python::capitalize(text).into()),
        (Some(text), "index") => {
            let (part,): (&str,) = minijinja::value::from_args(args)?;
            let found = text.find(part).map(|place| text[..place].chars().count());
            found.map(Value::from).ok_or_else(|| not_found(&args[0]))
        }
        (None, "index") if value.kind() == ValueKind::Seq => {
            let (item,): (Value,) = minijinja::value::from_args(args)?;
            let place = value.try_iter()?.position(|other| other == item);
            place.map(Value::from).ok_or_else(|| not_found(&item))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn not_found(item: &Value) -> minijinja::Error {
    minijinja::Error::new(ErrorKind::InvalidOperation, format!("{item:?} is not in it"))
}

/// The harness's filter: all matches of a pattern (of the crate `regex`), `$1` in the replacement is a group.
fn regex_replace(text: &str, pattern: &str, replacement: &str) -> Result<String, minijinja::Error> {
    let pattern = regex::RegexBuilder::new(pattern)
        .size_limit(1 << 20)
        .build()
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    // A group may come again as often as the replacement names it.
    let (matches, groups) = (pattern.find_iter(text).count(), replacement.matches('$').count());
    bounded::check_size(text.len() * (1 + groups) + matches * replacement.len())?;
    Ok(pattern.replace_all(text, replacement).into_owned())
}

/// HellaSwag's texts without the marks of the pages that they come from.
fn wikihow_clean(text: &str) -> String {
    let text = python::strip(text).replace(" [title]", ". ");
    let mut result = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some((before, inside)) = rest.split_once('[') {
        result.push_str(before);
        // A bracket closes on its own line.
        match inside.find([']', '\n']) {
            Some(end) if inside[end..].starts_with(']') => rest = &inside[end + 1..],
            _ => {
                result.push('[');
                rest = inside;
            }
        }
    }
    result.push_str(rest);
    result.replace("  ", " ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(value: serde_json::Value) -> Document {
        value.as_object().unwrap().clone()
    }

    fn evaluate(source: &str, value: serde_json::Value) -> Result<Rendered, Problem> {
        let mut templates = Templates::new();
        let template = templates.compile("doc_to_text", source).unwrap();
        templates.evaluate("doc_to_text", &template, &document(value), true)
    }

    #[test]
    fn templates_that_ask_for_too_much_are_errors_in_time() {
        for source in [
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
            "{{ ('x' * 64) | indent(10000000000) }}",
            "{{ 'a\nb' | indent(10000000000) }}",
            "{{ [1, 2] | batch(10000000000, 0) }}",
            "{{ q.replace('', q) | replace('a', q) | replace('a', q) | replace('a', q) }}",
            "{{ q | regex_replace('a', '$0$0$0$0$0$0$0$0') | regex_replace('a', q) }}",
            "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
            "{{ '%10000000000d' | format(1) }}",
        ] {
            let start = std::time::Instant::now();
            let mut templates = Templates::new();
            let template = templates.compile("doc_to_text", source).unwrap();
            let question = document(json!({"q": "a".repeat(2000)}));
            let result = templates.evaluate("doc_to_text", &template, &question, false);
            assert!(result.is_err(), "{source}");
            assert!(start.elapsed() < std::time::Duration::from_secs(4), "{source}: {:?}", start.elapsed());
        }
        for source in
            ["{{ 'x' * 10000000000 }}", &format!("{{{{ {}1 }}}}", "not ".repeat(20_000)), "{% include 'x' %}"]
        {
            assert!(Templates::new().compile("doc_to_text", source).is_err(), "{source}");
        }
    }

    fn text(source: &str, value: serde_json::Value) -> String {
        evaluate(source, value).unwrap().into_text().unwrap()
    }

    #[test]
    fn titles_and_capitals_are_pythons() {
        let expected = crate::golden::vector("python capitalize");
        for (from, to) in expected.as_object().unwrap() {
            assert_eq!(text("{{ x.capitalize() }}", json!({ "x": from })), to.as_str().unwrap());
        }
    }

    #[test]
    fn fields_keep_their_type_and_expressions_become_numbers() {
        assert_eq!(evaluate("label", json!({"label": 2})).unwrap(), Rendered::Number(2));
        assert_eq!(evaluate("label", json!({"label": true})).unwrap(), Rendered::Number(1));
        assert_eq!(evaluate("label", json!({"label": "2"})).unwrap(), Rendered::Text("2".into()));
        assert_eq!(evaluate("{{label}}", json!({"label": "2"})).unwrap(), Rendered::Number(2));
        assert_eq!(evaluate("{{ l.index('b') }}", json!({"l": ["a", "b"]})).unwrap(), Rendered::Number(1));
        assert_eq!(
            evaluate("{{[a, b]}}", json!({"a": "x'\"", "b": 3})).unwrap(),
            Rendered::List(vec![Rendered::Text("x'\"".into()), Rendered::Number(3)])
        );
        assert_eq!(text("{{text.split(' ')[:-1]|join(' ')}}", json!({"text": "a  b c"})), "a  b");
        assert_eq!(text("a {{x}}\n", json!({"x": "{{y}} <&>"})), "a {{y}} <&>\n");
        assert_eq!(text("", json!({})), "");
        assert_eq!(text("x{{ a }}{{ b }}", json!({"a": null, "b": true})), "xNoneTrue");
    }

    #[test]
    fn missing_fields_are_named() {
        let problem = evaluate("Q: {{ question }}", json!({"text": "a"})).unwrap_err();
        assert_eq!((problem.field.as_str(), problem.found.as_str()), ("question", "none"));
        assert_eq!(evaluate("{{ question }}", json!({})).unwrap_err().field, "question");
        assert_eq!(evaluate("question", json!({})).unwrap_err().field, "question");
        let problem = evaluate("{{ c.text }}", json!({"c": {}})).unwrap_err();
        assert_eq!(problem.field, "doc_to_text");
        let problem = evaluate("{{ l.index('b') }}", json!({"l": ["a"]})).unwrap_err();
        assert!(problem.found.contains("is not in it"), "{problem:?}");
    }

    #[test]
    fn bad_templates_are_refused() {
        for source in ["{{ x", "{% if x %}", "{{ x + }}", "a {{ x | nofilter }}"] {
            let compiled = Templates::new().compile("doc_to_text", source);
            assert!(compiled.is_err() || evaluate(source, json!({"x": "a"})).is_err(), "{source}");
        }
    }

    #[test]
    fn brackets_are_deleted_as_by_the_harness() {
        for (from, to) in [
            ("a [b] c", "a c"),
            (" a [title] b", "a.  b".replace("  ", " ").as_str()),
            ("a [b\n] c]", "a [b\n] c]"),
            ("a [b [c] d]", "a  d]".replace("  ", " ").as_str()),
            ("a   b", "a  b"),
            ("a [", "a ["),
        ] {
            assert_eq!(wikihow_clean(from), to, "{from:?}");
        }
    }

    #[test]
    fn patterns_are_replaced() {
        assert_eq!(text("{{ x | regex_replace('[0-9]+', '#') }}", json!({"x": "a1b22"})), "a#b#");
        assert!(evaluate("{{ x | regex_replace('(', '#') }}", json!({"x": "a"})).is_err());
    }
}
