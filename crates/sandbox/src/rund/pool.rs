//! Machines that are ready for instances to come: copies that have rehearsed a start, as many as were wanted at one time lately.
//!
//! ```text
//! copy ─► rehearsal ─► ready ─► taken: its directory becomes the instance's, which it is from then on
//!                        └────► given back, when nobody wanted as many for a while or memory gets short
//! ```
//!
//! Those that are ready end with the process that made them, or with the next one ([`Pool::clear_left`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::FutureExt;
use joey_api::instance::Resources;
use joey_hypervisor::{Boot, Hypervisor, Machine, Shape, Template, Vm};
use joey_rpc::Client;
use tokio::sync::{Notify, watch};

use super::disk::{Disks, USUAL};
use super::templates::Templates;
use super::{CurrentGuest, RundConfig, THREADS, clear, rehearse};

/// How long a use counts.
const KEPT: Duration = Duration::from_secs(600);
/// Uses within this are of one time.
const BURST: Duration = Duration::from_secs(10);
/// Ready ones of one shape, at most; and uses that are remembered.
const MOST: usize = 8;
const REMEMBERED: usize = 64;
/// What part of the host's free memory they may take, and bytes of one, measured generously.
const PART: u64 = 16;
const COST: u64 = 128 << 20;
/// How long it is waited until no instance is being started; after that a processor must be free.
const PATIENCE: Duration = Duration::from_millis(500);
/// After one that could not be made.
const AGAIN: Duration = Duration::from_secs(30);
/// Between two looks whether there is a template.
const UNDERWAY: Duration = Duration::from_secs(1);
/// Between two looks at the host's memory while any are ready.
const LOOK: Duration = Duration::from_secs(15);

/// A machine that is ready.
pub(super) struct Warm {
    pub vm: Arc<dyn Vm>,
    /// The talk with its agent, which goes on.
    pub client: Client,
    pub dir: PathBuf,
    /// Its own, for as long as it runs.
    pub cgroup: String,
    /// What it booted.
    pub boot: String,
    taken: bool,
}

impl Warm {
    /// It is an instance's from now on, and ends with that.
    pub(super) fn keep(mut self) -> (Arc<dyn Vm>, Client) {
        self.taken = true;
        (self.vm.clone(), self.client.clone())
    }

    /// Ends it, and removes what it has.
    pub(super) async fn end(self) {
        let (dir, cgroup) = (self.dir.clone(), self.cgroup.clone());
        drop(self);
        if let Err(error) = clear(&dir, &cgroup).await {
            tracing::warn!(dir = %dir.display(), error, "a machine that nobody wants could not be ended");
        }
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        if !self.taken {
            self.vm.kill();
        }
    }
}

#[derive(Default)]
struct Stock {
    ready: Vec<Warm>,
    used: VecDeque<Instant>,
    /// When the next attempt to make one may be.
    not_before: Option<Instant>,
}

impl Stock {
    /// The most uses at one time lately.
    fn wanted(&mut self, now: Instant) -> usize {
        while self.used.front().is_some_and(|used| now.duration_since(*used) > KEPT) {
            self.used.pop_front();
        }
        let together = |(at, first): (usize, &Instant)| {
            self.used.range(at..).filter(|used| used.duration_since(*first) < BURST).count()
        };
        self.used.iter().enumerate().map(together).max().unwrap_or(0).min(MOST)
    }
}

/// What is to be done next.
enum Step {
    Make(Shape),
    End(Warm),
    Wait(Duration),
}

pub(super) struct Pool {
    hypervisor: Arc<dyn Hypervisor>,
    guest: CurrentGuest,
    cgroup_root: String,
    dir: PathBuf,
    templates: Arc<Templates>,
    disks: Arc<Disks>,
    stocks: Mutex<HashMap<Shape, Stock>>,
    changed: Arc<Notify>,
    starting: watch::Sender<usize>,
}

/// An instance that is being started.
pub(super) struct Starting<'a>(&'a Pool);

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        self.0.starting.send_modify(|count| *count -= 1);
    }
}

impl Pool {
    pub(super) fn open(config: &RundConfig, templates: &Arc<Templates>, disks: &Arc<Disks>) -> io::Result<Arc<Self>> {
        let dir = config.dir.join("warm");
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir)?;
        Ok(Arc::new(Self {
            hypervisor: config.hypervisor.clone(),
            guest: config.guest.clone(),
            cgroup_root: config.cgroup_root.clone(),
            dir,
            templates: templates.clone(),
            disks: disks.clone(),
            stocks: Mutex::default(),
            changed: Arc::default(),
            starting: watch::Sender::new(0),
        }))
    }

    /// Ends those of an earlier process, and keeps as many ready as are wanted for as long as the pool is there.
    pub(super) async fn begin(self: &Arc<Self>) -> io::Result<()> {
        for entry in std::fs::read_dir(&self.dir)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            // Whatever it is that does not end, others can be made.
            if let Err(error) = clear(&entry.path(), &format!("{}/{name}", self.cgroup_root)).await {
                tracing::warn!(name, error, "a machine that was kept ready could not be ended");
            }
        }
        let (pool, changed) = (Arc::downgrade(self), self.changed.clone());
        tokio::spawn(keep(pool, changed));
        Ok(())
    }

    fn stocks(&self) -> MutexGuard<'_, HashMap<Shape, Stock>> {
        self.stocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// While it is held, the processors are an instance's.
    pub(super) fn starting(&self) -> Starting<'_> {
        self.starting.send_modify(|count| *count += 1);
        Starting(self)
    }

    /// A machine that is ready; that one was wanted is remembered.
    pub(super) fn take(&self, shape: Shape, boot: &Boot) -> Option<Warm> {
        if !self.hypervisor.gives() {
            return None;
        }
        let mut stocks = self.stocks();
        let stock = stocks.entry(shape).or_default();
        if stock.used.len() == REMEMBERED {
            stock.used.pop_front();
        }
        stock.used.push_back(Instant::now());
        let fit = stock.ready.iter().rposition(|warm| warm.boot == boot.id);
        let taken = fit.map(|at| stock.ready.remove(at));
        drop(stocks);
        self.changed.notify_one();
        taken
    }

    fn next(&self) -> Step {
        let (now, boot) = (Instant::now(), (self.guest)().ok().map(|guest| guest.boot.id));
        let mut stocks = self.stocks();
        let ready: usize = stocks.values().map(|stock| stock.ready.len()).sum();
        let (may, mut wait) = (may_be_ready(ready), if stocks.is_empty() { KEPT } else { LOOK });
        for (shape, stock) in stocks.iter_mut() {
            let wanted = stock.wanted(now);
            // One that ended, or booted what is not booted any more, is cleared away like one that nobody wants.
            let spent = |warm: &Warm| warm.vm.ended().now_or_never().is_some() || Some(&warm.boot) != boot.as_ref();
            if let Some(at) = stock.ready.iter().position(spent) {
                return Step::End(stock.ready.swap_remove(at));
            }
            if (stock.ready.len() > wanted || ready > may)
                && let Some(warm) = stock.ready.pop()
            {
                return Step::End(warm);
            }
            let later = stock.not_before.filter(|at| *at > now);
            if stock.ready.len() < wanted && ready < may {
                match later {
                    None => return Step::Make(*shape),
                    Some(at) => wait = wait.min(at.duration_since(now)),
                }
            }
        }
        stocks.retain(|_, stock| !stock.ready.is_empty() || !stock.used.is_empty());
        Step::Wait(wait)
    }

    async fn make(&self, shape: Shape) {
        // It takes a processor: made for the next instance, not at the expense of those that are being started.
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let idle = |most: usize| async move { drop(self.starting.subscribe().wait_for(|count| *count <= most).await) };
        let _ = tokio::time::timeout(PATIENCE, idle(0)).await;
        idle(cores - 1).await;
        let boot = (self.guest)().ok().map(|guest| guest.boot);
        let Some((template, boot)) = boot.and_then(|boot| Some((self.templates.get(shape, &boot)?, boot))) else {
            self.stocks().entry(shape).or_default().not_before = Some(Instant::now() + UNDERWAY);
            return;
        };
        let made = self.copy(shape, template, boot).await;
        let mut stocks = self.stocks();
        let stock = stocks.entry(shape).or_default();
        match made {
            Ok(warm) => {
                stock.not_before = None;
                stock.ready.push(warm);
            }
            Err(error) => {
                tracing::warn!(?shape, %error, "no machine is kept ready");
                stock.not_before = Some(Instant::now() + AGAIN);
            }
        }
    }

    async fn copy(&self, shape: Shape, template: Arc<Template>, boot: Boot) -> Result<Warm, String> {
        let mut bits = [0; 8];
        let random =
            std::fs::File::open("/dev/urandom").and_then(|mut file| io::Read::read_exact(&mut file, &mut bits));
        random.map_err(|error| error.to_string())?;
        let name = format!("warm-{:016x}", u64::from_ne_bytes(bits));
        let (dir, cgroup) = (self.dir.join(&name), format!("{}/{name}", self.cgroup_root));
        let made = self.start(shape, template, boot, (&name, &dir, &cgroup)).await;
        if made.is_err() {
            clear(&dir, &cgroup).await?;
        }
        made
    }

    async fn start(
        &self,
        shape: Shape,
        template: Arc<Template>,
        boot: Boot,
        (name, dir, cgroup): (&str, &Path, &str),
    ) -> Result<Warm, String> {
        let disk = dir.join("disk");
        let made = std::fs::DirBuilder::new().mode(0o700).create(dir).and_then(|()| self.disks.rehearsal(&disk));
        made.map_err(|error| error.to_string())?;
        let memory = shape.memory_bytes + self.hypervisor.overhead_bytes(shape);
        let vmm = super::vmm_of(cgroup);
        let machine = Machine {
            limits: Resources { memory_bytes: Some(memory), pids: Some(THREADS), ..Resources::default() },
            template: Some(template),
            disk: Some(disk),
            longest_disk: USUAL,
            ..Machine::new(name.to_owned(), dir.to_owned(), vmm, shape, boot.clone())
        };
        let vm = self.hypervisor.start(machine).await.map_err(|error| error.to_string())?;
        let client = super::client(&vm, name);
        let (dir, cgroup) = (dir.to_owned(), cgroup.to_owned());
        let warm = Warm { vm, client, dir, cgroup, boot: boot.id, taken: false };
        rehearse(&warm.client).await.map(|()| warm)
    }
}

/// How many may be ready on this host, of which so many are.
fn may_be_ready(ready: usize) -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10;
    let count = (free / PART / COST).saturating_add(ready as u64 / PART);
    usize::try_from(count).unwrap_or(usize::MAX)
}

async fn keep(pool: Weak<Pool>, changed: Arc<Notify>) {
    loop {
        let wait = {
            let Some(pool) = pool.upgrade() else { return };
            match pool.next() {
                Step::Make(shape) => {
                    pool.make(shape).await;
                    continue;
                }
                Step::End(warm) => {
                    warm.end().await;
                    continue;
                }
                Step::Wait(wait) => wait,
            }
        };
        let _ = tokio::time::timeout(wait, changed.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_wanted_as_were_used_at_one_time() {
        let now = Instant::now();
        let ago = |seconds: u64| now.checked_sub(Duration::from_secs(seconds)).unwrap();
        let wanted = |used: &[u64]| {
            let mut stock = Stock { used: used.iter().map(|seconds| ago(*seconds)).collect(), ..Stock::default() };
            stock.wanted(now)
        };
        assert_eq!(wanted(&[]), 0);
        assert_eq!(wanted(&[300]), 1);
        assert_eq!(wanted(&[700]), 0, "long ago");
        assert_eq!(wanted(&[320, 319, 318, 200, 100]), 3, "three at one time");
        assert_eq!(wanted(&[3; 20]), MOST);
    }
}
