//! Store leases of kinds whose objects expire. One lease serves all objects written within some minutes.

use std::time::{Duration, Instant};

use joey_store::{LeaseId, Store};
use tokio::sync::Mutex;

use crate::kinds::Resource;
use crate::status::{ApiError, ApiResult};

/// Objects written within this time share a lease.
const SHARED: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Leases {
    current: Mutex<Option<(LeaseId, Instant)>>,
}

impl Leases {
    /// The lease for a write of this kind, if its objects expire.
    pub async fn for_kind(&self, store: &dyn Store, resource: &Resource) -> ApiResult<Option<LeaseId>> {
        let Some(life) = resource.strategy.life() else { return Ok(None) };
        let mut current = self.current.lock().await;
        if let Some((lease, since)) = *current
            && since.elapsed() < SHARED
        {
            return Ok(Some(lease));
        }
        let lease = store.grant(life + SHARED).await.map_err(ApiError::internal)?;
        *current = Some((lease, Instant::now()));
        Ok(Some(lease))
    }
}
