//! The `Sandbox` trait, the typed client of the agent in a sandbox, the classes, a fake, and the suite that every class passes.
//!
//! Must never depend on images, networks or Kubernetes: a sandbox is given layers that are mounted and a namespace that is set up.

pub mod client;
pub mod conformance;
mod error;
pub mod fake;
mod gvisor;
mod runc;
mod rund;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::agent::AgentConfig;
use joey_api::instance::InstanceSpec;
use joey_model::{Fault, InstanceId};

pub use client::AgentClient;
pub use error::SandboxError;
pub use gvisor::gvisor;
pub use joey_gvisor::{Runtime, choose};
pub use runc::{RuncConfig, runc};
pub use rund::{CurrentGuest, Guest, RundConfig, rund};

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Layer {
    /// What the agent's configuration calls it: where it is mounted.
    pub path: PathBuf,
    /// Its EROFS image on this host.
    pub image: PathBuf,
}

/// The network of an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// A namespace that is set up already, with an interface `eth0`.
    pub netns: PathBuf,
    /// What that interface has, and what is at its other end.
    pub address: Ipv4Addr,
    pub mac: [u8; 6],
    pub gateway: Ipv4Addr,
    pub gateway_mac: [u8; 6],
}

/// What a class needs to make a sandbox.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub instance: InstanceId,
    /// The instance's directory, mode 0700, with `agent.json` in place. The caller makes and removes it.
    pub dir: PathBuf,
    /// Without one the containers have loopback only.
    pub network: Option<Network>,
    /// The layers that the configuration names.
    pub layers: Vec<Layer>,
    /// Bytes that the containers may write to the disk; as many as there are, where nothing is said.
    pub disk_bytes: Option<u64>,
    /// What they write is kept on the disk in a form that nobody reads without a key, which ends with the sandbox.
    pub encrypted_disk: bool,
    /// What `agent.json` says.
    pub config: AgentConfig,
}

/// Why a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// `MachineHung MachineOutOfMemory MachineCrashed MachineKilled MachineLost`
    pub reason: &'static str,
    /// After "the virtual machine of instance I ".
    pub message: String,
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

    /// Why it makes no sandboxes on this host. Those of before it finds and ends all the same.
    fn missing(&self) -> Option<String> {
        None
    }

    /// Why it cannot run such an instance, whose reader is who asked for it.
    fn refuses(&self, _spec: &InstanceSpec) -> Option<Fault> {
        None
    }

    /// Where a sandbox with a kernel of its own mounts layers, each by its name, and its disk. `None`: it runs on this host's kernel,
    /// and the caller has mounted both.
    fn mounts_itself(&self) -> Option<&'static str> {
        None
    }

    /// Sandboxes are going to be made: has ready what earlier ones tell that the next ones want. Without it nothing is begun that was not
    /// asked for.
    fn prepare(&self) {}

    /// Makes the sandbox; returns when its agent answers. The containers start by themselves. On an error nothing is left.
    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError>;

    /// Takes over what an earlier daemon made. `None`: its agent is gone; `dir/state.json` holds the last truth.
    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError>;

    /// Why a sandbox whose agent is gone ended, as far as that can be seen before it is destroyed.
    fn loss(&self, _instance: &InstanceId, _dir: &Path) -> Option<Loss> {
        None
    }

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

    /// Makes further layers known to the agent. Those it knows already stay.
    async fn provide(&self, _layers: Vec<Layer>) -> Result<(), SandboxError> {
        Ok(())
    }

    /// What did not go as it should when it was made, for who looks at its events.
    fn remark(&self) -> Option<String> {
        None
    }

    /// What took how long when it was made, in microseconds, in the order of doing.
    fn phases(&self) -> Vec<(String, u64)> {
        Vec::new()
    }

    /// What its machine booted, by the id that the host knows it by, where it is one.
    fn guest(&self) -> Option<String> {
        None
    }

    /// The agent's process on this host, where it has one.
    fn pid(&self) -> Option<u32> {
        None
    }
}
