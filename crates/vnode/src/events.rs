//! Events about Pods. Written by a task of their own: a Pod never waits for one, and when too many queue up, some are dropped.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::mpsc;

const QUEUE: usize = 4096;
/// Events whose repetitions are counted on the object that is there, as client-go's correlator does.
const REMEMBERED: usize = 4096;

/// Where events are handed in; cheap to clone.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<Said>,
}

struct Said {
    about: ObjectReference,
    at: Timestamp,
    warning: bool,
    reason: String,
    message: String,
}

impl Events {
    /// The queue, and the task that writes; it ends with the last clone of the queue.
    pub fn new(client: kube::Client, node: String) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, said) = mpsc::channel(QUEUE);
        (Self { queue }, write(client, node, said))
    }

    /// Says something about a Pod or one of its containers.
    pub fn say(&self, pod: &Pod, container: Option<&str>, warning: bool, reason: &str, message: &str, at: Timestamp) {
        let about = ObjectReference {
            api_version: Some("v1".into()),
            kind: Some("Pod".into()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            field_path: container.map(|name| {
                let is_init =
                    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten()).any(|c| c.name == name);
                format!("spec.{}{{{name}}}", if is_init { "initContainers" } else { "containers" })
            }),
            ..ObjectReference::default()
        };
        let said = Said { about, at, warning, reason: reason.to_owned(), message: cut(message).to_owned() };
        if self.queue.try_send(said).is_err() {
            tracing::warn!(reason, "too many events wait to be written, one is dropped");
        }
    }
}

/// The API server takes 1,024 bytes of message.
fn cut(message: &str) -> &str {
    let end = (0..=message.len().min(1024)).rev().find(|end| message.is_char_boundary(*end));
    &message[..end.unwrap_or_default()]
}

async fn write(client: kube::Client, node: String, mut said: mpsc::Receiver<Said>) {
    let mut known: HashMap<u64, (String, i32)> = HashMap::new();
    while let Some(said) = said.recv().await {
        let mut hasher = DefaultHasher::new();
        (&said.about.uid, &said.about.field_path, &said.reason, &said.message).hash(&mut hasher);
        let key = hasher.finish();
        let namespace = said.about.namespace.clone().unwrap_or_default();
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        if let Some((name, count)) = known.get_mut(&key) {
            *count += 1;
            let patch = Patch::Merge(json!({ "count": count, "lastTimestamp": Time(said.at) }));
            if api.patch(name, &PatchParams::default(), &patch).await.is_ok() {
                continue;
            }
        }
        let event = event(said, &node, key);
        let name = event.metadata.name.clone().unwrap_or_default();
        match api.create(&PostParams::default(), &event).await {
            Ok(_) => {
                if known.len() >= REMEMBERED {
                    known.clear();
                }
                known.insert(key, (name, 1));
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404 | 409) => {}
            Err(error) => tracing::debug!(%error, "event could not be written"),
        }
    }
}

/// The name follows from what is said and when, so that saying it again after a restart makes no second event.
fn event(said: Said, node: &str, key: u64) -> Event {
    let Said { about, at, warning, reason, message } = said;
    let pod = about.name.clone().unwrap_or_default();
    let mark = key ^ u64::try_from(at.as_microsecond()).unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{mark:016x}", &pod[..pod.len().min(230)])),
            namespace: about.namespace.clone(),
            ..ObjectMeta::default()
        },
        involved_object: about,
        count: Some(1),
        first_timestamp: Some(Time(at)),
        last_timestamp: Some(Time(at)),
        reason: Some(reason),
        message: Some(message),
        type_: Some(if warning { "Warning" } else { "Normal" }.into()),
        source: Some(EventSource { component: Some("joey".into()), host: Some(node.to_owned()) }),
        reporting_component: Some("joey".into()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert_eq!(cut("short"), "short");
        assert_eq!(cut(&"x".repeat(1024)).len(), 1024);
        assert_eq!(cut(&"x".repeat(1025)).len(), 1024);
        assert_eq!(cut(&format!("{}ä", "x".repeat(1023))).len(), 1023);
    }
}
