//! A lock for each name, there while somebody holds or wants it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use joey_model::Digest;
use tokio::sync::OwnedMutexGuard;

#[derive(Default)]
pub(crate) struct Locks(Mutex<HashMap<Digest, Arc<tokio::sync::Mutex<()>>>>);

/// Ends the hold when dropped, on any thread.
pub(crate) type Held = OwnedMutexGuard<()>;

impl Locks {
    /// Waits until nobody else holds `name`; whoever stops waiting is not in the way.
    pub(crate) async fn lock(&self, name: &Digest) -> Held {
        let lock = {
            let mut locks = self.0.lock().expect("no holder panics");
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(name.clone()).or_default().clone()
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_name_has_a_lock_of_its_own() {
        let locks = Locks::default();
        let (one, two) = (Digest::from_sha256(&[1; 32]), Digest::from_sha256(&[2; 32]));
        let first = locks.lock(&one).await;
        let other = locks.lock(&two).await;
        let mut waiting = Box::pin(locks.lock(&one));
        assert!(futures::poll!(&mut waiting).is_pending());
        drop((first, other));
        let again = waiting.await;
        drop(locks.lock(&two).await);
        assert!(futures::poll!(Box::pin(locks.lock(&one))).is_pending());
        drop(again);
        drop(locks.lock(&two).await);
        assert!(locks.0.lock().unwrap().len() <= 1, "names nobody holds are forgotten");
    }
}
