//! Columns of Pods. The status word follows kubectl's printers: it is what people search for when something is wrong.

use jiff::Timestamp;
use serde_json::Value;

use super::{AGE, Column, NAME, age, column, wide};
use crate::object::{is_deleting, list, text};

pub const COLUMNS: &[Column] = &[
    NAME,
    column("Ready", "Containers that are ready, of all.", |pod| Word::of(pod).ready.into()),
    column("Status", "What the Pod is doing, or what is wrong.", |pod| Word::of(pod).status.into()),
    column("Restarts", "Restarts of all containers, and when the last was.", |pod| Word::of(pod).restarts.into()),
    AGE,
    wide("IP", "Address of the Pod.", |pod| or_none(text(pod, "/status/podIP"))),
    wide("Node", "Where it runs.", |pod| or_none(text(pod, "/spec/nodeName"))),
    wide("Nominated Node", "Where room is being made for it.", |pod| or_none(text(pod, "/status/nominatedNodeName"))),
    wide("Readiness Gates", "Gates that are open, of all.", gates),
];

fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

fn gates(pod: &Value) -> Value {
    let gates = list(pod, "/spec/readinessGates");
    if gates.is_empty() {
        return "<none>".into();
    }
    let open = gates.iter().filter(|gate| condition(pod, text(gate, "/conditionType")) == "True").count();
    format!("{open}/{}", gates.len()).into()
}

fn condition<'a>(pod: &'a Value, kind: &str) -> &'a str {
    let found = list(pod, "/status/conditions").iter().find(|condition| condition["type"] == kind);
    found.map(|condition| text(condition, "/status")).unwrap_or_default()
}

/// The three cells that are found together.
struct Word {
    ready: String,
    status: String,
    restarts: String,
}

/// Restarts counted over containers.
#[derive(Default)]
struct Restarts {
    count: i64,
    last: Option<Timestamp>,
}

impl Restarts {
    fn add(&mut self, container: &Value) {
        self.count += container.get("restartCount").and_then(Value::as_i64).unwrap_or(0);
        let ended = text(container, "/lastState/terminated/finishedAt").parse::<Timestamp>().ok();
        self.last = self.last.max(ended);
    }

    fn text(&self) -> String {
        match self.last {
            Some(last) if self.count > 0 => {
                format!("{} ({} ago)", self.count, age(&last.to_string()).as_str().unwrap_or_default())
            }
            _ => self.count.to_string(),
        }
    }
}

impl Word {
    fn of(pod: &Value) -> Self {
        let reason = text(pod, "/status/reason");
        let mut status = if reason.is_empty() { text(pod, "/status/phase") } else { reason }.to_owned();
        if list(pod, "/status/conditions")
            .iter()
            .any(|c| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated")
        {
            status = "SchedulingGated".to_owned();
        }
        let sidecars = |name: &str| {
            let found = list(pod, "/spec/initContainers").iter().find(|container| container["name"] == name);
            found.is_some_and(|container| container["restartPolicy"] == "Always")
        };
        let mut total = list(pod, "/spec/containers").len();
        total += list(pod, "/spec/initContainers").iter().filter(|c| c["restartPolicy"] == "Always").count();
        let mut ready = 0;
        let mut restarts = Restarts::default();
        let mut sidecar_restarts = Restarts::default();
        let initialising =
            init_word(pod, &sidecars, &mut ready, (&mut restarts, &mut sidecar_restarts)).map(|word| status = word);
        if initialising.is_none() || condition(pod, "Initialized") == "True" {
            restarts = sidecar_restarts;
            let mut running = false;
            for container in list(pod, "/status/containerStatuses").iter().rev() {
                restarts.add(container);
                match container_word(container) {
                    Some(word) => status = word,
                    None if container["ready"] == true && container.pointer("/state/running").is_some() => {
                        running = true;
                        ready += 1;
                    }
                    None => {}
                }
            }
            // One container is done while another runs.
            if status == "Completed" && running {
                status = if condition(pod, "Ready") == "True" { "Running" } else { "NotReady" }.to_owned();
            }
        }
        if is_deleting(pod) {
            status = match reason {
                "NodeLost" => "Unknown".to_owned(),
                _ if matches!(text(pod, "/status/phase"), "Succeeded" | "Failed") => status,
                _ => "Terminating".to_owned(),
            };
        }
        Self { ready: format!("{ready}/{total}"), status, restarts: restarts.text() }
    }
}

/// The word while init containers are at work; nothing when they are done.
fn init_word(
    pod: &Value,
    is_sidecar: &dyn Fn(&str) -> bool,
    ready: &mut usize,
    (restarts, sidecar_restarts): (&mut Restarts, &mut Restarts),
) -> Option<String> {
    let total = list(pod, "/spec/initContainers").len();
    for (index, container) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        restarts.add(container);
        let sidecar = is_sidecar(text(container, "/name"));
        if sidecar {
            sidecar_restarts.add(container);
        }
        let ended = container.pointer("/state/terminated");
        if ended.is_some_and(|ended| ended["exitCode"] == 0) {
            continue;
        }
        if sidecar && container["started"] == true {
            *ready += usize::from(container["ready"] == true);
            continue;
        }
        let waiting = text(container, "/state/waiting/reason");
        return Some(match ended {
            Some(ended) => format!("Init:{}", ended_word(ended)),
            None if !matches!(waiting, "" | "PodInitializing") => format!("Init:{waiting}"),
            None => format!("Init:{index}/{total}"),
        });
    }
    None
}

fn container_word(container: &Value) -> Option<String> {
    let waiting = text(container, "/state/waiting/reason");
    if !waiting.is_empty() {
        return Some(waiting.to_owned());
    }
    container.pointer("/state/terminated").map(ended_word)
}

fn ended_word(ended: &Value) -> String {
    let number = |key: &str| ended.get(key).and_then(Value::as_i64).unwrap_or(0);
    match (text(ended, "/reason"), number("signal")) {
        ("", 0) => format!("ExitCode:{}", number("exitCode")),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cells(status: Value, deleting: bool) -> (String, String, String) {
        let mut pod = json!({"metadata": {"name": "a"}, "spec": {"containers": [{"name": "c"}, {"name": "d"}],
            "initContainers": [{"name": "i"}]}, "status": status});
        if deleting {
            pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        let word = Word::of(&pod);
        (word.ready, word.status, word.restarts)
    }

    #[test]
    fn words() {
        let running = json!({"ready": true, "restartCount": 0, "state": {"running": {}}});
        let word = |status: Value| cells(status, false).1;
        assert_eq!(word(json!({"phase": "Pending"})), "Pending");
        let both = json!({"phase": "Running", "containerStatuses": [running, running]});
        assert_eq!(cells(both.clone(), false), ("2/2".into(), "Running".into(), "0".into()));
        assert_eq!(cells(both, true).1, "Terminating");
        let crash = json!({"restartCount": 3, "state": {"waiting": {"reason": "CrashLoopBackOff"}}});
        let status = json!({"phase": "Running", "containerStatuses": [running, crash]});
        assert_eq!(cells(status, false), ("1/2".into(), "CrashLoopBackOff".into(), "3".into()));
        let done = json!({"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}});
        assert_eq!(word(json!({"phase": "Succeeded", "containerStatuses": [done, done]})), "Completed");
        assert_eq!(word(json!({"phase": "Running", "containerStatuses": [done, running]})), "NotReady");
        let killed = json!({"state": {"terminated": {"exitCode": 137, "signal": 9}}});
        assert_eq!(word(json!({"phase": "Failed", "containerStatuses": [killed]})), "Signal:9");
        let init = json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]});
        assert_eq!(word(init), "Init:0/1");
        let pull = json!({"name": "i", "state": {"waiting": {"reason": "ImagePullBackOff"}}});
        assert_eq!(word(json!({"phase": "Pending", "initContainerStatuses": [pull]})), "Init:ImagePullBackOff");
        assert_eq!(word(json!({"phase": "Failed", "reason": "Evicted"})), "Evicted");
    }
}
