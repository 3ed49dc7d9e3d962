//! `joey up`: every role in one process. Stops on SIGTERM and leaves instances running.

use std::time::Instant;

use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::roles::{HostRole, Lock, asked_to_stop, serve_rest, store};
use crate::settings::UpSettings;

pub async fn up(settings: UpSettings) -> Result<(), Failure> {
    let began = Instant::now();
    let place = &settings.host.place;
    let stop = asked_to_stop();
    tokio::pin!(stop);
    let _lock = Lock::take(place)?;
    let store = store(place)?;
    let host = HostRole::open(&settings.host).await?;
    let pool = host.pool(&settings.host, store.clone()).await?;
    let shutdown = CancellationToken::new();
    serve_rest(place, &pool, shutdown.clone())?;
    println!("joey is ready: {} ({:.1} s)", place.file("joey.sock").display(), began.elapsed().as_secs_f64());
    stop.await?;
    shutdown.cancel();
    Ok(())
}
