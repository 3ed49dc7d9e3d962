//! `kernel.core_pattern` of the host, taken and given back. There is one for all processes of the machine, so taking it is the
//! decision of whoever owns the host, and what it was stays in force for all that is no instance's: the handler passes that on.
//!
//! ```text
//! D/core/joey-agent     the program that the kernel starts; it needs nothing of the daemon's
//! D/core/handler.json   what it has to know, and what there was before
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::crash::SPECIFIERS;

const PATTERN: &str = "/proc/sys/kernel/core_pattern";
/// Cores being written at the same time, each held until its handler has ended; 0 holds none, and the handler would find nothing of
/// the process. The number is systemd's.
const AT_ONCE: &str = "/proc/sys/kernel/core_pipe_limit";
const CORES: u32 = 16;
/// Bytes of a pattern (CORENAME_MAX_SIZE, less its end).
const LONGEST: usize = 127;
const PROGRAM: &str = "joey-agent";
const KNOWN: &str = "handler.json";

#[derive(Debug, thiserror::Error)]
pub enum CorePatternError {
    #[error("cannot {operation} for core dumps")]
    Host { operation: &'static str, source: io::Error },
    #[error("kernel.core_pattern would have {length} bytes, and the kernel takes {LONGEST}")]
    TooLong { length: usize },
    #[error("kernel.core_pattern leads to the joey of {}", .dir.display())]
    Taken { dir: PathBuf },
    #[error("kernel.core_pattern leads to a socket, which nothing can be passed on to")]
    Socket,
    #[error("crashes are handled outside of the namespaces that joey is in")]
    NotTheHost,
}

impl CorePatternError {
    /// What a person can do.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Host { .. } => "it needs root and a /proc/sys that can be written",
            Self::TooLong { .. } => "give joey a data directory with a shorter path",
            Self::Taken { .. } => "one joey of a machine can have core dumps; end the other one first with joey down",
            Self::Socket => "choose another kernel.core_pattern for this host",
            Self::NotTheHost => "start joey in the first mount and process namespaces of the machine",
        }
    }
}

fn host(operation: &'static str) -> impl Fn(io::Error) -> CorePatternError {
    move |source| CorePatternError::Host { operation, source }
}

/// What the handler knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Known {
    /// What there was before, for all that is no instance's.
    pub(crate) pattern: String,
    at_once: u32,
    pub(crate) cgroup_root: String,
    pub(crate) instances: PathBuf,
    /// Most bytes of a core.
    pub(crate) most: u64,
}

impl Known {
    /// As it is written beside the program that runs.
    pub(crate) fn beside(program: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(program.with_file_name(KNOWN))?)?)
    }
}

/// Where cores of instances come from.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The program `joey-agent`.
    pub program: &'a Path,
    pub cgroup_root: String,
    /// Directory of instances.
    pub instances: PathBuf,
    /// Most bytes of a core.
    pub most: u64,
}

fn read(path: &str) -> Result<String, CorePatternError> {
    let text = fs::read_to_string(path).map_err(host("read kernel.core_pattern"))?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// What a pattern starts with that leads to the handler in `dir`.
fn ours(dir: &Path) -> String {
    format!("|{} ", dir.join(PROGRAM).display())
}

/// What the kernel is asked to tell, as words of a command.
fn words() -> String {
    let values: Vec<String> = SPECIFIERS.chars().map(|letter| format!("{letter}%{letter}")).collect();
    values.join(" ")
}

/// In a virtual machine, by its first process: its kernel brings crashes to the program that this one runs.
pub fn take_in_guest(most: u64) -> io::Result<()> {
    fs::write(AT_ONCE, CORES.to_string())?;
    fs::write(PATTERN, format!("|/proc/1/exe guest-core {most} {}", words()))
}

/// Takes the pattern; `dir` is the handler's, made where it is missing. Taken again it is brought up to date.
pub fn take(dir: &Path, wanted: &Wanted<'_>) -> Result<(), CorePatternError> {
    let pattern = format!("{}core {}", ours(dir), words());
    if pattern.len() > LONGEST || dir.to_string_lossy().contains(char::is_whitespace) {
        return Err(CorePatternError::TooLong { length: pattern.len() });
    }
    let now = read(PATTERN)?;
    let before = match now.starts_with(&ours(dir)) {
        true => noted(dir),
        false => (passed_on(&now)?, read(AT_ONCE)?.parse().unwrap_or(0)),
    };
    install(dir, wanted.program).map_err(host("put the handler in its place"))?;
    let seen = |place: &Path| fs::metadata(place).map(|meta| (meta.dev(), meta.ino())).ok();
    let program = dir.join(PROGRAM);
    // Handlers are started where the kernel's own threads are, and the first of them is always process 2.
    let outside = Path::new("/proc/2/root").join(program.strip_prefix("/").unwrap_or(&program));
    if seen(&program) != seen(&outside) || !is_first_namespace() {
        return Err(CorePatternError::NotTheHost);
    }
    let known = Known {
        pattern: before.0,
        at_once: before.1,
        cgroup_root: wanted.cgroup_root.clone(),
        instances: wanted.instances.clone(),
        most: wanted.most,
    };
    // Durable before the kernel's pattern changes: it is the only trace of what there was.
    let written = serde_json::to_vec(&known).map_err(io::Error::other);
    written.and_then(|bytes| replace(&dir.join(KNOWN), &bytes, 0o600)).map_err(host("note what there was"))?;
    if known.at_once == 0 {
        fs::write(AT_ONCE, CORES.to_string()).map_err(host("set kernel.core_pipe_limit"))?;
    }
    fs::write(PATTERN, &pattern).map_err(host("set kernel.core_pattern"))
}

/// Pattern and limit from before they were taken; the kernel's own where the note is lost.
fn noted(dir: &Path) -> (String, u32) {
    Known::beside(&dir.join(PROGRAM)).map_or_else(|_| ("core".to_owned(), 0), |known| (known.pattern, known.at_once))
}

/// What shall be done with crashes of others, from the pattern that is there.
fn passed_on(now: &str) -> Result<String, CorePatternError> {
    let program = now.strip_prefix('|').and_then(|command| command.split_whitespace().next()).map(Path::new);
    match program {
        Some(program) if program.ends_with(Path::new("core").join(PROGRAM)) => match program.exists() {
            true => Err(CorePatternError::Taken { dir: program.ancestors().nth(2).unwrap_or(program).to_owned() }),
            // Its data directory was removed without `joey down`: what there was before is lost, this is the kernel's own.
            false => Ok("core".to_owned()),
        },
        _ if now.starts_with('@') => Err(CorePatternError::Socket),
        _ => Ok(now.to_owned()),
    }
}

/// Whether this process is in the first namespace of processes: its number never changes (linux/proc_ns.h, PROC_PID_INIT_INO).
fn is_first_namespace() -> bool {
    fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == 0xefff_fffc)
}

fn install(dir: &Path, program: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let (place, bytes) = (dir.join(PROGRAM), fs::read(program)?);
    if fs::read(&place).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    replace(&place, &bytes, 0o700)
}

fn replace(place: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let new = place.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&new)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&new, place)?;
    File::open(place.parent().unwrap_or(place))?.sync_all()
}

/// Puts the kernel's pattern and limit back to what they were, and removes the handler. Nothing is done where nothing was taken; what
/// somebody else has set meanwhile stays.
pub fn give_back(dir: &Path) -> Result<(), CorePatternError> {
    if !dir.exists() {
        return Ok(());
    }
    let (pattern, at_once) = noted(dir);
    if read(PATTERN)?.starts_with(&ours(dir)) {
        restore(Path::new(PATTERN), &pattern).map_err(host("restore kernel.core_pattern"))?;
    }
    // Also where the pattern is somebody else's by now.
    if at_once != CORES && read(AT_ONCE)? == CORES.to_string() {
        fs::write(AT_ONCE, at_once.to_string()).map_err(host("restore kernel.core_pipe_limit"))?;
    }
    fs::remove_dir_all(dir).map_err(host("remove the handler"))
}

/// Writes what was there, which may be nothing: with the end of a line, since the kernel takes a write of no bytes for none.
fn restore(place: &Path, before: &str) -> io::Result<()> {
    fs::write(place, format!("{before}\n"))?;
    let now = fs::read_to_string(place)?;
    match now.trim_end_matches('\n') == before {
        true => Ok(()),
        false => Err(io::Error::other(format!("it is \"{}\" afterwards", now.trim_end()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_place_fits() {
        let values = SPECIFIERS.len() * 4 - 1;
        let usual = ours(Path::new("/var/lib/joey/core")).len() + "core ".len() + values;
        assert!(usual <= LONGEST, "{usual}");
    }

    #[test]
    fn what_there_was_is_passed_on_where_it_can_be() {
        assert_eq!(passed_on("core").ok().as_deref(), Some("core"));
        assert_eq!(passed_on("|/usr/lib/handler %P").ok().as_deref(), Some("|/usr/lib/handler %P"));
        assert!(matches!(passed_on("@/run/socket"), Err(CorePatternError::Socket)));
        let dir = std::env::temp_dir().join(format!("joey-pattern-{}", std::process::id()));
        let pattern = format!("{}core P%P", ours(&dir.join("core")));
        assert_eq!(passed_on(&pattern).ok().as_deref(), Some("core"), "a joey that is gone");
        fs::create_dir_all(dir.join("core")).unwrap();
        fs::write(dir.join("core").join(PROGRAM), "").unwrap();
        assert!(matches!(passed_on(&pattern), Err(CorePatternError::Taken { dir: found }) if found == dir));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_pattern_that_was_empty_is_restored_too() {
        let place = std::env::temp_dir().join(format!("joey-restored-{}", std::process::id()));
        for before in ["core", "", "|/usr/lib/handler %P "] {
            restore(&place, before).unwrap();
            assert_eq!(fs::read_to_string(&place).unwrap(), format!("{before}\n"));
        }
        fs::remove_file(place).unwrap();
        assert!(restore(Path::new("/dev/null"), "core").is_err(), "what is not there afterwards is not restored");
    }
}
