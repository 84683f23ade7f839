//! JSON in and out of templates: values from JSON, and Python's `json.dumps` as the filter `tojson`.

use std::fmt::Write;

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, Rest, ValueKind},
};

/// A template's value for a JSON value; objects keep their order.
pub(super) fn to_value(json: &serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(value), _) => Value::from(value),
            (_, Some(value)) => Value::from(value),
            _ => Value::from(number.as_f64()),
        },
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(values) => values.iter().map(to_value).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(key, value)| (key.clone(), to_value(value))))
        }
    }
}

/// The filter `tojson` as `transformers` defines it: `json.dumps` of its arguments `ensure_ascii=False`, `indent=None`,
/// `separators=None`, `sort_keys=False`, which may also stand without their names.
pub(super) fn to_json(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if positional.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let [ensure_ascii, indent, separators, sort_keys] = {
        let mut found = [const { None }; 4];
        for (index, name) in NAMES.into_iter().enumerate() {
            let named: Option<Value> = options.get(name)?;
            found[index] = named.or_else(|| positional.get(index).cloned()).filter(|value| !value.is_none());
        }
        found
    };
    options.assert_all_used()?;
    let indent = indent.map(indentation).transpose()?;
    let separators = match separators {
        Some(pair) => separators_of(&pair)?,
        None => [if indent.is_some() { "," } else { ", " }, ": "].map(str::to_owned),
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let mut writer = Writer {
        text: String::new(),
        indent,
        separators,
        ensure_ascii: is_true(ensure_ascii),
        sort_keys: is_true(sort_keys),
    };
    writer.value(value, 0)?;
    Ok(Value::from(writer.text))
}

/// How deep values may be nested.
const MAX_DEPTH: usize = 128;
/// The widest indentation, in bytes.
const MAX_INDENT: usize = 16;

/// What a level is indented by: so many spaces, or a text.
fn indentation(value: Value) -> Result<String, Error> {
    if let Some(text) = value.as_str().filter(|text| text.len() <= MAX_INDENT) {
        return Ok(text.to_owned());
    }
    match usize::try_from(value.clone()) {
        Ok(spaces) if spaces <= MAX_INDENT => Ok(" ".repeat(spaces)),
        _ => {
            let expected = format!("tojson: expected an indent of at most {MAX_INDENT}, found {value}");
            Err(failure(expected))
        }
    }
}

/// What stands between items, and behind a key.
fn separators_of(pair: &Value) -> Result<[String; 2], Error> {
    let texts: Vec<Value> = pair.try_iter()?.collect();
    match texts.as_slice() {
        [item, key] if item.as_str().is_some() && key.as_str().is_some() => {
            Ok([item.to_string(), key.to_string()])
        }
        _ => Err(failure(format!("tojson: expected two texts as separators, found {pair}"))),
    }
}

struct Writer {
    text: String,
    /// What a level is indented by; without it all is on one line.
    indent: Option<String>,
    /// Between items, and behind a key.
    separators: [String; 2],
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(failure(format!("tojson: values are nested more than {MAX_DEPTH} deep")));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.text.push_str(&value.to_string()),
            ValueKind::Number => self.text.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.list(['[', ']'], &items, depth, |writer, item| writer.value(item, depth + 1))?;
            }
            ValueKind::Map => self.map(value, depth)?,
            kind => return Err(failure(format!("tojson: {kind} can't be written as JSON"))),
        }
        Ok(())
    }

    fn map(&mut self, map: &Value, depth: usize) -> Result<(), Error> {
        let mut fields = Vec::new();
        for key in map.try_iter()? {
            let name = match key.kind() {
                ValueKind::String | ValueKind::Number => key.to_string(),
                kind => return Err(failure(format!("tojson: {kind} can't be a key in JSON"))),
            };
            fields.push((name, map.get_item(&key)?));
        }
        if self.sort_keys {
            fields.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.list(['{', '}'], &fields, depth, |writer, (name, value)| {
            writer.string(name);
            let [_, separator] = &writer.separators;
            writer.text.push_str(separator);
            writer.value(value, depth + 1)
        })
    }

    /// Items between `brackets`: after `", "`, or each on its line.
    fn list<T>(
        &mut self,
        brackets: [char; 2],
        items: &[T],
        depth: usize,
        mut write: impl FnMut(&mut Self, &T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.text.push(brackets[0]);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                let [separator, _] = &self.separators;
                self.text.push_str(separator);
            }
            self.new_line(depth + 1);
            write(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.text.push(brackets[1]);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            self.text.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for c in text.chars() {
            match c {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => self.escape(c),
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }

    fn escape(&mut self, c: char) {
        for unit in c.encode_utf16(&mut [0; 2]) {
            // Writing to a string doesn't fail.
            let _ = write!(self.text, "\\u{unit:04x}");
        }
    }
}

/// A float as Python's `repr` writes it: as Rust's debug form, but `1e+16` for `1e16` and `1e-05` for `1e-5`.
fn float(value: f64) -> String {
    if !value.is_finite() {
        let text = if value.is_nan() { "NaN" } else { "Infinity" };
        return format!("{}{text}", if value < 0.0 { "-" } else { "" });
    }
    let text = format!("{value:?}");
    match text.split_once('e') {
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
        None => text,
    }
}

fn failure(message: String) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::Environment;

    fn dumps(json: &str, options: &str) -> String {
        let mut environment = Environment::new();
        environment.add_filter("tojson", to_json);
        let value = to_value(&serde_json::from_str(json).unwrap());
        environment
            .render_str(&format!("{{{{ x | tojson{options} }}}}"), Value::from_pairs([("x", value)]))
            .unwrap()
    }

    // Expected texts are what CPython 3.11's `json.dumps(.., ensure_ascii=False)` prints.
    #[test]
    fn tojson_writes_as_python_does() {
        let json = r#"{"b":[1,-2,2.5,1e20,0.00001,1e16,0.0001,3.0],"a":{"é\n\"\\\u0001\u007f<&>'":null},"c":[],"d":{},"t":true}"#;
        let expected = "{\"b\": [1, -2, 2.5, 1e+20, 1e-05, 1e+16, 0.0001, 3.0], \
                        \"a\": {\"é\\n\\\"\\\\\\u0001\u{7f}<&>'\": null}, \"c\": [], \"d\": {}, \"t\": true}";
        assert_eq!(dumps(json, ""), expected);
        assert_eq!(
            dumps(r#"{"b":"🦀é","a":1}"#, "(ensure_ascii=true, sort_keys=true)"),
            r#"{"a": 1, "b": "\ud83e\udd80\u00e9"}"#
        );
        assert_eq!(
            dumps(r#"{"a":[1,{"b":[]}]}"#, "(indent=2)"),
            "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ]\n}"
        );
        assert_eq!(dumps(r#"{"a":[1,2]}"#, "(separators=(',', ':'))"), r#"{"a":[1,2]}"#);
        assert_eq!(
            dumps(r#"{"a":[1,2]}"#, "(indent='-', separators=[';', '='])"),
            "{\n-\"a\"=[\n--1;\n--2\n-]\n}"
        );
        assert_eq!(dumps(r#"{"é":1}"#, "(true, none)"), r#"{"\u00e9": 1}"#);
    }
}
