//! The service over the fake host and the memory store, through its REST API.

use std::sync::Arc;

use futures::StreamExt;
use joey_api::change::InstanceChange;
use joey_api::instance::{InstanceSpec, WatchEvent, WirePhase};
use joey_model::{ErrorKind, InstanceId};
use joey_pool::fake::FakeHost;
use joey_pool::{Host, Pool, PoolClient};
use joey_rpc::RpcError;
use joey_store::Store;

fn spec(name: &str, token: &str) -> InstanceSpec {
    serde_json::from_value(serde_json::json!({
        "name": name, "clientToken": token,
        "containers": [{ "name": "main", "image": "nginx" }],
        "credentials": [{ "registry": "docker.io", "username": "u", "password": "secret-word" }],
        "volumes": [{ "name": "v", "source": { "files": [{ "path": "f", "base64": "c2VjcmV0", "mode": 420 }] } }],
    }))
    .unwrap()
}

async fn open(store: &Arc<dyn Store>, host: &Arc<FakeHost>) -> (Arc<Pool>, PoolClient) {
    let pool = Pool::open(store.clone(), host.clone()).await.unwrap();
    let client = PoolClient::in_process(&pool);
    (pool, client)
}

fn kind(error: RpcError) -> ErrorKind {
    error.kind()
}

#[tokio::test]
async fn from_creation_to_the_end() {
    let (store, host) = (joey_store::memory(), Arc::new(FakeHost::default()));
    let (_pool, client) = open(&store, &host).await;
    let mut changes = client.watch().await.unwrap();
    assert!(matches!(changes.next().await.unwrap().unwrap(), WatchEvent::Synced { .. }));
    let made = client.create(&spec("web", "t1")).await.unwrap();
    let again = client.create(&spec("web", "t1")).await.unwrap();
    assert_eq!(made.id, again.id);
    assert_eq!(kind(client.create(&spec("web", "t2")).await.unwrap_err()), ErrorKind::Conflict);
    assert_eq!(kind(client.create(&spec("Web", "t3")).await.unwrap_err()), ErrorKind::Invalid);
    let text = serde_json::to_string(&client.get("web").await.unwrap()).unwrap();
    assert!(!text.contains("secret-word") && !text.contains("c2VjcmV0"), "{text}");
    let given = host.instances().into_values().next().unwrap();
    assert_eq!(given.credentials[0].password, "secret-word");
    client.delete("web", Some(1)).await.unwrap();
    loop {
        if let WatchEvent::Gone { id, .. } = changes.next().await.unwrap().unwrap() {
            assert_eq!(id, made.id);
            break;
        }
    }
    assert!(store.range("/pool/", None, 0).await.unwrap().entries.is_empty());
    assert_eq!(kind(client.delete("web", None).await.unwrap_err()), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_start_compares_records_and_host() {
    let store = joey_store::memory();
    let host = Arc::new(FakeHost::default());
    let (pool, client) = open(&store, &host).await;
    let kept = client.create(&spec("kept", "t1")).await.unwrap();
    let ending = client.create(&spec("ending", "t2")).await.unwrap();
    host.hold_deletions.store(true, std::sync::atomic::Ordering::Relaxed);
    client.delete("ending", None).await.unwrap();
    client.delete("ending", Some(0)).await.unwrap();
    assert_eq!(client.get(&ending.id).await.unwrap().status.phase, WirePhase::Terminating);
    drop((pool, client));
    // Another host that knows nothing: what should run is created again, what was ending is gone.
    let empty = Arc::new(FakeHost::default());
    let (pool, client) = open(&store, &empty).await;
    assert_eq!(empty.instances().keys().map(|id| id.as_str()).collect::<Vec<_>>(), [kept.id.as_str()]);
    assert_eq!(client.list().await.unwrap().len(), 1);
    drop((pool, client));
    // A store that knows nothing: the host's instances go.
    let (_pool, client) = open(&joey_store::memory(), &empty).await;
    assert!(empty.instances().is_empty() && client.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn contents_change_in_a_living_instance() {
    let (store, host) = (joey_store::memory(), Arc::new(FakeHost::default()));
    let (pool, client) = open(&store, &host).await;
    let made = client.create(&spec("web", "t1")).await.unwrap();
    let change = |source: serde_json::Value| -> InstanceChange {
        serde_json::from_value(serde_json::json!({ "volumes": [{ "name": "v", "source": source }] })).unwrap()
    };
    let files = |path: &str, base64: &str| {
        change(serde_json::json!({ "files": [{ "path": path, "base64": base64, "mode": 420 }] }))
    };
    let given = |host: &FakeHost| serde_json::to_string(&host.instances().into_values().next().unwrap()).unwrap();
    let old = host.instances().into_values().next().unwrap();
    let changed = client.change("web", &files("new", "bmV3")).await.unwrap();
    let shown = serde_json::to_string(&changed).unwrap();
    assert!(shown.contains("\"new\"") && !shown.contains("bmV3"), "names are told, contents are not: {shown}");
    assert!(given(&host).contains("bmV3") && !given(&host).contains("c2VjcmV0"));
    for wrong in [
        files("../x", ""),
        files("..data", ""),
        change(serde_json::json!({ "emptyDir": {} })),
        InstanceChange {
            volumes: serde_json::from_str(r#"[{"name":"none","source":{"files":[]}}]"#).unwrap(),
            ..InstanceChange::default()
        },
    ] {
        assert_eq!(kind(client.change("web", &wrong).await.unwrap_err()), ErrorKind::Invalid, "{wrong:?}");
    }
    assert!(given(&host).contains("bmV3"));
    // A host that was not told is told by the next start of the service.
    host.change(&InstanceId::parse(&made.id).unwrap(), old).await.unwrap();
    assert!(!given(&host).contains("bmV3"));
    drop((pool, client));
    let (_pool, _client) = open(&store, &host).await;
    assert!(given(&host).contains("bmV3"));
}
