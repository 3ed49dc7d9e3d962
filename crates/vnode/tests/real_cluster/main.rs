//! The virtual node on a real kube-apiserver: registration, Pods, deletion, refusals, logs and exec through kubectl. Instances
//! are simulated; what runs them is other crates' matter. Says so and passes where the control plane was not built.

mod simulated;

use std::sync::Arc;
use std::time::{Duration, Instant};

use joey_api::instance::InstanceSpec;
use joey_tests::kubernetes::{ControlPlane, NOBODY};
use joey_tests::program::Outcome;
use joey_vnode::{Config, Provider};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Service, ServiceAccount};
use kube::Api;
use kube::api::{DeleteParams, ListParams, PostParams};
use serde_json::{Value, json};
use simulated::{STUBBORN, Simulated};
use tokio_util::sync::CancellationToken;

const NODE: &str = "virtual";
const SOON: Duration = Duration::from_secs(20);

/// What each scenario gets.
struct Scene {
    plane: Arc<ControlPlane>,
    client: kube::Client,
    instances: Simulated,
}

impl Scene {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), "default")
    }

    /// Creates a Pod on the node with `spec` laid over one container.
    async fn create(&self, name: &str, spec: Value) -> Pod {
        let mut whole = json!({
            "nodeName": NODE, "terminationGracePeriodSeconds": 5,
            "containers": [{ "name": "main", "image": "example.org/app:1" }],
        });
        for (key, value) in spec.as_object().expect("a specification is an object") {
            whole[key] = value.clone();
        }
        let pod = json!({ "metadata": { "name": name, "labels": { "app": name } }, "spec": whole });
        let pod: Pod = serde_json::from_value(pod).expect("a Pod");
        self.pods().create(&PostParams::default(), &pod).await.expect("the Pod is taken")
    }

    async fn until(&self, name: &str, what: &str, holds: impl Fn(&Pod) -> bool) -> Pod {
        eventually(&format!("pod {name} {what}"), SOON, || async {
            let pod = self.pods().get(name).await.map_err(|error| error.to_string())?;
            if holds(&pod) { Ok(pod) } else { Err(json!(pod.status).to_string()) }
        })
        .await
    }

    async fn running(&self, name: &str) -> Pod {
        self.until(name, "is ready", |pod| condition(pod, "Ready").as_deref() == Some("True")).await
    }

    async fn removed(&self, name: &str) {
        eventually(&format!("pod {name} is removed"), SOON, || async {
            match self.pods().get_opt(name).await {
                Ok(None) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }
}

fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

fn condition(pod: &Pod, kind: &str) -> Option<String> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind).map(|condition| condition.status.clone())
}

fn waiting_reason(pod: &Pod) -> Option<String> {
    let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
    container.state.as_ref()?.waiting.as_ref()?.reason.clone()
}

/// Asks until `condition` holds; fails the test with what it said last.
async fn eventually<F: Future<Output = Result<T, String>>, T>(
    what: &str,
    limit: Duration,
    condition: impl Fn() -> F,
) -> T {
    let end = Instant::now() + limit;
    loop {
        match condition().await {
            Ok(value) => return value,
            Err(last) if Instant::now() >= end => panic!("{what}: not within {limit:?}; last: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The administrator's client.
async fn client(plane: &ControlPlane) -> kube::Client {
    let file = kube::config::Kubeconfig::read_from(plane.kubeconfig()).expect("a kubeconfig");
    let config = kube::Config::from_custom_kubeconfig(file, &Default::default()).await.expect("a configuration");
    kube::Client::try_from(config).expect("a client")
}

#[tokio::test]
async fn a_real_cluster() {
    let Some(plane) = tokio::task::spawn_blocking(ControlPlane::start).await.expect("it starts") else { return };
    let plane = Arc::new(plane);
    let client = client(&plane).await;
    let instances = Simulated::new();
    let mut config = Config::new(NODE, "127.0.0.1".parse().expect("an address"));
    config.workers = 8;
    let shutdown = CancellationToken::new();
    let provider: Arc<dyn Provider> = Arc::new(instances.clone());
    let running = tokio::spawn(joey_vnode::run(client.clone(), provider, config, shutdown.clone()));
    let scene = Scene { plane, client, instances };
    // The controllers make both; a Pod that comes before them rightly waits, and says so.
    eventually("the default namespace is ready for Pods", Duration::from_secs(60), || async {
        let accounts: Api<ServiceAccount> = Api::namespaced(scene.client.clone(), "default");
        accounts.get("default").await.map_err(|error| error.to_string())?;
        let maps: Api<ConfigMap> = Api::namespaced(scene.client.clone(), "default");
        maps.get("kube-root-ca.crt").await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    tokio::join!(
        the_node(&scene),
        a_pod_runs_and_is_deleted(&scene),
        a_stubborn_pod_has_its_grace(&scene),
        a_missing_config_map_is_waited_for(&scene),
        a_malformed_image_is_waited_for(&scene),
        what_is_not_supported_is_refused(&scene),
        a_pod_ends_by_itself(&scene),
        services_are_told(&scene),
        kubectl(&scene),
    );
    shutdown.cancel();
    running.await.expect("the node does not panic").expect("the node ran");
}

async fn the_node(scene: &Scene) {
    let nodes: Api<Node> = Api::all(scene.client.clone());
    let node = eventually("the node is ready", SOON, || async {
        let node = nodes.get(NODE).await.map_err(|error| error.to_string())?;
        let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let ready = conditions.filter(|c| c.type_ == "Ready" && c.status == "True").count() == 1;
        if ready { Ok(node) } else { Err(json!(node.status).to_string()) }
    })
    .await;
    let status = node.status.expect("a status");
    assert_eq!(status.capacity.expect("a capacity")["cpu"].0, "4");
    let taints = node.spec.expect("a spec").taints.unwrap_or_default();
    assert!(taints.iter().any(|taint| taint.key == "virtual-kubelet.io/provider"), "{taints:?}");
    let leases: Api<Lease> = Api::namespaced(scene.client.clone(), "kube-node-lease");
    let renewed = || async {
        let lease = leases.get(NODE).await.map_err(|error| error.to_string())?;
        lease.spec.and_then(|spec| spec.renew_time).map(|time| time.0).ok_or_else(|| "no renew time".to_owned())
    };
    let first = eventually("the lease is there", SOON, renewed).await;
    eventually("the lease is renewed", SOON, || async {
        let now = renewed().await?;
        if now > first { Ok(()) } else { Err(now.to_string()) }
    })
    .await;
    eventually("the cluster trusts the node", SOON, || async {
        let node = nodes.get(NODE).await.map_err(|error| error.to_string())?;
        let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        if taints.iter().any(|t| t.key.starts_with("node.kubernetes.io/")) {
            Err(format!("{taints:?}"))
        } else {
            Ok(())
        }
    })
    .await;
}

async fn a_pod_runs_and_is_deleted(scene: &Scene) {
    scene.create("plain", json!({})).await;
    let pod = scene.running("plain").await;
    assert_eq!(phase(&pod), "Running");
    let status = pod.status.expect("a status");
    assert_eq!((status.pod_ip.as_deref(), status.host_ip.as_deref()), (Some("10.88.0.9"), Some("127.0.0.1")));
    let spec = scene.instances.spec("plain.default").expect("an instance was made");
    let token = spec.volumes.iter().find(|volume| volume.name.starts_with("kube-api-access"));
    let Some(joey_api::instance::VolumeSource::Files(files)) = token.map(|volume| &volume.source) else {
        panic!("no service account volume in {:?}", spec.volumes)
    };
    let mut names: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    names.sort_unstable();
    assert_eq!(names, ["ca.crt", "namespace", "token"]);
    let events: Api<Event> = Api::namespaced(scene.client.clone(), "default");
    let about = events.list(&ListParams::default().fields("involvedObject.name=plain")).await.expect("events");
    assert!(about.items.iter().all(|event| event.type_.as_deref() == Some("Normal")), "{:?}", about.items);
    scene.pods().delete("plain", &DeleteParams::default()).await.expect("the deletion is taken");
    scene.removed("plain").await;
    assert_eq!(scene.instances.graces("plain.default"), [Some(5)]);
    // The name is free again, and the next Pod of that name is another instance.
    scene.create("plain", json!({})).await;
    scene.running("plain").await;
    assert_eq!(scene.instances.made("plain.default"), 2);
    scene.pods().delete("plain", &DeleteParams::default().grace_period(0)).await.expect("the deletion is taken");
    eventually("the instance of a removed Pod ends", SOON, || async {
        if scene.instances.is_there("plain.default") { Err("it is there".into()) } else { Ok(()) }
    })
    .await;
}

async fn a_stubborn_pod_has_its_grace(scene: &Scene) {
    let container = json!([{ "name": "main", "image": "example.org/app:1", "args": [STUBBORN] }]);
    scene.create("stubborn", json!({ "containers": container })).await;
    scene.running("stubborn").await;
    let begun = Instant::now();
    scene.pods().delete("stubborn", &DeleteParams::default().grace_period(2)).await.expect("the deletion is taken");
    let pod = scene.pods().get("stubborn").await.expect("the Pod stays while its grace lasts");
    assert_eq!(pod.metadata.deletion_grace_period_seconds, Some(2));
    scene.removed("stubborn").await;
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(scene.instances.graces("stubborn.default"), [Some(2)]);
}

async fn a_missing_config_map_is_waited_for(scene: &Scene) {
    let env = json!([{ "configMapRef": { "name": "later" } }]);
    let container = json!([{ "name": "main", "image": "example.org/app:1", "envFrom": env }]);
    scene.create("waits", json!({ "containers": container })).await;
    let wanted = Some("CreateContainerConfigError");
    scene.until("waits", "says what it misses", |pod| waiting_reason(pod).as_deref() == wanted).await;
    let held = |spec: &InstanceSpec| spec.containers[0].held.clone().map(|held| held.reason);
    let spec = scene.instances.spec("waits.default").expect("an instance was made");
    assert_eq!(held(&spec).as_deref(), wanted, "and nothing of it is started");
    let maps: Api<ConfigMap> = Api::namespaced(scene.client.clone(), "default");
    let map = json!({ "metadata": { "name": "later" }, "data": { "COLOUR": "green" } });
    maps.create(&PostParams::default(), &serde_json::from_value(map).expect("a map")).await.expect("the map is taken");
    scene.running("waits").await;
    let events: Api<Event> = Api::namespaced(scene.client.clone(), "default");
    let fields = ListParams::default().fields("involvedObject.name=waits,type=Warning");
    let said = events.list(&fields).await.expect("events").items;
    assert_eq!(said.iter().map(|event| event.count.unwrap_or(1)).collect::<Vec<_>>(), [1], "said once: {said:?}");
    let spec = scene.instances.spec("waits.default").expect("an instance was made");
    assert_eq!((held(&spec), scene.instances.made("waits.default")), (None, 1));
    let colour = spec.containers[0].env.iter().find(|variable| variable.name == "COLOUR");
    assert_eq!(colour.and_then(|variable| variable.value.as_deref()), Some("green"));
}

async fn what_is_not_supported_is_refused(scene: &Scene) {
    scene.create("refused", json!({ "hostNetwork": true, "hostPID": true })).await;
    let pod = scene.until("refused", "has failed", |pod| phase(pod) == "Failed").await;
    let status = pod.status.expect("a status");
    let message = status.message.unwrap_or_default();
    assert_eq!(status.reason.as_deref(), Some("UnsupportedPod"));
    assert!(message.contains("spec.hostNetwork") && message.contains("spec.hostPID"), "{message}");
    assert_eq!(scene.instances.made("refused.default"), 0);
    let events: Api<Event> = Api::namespaced(scene.client.clone(), "default");
    eventually("the refusal is an event", SOON, || async {
        let fields = ListParams::default().fields("involvedObject.name=refused,reason=UnsupportedPod");
        let found = events.list(&fields).await.map_err(|error| error.to_string())?;
        if found.items.len() == 1 { Ok(()) } else { Err(format!("{} events", found.items.len())) }
    })
    .await;
    scene.pods().delete("refused", &DeleteParams::default()).await.expect("the deletion is taken");
    scene.removed("refused").await;
}

async fn a_pod_ends_by_itself(scene: &Scene) {
    for (name, code, wanted) in [("succeeds", 0, "Succeeded"), ("fails", 7, "Failed")] {
        scene.create(name, json!({ "restartPolicy": "Never" })).await;
        scene.running(name).await;
        scene.instances.exit(&format!("{name}.default"), code);
        let pod = scene.until(name, wanted, |pod| phase(pod) == wanted).await;
        let containers = pod.status.and_then(|status| status.container_statuses).unwrap_or_default();
        let ended = containers[0].state.as_ref().and_then(|state| state.terminated.as_ref());
        assert_eq!(ended.map(|run| run.exit_code), Some(code));
        scene.pods().delete(name, &DeleteParams::default()).await.expect("the deletion is taken");
        scene.removed(name).await;
        assert_eq!(scene.instances.made(&format!("{name}.default")), 1);
    }
}

/// The variables of Services: that of the API server always, those of the Pod's namespace unless it wants none.
async fn services_are_told(scene: &Scene) {
    let namespaces: Api<Namespace> = Api::all(scene.client.clone());
    let namespace = serde_json::from_value(json!({ "metadata": { "name": "shop" } })).expect("a namespace");
    namespaces.create(&PostParams::default(), &namespace).await.expect("the namespace is taken");
    let services: Api<Service> = Api::namespaced(scene.client.clone(), "shop");
    let service = json!({
        "metadata": { "name": "cash-desk" },
        "spec": { "clusterIP": "10.96.7.7", "ports": [{ "name": "http", "port": 80 }] },
    });
    let service = serde_json::from_value(service).expect("a service");
    services.create(&PostParams::default(), &service).await.expect("the service is taken");
    let pods: Api<Pod> = Api::namespaced(scene.client.clone(), "shop");
    for (name, links) in [("linked", true), ("alone", false)] {
        let pod = json!({ "metadata": { "name": name }, "spec": {
            "nodeName": NODE, "enableServiceLinks": links, "automountServiceAccountToken": false,
            "containers": [{ "name": "main", "image": "example.org/app:1" }],
        }});
        let pod: Pod = serde_json::from_value(pod).expect("a Pod");
        eventually("the Pod is taken", SOON, || async {
            pods.create(&PostParams::default(), &pod).await.map(drop).map_err(|error| error.to_string())
        })
        .await;
        let spec = eventually("its instance is made", SOON, || async {
            scene.instances.spec(&format!("{name}.shop")).ok_or_else(|| "no instance".to_owned())
        })
        .await;
        let value = |wanted: &str| {
            let found = spec.containers[0].env.iter().find(|variable| variable.name == wanted);
            found.and_then(|variable| variable.value.as_deref())
        };
        assert_eq!(
            (value("KUBERNETES_SERVICE_HOST"), value("KUBERNETES_SERVICE_PORT")),
            (Some("10.96.0.1"), Some("443"))
        );
        assert_eq!(value("CASH_DESK_SERVICE_HOST"), links.then_some("10.96.7.7"), "{name}");
        assert_eq!(value("CASH_DESK_PORT_80_TCP"), links.then_some("tcp://10.96.7.7:80"), "{name}");
    }
}

/// Logs, exec and attach, through kube-apiserver.
async fn kubectl(scene: &Scene) {
    scene.create("talks", json!({})).await;
    scene.running("talks").await;
    let run = async |arguments: &[&str], input: &str| -> Outcome {
        let arguments: Vec<String> = arguments.iter().map(|&argument| argument.to_owned()).collect();
        let (plane, input) = (scene.plane.clone(), input.to_owned());
        let running = tokio::task::spawn_blocking(move || {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            plane.kubectl_with_input(&arguments, &input)
        });
        running.await.expect("kubectl ends")
    };
    eventually("logs are there", SOON, || async {
        let logs = run(&["logs", "talks"], "").await;
        if logs.stdout == "first\nsecond\nthird\n" { Ok(()) } else { Err(format!("{logs:?}")) }
    })
    .await;
    assert_eq!(run(&["logs", "talks", "--tail=1"], "").await.stdout, "third\n");
    let echoed = run(&["exec", "-i", "talks", "--", "cat"], "through\n").await;
    assert_eq!((echoed.code, echoed.stdout.as_str()), (0, "through\n"), "{echoed:?}");
    let both = run(&["exec", "talks", "--", "sh", "-c", "echo out; echo err >&2; exit 7"], "").await;
    assert_eq!((both.code, both.stdout.as_str()), (7, "out\n"), "{both:?}");
    assert!(both.stderr.starts_with("err\n"), "{both:?}");
    let absent = run(&["exec", "talks", "--", "/no/such/program"], "").await;
    assert!(absent.code != 0 && absent.stderr.contains("No such file"), "{absent:?}");
    let long = "x".repeat(3_000_000);
    let counted = run(&["exec", "-i", "talks", "--", "wc", "-c"], &long).await;
    assert_eq!(counted.stdout.trim(), "3000000", "{counted:?}");
    // Nobody reads what is sent; what is written must arrive all the same.
    let deaf =
        run(&["exec", "-i", "talks", "--", "sh", "-c", "sleep 1; head -c 2000000 /dev/zero | tr '\\0' y"], &long);
    assert_eq!(deaf.await.stdout.len(), 2_000_000);
    let attached = run(&["attach", "-i", "talks"], "attached\n").await;
    assert!(attached.stdout.contains("attached"), "{attached:?}");
    let stranger = run(&[&format!("--token={NOBODY}"), "logs", "talks"], "").await;
    assert_ne!(stranger.code, 0, "{stranger:?}");
}

/// A Pod with a malformed image waits; once the image is mended, it runs.
async fn a_malformed_image_is_waited_for(scene: &Scene) {
    scene.create("malformed", json!({ "containers": [{ "name": "main", "image": "Bad//Ref:::" }] })).await;
    let wanted = Some("InvalidImageName");
    let pod = scene.until("malformed", "names its image", |pod| waiting_reason(pod).as_deref() == wanted).await;
    assert_eq!(phase(&pod), "Pending");
    assert_eq!(condition(&pod, "Ready").as_deref(), Some("False"));
    let spec = scene.instances.spec("malformed.default").expect("an instance was made");
    assert!(spec.containers[0].held.is_some(), "nothing of it is started");
    let events: Api<Event> = Api::namespaced(scene.client.clone(), "default");
    eventually("the image is named in an event", SOON, || async {
        let fields = ListParams::default().fields("involvedObject.name=malformed,reason=InspectFailed");
        let found = events.list(&fields).await.map_err(|error| error.to_string())?;
        let said = found.items.iter().filter_map(|event| event.message.as_deref());
        if said.filter(|said| said.contains("Bad//Ref:::")).count() == 1 { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let mended = json!({ "spec": { "containers": [{ "name": "main", "image": "example.org/app:1" }] } });
    let patch = kube::api::Patch::Strategic(mended);
    scene.pods().patch("malformed", &Default::default(), &patch).await.expect("the change is taken");
    let pod = scene.running("malformed").await;
    let conditions = pod.status.and_then(|status| status.conditions).unwrap_or_default();
    for own in conditions.iter().filter(|own| own.status == "True") {
        assert_eq!((own.reason.as_deref(), own.message.as_deref()), (None, None), "{own:?}");
    }
}
