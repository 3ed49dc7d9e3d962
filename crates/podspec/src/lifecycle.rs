//! Probes, hooks and termination messages of a container, from the Pod's words into the instance's. Names of ports are looked
//! up here; everything is taken apart by name, as in the parent module.

use std::net::IpAddr;

use joey_api::lifecycle::{Action, HttpGet, LastWords, Lifecycle, Probe};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use crate::Notes;

/// What is done to `container` while it lives; `at` names it in faults.
pub(crate) fn lifecycle(at: &str, container: &core::Container, notes: &mut Notes) -> Lifecycle {
    let hooks = container.lifecycle.clone().unwrap_or_default();
    let core::Lifecycle { post_start, pre_stop, stop_signal } = hooks;
    let ports = container.ports.as_deref().unwrap_or_default();
    let mut probed = |probe: &Option<core::Probe>, name: &str| {
        probe.as_ref().and_then(|asked| self::probe(&format!("{at}{name}"), asked, ports, notes))
    };
    Lifecycle {
        startup: probed(&container.startup_probe, "startupProbe"),
        liveness: probed(&container.liveness_probe, "livenessProbe"),
        readiness: probed(&container.readiness_probe, "readinessProbe"),
        // By annotation, for there is no field.
        pre_start: None,
        pre_online: None,
        post_start: post_start.and_then(|asked| hook(&format!("{at}lifecycle.postStart"), asked, ports, notes)),
        pre_stop: pre_stop.and_then(|asked| hook(&format!("{at}lifecycle.preStop"), asked, ports, notes)),
        stop_signal,
    }
}

/// Where the container's last words are taken from.
pub(crate) fn last_words(container: &core::Container) -> LastWords {
    let path = container.termination_message_path.clone().filter(|path| !path.is_empty());
    let or_log = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    LastWords { path: path.unwrap_or_else(|| LastWords::default().path), or_log }
}

fn probe(at: &str, asked: &core::Probe, ports: &[core::ContainerPort], notes: &mut Notes) -> Option<Probe> {
    let core::Probe {
        exec,
        failure_threshold,
        grpc,
        http_get,
        initial_delay_seconds,
        period_seconds,
        success_threshold,
        tcp_socket,
        termination_grace_period_seconds,
        timeout_seconds,
    } = asked;
    let number = |given: Option<i32>, default: u32| given.and_then(|n| u32::try_from(n).ok()).unwrap_or(default);
    let action = match (exec, http_get, tcp_socket, grpc) {
        (Some(exec), None, None, None) => Ok(program(exec)),
        (None, Some(get), None, None) => web(get, ports),
        (None, None, Some(tcp), None) => socket(tcp, ports),
        (None, None, None, Some(core::GRPCAction { port: asked, service })) => u16::try_from(*asked)
            .map(|port| Action::Grpc { port, service: service.clone().unwrap_or_default() })
            .map_err(|_| format!("port {asked} is none")),
        _ => Err("exactly one of exec, httpGet, tcpSocket and grpc is needed".to_owned()),
    };
    Some(Probe {
        action: action.map_err(|fault| notes.faults.push(format!("{at}: {fault}"))).ok()?,
        initial_delay_seconds: number(*initial_delay_seconds, 0),
        timeout_seconds: number(*timeout_seconds, 1),
        period_seconds: number(*period_seconds, 10),
        success_threshold: number(*success_threshold, 1),
        failure_threshold: number(*failure_threshold, 3),
        termination_grace_period_seconds: termination_grace_period_seconds.and_then(|s| u32::try_from(s).ok()),
    })
}

fn hook(at: &str, asked: core::LifecycleHandler, ports: &[core::ContainerPort], notes: &mut Notes) -> Option<Action> {
    let core::LifecycleHandler { exec, http_get, sleep, tcp_socket } = asked;
    let action = match (exec, http_get, sleep, tcp_socket) {
        (Some(exec), None, None, None) => Ok(program(&exec)),
        (None, Some(get), None, None) => web(&get, ports),
        (None, None, Some(core::SleepAction { seconds }), None) => u32::try_from(seconds)
            .map(|seconds| Action::Sleep { seconds })
            .map_err(|_| format!("a sleep of {seconds} s is none")),
        (None, None, None, Some(_)) => Err("tcpSocket is no hook in Kubernetes: use httpGet, exec or sleep".to_owned()),
        _ => Err("exactly one of exec, httpGet and sleep is needed".to_owned()),
    };
    action.map_err(|fault| notes.faults.push(format!("{at}: {fault}"))).ok()
}

fn program(exec: &core::ExecAction) -> Action {
    let core::ExecAction { command } = exec;
    Action::Exec { command: command.clone().unwrap_or_default() }
}

fn web(get: &core::HTTPGetAction, ports: &[core::ContainerPort]) -> Result<Action, String> {
    let core::HTTPGetAction { host, http_headers, path, port, scheme } = get;
    let headers = http_headers.iter().flatten();
    let path = path.clone().filter(|path| !path.is_empty()).unwrap_or_else(|| "/".to_owned());
    Ok(Action::HttpGet(HttpGet {
        host: address(host.as_deref())?,
        port: number_of(port, ports)?,
        path,
        https: scheme.as_deref() == Some("HTTPS"),
        headers: headers.map(|core::HTTPHeader { name, value }| (name.clone(), value.clone())).collect(),
    }))
}

fn socket(tcp: &core::TCPSocketAction, ports: &[core::ContainerPort]) -> Result<Action, String> {
    let core::TCPSocketAction { host, port } = tcp;
    Ok(Action::TcpSocket { host: address(host.as_deref())?, port: number_of(port, ports)? })
}

/// Whom to ask where it is not the Pod. The agent looks no names up.
fn address(host: Option<&str>) -> Result<Option<String>, String> {
    match host.filter(|host| !host.is_empty()) {
        Some(host) if host.parse::<IpAddr>().is_err() => {
            Err(format!("host \"{host}\" is no IP address: use the address of the instance or a Service"))
        }
        host => Ok(host.map(str::to_owned)),
    }
}

/// A port's number; a name is that of one of the container's own ports.
fn number_of(port: &IntOrString, ports: &[core::ContainerPort]) -> Result<u16, String> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => match ports.iter().find(|port| port.name.as_deref() == Some(name)) {
            Some(port) => port.container_port,
            None => name.parse().map_err(|_| format!("the container has no port named \"{name}\""))?,
        },
    };
    u16::try_from(number).ok().filter(|port| *port != 0).ok_or_else(|| format!("{number} is no port"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn converted(container: Value) -> (Lifecycle, Vec<String>) {
        let mut whole = json!({ "name": "c", "ports": [{ "name": "web", "containerPort": 8080 }] });
        whole.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
        let mut notes = Notes::default();
        let made = lifecycle("container \"c\": ", &serde_json::from_value(whole).unwrap(), &mut notes);
        (made, notes.faults)
    }

    #[test]
    fn defaults_are_those_of_the_api() {
        let (made, faults) = converted(json!({ "livenessProbe": { "httpGet": { "port": "web" } } }));
        assert!(faults.is_empty(), "{faults:?}");
        let probe = made.liveness.unwrap();
        let seconds = (probe.initial_delay_seconds, probe.timeout_seconds, probe.period_seconds);
        assert_eq!((seconds, probe.success_threshold, probe.failure_threshold), ((0, 1, 10), 1, 3));
        let get = HttpGet { host: None, port: 8080, path: "/".to_owned(), https: false, headers: vec![] };
        assert_eq!(probe.action, Action::HttpGet(get));
    }

    #[test]
    fn every_kind_of_action() {
        let (made, faults) = converted(json!({
            "startupProbe": { "grpc": { "port": 9, "service": "s" } },
            "readinessProbe": { "tcpSocket": { "port": 80 } },
            "lifecycle": {
                "postStart": { "exec": { "command": ["a", "b"] } }, "preStop": { "sleep": { "seconds": 3 } },
                "stopSignal": "SIGUSR1",
            },
        }));
        assert!(faults.is_empty(), "{faults:?}");
        assert_eq!(made.startup.unwrap().action, Action::Grpc { port: 9, service: "s".to_owned() });
        assert_eq!(made.readiness.unwrap().action, Action::TcpSocket { host: None, port: 80 });
        assert_eq!(made.post_start, Some(Action::Exec { command: vec!["a".to_owned(), "b".to_owned()] }));
        assert_eq!(made.pre_stop, Some(Action::Sleep { seconds: 3 }));
        assert_eq!(made.stop_signal.as_deref(), Some("SIGUSR1"));
    }

    #[test]
    fn hosts_are_addresses() {
        let (made, faults) = converted(json!({
            "livenessProbe": { "tcpSocket": { "port": 80, "host": "10.0.0.7" } },
            "readinessProbe": { "tcpSocket": { "port": 80, "host": "db.example.org" } },
            "lifecycle": { "preStop": { "httpGet": { "port": 80, "host": "localhost" } } },
        }));
        let host = Some("10.0.0.7".to_owned());
        assert_eq!(made.liveness.unwrap().action, Action::TcpSocket { host, port: 80 });
        assert_eq!((made.readiness, made.pre_stop), (None, None));
        let hosts = ["readinessProbe: host \"db.example.org\"", "lifecycle.preStop: host \"localhost\""];
        let why = "is no IP address: use the address of the instance or a Service";
        assert_eq!(faults, hosts.map(|host| format!("container \"c\": {host} {why}")));
    }

    #[test]
    fn what_cannot_be_done_is_named() {
        let (_, faults) = converted(json!({
            "startupProbe": {},
            "livenessProbe": { "httpGet": { "port": "nosuch" } },
            "readinessProbe": { "tcpSocket": { "port": 0 } },
            "lifecycle": { "preStop": { "tcpSocket": { "port": 80 } } },
        }));
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert!(faults.iter().all(|fault| fault.starts_with("container \"c\": ")), "{faults:?}");
        assert!(faults.iter().any(|fault| fault.contains("no port named \"nosuch\"")), "{faults:?}");
    }
}
