//! Generated texts: what is taken of them, and when two are the same.

use regex::Regex;

use super::{Filter, FilterPipeline, MetricOptions};
use crate::{error::Problem, python};

/// A filter pipeline, compiled.
#[derive(Debug)]
pub(super) struct Pipeline {
    pub(super) name: String,
    steps: Vec<Step>,
}

#[derive(Debug)]
enum Step {
    Regex { pattern: Regex, select: i64, fallback: String },
    Strip,
    Lowercase,
    Uppercase,
}

impl Pipeline {
    /// The pipelines of a description; without any, one that passes texts on.
    pub(super) fn all(filters: &[FilterPipeline]) -> Result<Vec<Self>, Problem> {
        if filters.is_empty() {
            return Ok(vec![Self { name: "none".into(), steps: Vec::new() }]);
        }
        filters.iter().map(Self::new).collect()
    }

    fn new(pipeline: &FilterPipeline) -> Result<Self, Problem> {
        let step = |filter: &Filter| {
            Ok(Some(match filter {
                Filter::Regex { regex_pattern, group_select, fallback } => Step::Regex {
                    pattern: compile("filter_list", regex_pattern)?,
                    select: *group_select,
                    fallback: fallback.clone(),
                },
                Filter::RemoveWhitespace => Step::Strip,
                Filter::Lowercase => Step::Lowercase,
                Filter::Uppercase => Step::Uppercase,
                Filter::TakeFirst => return Ok(None),
            }))
        };
        let steps: Result<Vec<Option<Step>>, Problem> = pipeline.filter.iter().map(step).collect();
        Ok(Self { name: pipeline.name.clone(), steps: steps?.into_iter().flatten().collect() })
    }

    pub(super) fn apply(&self, text: &str) -> String {
        self.steps.iter().fold(text.to_owned(), |text, step| match step {
            Step::Regex { pattern, select, fallback } => {
                extract(pattern, *select, &text).unwrap_or_else(|| fallback.clone())
            }
            Step::Strip => python::strip(&text).into(),
            Step::Lowercase => text.to_lowercase(),
            Step::Uppercase => text.to_uppercase(),
        })
    }
}

/// One match of `pattern`, as Python's `findall` gives it: the whole, the one group, or of several groups the first
/// that isn't empty.
fn extract(pattern: &Regex, select: i64, text: &str) -> Option<String> {
    let found: Vec<_> = pattern.captures_iter(text).collect();
    let place = if select < 0 { select + found.len() as i64 } else { select };
    let captures = found.get(usize::try_from(place).ok()?)?;
    let group = |index: usize| captures.get(index).map_or("", |group| group.as_str());
    let text = match captures.len() {
        1 | 2 => group(captures.len() - 1),
        groups => (1..groups).map(group).find(|text| !text.is_empty())?,
    };
    Some(python::strip(text).into())
}

fn compile(field: &str, pattern: &str) -> Result<Regex, Problem> {
    Regex::new(pattern).map_err(|error| Problem::new(field, "a pattern of the crate regex", error))
}

/// What two texts may differ in.
#[derive(Debug)]
pub(super) struct Normalizer {
    ignored: Vec<Regex>,
    case: bool,
    punctuation: bool,
    numbers: bool,
}

impl Normalizer {
    pub(super) fn new(options: &MetricOptions) -> Result<Self, Problem> {
        let ignored = options.regexes_to_ignore.iter().map(|pattern| compile("metric_list", pattern));
        Ok(Self {
            ignored: ignored.collect::<Result<_, _>>()?,
            case: options.ignore_case,
            punctuation: options.ignore_punctuation,
            numbers: options.ignore_numbers,
        })
    }

    pub(super) fn same(&self, left: &str, right: &str) -> bool {
        self.normalize(left) == self.normalize(right)
    }

    fn normalize(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for pattern in &self.ignored {
            text = pattern.replace_all(&text, "").into_owned();
        }
        if self.case {
            text = text.to_lowercase();
        }
        text.retain(|c| {
            !(self.punctuation && c.is_ascii_punctuation() || self.numbers && c.is_ascii_digit())
        });
        // The harness compares in numpy arrays of text, which lose zero characters at the end.
        text.truncate(text.trim_end_matches('\0').len());
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Task;

    #[test]
    fn answers_are_found_as_in_gsm8k() {
        let task = Task::builtin("gsm8k").unwrap();
        let filtered = |text: &str| task.filters.iter().map(|filter| filter.apply(text)).collect::<Vec<_>>();
        // What `lm_eval.filters.extraction.RegexFilter` gives.
        assert_eq!(filtered("It is 12.\n#### 1,234.5\n"), ["1,234.5", "1,234.5"]);
        assert_eq!(filtered("so $18 in all, or 7"), ["[invalid]", "7"]);
        assert_eq!(filtered("#### -5. Then -12"), ["-5.", "-12"]);
        assert_eq!(filtered("none"), ["[invalid]", "[invalid]"]);
        assert_eq!(filtered("it is 4..."), ["[invalid]", "4..."]);
        let same = &task.metrics[0].normalizer;
        let target = "He has 5.\n#### 1,234";
        assert!(same.same("1234", target) && same.same("$1,234.", target) && !same.same("1235", target));
        assert!(!same.same("[invalid]", target));
    }

    #[test]
    fn texts_are_compared_without_what_is_ignored() {
        let options = r#"{"metric": "exact_match", "ignore_case": true, "ignore_punctuation": true,
            "ignore_numbers": true}"#;
        let normalizer = Normalizer::new(&serde_json::from_str(options).unwrap()).unwrap();
        assert!(normalizer.same("Yes, 12!", "yes "));
        assert!(!normalizer.same("Yes", "no"));
    }

    #[test]
    fn bad_patterns_are_refused() {
        let filter = Filter::Regex { regex_pattern: "(".into(), group_select: 0, fallback: String::new() };
        let pipeline = FilterPipeline { name: "a".into(), filter: vec![filter] };
        assert_eq!(Pipeline::all(&[pipeline]).unwrap_err().field, "filter_list");
    }
}
