//! A machine that is an instance's sandbox.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

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

/// What was put into the slots of a machine.
pub(super) fn slots_of(dir: &Path) -> Option<Slots> {
    serde_json::from_slice(&std::fs::read(vm_dir(dir).join("slots.json")).ok()?).ok()
}

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
        let record = vm_dir(dir).join("slots.json");
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
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        std::fs::write(&self.record, serde_json::to_vec(&*slots)?)
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
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let known: Vec<&PathBuf> = slots.values().flatten().collect();
            let wanted: Vec<Layer> = layers.into_iter().filter(|layer| !known.contains(&&layer.image)).collect();
            if wanted.is_empty() {
                return Ok(());
            }
            let full = SandboxError::Full { instance: self.instance.clone(), layers: wanted.len() };
            let disks = self.room.spread(wanted, slots.keys().copied()).ok_or(full)?;
            slots.extend(disks.iter().map(|(slot, layers)| (*slot, images(layers))));
            disks
        };
        // Recorded before it is done: what may be in a slot is not put there again.
        self.keep_slots().map_err(host("record the disks"))?;
        let machine = |source: HypervisorError| SandboxError::Machine { instance: self.instance.clone(), source };
        for (slot, layers) in disks {
            self.vm.insert(slot, images(&layers)).await.map_err(machine)?;
            let disk = layer_disk(slot, &layers).map_err(host("plan the layers"))?;
            let told = self.client.call::<_, ()>(Method::PUT, "/v1/layers", Some(&disk)).await;
            told.map_err(|error| SandboxError::Agent { instance: self.instance.clone(), message: said(&error) })?;
        }
        Ok(())
    }

    fn pid(&self) -> Option<u32> {
        Some(self.vm.pid())
    }
}
