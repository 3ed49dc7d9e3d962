//! What this node's Pods use: CPU, memory and traffic, in the forms of the kubelet's `/stats/summary` and `/metrics/resource`.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use jiff::Timestamp;
use joey_api::instance::{Instance, Usage};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::config::Config;
use crate::pods::Registry;
use crate::provider::Provider;

/// The shortest span that a rate is taken over, and the longest before it begins anew.
const SPAN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// Instances asked at the same time.
const PARALLEL: usize = 16;

/// Counters at a moment: of the whole instance, and of each container.
#[derive(Clone)]
struct Sample {
    at: Instant,
    total: u64,
    containers: BTreeMap<String, u64>,
}

impl Sample {
    fn of(usage: &Usage) -> Self {
        let containers = usage.containers.iter().map(|own| (own.name.clone(), own.cpu_nanoseconds)).collect();
        Self { at: Instant::now(), total: usage.cpu_nanoseconds, containers }
    }

    /// Billionths of a core used since `before`, in all or by a container. A counter that began anew counts from its beginning.
    fn rate(&self, before: &Self, container: Option<&str>) -> u64 {
        let count = |sample: &Self| match container {
            None => sample.total,
            Some(name) => sample.containers.get(name).copied().unwrap_or(0),
        };
        let used = count(self).checked_sub(count(before)).unwrap_or_else(|| count(self));
        let span = self.at.duration_since(before.at).as_nanos().max(1);
        u64::try_from(u128::from(used) * 1_000_000_000 / span).unwrap_or(u64::MAX)
    }
}

/// Remembers what rates are taken from.
#[derive(Default)]
pub(super) struct Figures {
    before: Mutex<HashMap<String, Sample>>,
}

/// A Pod that runs, and what it uses.
struct Measured {
    pod: Arc<Pod>,
    usage: Usage,
    now: Sample,
    before: Sample,
}

async fn usages(registry: &Registry, provider: &dyn Provider) -> Vec<(Arc<Pod>, Arc<Instance>, Usage)> {
    let asked = registry.running().into_iter().map(|(pod, instance)| async move {
        let usage = provider.usage(&instance.id).await.ok()?;
        Some((pod, instance, usage))
    });
    futures::stream::iter(asked).buffer_unordered(PARALLEL).filter_map(|found| async move { found }).collect().await
}

impl Figures {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Sample>> {
        self.before.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every Pod with two samples, far enough apart.
    async fn measure(&self, registry: &Registry, provider: &dyn Provider) -> Vec<Measured> {
        let mut found = usages(registry, provider).await;
        let young = {
            let mut before = self.lock();
            before.retain(|id, _| found.iter().any(|(_, instance, _)| instance.id == *id));
            let now = Instant::now();
            let mut young = false;
            for (_, instance, usage) in &found {
                let first = before.entry(instance.id.clone()).or_insert_with(|| Sample::of(usage));
                young |= now.duration_since(first.at) < SPAN.0;
            }
            young
        };
        if young {
            // Nobody measured before: a rate needs two looks.
            tokio::time::sleep(SPAN.0).await;
            found = usages(registry, provider).await;
        }
        let mut known = self.lock();
        let measured = found.into_iter().map(|(pod, instance, usage)| {
            let now = Sample::of(&usage);
            let before = known.get(&instance.id).cloned().unwrap_or_else(|| now.clone());
            if now.at.duration_since(before.at) >= SPAN.1 {
                known.insert(instance.id.clone(), now.clone());
            }
            Measured { pod, usage, now, before }
        });
        measured.collect()
    }

    /// `/stats/summary`.
    pub(super) async fn summary(&self, registry: &Registry, provider: &dyn Provider, config: &Config) -> Value {
        let measured = self.measure(registry, provider).await;
        let time = Timestamp::now();
        let cpu = |rate: u64, total: u64| json!({"time": time, "usageNanoCores": rate, "usageCoreNanoSeconds": total});
        let memory = |bytes: u64| json!({"time": time, "workingSetBytes": bytes});
        let sum = |of: fn(&Measured) -> u64| measured.iter().map(of).sum::<u64>();
        let node = json!({
            "nodeName": config.node.name,
            "cpu": cpu(sum(|one| one.now.rate(&one.before, None)), sum(|one| one.usage.cpu_nanoseconds)),
            "memory": memory(sum(|one| one.usage.memory_working_set_bytes)),
        });
        let pods = measured.iter().map(|one| {
            let meta = &one.pod.metadata;
            let containers = one.usage.containers.iter().map(|own| {
                let rate = one.now.rate(&one.before, Some(&own.name));
                json!({"name": own.name, "cpu": cpu(rate, own.cpu_nanoseconds), "memory": memory(own.memory_working_set_bytes)})
            });
            json!({
                "podRef": {"name": meta.name, "namespace": meta.namespace, "uid": meta.uid},
                "startTime": one.pod.status.as_ref().and_then(|status| status.start_time.clone()),
                "containers": containers.collect::<Vec<_>>(),
                "cpu": cpu(one.now.rate(&one.before, None), one.usage.cpu_nanoseconds),
                "memory": memory(one.usage.memory_working_set_bytes),
                "network": {"time": time, "name": "eth0", "rxBytes": one.usage.received_bytes, "txBytes": one.usage.sent_bytes},
            })
        });
        json!({"node": node, "pods": pods.collect::<Vec<_>>()})
    }

    /// `/metrics/resource`, as Kubernetes' metrics server reads it (Prometheus' text format 0.0.4).
    pub(super) async fn metrics(&self, registry: &Registry, provider: &dyn Provider) -> String {
        let found = usages(registry, provider).await;
        let time = Timestamp::now().as_millisecond();
        let seconds = |nanoseconds: u64| nanoseconds as f64 / 1e9;
        let (mut cpu, mut memory, mut started) = (String::new(), String::new(), String::new());
        let (mut cpu_sum, mut memory_sum) = (0, 0);
        for (pod, instance, usage) in &found {
            cpu_sum += usage.cpu_nanoseconds;
            memory_sum += usage.memory_working_set_bytes;
            let text = |value: &Option<String>| value.clone().unwrap_or_default();
            for own in &usage.containers {
                let labels = format!(
                    "{{container=\"{}\",namespace=\"{}\",pod=\"{}\"}}",
                    own.name,
                    text(&pod.metadata.namespace),
                    text(&pod.metadata.name)
                );
                // Writing to a String cannot fail.
                let _ =
                    writeln!(cpu, "container_cpu_usage_seconds_total{labels} {} {time}", seconds(own.cpu_nanoseconds));
                let bytes = own.memory_working_set_bytes;
                let _ = writeln!(memory, "container_memory_working_set_bytes{labels} {bytes} {time}");
                let at = instance.created_at.as_second();
                let _ = writeln!(started, "container_start_time_seconds{labels} {at} {time}");
            }
        }
        format!(
            "# TYPE container_cpu_usage_seconds_total counter\n{cpu}\
             # TYPE container_memory_working_set_bytes gauge\n{memory}\
             # TYPE container_start_time_seconds gauge\n{started}\
             # TYPE node_cpu_usage_seconds_total counter\nnode_cpu_usage_seconds_total {} {time}\n\
             # TYPE node_memory_working_set_bytes gauge\nnode_memory_working_set_bytes {memory_sum} {time}\n\
             # TYPE scrape_error gauge\nscrape_error 0\n",
            seconds(cpu_sum)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        let at = Instant::now();
        let sample = |seconds: u64, total: u64| Sample {
            at: at + Duration::from_secs(seconds),
            total,
            containers: BTreeMap::from([("a".to_owned(), total / 2)]),
        };
        let (before, now) = (sample(0, 1_000_000_000), sample(2, 2_000_000_000));
        assert_eq!(now.rate(&before, None), 500_000_000, "half a core");
        assert_eq!(now.rate(&before, Some("a")), 250_000_000);
        assert_eq!(now.rate(&before, Some("new")), 0);
        assert_eq!(before.rate(&sample(0, 3_000_000_000), None), 1_000_000_000 * 1_000_000_000, "it began anew");
    }
}
