//! What an engine keeps: the border between the engine and the disk. No semantics here.

use std::collections::BTreeMap;

use crate::{Entry, LeaseId, StoreError};

/// What was kept.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) revision: u64,
    pub(crate) entries: Vec<Entry>,
    /// Seconds each lease lasts.
    pub(crate) leases: BTreeMap<LeaseId, u64>,
    pub(crate) last_lease: LeaseId,
}

/// A step that must be kept whole or not at all.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) revision: u64,
    /// Keys with what they hold afterwards; `None`: deleted.
    pub(crate) keys: BTreeMap<String, Option<Entry>>,
    /// Leases with their seconds; `None`: ended.
    pub(crate) leases: BTreeMap<LeaseId, Option<u64>>,
    pub(crate) last_lease: LeaseId,
    /// It is durable elsewhere and was told as kept: to keep it twice, or again with what came after it, does no harm.
    pub(crate) acknowledged: bool,
}

impl Step {
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.leases.is_empty()
    }
}

pub(crate) trait Journal: Send {
    fn load(&mut self) -> Result<Kept, StoreError>;

    /// Returns when the step is durable. After an error nothing of the step is kept.
    fn keep(&mut self, step: &Step) -> Result<(), StoreError>;
}

/// Keeps nothing.
pub(crate) struct Forgetful;

impl Journal for Forgetful {
    fn load(&mut self) -> Result<Kept, StoreError> {
        Ok(Kept::default())
    }

    fn keep(&mut self, _step: &Step) -> Result<(), StoreError> {
        Ok(())
    }
}
