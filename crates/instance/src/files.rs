//! What an instance is told by files: the texts of /etc/hosts and /etc/resolv.conf; and the size of its memory for files.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use joey_api::instance::InstanceSpec;
use joey_api::lifecycle::Role;

/// Where systemd-resolved tells the real name servers, when /etc/resolv.conf names its own stub.
const UPSTREAM: &str = "/run/systemd/resolve/resolv.conf";

/// The size of an empty directory in memory: no larger than what all containers may use, where that is limited.
pub(crate) fn memory_size(spec: &InstanceSpec, wanted: Option<u64>) -> Option<u64> {
    let main = spec.containers.iter().filter(|container| container.role == Role::Main);
    let whole = main.map(|container| container.resources.memory_bytes).sum::<Option<u64>>();
    [wanted, whole, spec.limits.memory_bytes].into_iter().flatten().min()
}

/// What programs are told when they ask for the host name; `short` is without its domain.
pub(crate) fn hostname(spec: &InstanceSpec, short: &str) -> String {
    match spec.domain.as_ref().filter(|_| spec.full_hostname) {
        Some(domain) => format!("{short}.{domain}"),
        None => short.to_owned(),
    }
}

/// Text of /etc/hosts.
pub(crate) fn hosts(spec: &InstanceSpec, hostname: &str, address: Option<IpAddr>) -> String {
    let mut text = String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    if let Some(address) = address {
        let full = spec.domain.as_ref().map(|domain| format!("{hostname}.{domain}\t")).unwrap_or_default();
        text.push_str(&format!("{address}\t{full}{hostname}\n"));
    }
    for alias in &spec.network.host_aliases {
        text.push_str(&format!("{}\t{}\n", alias.address, alias.hostnames.join("\t")));
    }
    text
}

/// Text of /etc/resolv.conf: what the specification says, else the host's own.
pub(crate) fn resolv_conf(spec: &InstanceSpec, host: &Path) -> String {
    let Some(dns) = &spec.network.dns else { return host_resolv_conf(host) };
    let hosts = if dns.host { host_resolv_conf(host) } else { String::new() };
    let all = |word: &str, more: &[String]| -> Vec<String> {
        let lines = hosts.lines().filter_map(|line| line.trim().strip_prefix(word)?.strip_prefix([' ', '\t']));
        let own = lines.flat_map(str::split_whitespace).map(str::to_owned);
        own.chain(more.iter().cloned()).collect()
    };
    let servers = all("nameserver", &dns.nameservers);
    let mut text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (word, values) in [("search", all("search", &dns.searches)), ("options", all("options", &dns.options))] {
        if !values.is_empty() {
            text.push_str(&format!("{word} {}\n", values.join(" ")));
        }
    }
    text
}

fn host_resolv_conf(host: &Path) -> String {
    let text = fs::read_to_string(host).unwrap_or_default();
    // A server on the host's loopback is nobody inside.
    match reachable(&text) {
        true => text,
        false => fs::read_to_string(UPSTREAM).unwrap_or(text),
    }
}

fn reachable(text: &str) -> bool {
    let mut servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")).map(str::trim);
    servers.any(|server| server.parse::<IpAddr>().is_ok_and(|address| !address.is_loopback()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(change: serde_json::Value) -> InstanceSpec {
        let mut spec = json!({"name": "web", "containers": []});
        spec.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn memory_is_no_more_than_the_containers_have() {
        let size = |wanted, first: Option<u64>| {
            let first = first.map_or(json!({}), |bytes| json!({"memoryBytes": bytes}));
            let container =
                |name: &str, resources: serde_json::Value| json!({"name": name, "image": "i", "resources": resources});
            let all = json!([container("a", first), container("b", json!({"memoryBytes": 30}))]);
            memory_size(&spec(json!({ "containers": all })), wanted)
        };
        assert_eq!((size(None, None), size(Some(7), None), size(None, Some(20))), (None, Some(7), Some(50)));
        assert_eq!((size(Some(99), Some(20)), size(Some(9), Some(20))), (Some(50), Some(9)));
    }

    #[test]
    fn texts() {
        let spec = spec(
            json!({"network": {"dns": {"nameservers": ["10.0.0.1"], "searches": ["a", "b"], "options": ["ndots:5"]},
            "hostAliases": [{"address": "10.1.1.1", "hostnames": ["x", "y"]}]}}),
        );
        assert_eq!(resolv_conf(&spec, Path::new("/none")), "nameserver 10.0.0.1\nsearch a b\noptions ndots:5\n");
        let (mut more, folder) = (spec.clone(), tempfile::tempdir().unwrap());
        more.network.dns.as_mut().unwrap().host = true;
        let host = folder.path().join("resolv.conf");
        std::fs::write(&host, "# ours\nnameserver 9.9.9.9\nsearch c\noptions rotate\n").unwrap();
        let both = "nameserver 9.9.9.9\nnameserver 10.0.0.1\nsearch c a b\noptions rotate ndots:5\n";
        assert_eq!(resolv_conf(&more, &host), both, "what the host has comes first");
        let text = hosts(&spec, "web", "10.0.0.2".parse().ok());
        assert!(text.contains("10.0.0.2\tweb\n") && text.contains("10.1.1.1\tx\ty\n"));
        assert!(!reachable("nameserver 127.0.0.53\n") && reachable("nameserver 127.0.0.53\nnameserver 9.9.9.9\n"));
    }
}
