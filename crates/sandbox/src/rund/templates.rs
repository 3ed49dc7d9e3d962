//! Templates by the machines' shape: made in the background when a shape is asked for that has none, kept on the disk for the next
//! daemon, and in memory for copies.
//!
//! ```text
//! boot ─► rehearsal ─► saved: copies are made of it ─► rest ─► saved again, in its place
//! ```

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use joey_hypervisor::{Boot, Hypervisor, Machine, Shape, Template, Vm};
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use super::disk::Disks;
use super::{RundConfig, clear, client, rehearse};

/// How long a machine may take to boot.
const LIMIT: Duration = Duration::from_secs(60);
/// How long it may be at work after that: what it removed is gone by and by.
const QUIET: Duration = Duration::from_secs(15);
/// How long it rests before it is saved again: Linux reports a sixteenth of its free memory every two seconds (`page_reporting.c`), each of
/// a young one's copies for itself, which costs 2 to 3 MiB.
const REST: Duration = Duration::from_secs(36);
/// What the name of a file ends with whose time tells when a machine of a shape was wanted last.
const USED: &str = "used";
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

/// A machine that is given up ends.
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
    /// Machines that were saved and rest, to be saved again.
    resting: HashMap<Shape, AbortOnDropHandle<()>>,
    /// How many copies have failed since one answered.
    failed: HashMap<Shape, u32>,
}

impl Known {
    fn take_in(&mut self, shape: Shape, boot: &Boot, template: Arc<Template>) {
        // One of what was booted before is not asked for any more.
        self.ready.retain(|(other, _), _| *other != shape);
        self.ready.insert((shape, boot.id.clone()), template);
        self.failed.remove(&shape);
    }
}

/// Where a template is made.
struct Making {
    name: String,
    dir: PathBuf,
    cgroup: String,
}

impl Making {
    async fn clear(&self) -> Result<(), String> {
        clear(&self.dir, &self.cgroup).await
    }
}

/// What the template is made of that comes into the place of one whose machine had not rested.
enum Next {
    /// The same machine.
    Rests(Ends),
    /// Another one: the machine ended with the process that made it.
    Boots,
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
        Template::clear_unfinished(&dir)?;
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
            // It would be a template of what is not asked for any more, and another one comes into its place.
            let given_up = known.resting.remove(&shape);
            let (all, boot) = (self.clone(), boot.clone());
            tokio::spawn(async move {
                drop(given_up);
                let found = all.find_or_make(shape, &boot).await;
                let mut known = all.known();
                known.making.remove(&shape);
                match found {
                    Ok((template, next)) => {
                        known.take_in(shape, &boot, template);
                        let rests = next.map(|next| tokio::spawn(all.clone().rest(shape, boot, next)));
                        known.resting.extend(rests.map(|rests| (shape, AbortOnDropHandle::new(rests))));
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

    /// The one that copies are made of, where it is there.
    pub(super) fn current(&self, shape: Shape, boot: &Boot) -> Option<Arc<Template>> {
        self.known().ready.get(&(shape, boot.id.clone())).cloned()
    }

    /// Whether one is kept on the disk, as far as that can be told without reading it.
    pub(super) fn is_kept(&self, shape: Shape, boot: &Boot) -> bool {
        let keys = [self.key(boot), self.rested_key(boot)];
        keys.iter().any(|key| Template::is_stored(&self.place(shape), key))
    }

    fn key(&self, boot: &Boot) -> String {
        format!("{} {}", self.hypervisor.version(), boot.id)
    }

    /// Of one whose machine had rested.
    fn rested_key(&self, boot: &Boot) -> String {
        format!("{} rested", self.key(boot))
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
        self.dir.join(name_of(shape))
    }

    /// With what the one that comes into its place is made of, where it has not rested.
    async fn find_or_make(&self, shape: Shape, boot: &Boot) -> Result<(Arc<Template>, Option<Next>), String> {
        let place = self.making_of(shape);
        // Of one that was given up; it is tried again before the next one is made.
        let _ = place.clear().await;
        let (stored, keys) = (self.place(shape), [self.rested_key(boot), self.key(boot)]);
        let load = move || {
            let found = keys.map(|key| Template::load(&stored, &key).ok().flatten());
            if found.iter().all(Option::is_none) {
                // What nothing can be made of is not taken for something.
                let _ = joey_hypervisor::remove_template(&stored);
            }
            found
        };
        let [rested, young] = tokio::task::spawn_blocking(load).await.unwrap_or_default();
        if let Some(rested) = rested {
            return Ok((Arc::new(rested), None));
        }
        if let Some(young) = young {
            return Ok((Arc::new(young), Some(Next::Boots)));
        }
        let _turn = self.making.lock().await;
        let (template, machine) = self.make(shape, boot, &place).await?;
        let template = Arc::new(template);
        let key = if machine.is_some() { self.key(boot) } else { self.rested_key(boot) };
        self.keep(shape, key, template.clone()).await;
        Ok((template, machine.map(Next::Rests)))
    }

    fn making_of(&self, shape: Shape) -> Making {
        let name = format!("template-{}", name_of(shape));
        Making { dir: self.dir.join(format!(".{name}")), cgroup: format!("{}/{name}", self.cgroup_root), name }
    }

    /// The machine comes back where it is worth while to save it again; otherwise nothing is left of it.
    async fn make(&self, shape: Shape, boot: &Boot, place: &Making) -> Result<(Template, Option<Ends>), String> {
        place.clear().await?;
        let made = self.made(shape, boot, place).await;
        if !matches!(made, Ok((_, Some(_)))) {
            place.clear().await?;
        }
        made
    }

    async fn made(&self, shape: Shape, boot: &Boot, place: &Making) -> Result<(Template, Option<Ends>), String> {
        let Making { name, dir, cgroup } = place;
        std::fs::DirBuilder::new().mode(0o700).create(dir).map_err(|error| error.to_string())?;
        let disk = self.hypervisor.gives().then(|| dir.join("disk"));
        disk.iter().try_for_each(|disk| self.disks.rehearsal(disk)).map_err(|error| error.to_string())?;
        let rehearses = disk.is_some();
        let machine = Machine::new(name.clone(), dir.clone(), cgroup.clone(), shape, boot.clone());
        let machine = Machine { disk, to_be_saved: true, ..machine };
        let vm = self.hypervisor.start(machine).await.map_err(|error| error.to_string())?;
        let ends = Ends(vm.clone());
        // It answers when it has booted; nobody is connected when it is saved.
        let booted = tokio::time::timeout(LIMIT, vm.connect()).await;
        booted.map_err(|_| "the machine does not boot".to_owned())?.map(drop).map_err(|error| error.to_string())?;
        if rehearses {
            rehearse(&client(&vm, name)).await?;
        }
        let template = self.saved(&*vm).await?;
        Ok((template, rehearses.then_some(ends)))
    }

    /// The template that a machine makes when it does nothing more.
    async fn saved(&self, vm: &dyn Vm) -> Result<Template, String> {
        let quiet = tokio::select! {
            quiet = joey_hypervisor::quiet(vm.pid(), QUIET) => quiet,
            _ = vm.ended() => return Err("the machine ended".to_owned()),
        };
        if !quiet {
            tracing::info!("a template is saved while it is at work, which each of its copies goes on with");
        }
        self.hypervisor.save(vm).await.map_err(|error| error.to_string())
    }

    /// Has a machine that was saved rest, and saves it again in the place of what its template was.
    async fn rest(self: Arc<Self>, shape: Shape, boot: Boot, next: Next) {
        let place = self.making_of(shape);
        let again = async {
            let machine = match next {
                Next::Rests(machine) => {
                    machine.0.go_on().await.map_err(|error| error.to_string())?;
                    machine
                }
                Next::Boots => {
                    // A daemon that has begun has instances to look after.
                    tokio::time::sleep(REST).await;
                    let _turn = self.making.lock().await;
                    let (_, machine) = self.make(shape, &boot, &place).await?;
                    let machine = machine.ok_or("its monitor does not go on")?;
                    machine.0.go_on().await.map_err(|error| error.to_string())?;
                    machine
                }
            };
            tokio::time::sleep(REST).await;
            self.saved(&*machine.0).await
        };
        let again = again.await;
        if let Err(error) = place.clear().await {
            tracing::warn!(?shape, error, "what a template was made of is left");
        }
        match again {
            Ok(template) => {
                let template = Arc::new(template);
                self.known().take_in(shape, &boot, template.clone());
                self.keep(shape, self.rested_key(&boot), template).await;
            }
            Err(error) => tracing::warn!(?shape, error, "a template was not saved again, and stays as it was"),
        }
    }

    /// Keeps it for the next daemon. Where that fails, what was kept before stays.
    async fn keep(&self, shape: Shape, key: String, template: Arc<Template>) {
        let place = self.place(shape);
        let kept = tokio::task::spawn_blocking(move || template.store(&place, &key));
        if let Err(error) = kept.await.map_err(io::Error::other).flatten() {
            tracing::warn!(?shape, %error, "a template is not kept");
        }
    }

    /// A machine of this shape was wanted.
    pub(super) fn used(&self, shape: Shape) {
        // Who cannot be told is served all the same.
        let _ = std::fs::write(self.place(shape).with_extension(USED), "");
    }

    /// The shape that was used last, and within this time, of those that a template of this is kept of.
    pub(super) fn used_last(&self, boot: &Boot, within: Duration) -> Option<Shape> {
        let used = std::fs::read_dir(&self.dir).ok()?.flatten().filter_map(|entry| {
            let shape = shape_of(entry.path().file_name()?.to_str()?.strip_suffix(USED)?.strip_suffix('.')?)?;
            let used = entry.metadata().and_then(|found| found.modified()).ok()?;
            self.is_kept(shape, boot).then_some((shape, used))
        });
        last_of(used, SystemTime::now(), within)
    }
}

/// A clock that was set back makes a use one that is to come, and that tells nothing.
fn last_of(used: impl Iterator<Item = (Shape, SystemTime)>, now: SystemTime, within: Duration) -> Option<Shape> {
    let ago = used.filter_map(|(shape, at)| Some((shape, now.duration_since(at).ok()?)));
    ago.filter(|(_, ago)| *ago < within).min_by_key(|(_, ago)| *ago).map(|(shape, _)| shape)
}

/// The name of what belongs to a shape, and back.
fn name_of(shape: Shape) -> String {
    format!("{}x{}M", shape.cpus, shape.memory_bytes >> 20)
}

fn shape_of(name: &str) -> Option<Shape> {
    let (cpus, memory) = name.strip_suffix('M')?.split_once('x')?;
    Some(Shape { cpus: cpus.parse().ok()?, memory_bytes: memory.parse::<u64>().ok()? << 20 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_is_not_long_ago_or_to_come() {
        let now = SystemTime::now();
        let shape = |cpus| Shape { cpus, memory_bytes: 768 << 20 };
        let ago = |minutes: u64| now - Duration::from_secs(minutes * 60);
        let of = |used: &[(u32, SystemTime)]| {
            let used = used.iter().map(|(cpus, at)| (shape(*cpus), *at));
            last_of(used, now, Duration::from_secs(3600)).map(|shape| shape.cpus)
        };
        assert_eq!(of(&[(1, ago(30)), (2, ago(10)), (3, ago(20))]), Some(2));
        assert_eq!(of(&[(1, ago(30)), (2, now + Duration::from_secs(60))]), Some(1), "the clock was set back");
        assert_eq!(of(&[(1, ago(61))]), None);
        assert_eq!(shape_of(&name_of(shape(4))), Some(shape(4)));
        assert_eq!(["1x768", "x768M", "1M", "+1xM", "used"].map(shape_of), [None; 5]);
    }
}
