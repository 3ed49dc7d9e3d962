//! Tests of patches: each directive, the patches kubectl sends, and what must never change an object.

use serde_json::{Value, json};

use super::*;

fn merge(kind: &str, current: &Value, patch: &Value) -> Result<Value, MergeError> {
    let schemas = Schemas::builtin();
    schemas.strategic_merge(schemas.kind("", "v1", kind).unwrap(), current, patch)
}

fn pod(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": "1"}}, "spec": spec})
}

/// The spec after a patch of the spec.
fn spec(current: Value, patch: Value) -> Value {
    merge("Pod", &pod(current), &json!({"spec": patch})).unwrap()["spec"].clone()
}

#[test]
fn lists_merge_by_key() {
    let old = json!({"containers": [{"name": "a", "image": "x", "env": [{"name": "K", "value": "1"}]}, {"name": "b"}]});
    let patch = json!({"containers": [{"name": "a", "image": "y", "env": [{"name": "L", "value": "2"}]}]});
    let new = spec(old, patch);
    assert_eq!(new["containers"][0]["image"], "y");
    let env = json!([{"name": "L", "value": "2"}, {"name": "K", "value": "1"}]);
    assert_eq!(new["containers"][0]["env"], env);
    assert_eq!(new["containers"][1]["name"], "b");
}

#[test]
fn new_elements_come_first_and_others_keep_their_place() {
    let old = json!({"containers": [{"name": "a"}, {"name": "b"}, {"name": "c"}]});
    let new = spec(old.clone(), json!({"containers": [{"name": "n"}]}));
    assert_eq!(new["containers"], json!([{"name": "n"}, {"name": "a"}, {"name": "b"}, {"name": "c"}]));
    let order = json!([{"name": "c"}, {"name": "n"}]);
    let new = spec(old, json!({"containers": [{"name": "n"}], "$setElementOrder/containers": order}));
    let names: Vec<&Value> = new["containers"].as_array().unwrap().iter().map(|item| &item["name"]).collect();
    assert_eq!(names, ["a", "b", "c", "n"]);
}

#[test]
fn lists_without_merge_are_replaced() {
    let old = json!({"containers": [{"name": "a", "command": ["x", "y"]}]});
    let new = spec(old, json!({"containers": [{"name": "a", "command": ["z"]}]}));
    assert_eq!(new["containers"][0]["command"], json!(["z"]));
}

#[test]
fn directives_in_lists() {
    let old = json!({"containers": [{"name": "a"}, {"name": "b"}]});
    let new = spec(
        old.clone(),
        json!({"containers": [{"name": "a", "$patch": "delete"}, {"name": "zz", "$patch": "delete"}]}),
    );
    assert_eq!(new["containers"], json!([{"name": "b"}]));
    let new = spec(old.clone(), json!({"containers": [{"$patch": "replace"}, {"name": "c", "image": "i"}]}));
    assert_eq!(new["containers"], json!([{"name": "c", "image": "i"}]));
    let wrong = merge("Pod", &pod(old.clone()), &json!({"spec": {"containers": [{"name": "a", "$patch": "smash"}]}}));
    assert_eq!(wrong, Err(MergeError::UnknownDirective("smash".into())));
    let keyless = merge("Pod", &pod(old), &json!({"spec": {"containers": [{"image": "x"}]}}));
    assert!(matches!(keyless, Err(MergeError::NoMergeKey { .. })));
}

#[test]
fn directives_in_objects() {
    let old = json!({"nodeSelector": {"a": "1"}, "securityContext": {"runAsUser": 1}});
    let new = spec(old.clone(), json!({"nodeSelector": {"$patch": "replace", "b": "2"}}));
    assert_eq!(new["nodeSelector"], json!({"b": "2"}));
    let new = spec(old.clone(), json!({"securityContext": {"$patch": "delete"}, "affinity": {"$patch": "delete"}}));
    assert_eq!(new, json!({"nodeSelector": {"a": "1"}, "securityContext": {}}));
    assert!(merge("Pod", &pod(old), &json!({"spec": {"$patch": 7}})).is_err());
}

#[test]
fn volumes_retain_keys() {
    let old = json!({"volumes": [{"name": "v", "emptyDir": {}}]});
    let patch = json!({"volumes": [{"name": "v", "$retainKeys": ["name", "secret"], "secret": {"secretName": "s"}}]});
    assert_eq!(spec(old.clone(), patch)["volumes"], json!([{"name": "v", "secret": {"secretName": "s"}}]));
    let patch = json!({"spec": {"volumes": [{"name": "v", "$retainKeys": ["name"], "secret": {}}]}});
    assert_eq!(merge("Pod", &pod(old), &patch), Err(MergeError::NotRetained { key: "secret".into() }));
}

#[test]
fn scalars_are_merged_as_sets() {
    let mut old = pod(json!({}));
    old["metadata"]["finalizers"] = json!(["a/1", "b/2"]);
    let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/1"],
        "$setElementOrder/finalizers": ["c/3", "b/2"], "finalizers": ["c/3", "b/2"]}});
    assert_eq!(merge("Pod", &old, &patch).unwrap()["metadata"]["finalizers"], json!(["c/3", "b/2"]));
    let patch = json!({"metadata": {"$setElementOrder/finalizers": ["b/2", "a/1"]}});
    assert_eq!(merge("Pod", &old, &patch).unwrap()["metadata"]["finalizers"], json!(["b/2", "a/1"]));
}

#[test]
fn order_must_name_what_is_set() {
    let patch = json!({"spec": {"containers": [{"name": "n"}], "$setElementOrder/containers": [{"name": "a"}]}});
    let wrong = merge("Pod", &pod(json!({"containers": [{"name": "a"}]})), &patch);
    assert!(matches!(wrong, Err(MergeError::NotOrdered { .. })), "{wrong:?}");
}

#[test]
fn nulls_delete_and_do_not_stay() {
    let new = merge(
        "Pod",
        &pod(json!({"hostname": "h"})),
        &json!({"metadata": {"labels": {"x": null, "y": "2"}},
        "spec": {"hostname": null, "securityContext": {"runAsUser": null, "runAsGroup": 3}}}),
    );
    let new = new.unwrap();
    assert_eq!(new["metadata"]["labels"], json!({"y": "2"}));
    assert_eq!(new["spec"], json!({"securityContext": {"runAsGroup": 3}}));
}

/// What `kubectl apply` sends after `kubectl apply` of the same file with another image, a container less and a label less.
#[test]
fn patch_of_kubectl_apply() {
    let old = json!({"containers": [
        {"name": "web", "image": "nginx:1", "imagePullPolicy": "IfNotPresent", "ports": [{"containerPort": 80, "protocol": "TCP"}],
            "volumeMounts": [{"mountPath": "/d", "name": "d"}, {"mountPath": "/var/run/secrets", "name": "token"}]},
        {"name": "side", "image": "s"}], "nodeName": "n"});
    let patch = json!({"metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}"}, "labels": {"x": null}},
        "spec": {"$setElementOrder/containers": [{"name": "web"}], "containers": [
            {"$setElementOrder/volumeMounts": [{"mountPath": "/d"}], "image": "nginx:2", "name": "web",
                "$setElementOrder/ports": [{"containerPort": 81}],
                "ports": [{"containerPort": 81}, {"$patch": "delete", "containerPort": 80}]},
            {"$patch": "delete", "name": "side"}]}});
    let new = merge("Pod", &pod(old), &patch).unwrap();
    assert_eq!(new["metadata"]["labels"], json!({}));
    let container = json!({"name": "web", "image": "nginx:2", "imagePullPolicy": "IfNotPresent", "ports": [{"containerPort": 81}],
        "volumeMounts": [{"mountPath": "/d", "name": "d"}, {"mountPath": "/var/run/secrets", "name": "token"}]});
    assert_eq!(new["spec"], json!({"containers": [container], "nodeName": "n"}));
}

#[test]
fn config_maps_merge_their_data() {
    let old = json!({"data": {"a": "1", "b": "2"}});
    let new = merge("ConfigMap", &old, &json!({"data": {"a": null, "c": "3"}})).unwrap();
    assert_eq!(new, json!({"data": {"b": "2", "c": "3"}}));
}

#[test]
fn what_is_unknown_is_merged_as_json() {
    let old = pod(json!({"strange": {"list": [1, 2], "keep": true}}));
    let new = merge("Pod", &old, &json!({"spec": {"strange": {"list": [3], "gone": null}}})).unwrap();
    assert_eq!(new["spec"]["strange"], json!({"list": [3], "keep": true}));
}

#[test]
fn an_empty_patch_and_the_object_itself_change_nothing() {
    let objects = [
        pod(
            json!({"containers": [{"name": "b", "ports": [{"containerPort": 1}]}, {"name": "a"}], "volumes": [{"name": "v"}]}),
        ),
        json!({"metadata": {"name": "n", "finalizers": ["z", "a"], "ownerReferences": [{"uid": "2"}, {"uid": "1"}]}}),
        json!({"spec": {"tolerations": [{"key": "b"}, {"key": "a"}], "nodeSelector": {}}}),
    ];
    for object in objects {
        assert_eq!(merge("Pod", &object, &json!({})).unwrap(), object);
        assert_eq!(merge("Pod", &object, &object).unwrap(), object);
        assert_eq!(json_merge(&object, &json!({})), object);
    }
}

#[test]
fn json_patch_is_all_or_nothing() {
    let operations = |value: Value| serde_json::from_value::<json_patch::Patch>(value).unwrap();
    let object = json!({"a": [1]});
    let new = json_patch(&object, &operations(json!([{"op": "add", "path": "/a/-", "value": 2}]))).unwrap();
    assert_eq!(new, json!({"a": [1, 2]}));
    let wrong = operations(json!([{"op": "remove", "path": "/a"}, {"op": "test", "path": "/b", "value": 1}]));
    assert!(json_patch(&object, &wrong).is_err());
    assert_eq!(
        json_merge(&json!({"a": {"b": 1}}), &json!({"a": {"b": null, "c": {"d": null}}})),
        json!({"a": {"c": {}}})
    );
}
