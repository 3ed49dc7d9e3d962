//! Templates by the machines' shape: made in the background when a shape is asked for that has none, kept on the disk for the next
//! daemon, and in memory for copies.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use joey_hypervisor::{Boot, Hypervisor, Machine, Shape, Template, Vm};
use tokio::sync::Notify;

use super::disk::Disks;
use super::{RundConfig, clear, client, rehearse};

/// How long a machine may take to boot.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it may be at work after that: what it removed is gone by and by.
const QUIET: Duration = Duration::from_secs(15);
/// Copies that fail one after another, after which another template is made: one may have failed for want of a processor.
const FAILED: u32 = 3;

pub(super) struct Templates {
    hypervisor: Arc<dyn Hypervisor>,
    cgroup_root: String,
    dir: PathBuf,
    disks: Arc<Disks>,
    known: Mutex<Known>,
    /// Unfinished ones of an earlier daemon.
    left: Mutex<Vec<String>>,
    /// One is made at a time: it takes a processor.
    making: tokio::sync::Mutex<()>,
    /// Told when one was made, or could not be.
    made: Notify,
}

/// Ends a machine that is given up, also when this process ends in the middle.
struct Ends(Arc<dyn Vm>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.kill();
    }
}

#[derive(Default)]
struct Known {
    ready: HashMap<(Shape, String), Arc<Template>>,
    making: HashSet<Shape>,
    /// How many copies have failed since one answered.
    failed: HashMap<Shape, u32>,
}

/// What became of a copy, as far as that tells of its template.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copied {
    Answered,
    /// Its monitor could not make it, or it did not answer in time or at all.
    Failed,
}

impl Templates {
    pub(super) fn open(config: &RundConfig, disks: &Arc<Disks>) -> io::Result<Arc<Self>> {
        let dir = config.dir.join("templates");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        // What an earlier daemon was making when it ended.
        let left = std::fs::read_dir(&dir)?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let left = left.filter(|name| name.starts_with(".template-")).collect();
        Ok(Arc::new(Self {
            left: Mutex::new(left),
            hypervisor: config.hypervisor.clone(),
            cgroup_root: config.cgroup_root.clone(),
            dir,
            disks: disks.clone(),
            known: Mutex::default(),
            making: tokio::sync::Mutex::new(()),
            made: Notify::new(),
        }))
    }

    /// Ends what an earlier daemon was making.
    pub(super) async fn clear_left(&self) {
        let left = std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner));
        for name in left {
            let cgroup = format!("{}/{}", self.cgroup_root, name.trim_start_matches('.'));
            // It is tried again before the next one of its shape is made.
            if let Err(error) = clear(&self.dir.join(&name), &cgroup).await {
                tracing::warn!(name, error, "a machine that was to be a template could not be ended");
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template of a shape; where there is none yet, one is on its way after this.
    pub(super) fn get(self: &Arc<Self>, shape: Shape, boot: &Boot) -> Option<Arc<Template>> {
        let mut known = self.known();
        if let Some(template) = known.ready.get(&(shape, boot.id.clone())) {
            return Some(template.clone());
        }
        if known.making.insert(shape) {
            let (all, boot) = (self.clone(), boot.clone());
            tokio::spawn(async move {
                let made = all.find_or_make(shape, &boot).await;
                let mut known = all.known();
                known.making.remove(&shape);
                match made {
                    Ok(template) => {
                        // One of what was booted before is not asked for any more.
                        known.ready.retain(|(other, _), _| *other != shape);
                        known.ready.insert((shape, boot.id), Arc::new(template));
                    }
                    Err(error) => tracing::warn!(?shape, %error, "no template was made, machines are booted"),
                }
                drop(known);
                all.made.notify_waiters();
            });
        }
        None
    }

    /// The template of a shape that is on its way, when it is there; `None` when it could not be made.
    pub(super) async fn coming(&self, shape: Shape, boot: &Boot) -> Option<Arc<Template>> {
        loop {
            let made = self.made.notified();
            tokio::pin!(made);
            // Before it is looked: what happens in between is not missed.
            made.as_mut().enable();
            let (ready, underway) = {
                let known = self.known();
                (known.ready.get(&(shape, boot.id.clone())).cloned(), known.making.contains(&shape))
            };
            if ready.is_some() || !underway {
                return ready;
            }
            made.await;
        }
    }

    /// Whether one is kept on the disk, as far as that can be told without reading it.
    pub(super) fn is_kept(&self, shape: Shape, boot: &Boot) -> bool {
        Template::is_stored(&self.place(shape), &self.key(boot))
    }

    fn key(&self, boot: &Boot) -> String {
        format!("{} {}", self.hypervisor.version(), boot.id)
    }

    /// Takes in what became of a copy of this template. One that none can be made of is let go of: another one is made when it is asked
    /// for.
    pub(super) fn copied(&self, template: &Arc<Template>, shape: Shape, boot: &Boot, what: Copied) {
        let (mut known, key) = (self.known(), (shape, boot.id.clone()));
        if known.ready.get(&key).is_none_or(|current| !Arc::ptr_eq(current, template)) {
            return;
        }
        let failed = known.failed.entry(shape).or_default();
        *failed = if what == Copied::Failed { *failed + 1 } else { 0 };
        if *failed == FAILED {
            *failed = 0;
            tracing::warn!(?shape, "no copies can be made of a template, and another one is made");
            known.ready.remove(&key);
            // One that is being made, of another boot, takes its place.
            if !known.making.contains(&shape) {
                let _ = joey_hypervisor::remove_template(&self.place(shape));
            }
        }
    }

    fn place(&self, shape: Shape) -> PathBuf {
        self.dir.join(format!("{}x{}M", shape.cpus, shape.memory_bytes >> 20))
    }

    async fn find_or_make(&self, shape: Shape, boot: &Boot) -> Result<Template, String> {
        let (place, key) = (self.place(shape), self.key(boot));
        let (stored, wanted) = (place.clone(), key.clone());
        let found = tokio::task::spawn_blocking(move || Template::load(&stored, &wanted)).await;
        if let Ok(Ok(Some(template))) = found {
            return Ok(template);
        }
        let _turn = self.making.lock().await;
        let template = self.make(shape, boot).await?;
        // What is not kept is made again by the next daemon.
        let template = tokio::task::spawn_blocking(move || {
            if let Err(error) = template.store(&place, &key) {
                tracing::warn!(%error, "a template is not kept");
                let _ = joey_hypervisor::remove_template(&place);
            }
            template
        });
        template.await.map_err(|error| error.to_string())
    }

    async fn make(&self, shape: Shape, boot: &Boot) -> Result<Template, String> {
        let name = format!("template-{}x{}M", shape.cpus, shape.memory_bytes >> 20);
        let dir = self.dir.join(format!(".{name}"));
        let cgroup = format!("{}/{name}", self.cgroup_root);
        clear(&dir, &cgroup).await?;
        let made = async {
            std::fs::DirBuilder::new().mode(0o700).create(&dir).map_err(|error| error.to_string())?;
            let disk = self.hypervisor.gives().then(|| dir.join("disk"));
            disk.iter().try_for_each(|disk| self.disks.rehearsal(disk)).map_err(|error| error.to_string())?;
            let rehearses = disk.is_some();
            let machine = Machine::new(name.clone(), dir.clone(), cgroup.clone(), shape, boot.clone());
            let machine = Machine { disk, to_be_saved: true, ..machine };
            let vm = self.hypervisor.start(machine).await.map_err(|error| error.to_string())?;
            let _ends = Ends(vm.clone());
            // It answers when it has booted; nobody is connected when it is saved.
            let booted = tokio::time::timeout(LIMIT, vm.connect()).await;
            booted.map_err(|_| "the machine does not boot".to_owned())?.map(drop).map_err(|error| error.to_string())?;
            if rehearses {
                rehearse(&client(&vm, &name)).await?;
            }
            let quiet = tokio::select! {
                quiet = joey_hypervisor::quiet(vm.pid(), QUIET) => quiet,
                _ = vm.ended() => return Err("the machine ended".to_owned()),
            };
            if !quiet {
                tracing::info!(name, "a template is saved while it is at work, which each of its copies goes on with");
            }
            self.hypervisor.save(vm).await.map_err(|error| error.to_string())
        };
        let made = made.await;
        clear(&dir, &cgroup).await?;
        made
    }
}
