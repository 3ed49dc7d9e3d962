//! Class `gvisor`: the agent is a process on the host as in class `runc`, and its containers run in one sandbox of gVisor's, whose kernel
//! in user space answers their system calls. What the agent does differently is its own matter (`sandboxed` there).

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use joey_api::instance::InstanceSpec;
use joey_gvisor::Runtime;
use joey_model::{ErrorKind, Fault, InstanceId};

use crate::runc::Runc;
use crate::{CreateRequest, RuncConfig, Sandbox, SandboxClass, SandboxError};

/// The class on this host; `runtime` is what runs containers, or why nothing does.
pub fn gvisor(config: RuncConfig, runtime: Result<Runtime, String>) -> Arc<dyn SandboxClass> {
    let (runtime, missing) = match runtime {
        Ok(runtime) => (Some(runtime), None),
        Err(why) => (None, Some(why)),
    };
    Arc::new(Gvisor { agents: Runc::new(config, runtime), missing })
}

struct Gvisor {
    agents: Runc,
    missing: Option<String>,
}

#[async_trait]
impl SandboxClass for Gvisor {
    fn name(&self) -> &'static str {
        "gvisor"
    }

    fn missing(&self) -> Option<String> {
        self.missing.clone()
    }

    fn refuses(&self, spec: &InstanceSpec) -> Option<Fault> {
        let refusal = joey_gvisor::refusal(spec)?;
        Some(Fault::new(ErrorKind::Invalid, "UnsupportedByClass", refusal.message).with_hint(refusal.hint))
    }

    async fn create(&self, request: CreateRequest) -> Result<Arc<dyn Sandbox>, SandboxError> {
        let hint = "install Debian's package runsc, and start joey up again";
        if let Some(why) = &self.missing {
            return Err(SandboxError::Unsupported { message: format!("class gvisor: {why}"), hint });
        }
        self.agents.create(request).await
    }

    async fn adopt(&self, instance: &InstanceId, dir: &Path) -> Result<Option<Arc<dyn Sandbox>>, SandboxError> {
        self.agents.adopt(instance, dir).await
    }

    async fn destroy(&self, instance: &InstanceId, dir: &Path) -> Result<(), SandboxError> {
        self.agents.destroy(instance, dir).await
    }
}
