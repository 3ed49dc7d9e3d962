//! What Pods say of other Pods: company, aversion, even spreading. Pure functions; the rules and the words are kube-scheduler's.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::core::v1::{Node, Pod, PodAffinityTerm, TopologySpreadConstraint, WeightedPodAffinityTerm};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

use crate::fit::{self, Room};

/// Namespace and name.
pub(crate) type Key = (String, String);
pub(crate) type Labels = BTreeMap<String, String>;

static NO_LABELS: Labels = BTreeMap::new();
/// Weight of a constraint that is only a wish: that of the heaviest term.
const HEAVIEST: i64 = 100;

const ALONE: &str = "node(s) didn't match pod affinity rules";
const AVERSE: &str = "node(s) didn't match pod anti-affinity rules";
const UNWANTED: &str = "node(s) didn't satisfy existing pods anti-affinity rules";
const UNEVEN: &str = "node(s) didn't match pod topology spread constraints";
const NOWHERE: &str = "node(s) didn't match pod topology spread constraints (missing required label)";

/// A Pod that has a node, as far as others care.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Placed {
    pub(crate) node: String,
    pub(crate) room: Room,
    labels: Labels,
    /// Whom it does not bear beside it.
    averse: Vec<PodAffinityTerm>,
    leaving: bool,
}

impl Placed {
    pub(crate) fn of(pod: &Pod, node: String) -> Self {
        Self {
            node,
            room: pod.spec.as_ref().map(fit::requests).unwrap_or_default(),
            labels: pod.metadata.labels.clone().unwrap_or_default(),
            averse: required(pod).1.to_vec(),
            leaving: pod.metadata.deletion_timestamp.is_some(),
        }
    }
}

/// A Pod as selectors see it.
#[derive(Clone, Copy)]
struct Seen<'a> {
    namespace: &'a str,
    labels: &'a Labels,
}

impl<'a> Seen<'a> {
    fn of(pod: &'a Pod) -> Self {
        let labels = pod.metadata.labels.as_ref().unwrap_or(&NO_LABELS);
        Self { namespace: pod.metadata.namespace.as_deref().unwrap_or_default(), labels }
    }

    fn placed((key, placed): (&'a Key, &'a Placed)) -> Self {
        Self { namespace: &key.0, labels: &placed.labels }
    }
}

/// What there is around a Pod that looks for a node.
#[derive(Clone, Copy)]
pub(crate) struct Around<'a> {
    pub(crate) nodes: &'a BTreeMap<String, Node>,
    pub(crate) namespaces: &'a BTreeMap<String, Labels>,
    pub(crate) placed: &'a HashMap<Key, Placed>,
}

impl Around<'_> {
    /// Why other Pods keep this one from `node`; `None`: they do not.
    pub(crate) fn obstacle(&self, pod: &Pod, node: &Node) -> Option<&'static str> {
        let own = Seen::of(pod);
        let (company, averse) = required(pod);
        let unwanted = || {
            self.placed.iter().any(|(key, other)| {
                let terms = other.averse.iter();
                let mut near = terms.filter(|term| self.is_beside(other, node, &term.topology_key));
                near.any(|term| self.is_meant(term, Seen::placed((key, other)), own))
            })
        };
        if let Some(why) = constraints(pod, "DoNotSchedule").find_map(|one| self.unevenness(pod, one, node)) {
            Some(why)
        } else if !self.has_company(own, company, node) {
            Some(ALONE)
        } else if averse.iter().any(|term| self.meets(own, term, node)) {
            Some(AVERSE)
        } else {
            unwanted().then_some(UNWANTED)
        }
    }

    /// What a Pod prefers of the Pods at `node`, as a sum of weights.
    pub(crate) fn wishes(&self, pod: &Pod, node: &Node) -> i64 {
        let own = Seen::of(pod);
        let (company, averse) = preferred(pod);
        let weigh = |terms: &[WeightedPodAffinityTerm]| -> i64 {
            let met = terms.iter().filter(|wish| self.meets(own, &wish.pod_affinity_term, node));
            met.map(|wish| i64::from(wish.weight)).sum()
        };
        let wishes = constraints(pod, "ScheduleAnyway");
        let uneven = wishes.filter(|one| self.unevenness(pod, one, node).is_some()).map(|_| HEAVIEST).sum::<i64>();
        weigh(company) - weigh(averse) - uneven
    }

    /// Whether a placed Pod is at `node`, or at one that is the same to a topology.
    fn is_beside(&self, placed: &Placed, node: &Node, topology: &str) -> bool {
        let there = self.nodes.get(&placed.node).and_then(|node| domain(node, topology));
        there.is_some() && there == domain(node, topology)
    }

    /// Whether a term that `owner` has is about `other`.
    fn is_meant(&self, term: &PodAffinityTerm, owner: Seen<'_>, other: Seen<'_>) -> bool {
        let named = term.namespaces.as_deref().unwrap_or_default();
        let in_reach = named.iter().any(|name| name == other.namespace)
            || match &term.namespace_selector {
                Some(wanted) => selects(wanted, self.namespaces.get(other.namespace).unwrap_or(&NO_LABELS)),
                None => named.is_empty() && owner.namespace == other.namespace,
            };
        // Of these keys the owner's own value counts, where it has one.
        let mut alike = term.match_label_keys.iter().flatten().filter(|key| owner.labels.contains_key(*key));
        let mut unlike = term.mismatch_label_keys.iter().flatten().filter(|key| owner.labels.contains_key(*key));
        in_reach
            && term.label_selector.as_ref().is_some_and(|wanted| selects(wanted, other.labels))
            && alike.all(|key| other.labels.get(key) == owner.labels.get(key))
            && unlike.all(|key| other.labels.get(key) != owner.labels.get(key))
    }

    /// Whether a Pod that the term means is beside `node`.
    fn meets(&self, own: Seen<'_>, term: &PodAffinityTerm, node: &Node) -> bool {
        let mut beside = self.placed.iter().filter(|(_, other)| self.is_beside(other, node, &term.topology_key));
        beside.any(|other| self.is_meant(term, own, Seen::placed(other)))
    }

    /// Whether the Pods that all terms ask for are beside `node`; the first of its own kind may go to any.
    fn has_company(&self, own: Seen<'_>, terms: &[PodAffinityTerm], node: &Node) -> bool {
        if terms.is_empty() {
            return true;
        }
        let meant = |other: Seen<'_>| terms.iter().all(|term| self.is_meant(term, own, other));
        let known = self.placed.iter().filter(|(_, other)| self.nodes.contains_key(&other.node));
        let company: Vec<&Placed> = known.filter(|other| meant(Seen::placed(*other))).map(|(_, other)| other).collect();
        terms.iter().all(|term| {
            let first = || company.is_empty() && meant(own) && domain(node, &term.topology_key).is_some();
            company.iter().any(|other| self.is_beside(other, node, &term.topology_key)) || first()
        })
    }

    /// What is wrong with one more Pod at `node`, by a constraint on how many more there may be than elsewhere.
    fn unevenness(&self, pod: &Pod, constraint: &TopologySpreadConstraint, node: &Node) -> Option<&'static str> {
        let topology = &constraint.topology_key;
        let Some(here) = domain(node, topology) else { return Some(NOWHERE) };
        let own = Seen::of(pod);
        let counts = |labels: &Labels| {
            let mut alike = constraint.match_label_keys.iter().flatten().filter(|key| own.labels.contains_key(*key));
            constraint.label_selector.as_ref().is_some_and(|wanted| selects(wanted, labels))
                && alike.all(|key| labels.get(key) == own.labels.get(key))
        };
        let part = |node: &Node| takes_part(pod, constraint, node);
        let nodes = self.nodes.values().filter(|node| part(node));
        let mut domains: BTreeMap<&str, i64> =
            nodes.filter_map(|node| domain(node, topology)).map(|domain| (domain, 0)).collect();
        for ((namespace, _), other) in self.placed {
            if namespace == own.namespace
                && !other.leaving
                && counts(&other.labels)
                && let Some(at) = self.nodes.get(&other.node).filter(|node| part(node))
                && let Some(count) = domain(at, topology).and_then(|domain| domains.get_mut(domain))
            {
                *count += 1;
            }
        }
        let enough = constraint.min_domains.and_then(|wanted| usize::try_from(wanted).ok()).unwrap_or(1);
        let least = if domains.len() < enough { 0 } else { domains.values().copied().min().unwrap_or(0) };
        let further = domains.get(here).copied().unwrap_or(0) + i64::from(counts(own.labels));
        (further - least > i64::from(constraint.max_skew)).then_some(UNEVEN)
    }
}

/// Whether a Pod that finds no node may find one when another Pod has been placed.
pub(crate) fn looks_at_others(pod: &Pod) -> bool {
    !required(pod).0.is_empty() || constraints(pod, "DoNotSchedule").next().is_some()
}

/// Whom a Pod must have beside it, and whom it must not.
fn required(pod: &Pod) -> (&[PodAffinityTerm], &[PodAffinityTerm]) {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let company = affinity.and_then(|own| own.pod_affinity.as_ref());
    let averse = affinity.and_then(|own| own.pod_anti_affinity.as_ref());
    let company = company.and_then(|own| own.required_during_scheduling_ignored_during_execution.as_deref());
    let averse = averse.and_then(|own| own.required_during_scheduling_ignored_during_execution.as_deref());
    (company.unwrap_or_default(), averse.unwrap_or_default())
}

/// Whom a Pod would rather have beside it, and whom rather not.
fn preferred(pod: &Pod) -> (&[WeightedPodAffinityTerm], &[WeightedPodAffinityTerm]) {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let company = affinity.and_then(|own| own.pod_affinity.as_ref());
    let averse = affinity.and_then(|own| own.pod_anti_affinity.as_ref());
    let company = company.and_then(|own| own.preferred_during_scheduling_ignored_during_execution.as_deref());
    let averse = averse.and_then(|own| own.preferred_during_scheduling_ignored_during_execution.as_deref());
    (company.unwrap_or_default(), averse.unwrap_or_default())
}

fn constraints<'a>(pod: &'a Pod, otherwise: &'static str) -> impl Iterator<Item = &'a TopologySpreadConstraint> {
    let all = pod.spec.as_ref().and_then(|spec| spec.topology_spread_constraints.as_deref()).unwrap_or_default();
    all.iter().filter(move |one| one.when_unsatisfiable == otherwise)
}

/// The value that a node has of a topology.
fn domain<'a>(node: &'a Node, topology: &str) -> Option<&'a str> {
    node.metadata.labels.as_ref()?.get(topology).map(String::as_str)
}

/// Whether a node counts among those over which Pods are spread.
fn takes_part(pod: &Pod, constraint: &TopologySpreadConstraint, node: &Node) -> bool {
    let Some(spec) = &pod.spec else { return true };
    (constraint.node_affinity_policy.as_deref() == Some("Ignore") || fit::selector_matches(spec, node))
        && (constraint.node_taints_policy.as_deref() != Some("Honor") || fit::untolerated(spec, node).is_none())
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
        && selector.match_expressions.iter().flatten().all(|wanted| {
            let found = labels.get(&wanted.key);
            let listed = || found.is_some_and(|found| wanted.values.iter().flatten().any(|value| value == found));
            match wanted.operator.as_str() {
                "In" => listed(),
                "NotIn" => !listed(),
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                _ => false,
            }
        })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Nodes `a` and `b` in zone `x`, `c` in zone `y`, `d` in none; namespaces `n`, and `m` of team `red`.
    #[derive(Default)]
    struct World {
        nodes: BTreeMap<String, Node>,
        namespaces: BTreeMap<String, Labels>,
        placed: HashMap<Key, Placed>,
    }

    impl World {
        fn new() -> Self {
            let mut world = Self::default();
            for (name, zone) in [("a", Some("x")), ("b", Some("x")), ("c", Some("y")), ("d", None)] {
                let mut node = json!({"metadata": {"name": name, "labels": {"host": name}}});
                if let Some(zone) = zone {
                    node["metadata"]["labels"]["zone"] = zone.into();
                }
                world.nodes.insert(name.to_owned(), serde_json::from_value(node).unwrap());
            }
            world.namespaces.insert("n".to_owned(), Labels::new());
            world.namespaces.insert("m".to_owned(), [("team".to_owned(), "red".to_owned())].into());
            world
        }

        fn place(&mut self, pod: &Pod, node: &str) {
            let key = (pod.metadata.namespace.clone().unwrap(), format!("p{}", self.placed.len()));
            self.placed.insert(key, Placed::of(pod, node.to_owned()));
        }

        fn around(&self) -> Around<'_> {
            Around { nodes: &self.nodes, namespaces: &self.namespaces, placed: &self.placed }
        }

        /// What keeps a Pod from each of the four nodes.
        fn obstacles(&self, pod: &Pod) -> [Option<&'static str>; 4] {
            ["a", "b", "c", "d"].map(|name| self.around().obstacle(pod, &self.nodes[name]))
        }
    }

    fn pod(namespace: &str, app: &str, spec: Value) -> Pod {
        let mut whole = json!({"containers": [{"name": "c"}]});
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": namespace, "labels": {"app": app}},
            "spec": whole}))
        .unwrap()
    }

    fn plain(namespace: &str, app: &str) -> Pod {
        pod(namespace, app, json!({}))
    }

    fn affinity(kind: &str, topology: &str, app: &str, further: Value) -> Value {
        let mut term = json!({"topologyKey": topology, "labelSelector": {"matchLabels": {"app": app}}});
        term.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
        json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}})
    }

    #[test]
    fn company_is_found_by_topology() {
        let mut world = World::new();
        let wants = pod("n", "web", affinity("podAffinity", "zone", "db", json!({})));
        assert!(looks_at_others(&wants));
        assert_eq!(world.obstacles(&wants), [Some(ALONE); 4]);
        world.place(&plain("m", "db"), "c");
        assert_eq!(world.obstacles(&wants), [Some(ALONE); 4], "another namespace is out of reach");
        world.place(&plain("n", "db"), "a");
        assert_eq!(world.obstacles(&wants), [None, None, Some(ALONE), Some(ALONE)]);
        let anywhere = |further: Value| pod("n", "web", affinity("podAffinity", "host", "db", further));
        for further in [
            json!({"namespaces": ["m"]}),
            json!({"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "In", "values": ["red"]}]}}),
        ] {
            assert_eq!(world.obstacles(&anywhere(further))[2], None);
        }
        let all = world.obstacles(&anywhere(json!({"namespaceSelector": {}})));
        assert_eq!(all, [None, Some(ALONE), None, Some(ALONE)]);
    }

    #[test]
    fn the_first_of_its_kind_goes_anywhere() {
        let mut world = World::new();
        let flock = pod("n", "web", affinity("podAffinity", "zone", "web", json!({})));
        assert_eq!(world.obstacles(&flock), [None, None, None, Some(ALONE)], "but where there is no zone");
        world.place(&flock, "c");
        assert_eq!(world.obstacles(&flock), [Some(ALONE), Some(ALONE), None, Some(ALONE)]);
    }

    #[test]
    fn aversion_holds_both_ways() {
        let mut world = World::new();
        let loner = pod("n", "web", affinity("podAntiAffinity", "zone", "web", json!({})));
        assert!(!looks_at_others(&loner));
        assert_eq!(world.obstacles(&loner), [None; 4]);
        world.place(&plain("n", "web"), "a");
        assert_eq!(world.obstacles(&loner), [Some(AVERSE), Some(AVERSE), None, None]);
        world.place(&loner, "c");
        assert_eq!(world.obstacles(&plain("n", "web")), [None, None, Some(UNWANTED), None]);
        assert_eq!(world.obstacles(&plain("n", "db")), [None; 4]);
    }

    #[test]
    fn own_values_of_labels_count() {
        let mut world = World::new();
        let hashed = |hash: &str, further: Value| {
            let mut pod = pod("n", "web", affinity("podAntiAffinity", "host", "web", further));
            pod.metadata.labels.get_or_insert_default().insert("hash".to_owned(), hash.to_owned());
            pod
        };
        world.place(&hashed("1", json!({"labelSelector": null})), "a");
        for (key, hash, why) in [
            ("matchLabelKeys", "1", Some(AVERSE)),
            ("matchLabelKeys", "2", None),
            ("mismatchLabelKeys", "1", None),
            ("mismatchLabelKeys", "2", Some(AVERSE)),
        ] {
            assert_eq!(world.obstacles(&hashed(hash, json!({key: ["hash", "none"]})))[0], why, "{key} {hash}");
        }
    }

    #[test]
    fn pods_are_spread_evenly() {
        let mut world = World::new();
        let spread = |further: Value| {
            let mut one = json!({"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule",
                "labelSelector": {"matchLabels": {"app": "web"}}});
            one.as_object_mut().unwrap().extend(further.as_object().unwrap().clone());
            pod("n", "web", json!({"topologySpreadConstraints": [one]}))
        };
        assert!(looks_at_others(&spread(json!({}))));
        assert_eq!(world.obstacles(&spread(json!({}))), [None, None, None, Some(NOWHERE)]);
        world.place(&plain("m", "web"), "a");
        assert_eq!(world.obstacles(&spread(json!({})))[0], None, "another namespace does not count");
        world.place(&plain("n", "web"), "a");
        assert_eq!(world.obstacles(&spread(json!({}))), [Some(UNEVEN), Some(UNEVEN), None, Some(NOWHERE)]);
        assert_eq!(world.obstacles(&spread(json!({"maxSkew": 2})))[0], None);
        world.place(&plain("n", "web"), "c");
        assert_eq!(world.obstacles(&spread(json!({})))[0], None);
        assert_eq!(world.obstacles(&spread(json!({"minDomains": 3})))[0], Some(UNEVEN));
        // A wish keeps from nothing.
        let wish = spread(json!({"whenUnsatisfiable": "ScheduleAnyway", "minDomains": 3}));
        assert_eq!((world.obstacles(&wish), looks_at_others(&wish)), ([None; 4], false));
        assert_eq!(world.around().wishes(&wish, &world.nodes["a"]), -HEAVIEST);
    }

    #[test]
    fn wishes_are_weighed() {
        let mut world = World::new();
        world.place(&plain("n", "db"), "a");
        let wish = |weight: i32| {
            json!([{"weight": weight, "podAffinityTerm":
                {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "db"}}}}])
        };
        let wants = pod(
            "n",
            "web",
            json!({"affinity": {
                "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": wish(20)},
                "podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": wish(5)}}}),
        );
        let weights = ["a", "b", "c"].map(|name| world.around().wishes(&wants, &world.nodes[name]));
        assert_eq!((weights, world.obstacles(&wants)), ([15, 15, 0], [None; 4]));
    }
}
