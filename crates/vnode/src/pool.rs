//! The provider that speaks to Joey's instance service over its REST API.

use async_trait::async_trait;
use futures::StreamExt;
use http::Method;
use joey_api::change::InstanceChange;
use joey_api::instance::{ExecRequest, Host, Instance, InstanceSpec, LogOptions, Usage, WatchEvent};
use joey_model::Fault;

use crate::provider::{ByteStream, Capacity, Frames, InstanceEvents, Provider};

/// [`Provider`] over the instance service.
#[derive(Clone)]
pub struct PoolProvider {
    service: joey_rpc::Client,
}

impl PoolProvider {
    pub fn new(service: joey_rpc::Client) -> Self {
        Self { service }
    }

    async fn interact(
        &self,
        verb: &str,
        id: &str,
        container: &str,
        request: &ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        let path = format!("{}/containers/{}/{verb}?{}", path(id)?, plain(container)?, joey_rpc::query(request));
        Ok(self.service.duplex(Method::POST, &path, input).await?)
    }
}

/// Ids, instance names and container names are of `a-z 0-9 - .`: checked where they are made, so none needs escaping. What is
/// not, such as a container name out of a request's path, is refused here.
fn plain(name: &str) -> Result<&str, Fault> {
    joey_model::id::check_subdomain("name", name)
        .map_err(|error| Fault::new(joey_model::ErrorKind::NotFound, "NotFound", error.to_string()))?;
    Ok(name)
}

fn path(id: &str) -> Result<String, Fault> {
    Ok(format!("/v1/instances/{}", plain(id)?))
}

#[async_trait]
impl Provider for PoolProvider {
    async fn create(&self, spec: InstanceSpec) -> Result<Instance, Fault> {
        self.service.call(Method::POST, "/v1/instances", Some(&spec)).await.map_err(Fault::from)
    }

    async fn change(&self, id: &str, change: &InstanceChange) -> Result<Instance, Fault> {
        self.service.call(Method::PATCH, &path(id)?, Some(change)).await.map_err(Fault::from)
    }

    async fn delete(&self, id: &str, grace: Option<u32>) -> Result<(), Fault> {
        let query = grace.map(|seconds| format!("?grace={seconds}")).unwrap_or_default();
        let request = http::Request::builder()
            .method(Method::DELETE)
            .uri(format!("{}{query}", path(id)?))
            .body(joey_rpc::empty())
            .map_err(|error| Fault::new(joey_model::ErrorKind::Invalid, "InvalidRequest", error.to_string()))?;
        self.service.accepted(request).await.map(drop).map_err(Fault::from)
    }

    async fn get(&self, id: &str) -> Result<Instance, Fault> {
        self.service.call::<(), _>(Method::GET, &path(id)?, None).await.map_err(Fault::from)
    }

    async fn list(&self) -> Result<Vec<Instance>, Fault> {
        self.service.call::<(), _>(Method::GET, "/v1/instances", None).await.map_err(Fault::from)
    }

    async fn watch(&self, after: Option<u64>) -> Result<InstanceEvents, Fault> {
        let after = after.map(|revision| format!("&revision={revision}")).unwrap_or_default();
        let lines = self.service.lines::<WatchEvent>(&format!("/v1/instances?watch=true{after}")).await?;
        Ok(lines.map(|line| line.map_err(Fault::from)).boxed())
    }

    async fn logs(&self, id: &str, container: &str, options: &LogOptions) -> Result<ByteStream, Fault> {
        let path = format!("{}/containers/{}/logs?{}", path(id)?, plain(container)?, joey_rpc::query(options));
        Ok(self.service.bytes(Method::GET, &path).await?)
    }

    async fn exec(&self, id: &str, container: &str, request: &ExecRequest, input: Frames) -> Result<ByteStream, Fault> {
        self.interact("exec", id, container, request, input).await
    }

    async fn attach(
        &self,
        id: &str,
        container: &str,
        request: &ExecRequest,
        input: Frames,
    ) -> Result<ByteStream, Fault> {
        self.interact("attach", id, container, request, input).await
    }

    async fn forward(&self, id: &str, port: u16, input: Frames) -> Result<ByteStream, Fault> {
        Ok(self.service.duplex(Method::POST, &format!("{}/forward?port={port}", path(id)?), input).await?)
    }

    async fn usage(&self, id: &str) -> Result<Usage, Fault> {
        self.service.call::<(), _>(Method::GET, &format!("{}/usage", path(id)?), None).await.map_err(Fault::from)
    }

    async fn capacity(&self) -> Result<Capacity, Fault> {
        let hosts: Vec<Host> = self.service.call::<(), _>(Method::GET, "/v1/hosts", None).await?;
        let ready = || hosts.iter().filter(|host| host.ready);
        let first = ready().next().ok_or_else(|| {
            Fault::new(joey_model::ErrorKind::Retryable, "NoHostReady", "no host of the pool is ready")
        })?;
        Ok(Capacity {
            cpu_milli: ready().map(|host| host.cpu_milli).sum(),
            memory_bytes: ready().map(|host| host.memory_bytes).sum(),
            // Addresses that instances hold are free for this purpose: the sum does not change while Pods come and go.
            pods: ready().map(|host| (host.addresses_free + host.instances as u64).min(5_000)).sum(),
            storage_bytes: ready().map(|host| host.storage_bytes).sum(),
            kernel: first.kernel.clone(),
            architecture: match first.architecture.as_str() {
                "x86_64" => "amd64".to_owned(),
                "aarch64" => "arm64".to_owned(),
                other => other.to_owned(),
            },
        })
    }
}
