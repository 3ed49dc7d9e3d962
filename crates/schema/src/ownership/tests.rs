//! Who owns what, on objects of real kinds.

use serde_json::json;

use super::*;

fn id(kind: &str) -> TypeId {
    Schemas::builtin().kind("", "v1", kind).unwrap()
}

fn writer(name: &str) -> Writer {
    Writer {
        name: name.to_owned(),
        api_version: "v1".to_owned(),
        subresource: String::new(),
        now: "2026-01-01T00:00:00Z".to_owned(),
        ignored: FieldSet::of_fields(&[&["status"]]),
    }
}

fn map(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": data})
}

/// `OPERATION NAME: FIELDS` of every entry.
fn owners(object: &Value) -> Vec<String> {
    let entries = object["metadata"]["managedFields"].as_array().cloned().unwrap_or_default();
    let text = |entry: &Value, key: &str| entry[key].as_str().unwrap_or_default().to_owned();
    entries
        .iter()
        .map(|entry| {
            let paths = FieldSet::read(&entry["fieldsV1"]).unwrap().shown(usize::MAX);
            format!("{} {}: {}", text(entry, "operation"), text(entry, "manager"), paths.join(" "))
        })
        .collect()
}

fn apply(live: Option<&Value>, config: &Value, name: &str, force: bool) -> Result<Value, String> {
    let applied = Schemas::builtin().apply(id("ConfigMap"), live, config, &writer(name), force);
    applied.map_err(|error| match error {
        ApplyError::Misfit(faults) => faults.join("; "),
        ApplyError::Conflicts(all) => {
            all.iter().map(|c| format!("{}: {}", c.owner, c.field)).collect::<Vec<_>>().join("; ")
        }
    })
}

fn updated(live: Option<&Value>, mut new: Value, name: &str) -> Value {
    Schemas::builtin().own_update(id("ConfigMap"), live, &mut new, &writer(name));
    new
}

#[test]
fn what_is_applied_is_owned_and_what_is_left_out_goes() {
    let first = apply(None, &map(json!({"a": "1", "b": "2"})), "one", false).unwrap();
    assert_eq!(owners(&first), ["Apply one: .data.a .data.b"]);
    let again = apply(Some(&first), &map(json!({"a": "1", "b": "2"})), "one", false).unwrap();
    assert_eq!(again, first);
    let less = apply(Some(&first), &map(json!({"a": "1"})), "one", false).unwrap();
    assert_eq!(less["data"], json!({"a": "1"}));
    let none =
        apply(Some(&less), &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}}), "one", false);
    assert_eq!(none.unwrap().get("data"), None);
}

#[test]
fn what_others_own_is_in_the_way_unless_forced() {
    let first = apply(None, &map(json!({"a": "1", "b": "2"})), "one", false).unwrap();
    let refused = apply(Some(&first), &map(json!({"a": "x"})), "two", false).unwrap_err();
    assert_eq!(refused, "\"one\": .data.a");
    let forced = apply(Some(&first), &map(json!({"a": "x"})), "two", true).unwrap();
    assert_eq!(forced["data"], json!({"a": "x", "b": "2"}));
    assert_eq!(owners(&forced), ["Apply one: .data.b", "Apply two: .data.a"]);
    // Agreed upon, a field has two owners, and stays when one lets it go.
    let shared = apply(Some(&forced), &map(json!({"a": "x", "b": "2"})), "one", false).unwrap();
    assert_eq!(owners(&shared), ["Apply one: .data.a .data.b", "Apply two: .data.a"]);
    let left = apply(Some(&shared), &map(json!({"b": "2"})), "one", false).unwrap();
    assert_eq!(left["data"], json!({"a": "x", "b": "2"}));
}

#[test]
fn updates_own_what_they_change() {
    let made = updated(None, map(json!({"a": "1"})), "kubectl-create");
    assert_eq!(owners(&made), ["Update kubectl-create: .data .data.a"]);
    let mut new = made.clone();
    new["data"] = json!({"a": "2", "b": "1"});
    let changed = updated(Some(&made), new, "edit");
    assert_eq!(owners(&changed), ["Update edit: .data.a .data.b", "Update kubectl-create: .data"]);
    let refused = apply(Some(&changed), &map(json!({"a": "3"})), "one", false).unwrap_err();
    assert_eq!(refused, "\"edit\" using v1: .data.a");
    let same = updated(Some(&changed), changed.clone(), "other");
    assert_eq!(same, changed, "nothing is owned by who changes nothing");
    let mut taken = changed.clone();
    taken["metadata"]["managedFields"] = json!([]);
    assert_eq!(owners(&updated(Some(&changed), taken, "edit")), Vec::<String>::new(), "owners can be taken away");
    let mut forgotten = changed.clone();
    forgotten["metadata"].as_object_mut().unwrap().remove("managedFields");
    assert_eq!(owners(&updated(Some(&changed), forgotten, "edit")).len(), 2, "but not by who does not know them");
}

#[test]
fn objects_without_owners_get_one_when_they_are_applied() {
    let old = map(json!({"a": "1"}));
    let applied = apply(Some(&old), &map(json!({"a": "1", "b": "2"})), "one", false).unwrap();
    assert_eq!(owners(&applied), ["Apply one: .data.a .data.b", "Update before-first-apply: .data .data.a"]);
    assert!(apply(Some(&old), &map(json!({"a": "3"})), "one", false).unwrap_err().contains("before-first-apply"));
}

#[test]
fn kubectl_takes_over_what_it_applied_from_its_side() {
    let mut live = map(json!({"a": "1", "b": "1"}));
    let last = map(json!({"a": "1"})).to_string();
    live["metadata"]["annotations"] = json!({CLIENT_SIDE.1: last});
    let live = updated(None, live, "kubectl-client-side-apply");
    let mut config = map(json!({"a": "2"}));
    let refused = apply(Some(&live), &config, "other", false).unwrap_err();
    assert_eq!(refused, "\"kubectl-client-side-apply\" using v1: .data.a");
    let taken = apply(Some(&live), &config, "kubectl", false).unwrap();
    assert_eq!(taken["data"]["a"], "2");
    let last = taken["metadata"]["annotations"][CLIENT_SIDE.1].as_str().unwrap();
    assert!(last.contains("\"a\":\"2\""), "{last}");
    config["data"]["b"] = "2".into();
    assert!(apply(Some(&live), &config, "kubectl", false).unwrap_err().ends_with(".data.b"), "that was never applied");
}

#[test]
fn elements_of_lists_are_owned_one_by_one() {
    let schemas = Schemas::builtin();
    let pod = |spec: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
    let first = pod(json!({"containers": [{"name": "a", "image": "i", "command": ["x", "y"],
        "ports": [{"containerPort": 80, "name": "web"}]}, {"name": "b", "image": "i"}], "nodeSelector": {"k": "v"}}));
    let live = schemas.apply(id("Pod"), None, &first, &writer("one"), false).unwrap();
    assert_eq!(
        live["metadata"]["managedFields"][0]["fieldsV1"],
        json!({"f:spec": {"f:nodeSelector": {}, "f:containers": {
            "k:{\"name\":\"a\"}": {".": {}, "f:name": {}, "f:image": {}, "f:command": {}, "f:ports":
                {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:containerPort": {}, "f:name": {}}}},
            "k:{\"name\":\"b\"}": {".": {}, "f:name": {}, "f:image": {}}}}})
    );
    let second = pod(json!({"containers": [{"name": "c", "image": "j"}, {"name": "b", "image": "i"}]}));
    let both = schemas.apply(id("Pod"), Some(&live), &second, &writer("two"), false).unwrap();
    let names = |pod: &Value| {
        let all = pod["spec"]["containers"].as_array().unwrap();
        all.iter().map(|c| c["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join("")
    };
    assert_eq!(names(&both), "acb");
    let less = pod(json!({"containers": [{"name": "a", "image": "i"}]}));
    let left = schemas.apply(id("Pod"), Some(&both), &less, &writer("one"), false).unwrap();
    assert_eq!(names(&left), "acb", "b belongs to the other, too");
    assert_eq!(left["spec"]["containers"][0], json!({"name": "a", "image": "i"}));
    let gone = schemas.apply(id("Pod"), Some(&left), &pod(json!({"containers": []})), &writer("two"), false).unwrap();
    assert_eq!(names(&gone), "a");
    let twice = pod(json!({"containers": [{"name": "a"}, {"name": "a"}], "odd": 1}));
    let faults = schemas.misfits_of(id("Pod"), &twice);
    assert_eq!(
        faults,
        [".spec.containers: duplicate entries for key [name=\"a\"]", ".spec.odd: field not declared in schema"]
    );
}

#[test]
fn a_long_history_is_put_together() {
    let mut object = updated(None, map(json!({"a0": "1"})), "w0");
    for number in 1..15 {
        let mut new = object.clone();
        new["data"][format!("a{number}")] = "1".into();
        let mut by = writer(&format!("w{number}"));
        by.now = format!("2026-01-01T00:00:{number:02}Z");
        Schemas::builtin().own_update(id("ConfigMap"), Some(&object), &mut new, &by);
        object = new;
    }
    let all = owners(&object);
    assert_eq!(all.len(), 10);
    assert_eq!(all[0], "Update ancient-changes: .data .data.a0 .data.a1 .data.a2 .data.a3 .data.a4 .data.a5");
}
