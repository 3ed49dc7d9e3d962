//! Templates by the machines' shape: made in the background when a shape is asked for that has none, kept on the disk for the next
//! daemon, and in memory for copies.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use joey_hypervisor::{Boot, Hypervisor, Machine, Shape, Template, Vm};

use super::disk::Disks;
use super::{RundConfig, clear, client, rehearse};

/// How long a machine may take to boot.
const LIMIT: Duration = Duration::from_secs(60);

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
        }))
    }

    /// Ends what an earlier daemon was making.
    pub(super) async fn clear_left(&self) -> Result<(), String> {
        let left = std::mem::take(&mut *self.left.lock().unwrap_or_else(PoisonError::into_inner));
        for name in left {
            let cgroup = format!("{}/{}", self.cgroup_root, name.trim_start_matches('.'));
            clear(&self.dir.join(name), &cgroup).await?;
        }
        Ok(())
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
            });
        }
        None
    }

    /// Lets go of a template that no copy could be made of: another one is made when it is asked for.
    pub(super) fn forget(&self, shape: Shape, boot: &Boot) {
        self.known().ready.remove(&(shape, boot.id.clone()));
        let _ = joey_hypervisor::remove_template(&self.place(shape));
    }

    fn place(&self, shape: Shape) -> PathBuf {
        self.dir.join(format!("{}x{}M", shape.cpus, shape.memory_bytes >> 20))
    }

    async fn find_or_make(&self, shape: Shape, boot: &Boot) -> Result<Template, String> {
        let _turn = self.making.lock().await;
        let (place, key) = (self.place(shape), format!("{} {}", self.hypervisor.version(), boot.id));
        let (stored, wanted) = (place.clone(), key.clone());
        let found = tokio::task::spawn_blocking(move || Template::load(&stored, &wanted)).await;
        if let Ok(Ok(Some(template))) = found {
            return Ok(template);
        }
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
            self.hypervisor.save(vm).await.map_err(|error| error.to_string())
        };
        let made = made.await;
        clear(&dir, &cgroup).await?;
        made
    }
}
