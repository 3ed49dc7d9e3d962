//! Drives networks: set-up, attachment, release, recovery, and the store of namespaces made ahead of use.
//!
//! ```text
//!            prepare                 attach                 release              the kernel is done
//! (free) ──────────────► ready ───────────────► assigned ───────────► draining ─────────────────────► (free)
//!                          └── open() of a later life finds ready and assigned ones; half-made ones drain
//! ```
//!
//! One background task refills the ready ones, one at a time, and watches the draining ones: an address is free again only when
//! its interface is gone from the host.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use ipnet::Ipv4Net;
use joey_model::{InstanceId, checkpoint};
use tokio::sync::Notify;

use crate::addresses::Addresses;
use crate::bandwidth::{self, Bandwidth};
use crate::error::NetworkError;
use crate::holder::Holder;
use crate::links::Links;
use crate::namespace::{self, GATEWAY, Plan};
use crate::place::{Assignment, Place};
use crate::{check, packets, rules};

/// Crash points of this crate, in the order in which they are met (see [`joey_model::checkpoint`]).
pub const CHECKPOINTS: [&str; 6] = [
    "network-assigned",
    "network-held",
    "network-prepared",
    "network-capped",
    "network-taken-down",
    "network-released",
];
pub(crate) const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";
/// How long the kernel may take to remove an interface by itself before it is told to.
const DRAIN_PATIENCE: Duration = Duration::from_secs(2);
/// How often draining interfaces are looked at; the kernel has no call that waits for one.
const DRAIN_POLL: Duration = Duration::from_millis(10);
/// Releases and removals under way at once.
const PARALLEL: usize = 16;
/// Every interface of every daemon begins so.
const FAMILY: &str = "jy";

/// What a host's networks are made from.
#[derive(Debug, Clone)]
pub struct Config {
    /// Addresses of instances: at least a /29, not in use elsewhere.
    pub range: Ipv4Net,
    /// Tells daemons on one host apart: names the nft table and, hashed, the interfaces. A DNS label.
    pub name: String,
    /// Namespaces kept ready.
    pub prepared: usize,
    /// Below `/run`; becomes a private tmpfs.
    pub run_dir: PathBuf,
}

/// An instance's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// File to hand to `setns`.
    pub netns: PathBuf,
    pub address: IpAddr,
    /// The hardware address of the interface inside.
    pub mac: [u8; 6],
    pub gateway: IpAddr,
    pub gateway_mac: [u8; 6],
    /// The host's end of the pair.
    pub interface: String,
}

/// The networks of one daemon.
pub struct Networks {
    inner: Arc<Inner>,
    background: tokio::task::AbortHandle,
}

pub(crate) struct Inner {
    pub(crate) config: Config,
    pub(crate) names: Names,
    pub(crate) place: Place,
    pub(crate) holder: Holder,
    pub(crate) links: Links,
    state: Mutex<State>,
    /// Something was taken or released.
    changed: Notify,
    /// An address became free.
    freed: Notify,
    /// An instance is no longer busy.
    idle: Notify,
}

pub(crate) struct State {
    pub(crate) addresses: Addresses,
    pub(crate) ready: VecDeque<Ipv4Addr>,
    pub(crate) assigned: HashMap<InstanceId, Ipv4Addr>,
    draining: VecDeque<(Ipv4Addr, Instant)>,
    /// The background task is preparing one.
    preparing: bool,
    /// Instances being attached or released.
    busy: HashSet<InstanceId>,
}

/// The right to attach or release one instance.
struct Busy<'a> {
    inner: &'a Inner,
    id: InstanceId,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.inner.state().busy.remove(&self.id);
        self.inner.idle.notify_waiters();
    }
}

/// Names derived from [`Config::name`]; an interface's name has room for 15 characters.
pub(crate) struct Names {
    table: String,
    pub(crate) prefix: String,
    pub(crate) ifb_prefix: String,
    group: u32,
}

impl Names {
    fn new(name: &str) -> Self {
        // FNV-1a: stable over releases, unlike the standard library's hasher.
        let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
        let short = (hash >> 16) ^ (hash & 0xffff);
        Self {
            table: name.replace('-', "_"),
            prefix: format!("{FAMILY}{short:04x}"),
            ifb_prefix: format!("jb{short:04x}"),
            group: 0x6a00_0000 | short,
        }
    }

    pub(crate) fn outside(&self, address: Ipv4Addr) -> String {
        format!("{}{:08x}", self.prefix, u32::from(address))
    }

    pub(crate) fn ifb(&self, address: Ipv4Addr) -> String {
        format!("{}{:08x}", self.ifb_prefix, u32::from(address))
    }
}

impl Networks {
    /// Sets the host up and finds what an earlier life left: whole namespaces are kept, half-made ones taken down. Idempotent.
    pub async fn open(config: Config) -> Result<Self, NetworkError> {
        check::configuration(&config)?;
        let links = Links::open().await?;
        let names = Names::new(&config.name);
        check::range_is_free(config.range, &names.prefix, &links).await?;
        let place = Place::open(&config.run_dir)?;
        let holder = Holder::open(&place.holder(), &place.namespaces_link()).await?;
        enable_forwarding(&place)?;
        rules::install(&names.table, &names.prefix, config.range).await?;
        rules::warn_of_foreign_firewalls(config.range).await;
        let state = State {
            addresses: Addresses::new(config.range, place.cursor(), &HashSet::new()),
            ready: VecDeque::new(),
            assigned: HashMap::new(),
            draining: VecDeque::new(),
            preparing: false,
            busy: HashSet::new(),
        };
        let inner = Inner {
            config,
            names,
            place,
            holder,
            links,
            state: Mutex::new(state),
            changed: Notify::new(),
            freed: Notify::new(),
            idle: Notify::new(),
        };
        inner.find_what_is_there().await?;
        let inner = Arc::new(inner);
        let background = tokio::spawn(Inner::background(inner.clone())).abort_handle();
        Ok(Self { inner, background })
    }

    /// Gives an instance its namespace and address. Called again for the same instance, it answers the same; caps given
    /// are put in place again. Goes on when the caller stops waiting.
    pub async fn attach(&self, id: &InstanceId, caps: Bandwidth) -> Result<Attachment, NetworkError> {
        let (inner, own) = (self.inner.clone(), id.clone());
        let attached = tokio::spawn(async move { inner.attach(&own, caps).await }).await;
        attached.unwrap_or_else(|error| Err(NetworkError::io("attach", id)(error.into())))
    }

    /// Takes an instance's network away. Idempotent; the kernel removes the namespace in the background. Goes on when the
    /// caller stops waiting.
    pub async fn release(&self, id: &InstanceId) -> Result<(), NetworkError> {
        let (inner, own) = (self.inner.clone(), id.clone());
        let released = tokio::spawn(async move {
            let _busy = inner.enter(&own).await;
            inner.release(&own).await
        });
        released.await.unwrap_or_else(|error| Err(NetworkError::io("release", id)(error.into())))
    }

    /// After a restart: releases every attachment that is not `in_use`.
    pub async fn adopt(&self, in_use: &[InstanceId]) -> Result<(), NetworkError> {
        let keep: HashSet<_> = in_use.iter().collect();
        let strangers: Vec<_> = self.inner.state().assigned.keys().filter(|&id| !keep.contains(id)).cloned().collect();
        self.release_all(strangers).await
    }

    pub fn find(&self, id: &InstanceId) -> Option<Attachment> {
        let address = self.inner.state().assigned.get(id).copied()?;
        Some(self.inner.attachment(address))
    }

    /// Bytes an instance received and sent since it was attached.
    pub async fn counters(&self, id: &InstanceId) -> Result<(u64, u64), NetworkError> {
        let attachment = self.find(id).ok_or_else(|| NetworkError::NotAttached(id.clone()))?;
        let read = |counter: &str| {
            let path = format!("/sys/class/net/{}/statistics/{counter}", attachment.interface);
            let text = std::fs::read_to_string(&path).map_err(NetworkError::io("read", &path))?;
            text.trim().parse().map_err(|_| NetworkError::io("read", path)(std::io::ErrorKind::InvalidData.into()))
        };
        // What the host's end sends is what the instance receives.
        Ok((read("tx_bytes")?, read("rx_bytes")?))
    }

    /// Addresses that an instance could still get.
    pub fn free(&self) -> u64 {
        let state = self.inner.state();
        state.addresses.free() + (state.ready.len() + state.draining.len()) as u64
    }

    /// How many namespaces are ready now.
    pub fn ready(&self) -> usize {
        self.inner.state().ready.len()
    }

    pub fn range(&self) -> Ipv4Net {
        self.inner.config.range
    }

    /// Takes everything down and leaves nothing: instances' networks, prepared ones, rules, the run directory, and the host's
    /// forwarding switch where it was before. Nothing can be attached afterwards.
    pub async fn down(&self) -> Result<(), NetworkError> {
        self.background.abort();
        let inner = &self.inner;
        let assigned: Vec<_> = inner.state().assigned.keys().cloned().collect();
        self.release_all(assigned).await?;
        for address in inner.place.namespaces() {
            inner.place.clear_ready(address)?;
            inner.holder.let_go(address.to_string()).await?;
        }
        inner.remove_interfaces().await?;
        rules::remove(&inner.names.table).await?;
        packets::remove(&inner.names.table).await?;
        // Another daemon's instances still need it.
        if Links::with_prefix(FAMILY).is_empty()
            && let Some(before) = inner.place.forwarding_before()
        {
            std::fs::write(FORWARDING, before).map_err(NetworkError::io("write", FORWARDING))?;
        }
        inner.place.remove()
    }

    async fn release_all(&self, ids: Vec<InstanceId>) -> Result<(), NetworkError> {
        let mut results =
            futures::stream::iter(ids).map(|id| async move { self.release(&id).await }).buffer_unordered(PARALLEL);
        let mut first = Ok(());
        while let Some(result) = results.next().await {
            first = first.and(result);
        }
        first
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        self.background.abort();
    }
}

impl Inner {
    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody else attaches or releases `id`.
    async fn enter(&self, id: &InstanceId) -> Busy<'_> {
        loop {
            let idle = self.idle.notified();
            if self.state().busy.insert(id.clone()) {
                return Busy { inner: self, id: id.clone() };
            }
            idle.await;
        }
    }

    async fn attach(&self, id: &InstanceId, caps: Bandwidth) -> Result<Attachment, NetworkError> {
        let _busy = self.enter(id).await;
        let (address, prepared) = self.assign(id).await?;
        if let Err(error) = self.finish_attach(id, address, prepared, caps).await {
            if let Err(release) = self.release(id).await {
                tracing::warn!(%id, error = %release, "cannot release after a failed attachment");
            }
            return Err(error);
        }
        self.changed.notify_one();
        Ok(self.attachment(address))
    }

    async fn release(&self, id: &InstanceId) -> Result<(), NetworkError> {
        let found = self.state().assigned.get(id).copied();
        let Some(address) = found else { return Ok(()) };
        self.begin_take_down(address).await?;
        checkpoint::reached("network-taken-down");
        self.place.unassign(id)?;
        checkpoint::reached("network-released");
        let mut state = self.state();
        if state.assigned.remove(id).is_some() {
            state.draining.push_back((address, Instant::now()));
        }
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    fn attachment(&self, address: Ipv4Addr) -> Attachment {
        Attachment {
            netns: self.place.netns(address),
            address: IpAddr::V4(address),
            mac: namespace::inside_mac(address),
            gateway: IpAddr::V4(GATEWAY),
            gateway_mac: namespace::outside_mac(address),
            interface: self.names.outside(address),
        }
    }

    /// Takes a ready namespace or a free address for `id`, and says whether it is prepared.
    async fn assign(&self, id: &InstanceId) -> Result<(Ipv4Addr, bool), NetworkError> {
        let deadline = tokio::time::Instant::now() + DRAIN_PATIENCE * 2;
        loop {
            // Registered before looking, so that an address freed in between is not missed.
            let freed = self.freed.notified();
            let draining = {
                let mut state = self.state();
                if let Some(&address) = state.assigned.get(id) {
                    return Ok((address, self.place.is_ready(address)));
                }
                let taken = match state.ready.pop_front() {
                    Some(address) => Some((address, true)),
                    None => state.addresses.take().map(|address| (address, false)),
                };
                if let Some((address, prepared)) = taken {
                    state.assigned.insert(id.clone(), address);
                    return Ok((address, prepared));
                }
                !state.draining.is_empty() || state.preparing
            };
            if !draining || tokio::time::timeout_at(deadline, freed).await.is_err() {
                return Err(NetworkError::Exhausted { range: self.config.range, instance: id.clone() });
            }
        }
    }

    async fn finish_attach(
        &self,
        id: &InstanceId,
        address: Ipv4Addr,
        prepared: bool,
        caps: Bandwidth,
    ) -> Result<(), NetworkError> {
        self.place.assign(id, Assignment { address, due: caps })?;
        checkpoint::reached("network-assigned");
        if !prepared {
            self.prepare(address).await?;
        }
        self.cap(id, address, caps).await
    }

    /// Puts caps in place and records that none are due any more.
    pub(crate) async fn cap(&self, id: &InstanceId, address: Ipv4Addr, caps: Bandwidth) -> Result<(), NetworkError> {
        if caps.is_unlimited() {
            return Ok(());
        }
        let (interface, ifb) = (self.names.outside(address), self.names.ifb(address));
        if caps.has_packets() {
            self.place.set_limited(address)?;
            packets::apply(&self.names.table, &interface, address, caps).await?;
        }
        bandwidth::apply(&self.links, &interface, &ifb, self.names.group, caps).await?;
        checkpoint::reached("network-capped");
        self.place.assign(id, Assignment { address, due: Bandwidth::default() })
    }

    /// Makes the namespace of `address` whole.
    async fn prepare(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        let cursor = self.state().addresses.cursor();
        self.place.set_cursor(cursor)?;
        let outside = self.names.outside(address);
        // Only a daemon that was killed can have left these.
        self.links.delete(&outside).await?;
        self.holder.let_go(address.to_string()).await?;
        let plan = Plan { address, outside, group: self.names.group };
        let (netns, namespace) = namespace::make(plan).await?;
        self.holder.hold(netns, address.to_string()).await?;
        checkpoint::reached("network-held");
        self.links.route(&self.names.outside(address), address, namespace::inside_mac(address)).await?;
        namespace.carries().await?;
        self.place.set_ready(address)?;
        checkpoint::reached("network-prepared");
        Ok(())
    }

    /// The part of removal that must not fail unseen; the kernel does the rest.
    pub(crate) async fn begin_take_down(&self, address: Ipv4Addr) -> Result<(), NetworkError> {
        self.place.clear_ready(address)?;
        if self.place.is_limited(address) {
            packets::lift(&self.names.table, &self.names.outside(address), address).await?;
            self.place.clear_limited(address)?;
        }
        self.links.delete(&self.names.ifb(address)).await?;
        self.holder.let_go(address.to_string()).await
    }

    async fn background(inner: Arc<Self>) {
        loop {
            let changed = inner.changed.notified();
            let draining = inner.drain().await;
            let filled = inner.refill_one().await;
            match (filled, draining) {
                (Ok(true), _) => {}
                (Ok(false), false) => changed.await,
                (Ok(false), true) => {
                    let _ = tokio::time::timeout(DRAIN_POLL, changed).await;
                }
                (Err(error), _) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "cannot prepare a network");
                    let _ = tokio::time::timeout(DRAIN_PATIENCE, changed).await;
                }
            }
        }
    }

    /// Prepares one namespace when there are too few; says whether it did.
    async fn refill_one(&self) -> Result<bool, NetworkError> {
        let taken = {
            let mut state = self.state();
            let taken = if state.ready.len() >= self.config.prepared { None } else { state.addresses.take() };
            state.preparing = taken.is_some();
            taken
        };
        let Some(address) = taken else { return Ok(false) };
        let result = self.prepare(address).await;
        self.state().preparing = false;
        if result.is_ok() {
            self.state().ready.push_back(address);
            self.freed.notify_waiters();
            return Ok(true);
        }
        if let Err(error) = self.begin_take_down(address).await {
            tracing::warn!(%error, "cannot take down a half-made network");
        }
        self.state().draining.push_back((address, Instant::now()));
        result.map(|()| true)
    }

    /// Gives back the addresses whose interfaces are gone; says whether some are still draining.
    async fn drain(&self) -> bool {
        let draining: Vec<_> = self.state().draining.iter().copied().collect();
        let mut gone = HashSet::new();
        for (address, since) in draining {
            let outside = self.names.outside(address);
            if Links::exists(&outside) && since.elapsed() > DRAIN_PATIENCE {
                tracing::warn!(%outside, "something still holds a released network, its interface is deleted");
                if let Err(error) = self.links.delete(&outside).await {
                    tracing::warn!(%error, "cannot delete a released interface");
                }
            }
            if !Links::exists(&outside) {
                gone.insert(address);
            }
        }
        let mut state = self.state();
        state.draining.retain(|(address, _)| !gone.contains(address));
        for address in &gone {
            state.addresses.give_back(*address);
        }
        let left = !state.draining.is_empty();
        drop(state);
        if !gone.is_empty() {
            self.freed.notify_waiters();
        }
        left
    }

    /// Deletes every interface of this daemon and waits until they are gone.
    async fn remove_interfaces(&self) -> Result<(), NetworkError> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let mut left = Links::with_prefix(&self.names.prefix);
            left.extend(Links::with_prefix(&self.names.ifb_prefix));
            let Some(name) = left.first() else { return Ok(()) };
            // Fails where the kernel removed one of them in between: the next round sees what is left.
            let result = self.links.delete_group(self.names.group).await;
            if Instant::now() > deadline {
                result?;
                return Err(NetworkError::io("delete", name)(std::io::ErrorKind::TimedOut.into()));
            }
            tokio::time::sleep(DRAIN_POLL).await;
        }
    }
}

fn enable_forwarding(place: &Place) -> Result<(), NetworkError> {
    let before = std::fs::read_to_string(FORWARDING).map_err(NetworkError::io("read", FORWARDING))?;
    if before.trim() == "1" {
        return Ok(());
    }
    place.remember_forwarding(before.trim())?;
    std::fs::write(FORWARDING, "1").map_err(NetworkError::io("write", FORWARDING))
}
