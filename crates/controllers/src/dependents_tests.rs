//! The collector on a server that keeps what it is told to, and what was asked of it.

use std::sync::{Arc, Mutex};

use http::{Method, Request, Response, StatusCode};
use kube::client::Body;
use serde_json::Value;

use super::*;

const OWNER: &str = "/api/v1/namespaces/n/configmaps/owner";
const CHILD: &str = "/api/v1/namespaces/n/secrets/child";

#[derive(Default)]
struct Served {
    /// What is there, by path.
    there: HashMap<&'static str, Value>,
    /// Whether what is written has changed since it was read.
    changed: bool,
    written: Vec<(String, Value)>,
}

impl Served {
    fn answer(&mut self, method: &Method, path: &str, body: &[u8]) -> (StatusCode, Value) {
        let failure = |code: StatusCode, reason: &str| {
            let (status, code_number) = ("Failure", code.as_u16());
            (
                code,
                json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": status, "message": reason,
                "reason": reason, "code": code_number}),
            )
        };
        let Some(found) = self.there.get(path) else { return failure(StatusCode::NOT_FOUND, "NotFound") };
        if method != Method::GET {
            self.written
                .push((format!("{method} {path}"), serde_json::from_slice(body).expect("what is sent is JSON")));
            if self.changed {
                return failure(StatusCode::CONFLICT, "Conflict");
            }
        }
        (StatusCode::OK, partial(found))
    }
}

fn partial(metadata: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

fn collector(served: &Arc<Mutex<Served>>) -> Collector {
    let served = served.clone();
    let service = tower::service_fn(move |request: Request<Body>| {
        let served = served.clone();
        async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await?;
            let (code, value) =
                served.lock().expect("no test panics with it").answer(&head.method, head.uri.path(), &body);
            let mut response = Response::new(Body::from(value.to_string().into_bytes()));
            *response.status_mut() = code;
            Ok::<_, kube::Error>(response)
        }
    });
    let kind = |kind: &str, plural: &str| Kind {
        resource: ApiResource {
            group: String::new(),
            version: "v1".to_owned(),
            api_version: "v1".to_owned(),
            kind: kind.to_owned(),
            plural: plural.to_owned(),
        },
        namespaced: true,
    };
    let kinds = vec![kind("ConfigMap", "configmaps"), kind("Secret", "secrets")];
    Collector::new(kube::Client::new(service, "n"), kinds)
}

/// What a first list of a kind shows.
fn list(collector: &mut Collector, number: usize, objects: &[&Value]) {
    collector.see(number, watcher::Event::Init);
    for metadata in objects {
        let object = serde_json::from_value(partial(metadata)).expect("it is metadata");
        collector.see(number, watcher::Event::InitApply(object));
    }
    collector.see(number, watcher::Event::InitDone);
}

fn child(owners: &[&str]) -> Value {
    let reference = |uid: &&str| json!({"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": uid});
    json!({"name": "child", "namespace": "n", "uid": "c", "resourceVersion": "7",
        "ownerReferences": owners.iter().map(reference).collect::<Vec<_>>()})
}

fn written(served: &Mutex<Served>) -> Vec<(String, Value)> {
    std::mem::take(&mut served.lock().expect("no test panics with it").written)
}

#[tokio::test]
async fn a_dependent_set_free_meanwhile_stays() {
    let served = Arc::new(Mutex::new(Served { there: HashMap::from([(CHILD, child(&[]))]), ..Served::default() }));
    let mut collector = collector(&served);
    list(&mut collector, 0, &[]);
    list(&mut collector, 1, &[&child(&["o"])]);
    collector.work().await;
    assert_eq!(written(&served), []);
    assert!(collector.due.is_empty());
}

#[tokio::test]
async fn only_what_was_read_is_deleted() {
    let there = HashMap::from([(CHILD, child(&["o"]))]);
    let served = Arc::new(Mutex::new(Served { there, changed: true, ..Served::default() }));
    let mut collector = collector(&served);
    list(&mut collector, 0, &[]);
    list(&mut collector, 1, &[&child(&["o"])]);
    for again in [true, false] {
        served.lock().expect("no test panics with it").changed = again;
        collector.work().await;
        let (what, how) = written(&served).pop().expect("something is deleted");
        assert_eq!(what, format!("DELETE {CHILD}"));
        assert_eq!(how["preconditions"], json!({"uid": "c", "resourceVersion": "7"}));
        assert_eq!(!collector.due.is_empty(), again, "what changed meanwhile is looked at again");
    }
}

#[tokio::test]
async fn nothing_is_done_before_all_is_seen() {
    let owner = json!({"name": "owner", "namespace": "n", "uid": "o", "resourceVersion": "5",
        "deletionTimestamp": "2026-01-01T00:00:00Z", "finalizers": ["orphan"]});
    let there = HashMap::from([(OWNER, owner.clone()), (CHILD, child(&["o", "other"]))]);
    let served = Arc::new(Mutex::new(Served { there, ..Served::default() }));
    let mut collector = collector(&served);
    list(&mut collector, 0, &[&owner]);
    collector.work().await;
    assert_eq!(written(&served), [], "its dependents may not have been seen yet");
    // The list of owners that is written is made from what the child names now.
    list(&mut collector, 1, &[&child(&["o"])]);
    collector.due.retain(|place| place.0 == 0);
    collector.work().await;
    let left = child(&["other"])["ownerReferences"].clone();
    assert_eq!(
        written(&served),
        [
            (
                format!("PATCH {CHILD}"),
                json!({"metadata": {"uid": "c", "resourceVersion": "7", "ownerReferences": left}})
            ),
            (format!("PATCH {OWNER}"), json!({"metadata": {"uid": "o", "resourceVersion": "5", "finalizers": []}})),
        ]
    );
}
