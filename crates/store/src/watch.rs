//! Watches: each has a bounded queue; one that does not keep up is cut off and holds up nobody.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures::Stream;
use tokio::sync::mpsc;

use crate::state::of_prefix;
use crate::{StoreError, WatchBatch};

/// Batches a watcher may be behind.
const QUEUE: usize = 4096;

/// A stream of batches. It ends with [`StoreError::Lagged`] when the watcher was too slow, and plainly when the store is closed.
pub struct Watch {
    missed: VecDeque<Arc<WatchBatch>>,
    queue: mpsc::Receiver<Arc<WatchBatch>>,
    lagged: Arc<AtomicBool>,
}

impl Stream for Watch {
    type Item = Result<WatchBatch, StoreError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(batch) = self.missed.pop_front() {
            return Poll::Ready(Some(Ok(Arc::unwrap_or_clone(batch))));
        }
        match self.queue.poll_recv(context) {
            Poll::Ready(Some(batch)) => Poll::Ready(Some(Ok(Arc::unwrap_or_clone(batch)))),
            Poll::Ready(None) if self.lagged.swap(false, Ordering::AcqRel) => {
                Poll::Ready(Some(Err(StoreError::Lagged)))
            }
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    }
}

#[derive(Default)]
pub(crate) struct Watchers {
    all: Vec<Watcher>,
}

struct Watcher {
    prefix: String,
    queue: mpsc::Sender<Arc<WatchBatch>>,
    lagged: Arc<AtomicBool>,
}

impl Watchers {
    pub(crate) fn add(&mut self, prefix: &str, missed: VecDeque<Arc<WatchBatch>>) -> Watch {
        let (sender, queue) = mpsc::channel(QUEUE);
        let lagged = Arc::new(AtomicBool::new(false));
        self.all.push(Watcher { prefix: prefix.to_owned(), queue: sender, lagged: lagged.clone() });
        Watch { missed, queue, lagged }
    }

    pub(crate) fn tell(&mut self, batch: &Arc<WatchBatch>) {
        self.all.retain(|watcher| {
            let Some(seen) = of_prefix(batch, &watcher.prefix) else { return !watcher.queue.is_closed() };
            match watcher.queue.try_send(seen) {
                Ok(()) => true,
                Err(mpsc::error::TrySendError::Full(_)) => {
                    watcher.lagged.store(true, Ordering::Release);
                    false
                }
                Err(mpsc::error::TrySendError::Closed(_)) => false,
            }
        });
    }
}
