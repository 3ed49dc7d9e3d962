//! The API server on loopback with the memory store, driven by kubectl where there is one, by raw calls and by kube's client.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use joey_apiserver::{ApiServer, Config, Identity};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::json;
use tokio::net::TcpListener;

struct Server {
    api: ApiServer,
    dir: tempfile::TempDir,
    address: std::net::SocketAddr,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Server {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let config = Config::new(dir.path().join("pki"), address);
        let api = ApiServer::open(config, joey_store::memory()).await.unwrap();
        std::fs::write(dir.path().join("kubeconfig"), api.kubeconfig()).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let served = api.clone();
        let task = tokio::spawn(async move { served.serve(listener, async { drop(stopped.await) }).await });
        Self { api, dir, address, stop: Some(stop), task: Some(task) }
    }

    fn client(&self) -> kube::Client {
        kube::Client::new(self.api.service(Identity::controllers()), "default")
    }

    async fn stop(mut self) {
        drop(self.stop.take());
        tokio::time::timeout(Duration::from_secs(5), self.task.take().unwrap()).await.expect("drains").unwrap();
    }

    /// Runs kubectl; its output and error output, and whether it succeeded.
    async fn kubectl(&self, binary: &PathBuf, arguments: &[&str], input: &str) -> (bool, String) {
        use tokio::io::AsyncWriteExt;
        let mut command = tokio::process::Command::new(binary);
        command.arg("--kubeconfig").arg(self.dir.path().join("kubeconfig")).args(arguments);
        command.env("HOME", self.dir.path()).kill_on_drop(true);
        command.stdin(std::process::Stdio::piped());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).await.unwrap();
        let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await;
        let output = output.expect("kubectl ends").unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text.into_owned())
    }
}

fn kubectl() -> Option<PathBuf> {
    let found = Command::new("kubectl").arg("version").arg("--client").output().is_ok_and(|out| out.status.success());
    if !found {
        eprintln!("SKIPPED: this test needs kubectl on the path");
    }
    found.then(|| PathBuf::from("kubectl"))
}

fn pod(name: &str) -> serde_json::Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c", "image": "nginx:1"}]}})
}

fn typed(name: &str) -> Pod {
    serde_json::from_value(pod(name)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_life_of_a_pod() {
    let server = Server::start().await;
    let pods: Api<Pod> = Api::default_namespaced(server.client());
    let made = pods.create(&PostParams::default(), &typed("a")).await.unwrap();
    assert_eq!(made.status.as_ref().unwrap().phase.as_deref(), Some("Pending"));
    assert_eq!(made.spec.as_ref().unwrap().restart_policy.as_deref(), Some("Always"));
    let again = pods.create(&PostParams::default(), &typed("a")).await.unwrap_err();
    assert!(again.to_string().contains("pods \"a\" already exists"), "{again}");
    let binding = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "a"},
        "target": {"kind": "Node", "name": "n"}});
    pods.create_subresource::<_, serde_json::Value>("binding", "a", &PostParams::default(), &binding).await.unwrap();
    let on_node = pods.list(&ListParams::default().fields("spec.nodeName=n")).await.unwrap();
    assert_eq!(on_node.items.len(), 1);
    let status = json!({"status": {"phase": "Running", "podIP": "10.0.0.9"}, "spec": {"nodeName": "other"}});
    pods.patch_status("a", &PatchParams::default(), &Patch::Merge(status)).await.unwrap();
    let seen = pods.get("a").await.unwrap();
    assert_eq!(seen.spec.as_ref().unwrap().node_name.as_deref(), Some("n"), "a status write leaves the spec");
    assert_eq!(seen.status.as_ref().unwrap().pod_ip.as_deref(), Some("10.0.0.9"));
    let refused = pods
        .patch("a", &PatchParams::default(), &Patch::Strategic(json!({"spec": {"restartPolicy": "Never"}})))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("pod updates may not change fields"), "{refused}");
    let marked = pods.delete("a", &DeleteParams::default()).await.unwrap().left().unwrap();
    assert_eq!(marked.metadata.deletion_grace_period_seconds, Some(30));
    assert!(pods.get("a").await.is_ok(), "it stays until its node says it is gone");
    pods.delete("a", &DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() }).await.unwrap();
    assert!(pods.get_opt("a").await.unwrap().is_none());
    pods.create(&PostParams::default(), &typed("b")).await.unwrap();
    pods.delete("b", &DeleteParams::default()).await.unwrap();
    assert!(pods.get_opt("b").await.unwrap().is_none(), "a Pod without a node goes at once");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_and_watches() {
    let server = Server::start().await;
    let maps: Api<ConfigMap> = Api::default_namespaced(server.client());
    for index in 0..5 {
        let map = json!({"metadata": {"name": format!("m{index}"), "labels": {"odd": (index % 2).to_string()}}});
        maps.create(&PostParams::default(), &serde_json::from_value(map).unwrap()).await.unwrap();
    }
    let page = maps.list(&ListParams::default().limit(2)).await.unwrap();
    assert_eq!((page.items.len(), page.metadata.remaining_item_count), (2, Some(3)));
    let token = page.metadata.continue_.unwrap();
    let rest = maps.list(&ListParams::default().continue_token(&token)).await.unwrap();
    assert_eq!(rest.items.len(), 3);
    let odd = maps.list(&ListParams::default().labels("odd=1")).await.unwrap();
    assert_eq!(odd.items.len(), 2);
    let version = odd.metadata.resource_version.unwrap();
    let mut events = maps.watch(&WatchParams::default().labels("odd=1"), &version).await.unwrap().boxed();
    let label = |odd: &str| Patch::Merge(json!({"metadata": {"labels": {"odd": odd}}}));
    maps.patch("m0", &PatchParams::default(), &label("1")).await.unwrap();
    maps.patch("m0", &PatchParams::default(), &label("0")).await.unwrap();
    let map = json!({"metadata": {"name": "m1"}, "data": {"k": "v"}});
    maps.patch("m1", &PatchParams::default(), &Patch::Merge(map)).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        let event = tokio::time::timeout(Duration::from_secs(5), events.try_next()).await.unwrap().unwrap().unwrap();
        seen.push(match event {
            WatchEvent::Added(map) => format!("+{}", map.metadata.name.unwrap()),
            WatchEvent::Modified(map) => format!("~{}", map.metadata.name.unwrap()),
            WatchEvent::Deleted(map) => format!("-{}", map.metadata.name.unwrap()),
            other => format!("{other:?}"),
        });
    }
    assert_eq!(seen, ["+m0", "-m0", "~m1"]);
    let old = json!({"metadata": {"name": "m1", "resourceVersion": version}});
    let conflict = maps.replace("m1", &PostParams::default(), &serde_json::from_value(old).unwrap()).await.unwrap_err();
    assert!(conflict.to_string().contains("the object has been modified"), "{conflict}");
    maps.delete_collection(&DeleteParams::default(), &ListParams::default().labels("odd=1")).await.unwrap();
    assert_eq!(maps.list(&ListParams::default()).await.unwrap().items.len(), 3 /* even ones */);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_end_when_they_are_finalized() {
    let server = Server::start().await;
    let namespaces: Api<Namespace> = Api::all(server.client());
    let made = serde_json::from_value(json!({"metadata": {"name": "t"}})).unwrap();
    namespaces.create(&PostParams::default(), &made).await.unwrap();
    namespaces.delete("t", &DeleteParams::default()).await.unwrap();
    let ending = namespaces.get("t").await.unwrap();
    assert_eq!(ending.status.as_ref().unwrap().phase.as_deref(), Some("Terminating"));
    let pods: Api<Pod> = Api::namespaced(server.client(), "t");
    let refused = pods.create(&PostParams::default(), &typed("a")).await.unwrap_err();
    assert!(refused.to_string().contains("because it is being terminated"), "{refused}");
    let mut empty = serde_json::to_value(&ending).unwrap();
    empty["apiVersion"] = "v1".into();
    empty["kind"] = "Namespace".into();
    empty["spec"]["finalizers"] = json!([]);
    namespaces.replace_subresource::<serde_json::Value>("finalize", "t", &PostParams::default(), &empty).await.unwrap();
    assert!(namespaces.get_opt("t").await.unwrap().is_none());
    let other: Api<Pod> = Api::namespaced(server.client(), "absent");
    let refused = other.create(&PostParams::default(), &typed("a")).await.unwrap_err();
    assert!(refused.to_string().contains("namespaces \"absent\" not found"), "{refused}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_see_health_and_version_only() {
    let server = Server::start().await;
    let Ok(found) = Command::new("curl").arg("--version").output() else {
        eprintln!("SKIPPED: this test needs curl");
        return;
    };
    assert!(found.status.success());
    let ask = |path: &str, token: Option<&str>| {
        let url = format!("https://{}{path}", server.address);
        let mut command = Command::new("curl");
        command.args(["-sk", "-w", "%{http_code}", &url]);
        if let Some(token) = token {
            command.args(["-H", &format!("Authorization: Bearer {token}")]);
        }
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let (health, version) = tokio::task::block_in_place(|| (ask("/healthz", None), ask("/version", None)));
    assert_eq!(health, "ok200");
    assert!(version.ends_with("200"), "{version}");
    tokio::task::block_in_place(|| {
        for path in ["/api", "/apis", "/openapi/v3", "/api/v1/pods", "/api/v1/wrong", "/"] {
            let answer = ask(path, None);
            assert!(answer.ends_with("403") && answer.contains("\"reason\":\"Forbidden\""), "{path}: {answer}");
        }
        assert!(ask("/api/v1/pods", Some("wrong")).ends_with("401"));
        let token = server.api.pki().admin_token.clone();
        assert!(ask("/api/v1/pods", Some(&token)).ends_with("200"));
    });
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_at_work() {
    let Some(binary) = kubectl() else { return };
    let server = Server::start().await;
    let run = async |arguments: &[&str], input: &str| server.kubectl(&binary, arguments, input).await;
    let manifest = pod("web").to_string();
    for (arguments, input, expected) in [
        (&["apply", "-f", "-"][..], manifest.as_str(), "pod/web created"),
        (&["apply", "-f", "-"], &manifest, "pod/web unchanged"),
        (&["apply", "-f", "-"], &manifest.replace("nginx:1", "nginx:2"), "pod/web configured"),
        (&["get", "pods", "-o", "wide"], "", "NOMINATED NODE"),
        (&["get", "pod", "web"], "", "0/1     Pending"),
        (&["get", "pod", "web", "-o", "yaml"], "", "image: nginx:2"),
        (&["describe", "pod", "web"], "", "Image:        nginx:2"),
        (&["label", "pod", "web", "tier=front"], "", "pod/web labeled"),
        (&["annotate", "pod", "web", "note=x"], "", "pod/web annotated"),
        (&["get", "pods", "-l", "tier in (front,back)", "-o", "name"], "", "pod/web"),
        (&["explain", "pod.spec.containers.image"], "", "image <string>"),
        (&["api-resources"], "", "serviceaccounts"),
        (&["api-versions"], "", "coordination.k8s.io/v1"),
        (&["cluster-info"], "", "control plane"),
        (&["version"], "", "v1.36.0+joey"),
        (&["auth", "whoami"], "", "joey-admin"),
        (&["auth", "can-i", "create", "pods"], "", "yes"),
        (&["create", "configmap", "c", "--from-literal=a=b"], "", "configmap/c created"),
        (&["create", "secret", "generic", "s", "--from-literal=a=b"], "", "secret/s created"),
        (&["create", "serviceaccount", "robot"], "", "serviceaccount/robot created"),
        (&["create", "token", "robot"], "", "ey"),
        (&["create", "namespace", "team"], "", "namespace/team created"),
        (&["get", "all"], "", "pod/web"),
        (&["get", "secret", "s"], "", "Opaque"),
        (&["wait", "pod/web", "--for=jsonpath={.status.phase}=Pending", "--timeout=10s"], "", "condition met"),
        (&["delete", "pod", "web"], "", "pod \"web\" deleted"),
    ] {
        let (done, output) = run(arguments, input).await;
        assert!(done && output.contains(expected), "kubectl {arguments:?}: {output}");
    }
    let bad =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [{"name": "c"}]}});
    for (input, expected) in [
        (bad.to_string(), "The Pod \"x\" is invalid: spec.containers[0].image: Required value"),
        (manifest.replace("\"image\"", "\"imag\""), "unknown field \"spec.containers[0].imag\""),
        (manifest.replace("\"spec\":{", "\"spec\":{\"hostNetwork\":true,"), "spec.hostNetwork is not allowed"),
    ] {
        let (done, output) = run(&["apply", "-f", "-"], &input).await;
        assert!(!done && output.contains(expected), "{input}: {output}");
    }
    let (done, output) = run(&["get", "pod", "absent"], "").await;
    assert!(!done && output.contains("Error from server (NotFound): pods \"absent\" not found"), "{output}");
    server.stop().await;
}

/// A kubelet endpoint that says what it was asked and echoes upgraded bytes.
async fn kubelet(server: &Server) -> u16 {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let pki = server.api.pki();
    let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(pki.ca.as_bytes()).unwrap()).unwrap();
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build().unwrap();
    let tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(pki.kubelet_server.certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(pki.kubelet_server.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(tls));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let service = hyper::service::service_fn(kubelet_answer);
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(hyper_util::rt::TokioIo::new(stream), service)
                    .with_upgrades();
                let _ = connection.await;
            });
        }
    });
    port
}

type Answer = http::Response<http_body_util::Full<bytes::Bytes>>;

async fn kubelet_answer(mut request: http::Request<hyper::body::Incoming>) -> Result<Answer, std::convert::Infallible> {
    let asked = request.uri().to_string();
    let Some(protocol) = request.headers().get("upgrade").cloned() else {
        return Ok(Answer::new(format!("asked {asked}").into_bytes().into()));
    };
    let upgrade = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = hyper_util::rt::TokioIo::new(upgrade.await.unwrap());
        let mut said = [0; 4];
        stream.read_exact(&mut said).await.unwrap();
        stream.write_all(format!("{asked} {}", String::from_utf8_lossy(&said)).as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
    });
    let answer = http::Response::builder().status(101).header("connection", "Upgrade").header("upgrade", protocol);
    Ok(answer.body(Default::default()).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_and_exec_go_to_the_node() {
    use k8s_openapi::api::core::v1::Node;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start().await;
    let port = kubelet(&server).await;
    let node = json!({"metadata": {"name": "n"}, "status": {"addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
        "daemonEndpoints": {"kubeletEndpoint": {"Port": port}}}});
    let nodes: Api<Node> = Api::all(server.client());
    nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap()).await.unwrap();
    let pods: Api<Pod> = Api::default_namespaced(server.client());
    pods.create(&PostParams::default(), &typed("unbound")).await.unwrap();
    let early = pods.logs("unbound", &kube::api::LogParams::default()).await.unwrap_err();
    assert!(early.to_string().contains("does not have a host assigned"), "{early}");
    let mut bound = typed("a");
    bound.spec.as_mut().unwrap().node_name = Some("n".into());
    pods.create(&PostParams::default(), &bound).await.unwrap();
    let params = kube::api::LogParams { tail_lines: Some(5), ..Default::default() };
    assert_eq!(pods.logs("a", &params).await.unwrap(), "asked /containerLogs/default/a/c?tailLines=5");
    let params = kube::api::LogParams { container: Some("x".into()), ..Default::default() };
    let wrong = pods.logs("a", &params).await.unwrap_err();
    assert!(wrong.to_string().contains("container x is not valid for pod a"), "{wrong}");

    // The way of kubectl exec: an upgrade over the listener.
    let mut roots = rustls::RootCertStore::empty();
    use rustls::pki_types::pem::PemObject;
    roots.add(rustls::pki_types::CertificateDer::from_pem_slice(server.api.pki().ca.as_bytes()).unwrap()).unwrap();
    let tls = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(tls));
    let mut stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
    let path = "/api/v1/namespaces/default/pods/a/exec?command=ls&command=-l&stdout=true&stdin=true";
    let head = format!(
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        server.api.pki().admin_token
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(b"ping").await.unwrap();
    let mut all = Vec::new();
    let read = stream.read_to_end(&mut all);
    // The peer may close without TLS's own goodbye; what was said counts.
    let _ = tokio::time::timeout(Duration::from_secs(5), read).await.expect("the stream ends");
    let all = String::from_utf8_lossy(&all);
    assert!(all.starts_with("HTTP/1.1 101"), "{all}");
    assert!(all.ends_with("/exec/default/a/c?command=ls&command=-l&input=1&output=1 ping"), "{all}");
    server.stop().await;
}
