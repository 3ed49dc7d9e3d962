//! What a container runs: its image's configuration and its specification merged. Pure.
//!
//! Rules for command and arguments, and for `$(NAME)`: Kubernetes' API reference, Container `command`, `args`, `env`.

use std::net::IpAddr;

use joey_api::agent::{AgentContainer, AgentMount, Collected};
use joey_api::instance::{ContainerSpec, Mount, Resources, Security};
use joey_api::lifecycle::Role;
use joey_api::validate::{DEFAULT_CAPABILITIES, may_trace};
use joey_image::{Image, ImageConfig};
use joey_model::{ErrorKind, Fault};

use crate::pull;

/// Processes a container may have where its specification sets no limit: a fork bomb must not reach the host.
const PIDS: u64 = 4096;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the container gets from its instance.
pub(crate) struct Surroundings<'a> {
    pub(crate) hostname: &'a str,
    pub(crate) address: Option<IpAddr>,
    /// Mounted layers, topmost first.
    pub(crate) layers: Vec<String>,
}

pub(crate) fn container(
    spec: &ContainerSpec,
    image: &Image,
    around: Surroundings<'_>,
) -> Result<AgentContainer, Fault> {
    let config = &image.config;
    let given = spec_env(spec, around.address);
    let args = args(spec, config, &given);
    if args.is_empty() {
        let message = format!("container \"{}\": neither it nor image {} says what to run", spec.name, spec.image);
        return Err(Fault::new(ErrorKind::Invalid, "CreateContainerConfigError", message)
            .with_hint("give the container a command"));
    }
    Ok(AgentContainer {
        name: spec.name.clone(),
        role: spec.role,
        target: spec.target.clone(),
        restart_policy: spec.restart_policy,
        restart_rules: spec.restart_rules.clone(),
        lifecycle: spec.lifecycle.clone(),
        last_words: spec.last_words.clone(),
        image: spec.image.clone(),
        image_id: pull::named(image),
        layers: around.layers,
        args,
        env: env(config, &given, around.hostname, spec.tty),
        working_dir: working_dir(spec, config),
        user: user(&spec.security, &config.user),
        supplemental_groups: spec.security.supplemental_groups.clone(),
        strict_groups: spec.security.strict_groups,
        run_as_non_root: spec.security.run_as_non_root,
        read_only_root: spec.security.read_only_root,
        no_new_privileges: spec.security.no_new_privileges,
        capabilities: capabilities(spec.role, &spec.security),
        stdin: spec.stdin,
        stdin_once: spec.stdin_once,
        tty: spec.tty,
        resources: resources(spec),
        restart_on_resize: spec.restart_on_resize,
        stop_signal: (spec.lifecycle.stop_signal.clone().or_else(|| config.stop_signal.clone()))
            .unwrap_or_else(|| "SIGTERM".to_owned()),
        mounts: spec.mounts.iter().map(|asked| mount(spec, asked, &given)).collect::<Result<_, _>>()?,
        // Said by the instance's plan: `logs`.
        collected: Collected::default(),
    })
}

/// A container of which it is known that it is there, and what it is to the others.
pub(crate) fn held(spec: &ContainerSpec) -> AgentContainer {
    AgentContainer {
        name: spec.name.clone(),
        role: spec.role,
        restart_policy: spec.restart_policy,
        resources: resources(spec),
        ..AgentContainer::default()
    }
}

/// A mount with its place in the volume: an expression is expanded by the specification's variables, all of which it needs.
fn mount(spec: &ContainerSpec, mount: &Mount, known: &[(String, String)]) -> Result<AgentMount, Fault> {
    let refused = |why: String| {
        let message = format!("container \"{}\": subPathExpr of its mount at {}: {why}", spec.name, mount.path);
        Err(Fault::new(ErrorKind::Invalid, "CreateContainerConfigError", message))
    };
    let mut sub_path = mount.sub_path.clone();
    if let Some(expression) = &mount.sub_path_expr {
        if let Some(name) = unknown(expression, known) {
            return refused(format!("missing value for \"{name}\""));
        }
        let path = expand(expression, known);
        let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        if path.starts_with('/') || parts.contains(&"..") {
            return refused(format!("\"{path}\" must be relative and without \"..\""));
        }
        sub_path = Some(parts.join("/")).filter(|path| !path.is_empty());
    }
    let (volume, path) = (mount.volume.clone(), mount.path.clone());
    Ok(AgentMount { volume, path, read_only: mount.read_only, sub_path })
}

/// The first variable that a text refers to and that is not there.
fn unknown<'a>(text: &'a str, known: &[(String, String)]) -> Option<&'a str> {
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|inner| inner.split_once(')')) {
            if !known.iter().any(|(known, _)| known == name) {
                return Some(name);
            }
            rest = after;
        }
    }
    None
}

/// The limits of a container; processes are limited always.
pub(crate) fn resources(spec: &ContainerSpec) -> Resources {
    Resources { pids: spec.resources.pids.or(Some(PIDS)), ..spec.resources }
}

/// Variables of the specification, `$(NAME)` in each replaced by those before it.
pub(crate) fn spec_env(spec: &ContainerSpec, address: Option<IpAddr>) -> Vec<(String, String)> {
    let mut known: Vec<(String, String)> = Vec::with_capacity(spec.env.len());
    for variable in &spec.env {
        let value = match &variable.value {
            Some(value) => expand(value, &known),
            None => address.map(|address| address.to_string()).unwrap_or_default(),
        };
        known.retain(|(name, _)| *name != variable.name);
        known.push((variable.name.clone(), value));
    }
    known
}

fn args(spec: &ContainerSpec, config: &ImageConfig, known: &[(String, String)]) -> Vec<String> {
    let (command, args) = match (spec.command.is_empty(), spec.args.is_empty()) {
        (false, _) => (&spec.command, &spec.args),
        (true, false) => (&config.entrypoint, &spec.args),
        (true, true) => return [&config.entrypoint[..], &config.cmd[..]].concat(),
    };
    // The image's own words are not expanded, the specification's are.
    let own = |words: &[String], ours: bool| -> Vec<String> {
        words.iter().map(|word| if ours { expand(word, known) } else { word.clone() }).collect()
    };
    let mut all = own(command, !spec.command.is_empty());
    all.extend(own(args, true));
    all
}

fn env(config: &ImageConfig, given: &[(String, String)], hostname: &str, tty: bool) -> Vec<String> {
    let mut env = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if tty {
        env.push("TERM=xterm".to_owned());
    }
    let given = given.iter().map(|(name, value)| format!("{name}={value}"));
    for variable in config.env.iter().cloned().chain(given) {
        let name = variable.split_once('=').map_or(variable.as_str(), |(name, _)| name);
        env.retain(|other: &String| other.split_once('=').is_none_or(|(other, _)| other != name));
        env.push(variable);
    }
    env
}

fn working_dir(spec: &ContainerSpec, config: &ImageConfig) -> String {
    let wanted = spec.working_dir.as_deref().filter(|dir| !dir.is_empty());
    match wanted.unwrap_or(&config.working_dir) {
        "" => "/".to_owned(),
        dir => dir.to_owned(),
    }
}

fn user(security: &Security, image: &str) -> String {
    let (image_user, image_group) = image.split_once(':').map_or((image, None), |(user, group)| (user, Some(group)));
    let user = security.user.map_or_else(|| image_user.to_owned(), |user| user.to_string());
    // A user of the specification leaves the image's group behind, as the kubelet does.
    let image_group = image_group.filter(|_| security.user.is_none()).map(str::to_owned);
    match security.group.map(|group| group.to_string()).or(image_group) {
        Some(group) if user.is_empty() => format!("0:{group}"),
        Some(group) => format!("{user}:{group}"),
        None => user,
    }
}

fn capabilities(role: Role, security: &Security) -> Vec<String> {
    let names = |list: &[String]| -> Vec<String> {
        list.iter().map(|name| name.strip_prefix("CAP_").unwrap_or(name).to_ascii_uppercase()).collect()
    };
    let (dropped, added) = (names(&security.drop_capabilities), names(&security.add_capabilities));
    let all = dropped.iter().any(|name| name == "ALL");
    DEFAULT_CAPABILITIES
        .into_iter()
        .filter(|&name| added.iter().any(|add| add == name) || !(all || dropped.iter().any(|drop| drop == name)))
        .map(str::to_owned)
        .chain(added.iter().filter(|name| may_trace(role, name)).cloned())
        .collect()
}

/// Replaces `$(NAME)` by the value of a known variable; `$$` is a dollar sign; an unknown name stays as it is written.
fn expand(text: &str, known: &[(String, String)]) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
            continue;
        }
        let name = rest.strip_prefix("$(").and_then(|inner| inner.split_once(')'));
        match name {
            Some((name, after)) => {
                match known.iter().find(|(known, _)| known == name) {
                    Some((_, value)) => out.push_str(value),
                    None => out.push_str(&rest[..name.len() + 3]),
                }
                rest = after;
            }
            None => {
                out.push('$');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use joey_model::{Digest, ImageRef};
    use serde_json::{Value, json};

    use super::*;

    fn merged(spec: Value) -> Result<AgentContainer, Fault> {
        let mut whole = json!({"name": "c", "image": "app"});
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let digest = Digest::from_sha256(&[7; 32]);
        let strings = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let image = Image {
            reference: ImageRef::parse("app").unwrap(),
            id: digest.clone(),
            manifest: digest,
            config: ImageConfig {
                entrypoint: strings(&["/entry"]),
                cmd: strings(&["$(A)", "cmd"]),
                env: strings(&["A=image", "PATH=/image"]),
                user: "web:www".to_owned(),
                working_dir: "/srv".to_owned(),
                ..ImageConfig::default()
            },
            layers: Vec::new(),
            size: 0,
            pulled_at: jiff::Timestamp::UNIX_EPOCH,
        };
        let around = Surroundings { hostname: "h", address: "10.0.0.9".parse().ok(), layers: Vec::new() };
        container(&serde_json::from_value(whole).unwrap(), &image, around)
    }

    #[test]
    fn commands_and_arguments() {
        assert_eq!(merged(json!({})).unwrap().args, ["/entry", "$(A)", "cmd"]);
        assert_eq!(merged(json!({"args": ["x"]})).unwrap().args, ["/entry", "x"]);
        assert_eq!(merged(json!({"command": ["x"]})).unwrap().args, ["x"]);
        let both = json!({"command": ["x"], "args": ["$(A)", "$$(A)", "$(NONE)", "$", "$(", "a$(A)b"],
                          "env": [{"name": "A", "value": "1"}]});
        assert_eq!(merged(both).unwrap().args, ["x", "1", "$(A)", "$(NONE)", "$", "$(", "a1b"]);
    }

    #[test]
    fn environment() {
        let env = merged(json!({"env": [{"name": "IP", "address": true}, {"name": "URL", "value": "http://$(IP)/"},
                                        {"name": "A", "value": "spec"}], "tty": true}))
        .unwrap()
        .env;
        let expected = ["HOSTNAME=h", "TERM=xterm", "PATH=/image", "IP=10.0.0.9", "URL=http://10.0.0.9/", "A=spec"];
        assert_eq!(env, expected);
    }

    #[test]
    fn users() {
        for (security, user) in [
            (json!({}), "web:www"),
            (json!({"user": 5}), "5"),
            (json!({"user": 5, "group": 6}), "5:6"),
            (json!({"group": 6}), "web:6"),
        ] {
            assert_eq!(merged(json!({"security": security})).unwrap().user, user);
        }
    }

    #[test]
    fn processes_are_limited_always() {
        assert_eq!(merged(json!({})).unwrap().resources.pids, Some(PIDS));
        assert_eq!(merged(json!({"resources": {"pids": 5, "cpuMilli": 10}})).unwrap().resources.pids, Some(5));
    }

    #[test]
    fn places_within_volumes() {
        let of = |path: &str| {
            let mount = json!({"volume": "v", "path": "/v", "subPathExpr": path});
            let env = json!([{"name": "POD", "value": "web"}, {"name": "UP", "value": ".."}]);
            let fault = |fault: Fault| fault.message;
            let made = merged(json!({"mounts": [mount], "env": env})).map_err(fault)?;
            Ok::<_, String>(made.mounts[0].sub_path.clone().unwrap_or_default())
        };
        for (expression, path) in
            [("$(POD)/log", "web/log"), ("a//$(POD)/./", "a/web"), ("$$(POD)", "$(POD)"), ("$", "$")]
        {
            assert_eq!(of(expression).as_deref(), Ok(path));
        }
        assert!(of("$(NONE)").unwrap_err().contains("missing value for \"NONE\""));
        assert!(of("a/$(UP)/b").unwrap_err().contains("without"));
        // What the image says of itself is no variable of the specification.
        assert!(of("$(A)").is_err());
    }

    #[test]
    fn capability_sets() {
        let of = |security: Value| merged(json!({"security": security})).unwrap().capabilities;
        assert_eq!(of(json!({})).len(), DEFAULT_CAPABILITIES.len());
        assert!(!of(json!({"dropCapabilities": ["CAP_CHOWN"]})).contains(&"CHOWN".to_owned()));
        assert_eq!(
            of(json!({"dropCapabilities": ["ALL"], "addCapabilities": ["NET_BIND_SERVICE", "SYS_ADMIN"]})),
            ["NET_BIND_SERVICE"]
        );
    }
}
