//! The program that the kernel starts for each process that crashes, as root of the host, with the core on its standard input.
//!
//! ```text
//! crash ─► whose cgroup? ─ an instance's ─► enabled? ─► its cgroups, its container's root and user ─► file, at most so many bytes
//!                        └ nobody's here ─► what kernel.core_pattern was before: another program, or a file as the kernel makes it
//! ```
//!
//! In a virtual machine the kernel is the instance's own, and the same is done with whatever crashes in one of its containers
//! ([`run_in_guest`]).
//!
//! An instance has two handlers at work, and only as long as its core comes: so no instance keeps all the kernel's places for itself.
//! Everything about the crash is hostile: names are made harmless, and from the moment when a file inside a container is opened this
//! process has no right that the crashed one did not have. A core of an instance never reaches the host's own handler.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use joey_api::diagnosis::{CoreSettings, CoreWritten, Crash};
use joey_api::guest::{CGROUP, INSTANCE};

use crate::core_pattern::Known;
use crate::crash::{Process, Told, become_user};
use crate::elf;

/// The longest that a core of an instance may take to be written, and a piece of it, in seconds.
const LONGEST: Duration = Duration::from_secs(300);
const STALLED: u64 = 5;
/// Cores of one instance that are written at the same time; of what crashes besides there is none.
const SLOTS: usize = 2;
/// How long the agent may take to hear of it.
const ANSWER: Duration = Duration::from_secs(5);
/// Pieces that hold nothing but zeros become holes of the file.
const PIECE: usize = 64 << 10;
/// The kernel makes no core of fewer bytes (binfmt_elf, its `min_coredump`).
const LEAST: u64 = 4096;
/// Who has no rights: nobody.
const NOBODY: u32 = 65534;
/// What a core ends in until all of it is there.
pub const UNFINISHED: &str = ".unfinished";

/// Handles the crash that the words tell of; the message is for nobody but a person who tries it.
pub fn run(words: impl Iterator<Item = OsString>) -> Result<(), String> {
    let told = Told::of(words);
    let pid = told.number('P').ok_or("usage: joey-agent core P%P …, started by the kernel")?;
    let program = std::env::current_exe().map_err(|error| format!("cannot find what is known: {error}"))?;
    let known = Known::beside(&program).map_err(|error| format!("cannot read what is known: {error}"))?;
    let process = Process::open(pid).map_err(|error| format!("process {pid}: {error}"))?;
    let done = match process.owner(&known.cgroup_root) {
        Ok(Some((instance, container))) => {
            let dir = known.instances.join(instance.as_str());
            let owner = Owner { cgroup_root: &known.cgroup_root, dir, container: &container, most: known.most };
            of_instance(&owner, &told, &process)
        }
        Ok(None) => pass_on(&known, &told, &process),
        Err(error) => Err(error),
    };
    done.map_err(|error| format!("core of process {pid}: {error}"))
}

/// The same in a virtual machine; before the words of the kernel comes the most bytes of a core.
pub fn run_in_guest(mut words: impl Iterator<Item = OsString>) -> Result<(), String> {
    let usage = "usage: joey-agent guest-core BYTES P%P …, started by the kernel of a virtual machine";
    let most = words.next().and_then(|word| word.to_str()?.parse().ok()).ok_or(usage)?;
    let told = Told::of(words);
    let pid = told.number('P').ok_or(usage)?;
    let failed = |error: io::Error| format!("core of process {pid}: {error}");
    // What programs of the kernel's see is not theirs to choose; from here on it is what the agent sees.
    std::os::unix::fs::chroot("/proc/1/root").and_then(|()| std::env::set_current_dir("/")).map_err(failed)?;
    let process = Process::open(pid).map_err(failed)?;
    // What is no container's is the agent's.
    let Some(container) = process.container(CGROUP).map_err(failed)? else { return Ok(()) };
    let owner = Owner { cgroup_root: CGROUP, dir: PathBuf::from(INSTANCE), container: &container, most };
    of_instance(&owner, &told, &process).map_err(failed)
}

/// Whose crash it is.
struct Owner<'a> {
    cgroup_root: &'a str,
    /// The instance's directory.
    dir: PathBuf,
    container: &'a str,
    /// Most bytes of a core.
    most: u64,
}

fn of_instance(owner: &Owner<'_>, told: &Told, process: &Process) -> io::Result<()> {
    let end = Instant::now() + LONGEST;
    go_on(end);
    process.join_cgroups(owner.cgroup_root)?;
    let Owner { dir, container, .. } = owner;
    let settings: CoreSettings = serde_json::from_slice(&std::fs::read(dir.join("cores/settings.json"))?)?;
    // The agent's own memory is nobody's to read.
    if !settings.enabled || matches!(*container, "" | "agent") {
        return Ok(());
    }
    let Some(_slot) = slot(&dir.join("cores"))? else { return Ok(()) };
    let path = settings.pattern.as_ref().map(|pattern| told.path(pattern.as_bytes(), true));
    let crash = Crash {
        container: (*container).to_owned(),
        program: plain(told.value('e')),
        pid: told.number('p').and_then(|pid| u32::try_from(pid).ok()).unwrap_or(0),
        signal: signal(told),
        place: path.as_deref().map_or_else(|| kept_name(told, container), shown),
        kept: path.is_none(),
    };
    // Before the rights to do so are given up.
    let mut agent = announce(dir, &crash)?;
    let opened = match &path {
        Some(path) => {
            let safe = told.value('d') == b"2";
            process.stand_in(safe).and_then(|()| create(path, safe))
        }
        None => {
            let place = dir.join("cores").join(crash.place + UNFINISHED);
            let file = File::options().write(true).create_new(true).mode(0o600).open(place);
            file.and_then(|file| become_user(NOBODY, NOBODY, &[], 0).map(|()| file))
        }
    };
    let mut written = CoreWritten::default();
    let done = opened.and_then(|file| copy(&mut io::stdin().lock(), &file, owner.most, &mut written, || go_on(end)));
    written.problem = done.err().map(|error| error.to_string());
    go_on(end);
    tell(&mut agent, &written)
}

/// From now on this process has the time that one piece may take, unless all its time is over: a signal ends it, whatever it waits for.
fn go_on(end: Instant) {
    let left = end.saturating_duration_since(Instant::now()).as_secs().min(STALLED);
    if left > 0 {
        // SAFETY: takes an integer.
        unsafe { libc::alarm(left as u32) };
    }
}

/// A place among those for cores that an instance has at the same time, until it is dropped; `None`: all are taken.
fn slot(cores: &Path) -> io::Result<Option<File>> {
    for number in 0..SLOTS {
        let place = cores.join(format!("slot.{number}"));
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(place)?;
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(None)
}

/// Opens the file that a core goes into, as the kernel does (fs/coredump.c): a plain file of the process's own with one name and no
/// rights for others, and no link.
fn create(path: &Path, safe: bool) -> io::Result<File> {
    let refused = |why| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    if safe && !path.is_absolute() {
        return refused("the program has other rights than its user, and the pattern is no absolute path");
    }
    let mut flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    if safe {
        let _ = std::fs::remove_file(path);
        flags |= libc::O_EXCL;
    }
    let file = File::options().write(true).create(true).truncate(false).mode(0o600).custom_flags(flags).open(path)?;
    let meta = file.metadata()?;
    // SAFETY: takes nothing.
    let user = unsafe { libc::geteuid() };
    if !meta.is_file() || meta.nlink() != 1 || meta.uid() != user || meta.mode() & 0o677 != 0o600 {
        return refused("what is there is no plain file of the process's own, mode 0600");
    }
    file.set_len(0)?;
    Ok(file)
}

/// Copies at most so many bytes, and calls `moved` after each piece; pieces of zeros take no room. Fewer bytes than the core itself
/// tells of are an error: who is killed meanwhile has no more of it.
fn copy(
    from: &mut impl Read,
    to: &File,
    most: u64,
    written: &mut CoreWritten,
    mut moved: impl FnMut(),
) -> io::Result<()> {
    let (mut piece, mut told) = (vec![0; PIECE], 0);
    loop {
        let mut count = 0;
        while count < PIECE {
            match from.read(&mut piece[count..])? {
                0 => break,
                more => count += more,
            }
        }
        if written.bytes == 0 {
            told = elf::length(&piece[..count]);
        }
        let room = usize::try_from(most - written.bytes).unwrap_or(PIECE).min(count);
        if piece[..room].iter().any(|byte| *byte != 0) {
            to.write_all_at(&piece[..room], written.bytes)?;
        }
        written.bytes += room as u64;
        written.cut = room < count;
        moved();
        if written.cut || count < PIECE {
            to.set_len(written.bytes)?;
            return match !written.cut && written.bytes < told {
                true => Err(io::Error::other(format!("it was broken off, of {told} bytes"))),
                false => Ok(()),
            };
        }
    }
}

/// Text of a process as part of a name: nothing that means something to a file system or a terminal.
fn plain(text: &[u8]) -> String {
    let harmless = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_+".contains(byte);
    text.iter().take(32).map(|byte| if harmless(byte) { char::from(*byte) } else { '_' }).collect()
}

/// A path for a person to read.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars().take(512).map(|c| if c.is_control() { '_' } else { c }).collect()
}

fn signal(told: &Told) -> String {
    const NAMES: [(i32, &str); 10] = [
        (libc::SIGQUIT, "SIGQUIT"),
        (libc::SIGILL, "SIGILL"),
        (libc::SIGTRAP, "SIGTRAP"),
        (libc::SIGABRT, "SIGABRT"),
        (libc::SIGBUS, "SIGBUS"),
        (libc::SIGFPE, "SIGFPE"),
        (libc::SIGSEGV, "SIGSEGV"),
        (libc::SIGXCPU, "SIGXCPU"),
        (libc::SIGXFSZ, "SIGXFSZ"),
        (libc::SIGSYS, "SIGSYS"),
    ];
    let number = told.number('s').unwrap_or(0);
    let known = NAMES.iter().find(|(known, _)| u64::from(known.unsigned_abs()) == number);
    known.map_or_else(|| format!("signal{number}"), |(_, name)| (*name).to_owned())
}

fn kept_name(told: &Told, container: &str) -> String {
    let number = |letter| told.number(letter).unwrap_or(0);
    format!("{container}.{}.{}.{}.{}.core", plain(told.value('e')), number('p'), signal(told), number('t'))
}

/// Tells the agent that a core is coming. It is HTTP as every agent understands it; how it ends is the body, sent at the end.
fn announce(dir: &Path, crash: &Crash) -> io::Result<UnixStream> {
    // The address of a socket is short, and its directory's path need not be.
    std::env::set_current_dir(dir)?;
    let mut agent = UnixStream::connect("agent.sock")?;
    agent.set_read_timeout(Some(ANSWER))?;
    let query = joey_rpc::query(crash);
    let head = format!("POST /v1/cores?{query} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n");
    agent.write_all(format!("{head}transfer-encoding: chunked\r\n\r\n").as_bytes())?;
    Ok(agent)
}

fn tell(agent: &mut UnixStream, written: &CoreWritten) -> io::Result<()> {
    let json = serde_json::to_string(written)?;
    agent.write_all(format!("{:x}\r\n{json}\r\n0\r\n\r\n", json.len()).as_bytes())?;
    // Nobody sees the end of the process before what became of its core is known.
    let mut answer = Vec::new();
    agent.take(4096).read_to_end(&mut answer).map(drop)
}

/// Does what the kernel would have done.
fn pass_on(known: &Known, told: &Told, process: &Process) -> io::Result<()> {
    if let Some(command) = known.pattern.strip_prefix('|') {
        let mut words = command.split_whitespace().map(|word| told.expand(word.as_bytes()));
        let Some(program) = words.next() else { return Ok(()) };
        return Err(Command::new(program).args(words).exec());
    }
    let most = told.number('c').unwrap_or(0);
    if most < LEAST {
        return Ok(());
    }
    let with_pid = std::fs::read("/proc/sys/kernel/core_uses_pid").is_ok_and(|text| text.trim_ascii() != b"0");
    let path = told.path(known.pattern.as_bytes(), with_pid);
    // A program with rights of its own: the host's own files, and root's.
    let safe = told.value('d') == b"2";
    if !safe {
        process.stand_in(false)?;
    }
    copy(&mut io::stdin().lock(), &create(&path, safe)?, most, &mut CoreWritten::default(), || {})
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("joey-core-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_core_is_copied_with_holes_and_cut_at_its_limit() {
        let dir = scratch("copy");
        let mut core = vec![0; 5 * PIECE + 100];
        core[0] = 7;
        core[3 * PIECE] = 8;
        for (most, bytes, cut) in [
            (u64::MAX, core.len(), false),
            (core.len() as u64, core.len(), false),
            (2 * PIECE as u64, 2 * PIECE, true),
            (10, 10, true),
        ] {
            let file = create(&dir.join(most.to_string()), false).unwrap();
            let (mut written, mut pieces) = (CoreWritten::default(), 0);
            copy(&mut &core[..], &file, most, &mut written, || pieces += 1).unwrap();
            assert_eq!(pieces, bytes.div_ceil(PIECE) + usize::from(bytes == 2 * PIECE));
            assert_eq!((written.bytes, written.cut), (bytes as u64, cut), "{most}");
            assert_eq!(std::fs::read(dir.join(most.to_string())).unwrap(), core[..bytes]);
            assert!(file.metadata().unwrap().blocks() * 512 <= 3 * PIECE as u64, "zeros take no room");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_core_that_is_broken_off_is_not_taken_for_whole() {
        let dir = scratch("broken");
        // A header, and one program header behind it that ends at 3 pieces.
        let mut core = vec![1; 3 * PIECE];
        core[..6].copy_from_slice(b"\x7fELF\x02\x01");
        core[32..40].copy_from_slice(&64u64.to_le_bytes());
        core[54..58].copy_from_slice(&[56, 0, 1, 0]);
        core[72..80].copy_from_slice(&4096u64.to_le_bytes());
        core[96..104].copy_from_slice(&(3 * PIECE as u64 - 4096).to_le_bytes());
        let file = create(&dir.join("core"), false).unwrap();
        let copied = |core: &[u8], most: u64| {
            let mut written = CoreWritten::default();
            let done = copy(&mut &core[..], &file, most, &mut written, || {});
            (done.is_ok(), written.bytes, written.cut)
        };
        let whole = core.len() as u64;
        assert_eq!(copied(&core, u64::MAX), (true, whole, false));
        assert_eq!(copied(&core[..2 * PIECE], u64::MAX), (false, 2 * PIECE as u64, false));
        assert_eq!(copied(&core[..whole as usize - 1], u64::MAX), (false, whole - 1, false));
        assert_eq!(copied(&core, 1000), (true, 1000, true), "the host's limit is no fault");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn an_instance_has_so_many_cores_at_the_same_time() {
        let dir = scratch("slots");
        let taken: Vec<_> = (0..SLOTS).map(|_| slot(&dir).unwrap().unwrap()).collect();
        assert!(slot(&dir).unwrap().is_none());
        drop(taken);
        assert!(slot(&dir).unwrap().is_some());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_core_goes_into_a_file_of_its_own_alone() {
        let dir = scratch("create");
        let place = |name: &str| dir.join(name);
        std::fs::write(place("secret"), "s").unwrap();
        std::os::unix::fs::symlink(place("secret"), place("link")).unwrap();
        std::fs::create_dir(place("dir")).unwrap();
        std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(place("twice")).unwrap();
        std::fs::hard_link(place("twice"), place("again")).unwrap();
        for wrong in ["link", "dir", "twice", "secret", "none/core"] {
            assert!(create(&place(wrong), false).is_err(), "{wrong}");
        }
        assert_eq!(std::fs::read(place("secret")).unwrap(), b"s");
        create(&place("core"), false).and_then(|mut file| file.write_all(b"old")).unwrap();
        assert_eq!(create(&place("core"), false).unwrap().metadata().unwrap().len(), 0, "an old core gives way");
        // Root's core of a program with other rights: a new file, whatever was there.
        assert!(create(&place("link"), true).unwrap().metadata().unwrap().is_file());
        assert!(create(Path::new("core"), true).is_err());
        assert_eq!(std::fs::read(place("secret")).unwrap(), b"s");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn names_are_harmless() {
        let words = ["p7", "e../\u{1b}[31m\n x", "s11", "t1700000000"];
        let told = Told::of(words.iter().map(OsString::from));
        assert_eq!(kept_name(&told, "web"), "web._____31m__x.7.SIGSEGV.1700000000.core");
        assert_eq!(signal(&Told::of(["s64"].iter().map(OsString::from))), "signal64");
    }
}
