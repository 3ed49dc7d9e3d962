//! Between the form that is stored and the form of the group asked for: only Events have two.

use serde_json::Value;

use crate::kinds::Resource;

/// Fields that are called differently: core/v1 first, events.k8s.io/v1 second.
const EVENT_NAMES: [(&str, &str); 6] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];
/// The reporting controller, likewise.
const REPORTING: [(&str, &str); 2] =
    [("reportingComponent", "reportingController"), ("reportingInstance", "reportingInstance")];

/// A stored object as its group shows it.
pub fn outgoing(resource: &Resource, value: Value) -> Value {
    match resource.stored_as {
        None => value,
        Some(_) => renamed(resource, value, |(stored, shown)| (stored, shown)),
    }
}

/// What a client sent in a group's form, as it is stored.
pub fn incoming(resource: &'static Resource, value: Value) -> Value {
    match resource.stored_as {
        None => value,
        Some(_) => renamed(resource.storage(), value, |(stored, shown)| (shown, stored)),
    }
}

fn renamed(
    to: &Resource,
    mut value: Value,
    order: fn((&'static str, &'static str)) -> (&'static str, &'static str),
) -> Value {
    if let Some(map) = value.as_object_mut() {
        for pair in EVENT_NAMES.into_iter().chain(REPORTING) {
            let (from, into) = order(pair);
            if let Some(part) = map.remove(from) {
                map.insert(into.to_owned(), part);
            }
        }
        map.insert("apiVersion".into(), to.api_version().into());
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_go_both_ways() {
        let new = crate::kinds::find("events.k8s.io", "v1", "events").unwrap();
        let shown = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "note": "n",
            "regarding": {"kind": "Pod"}, "reportingController": "c", "reason": "r"});
        let stored = incoming(new, shown.clone());
        assert_eq!(stored["message"], "n");
        assert_eq!(stored["apiVersion"], "v1");
        assert_eq!(stored["involvedObject"]["kind"], "Pod");
        assert_eq!(outgoing(new, stored), shown);
    }
}
