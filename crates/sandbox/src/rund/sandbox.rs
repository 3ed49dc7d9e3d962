//! A machine that is an instance's sandbox.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use http::Method;
use joey_hypervisor::{HypervisorError, Room, Vm};
use joey_model::InstanceId;
use joey_rpc::Client;
use tokio::sync::watch;

use super::{GUEST, Slots, collect, images, layer_disk, loss, said, state, vm_dir};
use crate::{Layer, Sandbox, SandboxError};

pub(super) struct RundSandbox {
    pub(super) instance: InstanceId,
    pub(super) vm: Arc<dyn Vm>,
    pub(super) client: Client,
    /// True when the machine has ended and it is known how.
    pub(super) over: watch::Receiver<bool>,
    pub(super) collecting: Arc<collect::Collecting>,
    pub(super) room: Room,
    pub(super) slots: Mutex<Slots>,
    /// Held while disks are put in: some monitors take them in the order of their slots alone.
    pub(super) providing: tokio::sync::Mutex<()>,
    pub(super) record: PathBuf,
    pub(super) phases: Vec<(String, u64)>,
    pub(super) remark: Option<String>,
    pub(super) guest: Option<String>,
}

/// What was put into the slots of a machine. Where that cannot be read, there may be something in each of them.
pub(super) fn slots_of(dir: &Path, room: &Room) -> Slots {
    let read = || -> io::Result<Slots> { Ok(serde_json::from_slice(&std::fs::read(vm_dir(dir).join(SLOTS))?)?) };
    read().unwrap_or_else(|error| {
        tracing::warn!(dir = %dir.display(), %error, "what disks a machine has is not known: it gets no further ones");
        room.slots.clone().map(|slot| (slot, Vec::new())).collect()
    })
}

/// The file in a machine's directory with that.
const SLOTS: &str = "slots.json";

impl RundSandbox {
    /// `begun`: its agent has been told of the instance.
    pub(super) fn new(
        instance: InstanceId,
        vm: Arc<dyn Vm>,
        client: Client,
        room: Room,
        dir: &Path,
        slots: Slots,
        begun: bool,
    ) -> Self {
        state::keep(&client, &vm, dir, begun);
        let collecting = collect::begin(&client, &vm, dir, &vm_dir(dir));
        let over = loss::watch(&instance, &vm, &vm_dir(dir));
        let record = vm_dir(dir).join(SLOTS);
        let (slots, providing) = (Mutex::new(slots), tokio::sync::Mutex::default());
        let guest = std::fs::read_to_string(vm_dir(dir).join(GUEST)).ok();
        Self {
            instance,
            vm,
            client,
            over,
            collecting,
            room,
            slots,
            providing,
            record,
            phases: Vec::new(),
            remark: None,
            guest,
        }
    }

    /// Whether the machine has ended, as far as it was noticed.
    pub(super) fn has_ended(&self) -> bool {
        *self.over.borrow()
    }

    pub(super) fn keep_slots(&self) -> io::Result<()> {
        let bytes = serde_json::to_vec(&*self.slots())?;
        let new = self.record.with_extension("new");
        std::fs::write(&new, bytes)?;
        std::fs::rename(new, &self.record)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Sandbox for RundSandbox {
    fn agent(&self) -> &Client {
        &self.client
    }

    async fn exited(&self) {
        // An error means that the watcher is gone, which it is only after it saw the end.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    fn remark(&self) -> Option<String> {
        self.remark.clone()
    }

    fn phases(&self) -> Vec<(String, u64)> {
        self.phases.clone()
    }

    fn guest(&self) -> Option<String> {
        self.guest.clone()
    }

    async fn provide(&self, layers: Vec<Layer>) -> Result<(), SandboxError> {
        let host = |operation| move |source| SandboxError::Host { instance: self.instance.clone(), operation, source };
        let _turn = self.providing.lock().await;
        let disks = {
            let slots = self.slots();
            let known: Vec<&PathBuf> = slots.values().flatten().collect();
            let wanted: Vec<Layer> = layers.into_iter().filter(|layer| !known.contains(&&layer.image)).collect();
            if wanted.is_empty() {
                return Ok(());
            }
            let full = SandboxError::Full { instance: self.instance.clone(), layers: wanted.len() };
            self.room.spread(wanted, slots.keys().copied()).ok_or(full)?
        };
        let machine = |source: HypervisorError| SandboxError::Machine { instance: self.instance.clone(), source };
        for (slot, layers) in disks {
            // The slot is taken before there is anything in it, and has something when the guest has that: no slot is used twice.
            self.slots().insert(slot, Vec::new());
            self.keep_slots().map_err(host("record the disks"))?;
            self.vm.insert(slot, images(&layers)).await.map_err(machine)?;
            let disk = layer_disk(slot, &layers).map_err(host("plan the layers"))?;
            let told = self.client.call::<_, ()>(Method::PUT, "/v1/layers", Some(&disk)).await;
            told.map_err(|error| SandboxError::Agent { instance: self.instance.clone(), message: said(&error) })?;
            self.slots().insert(slot, images(&layers));
            self.keep_slots().map_err(host("record the disks"))?;
        }
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        Some(self.vm.pid())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is_not_known_what_disks_a_machine_has_it_gets_no_further_ones() {
        let (dir, room) = (tempfile::tempdir().unwrap(), Room { slots: 1..4, at_start: 1, files: 255 });
        let record = vm_dir(dir.path()).join(SLOTS);
        std::fs::create_dir(vm_dir(dir.path())).unwrap();
        let further = |slots: &Slots| room.spread(vec!["layer"], slots.keys().copied());
        for (text, first) in [(r#"{"1": ["/a"]}"#, Some(2)), (r#"{"1": ["/a"], "2": []}"#, Some(3)), ("", None)] {
            std::fs::write(&record, text).unwrap();
            let placed = further(&slots_of(dir.path(), &room));
            assert_eq!(placed.map(|placed| placed[0].0), first, "{text}");
        }
    }
}
