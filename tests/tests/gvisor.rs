//! Class `gvisor` on the whole system: a Pod in a sandbox with a kernel in user space, as users see it. What a class must do in all is
//! the conformance suite's (`crates/agent/tests/gvisor.rs`).

use joey_tests::joey::pod;
use joey_tests::{Joey, Registry, holds, seconds, wait_until};
use serde_json::json;

#[test]
fn a_pod_with_a_kernel_of_its_own_is_a_pod() {
    if !std::path::Path::new("/usr/bin/runsc").exists() {
        eprintln!("SKIPPED: needs Debian's package runsc");
        return;
    }
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let image = registry.demo();
    joey.apply(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "old"}}),
    );
    let mut object = pod("apart", &image, &["nginx", "-g", "daemon off;"]);
    object["spec"]["runtimeClassName"] = json!("gvisor");
    object["spec"]["volumes"] = json!([{"name": "settings", "configMap": {"name": "settings"}}]);
    let main = &mut object["spec"]["containers"][0];
    main["volumeMounts"] = json!([{"name": "settings", "mountPath": "/settings"}]);
    main["resources"] = json!({"limits": {"memory": "128Mi", "cpu": "1"}});
    main["readinessProbe"] = json!({"httpGet": {"path": "/", "port": 80}, "periodSeconds": 1});
    let side = json!({"name": "side", "image": image, "command": ["sh", "-c", "while :; do sleep 1; done"]});
    object["spec"]["containers"].as_array_mut().expect("containers").push(side);
    joey.apply(&object);
    let ready = joey.wait_for("apart", "Ready", seconds(30));
    let own = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("this kernel has a release");
    let inside = |script: &str| joey.kubectl(&["exec", "apart", "-c", "main", "--", "sh", "-c", script]).ok();
    assert_ne!(inside("uname -r").trim(), own.trim());
    // From the host, from another Pod, and back, and by name.
    let address = ready["status"]["podIP"].as_str().expect("an address").to_owned();
    let url = format!("http://{address}/");
    let page = joey_tests::run(std::process::Command::new("curl").args(["-fsS", "--max-time", "10", &url]));
    assert!(page.ok().contains("Joey"));
    joey.run_pod("beside", &image, &["nginx", "-g", "daemon off;"]);
    let beside = joey.get("pod", "beside")["status"]["podIP"].as_str().expect("an address").to_owned();
    for (from, to) in [("beside", &address), ("apart", &beside)] {
        let said = joey.kubectl(&["exec", from, "--", "timeout", "10", "wget", "-qO-", &format!("http://{to}/")]).ok();
        assert!(said.contains("Joey"), "{from}: {said}");
    }
    joey.apply(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"key": "new"}}),
    );
    wait_until("the ConfigMap is renewed", seconds(20), || {
        let seen = inside("cat /settings/key");
        holds(seen == "new", seen)
    });
    joey.kubectl(&["debug", "apart", "--image", &image, "--target", "main", "-c", "look", "--", "sleep", "1000"]).ok();
    wait_until("the debug container runs", seconds(30), || {
        let status = joey.get("pod", "apart")["status"]["ephemeralContainerStatuses"][0]["state"].clone();
        holds(status["running"].is_object(), status)
    });
    // What the class cannot do is said, and is no reason to try again and again.
    let mut object = pod("refused", &image, &["sleep", "1000"]);
    object["spec"]["runtimeClassName"] = json!("gvisor");
    object["spec"]["securityContext"] = json!({"sysctls": [{"name": "net.ipv4.tcp_syncookies", "value": "1"}]});
    joey.apply(&object);
    wait_until("the Pod is refused", seconds(20), || {
        let status = joey.get("pod", "refused")["status"].clone();
        holds(status["phase"] == "Failed" && status.to_string().contains("class gvisor"), status)
    });
    joey.kubectl(&["delete", "pod", "apart", "--grace-period", "1"]).ok();
}
