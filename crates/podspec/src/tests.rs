//! Tests of the conversion as a whole: what is honoured, what is refused, what is remarked upon. Fetching is not here.

use serde_json::{Value, json};

use super::*;
use crate::objects::Kind;
use joey_api::instance::{Mount, Resources, VolumeSource};

fn node() -> Node {
    Node::new("virtual", "192.0.2.1".parse().unwrap())
}

/// A Pod of one container; `spec` and `container` are laid over it.
fn pod(spec: Value, container: Value) -> core::Pod {
    let mut own = json!({ "name": "main", "image": "example.org/app:1" });
    own.as_object_mut().unwrap().extend(container.as_object().unwrap().clone());
    let mut whole = json!({ "containers": [own] });
    whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    let metadata = json!({ "name": "web", "namespace": "shop", "uid": "u-1", "labels": { "app": "web" } });
    serde_json::from_value(json!({ "metadata": metadata, "spec": whole })).unwrap()
}

fn taken(pod: &core::Pod) -> InstanceSpec {
    convert(pod, &Objects::default(), &node()).unwrap().spec
}

fn faults(pod: &core::Pod) -> Vec<String> {
    match convert(pod, &Objects::default(), &node()) {
        Err(Refusal::Unsupported(faults)) => faults,
        other => panic!("{other:?}"),
    }
}

fn variable(spec: &InstanceSpec, name: &str) -> Option<String> {
    spec.containers[0].env.iter().find(|variable| variable.name == name).and_then(|variable| variable.value.clone())
}

#[test]
fn a_small_pod() {
    let spec = taken(&pod(json!({}), json!({})));
    assert_eq!((spec.name.as_str(), spec.client_token.as_deref()), ("web.shop", Some("u-1")));
    assert_eq!((spec.class.as_str(), spec.hostname.as_deref()), ("runc", Some("web")));
    assert_eq!((spec.restart_policy, spec.termination_grace_period_seconds), (WireRestartPolicy::Always, 30));
    let labels: Vec<_> = spec.labels.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let wanted = [(LABEL_POD, "web"), (LABEL_NAMESPACE, "shop"), (LABEL_UID, "u-1"), (LABEL_NODE, "virtual")];
    assert!(wanted.iter().all(|label| labels.contains(label)), "{labels:?}");
    assert_eq!(spec.containers[0].resources, Resources::default());
    assert!(joey_api::validate::instance(&spec).is_ok());
}

#[test]
fn volumes_cover_nothing_of_the_kernels() {
    let over = |path: &str| {
        let volumes = json!({ "volumes": [{ "name": "v", "emptyDir": {} }] });
        pod(volumes, json!({ "volumeMounts": [{ "name": "v", "mountPath": path }] }))
    };
    for path in ["/", "/proc", "/proc/sys/kernel", "/sys", "//sys/fs/"] {
        assert!(faults(&over(path))[0].contains("never covered"), "{path}");
    }
    taken(&over("/system"));
}

#[test]
fn hooks_by_annotation() {
    let mut hooked = pod(json!({}), json!({}));
    let all = [("joey.dev/pre-start.main", "echo"), ("joey.dev/pre-online.main", "[\"a\"]")];
    hooked.metadata.annotations = Some(all.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
    let lifecycle = taken(&hooked).containers.remove(0).lifecycle;
    assert_eq!(lifecycle.pre_start.map(|hook| hook.command.len()), Some(3));
    assert_eq!(lifecycle.pre_online.map(|hook| hook.command), Some(vec!["a".to_owned()]));
    hooked.metadata.annotations = Some([("joey.dev/pre-start.other".to_owned(), "echo".to_owned())].into());
    assert!(faults(&hooked)[0].starts_with("annotation joey.dev/pre-start.other: there is no container"));
}

#[test]
fn an_image_whose_name_cannot_be_read_is_not_a_refusal_for_good() {
    let bad = pod(json!({}), json!({ "image": "Bad//Ref:::" }));
    let Converted { spec, waits: Waits { invalid_images: invalid, .. } } =
        convert(&bad, &Objects::default(), &node()).unwrap();
    let held = spec.containers[0].held.clone().unwrap();
    assert_eq!((held.reason.as_str(), invalid.len()), ("InvalidImageName", 1));
    assert!(held.message.starts_with("Failed to apply default image tag \"Bad//Ref:::\": couldn't parse image name"));
    joey_api::validate::instance(&spec).unwrap();
    assert_eq!((invalid[0].container.as_str(), invalid[0].reason.text.as_str()), ("main", "Bad//Ref:::"));
    // What never can run is refused first.
    assert_eq!(faults(&pod(json!({ "hostPID": true }), json!({ "image": "Bad//Ref:::" }))).len(), 1);
}

#[test]
fn unsupported_fields_of_the_pod_are_named() {
    for (field, value) in [
        ("hostIPC", json!(true)),
        ("hostNetwork", json!(true)),
        ("hostPID", json!(true)),
        ("hostUsers", json!(false)),
        ("os", json!({ "name": "windows" })),
        ("resourceClaims", json!([{ "name": "gpu" }])),
    ] {
        let found = faults(&pod(json!({ field: value }), json!({})));
        assert!(found.len() == 1 && found[0].starts_with(&format!("spec.{field}")), "{field}: {found:?}");
    }
    for field in ["hostIPC", "hostNetwork", "hostPID"] {
        taken(&pod(json!({ field: false }), json!({})));
    }
}

#[test]
fn unsupported_fields_of_a_container_are_named() {
    for (field, value) in [
        ("livenessProbe", json!({})),
        ("readinessProbe", json!({ "httpGet": { "port": "nosuch" } })),
        ("startupProbe", json!({ "tcpSocket": { "port": 0 } })),
        ("lifecycle", json!({ "preStop": { "tcpSocket": { "port": 80 } } })),
        ("restartPolicy", json!("Sometimes")),
        (
            "restartPolicyRules",
            json!([{ "action": "RestartAllContainers", "exitCodes": { "operator": "In", "values": [1] } }]),
        ),
        ("volumeDevices", json!([{ "name": "d", "devicePath": "/dev/d" }])),
    ] {
        let found = faults(&pod(json!({}), json!({ field: value })));
        assert!(found.len() == 1 && found[0].starts_with(&format!("container \"main\": {field}")), "{found:?}");
    }
    for (field, value, named) in [
        ("ports", json!([{ "containerPort": 80, "hostPort": 80 }]), "hostPort"),
        ("securityContext", json!({ "capabilities": { "add": ["SYS_PTRACE"] } }), "a debug container"),
        ("securityContext", json!({ "capabilities": { "add": ["CAP_NET_ADMIN"] } }), "caps are set by annotations"),
        ("securityContext", json!({ "seccompProfile": { "type": "Localhost", "localhostProfile": "p" } }), "Localhost"),
        ("securityContext", json!({ "appArmorProfile": { "type": "Localhost" } }), "appArmorProfile Localhost"),
        ("image", json!(""), "an empty image"),
        ("securityContext", json!({ "privileged": true }), "securityContext.privileged"),
        ("securityContext", json!({ "procMount": "Unmasked" }), "securityContext.procMount"),
        ("securityContext", json!({ "seLinuxOptions": {} }), "securityContext.seLinuxOptions"),
        ("securityContext", json!({ "seccompProfile": { "type": "Unconfined" } }), "seccompProfile Unconfined"),
        ("securityContext", json!({ "runAsUser": -1 }), "securityContext.runAsUser is not an id"),
        ("volumeMounts", json!([{ "name": "v", "mountPath": "/v", "subPath": "../a" }]), "subPath"),
        ("volumeMounts", json!([{ "name": "v", "mountPath": "/v", "mountPropagation": "Bidirectional" }]), "mountP"),
    ] {
        let found = faults(&pod(json!({}), json!({ field: value })));
        assert!(found.len() == 1 && found[0].contains(named), "{named}: {found:?}");
    }
}

#[test]
fn init_containers_and_sidecars_come_first() {
    let inits =
        json!([{ "name": "one", "image": "a:1" }, { "name": "side", "image": "a:1", "restartPolicy": "Always" }]);
    let spec = taken(&pod(json!({ "initContainers": inits, "activeDeadlineSeconds": 5 }), json!({})));
    let order: Vec<_> = spec.containers.iter().map(|container| (container.name.as_str(), container.role)).collect();
    assert_eq!(order, [("one", Role::Init), ("side", Role::Sidecar), ("main", Role::Main)]);
    assert_eq!(spec.active_deadline_seconds, Some(5));
    assert!(joey_api::validate::instance(&spec).is_ok());
}

#[test]
fn every_fault_is_told_at_once() {
    let found = faults(&pod(
        json!({ "hostNetwork": true, "securityContext": { "sysctls": [{ "name": "a", "value": "b" }] },
            "volumes": [{ "name": "data", "hostPath": { "path": "/" } }] }),
        json!({ "lifecycle": { "postStart": {} } }),
    ));
    assert_eq!(found.len(), 4, "{found:?}");
    assert!(found.iter().any(|fault| fault.starts_with("volume \"data\": hostPath is not supported")), "{found:?}");
}

#[test]
fn resources() {
    let limited = |limits: Value| pod(json!({}), json!({ "resources": { "limits": limits } }));
    for (cpu, memory, milli, bytes) in
        [("250m", "64Mi", 250, 64 << 20), ("2", "1G", 2000, 1_000_000_000), ("0.1", "1e3", 100, 1000)]
    {
        let spec = taken(&limited(json!({ "cpu": cpu, "memory": memory })));
        let found = &spec.containers[0].resources;
        assert_eq!((found.cpu_milli, found.memory_bytes), (Some(milli), Some(bytes)), "{cpu} {memory}");
    }
    // A request is a limit where there is none, but where the Pod as a whole is limited.
    let requests = json!({ "resources": { "requests": { "cpu": "1", "memory": "1Gi" }, "limits": { "cpu": "2" } } });
    let found = taken(&pod(json!({}), requests.clone())).containers[0].resources;
    assert_eq!((found.cpu_milli, found.memory_bytes), (Some(2000), Some(1 << 30)));
    let spec =
        taken(&pod(json!({ "resources": { "limits": { "cpu": "3" }, "requests": { "memory": "2Gi" } } }), requests));
    assert_eq!((spec.limits.cpu_milli, spec.limits.memory_bytes), (Some(3000), Some(2 << 30)));
    assert_eq!(spec.containers[0].resources.memory_bytes, None);
    for (limits, named) in [
        (json!({ "example.org/gpu": "1" }), "limit of example.org/gpu"),
        (json!({ "cpu": "much" }), "limit of cpu"),
        (json!({ "memory": "-1" }), "limit of memory"),
    ] {
        let found = faults(&limited(limits));
        assert!(found.len() == 1 && found[0].contains(named), "{found:?}");
    }
}

#[test]
fn changes_of_resources_start_a_container_again_where_it_says_so() {
    let of =
        |policies: Value| taken(&pod(json!({}), json!({ "resizePolicy": policies }))).containers[0].restart_on_resize;
    let policy = |resource: &str, policy: &str| json!({ "resourceName": resource, "restartPolicy": policy });
    let found = of(json!([policy("cpu", "NotRequired"), policy("memory", "RestartContainer")]));
    assert_eq!((found.cpu, found.memory), (false, true));
    let found = of(json!([policy("cpu", "RestartContainer")]));
    assert_eq!((found.cpu, found.memory), (true, false));
    assert!(of(json!([])).is_never());
}

#[test]
fn limits_of_the_pod_by_annotation() {
    let mut pod = pod(json!({}), json!({}));
    let annotations = [
        ("k8s.aliyun.com/eci-use-specs", "small, 2-4Gi"),
        ("joey.dev/pids", "100"),
        ("joey.dev/disk-bytes-per-second", "10Mi"),
        ("joey.dev/disk-operations-per-second", "200"),
        ("joey.dev/egress-packets-per-second", "5k"),
    ];
    pod.metadata.annotations = Some(annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect());
    let spec = taken(&pod);
    assert_eq!(spec.use_specs, ["small", "2-4Gi"]);
    let limits = spec.limits;
    assert_eq!((limits.pids, limits.disk_bytes_per_second), (Some(100), Some(10 << 20)));
    assert_eq!(limits.disk_operations_per_second, Some(200));
    assert_eq!(spec.network.egress_packets_per_second, Some(5000));
}

#[test]
fn kernel_settings() {
    let of = |name: &str| pod(json!({ "securityContext": { "sysctls": [{ "name": name, "value": "1" }] } }), json!({}));
    assert_eq!(taken(&of("net/ipv4/tcp_syncookies")).sysctls["net.ipv4.tcp_syncookies"], "1");
    let found = faults(&of("kernel.msgmax"));
    assert!(found[0].contains("safe ones are kernel.shm_rmid_forced"), "{found:?}");
}

#[test]
fn bandwidth_is_an_annotation() {
    let annotated = |key: &str, value: &str| {
        let mut pod = pod(json!({}), json!({}));
        pod.metadata.annotations = Some(BTreeMap::from([(key.to_owned(), value.to_owned())]));
        pod
    };
    let spec = taken(&annotated("kubernetes.io/ingress-bandwidth", "10M"));
    let found = (spec.network.ingress_bits_per_second, spec.network.egress_bits_per_second);
    assert_eq!(found, (Some(10_000_000), None));
    let spec = taken(&annotated("kubernetes.io/egress-bandwidth", "1Gi"));
    assert_eq!(spec.network.egress_bits_per_second, Some(1 << 30));
    let found = faults(&annotated("kubernetes.io/egress-bandwidth", "fast"));
    assert!(found[0].starts_with("annotation kubernetes.io/egress-bandwidth"), "{found:?}");
    assert!(taken(&annotated("example.org/any", "x")).annotations.is_empty());
}

#[test]
fn pull_policy_follows_the_tag() {
    let of = |container: Value| taken(&pod(json!({}), container)).containers[0].pull_policy;
    assert_eq!(of(json!({})), PullPolicy::IfNotPresent);
    assert_eq!(of(json!({ "image": "app" })), PullPolicy::Always);
    assert_eq!(of(json!({ "image": "app:latest", "imagePullPolicy": "Never" })), PullPolicy::Never);
}

#[test]
fn the_container_overrides_the_pods_security() {
    let spec = taken(&pod(
        json!({ "securityContext": { "runAsUser": 1000, "runAsGroup": 1000, "supplementalGroups": [5] } }),
        json!({ "securityContext": { "runAsUser": 2000, "readOnlyRootFilesystem": true,
            "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"], "add": ["CAP_NET_BIND_SERVICE"] } } }),
    ));
    let found = &spec.containers[0].security;
    assert_eq!((found.user, found.group), (Some(2000), Some(1000)));
    assert_eq!(found.supplemental_groups, [5]);
    assert!(found.read_only_root && found.no_new_privileges && !found.run_as_non_root);
    assert_eq!(
        (&found.drop_capabilities[..], &found.add_capabilities[..]),
        (&["ALL".into()][..], &["NET_BIND_SERVICE".into()][..])
    );
}

#[test]
fn variables_and_files_of_objects() {
    let pod = pod(
        json!({ "volumes": [{ "name": "conf", "configMap": { "name": "cm", "defaultMode": 0o400 } }] }),
        json!({
            "envFrom": [{ "prefix": "X_", "configMapRef": { "name": "cm" } }],
            "env": [
                { "name": "PLAIN", "value": "$(X_key)" },
                { "name": "PASSWORD", "valueFrom": { "secretKeyRef": { "name": "s", "key": "p" } } },
                { "name": "NONE", "valueFrom": { "secretKeyRef": { "name": "s", "key": "q", "optional": true } } },
                { "name": "APP", "valueFrom": { "fieldRef": { "fieldPath": "metadata.labels['app']" } } },
                { "name": "IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } },
                { "name": "CPUS", "valueFrom": { "resourceFieldRef": { "resource": "limits.cpu" } } },
            ],
            "volumeMounts": [{ "name": "conf", "mountPath": "/conf", "readOnly": true }],
        }),
    );
    let missing = |objects: &Objects| match convert(&pod, objects, &node()) {
        Err(unmounted @ Refusal::Unmounted { .. }) => unmounted.to_string(),
        Ok(Converted { spec, waits }) if waits.missing.len() == 1 => spec.containers[0].held.clone().unwrap().message,
        other => panic!("{other:?}"),
    };
    let mut objects = Objects { node_cpu_milli: 3500, ..Objects::default() };
    assert_eq!(missing(&objects), "MountVolume.SetUp failed for volume \"conf\" : configmap \"cm\" not found");
    let map = BTreeMap::from([("key".to_owned(), b"$(HOME)".to_vec())]);
    objects.values.insert((Kind::ConfigMap, "cm".into()), map);
    assert_eq!(missing(&objects), "secret \"s\" not found");
    objects.values.insert((Kind::Secret, "s".into()), BTreeMap::new());
    assert_eq!(missing(&objects), "couldn't find key p in Secret shop/s");
    objects.values.insert((Kind::Secret, "s".into()), BTreeMap::from([("p".to_owned(), b"pw".to_vec())]));
    let Converted { spec, waits } = convert(&pod, &objects, &node()).unwrap();
    assert_eq!((&spec.containers[0].held, waits), (&None, Waits::default()));
    let wanted = [
        ("X_key", Some("$$(HOME)")),
        ("PLAIN", Some("$(X_key)")),
        ("PASSWORD", Some("pw")),
        ("NONE", None),
        ("APP", Some("web")),
        ("IP", None),
        ("CPUS", Some("4")),
    ];
    for (name, value) in wanted {
        assert_eq!(variable(&spec, name).as_deref(), value, "{name}");
    }
    assert!(spec.containers[0].env.iter().any(|variable| variable.name == "IP" && variable.address));
    let VolumeSource::Files(files) = &spec.volumes[0].source else { panic!("{:?}", spec.volumes) };
    assert_eq!((files[0].path.as_str(), files[0].mode), ("key", 0o400));
    assert_eq!(
        spec.containers[0].mounts,
        [Mount { volume: "conf".into(), path: "/conf".into(), read_only: true, ..Mount::default() }]
    );
}

#[test]
fn name_servers() {
    let mut node = node();
    let dns =
        |spec: Value, node: &Node| convert(&pod(spec, json!({})), &Objects::default(), node).unwrap().spec.network.dns;
    assert_eq!(dns(json!({ "dnsPolicy": "ClusterFirst" }), &node), None);
    node.cluster_dns = vec!["10.96.0.10".parse().unwrap()];
    let found = dns(json!({ "dnsPolicy": "ClusterFirst" }), &node).unwrap();
    assert_eq!(found.nameservers, ["10.96.0.10"]);
    assert_eq!(found.searches, ["shop.svc.cluster.local", "svc.cluster.local", "cluster.local"]);
    assert_eq!(dns(json!({ "dnsPolicy": "Default" }), &node), None);
    let own =
        json!({ "nameservers": ["192.0.2.53"], "options": [{ "name": "ndots", "value": "1" }, { "name": "debug" }] });
    let found = dns(json!({ "dnsPolicy": "None", "dnsConfig": own }), &node).unwrap();
    assert_eq!((found.nameservers, found.options), (vec!["192.0.2.53".into()], vec!["ndots:1".into(), "debug".into()]));
}

#[test]
fn host_names() {
    let of = |spec: Value, name: &str| {
        let mut pod = pod(spec, json!({}));
        pod.metadata.name = Some(name.to_owned());
        taken(&pod).hostname.unwrap()
    };
    assert_eq!(of(json!({}), "a.b"), "a.b");
    assert_eq!(of(json!({ "hostname": "given" }), "a"), "given");
    assert_eq!(of(json!({ "hostname": "given", "hostnameOverride": "x.y" }), "a"), "x.y");
    let below = taken(&pod(json!({ "subdomain": "peers", "setHostnameAsFQDN": true }), json!({})));
    assert_eq!((below.domain.as_deref(), below.full_hostname), (Some("peers.shop.svc.cluster.local"), true));
    let long = json!({ "hostname": "h".repeat(60), "subdomain": "peers", "setHostnameAsFQDN": true });
    assert!(faults(&pod(long, json!({})))[0].contains("64 characters"));
    assert_eq!(of(json!({}), &format!("{}-{}", "x".repeat(62), "y".repeat(40))), "x".repeat(62));
}

#[test]
fn logs_are_collected_by_annotation() {
    let annotated = |sources: &str| {
        let mut pod = pod(json!({}), json!({}));
        let all = [("joey.dev/logs", sources), ("joey.dev/log-sink", "bus")];
        pod.metadata.annotations = Some(all.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        pod
    };
    let logs = taken(&annotated(r#"[{"name": "out", "from": "stdout"}]"#)).logs;
    assert_eq!((logs.sink.as_deref(), logs.sources.len()), (Some("bus"), 1));
    assert_eq!(logs.fields.keys().collect::<Vec<_>>(), ["namespace", "pod"]);
    assert_eq!(taken(&annotated("[]")).logs, joey_api::logs::Logs::default(), "nothing is asked for");
    for wrong in [
        r#"[{"name": "out"}]"#,
        r#"[{"name": "out", "from": "var/log"}]"#,
        r#"[{"name": "o", "from": "stdout", "container": "no"}]"#,
    ] {
        let found = faults(&annotated(wrong));
        assert!(found[0].starts_with("annotation joey.dev/logs"), "{found:?}");
    }
    let mut pod = pod(json!({}), json!({"env": [{"name": "aliyun_logs_out", "value": "stdout"}]}));
    pod.metadata.annotations = Some([("joey.dev/log-sink".to_owned(), "bus".to_owned())].into());
    let logs = taken(&pod).logs;
    assert_eq!((logs.sink.as_deref(), logs.sources.len(), logs.fields.len()), (Some("bus"), 0, 2));
}
