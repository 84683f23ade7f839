//! A checkpoint of any kind, opened by its path.

use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    Error, Result,
    chat::ChatTemplate,
    config::{ModelConfig, SpecialTokens},
    gguf::Gguf,
    hf::{HfFolder, PackedFolder},
    source::TensorSource,
    tokenizer::{Tokenizer, contradictions},
};

/// An open checkpoint: a folder of Hugging Face's, MLX's or Kiln's own, or a `.gguf` file. Tensors are read when a model is loaded.
#[derive(Clone)]
pub struct Checkpoint {
    path: PathBuf,
    files: Files,
    config: ModelConfig,
    special: SpecialTokens,
    /// In place of that of the files.
    tokenizer: Option<Arc<Tokenizer>>,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("path", &self.path)
            .field("config", &self.config)
            .field("special", &self.special)
            .finish_non_exhaustive()
    }
}

#[derive(Clone)]
enum Files {
    Folder(Arc<HfFolder>),
    Packed(Arc<PackedFolder>),
    Gguf(Arc<Gguf>),
}

impl Checkpoint {
    /// Opens a folder with `config.json` and safetensors (those of [`save_model`](crate::export::save_model) included), or a `.gguf` file, and checks headers and configuration.
    ///
    /// # Errors
    /// Whatever is missing, malformed or not supported, by file and field.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let metadata = std::fs::metadata(&path).map_err(|error| {
            // A hub id or a typo: the operating system's words alone don't say that this is a path.
            let hint = "expected a folder or a .gguf file on this machine; nothing is downloaded";
            Error::io(&path)(std::io::Error::new(error.kind(), format!("{error}: {hint}")))
        })?;
        let (files, config, special) = if !metadata.is_dir() {
            let gguf = Gguf::open(&path)?;
            let (config, special) = (gguf.config()?, gguf.special_tokens()?);
            (Files::Gguf(Arc::new(gguf)), config, special)
        } else if PackedFolder::is_one(&path) {
            let folder = PackedFolder::open(&path)?;
            let (config, special) = (folder.config().clone(), folder.special_tokens().clone());
            (Files::Packed(Arc::new(folder)), config, special)
        } else {
            let folder = HfFolder::open(&path)?;
            let (config, special) = (folder.config().clone(), folder.special_tokens().clone());
            (Files::Folder(Arc::new(folder)), config, special)
        };
        Ok(Self { path, files, config, special, tokenizer: None })
    }

    /// The same files with another tokenizer, one with further tokens: exports write it in place of the files' own.
    #[must_use]
    pub fn with_tokenizer(&self, tokenizer: Tokenizer) -> Self {
        Self { tokenizer: Some(Arc::new(tokenizer)), ..self.clone() }
    }

    /// The tokenizer in place of the files' own, if there is one.
    pub fn own_tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_deref()
    }

    /// The folder or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF file, if it is one.
    pub(crate) fn gguf(&self) -> Option<&Gguf> {
        match &self.files {
            Files::Gguf(gguf) => Some(gguf),
            _ => None,
        }
    }

    /// The class of the model, if it is one for sequence classification, which has a score head in the place of a language
    /// model's: [`load_classifier`](Self::load_classifier) loads it.
    pub fn classifier(&self) -> Option<&str> {
        match &self.files {
            Files::Folder(folder) => folder.classifier(),
            Files::Packed(folder) => folder.classifier(),
            Files::Gguf(_) => None,
        }
    }

    /// What the outputs of a [`classifier`](Self::classifier) are called, in their order; none if the files don't say.
    pub fn labels(&self) -> &[String] {
        match &self.files {
            Files::Folder(folder) => folder.labels(),
            Files::Packed(folder) => folder.labels(),
            Files::Gguf(_) => &[],
        }
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Ids with a meaning.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The tensors.
    pub fn source(&self) -> &dyn TensorSource {
        match &self.files {
            Files::Folder(folder) => folder.as_ref(),
            Files::Packed(folder) => folder.as_ref(),
            Files::Gguf(gguf) => gguf.as_ref(),
        }
    }

    /// Compares the tensors with the hashes that the files hold of them: Kiln's own folders have some. Every tensor is read.
    pub(crate) fn verify(&self) -> Result<()> {
        match &self.files {
            Files::Packed(folder) => Ok(folder.file().verify()?),
            Files::Folder(_) | Files::Gguf(_) => Ok(()),
        }
    }

    /// The tokenizer that comes with the checkpoint.
    ///
    /// # Errors
    /// If there is none, or it can't be read.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        if let Some(tokenizer) = self.own_tokenizer() {
            return Ok(tokenizer.clone());
        }
        match &self.files {
            Files::Folder(_) | Files::Packed(_) => Tokenizer::from_folder(&self.path),
            Files::Gguf(gguf) => gguf.tokenizer(),
        }
    }

    /// The chat template that comes with the checkpoint, if there is one.
    ///
    /// # Errors
    /// If the tokenizer's files can't be read, or the template doesn't compile.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        let source = match &self.files {
            Files::Folder(_) | Files::Packed(_) => self.tokenizer()?.chat_template().map(str::to_string),
            Files::Gguf(gguf) => gguf.chat_template(),
        };
        source.map(|source| ChatTemplate::new(&source)).transpose()
    }

    /// Keys of the configuration that Kiln doesn't know, and other things a user may want to hear of.
    pub fn notes(&self) -> Vec<String> {
        let unknown = |key: &str| format!("unknown configuration key {key}");
        match &self.files {
            Files::Folder(folder) => {
                let keys = folder.unknown_keys().iter().map(|key| unknown(key));
                let tokens = contradictions(&self.path, &self.special);
                keys.chain(folder.notes().iter().cloned()).chain(tokens).collect()
            }
            Files::Packed(folder) => folder.unknown_keys().iter().map(|key| unknown(key)).collect(),
            Files::Gguf(gguf) => gguf.unknown_keys().into_iter().map(unknown).chain(gguf.notes()).collect(),
        }
    }
}
