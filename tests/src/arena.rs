//! Where attacks are tried: a Joey, a registry with images made for them that Joey knows nothing of, and the sandbox class of the Pods.

use std::time::Duration;

use serde_json::{Value, json};

use crate::image::{Entry, Image, Layer, Packing};
use crate::joey::{Settings, pod};
use crate::program::Outcome;
use crate::served::Served;
use crate::{Joey, holds, seconds, wait_until};

/// The sandbox class in which an attack is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Namespaces of the host's kernel.
    Runc,
    /// A virtual machine with a kernel of its own.
    Rund,
}

/// A registry of images made for the attacks, and a Joey that knows nothing of it.
#[derive(Debug)]
pub struct Arena {
    pub served: Served,
    pub joey: Joey,
    pub class: Class,
}

impl Arena {
    /// `None` where the class is not to be had, which `scripts/machines.sh` says loudly.
    #[track_caller]
    pub fn new(class: Class) -> Option<Self> {
        let joey = match class {
            Class::Runc => Joey::start(),
            Class::Rund => Joey::start_with_machines(Settings::default())?,
        };
        Some(Self { served: Served::start(), joey, class })
    }

    /// How long a Pod may take: machines are emulated where the host has nothing better.
    pub fn patience(&self) -> Duration {
        match self.class {
            Class::Runc => seconds(30),
            Class::Rund => seconds(120),
        }
    }

    /// An image with all of busybox and these entries.
    pub fn image(&self, name: &str, entries: &[Entry], config: Value) -> String {
        let mut whole = json!({"Env": ["PATH=/bin"], "Cmd": ["sleep", "1000"]});
        whole.as_object_mut().expect("an object").extend(config.as_object().expect("an object").clone());
        let mut layers = vec![Layer::shell()];
        if !entries.is_empty() {
            layers.push(Layer::new(entries, Packing::Gzip));
        }
        self.served.add(&format!("{name}:1"), &Image::new(layers, whole))
    }

    /// A Pod of the class.
    pub fn pod(&self, name: &str, image: &str, command: &[&str]) -> Value {
        let mut object = pod(name, image, command);
        if self.class == Class::Rund {
            object["spec"]["runtimeClassName"] = json!("rund");
        }
        object
    }

    /// Applies a Pod of one container and waits until it is ready.
    #[track_caller]
    pub fn run_pod(&self, name: &str, image: &str, command: &[&str]) -> Value {
        self.joey.apply(&self.pod(name, image, command));
        self.joey.wait_for(name, "Ready", self.patience())
    }

    /// Runs a script in a Pod that is there.
    #[track_caller]
    pub fn inside(&self, pod: &str, script: &str) -> Outcome {
        self.joey.kubectl(&["exec", pod, "--", "sh", "-c", script])
    }

    /// How the Pod's first container ended or why it waits: reason, and what it said.
    #[track_caller]
    pub fn end(&self, name: &str) -> (String, String) {
        let state = wait_until("it ends or waits", self.patience(), || {
            let status = self.joey.get("pod", name)["status"].clone();
            let state = status["containerStatuses"][0]["state"].clone();
            let waits = state["waiting"]["reason"].as_str().is_some_and(|reason| reason.ends_with("Error"));
            holds(state["terminated"].is_object() || waits, &status).map(|()| state)
        });
        let told = ["terminated", "waiting"].iter().find_map(|kind| state.get(*kind)).cloned().unwrap_or_default();
        (told["reason"].as_str().unwrap_or_default().to_owned(), self.joey.kubectl(&["logs", name]).stdout)
    }
}
