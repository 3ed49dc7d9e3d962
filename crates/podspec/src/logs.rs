//! What of a Pod's logs is collected: annotations; variables of containers are read where they have their values.

use std::collections::BTreeMap;

use joey_api::annotations::{LOG_SINK, LOGS};
use joey_api::instance::ContainerSpec;
use joey_api::logs::{self, LogSource, Logs};
use k8s_openapi::api::core::v1 as core;

use crate::Notes;

pub(crate) fn logs(pod: &core::Pod, containers: &[ContainerSpec], notes: &mut Notes) -> Logs {
    let annotation = |key: &str| pod.metadata.annotations.as_ref()?.get(key);
    let sources = match annotation(LOGS).map(|text| serde_json::from_str::<Vec<LogSource>>(text)).transpose() {
        Ok(sources) => sources.unwrap_or_default(),
        Err(error) => {
            let wanted = r#"a list such as [{"name": "app", "from": "/var/log/*.log"}]"#;
            notes.faults.push(format!("annotation {LOGS}: {error}; it is {wanted}"));
            return Logs::default();
        }
    };
    let mut variables = containers.iter().flat_map(|container| &container.env);
    if sources.is_empty() && !variables.any(|variable| variable.name.starts_with(logs::PREFIX)) {
        return Logs::default();
    }
    let of = |key: &str, value: &Option<String>| (key.to_owned(), value.clone().unwrap_or_default());
    let fields = BTreeMap::from([of("namespace", &pod.metadata.namespace), of("pod", &pod.metadata.name)]);
    let logs = Logs { sink: annotation(LOG_SINK).cloned(), sources, fields };
    let names: Vec<&str> = containers.iter().map(|container| container.name.as_str()).collect();
    notes.faults.extend(logs::check(&logs, &names).into_iter().map(|fault| format!("annotation {LOGS}: {fault}")));
    logs
}
