//! A cache made here, and a server on this machine.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
};

use kiln_testkit::testdata;

use super::*;
use crate::Checkpoint;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

fn silent(_: HubProgress) {}

/// `models--org--tiny` with links into `blobs`, as programs of the hub lay it out.
fn cache(folder: &Path) -> PathBuf {
    let model = folder.join("models--org--tiny");
    let snapshot = model.join("snapshots").join(COMMIT);
    for part in [&snapshot, &model.join("refs"), &model.join("blobs")] {
        std::fs::create_dir_all(part).unwrap();
    }
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        let blob = model.join("blobs").join(format!("etag-{name}"));
        std::fs::copy(testdata(&format!("models/tiny-llama/{name}")), &blob).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(
            Path::new("../../blobs").join(format!("etag-{name}")),
            snapshot.join(name),
        )
        .unwrap();
        #[cfg(not(unix))]
        std::fs::copy(&blob, snapshot.join(name)).unwrap();
    }
    snapshot
}

#[test]
fn models_are_found_in_a_cache_by_branch_and_by_commit() {
    let folder = tempfile::tempdir().unwrap();
    let snapshot = cache(folder.path());
    let hub = Hub::new(folder.path());
    for revision in ["main", COMMIT] {
        let found = hub.model("org/tiny", revision, &mut silent).unwrap();
        assert_eq!(found, snapshot);
        assert_eq!(Checkpoint::open(&found).unwrap().config().parameters(), 1_967_808);
    }
    let file = hub.file("org/tiny", "main", "config.json", &mut silent).unwrap();
    assert_eq!(file, snapshot.join("config.json"));
}

#[test]
fn what_a_cache_lacks_is_named_and_nothing_is_downloaded() {
    let folder = tempfile::tempdir().unwrap();
    cache(folder.path());
    let hub = Hub::new(folder.path()).with_endpoint("http://127.0.0.1:1");
    let message = |id: &str, revision: &str| hub.model(id, revision, &mut silent).unwrap_err().to_string();
    for (id, revision) in [("org/other", "main"), ("org/tiny", "v2"), ("org/tiny", "refs/pr/1")] {
        let message = message(id, revision);
        assert!(message.contains(id) && message.contains("without being asked"), "{message}");
    }
    for id in ["", "org/", "/tiny", "a/b/c", "../tiny", "org/..", "org/ti ny", "org--x/y", "org/.hidden"] {
        assert!(message(id, "main").contains("org/name"), "{id}");
    }
    for revision in ["", "..", "a/../b", "/etc", "a b"] {
        assert!(message("org/tiny", revision).contains("revision"), "{revision}");
    }
    for name in ["missing.gguf", "../config.json", "a/b", ""] {
        let message = hub.file("org/tiny", "main", name, &mut silent).unwrap_err().to_string();
        assert!(message.contains("file") || message.contains("expected missing.gguf"), "{message}");
    }
    for damaged in ["", "../../..", "\u{0}"] {
        std::fs::write(folder.path().join("models--org--tiny/refs/main"), damaged).unwrap();
        let message = message("org/tiny", "main");
        assert!(message.contains("refs/main") && message.contains("a commit"), "{message}");
    }
}

/// What a server has, what it was asked, and what it does wrong.
#[derive(Default)]
struct Server {
    files: BTreeMap<String, Vec<u8>>,
    /// In the list, in place of what is so.
    commit: Option<String>,
    sha256: Option<String>,
    size: Option<u64>,
    /// Files of the list beside those.
    listed: Vec<String>,
    asked: Vec<String>,
    /// After so many bytes of the weights it once breaks off.
    break_off: Option<usize>,
    ignores_ranges: bool,
}

fn sha256(content: &[u8]) -> String {
    use sha2::{Digest, Sha256};
    kiln_quant_core::hash::hex(Sha256::digest(content))
}

/// Answers as the hub does: a list of files, and ranges of files.
fn serve(server: Arc<Mutex<Server>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = answer(stream.unwrap(), &server);
        }
    });
    address
}

fn answer(mut stream: TcpStream, server: &Mutex<Server>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let headers: Vec<String> =
        lines.map_while(std::result::Result::ok).take_while(|line| !line.is_empty()).collect();
    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let header = |name: &str| {
        let value =
            |line: &String| line.to_lowercase().strip_prefix(name).map(|value| value.trim().to_owned());
        headers.iter().find_map(value)
    };
    let mut server = server.lock().unwrap();
    server.asked.push(format!("{path} {}", header("range:").unwrap_or_default()));
    if path == "/api/models/org/tiny/revision/main?blobs=true" {
        let of_file = |(name, content): (&String, &Vec<u8>)| {
            let weights = name.ends_with(".safetensors");
            let hash = server.sha256.clone().unwrap_or_else(|| sha256(content));
            let lfs = weights.then(|| serde_json::json!({"sha256": hash, "pointerSize": 134}));
            let size = server.size.unwrap_or(content.len() as u64);
            let id = &sha256(name.as_bytes())[..40];
            serde_json::json!({"rfilename": name, "size": size, "blobId": id, "lfs": lfs})
        };
        let mut files: Vec<_> = server.files.iter().map(of_file).collect();
        files.extend(server.listed.iter().map(|name| serde_json::json!({"rfilename": name})));
        let commit = server.commit.as_deref().unwrap_or(COMMIT);
        let body = serde_json::json!({"siblings": files, "sha": commit}).to_string();
        let length = body.len();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        );
    }
    let name = path.rsplit_once('/').map_or("", |(_, name)| name).to_owned();
    let content = server.files.get(&name).filter(|_| path.starts_with("/org/tiny/resolve/")).cloned();
    let Some(content) = content else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: 0\r\n\r\n");
    };
    let range = header("range: bytes=").filter(|_| !server.ignores_ranges);
    let first: usize = range.as_ref().map_or(0, |range| range.trim_end_matches('-').parse().unwrap());
    let body = &content[first..];
    let status = match range {
        None => "200 OK".to_owned(),
        Some(_) => {
            let (last, all) = (content.len() - 1, content.len());
            format!("206 Partial Content\r\nContent-Range: bytes {first}-{last}/{all}")
        }
    };
    write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len())?;
    match server.break_off.take_if(|_| name == "model.safetensors") {
        Some(bytes) => stream.write_all(&body[..bytes]),
        None => stream.write_all(body),
    }
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(testdata(&format!("models/tiny-llama/{name}"))).unwrap()
}

const NAMES: [&str; 4] = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

/// A server of the embedded model, and a cache to download into.
fn hub(change: impl FnOnce(&mut Server)) -> (tempfile::TempDir, Arc<Mutex<Server>>, Hub) {
    let mut server =
        Server { files: NAMES.map(|name| (name.to_owned(), read(name))).into(), ..Server::default() };
    change(&mut server);
    let (folder, server) = (tempfile::tempdir().unwrap(), Arc::new(Mutex::new(server)));
    let hub = Hub::new(folder.path()).with_endpoint(serve(server.clone())).with_downloads();
    (folder, server, hub)
}

#[test]
fn models_are_downloaded_when_that_is_asked_for_and_go_on_where_they_broke_off() {
    let others =
        ["README.md", "pytorch_model.bin", "consolidated.safetensors", "model.Q4_K_M.gguf", ".gitattributes"];
    let (folder, server, hub) = hub(|server| {
        server.break_off = Some(100_000);
        server.files.extend(others.map(|name| (name.to_owned(), b"something else".to_vec())));
        server.listed =
            ["onnx/model.json", "../../outside.json", "/etc/config.json"].map(str::to_owned).into();
    });
    let mut seen = BTreeMap::new();
    let found = hub
        .model("org/tiny", "main", &mut |progress: HubProgress| {
            seen.insert(progress.file.to_owned(), (progress.bytes, progress.total));
        })
        .unwrap();
    assert_eq!(found, folder.path().join("models--org--tiny/snapshots").join(COMMIT));
    assert_eq!(Checkpoint::open(&found).unwrap().config().parameters(), 1_967_808);
    assert_eq!(seen.keys().map(String::as_str).collect::<Vec<_>>(), NAMES);
    for (name, (bytes, total)) in &seen {
        let size = read(name).len() as u64;
        assert_eq!((*bytes, *total), (size, size), "{name}");
        assert_eq!(std::fs::read(found.join(name)).unwrap(), read(name), "{name}");
    }
    // The rest of it, after it broke off.
    let path = format!("/org/tiny/resolve/{COMMIT}/model.safetensors");
    assert!(server.lock().unwrap().asked.contains(&format!("{path} bytes=100000-")));
    // What is there isn't fetched again, and is found without the server.
    server.lock().unwrap().asked.clear();
    hub.model("org/tiny", "main", &mut silent).unwrap();
    let list = "/api/models/org/tiny/revision/main?blobs=true ";
    assert_eq!(server.lock().unwrap().asked, [list]);
    assert_eq!(Hub::new(folder.path()).model("org/tiny", "main", &mut silent).unwrap(), found);
    // A further commit with the same files has links to them.
    let next = "fedcba9876543210fedcba9876543210fedcba98";
    server.lock().unwrap().commit = Some(next.into());
    let newer = hub.model("org/tiny", "main", &mut silent).unwrap();
    assert_eq!(server.lock().unwrap().asked, [list; 2]);
    assert!(
        newer.ends_with(next)
            && std::fs::read(newer.join("model.safetensors")).unwrap() == read("model.safetensors")
    );
    let gguf = hub.file("org/tiny", "main", "model.Q4_K_M.gguf", &mut silent).unwrap();
    assert_eq!(std::fs::read(gguf).unwrap(), b"something else");
    let message = hub.file("org/tiny", "main", "other.gguf", &mut silent).unwrap_err().to_string();
    assert!(message.contains("other.gguf") && message.contains("none of that name"), "{message}");
    let message = hub.model("org/gone", "main", &mut silent).unwrap_err().to_string();
    assert!(message.contains("org/gone@main") && message.contains("404"), "{message}");
    // A server that isn't there, and a token that messages don't show.
    let dead =
        Hub::new(folder.path()).with_endpoint("http://127.0.0.1:1").with_downloads().with_token("hf_secret");
    let message = dead.model("org/tiny", "main", &mut silent).unwrap_err().to_string();
    assert!(
        message.contains("org/tiny@main") && !format!("{message} {dead:?}").contains("hf_secret"),
        "{message}"
    );
}

/// A cache that another program filled is used as it is.
#[test]
fn what_other_programs_cached_is_not_downloaded_again() {
    let (folder, server, hub) = hub(|_| {});
    let snapshot = cache(folder.path());
    assert_eq!(hub.model("org/tiny", "main", &mut silent).unwrap(), snapshot);
    assert_eq!(server.lock().unwrap().asked.len(), 1);
}

#[test]
fn files_that_are_not_what_the_server_says_get_no_name() {
    let blobs = |folder: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(folder.join("models--org--tiny/blobs"));
        let names = entries.into_iter().flatten().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.to_string_lossy().into_owned()).collect()
    };
    let weights = sha256(&read("model.safetensors"));
    let refused = |change: fn(&mut Server), part: &str| {
        let (folder, _, hub) = hub(change);
        let message = hub.model("org/tiny", "main", &mut silent).unwrap_err().to_string();
        assert!(message.contains(part), "{part}: {message}");
        assert!(!blobs(folder.path()).contains(&weights), "{part}");
        let local = Hub::new(folder.path()).model("org/tiny", "main", &mut silent);
        assert!(local.is_err(), "{part}: {local:?}");
    };
    refused(|server| server.sha256 = Some("0".repeat(64)), "SHA-256");
    refused(|server| server.size = Some(10), "more than 10 bytes");
    refused(|server| server.size = Some(1 << 40), "bytes");
    refused(|server| server.commit = Some("../../../outside".into()), "for a commit");
    refused(|server| server.commit = Some("/etc".into()), "for a commit");
    // Contents are called by what the server says only where that is a hash.
    let (folder, _, hub) = hub(|server| server.sha256 = Some("../../../../outside".into()));
    hub.model("org/tiny", "main", &mut silent).unwrap();
    assert!(blobs(folder.path()).iter().all(|name| name.len() == 40));
}

/// A server that sends all of a file whatever part was asked for.
#[test]
fn a_whole_answer_takes_the_place_of_what_was_there() {
    let (folder, server, hub) = hub(|server| {
        (server.ignores_ranges, server.break_off) = (true, Some(100_000));
    });
    let found = hub.model("org/tiny", "main", &mut silent).unwrap();
    assert_eq!(std::fs::read(found.join("model.safetensors")).unwrap(), read("model.safetensors"));
    // What an older run left is finished, or begun again where it can't be part of the file.
    for left in [vec![], read("model.safetensors"), vec![7; 10_000_000]] {
        server.lock().unwrap().ignores_ranges = false;
        std::fs::remove_dir_all(folder.path().join("models--org--tiny")).unwrap();
        let blobs = folder.path().join("models--org--tiny/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        let partial = format!("{}.kiln-incomplete", sha256(&read("model.safetensors")));
        std::fs::write(blobs.join(partial), left).unwrap();
        let found = hub.model("org/tiny", "main", &mut silent).unwrap();
        assert_eq!(std::fs::read(found.join("model.safetensors")).unwrap(), read("model.safetensors"));
    }
}
