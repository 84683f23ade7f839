//! The harness's tasks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Task, TaskDescription};
use crate::{Error, Result};

macro_rules! tasks {
    ($($name:literal)*) => {
        /// Descriptions by name, all but those of MMLU.
        const TASKS: &[(&str, &str)] = &[$(($name, include_str!(concat!("../../tasks/", $name, ".json")))),*];
    };
}

tasks! {
    "arc_challenge" "arc_easy" "boolq" "cola" "gsm8k" "hellaswag" "lambada_openai" "lambada_standard" "mnli"
    "mnli_mismatch" "mrpc" "openbookqa" "piqa" "qnli" "qqp" "rte" "sst2" "wikitext" "winogrande" "wnli"
}

/// The description that MMLU's subjects share.
const MMLU: &str = include_str!("../../tasks/mmlu.json");
/// Its subjects by group.
const SUBJECTS: &str = include_str!("../../tasks/mmlu_subjects.json");

/// Tasks that are reported together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The group's name.
    pub group: String,
    /// Its tasks.
    pub tasks: Vec<String>,
}

fn subjects() -> BTreeMap<String, Vec<String>> {
    serde_json::from_str(SUBJECTS).expect("the crate's own file")
}

impl Task {
    /// A task of the harness by its name there: `boolq`, `piqa`, `hellaswag`, `winogrande`, `arc_easy`,
    /// `arc_challenge`, `openbookqa`, `mmlu_<subject>`, `wikitext`, `lambada_openai`, `lambada_standard`, `gsm8k`, and
    /// of GLUE `cola`, `mnli`, `mnli_mismatch`, `mrpc`, `qnli`, `qqp`, `rte`, `sst2`, `wnli`.
    ///
    /// ```
    /// let task = kiln_eval::Task::builtin("hellaswag")?;
    /// assert_eq!(task.evaluated_split(), "validation");
    /// # Ok::<(), kiln_eval::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Data`] if there is none of that name.
    pub fn builtin(name: &str) -> Result<Self> {
        let mut description = match TASKS.iter().find(|(task, _)| *task == name) {
            Some((_, json)) => return Self::from_json(json),
            None => serde_json::from_str::<TaskDescription>(MMLU)
                .map_err(|error| Error::data("mmlu", "a task's description", error))?,
        };
        let subject = name
            .strip_prefix("mmlu_")
            .filter(|subject| subjects().values().flatten().any(|known| known == subject));
        let subject = subject.ok_or_else(|| Error::data("task", "a task of the library", name))?;
        description.task = name.into();
        description.dataset_name = Some(subject.into());
        let topic = subject.replace('_', " ");
        description.description =
            format!("The following are multiple choice questions (with answers) about {topic}.\n\n");
        Self::new(description)
    }

    /// Names that [`builtin`](Self::builtin) knows.
    pub fn builtin_names() -> Vec<String> {
        let subjects = subjects().into_values().flatten().map(|subject| format!("mmlu_{subject}"));
        let mut names: Vec<String> = TASKS.iter().map(|(name, _)| (*name).into()).chain(subjects).collect();
        names.sort();
        names
    }
}

impl Group {
    /// The harness's groups of MMLU: `mmlu`, `mmlu_stem`, `mmlu_other`, `mmlu_social_sciences`, `mmlu_humanities`.
    pub fn builtin() -> Vec<Self> {
        let subjects = subjects();
        let names = |subjects: &[String]| subjects.iter().map(|subject| format!("mmlu_{subject}")).collect();
        let all: Vec<String> = subjects.values().flatten().cloned().collect();
        let mut groups = vec![Self { group: "mmlu".into(), tasks: names(&all) }];
        groups.extend(
            subjects
                .iter()
                .map(|(group, subjects)| Self { group: format!("mmlu_{group}"), tasks: names(subjects) }),
        );
        groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_compiles_and_has_its_own_name() {
        let names = Task::builtin_names();
        assert_eq!(names.len(), 20 + 57);
        for name in names {
            assert_eq!(Task::builtin(&name).unwrap().name(), name);
        }
        assert!(Task::builtin("mmlu_alchemy").unwrap_err().to_string().contains("mmlu_alchemy"));
        assert!(Task::builtin("mmlu").is_err());
    }

    #[test]
    fn groups_have_the_harness_sizes() {
        let sizes: Vec<(String, usize)> =
            Group::builtin().into_iter().map(|group| (group.group, group.tasks.len())).collect();
        let expected = [
            ("mmlu", 57),
            ("mmlu_humanities", 13),
            ("mmlu_other", 13),
            ("mmlu_social_sciences", 12),
            ("mmlu_stem", 19),
        ];
        assert_eq!(sizes, expected.map(|(name, size)| (name.to_owned(), size)));
    }
}
