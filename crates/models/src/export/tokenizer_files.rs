//! The files that a folder holds beside weights and configuration.

use std::{fs, path::Path};

use crate::{Checkpoint, Error, Result};

const GENERATION: &str = "generation_config.json";

/// Files that are copied from folder to folder, where they are.
const COPIED: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION,
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];

/// Writes tokenizer, chat template and generation defaults of `source` into `folder`; returns notes.
pub(super) fn write(source: &Checkpoint, folder: &Path) -> Result<Vec<String>> {
    if let Some(tokenizer) = source.own_tokenizer() {
        tokenizer.save_folder(folder)?;
        // Sampling defaults are not the tokenizer's.
        let (from, to) = (source.path().join(GENERATION), folder.join(GENERATION));
        if from.is_file() {
            fs::copy(&from, &to).map_err(Error::io(&to))?;
        }
        return Ok(Vec::new());
    }
    if let Some(gguf) = source.gguf() {
        if !gguf.has_tokenizer() {
            let note = format!("{} has no tokenizer, so neither has the export", source.path().display());
            return Ok(vec![note]);
        }
        source.tokenizer()?.save_folder(folder)?;
        return Ok(Vec::new());
    }
    for name in COPIED {
        let (from, to) = (source.path().join(name), folder.join(name));
        if from.is_file() {
            fs::copy(&from, &to).map_err(Error::io(&to))?;
        }
    }
    let has_tokenizer = folder.join("tokenizer.json").exists();
    let note = || format!("{} has no tokenizer.json, so neither has the export", source.path().display());
    Ok(if has_tokenizer { Vec::new() } else { vec![note()] })
}
