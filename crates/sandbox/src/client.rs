//! The typed client of the agent protocol (`joey_api::agent`), whichever way the sandbox is reached.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use futures::stream::BoxStream;
use http::Method;
use joey_api::agent::{AgentContainer, AgentState, Deadline, ExecQuery, VolumeFiles, VolumeUpdated};
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_api::instance::{FileContent, LogOptions, Resources, Usage};
use joey_rpc::{Client, RpcError, query};

/// Bytes as they come.
pub type ByteStream = BoxStream<'static, io::Result<Bytes>>;

/// Calls of one agent. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AgentClient {
    client: Client,
}

/// How long an agent may take to answer. Emulated machines on a busy host take seconds; one that was taken over may never do so.
const PATIENCE: Duration = Duration::from_secs(15);

impl AgentClient {
    pub fn new(client: Client) -> Self {
        Self { client: client.with_patience(Some(PATIENCE)) }
    }

    /// The state now.
    pub async fn state(&self) -> Result<AgentState, RpcError> {
        self.client.call::<(), _>(Method::GET, "/v1/state", None).await
    }

    /// The state now and after every change. A slow reader misses states in between, never the last.
    pub async fn watch(&self) -> Result<BoxStream<'static, Result<AgentState, RpcError>>, RpcError> {
        self.client.lines("/v1/watch").await
    }

    /// Asks every container to end; after `grace_seconds` they are killed.
    pub async fn stop(&self, grace_seconds: u32) -> Result<(), RpcError> {
        self.post(&format!("/v1/stop?grace={grace_seconds}")).await
    }

    /// Kills what is left and ends the agent.
    pub async fn shutdown(&self) -> Result<(), RpcError> {
        self.post("/v1/shutdown").await
    }

    /// Ends the container and starts it again without back-off.
    pub async fn restart(&self, container: &str) -> Result<(), RpcError> {
        self.post(&format!("/v1/containers/{container}/restart")).await
    }

    /// Runs a command in a container; both streams hold frames (`joey_api::frame`).
    pub async fn exec(
        &self,
        container: &str,
        request: &ExecQuery,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        let path = format!("/v1/containers/{container}/exec?{}", query(request));
        self.client.duplex(Method::POST, &path, frames).await
    }

    /// Joins the streams of a container's own process.
    pub async fn attach(
        &self,
        container: &str,
        request: &ExecQuery,
        frames: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        let path = format!("/v1/containers/{container}/attach?{}", query(request));
        self.client.duplex(Method::POST, &path, frames).await
    }

    /// The log of a container's present or previous run.
    pub async fn logs(&self, container: &str, options: &LogOptions) -> Result<ByteStream, RpcError> {
        let path = format!("/v1/containers/{container}/logs?{}", query(options));
        self.client.bytes(Method::GET, &path).await
    }

    /// A connection to a port on loopback of the Pod; bytes both ways.
    pub async fn forward(
        &self,
        port: u16,
        bytes: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        self.client.duplex(Method::POST, &format!("/v1/forward?port={port}"), bytes).await
    }

    /// What is at a path of a container, as tar.
    pub async fn read_files(&self, container: &str, path: &str) -> Result<ByteStream, RpcError> {
        let query = query(&serde_json::json!({ "path": path }));
        self.client.bytes(Method::GET, &format!("/v1/containers/{container}/files?{query}")).await
    }

    /// Unpacks an archive into a container.
    pub async fn write_files(
        &self,
        container: &str,
        path: &str,
        archive: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<(), RpcError> {
        let query = query(&serde_json::json!({ "path": path }));
        let request = http::Request::put(format!("/v1/containers/{container}/files?{query}"))
            .body(joey_rpc::stream(archive))
            .map_err(|source| RpcError::Request { source: Box::new(source) })?;
        // The answer comes after the whole archive, which takes as long as who sends it.
        self.client.with_patience(None).accepted(request).await.map(drop)
    }

    /// Starts a further debug container, or one that is there again as this.
    pub async fn put(&self, container: &AgentContainer) -> Result<(), RpcError> {
        let path = format!("/v1/containers/{}", container.name);
        self.client.call::<_, ()>(Method::PUT, &path, Some(container)).await
    }

    /// Sets a container's limits in place.
    pub async fn limit(&self, container: &str, resources: &Resources) -> Result<(), RpcError> {
        let path = format!("/v1/containers/{container}/resources");
        self.client.call::<_, ()>(Method::PUT, &path, Some(resources)).await
    }

    /// Sets when everything is ended.
    pub async fn end_at(&self, deadline: Deadline) -> Result<(), RpcError> {
        self.client.call::<_, ()>(Method::PUT, "/v1/deadline", Some(&deadline)).await
    }

    /// Brings a volume of files to these contents; false: it had them.
    pub async fn renew_volume(&self, name: &str, files: Vec<FileContent>) -> Result<bool, RpcError> {
        let path = format!("/v1/volumes/{name}");
        let updated: VolumeUpdated = self.client.call(Method::PUT, &path, Some(&VolumeFiles { files })).await?;
        Ok(updated.changed)
    }

    /// Packets as pcapng; any byte of `stop` ends the capture in order, with what was lost at the end.
    pub async fn capture(
        &self,
        request: &CaptureRequest,
        stop: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Result<ByteStream, RpcError> {
        self.client.duplex(Method::POST, &format!("/v1/capture?{}", query(request)), stop).await
    }

    /// What is done with cores of processes that crash, changed first where `settings` are given, and those that are kept.
    pub async fn cores(&self, settings: Option<&CoreSettings>) -> Result<Cores, RpcError> {
        let method = if settings.is_some() { Method::PUT } else { Method::GET };
        let cores: Cores = self.client.call(method, "/v1/cores", settings).await?;
        Ok(cores.plausible())
    }

    /// The bytes of a core that is kept.
    pub async fn core(&self, name: &str) -> Result<ByteStream, RpcError> {
        self.client.bytes(Method::GET, &format!("/v1/cores/{name}")).await
    }

    pub async fn usage(&self) -> Result<Usage, RpcError> {
        self.client.call::<(), _>(Method::GET, "/v1/usage", None).await
    }

    async fn post(&self, path: &str) -> Result<(), RpcError> {
        let request = http::Request::post(path)
            .body(joey_rpc::empty())
            .map_err(|source| RpcError::Request { source: Box::new(source) })?;
        self.client.accepted(request).await.map(drop)
    }
}
