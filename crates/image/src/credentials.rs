//! Which user and password are shown to a registry: those passed with the pull, else those of a docker configuration file.
//!
//! Credential helpers (`credsStore`) are programs to run and are not supported.

use std::collections::HashMap;
use std::path::Path;

use base64::Engine as _;
use joey_api::image::RegistryCredential;
use serde::Deserialize;

#[derive(Deserialize, Default)]
struct DockerConfig {
    #[serde(default)]
    auths: HashMap<String, DockerAuth>,
}

#[derive(Deserialize, Default)]
struct DockerAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
}

/// The credential for `registry`. An unreadable file counts as empty and is logged without its content.
pub(crate) fn choose(
    registry: &str,
    passed: &[RegistryCredential],
    docker_config: Option<&Path>,
) -> Option<RegistryCredential> {
    let same = |name: &str| host_of(name) == host_of(registry);
    if let Some(credential) = passed.iter().find(|credential| same(&credential.registry)) {
        return Some(credential.clone());
    }
    let path = docker_config?;
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "docker configuration file cannot be read");
            return None;
        }
    };
    let Ok(config) = serde_json::from_slice::<DockerConfig>(&text) else {
        tracing::warn!(path = %path.display(), "docker configuration file is not valid JSON");
        return None;
    };
    config.auths.iter().find(|(name, _)| same(name)).and_then(|(_, auth)| decode(registry, auth))
}

fn decode(registry: &str, auth: &DockerAuth) -> Option<RegistryCredential> {
    let (username, password) = match (&auth.auth, &auth.username, &auth.password) {
        (Some(encoded), _, _) if !encoded.is_empty() => {
            let bytes = base64::engine::general_purpose::STANDARD.decode(encoded.trim()).ok()?;
            let text = String::from_utf8(bytes).ok()?;
            let (user, password) = text.split_once(':')?;
            (user.to_owned(), password.trim_end_matches('\0').to_owned())
        }
        (_, Some(user), Some(password)) => (user.clone(), password.clone()),
        _ => return None,
    };
    Some(RegistryCredential { registry: registry.to_owned(), username, password })
}

/// The host and port a key names: `https://index.docker.io/v1/` and `docker.io` are the same registry.
fn host_of(name: &str) -> &str {
    let name = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    match name.split('/').next().unwrap_or(name) {
        "index.docker.io" | "registry-1.docker.io" => joey_model::image_ref::DEFAULT_REGISTRY,
        host => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passed_credentials_come_before_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(
            &file,
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOjE="},"r.example:5":{"auth":"!"}}}"#,
        )
        .unwrap();
        let found = choose("docker.io", &[], Some(&file)).unwrap();
        assert_eq!((found.username.as_str(), found.password.as_str()), ("u", "p:1"));
        assert_eq!(choose("r.example:5", &[], Some(&file)), None);
        let passed = [RegistryCredential { registry: "docker.io".into(), username: "a".into(), password: "b".into() }];
        assert_eq!(choose("docker.io", &passed, Some(&file)).unwrap().username, "a");
        assert_eq!(choose("r.example", &passed, None), None);
    }
}
