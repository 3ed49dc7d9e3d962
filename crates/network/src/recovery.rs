//! What a later life of the daemon makes of the run directory: whole namespaces are kept, half-made ones taken down, caps that
//! were due are put in place.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::Ipv4Addr;

use joey_model::InstanceId;

use crate::addresses::Addresses;
use crate::error::NetworkError;
use crate::links::Links;
use crate::namespace;
use crate::networks::Inner;
use crate::place::Assignment;

/// Namespaces by what they are worth.
struct Sorted {
    ready: VecDeque<Ipv4Addr>,
    assigned: HashMap<InstanceId, Assignment>,
    broken: Vec<Ipv4Addr>,
    /// Assigned, but not whole.
    lost: Vec<InstanceId>,
}

impl Inner {
    /// Fills the state from what is there. Bounded by the number of namespaces: a few file operations each.
    pub(crate) async fn find_what_is_there(&self) -> Result<(), NetworkError> {
        let Sorted { ready, assigned, broken, lost } = self.sort();
        for &address in &broken {
            self.begin_take_down(address).await?;
        }
        for id in &lost {
            tracing::warn!(%id, "an instance's network was half made or half removed, it is taken down");
            self.place.unassign(id)?;
        }
        self.delete_strangers(&ready, &assigned).await?;
        for (id, assignment) in &assigned {
            self.cap(id, assignment.address, assignment.due).await?;
        }
        let assigned: HashMap<_, _> = assigned.into_iter().map(|(id, assignment)| (id, assignment.address)).collect();
        let mut used: HashSet<_> = assigned.values().chain(&ready).copied().collect();
        used.retain(|address| self.config.range.contains(address));
        let mut state = self.state();
        state.addresses = Addresses::new(self.config.range, self.place.cursor(), &used);
        state.assigned = assigned;
        state.ready = ready;
        Ok(())
    }

    fn sort(&self) -> Sorted {
        let (mut ready, mut broken) = (VecDeque::new(), Vec::new());
        let assigned: HashMap<_, _> = self.place.assignments().into_iter().collect();
        let owned: HashSet<_> = assigned.values().map(|assignment| assignment.address).collect();
        let mut whole = HashSet::new();
        for address in self.place.namespaces() {
            let is_whole = self.place.is_ready(address)
                && namespace::is_held(&self.place.netns(address))
                && Links::exists(&self.names.outside(address));
            match (is_whole, owned.contains(&address)) {
                (true, true) => drop(whole.insert(address)),
                (true, false) if self.config.range.contains(&address) => ready.push_back(address),
                _ => broken.push(address),
            }
        }
        let (assigned, lost): (HashMap<_, _>, HashMap<_, _>) =
            assigned.into_iter().partition(|(_, assignment)| whole.contains(&assignment.address));
        Sorted { ready, assigned, broken, lost: lost.into_keys().collect() }
    }

    /// Deletes interfaces of ours that nothing recorded explains.
    async fn delete_strangers(
        &self,
        ready: &VecDeque<Ipv4Addr>,
        assigned: &HashMap<InstanceId, Assignment>,
    ) -> Result<(), NetworkError> {
        let mut known: HashSet<_> = ready.iter().map(|&address| self.names.outside(address)).collect();
        for assignment in assigned.values() {
            known.insert(self.names.outside(assignment.address));
            known.insert(self.names.ifb(assignment.address));
        }
        for prefix in [&self.names.prefix, &self.names.ifb_prefix] {
            for name in Links::with_prefix(prefix) {
                if !known.contains(&name) {
                    self.links.delete(&name).await?;
                }
            }
        }
        Ok(())
    }
}
