//! The `Sandbox` trait, the typed client of the agent in a sandbox, the classes, a fake, and the suite that every class passes.
//!
//! Must never depend on images, networks or Kubernetes: a sandbox is given layers that are mounted and a namespace that is set up.

pub mod client;
pub mod conformance;
mod error;
pub mod fake;
mod runc;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::agent::AgentConfig;
use joey_model::InstanceId;

pub use client::AgentClient;
pub use error::SandboxError;
pub use runc::{RuncConfig, runc};

/// What a class needs to make a sandbox.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub instance: InstanceId,
    /// The instance's directory, mode 0700, with `agent.json` in place. The caller makes and removes it.
    pub dir: PathBuf,
    /// A network namespace that is set up already; without one the containers have loopback only.
    pub netns: Option<PathBuf>,
    /// What `agent.json` says.
    pub config: AgentConfig,
}

/// A way of isolating an instance.
///
/// ```text
/// (nothing) ──create──► running ──agent exits or destroy──► (nothing)
///                          ▲
///        daemon restarted ─┘ adopt
/// ```
#[async_trait]
pub trait SandboxClass: Send + Sync {
    /// The word users choose it by.
    fn name(&self) -> &'static str;

    /// Makes the sandbox; returns when its agent answers. The containers start by themselves. On an error nothing is left.
    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError>;

    /// Takes over what an earlier daemon made. `None`: its agent is gone; `dir/state.json` holds the last truth.
    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError>;

    /// Kills every process and takes away what the class made outside `dir`. Idempotent; also for half-made sandboxes.
    async fn destroy(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError>;
}

/// A running sandbox. Dropping the handle changes nothing for the sandbox.
#[async_trait]
pub trait Sandbox: Send + Sync {
    /// The connection to its agent.
    fn agent(&self) -> &joey_rpc::Client;

    /// Resolves when the agent is gone.
    async fn exited(&self);

    /// Makes further layers, mounted on this host, known to the agent under the same paths. Those it knows already stay.
    async fn provide(&self, _layers: Vec<PathBuf>) -> Result<(), SandboxError> {
        Ok(())
    }

    /// The agent's process on this host, where it has one.
    fn pid(&self) -> Option<u32> {
        None
    }
}
