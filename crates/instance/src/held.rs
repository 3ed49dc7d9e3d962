//! Containers that wait for what they are made from, each with its own reason, while their neighbours may run.
//!
//! The agent knows of such a container that it is there and nothing else. Why it waits is known here.

use std::collections::BTreeMap;

use joey_api::agent::AgentState;
use joey_api::instance::{ContainerState, InstanceSpec, WirePhase};
use joey_api::lifecycle::Role;
use joey_model::Fault;

use crate::life::Life;

/// How waiting goes on after the first words: the kubelet names the cause first, and then that it waits.
pub(crate) fn backing_off(reason: &str) -> &str {
    match reason {
        "ErrImagePull" => "ImagePullBackOff",
        other => other,
    }
}

/// Containers that are held because their specification says so.
pub(crate) fn asked(spec: &InstanceSpec) -> BTreeMap<String, Fault> {
    let held = spec.containers.iter().filter_map(|one| Some((one.name.clone(), one.held.as_ref()?.fault())));
    held.collect()
}

impl Life {
    /// The specification changed: what it held is held for another reason now, or for none.
    pub(crate) fn hold_as_asked(&mut self, before: &InstanceSpec) {
        asked(before).keys().for_each(|name| self.let_go(name));
        self.held.extend(asked(&self.record.spec));
        self.show_held();
    }

    /// Says why a container waits.
    pub(crate) fn hold(&mut self, name: &str, fault: Fault) {
        self.held.insert(name.to_owned(), fault);
        self.show_held();
    }

    pub(crate) fn let_go(&mut self, name: &str) {
        self.held.remove(name);
    }

    /// Names the waiting of those whose images were asked for in vain.
    pub(crate) fn back_off(&mut self) {
        self.tell_back_off();
        for fault in self.held.values_mut() {
            fault.reason = backing_off(&fault.reason).to_owned();
        }
        self.show_held();
    }

    /// The kubelet's event for each of them.
    pub(crate) fn tell_back_off(&mut self) {
        let waits = |name: &str| self.held.get(name).is_some_and(|fault| backing_off(&fault.reason) != fault.reason);
        let all = self.record.spec.containers.iter().filter(|container| waits(&container.name));
        let told: Vec<_> = all.map(|container| (container.name.clone(), container.image.clone())).collect();
        for (name, image) in told {
            self.event(false, "BackOff", format!("Back-off pulling image \"{image}\""), Some(&name));
        }
    }

    /// Says why there is no sandbox: a container that is held for its own reason waits for that, and the others for it.
    pub(crate) fn say_waiting(&mut self, fault: &Fault, reason: &str) {
        let of_one = self.held.values().any(|held| held == fault);
        for container in &mut self.status.containers {
            // Who only looked on does not come back with the sandbox.
            if container.role == Role::Debug && self.record.restarts_before.contains_key(&container.name) {
                continue;
            }
            let (named, message) = match self.held.get(&container.name) {
                Some(own) if of_one && reason == fault.reason => (own.reason.as_str(), own.message.as_str()),
                Some(own) if of_one => (backing_off(&own.reason), own.message.as_str()),
                None if of_one => ("ContainerCreating", ""),
                _ => (reason, fault.message.as_str()),
            };
            let waiting = ContainerState::Waiting { reason: named.to_owned(), message: message.to_owned() };
            container.last_termination = match std::mem::replace(&mut container.state, waiting) {
                ContainerState::Terminated(end) => Some(end),
                _ => container.last_termination.take(),
            };
            container.restart_count = self.record.restarts_before.get(&container.name).copied().unwrap_or(0);
        }
        self.status.phase = WirePhase::Pending;
        (self.status.reason, self.status.message) = (Some(reason.to_owned()), Some(fault.message.clone()));
        self.publish();
    }

    /// What the agent knows as a whole is held no more.
    pub(crate) fn let_go_of_those_told(&mut self, state: &AgentState) {
        for told in state.containers.iter().filter(|told| !told.image.is_empty()) {
            self.held.remove(&told.name);
        }
    }

    /// Whether something is held because it could not be had, and not because its specification says so.
    pub(crate) fn holds_in_vain(&self) -> bool {
        let asked = asked(&self.record.spec);
        self.held.keys().any(|name| !asked.contains_key(name))
    }

    /// Brings the reasons into the status. What did not have its turn yet, or runs as it was, is told as it is.
    pub(crate) fn show_held(&mut self) {
        for container in &mut self.status.containers {
            let Some(fault) = self.held.get(&container.name) else { continue };
            if let ContainerState::Waiting { reason, message } = &mut container.state
                && !matches!(reason.as_str(), "PodInitializing" | "CrashLoopBackOff")
            {
                reason.clone_from(&fault.reason);
                message.clone_from(&fault.message);
            }
        }
    }
}
