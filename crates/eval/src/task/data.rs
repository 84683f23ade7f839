//! Rows of local files.

use std::path::{Path, PathBuf};

use super::{Document, Task};
use crate::{Error, Result};

/// The documents of a task.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TaskData {
    /// Those that are scored.
    pub evaluated: Vec<Document>,
    /// Those that examples are drawn from; may be empty where no example is asked for.
    pub fewshot: Vec<Document>,
}

/// A folder with data sets as JSON lines, or as Parquet with the feature `parquet`. Nothing is downloaded.
///
/// A task's split is looked for in, one after another, `<task>/`, `<dataset>/<configuration>/`, `<configuration>/` and
/// `<dataset>/`, where the data set is the last part of `dataset_path`; as `<split>.jsonl`, `<split>.parquet`, or as
/// several files `<split>-*.jsonl` or `<split>-*.parquet`, in the order of their names. So the exports of the Hugging
/// Face hub can stay as they are.
#[derive(Debug, Clone)]
pub struct DataFolder {
    root: PathBuf,
}

impl DataFolder {
    /// The folder with the data sets.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Reads the documents that `task` scores, and, where `shots` isn't 0, those that its examples come from. A task
    /// with `data_files` names its own files.
    ///
    /// # Errors
    /// [`Error::Data`] if there is no file, [`Error::File`] and [`Error::Io`] for files that can't be read.
    pub fn load(&self, task: &Task, shots: usize) -> Result<TaskData> {
        let evaluated = self.split(task, task.evaluated_split())?;
        let fewshot = match task.fewshot_split() {
            _ if shots == 0 => Vec::new(),
            split if split == task.evaluated_split() => evaluated.clone(),
            split => self.split(task, split)?,
        };
        Ok(TaskData { evaluated, fewshot })
    }

    fn split(&self, task: &Task, split: &str) -> Result<Vec<Document>> {
        let files = match task.split_files(split) {
            Some(files) => files,
            None => self.find(task, split)?,
        };
        let mut documents = Vec::new();
        for file in files {
            documents.extend(read_documents(&file)?);
        }
        Ok(documents)
    }

    fn find(&self, task: &Task, split: &str) -> Result<Vec<PathBuf>> {
        let description = task.description();
        let configuration = description.dataset_name.as_deref();
        let set = description.dataset_path.as_deref().and_then(|path| path.rsplit('/').next());
        let mut folders = vec![self.root.join(task.name())];
        folders.extend(set.zip(configuration).map(|(set, name)| self.root.join(set).join(name)));
        folders.extend([configuration, set].into_iter().flatten().map(|name| self.root.join(name)));
        for folder in &folders {
            let found = files_of_split(folder, split)?;
            if !found.is_empty() {
                return Ok(found);
            }
        }
        let folders: Vec<String> = folders.iter().map(|folder| folder.display().to_string()).collect();
        let expected = format!("{split}.jsonl or {split}.parquet in one of {}", folders.join(", "));
        Err(Error::data(format!("task {}", task.name()), expected, "no such file"))
    }
}

/// The files of a split, all of one kind.
fn files_of_split(folder: &Path, split: &str) -> Result<Vec<PathBuf>> {
    for extension in ["jsonl", "parquet"] {
        let whole = folder.join(format!("{split}.{extension}"));
        if whole.is_file() {
            return Ok(vec![whole]);
        }
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        let mut parts = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::io(folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.strip_prefix(split).is_some_and(|rest| rest.starts_with('-'))
                && name.ends_with(&format!(".{extension}"))
            {
                parts.push(path);
            }
        }
        parts.sort();
        if !parts.is_empty() {
            return Ok(parts);
        }
    }
    Ok(Vec::new())
}

/// The rows of a `.parquet` file (feature `parquet`), or of a file of JSON lines; blank lines are passed over.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] for a line that isn't a JSON object.
pub fn read_documents(path: impl AsRef<Path>) -> Result<Vec<Document>> {
    let path = path.as_ref();
    if path.extension().is_some_and(|extension| extension == "parquet") {
        return read_parquet(path);
    }
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let lines = bytes.split(|&byte| byte == b'\n').enumerate();
    lines
        .filter(|(_, line)| !line.trim_ascii().is_empty())
        .map(|(number, line)| {
            serde_json::from_slice(line)
                .map_err(|error| Error::file(path, format!("line {}", number + 1), "a JSON object", error))
        })
        .collect()
}

#[cfg(feature = "parquet")]
fn read_parquet(path: &Path) -> Result<Vec<Document>> {
    super::parquet::read(path)
}

#[cfg(not(feature = "parquet"))]
fn read_parquet(path: &Path) -> Result<Vec<Document>> {
    Err(Error::file(path, "format", "JSON lines, or Kiln built with its feature parquet", "a Parquet file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_objects_and_blank_ones_are_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("test.jsonl");
        std::fs::write(&path, "{\"a\": 1}\r\n\n  \n{\"a\": 2}").unwrap();
        let found = read_documents(&path).unwrap();
        assert_eq!(
            found.iter().map(|document| document["a"].as_i64()).collect::<Vec<_>>(),
            [Some(1), Some(2)]
        );
        std::fs::write(&path, "{\"a\": 1}\n[2]\n").unwrap();
        let error = read_documents(&path).unwrap_err().to_string();
        assert!(error.contains("test.jsonl: line 2: expected a JSON object"), "{error}");
        std::fs::write(&path, b"{\"a\": \"\xff\"}\n").unwrap();
        assert!(read_documents(&path).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn splits_are_found_under_the_names_of_the_hub() {
        let root = tempfile::tempdir().unwrap();
        let task = Task::builtin("mmlu_astronomy").unwrap();
        let data = DataFolder::new(root.path());
        let error = data.load(&task, 0).unwrap_err().to_string();
        assert!(error.contains("test.jsonl or test.parquet") && error.contains("mmlu/astronomy"), "{error}");
        let write = |path: &str, rows: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, rows).unwrap();
        };
        write("mmlu/astronomy/test-00001-of-00002.jsonl", "{\"n\": 2}\n");
        write("mmlu/astronomy/test-00000-of-00002.jsonl", "{\"n\": 1}\n");
        write("mmlu/astronomy/dev.jsonl", "{\"n\": 0}\n");
        let found = data.load(&task, 1).unwrap();
        assert_eq!(found.evaluated.iter().map(|row| row["n"].as_i64().unwrap()).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(found.fewshot.len(), 1);
        write("mmlu_astronomy/test.jsonl", "{\"n\": 7}\n");
        assert_eq!(data.load(&task, 0).unwrap().evaluated[0]["n"], 7);
    }
}
