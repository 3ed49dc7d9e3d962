//! Hooks that Kubernetes has no field for, named by annotations: `joey.dev/pre-start.CONTAINER` runs before the container's
//! main process, `joey.dev/pre-online.CONTAINER` when it is healthy and before it counts as ready.
//!
//! A value is a line for the container's `/bin/sh`, a JSON array of program and arguments, or a JSON object with `command` and
//! `timeoutSeconds`.

use std::collections::BTreeMap;

use crate::lifecycle::{Hook, Lifecycle, Role};

/// Longest time that a hook may ask for, in seconds.
pub const LONGEST: u32 = 24 * 3600;

/// Reason of a container that waits for its hook before the start; the log is there already.
pub const RUNS: &str = "PreStartHook";

const PRE_START: &str = "joey.dev/pre-start";
const PRE_ONLINE: &str = "joey.dev/pre-online";

/// Whether an annotation names a hook, rightly or not.
pub fn is_hook(key: &str) -> bool {
    [PRE_START, PRE_ONLINE]
        .iter()
        .any(|kind| key == *kind || key.strip_prefix(kind).is_some_and(|rest| rest.starts_with('.')))
}

/// Faults of the annotations that name hooks: key and what is wrong. `containers` are those of the Pod.
pub fn faults<'a>(
    annotations: impl IntoIterator<Item = (&'a str, &'a str)>,
    containers: &[(&str, Role)],
) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    for (key, value) in annotations.into_iter().filter(|(key, _)| is_hook(key)) {
        let checked = target(key, containers).and_then(|()| parse(value).map(drop));
        faults.extend(checked.err().map(|fault| (key.to_owned(), fault)));
    }
    faults
}

fn target(key: &str, containers: &[(&str, Role)]) -> Result<(), String> {
    let Some((kind, name)) = key.split_once('/').and_then(|(_, name)| name.split_once('.')) else {
        return Err(format!("it names no container: write {key}.CONTAINER"));
    };
    match containers.iter().find(|(known, _)| *known == name) {
        Some((_, Role::Main | Role::Sidecar)) => Ok(()),
        Some((_, Role::Init | Role::Debug)) => Err(format!(
            "\"{name}\" runs once to its end and has no {kind} hook: do it in the container itself, or in another"
        )),
        None => {
            let serve = |role: &Role| matches!(role, Role::Main | Role::Sidecar);
            let names: Vec<&str> = containers.iter().filter(|(_, role)| serve(role)).map(|(name, _)| *name).collect();
            Err(format!("there is no container \"{name}\"; there are {}", names.join(", ")))
        }
    }
}

/// Gives a container the hooks that annotations name for it. What [`faults`] tells is left out.
pub fn add(annotations: &BTreeMap<String, String>, container: &str, lifecycle: &mut Lifecycle) {
    let named = |kind: &str| parse(annotations.get(&format!("{kind}.{container}"))?).ok();
    lifecycle.pre_start = named(PRE_START);
    lifecycle.pre_online = named(PRE_ONLINE);
}

/// A hook as an annotation writes it.
pub fn parse(text: &str) -> Result<Hook, String> {
    let text = text.trim();
    let json = |error: serde_json::Error| {
        format!(
            "it begins like JSON and is none that is understood ({error}): write a line for the shell, [\"PROGRAM\", \"ARGUMENT\"] \
             or {{\"command\": [\"PROGRAM\"], \"timeoutSeconds\": 30}}"
        )
    };
    let hook = match text.chars().next() {
        None => {
            return Err("it is empty: write a line for the shell, or a JSON array of program and arguments".to_owned());
        }
        Some('[') => of_command(serde_json::from_str(text).map_err(json)?),
        Some('{') => serde_json::from_str(text).map_err(json)?,
        Some(_) => of_command(vec!["/bin/sh".to_owned(), "-c".to_owned(), text.to_owned()]),
    };
    check(&hook).map(|()| hook)
}

fn of_command(command: Vec<String>) -> Hook {
    Hook { command, timeout_seconds: 60 }
}

/// What is wrong with a hook, however it was written.
pub fn check(hook: &Hook) -> Result<(), String> {
    if hook.command.first().is_none_or(String::is_empty) {
        return Err("it names no program".to_owned());
    }
    if hook.command.iter().any(|word| word.contains('\0')) {
        return Err("its program or an argument holds a zero byte".to_owned());
    }
    match (1..=LONGEST).contains(&hook.timeout_seconds) {
        true => Ok(()),
        false => Err(format!("timeoutSeconds must be between 1 and {LONGEST}, not {}", hook.timeout_seconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(text: &str) -> Vec<String> {
        parse(text).unwrap().command
    }

    #[test]
    fn lines_arrays_and_objects() {
        assert_eq!(command(" test -e /x && echo yes "), ["/bin/sh", "-c", "test -e /x && echo yes"]);
        assert_eq!(command(r#"["/bin/warm", "a b"]"#), ["/bin/warm", "a b"]);
        let object = parse(r#"{"command": ["warm"], "timeoutSeconds": 5}"#).unwrap();
        assert_eq!(object, Hook { command: vec!["warm".to_owned()], timeout_seconds: 5 });
        assert_eq!(parse("true").unwrap().timeout_seconds, 60);
        for (bad, word) in [
            ("", "empty"),
            ("[ -e /x ]", "begins like JSON"),
            ("[]", "no program"),
            (r#"[""]"#, "no program"),
            (r#"{"command": ["a"], "timeout": 1}"#, "timeoutSeconds"),
            (r#"{"command": ["a"], "timeoutSeconds": 0}"#, "between 1"),
            (r#"["a\u0000b"]"#, "zero byte"),
        ] {
            let fault = parse(bad).unwrap_err();
            assert!(fault.contains(word), "{bad}: {fault}");
        }
    }

    #[test]
    fn annotations_name_containers_that_serve() {
        let containers = [("init", Role::Init), ("proxy", Role::Sidecar), ("web", Role::Main)];
        let all = [
            ("joey.dev/pre-start.web", "true"),
            ("joey.dev/pre-online.proxy", "true"),
            ("joey.dev/pre-started.web", "["),
            ("joey.dev/pids", "["),
            ("joey.dev/pre-start", "true"),
            ("joey.dev/pre-online.wbe", "true"),
            ("joey.dev/pre-start.init", "true"),
            ("joey.dev/pre-start.proxy", "["),
        ];
        let found = faults(all, &containers);
        let told: Vec<String> = found.iter().map(|(key, fault)| format!("{key}: {fault}")).collect();
        for (said, part) in told.iter().zip([
            "write joey.dev/pre-start.CONTAINER",
            "there are proxy, web",
            "\"init\" runs once",
            "JSON",
        ]) {
            assert!(said.contains(part), "{part} in {told:?}");
        }
        assert_eq!(told.len(), 4, "{told:?}");

        let annotations = all.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let mut lifecycle = Lifecycle::default();
        add(&annotations, "web", &mut lifecycle);
        assert!(lifecycle.pre_start.is_some() && lifecycle.pre_online.is_none());
        add(&annotations, "proxy", &mut lifecycle);
        assert!(lifecycle.pre_start.is_none() && lifecycle.pre_online.is_some());
    }
}
