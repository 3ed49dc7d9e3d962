//! The typed client of the REST API, over a unix socket or inside the process.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use futures::stream::BoxStream;
use http::Method;
use joey_api::change::InstanceChange;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::image::{ImageSummary, PullEvent, PullRequest};
use joey_api::instance::{ExecRequest, Host, Instance, InstanceSpec, LogOptions, Usage, WatchEvent};
use joey_model::{ErrorKind, Fault};
use joey_rpc::{Client, RpcError};
use serde_json::json;

use crate::host::ByteStream;
use crate::service::Pool;

/// A client of the instance service; cheap to clone.
#[derive(Debug, Clone)]
pub struct PoolClient {
    rpc: Client,
}

impl PoolClient {
    pub fn new(rpc: Client) -> Self {
        Self { rpc }
    }

    /// A client of the service listening at a unix socket.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::new(Client::unix(path.into()))
    }

    /// A client of a service in this process.
    pub fn in_process(pool: &Arc<Pool>) -> Self {
        Self::new(Client::in_process("instance service", pool.router()))
    }

    /// The connection itself.
    pub fn rpc(&self) -> &Client {
        &self.rpc
    }

    pub async fn create(&self, spec: &InstanceSpec) -> Result<Instance, RpcError> {
        self.rpc.call(Method::POST, "/v1/instances", Some(spec)).await
    }

    /// Changes what may change of a living instance.
    pub async fn change(&self, name: &str, change: &InstanceChange) -> Result<Instance, RpcError> {
        self.rpc.call(Method::PATCH, &instance(name)?, Some(change)).await
    }

    pub async fn delete(&self, name: &str, grace: Option<u32>) -> Result<(), RpcError> {
        let query = grace.map(|seconds| format!("?grace={seconds}")).unwrap_or_default();
        self.rpc.call::<(), ()>(Method::DELETE, &format!("{}{query}", instance(name)?), None).await
    }

    pub async fn get(&self, name: &str) -> Result<Instance, RpcError> {
        self.read(&instance(name)?).await
    }

    pub async fn list(&self) -> Result<Vec<Instance>, RpcError> {
        self.read("/v1/instances").await
    }

    /// What there is, `Synced`, changes. It ends when this reader was too slow; watch again then.
    pub async fn watch(&self) -> Result<BoxStream<'static, Result<WatchEvent, RpcError>>, RpcError> {
        self.rpc.lines("/v1/instances?watch=true").await
    }

    pub async fn restart(&self, name: &str) -> Result<(), RpcError> {
        self.rpc.call::<(), ()>(Method::POST, &format!("{}/restart", instance(name)?), None).await
    }

    pub async fn renew(&self, name: &str) -> Result<(), RpcError> {
        self.rpc.call::<(), ()>(Method::POST, &format!("{}/renew", instance(name)?), None).await
    }

    pub async fn logs(&self, name: &str, container: &str, options: &LogOptions) -> Result<ByteStream, RpcError> {
        let path = format!("{}/logs?{}", container_path(name, container)?, joey_rpc::query(options));
        self.rpc.bytes(Method::GET, &path).await
    }

    /// Frames both ways (`joey_api::frame`), ended by a status frame.
    pub async fn exec(
        &self,
        name: &str,
        container: &str,
        request: &ExecRequest,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        self.interact("exec", name, container, request, frames).await
    }

    /// As [`PoolClient::exec`], with the container's main process.
    pub async fn attach(
        &self,
        name: &str,
        container: &str,
        request: &ExecRequest,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        self.interact("attach", name, container, request, frames).await
    }

    /// A connection to a port on loopback of the instance; bytes both ways.
    pub async fn forward(
        &self,
        name: &str,
        port: u16,
        bytes: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        self.rpc.duplex(Method::POST, &format!("{}/forward?port={port}", instance(name)?), bytes).await
    }

    /// What is at a path of a container, as tar.
    pub async fn read_files(&self, name: &str, container: &str, path: &str) -> Result<ByteStream, RpcError> {
        let query = joey_rpc::query(&json!({ "path": path }));
        self.rpc.bytes(Method::GET, &format!("{}/files?{query}", container_path(name, container)?)).await
    }

    /// Unpacks an archive into a directory of a container, or as that path.
    pub async fn write_files(
        &self,
        name: &str,
        container: &str,
        path: &str,
        archive: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<(), RpcError> {
        let query = joey_rpc::query(&json!({ "path": path }));
        let request = http::Request::builder()
            .method(Method::PUT)
            .uri(format!("{}/files?{query}", container_path(name, container)?))
            .body(joey_rpc::stream(archive))
            .map_err(|error| RpcError::Request { source: error.into() })?;
        self.rpc.accepted(request).await.map(drop)
    }

    /// Packets as pcapng; any byte of `stop` ends the capture in order, with what was lost at the end.
    pub async fn capture(
        &self,
        name: &str,
        request: &CaptureRequest,
        stop: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        let path = format!("{}/capture?{}", instance(name)?, joey_rpc::query(request));
        self.rpc.duplex(Method::POST, &path, stop).await
    }

    /// What is done with cores of processes that crash, changed first where `settings` are given, and those that are kept.
    pub async fn cores(&self, name: &str, settings: Option<&CoreSettings>) -> Result<Cores, RpcError> {
        let method = if settings.is_some() { Method::PUT } else { Method::GET };
        self.rpc.call(method, &format!("{}/cores", instance(name)?), settings).await
    }

    /// The bytes of a core that is kept.
    pub async fn core(&self, name: &str, core: &str) -> Result<ByteStream, RpcError> {
        if !crate::rest::is_core_name(core) {
            return Err(not_found(format!("instance \"{name}\" has no core \"{core}\"")));
        }
        self.rpc.bytes(Method::GET, &format!("{}/cores/{core}", instance(name)?)).await
    }

    pub async fn usage(&self, name: &str) -> Result<Usage, RpcError> {
        self.read(&format!("{}/usage", instance(name)?)).await
    }

    pub async fn hosts(&self) -> Result<Vec<Host>, RpcError> {
        self.read("/v1/hosts").await
    }

    pub async fn images(&self) -> Result<Vec<ImageSummary>, RpcError> {
        self.read("/v1/images").await
    }

    pub async fn pull(
        &self,
        request: &PullRequest,
    ) -> Result<BoxStream<'static, Result<PullEvent, RpcError>>, RpcError> {
        self.rpc.lines_of(Method::POST, "/v1/images/pull", Some(request)).await
    }

    pub async fn remove_image(&self, name: &str) -> Result<(), RpcError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "/:@._-[]".contains(c);
        if !name.chars().all(plain) {
            return Err(not_found(format!("image \"{name}\" does not exist")));
        }
        self.rpc.call::<(), ()>(Method::DELETE, &format!("/v1/images/{name}"), None).await
    }

    /// Sends an archive to be kept under `reference`.
    pub async fn import_image(
        &self,
        reference: &str,
        archive: impl Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    ) -> Result<ImageSummary, RpcError> {
        let request = http::Request::builder()
            .method(Method::POST)
            .uri(format!("/v1/images/import?{}", joey_rpc::query(&json!({ "reference": reference }))))
            .body(joey_rpc::stream(archive))
            .map_err(|error| RpcError::Request { source: error.into() })?;
        self.rpc.json(request).await
    }

    async fn interact(
        &self,
        verb: &str,
        name: &str,
        container: &str,
        request: &ExecRequest,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        let path = format!("{}/{verb}?{}", container_path(name, container)?, joey_rpc::query(request));
        self.rpc.duplex(Method::POST, &path, frames).await
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<T, RpcError> {
        self.rpc.call::<(), T>(Method::GET, path, None).await
    }
}

/// Names of instances and containers have letters, digits, dots and dashes only: nothing to escape, and no other can exist.
fn instance(name: &str) -> Result<String, RpcError> {
    match joey_model::id::check_subdomain("instance name", name) {
        Ok(()) => Ok(format!("/v1/instances/{name}")),
        Err(_) => Err(RpcError::Remote(crate::state::not_found(name))),
    }
}

fn container_path(name: &str, container: &str) -> Result<String, RpcError> {
    match joey_model::id::check_label("container name", container) {
        Ok(()) => Ok(format!("{}/containers/{container}", instance(name)?)),
        Err(_) => Err(not_found(format!("container \"{container}\" of instance \"{name}\" does not exist"))),
    }
}

fn not_found(message: String) -> RpcError {
    RpcError::Remote(Fault::new(ErrorKind::NotFound, "NotFound", message))
}
