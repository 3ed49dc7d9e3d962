//! The roles that `up`, `vnode` and `down` are composed of: the lock on a data directory, the host, the pool.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::sync::Arc;

use joey_diagnosis::core_pattern;
use joey_hidecar::Carrier;
use joey_image::Images;
use joey_instance::Engine;
use joey_model::Fault;
use joey_network::Networks;
use joey_pool::Pool;
use joey_sandbox::SandboxClass;
use joey_store::Store;
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::classes::{Classes, Machines};
use crate::failure::Failure;
use crate::host::LocalHost;
use crate::settings::{HostSettings, Place};

/// Holds a data directory; one process at a time. The file names its holder.
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    /// Makes the directory where it is missing and takes it, or says who has it.
    pub fn take(place: &Place) -> Result<Self, Failure> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&place.data_dir);
        made.map_err(|error| {
            Failure::new(format!("data directory {} cannot be made: {error}", place.data_dir.display()))
                .with_hint("run joey as root, or name another directory with --data-dir")
        })?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(place.file("joey.pid"))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                file.set_len(0)?;
                file.write_all(format!("{}\n", std::process::id()).as_bytes())?;
                Ok(Self { _file: file })
            }
            Err((mut file, _)) => {
                let mut holder = String::new();
                file.read_to_string(&mut holder)?;
                Err(Failure::new(format!(
                    "data directory {} is in use by joey with pid {}",
                    place.data_dir.display(),
                    holder.trim()
                ))
                .with_hint("stop that one first, or give this one a directory of its own with --data-dir"))
            }
        }
    }

    /// The process that holds the directory now.
    pub fn holder(place: &Place) -> Option<i32> {
        let file = OpenOptions::new().read(true).write(true).open(place.file("joey.pid")).ok()?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => None,
            Err((mut file, _)) => {
                let mut text = String::new();
                file.read_to_string(&mut text).ok()?;
                text.trim().parse().ok()
            }
        }
    }
}

/// What turns specifications into running instances.
pub struct HostRole {
    pub engine: Engine,
    pub images: Images,
    pub network: Arc<Networks>,
    pub machines: Machines,
    classes: Vec<Arc<dyn SandboxClass>>,
}

impl HostRole {
    /// Opens the host and takes over what an earlier process left.
    pub async fn open(settings: &HostSettings) -> Result<Self, Failure> {
        let place = &settings.place;
        let mut config = joey_image::Config::new(place.file("images"), place.file("layers"));
        config.plain_http_registries.clone_from(&settings.plain_http);
        config.docker_config.clone_from(&settings.docker_config);
        config.max_layer_bytes = settings.max_layer_bytes;
        config.token_guard = settings.configuration.registry_tokens;
        let network = Networks::open(joey_network::Config {
            range: settings.pod_range,
            name: place.name.clone(),
            prepared: settings.prepared,
            run_dir: place.run_dir(),
        });
        let (images, network, classes) = tokio::join!(Images::open(config), network, Classes::open(settings));
        let images = images.map_err(Fault::from)?;
        let network = Arc::new(network.map_err(Fault::from)?);
        let classes = classes?;
        let config = joey_instance::Config::new(place.file("instances"), &settings.host_name, place.cgroup_root());
        let carrier = Carrier::open(settings.configuration.logs.clone()).map_err(|error| {
            Failure::new(format!("logs cannot be carried: {error}")).with_hint("see what --config says of sinks")
        })?;
        let engine = Engine::open(config, images.clone(), network.clone(), classes.all.clone(), carrier)?;
        crashes(settings)?;
        let recovered = engine.recover().await?;
        tracing::info!(?recovered, "host is open");
        Ok(Self { engine, images, network, machines: classes.machines, classes: classes.all })
    }

    /// The pool over this host, which makes sandboxes from now on.
    pub async fn pool(&self, settings: &HostSettings, store: Arc<dyn Store>) -> Result<Arc<Pool>, Failure> {
        self.classes.iter().for_each(|class| class.prepare());
        let host = LocalHost {
            engine: self.engine.clone(),
            images: self.images.clone(),
            network: self.network.clone(),
            name: settings.host_name.clone(),
            sizes: settings.configuration.sizes.clone(),
            core_dumps: settings.core_dumps.is_some(),
            machines: self.machines.clone(),
        };
        Ok(Pool::open(store, Arc::new(host)).await?)
    }
}

/// Lets the kernel bring crashes of instances here where the host's owner wants it, and puts everything back where not.
fn crashes(settings: &HostSettings) -> Result<(), Failure> {
    let (place, dir) = (&settings.place, settings.place.file("core"));
    let done = match settings.core_dumps {
        Some(most) => {
            let (program, cgroup_root, instances) = (&settings.agent, place.cgroup_root(), place.file("instances"));
            core_pattern::take(&dir, &core_pattern::Wanted { program, cgroup_root, instances, most })
        }
        None => core_pattern::give_back(&dir),
    };
    done.map_err(|error| Failure::caused("core dumps", &error).with_hint(error.hint()))
}

/// Opens the store of a data directory.
pub fn store(place: &Place) -> Result<Arc<dyn Store>, Failure> {
    joey_store::redb(&place.file("store.redb")).map_err(|error| {
        Failure::new(format!("state in {} cannot be opened: {error}", place.data_dir.display())).with_hint(
            "store.redb and store.log hold all state: restore both from a copy, or begin anew with joey down --purge",
        )
    })
}

/// Serves the pool's REST API on the data directory's socket until `shutdown`.
pub fn serve_rest(place: &Place, pool: &Arc<Pool>, shutdown: CancellationToken) -> Result<(), Failure> {
    let path = place.file("joey.sock");
    let listener = joey_rpc::listen_unix(&path)
        .map_err(|error| Failure::new(format!("socket {} cannot be opened: {error}", path.display())))?;
    tokio::spawn(joey_rpc::serve_unix(listener, pool.router(), shutdown.cancelled_owned()));
    Ok(())
}

/// SIGTERM and SIGINT, caught from the moment this is called.
pub fn asked_to_stop() -> Result<Stop, Failure> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let token = CancellationToken::new();
    let asked = token.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        asked.cancel();
    });
    Ok(Stop { token })
}

/// The wish that this process stops.
#[derive(Clone)]
pub struct Stop {
    token: CancellationToken,
}

impl Stop {
    /// Resolves once somebody asked.
    pub async fn wait(self) -> Result<(), Failure> {
        self.token.cancelled().await;
        Ok(())
    }
}

/// Replaces a file that only its owner may read; whoever reads it meanwhile sees the old or the new one.
pub fn write_private(path: &std::path::Path, bytes: &[u8]) -> Result<(), Failure> {
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(std::fs::rename(new, path)?)
}

/// Runs a role on a runtime of its own: many connections, two threads.
pub fn run<F>(work: F) -> Result<std::process::ExitCode, Failure>
where
    F: Future<Output = Result<(), Failure>>,
{
    // SAFETY: mallopt only sets a parameter of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
    // Fails when a provider is installed already, which is as good.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(work);
    runtime.shutdown_background();
    outcome.map(|()| std::process::ExitCode::SUCCESS)
}

/// Starts logging to standard error.
pub fn log(filter: &str) -> Result<(), Failure> {
    let is_level = |word: &str| word.parse::<tracing::level_filters::LevelFilter>().is_ok();
    if let Some(word) = filter.split(',').find(|word| !word.contains('=') && !is_level(word)) {
        return Err(Failure::usage(format!("--log: \"{word}\" is no level"))
            .with_hint("use error, warn, info or debug, or MODULE=LEVEL"));
    }
    let filter = tracing_subscriber::EnvFilter::try_new(filter)
        .map_err(|error| Failure::usage(format!("--log: {error}")).with_hint("use error, warn, info or debug"))?;
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    Ok(())
}
