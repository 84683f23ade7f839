//! From documents to requests.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{
    Choices, Document, OneOrMany, OutputType, Task, TaskData,
    fewshot::Examples,
    template::{Rendered, Template},
};
use crate::{Error, Result, error::Problem, wikitext::count_words};

/// What a model is asked about one document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Requests {
    /// Log-likelihoods of continuations: one context with all continuations, or all contexts with one.
    Pairs {
        /// The contexts.
        contexts: Vec<String>,
        /// The continuations.
        continuations: Vec<String>,
    },
    /// The log-likelihood of a whole text.
    Rolling {
        /// The text.
        text: String,
    },
    /// A greedy continuation.
    Generate {
        /// The context.
        context: String,
        /// Texts that end it.
        until: Vec<String>,
        /// Tokens at most.
        max_gen_toks: usize,
    },
}

impl Requests {
    /// The pairs of context and continuation; none for the other kinds.
    pub fn pairs(&self) -> Vec<(&str, &str)> {
        let Self::Pairs { contexts, continuations } = self else { return Vec::new() };
        let count = contexts.len().max(continuations.len());
        let of = |texts: &'_ [String], index: usize| -> usize { if texts.len() == 1 { 0 } else { index } };
        (0..count)
            .map(|index| {
                let (context, continuation) = (of(contexts, index), of(continuations, index));
                (contexts[context].as_str(), continuations[continuation].as_str())
            })
            .collect()
    }

    /// All texts, for comparing two runs.
    pub(crate) fn texts(&self) -> Vec<&str> {
        match self {
            Self::Pairs { .. } => {
                self.pairs().into_iter().flat_map(|(context, continuation)| [context, continuation]).collect()
            }
            Self::Rolling { text } => vec![text],
            Self::Generate { context, .. } => vec![context],
        }
    }
}

/// What the answers are compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum Gold {
    /// Numbers of the right choices; nearly always one.
    Choices(Vec<usize>),
    /// Right answers.
    Texts(Vec<String>),
    /// What a likelihood is divided by.
    Size {
        /// Words.
        words: usize,
        /// UTF-8 bytes.
        bytes: usize,
    },
    /// Nothing: the request says it all.
    Nothing,
}

/// A document's requests, and what is needed to score the answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedDocument {
    /// Its place in the split.
    pub index: usize,
    /// Its id, if the task has one.
    pub id: Option<String>,
    /// What a model is asked.
    pub requests: Requests,
    /// What the answers are compared with.
    pub gold: Gold,
    /// Characters and bytes of each choice.
    pub lengths: Vec<(usize, usize)>,
}

/// The question of one document.
enum Question {
    Text(String),
    /// Each choice is a question of its own; this is the right one.
    Inputs(usize),
}

impl Task {
    /// Makes the requests of the first `limit` documents, each with `shots` examples drawn by a generator seeded once
    /// with `seed` (the harness's is 1234).
    ///
    /// # Errors
    /// [`Error::Data`] if there is no document, [`Error::Document`] for a document that the templates don't accept, a
    /// right answer that isn't among the choices, an id that comes twice, or too few examples; [`Error::Task`] for
    /// examples of a task that has none.
    pub fn prepare(
        &self,
        data: &TaskData,
        shots: usize,
        limit: Option<usize>,
        seed: u64,
    ) -> Result<Vec<PreparedDocument>> {
        let description = &self.description;
        if data.evaluated.is_empty() {
            return Err(Error::data(format!("task {}", self.name()), "at least one document", 0));
        }
        if shots > 0 && description.output_type == OutputType::LoglikelihoodRolling {
            return Err(Error::task(self.name(), "shots", "0, of whole texts", shots));
        }
        let exclude = description.fewshot_split == description.test_split;
        let sampler = description.fewshot_config.sampler;
        let mut examples = Examples::new(&data.fewshot, shots, sampler, exclude, seed);
        let mut ids = HashMap::new();
        let count = limit.unwrap_or(usize::MAX);
        let documents = data.evaluated.iter().take(count).enumerate();
        documents
            .map(|(index, document)| {
                let at = |problem: Problem| problem.of_document(self.name(), "evaluated", index);
                let id = self.id(document).map_err(at)?;
                if let Some(id) = &id
                    && let Some(first) = ids.insert(id.clone(), index)
                {
                    let expected = format!("an id of its own, unlike document {first}'s");
                    return Err(at(Problem::new("id", expected, id)));
                }
                let drawn = examples.draw(document).map_err(at)?;
                let mut context = self.preamble(document).map_err(at)?;
                for place in drawn {
                    let shown = self.shown(&data.fewshot[place]);
                    context +=
                        &shown.map_err(|problem| problem.of_document(self.name(), "few-shot", place))?;
                }
                self.document(index, id, context, document).map_err(at)
            })
            .collect()
    }

    /// Examples, if the evaluation doesn't say.
    pub fn default_shots(&self) -> usize {
        self.description.num_fewshot.unwrap_or(0)
    }

    fn id(&self, document: &Document) -> Result<Option<String>, Problem> {
        let Some(field) = &self.description.document_id else { return Ok(None) };
        match document.get(field) {
            Some(serde_json::Value::String(id)) => Ok(Some(id.clone())),
            Some(serde_json::Value::Number(id)) => Ok(Some(id.to_string())),
            Some(other) => Err(Problem::new(field, "a text or a number", other)),
            None => Err(Problem::new(field, "the field", "none")),
        }
    }

    fn preamble(&self, document: &Document) -> Result<String, Problem> {
        match &self.preamble {
            // A preamble of one word is the word, unless a field has its name.
            Template::Field(name) if !document.contains_key(name) => Ok(name.clone()),
            template => self.text_of("description", template, document),
        }
    }

    fn evaluate(&self, field: &str, template: &Template, document: &Document) -> Result<Rendered, Problem> {
        self.templates.evaluate(field, template, document, self.choices.is_some())
    }

    fn text_of(&self, field: &str, template: &Template, document: &Document) -> Result<String, Problem> {
        let rendered = self.evaluate(field, template, document)?;
        rendered.into_text().map_err(|other| Problem::new(field, "text", other.describe()))
    }

    fn question(&self, document: &Document, choices: &[String]) -> Result<Question, Problem> {
        match self.evaluate("doc_to_text", &self.text, document)? {
            Rendered::Number(number) if self.description.output_type == OutputType::MultipleChoice => {
                Ok(Question::Inputs(choice_number("doc_to_text", number, choices)?))
            }
            rendered => {
                let text = rendered.into_text();
                Ok(Question::Text(
                    text.map_err(|other| Problem::new("doc_to_text", "text", other.describe()))?,
                ))
            }
        }
    }

    fn choices(&self, document: &Document) -> Result<Vec<String>, Problem> {
        let template = match &self.choices {
            None => return Ok(Vec::new()),
            Some(Choices::Fixed(choices)) => return Ok(choices.clone()),
            Some(Choices::Template(template)) => template,
        };
        let refused = |found: String| Problem::new("doc_to_choice", "a list of texts, not empty", found);
        let rendered = self.templates.evaluate("doc_to_choice", template, document, false)?;
        let Rendered::List(items) = rendered else { return Err(refused(rendered.describe())) };
        if items.is_empty() {
            return Err(refused("an empty list".into()));
        }
        items.into_iter().map(|item| item.into_text().map_err(|item| refused(item.describe()))).collect()
    }

    /// Prompt and answer of each document, as an example of the task shows them, to tune a model on: those of a training
    /// split, which the task doesn't score. Documents without an answer have none here.
    ///
    /// # Errors
    /// [`Error::Document`] for a document that the templates don't accept.
    pub fn rows(&self, documents: &[Document]) -> Result<Vec<(String, String)>> {
        let row = |document: &Document| {
            let (question, answer) = self.shown_parts(document)?;
            let delimiter = &self.description.target_delimiter;
            let prompt = self.preamble(document)? + &question;
            Ok((!answer.is_empty()).then(|| (prompt, format!("{delimiter}{answer}"))))
        };
        let at = |(index, problem): (usize, Problem)| problem.of_document(self.name(), "training", index);
        let rows = documents.iter().enumerate();
        let rows = rows.map(|(index, document)| row(document).map_err(|problem| at((index, problem))));
        rows.filter_map(Result::transpose).collect()
    }

    /// An example with its answer.
    fn shown(&self, document: &Document) -> Result<String, Problem> {
        let (question, answer) = self.shown_parts(document)?;
        if answer.is_empty() {
            return Ok(question);
        }
        let description = &self.description;
        let (target, fewshot) = (&description.target_delimiter, &description.fewshot_delimiter);
        Ok(format!("{question}{target}{answer}{fewshot}"))
    }

    /// Question and answer of an example; the answer may be empty.
    fn shown_parts(&self, document: &Document) -> Result<(String, String), Problem> {
        let choices = self.choices(document)?;
        let question = match self.question(document, &choices)? {
            Question::Text(text) => text,
            Question::Inputs(right) => choices[right].clone(),
        };
        let answer = match self.evaluate("doc_to_target", &self.target, document)? {
            Rendered::Number(number) if !choices.is_empty() => {
                choices[choice_number("doc_to_target", number, &choices)?].clone()
            }
            Rendered::List(items) => {
                let first = items.into_iter().next().and_then(|item| item.into_text().ok());
                first.ok_or_else(|| Problem::new("doc_to_target", "texts", "none first"))?
            }
            rendered => rendered.into_text().unwrap_or_default(),
        };
        Ok((question, answer))
    }

    fn document(
        &self,
        index: usize,
        id: Option<String>,
        context: String,
        document: &Document,
    ) -> Result<PreparedDocument, Problem> {
        let choices = self.choices(document)?;
        let (requests, gold) = match self.description.output_type {
            OutputType::MultipleChoice => self.multiple_choice(context, document, &choices)?,
            OutputType::Loglikelihood => {
                let contexts = vec![context + &self.text_of("doc_to_text", &self.text, document)?];
                let continuations = vec![self.text_of("doc_to_target", &self.target, document)?];
                (Requests::Pairs { contexts, continuations }, Gold::Nothing)
            }
            OutputType::LoglikelihoodRolling => {
                let text = self.text_of("doc_to_target", &self.target, document)?;
                let original = match &self.original {
                    Some(template) => self.text_of("original_text", template, document)?,
                    None => text.clone(),
                };
                let gold = Gold::Size { words: count_words(&original), bytes: original.len() };
                (Requests::Rolling { text }, gold)
            }
            OutputType::GenerateUntil => self.generation(context, document, &choices)?,
        };
        let lengths = choices.iter().map(|choice| (choice.chars().count(), choice.len())).collect();
        Ok(PreparedDocument { index, id, requests, gold, lengths })
    }

    fn multiple_choice(
        &self,
        context: String,
        document: &Document,
        choices: &[String],
    ) -> Result<(Requests, Gold), Problem> {
        let delimiter = &self.description.target_delimiter;
        match self.question(document, choices)? {
            Question::Inputs(right) => {
                let contexts = choices.iter().map(|choice| format!("{context}{choice}")).collect();
                let target = self.text_of("doc_to_target", &self.target, document)?;
                let continuations = vec![format!("{delimiter}{target}")];
                Ok((Requests::Pairs { contexts, continuations }, Gold::Choices(vec![right])))
            }
            Question::Text(question) => {
                let continuations = choices.iter().map(|choice| format!("{delimiter}{choice}")).collect();
                let target = self.evaluate("doc_to_target", &self.target, document)?;
                let gold = right_choices(target, choices)?;
                let contexts = vec![context + &question];
                Ok((Requests::Pairs { contexts, continuations }, Gold::Choices(gold)))
            }
        }
    }

    fn generation(
        &self,
        context: String,
        document: &Document,
        choices: &[String],
    ) -> Result<(Requests, Gold), Problem> {
        let context = context + &self.text_of("doc_to_text", &self.text, document)?;
        let target = self.evaluate("doc_to_target", &self.target, document)?;
        let texts = match target {
            Rendered::Number(number) if !choices.is_empty() => {
                vec![choices[choice_number("doc_to_target", number, choices)?].clone()]
            }
            Rendered::List(items) => {
                let items = items.into_iter().map(Rendered::into_text).collect::<Result<_, _>>();
                items.map_err(|item| Problem::new("doc_to_target", "texts", item.describe()))?
            }
            other => vec![other.into_text().unwrap_or_default()],
        };
        let options = self.description.generation_kwargs.as_ref();
        let until = options.and_then(|options| options.until.as_ref()).map(OneOrMany::as_slice);
        let until =
            until.map_or_else(|| vec![self.description.fewshot_delimiter.clone()], <[String]>::to_vec);
        let max_gen_toks = options.map_or(256, |options| options.max_gen_toks);
        Ok((Requests::Generate { context, until, max_gen_toks }, Gold::Texts(texts)))
    }
}

/// A number of a choice, checked.
fn choice_number(field: &str, number: i64, choices: &[String]) -> Result<usize, Problem> {
    usize::try_from(number)
        .ok()
        .filter(|&number| number < choices.len())
        .ok_or_else(|| Problem::new(field, format!("a choice below {}", choices.len()), number))
}

fn right_choices(target: Rendered, choices: &[String]) -> Result<Vec<usize>, Problem> {
    let one = |target: Rendered| match target {
        Rendered::Number(number) => choice_number("doc_to_target", number, choices),
        other => {
            let place = match &other {
                Rendered::Text(text) => choices.iter().position(|choice| choice == text),
                _ => None,
            };
            place.ok_or_else(|| {
                Problem::new("doc_to_target", "a choice or the number of one", other.describe())
            })
        }
    };
    match target {
        Rendered::List(items) if !items.is_empty() => items.into_iter().map(one).collect(),
        other => Ok(vec![one(other)?]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn rows(rows: Value) -> Vec<Document> {
        rows.as_array().unwrap().iter().map(|row| row.as_object().unwrap().clone()).collect()
    }

    /// The pools of the reference data: 7 training, 4 scored, 5 development documents by the pattern of its first.
    fn pool(task: &str, count: usize) -> Vec<Document> {
        let parts = ["a solid rock", "it's water", "\"air\"", "iron"];
        let documents = (0..count).map(|i| {
            let letter = ["A", "B", "C", "D"][i % 4];
            let numbers = [i, i + 1, i + 2, i + 3].map(|n| n.to_string());
            let metal = if i % 2 == 1 { "copper" } else { "tin" };
            match task {
                "boolq" => json!({
                    "question": format!("is item {i} made of copper"),
                    "passage": format!("Item {i} -- Item {i} is a small part. It is made of {metal}."),
                    "label": i % 2,
                }),
                "piqa" => json!({
                    "goal": format!("To dry shoe number {i},"),
                    "sol1": format!("stuff it with {i} sheets of paper"),
                    "sol2": "put it in a bowl of soup", "label": i % 2,
                }),
                "hellaswag" => json!({
                    "activity_label": "Removing ice from car",
                    "ctx_a": format!("Man {i} opens the door. [header] How to scrape [title] Find a tool."),
                    "ctx_b": "he Then TAKES a scraper",
                    "endings": [", and starts  working [substeps] on it.",
                        " runs away from Éva [title] quickly", "drives off.", "naïve café scene"],
                    "label": (i % 4).to_string(),
                }),
                "winogrande" => json!({
                    "sentence": format!("Ann gave Bea {i} coins because _ asked for them .  "),
                    "option1": "Ann", "option2": "Bea", "answer": (i % 2 + 1).to_string(),
                }),
                "arc_easy" | "arc_challenge" => json!({
                    "id": format!("x{i}"), "question": format!("Which one flows, case {i}?"),
                    "choices": {"text": parts, "label": ["A", "B", "C", "D"]}, "answerKey": letter,
                }),
                "openbookqa" => json!({
                    "id": format!("o{i}"), "question_stem": format!("The sun number {i} is responsible for"),
                    "choices": {"text": ["puppies learning tricks", "children growing up",
                        "flowers wilting in a vase", "plants sprouting, blooming"],
                        "label": ["A", "B", "C", "D"]}, "answerKey": letter,
                }),
                _ => json!({
                    "question": format!(" What is {i}+1? "), "subject": "abstract_algebra",
                    "choices": numbers, "answer": 1,
                }),
            }
        });
        rows(documents.collect())
    }

    #[test]
    fn requests_equal_the_harness() {
        let mut seen = 0;
        for line in crate::golden::lines() {
            let Some(name) = line["task"].as_str().filter(|name| *name != "wikitext") else { continue };
            let task = Task::builtin(name).unwrap();
            let shots = line["shots"].as_u64().unwrap() as usize;
            let fewshot = pool(name, if name.starts_with("mmlu") { 5 } else { 7 });
            let data = TaskData { evaluated: pool(name, 4), fewshot };
            let index = line["i"].as_u64().unwrap() as usize;
            if let Some(document) = line["doc"].as_object() {
                assert_eq!(&data.evaluated[index], document, "the test's own pool");
            }
            let found = &task.prepare(&data, shots, None, 1234).unwrap()[index];
            let list = |value: &Value| match value {
                Value::String(text) => vec![text.clone()],
                list => serde_json::from_value(list.clone()).unwrap(),
            };
            let expected =
                Requests::Pairs { contexts: list(&line["ctx"]), continuations: list(&line["cont"]) };
            assert_eq!(found.requests, expected, "{line}");
            seen += 1;
        }
        assert_eq!(seen, 32);
    }

    #[test]
    fn rolling_texts_are_divided_by_the_original() {
        for line in crate::golden::lines().iter().filter(|line| line["task"] == "wikitext") {
            let document = line["doc"].as_object().unwrap().clone();
            let data = TaskData { evaluated: vec![document], ..TaskData::default() };
            let found = Task::builtin("wikitext").unwrap().prepare(&data, 0, None, 1234).unwrap().remove(0);
            assert_eq!(found.requests, Requests::Rolling { text: line["text"].as_str().unwrap().into() });
            let size = |metric: &str| line["result"][metric][1].as_u64().unwrap() as usize;
            let (words, bytes) = (size("word_perplexity"), size("byte_perplexity"));
            assert_eq!(found.gold, Gold::Size { words, bytes });
        }
    }

    fn arc() -> Vec<Document> {
        pool("arc_easy", 3)
    }

    fn message(task: &str, evaluated: Vec<Document>, fewshot: Vec<Document>, shots: usize) -> String {
        let data = TaskData { evaluated, fewshot };
        Task::builtin(task).unwrap().prepare(&data, shots, None, 1234).unwrap_err().to_string()
    }

    #[test]
    fn bad_documents_are_named() {
        let changed = |change: fn(&mut Document)| {
            let mut documents = arc();
            change(&mut documents[1]);
            documents
        };
        for (documents, parts) in [
            (vec![], &["arc_easy", "at least one document"][..]),
            (
                changed(|row| drop(row.shift_remove("question"))),
                &["task arc_easy, evaluated document 1", "question", "found none"],
            ),
            (changed(Document::clear), &["evaluated document 1: id: expected the field, found none"]),
            (
                changed(|row| drop(row.insert("id".into(), "x0".into()))),
                &["document 1: id", "document 0's", "x0"],
            ),
            (
                changed(|row| drop(row.insert("answerKey".into(), "E".into()))),
                &["document 1: doc_to_target", "'E' is not in it"],
            ),
            (
                changed(|row| row["choices"]["text"] = json!([])),
                &["document 1: doc_to_choice", "an empty list"],
            ),
            (
                changed(|row| row["choices"]["text"] = json!(["one"])),
                &["document 1: doc_to_target", "a choice below 1, found 1"],
            ),
        ] {
            let found = message("arc_easy", documents, vec![], 0);
            for part in parts {
                assert!(found.contains(part), "no \"{part}\" in: {found}");
            }
        }
        let found = message("arc_easy", arc(), arc(), 4);
        assert!(found.contains("few-shot examples: expected 4 documents, found 3"), "{found}");
        let mut fewshot = arc();
        fewshot[2].shift_remove("choices");
        let found = message("arc_easy", arc(), fewshot, 3);
        assert!(found.contains("few-shot document 2: choices"), "{found}");
        let page = rows(json!([{"page": " = A = \n"}]));
        assert!(message("wikitext", page.clone(), page, 1).contains("shots"));
    }

    #[test]
    fn only_documents_within_the_limit_are_read() {
        let mut documents = arc();
        documents[2].clear();
        let data = TaskData { evaluated: documents, ..TaskData::default() };
        let found = Task::builtin("arc_easy").unwrap().prepare(&data, 0, Some(2), 1234).unwrap();
        assert_eq!(
            found.iter().map(|document| document.id.as_deref().unwrap()).collect::<Vec<_>>(),
            ["x0", "x1"]
        );
        assert_eq!(found[0].lengths, [(12, 12), (10, 10), (5, 5), (4, 4)]);
    }
}
