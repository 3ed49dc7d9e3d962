//! A crash as the kernel tells it to its handler: the values of core(5)'s specifiers, and the process itself, which the kernel holds
//! until its core is read. All of it may be made up by whoever crashed but for numbers.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use joey_model::InstanceId;

/// What the kernel is asked to tell: each value comes as an argument that begins with its letter.
pub(crate) const SPECIFIERS: &str = "PpIiugdstcCheEfF";
/// Capabilities that count where a core is written: to pass over permissions of files (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH).
const OVER_FILES: u64 = 1 << 1 | 1 << 2;

/// The values of the specifiers.
pub(crate) struct Told(Vec<(u8, Vec<u8>)>);

impl Told {
    pub(crate) fn of(words: impl Iterator<Item = OsString>) -> Self {
        let words = words.map(OsString::into_vec).filter(|word| !word.is_empty());
        Self(words.map(|mut word| (word.remove(0), word)).collect())
    }

    pub(crate) fn value(&self, specifier: char) -> &[u8] {
        self.0.iter().find(|(known, _)| char::from(*known) == specifier).map_or(b"", |(_, value)| value)
    }

    pub(crate) fn number(&self, specifier: char) -> Option<u64> {
        std::str::from_utf8(self.value(specifier)).ok()?.parse().ok()
    }

    /// A pattern with its specifiers replaced, as the kernel does it; no value brings a slash into a path.
    pub(crate) fn expand(&self, pattern: &[u8]) -> OsString {
        let mut text = Vec::new();
        let mut bytes = pattern.iter();
        while let Some(byte) = bytes.next() {
            match (byte, if *byte == b'%' { bytes.next() } else { None }) {
                (b'%', Some(b'%')) => text.push(b'%'),
                (b'%', Some(specifier)) => {
                    let value = self.value(char::from(*specifier));
                    text.extend(value.iter().map(|byte| if *byte == b'/' { b'!' } else { *byte }));
                }
                (b'%', None) => {}
                (byte, _) => text.push(*byte),
            }
        }
        OsString::from_vec(text)
    }

    /// The path that a pattern stands for; the process id is appended where it is wanted and not part of it.
    pub(crate) fn path(&self, pattern: &[u8], with_pid: bool) -> PathBuf {
        let mut text = self.expand(pattern);
        if with_pid && !pattern.windows(2).any(|two| two == b"%p") {
            text.push(".");
            text.push(OsStr::from_bytes(self.value('p')));
        }
        PathBuf::from(text)
    }
}

/// The process whose core is being written.
pub(crate) struct Process {
    /// Its directory below /proc: it never comes to mean another process, whatever number that one has.
    dir: OwnedFd,
    status: String,
}

impl Process {
    pub(crate) fn open(pid: u64) -> io::Result<Self> {
        let dir = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(format!("/proc/{pid}"))?.into();
        let mut process = Self { dir, status: String::new() };
        process.status = process.read("status")?;
        // Between the crash and now it may have been killed, and its number taken by another process.
        let dumping = process.field("CoreDumping").next() == Some("1");
        if dumping { Ok(process) } else { Err(io::Error::new(io::ErrorKind::NotFound, "the process is gone")) }
    }

    fn place(&self, name: &str) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(name)
    }

    fn read(&self, name: &str) -> io::Result<String> {
        let mut bytes = Vec::new();
        File::open(self.place(name))?.take(1 << 20).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn field(&self, name: &str) -> impl Iterator<Item = &str> {
        let line = self.status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().split_whitespace()
    }

    /// The instance and container whose cgroup below `root` it is in.
    pub(crate) fn owner(&self, root: &str) -> io::Result<Option<(InstanceId, String)>> {
        let Some(below) = self.below(root)? else { return Ok(None) };
        let (id, rest) = below.split_once('/').unwrap_or((&below, ""));
        let id = InstanceId::parse(id).map_err(|_| io::Error::other("its cgroup is no instance's"))?;
        Ok(Some((id, rest.rsplit('/').next().unwrap_or_default().to_owned())))
    }

    /// The container whose cgroup it is in, of the only instance there is, whose cgroup is `root`.
    pub(crate) fn container(&self, root: &str) -> io::Result<Option<String>> {
        let below = self.below(root)?;
        Ok(below.map(|below| below.rsplit('/').next().unwrap_or_default().to_owned()))
    }

    /// Its cgroup below `root`.
    fn below(&self, root: &str) -> io::Result<Option<String>> {
        let text = self.read("cgroup")?;
        let below = text.lines().find_map(|line| line.splitn(3, ':').nth(2)?.strip_prefix(root)?.strip_prefix('/'));
        Ok(below.map(str::to_owned))
    }

    /// Moves this process into the cgroups below `root` that the crashed one is in: what follows is at that one's cost.
    pub(crate) fn join_cgroups(&self, root: &str) -> io::Result<()> {
        for line in self.read("cgroup")?.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            if path.strip_prefix(root).is_some_and(|below| below.starts_with('/')) {
                let top = Path::new("/sys/fs/cgroup").join(controllers);
                // Version 1 by the thread, as the agent does it.
                let file = if controllers.is_empty() { "cgroup.procs" } else { "tasks" };
                std::fs::write(top.join(path.trim_start_matches('/')).join(file), "0")?;
            }
        }
        Ok(())
    }

    /// Gives up everything but what the crashed process has where files are concerned: its root, its working directory, its
    /// user, its groups. `safe`: its rights and those of its program differ, and the core is root's of the same place.
    pub(crate) fn stand_in(&self, safe: bool) -> io::Result<()> {
        let open = |name: &str| {
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            File::options().read(true).custom_flags(flags).open(self.place(name)).map(OwnedFd::from)
        };
        let (root, here) = (open("root")?, open("cwd")?);
        let number = |name: &str| self.field(name).nth(3).and_then(|word| word.parse::<u32>().ok());
        let (Some(user), Some(group)) = (number("Uid"), number("Gid")) else {
            return Err(io::Error::other("its user is not known"));
        };
        let groups: Vec<u32> = self.field("Groups").filter_map(|word| word.parse().ok()).collect();
        let effective = self.field("CapEff").next().and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or(0);
        // Capabilities in a user namespace of its own are none here.
        let namespace = |place: &Path| std::fs::metadata(place).map(|meta| meta.ino());
        let own = namespace(&self.place("ns/user"))? == namespace(Path::new("/proc/self/ns/user"))?;
        let held = if own { effective & OVER_FILES } else { 0 };
        go_to(&root)?;
        std::os::unix::fs::chroot(".")?;
        go_to(&here)?;
        if safe { become_user(0, 0, &[], held) } else { become_user(user, group, &groups, held) }
    }
}

fn go_to(dir: &OwnedFd) -> io::Result<()> {
    // SAFETY: an open descriptor.
    checked(unsafe { libc::fchdir(dir.as_raw_fd()) }.into())
}

fn checked(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Becomes that user with no more capabilities than these, for ever. The process has one thread.
pub(crate) fn become_user(user: u32, group: u32, groups: &[u32], held: u64) -> io::Result<()> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let kept = if user == 0 { held as u32 } else { 0 };
    let data: [u32; 6] = [kept, kept, 0, 0, 0, 0];
    let none: libc::c_ulong = 0;
    // SAFETY: the lists live through the calls, which are told their lengths; header and data have capset's layout (version 3).
    unsafe {
        checked(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as libc::c_ulong, none, none, none).into())?;
        checked(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        checked(libc::syscall(libc::SYS_setresgid, group, group, group))?;
        checked(libc::syscall(libc::SYS_setresuid, user, user, user))?;
        checked(libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_as_in_the_kernel() {
        let words = ["P4711", "p7", "ea/b c", "s11", "t1700000000", "h", "%x"];
        let told = Told::of(words.iter().map(OsString::from));
        for (pattern, wanted) in [
            ("core", "core"),
            ("/d/core-%e-%p-%t", "/d/core-a!b c-7-1700000000"),
            ("%%%s%", "%11"),
            ("a%zb%h", "ab"),
            ("%P%%p", "4711%p"),
        ] {
            assert_eq!(told.expand(pattern.as_bytes()), wanted, "{pattern}");
        }
        assert_eq!(told.path(b"/d/core", true), Path::new("/d/core.7"));
        assert_eq!(told.path(b"/d/core", false), Path::new("/d/core"));
        assert_eq!(told.path(b"/d/%p", true), Path::new("/d/7"));
        assert_eq!((told.number('s'), told.number('e'), told.number('u')), (Some(11), None, None));
    }

    #[test]
    fn a_process_that_does_not_crash_is_not_taken_for_one_that_does() {
        assert!(Process::open(std::process::id().into()).is_err());
        assert!(Process::open(u64::MAX).is_err());
    }
}
