//! Files of the hub on their way into the cache.
//!
//! Nothing that a server says becomes a path before it is seen to be a plain name or a hash.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    time::Duration,
};

use kiln_quant_core::hash::hex;
use serde_json::Value;
use sha2::{Digest, Sha256};
use ureq::{
    Agent,
    config::RedirectAuthHeaders,
    http::{StatusCode, header},
};

use super::{HubProgress, is_file_name, is_name};

const ENDPOINT: &str = "https://huggingface.co";
/// A connection is made, and something is heard on it, within this time.
const PATIENCE: Duration = Duration::from_secs(60);
/// So many requests in a row may bring nothing; each goes on where the one before broke off.
const ATTEMPTS: u32 = 4;
/// Before the second of them, and for each one more.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest list of a repository's files.
const MAX_LIST_BYTES: u64 = 64 << 20;
const CHUNK: usize = 1 << 18;

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remote {
    pub name: String,
    size: Option<u64>,
    /// What the cache calls its content.
    key: Option<String>,
    sha256: Option<String>,
}

/// A commit and its files.
pub(super) struct Listing {
    pub commit: String,
    pub files: Vec<Remote>,
}

/// Speaks with the hub. Errors are what was found in place of what was asked.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(
        endpoint: Option<&str>,
        token: Option<&str>,
        proxy: Option<&str>,
    ) -> Result<Self, String> {
        let endpoint = endpoint.unwrap_or(ENDPOINT).trim_end_matches('/').to_owned();
        let proxy = proxy.map(ureq::Proxy::new).transpose().map_err(|error| error.to_string())?;
        let agent = Agent::config_builder()
            .proxy(proxy)
            .https_only(endpoint.starts_with("https://"))
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .build()
            .into();
        Ok(Self { agent, endpoint, token: token.map(str::to_owned) })
    }

    /// Asks for something; a token goes to the endpoint's host alone, not to where that may send.
    fn get(&self, url: &str) -> ureq::RequestBuilder<ureq::typestate::WithoutBody> {
        let request = self.agent.get(url);
        match &self.token {
            Some(token) => request.header(header::AUTHORIZATION, format!("Bearer {token}")),
            None => request,
        }
    }

    /// The commit of a revision, and its files that have plain names.
    pub(super) fn list(&self, id: &str, revision: &str) -> Result<Listing, String> {
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/api/models/{id}/revision/{revision}?blobs=true", self.endpoint);
        let mut answer = self.get(&url).call().map_err(|error| error.to_string())?;
        let text = answer.body_mut().with_config().limit(MAX_LIST_BYTES).read_to_string();
        let list: Value = text
            .map_err(|error| error.to_string())
            .and_then(|text| serde_json::from_str(&text).map_err(|error| error.to_string()))?;
        let commit = list["sha"].as_str().filter(|commit| is_name(commit));
        let commit = commit.ok_or_else(|| format!("{} for a commit", list["sha"]))?.to_owned();
        let files = list["siblings"].as_array().map_or(&[][..], Vec::as_slice);
        let files = files.iter().filter_map(|file| {
            let name = file["rfilename"].as_str().filter(|name| is_file_name(name))?;
            let hash = |value: &Value| value.as_str().filter(|hash| is_hash(hash)).map(str::to_owned);
            let sha256 = hash(&file["lfs"]["sha256"]);
            let key = sha256.clone().or_else(|| hash(&file["blobId"]));
            Some(Remote { name: name.into(), size: file["size"].as_u64(), key, sha256 })
        });
        Ok(Listing { commit, files: files.collect() })
    }

    /// Sees to it that a file is in the snapshot of `commit` below `folder`.
    pub(super) fn fetch(
        &self,
        id: &str,
        commit: &str,
        file: &Remote,
        folder: &Path,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<(), String> {
        let io = |error: std::io::Error| error.to_string();
        let pointer = folder.join("snapshots").join(commit).join(&file.name);
        if pointer.exists() {
            return Ok(());
        }
        // What the content is called, where it has a name; else it lies in the snapshot itself.
        let blob = file.key.as_ref().map(|key| folder.join("blobs").join(key));
        let place = blob.as_deref().unwrap_or(&pointer);
        let is_whole = |size: u64| file.size.is_none_or(|expected| expected == size);
        if !std::fs::metadata(place).is_ok_and(|found| found.is_file() && is_whole(found.len())) {
            if let Some(parent) = place.parent() {
                std::fs::create_dir_all(parent).map_err(io)?;
            }
            let url = format!("{}/{id}/resolve/{commit}/{}", self.endpoint, file.name);
            self.download(&url, file, place, progress)?;
        }
        match &blob {
            Some(blob) => link(blob, &pointer).map_err(io),
            None => Ok(()),
        }
    }

    /// Downloads what is missing of a file beside `place`, and gives it its name.
    fn download(
        &self,
        url: &str,
        file: &Remote,
        place: &Path,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<(), String> {
        let at = |path: &Path, error: std::io::Error| format!("{}: {error}", path.display());
        // Of Kiln's own: another program may be filling its own.
        let mut partial = place.as_os_str().to_owned();
        partial.push(".kiln-incomplete");
        let partial = Path::new(&partial);
        let options = OpenOptions::new().create(true).truncate(false).read(true).write(true).clone();
        let mut into = options.open(partial).map_err(|error| at(partial, error))?;
        match into.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err("another program that downloads it".into()),
            // A file system without locks.
            Err(TryLockError::Error(_)) => {}
        }
        if place.exists() {
            // Another program was faster.
            return Ok(());
        }
        let mut attempt = 0;
        loop {
            let before = into.metadata().map_err(|error| at(partial, error))?.len();
            match self.rest(url, file, &mut into, progress) {
                Ok(()) => break,
                Err(Failure::Final(found)) => return Err(found),
                Err(Failure::Passing(found)) => {
                    let after = into.metadata().map_err(|error| at(partial, error))?.len();
                    attempt = if after > before { 1 } else { attempt + 1 };
                    if attempt >= ATTEMPTS {
                        return Err(found);
                    }
                    std::thread::sleep(PAUSE * attempt);
                }
            }
        }
        check(&mut into, file, partial)?;
        // While it is locked, so that nobody else fills what has a name.
        std::fs::rename(partial, place).map_err(|error| at(place, error))
    }

    /// One request for what is missing.
    fn rest(
        &self,
        url: &str,
        file: &Remote,
        into: &mut File,
        progress: &mut dyn FnMut(HubProgress),
    ) -> Result<(), Failure> {
        let mut start = into.metadata()?.len();
        if file.size.is_some_and(|size| start > size) {
            start = 0;
        }
        into.set_len(start)?;
        into.seek(SeekFrom::Start(start))?;
        if file.size == Some(start) {
            return Ok(());
        }
        // As stored, so that sizes and places are those of the file.
        let mut request = self.get(url).header(header::ACCEPT_ENCODING, "identity");
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let answer = match request.call() {
            Ok(answer) => answer,
            Err(error) => {
                if matches!(error, ureq::Error::StatusCode(416)) {
                    // It isn't part of the file, which is begun again.
                    into.set_len(0)?;
                }
                return Err(error.into());
            }
        };
        let total = if answer.status() == StatusCode::PARTIAL_CONTENT {
            let range = answer.headers().get(header::CONTENT_RANGE).and_then(|range| range.to_str().ok());
            let range = range.and_then(|range| range.strip_prefix("bytes ")?.split_once('/'));
            let first = range.and_then(|(part, _)| part.split_once('-')?.0.parse::<u64>().ok());
            if first != Some(start) {
                return Err(Failure::Final(format!("a part that doesn't begin at byte {start}")));
            }
            range.and_then(|(_, total)| total.parse().ok())
        } else {
            // All of it, whatever was asked.
            start = 0;
            into.set_len(0)?;
            into.rewind()?;
            answer.body().content_length()
        };
        let Some(size) = file.size.or(total) else {
            return Err(Failure::Final("no word of its size".into()));
        };
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; CHUNK];
        loop {
            let count = body.read(&mut buffer).map_err(|error| Failure::Passing(error.to_string()))?;
            if count == 0 {
                break;
            }
            into.write_all(&buffer[..count])?;
            start += count as u64;
            if start > size {
                into.set_len(0)?;
                return Err(Failure::Final(format!("more than {size} bytes")));
            }
            progress(HubProgress { file: &file.name, bytes: start, total: size });
        }
        match start == size {
            true => Ok(()),
            false => Err(Failure::Passing(format!("{start} of {size} bytes"))),
        }
    }
}

/// Why a request gave less than all.
enum Failure {
    /// Another one may give more.
    Passing(String),
    /// None will.
    Final(String),
}

/// Of the local file.
impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Final(error.to_string())
    }
}

impl From<ureq::Error> for Failure {
    fn from(error: ureq::Error) -> Self {
        match error {
            // Too early, too many, or the server's own trouble; 416: the next one asks for all.
            ureq::Error::StatusCode(408 | 416 | 425 | 429 | 500..) => Self::Passing(error.to_string()),
            ureq::Error::StatusCode(_) | ureq::Error::BadUri(_) => Self::Final(error.to_string()),
            _ => Self::Passing(error.to_string()),
        }
    }
}

/// A hash as text: what the cache's contents are called by.
fn is_hash(text: &str) -> bool {
    (40..=64).contains(&text.len()) && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// Compares a whole file with what the server said of it; one that differs is removed.
fn check(file: &mut File, expected: &Remote, path: &Path) -> Result<(), String> {
    let io = |error: std::io::Error| error.to_string();
    file.sync_all().map_err(io)?;
    let Some(sha256) = &expected.sha256 else { return Ok(()) };
    file.rewind().map_err(io)?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        let count = file.read(&mut buffer).map_err(io)?;
        if count == 0 {
            break;
        }
        hash.update(&buffer[..count]);
    }
    let found = hex(hash.finalize());
    if found == *sha256 {
        return Ok(());
    }
    std::fs::remove_file(path).map_err(io)?;
    Err(format!("SHA-256 {found}, not {sha256}"))
}

/// Puts the content `blob` into a snapshot.
fn link(blob: &Path, pointer: &Path) -> std::io::Result<()> {
    if let Some(parent) = pointer.parent() {
        std::fs::create_dir_all(parent)?;
    }
    // What is in the way points nowhere, or it would have been taken.
    if pointer.symlink_metadata().is_ok() {
        std::fs::remove_file(pointer)?;
    }
    let from_snapshot = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(from_snapshot, pointer);
    #[cfg(not(unix))]
    let linked: std::io::Result<()> = Err(std::io::Error::other(from_snapshot.display().to_string()));
    linked.or_else(|_| std::fs::hard_link(blob, pointer)).or_else(|_| std::fs::copy(blob, pointer).map(drop))
}
