//! Tests of what is done with a Pod that runs, on a cluster and a pool that answer in this process.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use jiff::{SignedDuration, Timestamp};
use joey_api::change::InstanceChange;
use joey_api::instance::{Instance, VolumeSource};
use joey_model::{ErrorKind, Fault};
use joey_podspec::{Needs, Token, Tokens};
use joey_rpc::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::*;
use crate::pool::PoolProvider;

/// The cluster and the pool.
struct Around {
    /// What the pool was asked to change.
    changes: watch::Sender<Vec<InstanceChange>>,
    /// The cluster makes no tokens.
    sick: AtomicBool,
    /// The pool refuses the next change.
    busy: AtomicBool,
    /// Tokens that were made, and how long each is good.
    made: AtomicUsize,
    life: SignedDuration,
}

impl Around {
    fn new(life: SignedDuration) -> Arc<Self> {
        let changes = watch::Sender::new(Vec::new());
        let (sick, busy) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { changes, sick, busy, made: AtomicUsize::new(0), life })
    }

    fn cluster(&self, path: &str) -> Response<Body> {
        let refused = |code: u16| {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code,
                "message": "not now", "reason": "Other"});
            let mut answer = joey_rpc::json_answer(&status);
            *answer.status_mut() = StatusCode::from_u16(code).unwrap();
            answer
        };
        match path.rsplit('/').next() {
            Some("token") if self.sick.load(Ordering::Relaxed) => refused(503),
            Some("token") => {
                let number = self.made.fetch_add(1, Ordering::Relaxed) + 1;
                let expires = (Timestamp::now() + self.life).to_string();
                joey_rpc::json_answer(&json!({"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
                    "metadata": {}, "spec": {"audiences": []},
                    "status": {"token": format!("t{number}"), "expirationTimestamp": expires}}))
            }
            Some("status") => joey_rpc::json_answer(&pod(json!({}))),
            _ => refused(404),
        }
    }

    async fn pool(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        let change: InstanceChange = joey_rpc::read_json(request.into_body(), joey_rpc::BODY_LIMIT).await.unwrap();
        self.changes.send_modify(|changes| changes.push(change));
        if self.busy.swap(false, Ordering::Relaxed) {
            return joey_rpc::fault_answer(Fault::new(ErrorKind::Retryable, "Busy", "not now"));
        }
        joey_rpc::json_answer(&instance())
    }

    /// A virtual node that has just begun, and has heard of the Pod and of its instance.
    fn node(self: &Arc<Self>, pod: Pod) -> Arc<Context> {
        let around = self.clone();
        let client = kube::Client::new(
            tower::service_fn(move |request: Request<kube::client::Body>| {
                let answer = around.cluster(request.uri().path());
                async move { Ok::<_, Infallible>(answer) }
            }),
            "default",
        );
        let around = self.clone();
        let pool = joey_rpc::Client::in_process(
            "the pool",
            tower::service_fn(move |request: Request<Incoming>| {
                let around = around.clone();
                async move { Ok::<_, Infallible>(around.pool(request).await) }
            }),
        );
        let config = Arc::new(Config::new("node", "192.0.2.1".parse().unwrap()));
        let registry = Arc::new(Registry::default());
        registry.pod(pod);
        registry.instance("u", instance(), true);
        registry.pods_listed(&["u".to_owned()]);
        registry.instances_listed(&["i".to_owned()]);
        Arc::new(Context {
            provider: Arc::new(PoolProvider::new(pool)),
            registry,
            services: Services::default(),
            shown: Shown::new(client.clone()).0,
            events: Events::new(client.clone(), "node".to_owned()).0,
            accounts: joey_guard::Guard::new(config.token_guard),
            workers: Semaphore::new(1),
            shutdown: CancellationToken::new(),
            client,
            config,
        })
    }

    /// The changes, once there are so many.
    async fn changed(&self, count: usize) -> Vec<InstanceChange> {
        let mut changes = self.changes.subscribe();
        let enough = changes.wait_for(|changes| changes.len() >= count);
        tokio::time::timeout(Duration::from_secs(30), enough).await.unwrap().unwrap().clone()
    }
}

fn pod(status: Value) -> Pod {
    let token = json!({"serviceAccountToken": {"path": "token", "expirationSeconds": 600}});
    let volume = json!({"name": "v", "projected": {"sources": [token]}});
    serde_json::from_value(json!({
        "metadata": {"name": "web", "namespace": "n", "uid": "u", "generation": 2},
        "spec": {"containers": [{"name": "c", "image": "new"}], "volumes": [volume]},
        "status": status,
    }))
    .unwrap()
}

fn instance() -> Instance {
    serde_json::from_value(json!({
        "id": "i", "revision": 1, "createdAt": "2024-01-01T00:00:00Z",
        "spec": {"name": "web.n", "containers": [{"name": "c", "image": "old"}]},
        "status": {"phase": "Running", "containers": []},
    }))
    .unwrap()
}

/// The tokens that volumes were given, one after another.
fn tokens(changes: &[InstanceChange]) -> Vec<String> {
    let volumes = changes.iter().flat_map(|change| &change.volumes);
    let files = volumes.flat_map(|volume| match &volume.source {
        VolumeSource::Files(files) => files.as_slice(),
        _ => &[],
    });
    files.map(|file| String::from_utf8(STANDARD.decode(&file.base64).unwrap()).unwrap()).collect()
}

#[tokio::test]
async fn a_change_that_a_node_before_told_of_and_did_not_make_is_made() {
    let around = Around::new(SignedDuration::from_hours(1));
    around.node(pod(json!({"observedGeneration": 2}))).wake("u");
    let changes = around.changed(1).await;
    assert_eq!(changes[0].images.get("c").map(String::as_str), Some("new"), "{changes:?}");
}

#[tokio::test]
async fn what_has_appeared_is_looked_at_until_a_look_succeeds() {
    let around = Around::new(SignedDuration::from_hours(1));
    around.busy.store(true, Ordering::Relaxed);
    let context = around.node(pod(json!({})));
    context.registry.read("u", |entry| (entry.followed, entry.appeared) = (Some(2), true)).unwrap();
    context.wake("u");
    // That of the image is refused once; that of the token goes its own way.
    let changes = around.changed(3).await;
    assert_eq!(changes.iter().filter(|change| !change.images.is_empty()).count(), 2, "{changes:?}");
}

#[tokio::test]
async fn tokens_are_replaced_when_their_time_has_come_though_nothing_else_happens() {
    let around = Around::new(SignedDuration::from_secs(1));
    around.node(pod(json!({}))).wake("u");
    // The first change is that of the image.
    assert_eq!(tokens(&around.changed(3).await), ["t1", "t2"]);
}

#[tokio::test]
async fn a_token_that_cannot_be_replaced_yet_keeps_nothing_else_waiting() {
    let around = Around::new(SignedDuration::from_hours(1));
    around.sick.store(true, Ordering::Relaxed);
    let context = around.node(pod(json!({})));
    let now = Timestamp::now();
    let have = |expires: Timestamp| {
        let old = Token { text: "old".to_owned(), due: now, expires };
        context.registry.read("u", |entry| entry.files.tokens = Tokens::from([((None, Some(600)), old)])).unwrap();
    };
    have(now + SignedDuration::from_mins(5));
    context.wake("u");
    assert_eq!(tokens(&around.changed(2).await), ["old"]);
    let due = context.registry.read("u", |entry| entry.files.tokens.values().map(|token| token.due).min());
    assert!(due.flatten().is_some_and(|due| due > now && due < now + SignedDuration::from_mins(1)), "{due:?}");

    // One that is over is not shown.
    have(now);
    let (pod, needs) = (Arc::new(pod(json!({}))), Needs::shown(&pod(json!({}))));
    assert!(contents::tokens(&context, "u", &pod, &needs).await.is_err());
    around.sick.store(false, Ordering::Relaxed);
    let fresh = contents::tokens(&context, "u", &pod, &needs).await.unwrap();
    assert_eq!(fresh.values().map(|token| token.text.as_str()).collect::<Vec<_>>(), ["t1"]);
}
