//! Models of the Hugging Face hub by their names, out of the cache that its programs keep on a machine, or downloaded into it.
//!
//! The cache's layout is that of `huggingface_hub`: `models--{org}--{name}` with `refs` (a commit for each revision), `snapshots` (a
//! folder of links for each commit) and `blobs`. Programs of the hub and Kiln use the same files.

mod download;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    io::{Read, Write},
    path::PathBuf,
};

use kiln_quant_core::write_atomically;

use self::download::{Client, Remote};
use crate::{Error, Result};

/// Longest text of a ref: a commit's hash.
const MAX_REF_BYTES: u64 = 256;
/// What every folder of a model has.
const CONFIG: &str = "config.json";
/// Endings of what a checkpoint's folder needs; those of weights are chosen.
const ENDINGS: [&str; 4] = [".json", ".jinja", ".model", ".txt"];

/// A file on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubProgress<'a> {
    /// Its name in the repository.
    pub file: &'a str,
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes of all of it.
    pub total: u64,
}

/// Where models are looked for.
///
/// Nothing is downloaded unless [`with_downloads`](Self::with_downloads) allows it. The environment is not read, and no file but
/// the cache's: a program that wants `HF_HOME`, a token or a proxy obeyed passes them.
///
/// ```no_run
/// use kiln_models::{Checkpoint, hub::Hub};
/// let hub = Hub::new("/home/me/.cache/huggingface/hub").with_downloads();
/// let folder = hub.model("HuggingFaceTB/SmolLM2-135M-Instruct", "main", &mut |progress| {
///     println!("{}: {} of {} bytes", progress.file, progress.bytes, progress.total);
/// })?;
/// let checkpoint = Checkpoint::open(folder)?;
/// # Ok::<(), kiln_models::Error>(())
/// ```
#[derive(Clone)]
pub struct Hub {
    cache: PathBuf,
    downloads: bool,
    endpoint: Option<String>,
    token: Option<String>,
    proxy: Option<String>,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache, downloads, endpoint, .. } = self;
        let mut fields = f.debug_struct("Hub");
        fields.field("cache", cache).field("downloads", downloads).field("endpoint", endpoint);
        // A token, and a password in a proxy's address, are nobody's business.
        fields.finish_non_exhaustive()
    }
}

impl Hub {
    /// The cache in the folder `cache`, usually `~/.cache/huggingface/hub`.
    pub fn new(cache: impl Into<PathBuf>) -> Self {
        Self { cache: cache.into(), downloads: false, endpoint: None, token: None, proxy: None }
    }

    /// What isn't there may be downloaded.
    #[must_use]
    pub fn with_downloads(mut self) -> Self {
        self.downloads = true;
        self
    }

    /// Another server than `https://huggingface.co`.
    #[must_use]
    pub fn with_endpoint(mut self, endpoint: impl Into<String>) -> Self {
        self.endpoint = Some(endpoint.into());
        self
    }

    /// The token that the server is asked with, and no other that it sends to.
    #[must_use]
    pub fn with_token(mut self, token: impl Into<String>) -> Self {
        self.token = Some(token.into());
        self
    }

    /// The address of a proxy, e.g. `http://proxy.example:3128`.
    #[must_use]
    pub fn with_proxy(mut self, proxy: impl Into<String>) -> Self {
        self.proxy = Some(proxy.into());
        self
    }

    /// The folder of the model `id` (`org/name`) at `revision` (a branch, a tag or a commit; `main` is usual).
    ///
    /// With downloads the server says which commit that is, and of its files those that a checkpoint needs are fetched: configuration,
    /// tokenizer, weights as safetensors or, where there are none, PyTorch's. GGUF files are fetched by [`file`](Self::file).
    /// What the cache has of other commits isn't fetched again. A download that was interrupted goes on where it ended; sizes, and
    /// SHA-256 where the server knows it, are checked before a file gets its name. `progress` hears of each file as it comes.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name or revision that is none; [`Error::File`] naming what the cache lacks or what the server answered;
    /// [`Error::Io`].
    pub fn model(&self, id: &str, revision: &str, progress: &mut dyn FnMut(HubProgress)) -> Result<PathBuf> {
        let repository = Repository::new(self, id, revision)?;
        if !self.downloads {
            return repository.local(CONFIG);
        }
        repository.download(CONFIG, &wanted, progress)
    }

    /// One file of the model `id`, such as a GGUF file; see [`model`](Self::model).
    ///
    /// # Errors
    /// As [`model`](Self::model), and if there is no such file.
    pub fn file(
        &self,
        id: &str,
        revision: &str,
        name: &str,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<PathBuf> {
        let repository = Repository::new(self, id, revision)?;
        if !is_file_name(name) {
            return Err(argument("file", "the name of a file of the repository, without folders", name));
        }
        let folder = match self.downloads {
            false => repository.local(name)?,
            true => {
                let this =
                    |files: &[Remote]| files.iter().filter(|file| file.name == name).cloned().collect();
                repository.download(name, &this, progress)?
            }
        };
        Ok(folder.join(name))
    }
}

fn argument(name: &str, expected: &str, found: &str) -> Error {
    Error::Argument { name: name.into(), expected: expected.into(), found: format!("{found:?}") }
}

/// Letters, digits and the signs that names of the hub have, beginning with a letter or digit.
fn is_name(name: &str) -> bool {
    let is_sign = |c: char| matches!(c, '-' | '_' | '.');
    name.len() <= 96
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || is_sign(c))
        && !name.contains("..")
}

fn is_file_name(name: &str) -> bool {
    is_name(name.trim_start_matches(['.', '_'])) && !name.starts_with("..")
}

/// Of a repository's files those that make a checkpoint, or an adapter.
fn wanted(files: &[Remote]) -> Vec<Remote> {
    let any = |is: fn(&str) -> bool| files.iter().any(|file| is(&file.name));
    let of_model = |name: &str| name.starts_with("model") && name.ends_with(".safetensors");
    let of_pytorch = |name: &str| name.starts_with("pytorch_model") && name.ends_with(".bin");
    let others = |name: &str| name.ends_with(".safetensors");
    let is_weights = [of_model, of_pytorch, others].into_iter().find(|is| any(*is)).unwrap_or(others);
    let describes = |name: &str| ENDINGS.iter().any(|end| name.ends_with(end));
    files.iter().filter(|file| is_weights(&file.name) || describes(&file.name)).cloned().collect()
}

/// A model of the hub at a revision.
struct Repository<'a> {
    hub: &'a Hub,
    id: &'a str,
    revision: &'a str,
}

impl<'a> Repository<'a> {
    fn new(hub: &'a Hub, id: &'a str, revision: &'a str) -> Result<Self> {
        let mut parts = id.split('/');
        let is_id = parts.clone().count() <= 2 && parts.all(is_name) && !id.contains("--");
        if !is_id {
            return Err(argument("model", "a name of the hub, org/name", id));
        }
        if !revision.split('/').all(is_name) {
            return Err(argument("revision", "a branch, a tag or a commit", revision));
        }
        Ok(Self { hub, id, revision })
    }

    fn folder(&self) -> PathBuf {
        self.hub.cache.join(format!("models--{}", self.id.replace('/', "--")))
    }

    fn missing(&self, field: &str, expected: &str, found: impl fmt::Display) -> Error {
        Error::File {
            path: PathBuf::from(format!("{}@{}", self.id, self.revision)),
            field: field.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// The snapshot that is here, with the file `needed`.
    fn local(&self, needed: &str) -> Result<PathBuf> {
        let folder = self.folder();
        let snapshots = folder.join("snapshots");
        let reference = folder.join("refs").join(self.revision);
        let snapshot = match std::fs::File::open(&reference) {
            Ok(file) => {
                let mut text = Vec::new();
                file.take(MAX_REF_BYTES).read_to_end(&mut text).map_err(Error::io(&reference))?;
                let commit = String::from_utf8_lossy(&text);
                if !is_name(commit.trim()) {
                    let field = reference.display().to_string();
                    return Err(self.missing(&field, "a commit", format!("{commit:?}")));
                }
                snapshots.join(commit.trim())
            }
            // A commit is its own name.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => snapshots.join(self.revision),
            Err(error) => return Err(Error::io(&reference)(error)),
        };
        if snapshot.join(needed).exists() {
            return Ok(snapshot);
        }
        let expected =
            format!("{needed} in a snapshot of the cache, as nothing is downloaded without being asked");
        Err(self.missing("cache", &expected, format!("none at {}", snapshot.display())))
    }

    /// Downloads the files that `wanted` chooses of those that there are; `what` is missing if it chooses none.
    fn download(
        &self,
        what: &str,
        wanted: &dyn Fn(&[Remote]) -> Vec<Remote>,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<PathBuf> {
        let Hub { endpoint, token, proxy, .. } = self.hub;
        let client = Client::new(endpoint.as_deref(), token.as_deref(), proxy.as_deref());
        let client = client.map_err(|found| self.missing("proxy", "the address of a proxy", found))?;
        let wrong = |found: String| self.missing("download", "an answer of the hub", found);
        let listing = client.list(self.id, self.revision).map_err(wrong)?;
        let files = wanted(&listing.files);
        if files.is_empty() {
            return Err(self.missing(what, "a file of the repository", "none of that name"));
        }
        let folder = self.folder();
        let snapshot = folder.join("snapshots").join(&listing.commit);
        std::fs::create_dir_all(&snapshot).map_err(Error::io(&snapshot))?;
        for file in files {
            let fetched = client.fetch(self.id, &listing.commit, &file, &folder, progress);
            fetched.map_err(|found| self.missing(&file.name, "a file that can be downloaded", found))?;
        }
        // A model that is here isn't given up for a single file of a newer commit.
        let is_less = !snapshot.join(CONFIG).exists() && self.local(CONFIG).is_ok();
        if self.revision == listing.commit || is_less {
            return Ok(snapshot);
        }
        let reference = folder.join("refs").join(self.revision);
        let parent = reference.parent().unwrap_or(&folder);
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        write_atomically(&reference, |file| file.write_all(listing.commit.as_bytes()))?;
        Ok(snapshot)
    }
}
