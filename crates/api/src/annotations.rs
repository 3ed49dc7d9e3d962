//! Annotations of Pods that Joey reads, by key. They are read when the Pod's instance is made and fixed from then on.

use std::collections::{BTreeMap, BTreeSet};

use crate::hooks;

/// Sizes for the whole Pod, separated by commas; the first that can be had counts. The name is that of Alibaba Cloud's Elastic
/// Container Instance.
pub const USE_SPECS: &str = "k8s.aliyun.com/eci-use-specs";
/// Of the same origin: where cores of processes that crash are written, inside the container.
pub const CORE_PATTERN: &str = "k8s.aliyun.com/eci-core-pattern";
/// Of the same origin: `{"encrypted": "true"}` encrypts the disk that the Pod writes.
pub const STORAGE_OPTIONS: &str = "k8s.aliyun.com/eci-ephemeral-storage-options";
/// Limits of the Pod as a whole; rates are for each way on its own.
pub const PIDS: &str = "joey.dev/pids";
pub const DISK_BYTES: &str = "joey.dev/disk-bytes-per-second";
pub const DISK_OPERATIONS: &str = "joey.dev/disk-operations-per-second";
/// Caps of the network, to the Pod and from it.
pub const PACKETS: [&str; 2] = ["joey.dev/ingress-packets-per-second", "joey.dev/egress-packets-per-second"];
pub const BANDWIDTH: [&str; 2] = ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];
/// Ports that debuggers connect to, separated by commas.
pub const DEBUG_PORTS: &str = "joey.dev/debug-ports";
/// Sources of logs, as a JSON list of [`crate::logs::LogSource`].
pub const LOGS: &str = "joey.dev/logs";
/// The sink of sources that name none.
pub const LOG_SINK: &str = "joey.dev/log-sink";

/// What is said where one would change.
pub const FIXED: &str =
    "it is read when the Pod begins and fixed for the Pod's life; delete the Pod and create it with another";

/// Whether Joey reads an annotation, so that it may not change.
pub fn is_fixed(key: &str) -> bool {
    let single =
        [USE_SPECS, CORE_PATTERN, STORAGE_OPTIONS, PIDS, DISK_BYTES, DISK_OPERATIONS, DEBUG_PORTS, LOGS, LOG_SINK];
    single.contains(&key) || PACKETS.contains(&key) || BANDWIDTH.contains(&key) || hooks::is_hook(key)
}

/// Whether annotations ask for an encrypted disk; or what is wrong with how they do.
pub fn encrypts_disk(annotations: &BTreeMap<String, String>) -> Result<bool, String> {
    let Some(text) = annotations.get(STORAGE_OPTIONS) else { return Ok(false) };
    let options: BTreeMap<String, String> =
        serde_json::from_str(text).map_err(|error| format!("annotation {STORAGE_OPTIONS}: {error}"))?;
    match options.get("encrypted").map(String::as_str) {
        Some("true") => Ok(true),
        Some("false") | None => Ok(false),
        Some(other) => Err(format!("annotation {STORAGE_OPTIONS}: encrypted is true or false, not \"{other}\"")),
    }
}

/// The keys of fixed annotations that came, went or have another value, in order.
pub fn changed<'a>(
    before: impl IntoIterator<Item = (&'a str, &'a str)>,
    now: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Vec<&'a str> {
    let before: BTreeSet<_> = before.into_iter().filter(|(key, _)| is_fixed(key)).collect();
    let now: BTreeSet<_> = now.into_iter().filter(|(key, _)| is_fixed(key)).collect();
    let keys: BTreeSet<&str> = before.symmetric_difference(&now).map(|(key, _)| *key).collect();
    keys.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_encrypted_when_it_is_asked_for() {
        let asked = |text: &str| encrypts_disk(&[(STORAGE_OPTIONS.to_owned(), text.to_owned())].into());
        assert_eq!(asked(r#"{"encrypted": "true"}"#), Ok(true));
        assert_eq!((asked("{}"), asked(r#"{"encrypted": "false"}"#)), (Ok(false), Ok(false)));
        assert_eq!(encrypts_disk(&BTreeMap::new()), Ok(false));
        for wrong in ["", "true", r#"{"encrypted": "yes"}"#] {
            assert!(asked(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_came_went_or_changed() {
        let before = [("note", "1"), (PIDS, "10"), (LOGS, "[]"), ("joey.dev/pre-start.web", "true")];
        assert_eq!(changed(before, before), Vec::<&str>::new());
        let now = [("note", "2"), ("kubernetes.io/egress-bandwidth", "1M"), (PIDS, "20"), (LOGS, "[]")];
        assert_eq!(changed(before, now), [PIDS, "joey.dev/pre-start.web", "kubernetes.io/egress-bandwidth"]);
    }
}
