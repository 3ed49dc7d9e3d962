//! Tests of the OpenAPI documents: what kubectl looks for, and that no reference leads nowhere.

use super::*;

const ALL: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

fn documents() -> Documents {
    let resource =
        |group, kind, plural, namespaced| ServedResource { group, version: "v1", kind, plural, namespaced, verbs: ALL };
    let sub = |name, verbs, body| ServedSubresource { name, verbs, body };
    let pods = vec![
        sub("status", &["get", "patch", "update"][..], ("", "v1", "Pod")),
        sub("exec", &["create", "get"], ("", "v1", "PodExecOptions")),
        sub("binding", &["create"], ("", "v1", "Binding")),
        sub("eviction", &["create"], ("policy", "v1", "Eviction")),
        sub("log", &["get"], ("", "v1", "Pod")),
    ];
    Documents::build([
        (resource("", "Pod", "pods", true), pods),
        (resource("", "Namespace", "namespaces", false), vec![]),
        (resource("", "ConfigMap", "configmaps", true), vec![]),
        (resource("coordination.k8s.io", "Lease", "leases", true), vec![]),
    ])
}

fn parsed(root: &str) -> Value {
    serde_json::from_slice(&documents().document(root).unwrap()).unwrap()
}

#[test]
fn the_index_names_every_group() {
    let index: Value = serde_json::from_slice(&documents().index()).unwrap();
    let url = |root: &str| index["paths"][root]["serverRelativeURL"].as_str().unwrap().to_owned();
    assert!(url("api/v1").starts_with("/openapi/v3/api/v1?hash="));
    assert!(url("apis/coordination.k8s.io/v1").starts_with("/openapi/v3/apis/coordination.k8s.io/v1?hash="));
    assert_eq!(documents().index(), documents().index());
    assert!(documents().document("apis/apps/v1").is_none());
}

#[test]
fn references_lead_somewhere() {
    for root in ["api/v1", "apis/coordination.k8s.io/v1"] {
        let document = parsed(root);
        references(&document, &mut |name| {
            assert!(document["components"]["schemas"][name].is_object(), "{root}: {name}");
        });
    }
}

#[test]
fn only_what_is_served_is_described() {
    let document = parsed("apis/coordination.k8s.io/v1");
    let schemas = document["components"]["schemas"].as_object().unwrap();
    assert!(schemas.contains_key("io.k8s.api.coordination.v1.LeaseList"));
    assert!(!schemas.contains_key("io.k8s.api.core.v1.Pod"));
    assert!(!parsed("api/v1")["components"]["schemas"].as_object().unwrap().contains_key("io.k8s.api.core.v1.Node"));
}

#[test]
fn what_kubectl_looks_for() {
    let document = parsed("api/v1");
    let path = &document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}"];
    let kind = json!({"group": "", "version": "v1", "kind": "Pod"});
    for method in ["put", "patch"] {
        let operation = &path[method];
        assert_eq!(operation["x-kubernetes-group-version-kind"], kind);
        let parameters = operation["parameters"].as_array().unwrap();
        assert!(
            parameters.iter().any(|parameter| parameter["name"] == "fieldValidation" && parameter["in"] == "query")
        );
    }
    assert!(path["patch"]["requestBody"]["content"]["application/strategic-merge-patch+json"].is_object());
    assert_eq!(
        document["paths"]["/api/v1/namespaces/{namespace}/pods/{name}/exec"]["post"]["x-kubernetes-action"],
        "connect"
    );
    assert_eq!(document["paths"]["/api/v1/pods"]["get"]["x-kubernetes-action"], "list");
    let pod = &document["components"]["schemas"]["io.k8s.api.core.v1.Pod"];
    assert_eq!(pod["x-kubernetes-group-version-kind"], json!([kind]));
    let containers = &document["components"]["schemas"]["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
    assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
    assert!(containers["description"].is_string());
}

#[test]
fn operations_have_names_of_their_own() {
    let mut seen = BTreeSet::new();
    for (path, methods) in parsed("api/v1")["paths"].as_object().unwrap() {
        for operation in methods.as_object().unwrap().values().filter(|value| value.is_object()) {
            let id = operation["operationId"].as_str().unwrap();
            assert!(seen.insert(id.to_owned()), "{path}: {id}");
        }
    }
}

#[test]
fn descriptions_are_of_known_fields() {
    let facts: Facts = serde_json::from_str(FACTS).unwrap();
    let texts: BTreeMap<String, BTreeMap<String, String>> = serde_json::from_str(DESCRIPTIONS).unwrap();
    for (name, fields) in texts {
        let schema = facts.get(&name).unwrap_or_else(|| panic!("{name}"));
        for field in fields.keys().filter(|field| !field.is_empty()) {
            assert!(schema["properties"][field].is_object(), "{name}: {field}");
        }
    }
}
