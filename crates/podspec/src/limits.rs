//! What a Pod and its containers may use: requests and limits, and what annotations say of the Pod as a whole. Nothing here is
//! shared out beyond what there is, so a request is a limit where there is no limit.

use std::collections::BTreeMap;

use joey_api::annotations::{
    BANDWIDTH, CORE_PATTERN, DISK_BYTES, DISK_OPERATIONS, PACKETS, PIDS, STORAGE_OPTIONS, USE_SPECS, encrypts_disk,
};
use joey_api::instance::{Limits, NetworkSpec, Resources};
use joey_api::lifecycle::RestartOnResize;
use joey_model::quantity::{parse_milli, parse_units};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::{Notes, given};

type Amounts = BTreeMap<String, Quantity>;

/// A container's limits. Where the Pod has limits as a whole, a request alone limits nothing: the container may use what the
/// others leave.
pub(crate) fn container(
    at: &str,
    resources: Option<&core::ResourceRequirements>,
    pod_is_limited: bool,
    notes: &mut Notes,
) -> Resources {
    let mut wanted = Resources::default();
    let Some(core::ResourceRequirements { claims, limits, requests }) = resources else { return wanted };
    notes.refuse_if(given(claims), format!("{at}resources.claims"), "leave them out; there are no devices");
    let read = |list: &Option<Amounts>, what: &str, notes: &mut Notes| {
        let mut found = Resources::default();
        for (name, amount) in list.iter().flatten() {
            let parsed = match name.as_str() {
                "cpu" => parse_milli(&amount.0).map(|milli| found.cpu_milli = Some(milli)),
                "memory" => parse_units(&amount.0).map(|bytes| found.memory_bytes = Some(bytes)),
                "ephemeral-storage" => parse_units(&amount.0).map(|bytes| found.ephemeral_storage_bytes = Some(bytes)),
                _ => {
                    notes.refuse_if(
                        true,
                        format!("{at}{what} of {name}"),
                        "name cpu, memory and ephemeral-storage only; there are no devices and no huge pages",
                    );
                    Ok(())
                }
            };
            if let Err(error) = parsed {
                notes.faults.push(format!("{at}{what} of {name}: {error}"));
            }
        }
        found
    };
    wanted = read(limits, "limit", notes);
    let requested = read(requests, "request", notes);
    if !pod_is_limited {
        let some = |amount: Option<u64>| amount.filter(|amount| *amount > 0);
        wanted.cpu_milli = wanted.cpu_milli.or(some(requested.cpu_milli));
        wanted.memory_bytes = wanted.memory_bytes.or(some(requested.memory_bytes));
        wanted.ephemeral_storage_bytes = wanted.ephemeral_storage_bytes.or(some(requested.ephemeral_storage_bytes));
    }
    wanted
}

/// Which amounts start the container again when they change.
pub(crate) fn restart_on_resize(container: &core::Container) -> RestartOnResize {
    let restarts = |amount: &str| {
        container.resize_policy.iter().flatten().any(|core::ContainerResizePolicy { resource_name, restart_policy }| {
            resource_name == amount && restart_policy == "RestartContainer"
        })
    };
    RestartOnResize { cpu: restarts("cpu"), memory: restarts("memory") }
}

/// Whether something limits the Pod's CPU and memory as a whole.
pub(crate) fn pod_is_limited(pod: &core::Pod, spec: &core::PodSpec) -> bool {
    spec.resources.is_some() || annotation(pod, USE_SPECS).is_some()
}

/// Limits on the Pod as a whole.
pub(crate) fn pod(pod: &core::Pod, spec: &core::PodSpec, notes: &mut Notes) -> Limits {
    let own = container("spec.resources: ", spec.resources.as_ref(), false, notes);
    notes.refuse_if(
        own.ephemeral_storage_bytes.is_some(),
        "spec.resources: limit of ephemeral-storage",
        "limit that of the containers and of emptyDir volumes",
    );
    let mut amount = |key: &str| amount(pod, key, notes);
    Limits {
        cpu_milli: own.cpu_milli,
        memory_bytes: own.memory_bytes,
        pids: amount(PIDS),
        disk_bytes_per_second: amount(DISK_BYTES),
        disk_operations_per_second: amount(DISK_OPERATIONS),
    }
}

/// Sizes of which the Pod takes the first that can be had.
pub(crate) fn use_specs(pod: &core::Pod) -> Vec<String> {
    let words = annotation(pod, USE_SPECS).into_iter().flat_map(|text| text.split(','));
    words.map(str::trim).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

/// Where cores are written; what is no pattern is refused with the instance.
pub(crate) fn core_pattern(pod: &core::Pod) -> Option<String> {
    annotation(pod, CORE_PATTERN).map(str::to_owned)
}

/// Refuses an encrypted disk where the Pod has no machine that could have one.
pub(crate) fn encryption(pod: &core::Pod, spec: &core::PodSpec, notes: &mut Notes) {
    let asked = pod.metadata.annotations.as_ref().map_or(Ok(false), encrypts_disk);
    let own = spec.runtime_class_name.as_deref() == Some("rund");
    match asked {
        Ok(asked) => notes.refuse_if(
            asked && !own,
            format!("annotation {STORAGE_OPTIONS}"),
            "choose runtimeClassName: rund, whose machines have disks that can be encrypted",
        ),
        Err(why) => notes.faults.push(why),
    }
}

/// Caps of the network by annotation.
pub(crate) fn network(pod: &core::Pod, notes: &mut Notes) -> NetworkSpec {
    let mut amount = |key: &str| amount(pod, key, notes);
    NetworkSpec {
        ingress_bits_per_second: amount(BANDWIDTH[0]),
        egress_bits_per_second: amount(BANDWIDTH[1]),
        ingress_packets_per_second: amount(PACKETS[0]),
        egress_packets_per_second: amount(PACKETS[1]),
        ..NetworkSpec::default()
    }
}

fn annotation<'a>(pod: &'a core::Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

fn amount(pod: &core::Pod, key: &str, notes: &mut Notes) -> Option<u64> {
    parse_units(annotation(pod, key)?).map_err(|error| notes.faults.push(format!("annotation {key}: {error}"))).ok()
}
