//! What `--model` names: a folder, a file, or a model of the Hugging Face hub.

use std::path::{Path, PathBuf};

use crate::{Result, embedded_model};

/// The folder or file that `model` names; without a name the embedded model. A name like `org/name` that is no path here is
/// looked for in the hub's cache, where programs are built with the feature `hub`, and with `download` fetched into it.
///
/// # Errors
/// What the cache or the hub lacks.
pub fn model_path(model: Option<&Path>, download: bool) -> Result<PathBuf> {
    match model {
        None => Ok(embedded_model()),
        Some(path) => match path.to_str().filter(|name| !path.exists() && is_of_hub(name)) {
            Some(name) => from_hub(name, download),
            None => Ok(path.into()),
        },
    }
}

fn is_of_hub(name: &str) -> bool {
    let parts: Vec<&str> = name.split('/').collect();
    // In a folder that is here a name is a path, if a mistyped one.
    let is_org = |org: &str| !org.is_empty() && !org.starts_with(['.', '~']) && !Path::new(org).exists();
    matches!(parts.as_slice(), [org, model] if is_org(org) && !model.is_empty())
}

#[cfg(feature = "hub")]
fn from_hub(name: &str, download: bool) -> Result<PathBuf> {
    use kiln::models::hub::{Hub, HubProgress};
    let home =
        |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = home("HF_HOME").or_else(|| Some(home("HOME")?.join(".cache/huggingface")));
    let cache = cache.ok_or("no folder for the hub's cache: neither HF_HOME nor HOME is set")?;
    let mut hub = Hub::new(cache.join("hub"));
    if download {
        hub = hub.with_downloads();
        let endpoint = std::env::var("HF_ENDPOINT").ok().filter(|endpoint| !endpoint.is_empty());
        let is_usual = endpoint.is_none();
        if let Some(endpoint) = endpoint {
            hub = hub.with_endpoint(endpoint);
        }
        if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.trim().is_empty()) {
            hub = hub.with_token(token.trim());
        } else if let (true, Ok(token)) = (is_usual, std::fs::read_to_string(cache.join("token"))) {
            // As the hub's own programs leave it behind a login.
            hub = hub.with_token(token.trim());
        }
        let proxies = ["HTTPS_PROXY", "https_proxy"].into_iter().filter_map(|name| std::env::var(name).ok());
        if let Some(proxy) = proxies.into_iter().find(|proxy| !proxy.is_empty()) {
            hub = hub.with_proxy(proxy);
        }
    }
    let bar = indicatif::ProgressBar::new(0)
        .with_style(indicatif::ProgressStyle::with_template("{msg} {bar:40} {bytes}/{total_bytes} {eta}")?);
    let found = hub.model(name, "main", &mut |progress: HubProgress| {
        bar.set_message(progress.file.to_owned());
        bar.set_length(progress.total);
        bar.set_position(progress.bytes);
    });
    bar.finish_and_clear();
    found.map_err(|error| match download {
        true => error.into(),
        false => format!("{error}; --download fetches it").into(),
    })
}

#[cfg(not(feature = "hub"))]
fn from_hub(name: &str, _: bool) -> Result<PathBuf> {
    Err(format!(
        "{name} is no folder or file here, and models of the hub need a program built with --features hub"
    )
    .into())
}
