//! Machines that are ready for instances to come: copies that have rehearsed a start, as many as were wanted at one time lately. And one
//! whose monitor has begun and waits with what it copies: it costs little, and spares the next copy half of its way.
//!
//! ```text
//! begun ─► copy ─► rehearsal ─► ready ─► taken: its directory becomes the instance's, which it is from then on
//!   └────────────────────────────────────┘ │
//!                                          └► given back, when nobody wanted as many for a while or memory gets short
//! ```
//!
//! Those that are kept end with the process that made them, or with the next one ([`Pool::begin`]).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::FutureExt;
use joey_api::instance::Resources;
use joey_hypervisor::{Boot, Hypervisor, HypervisorError, Machine, Shape, Template, Vm};
use joey_rpc::Client;
use tokio::sync::{Notify, watch};

use super::disk::{Disks, USUAL};
use super::templates::Templates;
use super::{CurrentGuest, RundConfig, THREADS, clear, rehearse};

/// How long a use counts.
const KEPT: Duration = Duration::from_secs(600);
/// How long one that has begun waits for somebody.
const DAY: Duration = Duration::from_secs(24 * 3600);
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
const UNDERWAY: Duration = Duration::from_millis(500);
/// Between two looks at the host's memory while any are ready.
const LOOK: Duration = Duration::from_secs(15);

/// A machine that is ready, or has begun.
pub(super) struct Warm {
    pub vm: Arc<dyn Vm>,
    /// The talk with its agent, which goes on.
    pub client: Client,
    pub dir: PathBuf,
    /// Its own, for as long as it runs.
    pub cgroup: String,
    /// What it booted.
    pub boot: String,
    /// What it is a copy of, or is to copy before it runs.
    template: Arc<Template>,
    is_ready: bool,
    taken: bool,
}

impl Warm {
    /// It is an instance's from now on, and ends with that.
    pub(super) fn keep(mut self) -> (Arc<dyn Vm>, Client) {
        self.taken = true;
        (self.vm.clone(), self.client.clone())
    }

    /// It ended, or booted what is not booted any more.
    fn is_spent(&self, boot: Option<&Boot>) -> bool {
        self.vm.ended().now_or_never().is_some() || boot.is_none_or(|boot| boot.id != self.boot)
    }

    /// What it has still to copy, where it has only begun.
    pub(super) fn uncopied(&self) -> Option<&Arc<Template>> {
        (!self.is_ready).then_some(&self.template)
    }

    /// Has one that has begun be a copy of its template.
    pub(super) async fn go_on(&self) -> Result<(), HypervisorError> {
        self.vm.go_on().await
    }

    /// Makes one that has begun a ready one.
    async fn rehearsed(mut self) -> Result<Self, String> {
        self.go_on().await.map_err(|error| error.to_string())?;
        self.is_ready = true;
        rehearse(&self.client).await.map(|()| self)
    }

    /// Ends it, and removes what it has.
    pub(super) async fn end(mut self) {
        self.vm.kill();
        ended(self.dir.clone(), self.cgroup.clone()).await;
        // Not before: this may be broken off.
        self.taken = true;
    }
}

/// Removes what a machine has that was killed.
async fn ended(dir: PathBuf, cgroup: String) {
    if let Err(error) = clear(&dir, &cgroup).await {
        tracing::warn!(dir = %dir.display(), error, "a machine that nobody wants could not be ended");
    }
}

impl Drop for Warm {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        self.vm.kill();
        // Who took it may have been broken off. Where this process ends, the next one clears away.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(ended(self.dir.clone(), self.cgroup.clone()));
        }
    }
}

#[derive(Default)]
struct Stock {
    ready: Vec<Warm>,
    begun: Option<Warm>,
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

#[derive(Default)]
struct Stocks {
    of: HashMap<Shape, Stock>,
    /// What was used last.
    last: Option<(Shape, Instant)>,
}

impl Stocks {
    /// The stock of what is used now.
    fn used(&mut self, shape: Shape) -> &mut Stock {
        self.last = Some((shape, Instant::now()));
        self.of.entry(shape).or_default()
    }
}

/// What is to be done next.
enum Step {
    Begin(Shape),
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
    stocks: Mutex<Stocks>,
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

    /// Has one begin of the shape that was used last, also by an earlier process.
    pub(super) fn prepare(&self) {
        if self.hypervisor.gives()
            && let Some(boot) = self.boot()
            && let Some(shape) = self.templates.used_last(&boot, DAY)
        {
            self.stocks().used(shape);
            self.changed.notify_one();
        }
    }

    fn stocks(&self) -> MutexGuard<'_, Stocks> {
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
        let stock = stocks.used(shape);
        if stock.used.len() == REMEMBERED {
            stock.used.pop_front();
        }
        stock.used.push_back(Instant::now());
        let fit = stock.ready.iter().rposition(|warm| warm.boot == boot.id);
        let taken = fit.map(|at| stock.ready.remove(at));
        let taken = taken.or_else(|| stock.begun.take_if(|warm| warm.boot == boot.id));
        drop(stocks);
        self.changed.notify_one();
        let templates = self.templates.clone();
        drop(tokio::task::spawn_blocking(move || templates.used(shape)));
        taken
    }

    fn boot(&self) -> Option<Boot> {
        (self.guest)().ok().map(|guest| guest.boot)
    }

    fn next(&self) -> Step {
        let (now, boot) = (Instant::now(), self.boot());
        let mut stocks = self.stocks();
        let ready: usize = stocks.of.values().map(|stock| stock.ready.len()).sum();
        let kept = ready + stocks.of.values().filter(|stock| stock.begun.is_some()).count();
        let (may, mut wait) = (may_be_kept(kept), if stocks.of.is_empty() { KEPT } else { LOOK });
        let last = stocks.last.filter(|(_, used)| now.duration_since(*used) < DAY).map(|(shape, _)| shape);
        // It spares less than one that is ready.
        if kept > may
            && let Some(warm) = stocks.of.values_mut().find_map(|stock| stock.begun.take())
        {
            return Step::End(warm);
        }
        // What has none is not booted for one to begin.
        let is_kept = |shape| boot.as_ref().is_some_and(|boot| self.templates.is_kept(shape, boot));
        for (shape, stock) in &mut stocks.of {
            let (wanted, is_last) = (stock.wanted(now), last == Some(*shape));
            // One that ended, or booted what is not booted any more, is cleared away like one that nobody wants.
            // So is one of a template that has another one in its place: it holds the memory of that.
            let current = boot.as_ref().and_then(|boot| self.templates.current(*shape, boot));
            let is_current = |warm: &Warm| current.as_ref().map(|current| Arc::ptr_eq(current, &warm.template));
            let is_spent = |warm: &Warm| warm.is_spent(boot.as_ref()) || is_current(warm) == Some(false);
            if let Some(at) = stock.ready.iter().position(is_spent) {
                return Step::End(stock.ready.swap_remove(at));
            }
            if (stock.ready.len() > wanted || ready > may)
                && let Some(warm) = stock.ready.pop()
            {
                return Step::End(warm);
            }
            let is_unwanted = |warm: &mut Warm| !is_last || is_spent(warm) || is_current(warm).is_none();
            if let Some(warm) = stock.begun.take_if(is_unwanted) {
                return Step::End(warm);
            }
            let step = if stock.ready.len() < wanted && ready < may {
                Some(Step::Make(*shape))
            } else if is_last && stock.begun.is_none() && kept < may && (current.is_some() || is_kept(*shape)) {
                Some(Step::Begin(*shape))
            } else {
                None
            };
            match (step, stock.not_before.filter(|at| *at > now)) {
                (Some(step), None) => return step,
                (Some(_), Some(at)) => wait = wait.min(at.duration_since(now)),
                (None, _) => {}
            }
        }
        stocks.of.retain(|shape, stock| !stock.ready.is_empty() || !stock.used.is_empty() || last == Some(*shape));
        Step::Wait(wait)
    }

    /// Makes one more machine of this shape, ready or begun.
    async fn make(&self, shape: Shape, ready: bool) {
        self.idle().await;
        let made = self.copy(shape, ready).await;
        let mut stocks = self.stocks();
        let Stocks { of, last } = &mut *stocks;
        let stock = of.entry(shape).or_default();
        let wait = match made {
            Ok(Some(warm)) => {
                match ready {
                    true => stock.ready.push(warm),
                    false => stock.begun = Some(warm),
                }
                None
            }
            Ok(None) => Some(UNDERWAY),
            Err(error) => {
                tracing::warn!(?shape, %error, "no machine is kept ready");
                // One that was wanted lately is tried again, but nothing is tried all day long.
                last.take_if(|(last, _)| !ready && *last == shape);
                Some(AGAIN)
            }
        };
        stock.not_before = wait.map(|wait| Instant::now() + wait);
    }

    /// It takes a processor: made for the next instance, not at the expense of those that are being started.
    async fn idle(&self) {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let idle = |most: usize| async move { drop(self.starting.subscribe().wait_for(|count| *count <= most).await) };
        let _ = tokio::time::timeout(PATIENCE, idle(0)).await;
        idle(cores - 1).await;
    }

    /// None: its template is on its way.
    async fn copy(&self, shape: Shape, ready: bool) -> Result<Option<Warm>, String> {
        let boot = self.boot().ok_or("there is nothing to boot")?;
        let Some(template) = self.templates.get(shape, &boot) else { return Ok(None) };
        let mut bits = [0; 8];
        let random =
            std::fs::File::open("/dev/urandom").and_then(|mut file| io::Read::read_exact(&mut file, &mut bits));
        random.map_err(|error| error.to_string())?;
        let name = format!("warm-{:016x}", u64::from_ne_bytes(bits));
        let (dir, cgroup) = (self.dir.join(&name), format!("{}/{name}", self.cgroup_root));
        let made = async {
            let warm = self.begun(shape, template, boot, (&name, &dir, &cgroup)).await?;
            if ready { warm.rehearsed().await } else { Ok(warm) }
        };
        let made = made.await;
        if made.is_err() {
            clear(&dir, &cgroup).await?;
        }
        made.map(Some)
    }

    /// One whose monitor has begun.
    async fn begun(
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
            template: Some(template.clone()),
            disk: Some(disk),
            waits: true,
            longest_disk: USUAL,
            ..Machine::new(name.to_owned(), dir.to_owned(), vmm, shape, boot.clone())
        };
        let vm = self.hypervisor.start(machine).await.map_err(|error| error.to_string())?;
        let client = super::client(&vm, name);
        let (dir, cgroup) = (dir.to_owned(), cgroup.to_owned());
        Ok(Warm { vm, client, dir, cgroup, boot: boot.id, template, is_ready: false, taken: false })
    }
}

/// How many may be kept on this host, of which so many are.
fn may_be_kept(kept: usize) -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()).unwrap_or(0) << 10;
    may_be_kept_of(free, kept)
}

/// With what they have taken already: one that was made is not too many because it was made.
fn may_be_kept_of(free: u64, kept: usize) -> usize {
    let count = free.saturating_add(COST.saturating_mul(kept as u64)) / PART / COST;
    usize::try_from(count).unwrap_or(usize::MAX)
}

async fn keep(pool: Weak<Pool>, changed: Arc<Notify>) {
    loop {
        let wait = {
            let Some(pool) = pool.upgrade() else { return };
            match pool.next() {
                Step::Make(shape) => {
                    pool.make(shape, true).await;
                    continue;
                }
                Step::Begin(shape) => {
                    pool.make(shape, false).await;
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
    fn one_that_was_made_is_not_too_many_because_it_was_made() {
        assert_eq!(may_be_kept_of(COST * PART - 1, 0), 0);
        for free in [COST * PART, COST * PART + 1, COST * PART * 5 / 2] {
            let may = may_be_kept_of(free, 0);
            let left = |made: usize| free - COST * made as u64;
            assert!((1..=may).all(|made| may_be_kept_of(left(made), made) == may), "{free}");
        }
        assert_eq!(may_be_kept_of(COST, 3), 0, "memory is short");
    }

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
