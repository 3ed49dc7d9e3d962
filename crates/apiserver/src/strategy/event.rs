//! Events: kept for an hour.

use std::time::Duration;

use serde_json::Value;

use super::Strategy;
use crate::object::text;
use crate::status::FieldFault;

pub struct Event;

impl Strategy for Event {
    fn validate(&self, value: &Value, faults: &mut Vec<FieldFault>) {
        let (about, own) = (text(value, "/involvedObject/namespace"), text(value, "/metadata/namespace"));
        // Events about objects without a namespace live in "default".
        if about != own && !(about.is_empty() && own == "default") {
            let why = "does not match event.namespace";
            faults.push(FieldFault::invalid("involvedObject.namespace", &about.into(), why));
        }
    }

    fn life(&self) -> Option<Duration> {
        Some(Duration::from_secs(3600))
    }
}
