//! Point 4: what programs rely on in the Kubernetes API beyond the daily use of kubectl: owners of fields, faults told together,
//! canonical amounts, dependents, tokens that end with what they are bound to, helm.

use std::process::Command;

use joey_tests::joey::pod;
use joey_tests::{Joey, Outcome, Registry, holds, repository, run, seconds, wait_until};
use serde_json::{Value, json};

fn map(name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
}

fn apply(joey: &Joey, object: &Value, arguments: &[&str]) -> Outcome {
    joey.kubectl_with_input(&[&["apply", "--server-side", "-f", "-"], arguments].concat(), &object.to_string())
}

/// `OPERATION NAME SUBRESOURCE` of every owner of an object's fields.
fn owners(joey: &Joey, kind: &str, name: &str) -> Vec<String> {
    let shown = joey.kubectl(&["get", kind, name, "-o", "json", "--show-managed-fields"]).json();
    let entries = shown["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let word = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    let line = |entry: &Value| {
        let words = ["operation", "manager", "subresource"].map(|key| word(entry, key));
        words.join(" ").trim().to_owned()
    };
    entries.iter().map(line).collect()
}

#[test]
fn fields_have_owners() {
    let joey = Joey::start();
    apply(&joey, &map("m", json!({"a": "1", "b": "1"})), &[]).ok();
    assert_eq!(owners(&joey, "configmap", "m"), ["Apply kubectl"]);
    let refused = apply(&joey, &map("m", json!({"a": "2", "b": "2"})), &["--field-manager=other"]).fails(1);
    for part in ["Apply failed with 2 conflicts: conflicts with \"kubectl\":", "- .data.a", "- .data.b"] {
        assert!(refused.contains(part), "{part} in {refused}");
    }
    let dry =
        apply(&joey, &map("m", json!({"a": "2"})), &["--field-manager=other", "--force-conflicts", "--dry-run=server"]);
    assert!(dry.ok().contains("serverside-applied (server dry run)"));
    assert_eq!(joey.get("configmap", "m")["data"], json!({"a": "1", "b": "1"}));
    apply(&joey, &map("m", json!({"a": "2"})), &["--field-manager=other", "--force-conflicts"]).ok();
    assert_eq!(joey.get("configmap", "m")["data"], json!({"a": "2", "b": "1"}));
    apply(&joey, &map("m", json!({"a": "2"})), &[]).ok();
    assert_eq!(joey.get("configmap", "m")["data"], json!({"a": "2"}), "b is applied no more");

    // Made by other means, the fields belong to those.
    joey.kubectl(&["create", "configmap", "made", "--from-literal=key=1"]).ok();
    let refused = apply(&joey, &map("made", json!({"key": "2"})), &[]).fails(1);
    let words = "Apply failed with 1 conflict: conflict with \"kubectl-create\" using v1: .data.key";
    assert!(refused.contains(words), "{refused}");
    apply(&joey, &map("made", json!({"key": "2"})), &["--force-conflicts"]).ok();
    joey.apply(&map("before", json!({"key": "1"})));
    assert_eq!(owners(&joey, "configmap", "before"), ["Update kubectl-client-side-apply"]);
    apply(&joey, &map("before", json!({"key": "2"})), &[]).ok();
    assert_eq!(joey.get("configmap", "before")["data"]["key"], "2", "kubectl takes over what it applied itself");

    let unknown =
        apply(&joey, &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "dada": {}}), &[]);
    assert!(unknown.fails(1).contains(".dada: field not declared in schema"));
}

#[test]
fn an_unchanged_configuration_writes_nothing() {
    let joey = Joey::start();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"nodeName": "nowhere",
        "containers": [{"name": "c", "image": "a:1", "resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}}}]}});
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"a": "b"}});
    for object in [&pod, &secret] {
        apply(&joey, object, &[]).ok();
        let (kind, name) =
            (object["kind"].as_str().expect("a kind"), object["metadata"]["name"].as_str().expect("a name"));
        let before = joey.get(kind, name)["metadata"]["resourceVersion"].clone();
        apply(&joey, object, &[]).ok();
        assert_eq!(joey.get(kind, name)["metadata"]["resourceVersion"], before, "{kind}");
    }
}

#[test]
fn a_body_made_to_be_slow_is_not() {
    let joey = Joey::start();
    let finalizers: Vec<String> = (0..60_000).map(|number| format!("a.b/{number}")).collect();
    let many = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "many", "finalizers": finalizers}});
    let fields: serde_json::Map<String, Value> = (0..60_000).map(|number| (format!("x{number}"), json!(1))).collect();
    let container = [fields, serde_json::Map::from_iter([("name".to_owned(), json!("n".repeat(1 << 20)))])];
    let container: serde_json::Map<String, Value> = container.into_iter().flatten().collect();
    let wide =
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "wide"}, "spec": {"containers": [container]}});
    for object in [many, wide] {
        let begun = std::time::Instant::now();
        let answer = apply(&joey, &object, &["--validate=false"]);
        // Most of the time is kubectl's own, which reads the body several times.
        assert!(begun.elapsed() < seconds(10), "{:?}", begun.elapsed());
        drop(answer);
        joey.kubectl(&["get", "--raw", "/readyz"]).ok();
    }
}

#[test]
fn a_pod_has_owners_and_its_status_another() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let object = pod("owned", &registry.demo(), &["sleep", "1000"]);
    apply(&joey, &object, &[]).ok();
    joey.wait_for("owned", "Ready", seconds(60));
    let all = owners(&joey, "pod", "owned");
    assert_eq!(all[0], "Apply kubectl");
    assert!(all.iter().any(|owner| owner.starts_with("Update") && owner.ends_with(" status")), "{all:?}");
    assert!(apply(&joey, &object, &[]).ok().contains("serverside-applied"));
    joey.delete_pod("owned");
}

#[test]
fn helm_installs_and_takes_away() {
    let registry = Registry::with_demo_image();
    let joey = Joey::start();
    let helm = run(&mut Command::new(repository().join("scripts/helm.sh"))).ok();
    let chart = joey.scratch().join("chart");
    std::fs::create_dir_all(chart.join("templates")).expect("a fresh folder is writable");
    let write = |name: &str, text: String| std::fs::write(chart.join(name), text).expect("a fresh folder is writable");
    write("Chart.yaml", "apiVersion: v2\nname: burrow\nversion: 1.0.0\n".to_owned());
    write("values.yaml", format!("image: {}\nword: honey\n", registry.demo()));
    let config = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: burrow\ndata:\n  word: {{ .Values.word }}\n";
    let secret = "apiVersion: v1\nkind: Secret\nmetadata:\n  name: burrow\nstringData:\n  key: {{ .Values.word }}\n";
    let pod = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: burrow\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  \
               - name: main\n    image: {{ .Values.image }}\n    command: [sleep, \"1000\"]\n    envFrom:\n    - secretRef: {name: burrow}\n";
    for (name, text) in [("config", config), ("secret", secret), ("pod", pod)] {
        write(&format!("templates/{name}.yaml"), text.to_owned());
    }
    let helm = |arguments: &[&str]| {
        let mut command = Command::new(helm.trim());
        command.arg("--kubeconfig").arg(joey.data().join("kubeconfig")).args(arguments);
        run(command.env("HOME", joey.scratch()).env_remove("KUBECONFIG").current_dir(joey.scratch()))
    };
    helm(&["install", "burrow", "chart", "--wait", "--timeout=90s"]).ok();
    joey.wait_for("burrow", "Ready", seconds(60));
    assert_eq!(joey.kubectl(&["exec", "burrow", "--", "sh", "-c", "echo $key"]).ok().trim(), "honey");
    helm(&["upgrade", "burrow", "chart", "--set", "word=clover", "--timeout=90s"]).ok();
    assert_eq!(joey.get("configmap", "burrow")["data"]["word"], "clover");
    assert!(helm(&["list"]).ok().contains("deployed"));
    helm(&["uninstall", "burrow", "--wait", "--timeout=90s"]).ok();
    assert_eq!(joey.get("configmap", "burrow"), Value::Null);
}

#[test]
fn all_faults_of_an_object_are_told_at_once() {
    let joey = Joey::start();
    let bad = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "bad"}, "spec": {"restartPolicy": "No",
        "containers": [{"name": "A_", "ports": [{"containerPort": 70000}], "readinessProbe": {"grpc": {}},
            "resources": {"limits": {"cpu": "1x", "memory": "-1"}}}, {"image": "i", "imagePullPolicy": "Bad"}]}});
    let refused = joey.kubectl_with_input(&["create", "-f", "-"], &bad.to_string()).fails(1);
    for part in [
        "spec.containers[0].name: Invalid value: \"A_\"",
        "spec.containers[0].image: Required value",
        "spec.containers[0].ports[0].containerPort: Invalid value: 70000",
        "spec.containers[0].readinessProbe.grpc.port: Required value",
        "spec.containers[0].resources.limits[cpu]: Invalid value: \"1x\": unable to parse quantity's suffix",
        "spec.containers[0].resources.limits[memory]: Invalid value: \"-1\": must be greater than or equal to 0",
        "spec.containers[1].name: Required value",
        "spec.containers[1].imagePullPolicy: Unsupported value: \"Bad\"",
        "spec.restartPolicy: Unsupported value: \"No\"",
    ] {
        assert_eq!(refused.matches(part).count(), 1, "{part} in {refused}");
    }

    let odd = r#"{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"odd"},"data":{"a":"1","a":"2"},"dada":{}}"#;
    let send = |validation: &str| {
        let path = format!("/api/v1/namespaces/default/configmaps?dryRun=All&fieldValidation={validation}");
        joey.kubectl_with_input(&["create", "--raw", &path, "-f", "-"], odd)
    };
    let strict = send("Strict").fails(1);
    assert!(strict.contains("strict decoding error: duplicate field \"data.a\", unknown field \"dada\""), "{strict}");
    let warned = send("Warn");
    assert_eq!(warned.code, 0, "{warned:?}");
    for part in ["Warning: duplicate field \"data.a\"", "Warning: unknown field \"dada\""] {
        assert!(warned.stderr.contains(part), "{part} in {}", warned.stderr);
    }
    let ignored = send("Ignore");
    assert_eq!((ignored.code, ignored.stderr.as_str()), (0, ""));
    assert_eq!(ignored.json()["data"], json!({"a": "2"}));
}

#[test]
fn amounts_are_stored_in_one_form() {
    let joey = Joey::start();
    let mut object = pod("amounts", "nowhere.invalid/x:1", &[]);
    object["spec"]["nodeName"] = "absent".into();
    object["spec"]["containers"][0]["resources"] =
        json!({"limits": {"cpu": "1000m", "memory": "1024Mi"}, "requests": {"cpu": 0.5, "memory": "1e9"}});
    object["spec"]["volumes"] = json!([{"name": "v", "emptyDir": {"sizeLimit": "2048Ki"}}]);
    joey.apply(&object);
    let stored = joey.get("pod", "amounts");
    assert_eq!(
        stored["spec"]["containers"][0]["resources"],
        json!({"limits": {"cpu": "1", "memory": "1Gi"}, "requests": {"cpu": "500m", "memory": "1e9"}})
    );
    assert_eq!(stored["spec"]["volumes"][0]["emptyDir"]["sizeLimit"], "2Mi");
    assert!(joey.apply(&object).contains("amounts"), "applied again, it is the same object");
    joey.kubectl(&["delete", "pod", "amounts", "--force", "--grace-period=0"]).ok();
}

#[test]
fn dependents_go_with_their_owners() {
    let joey = Joey::start();
    let owned = |name: &str, owner: &Value| {
        let mut object = map(name, json!({}));
        object["metadata"]["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap",
            "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true}]);
        object
    };
    for (policy, survives) in [("background", false), ("foreground", false), ("orphan", true)] {
        joey.apply(&map("owner", json!({})));
        joey.apply(&owned("child", &joey.get("configmap", "owner")));
        joey.apply(&owned("grandchild", &joey.get("configmap", "child")));
        joey.kubectl(&["delete", "configmap", "owner", &format!("--cascade={policy}"), "--timeout=30s"]).ok();
        if survives {
            wait_until("the child is free", seconds(20), || {
                let child = joey.get("configmap", "child");
                holds(child["metadata"].get("ownerReferences").is_none() && child.is_object(), child)
            });
            joey.kubectl(&["delete", "configmap", "child"]).ok();
        }
        wait_until("dependents are gone", seconds(20), || {
            let left = joey.kubectl(&["get", "configmap", "child", "grandchild", "--ignore-not-found"]).ok();
            holds(left.is_empty(), left)
        });
    }
    let mut stray = owned("stray", &json!({"metadata": {"name": "never", "uid": "0-0"}}));
    stray["metadata"]["ownerReferences"][0]["blockOwnerDeletion"] = false.into();
    joey.apply(&stray);
    wait_until("what names an owner that never was is collected", seconds(20), || {
        holds(joey.get("configmap", "stray").is_null(), "it is there")
    });
}

/// The reference by which a dependent names its owner.
fn reference(owner: &Value) -> Value {
    json!({"apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true})
}

fn secret(name: &str, owners: &[&Value]) -> Value {
    let owners: Vec<_> = owners.iter().map(|owner| reference(owner)).collect();
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "ownerReferences": owners}})
}

fn gone(joey: &Joey, kind: &str, name: &str) {
    wait_until("it is gone", seconds(20), || {
        let left = joey.get(kind, name);
        holds(left.is_null(), format!("{kind} {name}: {}", left["metadata"]))
    });
}

#[test]
fn orphans_of_another_kind_stay() {
    let mut joey = Joey::start();
    let names: Vec<_> = (0..8).map(|number| format!("orphan{number}")).collect();
    for restarts in [false, false, false, true, true] {
        joey.apply(&map("owner", json!({})));
        let owner = joey.get("configmap", "owner");
        let children: Vec<_> = names.iter().map(|name| secret(name, &[&owner])).collect();
        joey.apply(&json!({"apiVersion": "v1", "kind": "List", "items": children}));
        joey.kubectl(&["delete", "configmap", "owner", "--cascade=orphan", "--wait=false"]).ok();
        if restarts {
            joey.kill();
            joey.up();
        }
        gone(&joey, "configmap", "owner");
        for name in &names {
            let child = wait_until("the child is free", seconds(20), || {
                let child = joey.get("secret", name);
                let free = child.is_null() || child["metadata"].get("ownerReferences").is_none();
                if free { Ok(child) } else { Err(child["metadata"].to_string()) }
            });
            assert!(child.is_object() && child["metadata"].get("deletionTimestamp").is_none(), "{name}: {child}");
        }
        // What comes after them is collected: the collector has done with them.
        joey.apply(&secret("stray", &[&owner]));
        gone(&joey, "secret", "stray");
        for name in &names {
            assert!(joey.get("secret", name).is_object(), "{name} stays");
        }
        joey.kubectl(&[&["delete", "secret"][..], &names.iter().map(String::as_str).collect::<Vec<_>>()].concat()).ok();
    }
}

#[test]
fn a_dependent_of_two_goes_with_the_last() {
    let joey = Joey::start();
    let begin = |child: &str| {
        joey.apply(&map("one", json!({})));
        joey.apply(&map("two", json!({})));
        let (one, two) = (joey.get("configmap", "one"), joey.get("configmap", "two"));
        joey.apply(&secret(child, &[&one, &two]));
        two
    };
    let two = begin("shared");
    joey.kubectl(&["delete", "configmap", "one", "--cascade=foreground", "--timeout=20s"]).ok();
    assert_eq!(joey.get("secret", "shared")["metadata"]["ownerReferences"], json!([reference(&two)]));
    joey.kubectl(&["delete", "configmap", "two", "--cascade=foreground", "--timeout=20s"]).ok();
    assert_eq!(joey.get("secret", "shared"), Value::Null, "it went before its last owner");
    begin("both");
    joey.kubectl(&["delete", "configmap", "one", "two", "--cascade=foreground", "--timeout=20s"]).ok();
    assert_eq!(joey.get("secret", "both"), Value::Null);
}

#[test]
fn a_delete_without_a_policy_keeps_the_one_before() {
    let joey = Joey::start();
    joey.apply(&map("owner", json!({})));
    let mut child = secret("child", &[&joey.get("configmap", "owner")]);
    child["metadata"]["finalizers"] = json!(["test.joey/hold"]);
    joey.apply(&child);
    joey.kubectl(&["delete", "configmap", "owner", "--cascade=foreground", "--wait=false"]).ok();
    let path = "/api/v1/namespaces/default/configmaps/owner";
    joey.kubectl(&["delete", "--raw", path]).ok();
    let owner = joey.get("configmap", "owner");
    assert_eq!(owner["metadata"]["finalizers"], json!(["foregroundDeletion"]), "it waits for its child");
    joey.kubectl(&["patch", "secret", "child", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]).ok();
    gone(&joey, "configmap", "owner");
    assert_eq!(joey.get("secret", "child"), Value::Null);

    // One that is named counts.
    joey.apply(&map("owner", json!({})));
    child["metadata"]["ownerReferences"] = json!([reference(&joey.get("configmap", "owner"))]);
    joey.apply(&child);
    joey.kubectl(&["delete", "configmap", "owner", "--cascade=foreground", "--wait=false"]).ok();
    joey.kubectl(&["delete", "--raw", &format!("{path}?propagationPolicy=Background")]).ok();
    assert_eq!(joey.get("configmap", "owner"), Value::Null, "nothing holds it");
    joey.kubectl(&["patch", "secret", "child", "--type=merge", "-p", r#"{"metadata":{"finalizers":null}}"#]).ok();
    gone(&joey, "secret", "child");
}

#[test]
fn an_owner_in_a_namespace_does_not_take_what_has_none() {
    let joey = Joey::start();
    joey.apply(&map("owner", json!({})));
    let owner = joey.get("configmap", "owner");
    joey.apply(&json!({"apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "burrow", "ownerReferences": [reference(&owner)]}}));
    wait_until("it is warned of", seconds(20), || {
        let told = joey.output();
        holds(told.contains("an object without namespace names an owner that has one"), told)
    });
    joey.kubectl(&["delete", "configmap", "owner"]).ok();
    joey.apply(&secret("stray", &[&owner]));
    gone(&joey, "secret", "stray");
    let namespace = joey.get("namespace", "burrow");
    assert!(namespace.is_object() && namespace["metadata"].get("deletionTimestamp").is_none(), "{namespace}");
    joey.kubectl(&["delete", "namespace", "burrow", "--timeout=30s"]).ok();
}

#[test]
fn tokens_end_with_their_accounts() {
    let joey = Joey::start();
    joey.kubectl(&["create", "serviceaccount", "robot"]).ok();
    let token = joey.kubectl(&["create", "token", "robot"]).ok();
    let mut bound = pod("holder", "nowhere.invalid/x:1", &[]);
    bound["spec"]["nodeName"] = "absent".into();
    bound["spec"]["serviceAccountName"] = "robot".into();
    joey.apply(&bound);
    let of_pod =
        joey.kubectl(&["create", "token", "robot", "--bound-object-kind=Pod", "--bound-object-name=holder"]).ok();
    // Without the administrator's certificate: the token alone says who calls.
    let as_bearer = |token: &str| {
        let config = joey.scratch().join("robot");
        let server = format!("https://{}", joey.listen());
        let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "r",
            "clusters": [{"name": "c", "cluster": {"server": server, "insecure-skip-tls-verify": true}}],
            "users": [{"name": "u", "user": {"token": token.trim()}}],
            "contexts": [{"name": "r", "context": {"cluster": "c", "user": "u"}}]});
        std::fs::write(&config, text.to_string()).expect("a fresh folder is writable");
        let mut command = joey.kubectl_command(&["auth", "whoami", "-o", "json"]);
        run(command.arg("--kubeconfig").arg(&config))
    };
    let whoami = || as_bearer(&token);
    assert_eq!(as_bearer(&of_pod).code, 0);
    joey.kubectl(&["delete", "pod", "holder", "--force", "--grace-period=0"]).ok();
    assert!(as_bearer(&of_pod).stderr.contains("Unauthorized"), "its Pod is gone");
    assert_eq!(whoami().json()["status"]["userInfo"]["username"], "system:serviceaccount:default:robot");
    assert!(joey.kubectl(&["auth", "can-i", "get", "pods", "--as=system:serviceaccount:default:robot"]).code != 0);
    joey.kubectl(&["delete", "serviceaccount", "robot"]).ok();
    let refused = whoami();
    assert!(refused.code != 0 && refused.stderr.contains("Unauthorized"), "{refused:?}");
    joey.kubectl(&["create", "serviceaccount", "robot"]).ok();
    assert!(whoami().code != 0, "another account by the same name is another account");
}
