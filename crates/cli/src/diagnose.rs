//! `joey diagnose`: core dumps and captures of packets, as files that debuggers and Wireshark open.

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bytes::Bytes;
use futures::StreamExt;
use joey_api::diagnosis::{CaptureRequest, CoreSettings, Cores};
use joey_diagnosis::capture::counted;
use joey_model::quantity::{human_bytes, parse_units};
use joey_pool::PoolClient;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::args::{Core, Tcpdump};
use crate::failure::Failure;
use crate::output::{self, age};

/// What a second wish to end gives up for: the exit code of an interrupted program.
const INTERRUPTED: u8 = 130;
/// So much of the end of a capture is kept to read what was lost.
const TAIL: usize = 256;

pub async fn core(service: &PoolClient, core: Core) -> Result<ExitCode, Failure> {
    match core {
        Core::Enable { instance, pattern } => {
            if let Some(pattern) = &pattern {
                joey_api::diagnosis::check_core_pattern(pattern).map_err(Failure::usage)?;
            }
            service.cores(&instance.name, Some(&CoreSettings { enabled: true, pattern })).await?;
            Ok(ExitCode::SUCCESS)
        }
        Core::Disable(instance) => {
            service.cores(&instance.name, Some(&CoreSettings::default())).await?;
            Ok(ExitCode::SUCCESS)
        }
        Core::Ls(shown) => {
            let cores = service.cores(&shown.instance.name, None).await?;
            output::print(shown.output.format(), &cores, |_| table(&cores))
        }
        Core::Get { instance, core, write } => get(service, &instance.name, core, write).await,
    }
}

fn table(cores: &Cores) -> Vec<Vec<String>> {
    match &cores.settings {
        CoreSettings { enabled: false, .. } => {
            eprintln!("note: cores are thrown away; joey diagnose core enable keeps them")
        }
        CoreSettings { pattern: Some(pattern), .. } => eprintln!("note: cores are written to {pattern} inside"),
        CoreSettings { .. } => {}
    }
    let mut rows = vec![["NAME", "SIZE", "AGE"].map(str::to_owned).to_vec()];
    rows.extend(cores.dumps.iter().map(|dump| vec![dump.name.clone(), human_bytes(dump.bytes), age(dump.at)]));
    rows
}

async fn get(
    service: &PoolClient,
    name: &str,
    core: Option<String>,
    write: Option<PathBuf>,
) -> Result<ExitCode, Failure> {
    let core = match core {
        Some(core) => core,
        None => service.cores(name, None).await?.dumps.into_iter().next().map(|dump| dump.name).ok_or_else(|| {
            Failure::new(format!("instance \"{name}\" has kept no core"))
                .with_hint("joey diagnose core enable keeps those of crashes to come")
        })?,
    };
    let mut bytes = service.core(name, &core).await?;
    // A name from elsewhere is not a path.
    let own = Path::new(&core).file_name().map(PathBuf::from).unwrap_or_default();
    let mut out = Out::open(write.as_deref().unwrap_or(&own), write.is_none())?;
    while let Some(part) = bytes.next().await {
        out.write(&part.map_err(|error| Failure::new(format!("core \"{core}\" broke off: {error}")))?)?;
    }
    if write.is_none() {
        output::write(format!("{}\n", own.display()).as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A file, or standard output.
enum Out {
    File(File),
    Stdout,
}

impl Out {
    /// `new`: what is there is not written over.
    fn open(path: &Path, new: bool) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return match std::io::stdout().is_terminal() {
                true => Err(Failure::usage("this is nothing for a terminal").with_hint("name a file with --write")),
                false => Ok(Self::Stdout),
            };
        }
        let mut options = File::options();
        // Memory and traffic may hold secrets.
        options.write(true).mode(0o600);
        let options = if new { options.create_new(true) } else { options.create(true).truncate(true) };
        let opened = options.open(path);
        opened.map(Self::File).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        match self {
            Self::File(file) => Ok(file.write_all(bytes)?),
            Self::Stdout => output::write(bytes),
        }
    }
}

pub async fn tcpdump(service: &PoolClient, wanted: Tcpdump) -> Result<ExitCode, Failure> {
    let request = CaptureRequest {
        interface: wanted.interface,
        protocol: wanted.protocol,
        source: wanted.source,
        source_port: wanted.source_port,
        dest: wanted.dest,
        dest_port: wanted.dest_port,
        host: wanted.host,
        port: wanted.port,
        seconds: wanted.duration,
        packets: wanted.packets,
        bytes: Some(parse_units(&wanted.size).map_err(|error| Failure::usage(format!("--size: {error}")))?),
        snap_length: wanted.snap_length,
    };
    let (mut interrupted, mut asked) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (stop, stopped) = oneshot::channel::<()>();
    let stopping = futures::stream::once(async {
        let _ = stopped.await;
        Bytes::from_static(b".")
    });
    let mut packets = service.capture(&wanted.instance.name, &request, stopping).await?;
    let mut out = Out::open(&wanted.write, false)?;
    let (mut stop, mut tail) = (Some(stop), Vec::new());
    loop {
        tokio::select! {
            part = packets.next() => {
                let Some(part) = part else { break };
                let part = part.map_err(|error| Failure::new(format!("the capture broke off: {error}")))?;
                out.write(&part)?;
                tail.extend_from_slice(&part);
                tail.drain(..tail.len().saturating_sub(TAIL));
                continue;
            }
            _ = interrupted.recv() => {}
            _ = asked.recv() => {}
        }
        // The end is asked for, and what comes until then is taken; whoever asks twice does not wait for it.
        match stop.take() {
            Some(stop) => drop(stop.send(())),
            None => return Ok(ExitCode::from(INTERRUPTED)),
        }
    }
    match counted(&tail) {
        Some((captured, lost)) => {
            eprintln!("{captured} packets captured, {lost} lost");
            Ok(ExitCode::SUCCESS)
        }
        None => {
            Err(Failure::new("the capture broke off").with_hint("is the instance still there? what came is written"))
        }
    }
}
