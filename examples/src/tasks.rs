//! Tasks by their names.

use std::path::Path;

use kiln::eval::{DataFolder, Evaluation, Task, TaskData};

use crate::{Result, testdata};

/// Tasks with their documents: names of the harness, `mmlu` for all its subjects, or description files (`.json`). Of tasks that
/// name no files of their own the data are JSON lines in `data`.
pub fn open_tasks(names: &[String], data: &Path, evaluation: &Evaluation) -> Result<Vec<(Task, TaskData)>> {
    let mut tasks = Vec::new();
    for name in names {
        match name.as_str() {
            "mmlu" => {
                let subjects = Task::builtin_names().into_iter().filter(|name| name.starts_with("mmlu_"));
                let subjects = subjects.map(|name| Task::builtin(&name));
                tasks.extend(subjects.collect::<kiln::eval::Result<Vec<_>>>()?);
            }
            file if file.ends_with(".json") => tasks.push(Task::from_file(file)?),
            name => tasks.push(Task::builtin(name)?),
        }
    }
    let folder = DataFolder::new(data);
    let load = |task: Task| {
        let data = folder.load(&task, evaluation.shots_of(&task))?;
        Ok((task, data))
    };
    tasks.into_iter().map(load).collect()
}

/// The description file of a quiz that comes with the repository.
pub fn quiz(name: &str) -> String {
    testdata("eval/quiz").join(name).with_extension("json").display().to_string()
}
