//! The table of kinds. A further kind is an entry here (and its schema facts), not new code.
//!
//! What is special about a kind on its way into the store is its [`Strategy`]; how it is printed is its list of columns.

use crate::metrics;
use crate::strategy::{self, Strategy};
use crate::table::{self, Column};

/// One kind served under one group and version.
pub struct Resource {
    /// Empty for the core group.
    pub group: &'static str,
    pub version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    pub singular: &'static str,
    pub short_names: &'static [&'static str],
    pub namespaced: bool,
    pub verbs: &'static [&'static str],
    pub categories: &'static [&'static str],
    pub strategy: &'static dyn Strategy,
    pub columns: &'static [Column],
    /// Dotted paths that field selectors may name, besides `metadata.name` and `metadata.namespace`.
    pub fields: &'static [&'static str],
    pub subresources: &'static [Subresource],
    /// Group and plural whose objects these are, when another entry owns them (two versions of one kind).
    pub stored_as: Option<(&'static str, &'static str)>,
    /// Whether its objects are made when they are asked for, and never stored.
    pub made: bool,
}

/// A path below an object.
pub struct Subresource {
    pub name: &'static str,
    pub verbs: &'static [&'static str],
    /// Group, version and kind of its body.
    pub body: (&'static str, &'static str, &'static str),
}

const ALL: &[&str] = &["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];
const READ: &[&str] = &["get", "list", "watch"];
const ASK: &[&str] = &["get", "list"];
const CREATE: &[&str] = &["create"];
const STATUS: &[&str] = &["get", "patch", "update"];
const CONNECT: &[&str] = &["create", "get"];

const fn sub(
    name: &'static str,
    verbs: &'static [&'static str],
    body: (&'static str, &'static str, &'static str),
) -> Subresource {
    Subresource { name, verbs, body }
}

const EVENT_FIELDS: &[&str] = &[
    "involvedObject.kind",
    "involvedObject.namespace",
    "involvedObject.name",
    "involvedObject.uid",
    "involvedObject.apiVersion",
    "involvedObject.resourceVersion",
    "involvedObject.fieldPath",
    "reason",
    "reportingComponent",
    "source",
    "type",
];

const EMPTY: Resource = Resource {
    group: "",
    version: "v1",
    kind: "",
    plural: "",
    singular: "",
    short_names: &[],
    namespaced: true,
    verbs: ALL,
    categories: &[],
    strategy: &strategy::Plain,
    columns: table::DEFAULT,
    fields: &[],
    subresources: &[],
    stored_as: None,
    made: false,
};

/// Every kind that is served.
pub static RESOURCES: &[Resource] = &[
    Resource { kind: "Binding", plural: "bindings", singular: "binding", verbs: CREATE, ..EMPTY },
    Resource {
        kind: "ConfigMap",
        plural: "configmaps",
        singular: "configmap",
        short_names: &["cm"],
        strategy: &strategy::config::ConfigMap,
        columns: table::plain::CONFIG_MAP,
        ..EMPTY
    },
    Resource {
        kind: "Event",
        plural: "events",
        singular: "event",
        short_names: &["ev"],
        strategy: &strategy::event::Event,
        columns: table::plain::EVENT,
        fields: EVENT_FIELDS,
        ..EMPTY
    },
    Resource {
        kind: "Namespace",
        plural: "namespaces",
        singular: "namespace",
        short_names: &["ns"],
        namespaced: false,
        verbs: &["create", "delete", "get", "list", "patch", "update", "watch"],
        strategy: &strategy::namespace::Namespace,
        columns: table::plain::NAMESPACE,
        fields: &["status.phase"],
        subresources: &[
            sub("finalize", &["update"], ("", "v1", "Namespace")),
            sub("status", STATUS, ("", "v1", "Namespace")),
        ],
        ..EMPTY
    },
    Resource {
        kind: "Node",
        plural: "nodes",
        singular: "node",
        short_names: &["no"],
        namespaced: false,
        strategy: &strategy::node::Node,
        columns: table::plain::NODE,
        fields: &["spec.unschedulable"],
        subresources: &[sub("status", STATUS, ("", "v1", "Node"))],
        ..EMPTY
    },
    Resource {
        kind: "Pod",
        plural: "pods",
        singular: "pod",
        short_names: &["po"],
        categories: &["all"],
        strategy: &strategy::pod::Pod,
        columns: table::pod::COLUMNS,
        fields: &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.schedulerName",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        subresources: &[
            sub("attach", CONNECT, ("", "v1", "PodAttachOptions")),
            sub("binding", CREATE, ("", "v1", "Binding")),
            sub("ephemeralcontainers", STATUS, ("", "v1", "Pod")),
            sub("eviction", CREATE, ("policy", "v1", "Eviction")),
            sub("exec", CONNECT, ("", "v1", "PodExecOptions")),
            sub("log", &["get"], ("", "v1", "Pod")),
            sub("portforward", CONNECT, ("", "v1", "PodPortForwardOptions")),
            sub("resize", STATUS, ("", "v1", "Pod")),
            sub("status", STATUS, ("", "v1", "Pod")),
        ],
        ..EMPTY
    },
    Resource {
        kind: "Secret",
        plural: "secrets",
        singular: "secret",
        strategy: &strategy::config::Secret,
        columns: table::plain::SECRET,
        fields: &["type"],
        ..EMPTY
    },
    Resource {
        kind: "ServiceAccount",
        plural: "serviceaccounts",
        singular: "serviceaccount",
        short_names: &["sa"],
        columns: table::plain::SERVICE_ACCOUNT,
        subresources: &[sub("token", CREATE, ("authentication.k8s.io", "v1", "TokenRequest"))],
        ..EMPTY
    },
    // Read only until Services are routed: kubectl cluster-info asks for the list.
    Resource {
        kind: "Service",
        plural: "services",
        singular: "service",
        short_names: &["svc"],
        verbs: READ,
        categories: &["all"],
        ..EMPTY
    },
    Resource {
        group: "authentication.k8s.io",
        kind: "SelfSubjectReview",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        namespaced: false,
        verbs: CREATE,
        ..EMPTY
    },
    Resource {
        group: "authorization.k8s.io",
        kind: "SelfSubjectAccessReview",
        plural: "selfsubjectaccessreviews",
        singular: "selfsubjectaccessreview",
        namespaced: false,
        verbs: CREATE,
        ..EMPTY
    },
    Resource {
        group: "authorization.k8s.io",
        kind: "SelfSubjectRulesReview",
        plural: "selfsubjectrulesreviews",
        singular: "selfsubjectrulesreview",
        namespaced: false,
        verbs: CREATE,
        ..EMPTY
    },
    Resource {
        group: "coordination.k8s.io",
        kind: "Lease",
        plural: "leases",
        singular: "lease",
        columns: table::plain::LEASE,
        ..EMPTY
    },
    Resource {
        group: "events.k8s.io",
        kind: "Event",
        plural: "events",
        singular: "event",
        short_names: &["ev"],
        strategy: &strategy::event::Event,
        columns: table::plain::EVENT,
        fields: EVENT_FIELDS,
        stored_as: Some(("", "events")),
        ..EMPTY
    },
    Resource {
        group: metrics::GROUP,
        version: "v1beta1",
        kind: "NodeMetrics",
        plural: "nodes",
        namespaced: false,
        verbs: ASK,
        columns: metrics::COLUMNS,
        made: true,
        ..EMPTY
    },
    Resource {
        group: metrics::GROUP,
        version: "v1beta1",
        kind: "PodMetrics",
        plural: "pods",
        verbs: ASK,
        columns: metrics::COLUMNS,
        made: true,
        ..EMPTY
    },
];

impl Resource {
    /// `pods`, `leases.coordination.k8s.io`: the name used in messages.
    pub fn qualified(&self) -> String {
        match self.group {
            "" => self.plural.to_owned(),
            group => format!("{}.{group}", self.plural),
        }
    }

    /// `v1`, `coordination.k8s.io/v1`.
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// The entry whose objects are stored.
    pub fn storage(&'static self) -> &'static Resource {
        self.stored_as
            .and_then(|(group, plural)| RESOURCES.iter().find(|r| r.group == group && r.plural == plural))
            .unwrap_or(self)
    }

    /// The part of the store that holds this kind; ends with a slash.
    pub fn prefix(&'static self) -> String {
        let stored = self.storage();
        let group = if stored.group.is_empty() { "core" } else { stored.group };
        format!("{ROOT}{group}/{}/", stored.plural)
    }

    /// The store's key of one object.
    pub fn key(&'static self, namespace: &str, name: &str) -> String {
        match self.namespaced {
            true => format!("{}{namespace}/{name}", self.prefix()),
            false => format!("{}{name}", self.prefix()),
        }
    }

    pub fn has_verb(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }

    /// Whether objects of this kind are kept at all.
    pub fn is_stored(&self) -> bool {
        self.has_verb("list") && self.stored_as.is_none() && !self.made
    }

    pub fn subresource(&self, name: &str) -> Option<&'static Subresource> {
        self.subresources.iter().find(|sub| sub.name == name)
    }

    /// Whether `.status` belongs to a subresource of its own and plain writes leave it alone.
    pub fn has_status(&self) -> bool {
        self.subresource("status").is_some()
    }
}

/// The part of the store that belongs to the API server.
pub const ROOT: &str = "/registry/";

/// The entry of a group, version and plural name.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static Resource> {
    RESOURCES.iter().find(|r| r.group == group && r.version == version && r.plural == plural)
}

/// Groups in the order of discovery, the core group first, each with its one version.
pub fn groups() -> Vec<(&'static str, &'static str)> {
    let mut groups: Vec<(&str, &str)> = Vec::new();
    for resource in RESOURCES {
        if !groups.contains(&(resource.group, resource.version)) {
            groups.push((resource.group, resource.version));
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys() {
        let pods = find("", "v1", "pods").unwrap();
        assert_eq!(pods.key("default", "a"), "/registry/core/pods/default/a");
        let events = find("events.k8s.io", "v1", "events").unwrap();
        assert_eq!(events.key("default", "a"), "/registry/core/events/default/a");
        assert_eq!(groups()[0], ("", "v1"));
    }
}
