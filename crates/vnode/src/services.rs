//! The Services of the cluster as containers see them: variables such as `KUBERNETES_SERVICE_HOST`. One watch keeps them, so that
//! no Pod waits for a request of its own. Which of them a Pod gets is said by [`variables`], a pure function.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::Api;
use kube::runtime::watcher;
use tokio::sync::watch;

const RETRY: Duration = Duration::from_secs(1);
/// The Service every Pod is told of, whatever it wants: the API server's.
const API_SERVER: (&str, &str) = ("default", "kubernetes");

type Known = BTreeMap<(String, String), Service>;

/// Every Service that has an address.
pub struct Services {
    /// `None` until they were listed once.
    known: watch::Sender<Option<Known>>,
}

impl Default for Services {
    fn default() -> Self {
        Self { known: watch::Sender::new(None) }
    }
}

impl Services {
    /// Keeps the Services known; never ends.
    pub(crate) async fn keep(&self, client: kube::Client) {
        let mut events = watcher(Api::<Service>::all(client), watcher::Config::default()).boxed();
        let mut listed = Known::new();
        loop {
            match events.try_next().await {
                Ok(Some(watcher::Event::Init)) => listed.clear(),
                Ok(Some(watcher::Event::InitApply(service))) => put(&mut listed, service),
                Ok(Some(watcher::Event::InitDone)) => {
                    self.known.send_replace(Some(std::mem::take(&mut listed)));
                }
                Ok(Some(watcher::Event::Apply(service))) => {
                    self.known.send_modify(|known| put(known.get_or_insert_default(), service));
                }
                Ok(Some(watcher::Event::Delete(service))) => {
                    self.known.send_modify(|known| drop(known.get_or_insert_default().remove(&key(&service))));
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "services cannot be watched, trying again");
                    if is_refused(&error) {
                        // Pods must not wait for a right that nobody gave: they run without these variables.
                        self.known.send_if_modified(|known| {
                            known.get_or_insert_default();
                            true
                        });
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// The variables a Pod is told, once the Services are known.
    pub async fn of(&self, pod: &Pod) -> Vec<(String, String)> {
        let mut known = self.known.subscribe();
        let Ok(known) = known.wait_for(Option::is_some).await else { return Vec::new() };
        let links = pod.spec.as_ref().and_then(|spec| spec.enable_service_links) != Some(false);
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        variables(known.iter().flat_map(BTreeMap::values), namespace, links)
    }
}

fn is_refused(error: &watcher::Error) -> bool {
    let (watcher::Error::InitialListFailed(cause) | watcher::Error::WatchStartFailed(cause)) = error else {
        return false;
    };
    matches!(cause, kube::Error::Api(status) if matches!(status.code, 401 | 403 | 404 | 405))
}

fn key(service: &Service) -> (String, String) {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    (text(&service.metadata.namespace), text(&service.metadata.name))
}

fn put(known: &mut Known, mut service: Service) {
    service.metadata.managed_fields = None;
    let key = key(&service);
    match address(&service) {
        Some(_) => drop(known.insert(key, service)),
        None => drop(known.remove(&key)),
    }
}

/// The address of a Service; headless ones and names of other hosts have none.
fn address(service: &Service) -> Option<&str> {
    let spec = service.spec.as_ref().filter(|spec| spec.type_.as_deref() != Some("ExternalName"))?;
    spec.cluster_ip.as_deref().filter(|address| !matches!(*address, "" | "None"))
}

/// The variables of `services` for a Pod of `namespace`, in the form of Docker's links, which the kubelet keeps
/// (kubernetes.io/docs: "Discovering services"). Without `links`, the API server's alone.
pub fn variables<'a>(
    services: impl Iterator<Item = &'a Service>,
    namespace: &str,
    links: bool,
) -> Vec<(String, String)> {
    let mut made = BTreeMap::new();
    for service in services {
        let (own, name) = key(service);
        let of_api_server = (own.as_str(), name.as_str()) == API_SERVER;
        let told = of_api_server || (links && own == namespace);
        if !told {
            continue;
        }
        for (variable, value) in of_service(&name, service) {
            // A namesake in the Pod's own namespace comes before the API server's.
            if own == namespace || !made.contains_key(&variable) {
                made.insert(variable, value);
            }
        }
    }
    made.into_iter().collect()
}

fn of_service(name: &str, service: &Service) -> Vec<(String, String)> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).unwrap_or_default();
    let (Some(address), Some(first)) = (address(service), ports.first()) else { return Vec::new() };
    let word = |text: &str| text.to_uppercase().replace('-', "_");
    let prefix = word(name);
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let protocol = |port: &k8s_openapi::api::core::v1::ServicePort| {
        port.protocol.clone().filter(|text| !text.is_empty()).unwrap_or_else(|| "TCP".to_owned())
    };
    let url = |port: &_| format!("{}://{host}:{}", protocol(port).to_lowercase(), port.port);
    let mut made = vec![
        (format!("{prefix}_SERVICE_HOST"), address.to_owned()),
        (format!("{prefix}_SERVICE_PORT"), first.port.to_string()),
        (format!("{prefix}_PORT"), url(first)),
    ];
    for port in ports {
        if let Some(name) = port.name.as_deref().filter(|name| !name.is_empty()) {
            made.push((format!("{prefix}_SERVICE_PORT_{}", word(name)), port.port.to_string()));
        }
        let link = format!("{prefix}_PORT_{}_{}", port.port, protocol(port).to_uppercase());
        made.push((format!("{link}_PROTO"), protocol(port).to_lowercase()));
        made.push((format!("{link}_PORT"), port.port.to_string()));
        made.push((format!("{link}_ADDR"), address.to_owned()));
        made.push((link, url(port)));
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn service(namespace: &str, name: &str, address: &str) -> Service {
        serde_json::from_value(json!({
            "metadata": { "namespace": namespace, "name": name },
            "spec": { "clusterIP": address, "ports": [{ "name": "web-ui", "port": 80 }, { "port": 53, "protocol": "UDP" }] },
        }))
        .unwrap()
    }

    #[test]
    fn which_pod_is_told_what() {
        let all = [
            service("default", "kubernetes", "10.0.0.1"),
            service("default", "other", "10.0.0.2"),
            service("shop", "cash-desk", "10.0.0.3"),
            service("shop", "headless", "None"),
        ];
        let names = |namespace: &str, links| -> Vec<String> {
            let hosts = variables(all.iter(), namespace, links).into_iter().map(|(name, _)| name);
            hosts.filter(|name| name.ends_with("_SERVICE_HOST")).collect()
        };
        assert_eq!(names("shop", true), ["CASH_DESK_SERVICE_HOST", "KUBERNETES_SERVICE_HOST"]);
        assert_eq!(names("shop", false), ["KUBERNETES_SERVICE_HOST"]);
        assert_eq!(names("default", true), ["KUBERNETES_SERVICE_HOST", "OTHER_SERVICE_HOST"]);
    }

    #[test]
    fn what_a_service_becomes() {
        let made: BTreeMap<_, _> = of_service("cash-desk", &service("a", "b", "fd00::1")).into_iter().collect();
        for (name, value) in [
            ("CASH_DESK_SERVICE_HOST", "fd00::1"),
            ("CASH_DESK_SERVICE_PORT", "80"),
            ("CASH_DESK_SERVICE_PORT_WEB_UI", "80"),
            ("CASH_DESK_PORT", "tcp://[fd00::1]:80"),
            ("CASH_DESK_PORT_53_UDP", "udp://[fd00::1]:53"),
            ("CASH_DESK_PORT_53_UDP_PROTO", "udp"),
            ("CASH_DESK_PORT_53_UDP_ADDR", "fd00::1"),
        ] {
            assert_eq!(made.get(name).map(String::as_str), Some(value), "{name}");
        }
    }
}
