//! Point 10: Joey's virtual node on a Kubernetes control plane that others made.
//!
//! Needs Go (`make test-kubernetes` builds the control plane); says so and passes where it is missing.

use std::process::Command;

use joey_tests::host::{process_runs, process_start};
use joey_tests::joey::pod;
use joey_tests::kubernetes::ControlPlane;
use joey_tests::{Joey, Program, Registry, Settings, holds, programs, seconds, traffic, unique, wait_until};
use serde_json::{Value, json};

fn deployment(name: &str, image: &str, node: &str) -> Value {
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {
            "replicas": 2, "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {
                    "nodeSelector": {"kubernetes.io/hostname": node},
                    "tolerations": [{"key": "virtual-kubelet.io/provider", "operator": "Exists"}],
                    "terminationGracePeriodSeconds": 1,
                    "containers": [{"name": "web", "image": image}],
                },
            },
        },
    })
}

fn pods(plane: &ControlPlane, name: &str) -> Vec<Value> {
    let list = plane.kubectl(&["get", "pods", "-l", &format!("app={name}"), "-o", "json"]).json();
    list["items"].as_array().cloned().unwrap_or_default()
}

fn wait_for_node(plane: &ControlPlane, node: &str, said: impl Fn() -> String) {
    wait_until("the virtual node is ready", seconds(30), || {
        let outcome = plane.kubectl(&["get", "node", node, "--no-headers"]);
        holds(outcome.stdout.contains(" Ready"), format!("{} {}", outcome.stderr, said()))
    });
}

#[test]
fn a_deployment_runs_on_the_virtual_node() {
    let Some(plane) = ControlPlane::start() else { return };
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let node = unique("elastic");
    let mut command = Command::new(programs().join("joey"));
    // Beside a running `joey up`, whose pool it uses.
    command.args(["vnode", "--node-name", &node, "--pool"]).arg(joey.data().join("joey.sock"));
    command.arg("--kubeconfig").arg(plane.kubeconfig()).env_remove("KUBECONFIG");
    let vnode = Program::start(&mut command, &plane.scratch().join("vnode.log"));
    wait_for_node(&plane, &node, || vnode.output());

    plane.kubectl_with_input(&["apply", "-f", "-"], &deployment("web", &registry.demo(), &node).to_string()).ok();
    wait_until("both replicas are ready", seconds(60), || {
        let outcome = plane.kubectl(&["get", "deployment", "web", "-o", "jsonpath={.status.readyReplicas}"]);
        holds(outcome.stdout == "2", format!("{:?} {}", pods(&plane, "web"), vnode.output()))
    });
    for pod in pods(&plane, "web") {
        assert_eq!(pod["spec"]["nodeName"], node.as_str());
        let address = pod["status"]["podIP"].as_str().expect("a running Pod has an address");
        assert!(traffic::page(&format!("{address}:80"), "/").unwrap().contains("Hello from Joey"));
        let name = pod["metadata"]["name"].as_str().expect("a Pod has a name");
        assert!(plane.kubectl(&["logs", name]).ok().contains("GET / "), "its log shows the request");
        assert_eq!(plane.kubectl(&["exec", name, "--", "hostname"]).ok().trim(), name);
        assert_eq!(plane.kubectl(&["exec", name, "--", "sh", "-c", "exit 7"]).code, 7);
    }

    plane.kubectl(&["scale", "deployment", "web", "--replicas=1"]).ok();
    wait_until("one replica is left, in the cluster and in the pool", seconds(60), || {
        let instances = joey.joey(&["ps", "-o", "json"]).ok();
        let seen = (pods(&plane, "web").len(), instances.matches("\"clientToken\"").count());
        holds(seen == (1, 1), seen)
    });
    plane.kubectl(&["delete", "deployment", "web", "--cascade=foreground", "--timeout=60s"]).ok();
    wait_until("no replica is left", seconds(60), || {
        let left = joey.joey(&["ps", "-o", "json"]).ok();
        holds(!left.contains("\"clientToken\""), left)
    });
}

/// Without `--pool`, the virtual node has a host in its own process.
#[test]
fn a_node_with_a_host_of_its_own_may_be_killed() {
    let Some(plane) = ControlPlane::start() else { return };
    let registry = Registry::with_demo_image();
    let mut joey = Joey::prepare(Settings::default());
    let node = unique("own");
    joey.launch_vnode(&plane.kubeconfig(), &node);
    wait_for_node(&plane, &node, || joey.output());

    let mut object =
        pod("counts", &registry.demo(), &["sh", "-c", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done"]);
    object["spec"]["nodeName"] = node.as_str().into();
    plane.kubectl_with_input(&["apply", "-f", "-"], &object.to_string()).ok();
    plane.kubectl(&["wait", "--for=condition=Ready", "pod/counts", "--timeout=60s"]).ok();
    assert_eq!(plane.kubectl(&["exec", "counts", "--", "hostname"]).ok().trim(), "counts");
    let pid = joey.pid_of("counts.default");
    let started = process_start(pid);

    joey.kill();
    assert!(process_runs(pid), "the Pod goes on");
    joey.launch_vnode(&plane.kubeconfig(), &node);
    // The kubelet endpoints come back on another port, which the node tells the cluster.
    wait_until("the Pod can be entered again", seconds(30), || {
        let outcome = plane.kubectl(&["exec", "counts", "--", "hostname"]);
        holds(outcome.stdout.trim() == "counts", format!("{} {}", outcome.stderr, joey.output()))
    });
    assert_eq!((joey.pid_of("counts.default"), process_start(pid)), (pid, started), "it was adopted, not started anew");
    let log = plane.kubectl(&["logs", "counts"]).ok();
    assert!(log.lines().enumerate().all(|(at, line)| line == at.to_string()), "the log has no gap: {log}");
    let status = plane.kubectl(&["get", "pod", "counts", "-o", "json"]).json()["status"].clone();
    assert_eq!(status["containerStatuses"][0]["restartCount"], 0, "{status}");

    plane.kubectl(&["delete", "pod", "counts", "--grace-period=1", "--timeout=30s"]).ok();
    wait_until("its process is gone", seconds(10), || holds(!process_runs(pid), pid));
    joey.down().ok();
    assert!(joey.traces().is_empty(), "{:?}", joey.traces());
}
