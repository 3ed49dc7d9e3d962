//! Who a container's process is: users and groups by number or name, capabilities, and the seccomp filter's companion, the
//! dropping of everything else. Names are looked up in the root that the process already lives in.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use crate::sys;

/// The largest passwd or group file that is read, in bytes.
const FILE_LIMIT: u64 = 1 << 20;

#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    pub home: String,
}

/// Resolves `user`, `uid`, `user:group` in all mixtures; the empty text is root. Errors are for the user.
/// `strict`: groups that the image puts the user into do not count.
pub fn resolve(user: &str, supplemental: &[u32], strict: bool) -> Result<Identity, String> {
    resolve_in(user, (supplemental, strict), &read("/etc/passwd"), &read("/etc/group"))
}

fn resolve_in(
    user: &str,
    (supplemental, strict): (&[u32], bool),
    passwd: &str,
    group: &str,
) -> Result<Identity, String> {
    let (user, wanted_group) = user.split_once(':').map_or((user, None), |(user, group)| (user, Some(group)));
    let user = if user.is_empty() { "0" } else { user };
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.len() >= 6 && (fields[0] == user || (user.parse::<u32>().is_ok() && fields[2] == user)));
    let number = |fields: &Vec<&str>, at: usize| fields.get(at).and_then(|text| text.parse::<u32>().ok());
    let uid = match (&entry, user.parse::<u32>()) {
        (Some(fields), _) => number(fields, 2),
        (None, Ok(uid)) => Some(uid),
        (None, Err(_)) => None,
    };
    let uid = uid.ok_or_else(|| format!("unable to find user {user}: no matching entries in passwd file"))?;
    let groups: Vec<Vec<&str>> = group.lines().map(|line| line.split(':').collect()).collect();
    let gid = match wanted_group.filter(|group| !group.is_empty()) {
        Some(name) => groups
            .iter()
            .find(|fields| fields.len() >= 3 && fields[0] == name)
            .and_then(|fields| number(fields, 2))
            .or_else(|| name.parse().ok())
            .ok_or_else(|| format!("unable to find group {name}: no matching entries in group file"))?,
        None => entry.as_ref().and_then(|fields| number(fields, 3)).unwrap_or(0),
    };
    let mut all: BTreeSet<u32> = supplemental.iter().copied().collect();
    if let (Some(fields), false) = (&entry, strict) {
        let member = |list: &str| list.split(',').any(|name| name == fields[0]);
        all.extend(groups.iter().filter(|g| g.len() >= 4 && member(g[3])).filter_map(|g| number(g, 2)));
    }
    all.insert(gid);
    // The highest number tells setresuid(2) to change nothing: the process would stay root.
    if let Some(number) = all.iter().chain([&uid]).find(|number| **number > i32::MAX as u32) {
        return Err(format!("user or group {number} is out of range"));
    }
    let home = entry.map_or("/", |fields| fields[5]);
    let home = if home.is_empty() { "/" } else { home };
    Ok(Identity { uid, gid, groups: all.into_iter().collect(), home: home.to_owned() })
}

/// A file of the container as text; what is not a plain file, too large or not there reads as nothing.
fn read(path: &str) -> String {
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let Ok(file) = opened else { return String::new() };
    if !file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() <= FILE_LIMIT) {
        return String::new();
    }
    let mut bytes = Vec::new();
    let _ = file.take(FILE_LIMIT).read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Capability names in the order of their numbers (capabilities(7)).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The capabilities as a bit set; unknown names count for nothing.
pub fn capability_bits(names: &[String]) -> u64 {
    NAMES
        .iter()
        .enumerate()
        .filter(|(_, name)| names.iter().any(|n| n == *name))
        .fold(0, |bits, (at, _)| bits | 1 << at)
}

/// Becomes the identity with no more than the given capabilities, for ever.
pub fn become_identity(identity: &Identity, capabilities: u64) -> io::Result<()> {
    for number in 0..64 {
        if capabilities & (1 << number) == 0
            && let Err(error) = sys::prctl(libc::PR_CAPBSET_DROP, number)
        {
            match error.raw_os_error() {
                // Beyond the last one that this kernel knows.
                Some(libc::EINVAL) => break,
                _ => return Err(error),
            }
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1)?;
    // SAFETY: the list lives through the call; raw system calls act on this thread, which is the only one.
    unsafe {
        let groups = &identity.groups;
        sys::check(libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()))?;
        sys::check(libc::syscall(libc::SYS_setresgid, identity.gid, identity.gid, identity.gid))?;
        sys::check(libc::syscall(libc::SYS_setresuid, identity.uid, identity.uid, identity.uid))?;
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 0)?;
    // Only root keeps them over an exec, and nothing is inheritable: as containerd does it.
    let held = if identity.uid == 0 { capabilities } else { 0 };
    let header: [u32; 2] = [0x2008_0522, 0];
    let (low, high) = (held as u32, (held >> 32) as u32);
    let data: [u32; 6] = [low, low, 0, high, high, 0];
    // SAFETY: header and data have capset's layout (version 3).
    sys::check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:w:/var/www:/bin/false\nbroken\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:\nlog:x:4:web,other\n";

    #[test]
    fn users() {
        let resolve = |user| resolve_in(user, (&[7], false), PASSWD, GROUP).map(|i| (i.uid, i.gid, i.groups, i.home));
        assert_eq!(resolve(""), Ok((0, 0, vec![0, 7], "/root".into())));
        assert_eq!(resolve("web"), Ok((33, 34, vec![4, 7, 34], "/var/www".into())));
        assert_eq!(resolve("33:log"), Ok((33, 4, vec![4, 7], "/var/www".into())));
        assert_eq!(resolve("1000"), Ok((1000, 0, vec![0, 7], "/".into())));
        assert_eq!(resolve("1000:2000"), Ok((1000, 2000, vec![7, 2000], "/".into())));
        let strict = resolve_in("web", (&[7], true), PASSWD, GROUP).map(|i| (i.uid, i.gid, i.groups));
        assert_eq!(strict, Ok((33, 34, vec![7, 34])), "not the image's");
        assert!(resolve("nobody").is_err() && resolve("web:nogroup").is_err());
        assert!(resolve("4294967295").is_err() && resolve("1:4294967295").is_err() && resolve("2147483648").is_err());
    }

    #[test]
    fn default_capabilities() {
        let names = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FSETID",
            "FOWNER",
            "MKNOD",
            "NET_RAW",
            "SETGID",
            "SETUID",
            "SETFCAP",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "SYS_CHROOT",
            "KILL",
            "AUDIT_WRITE",
        ];
        assert_eq!(capability_bits(&names.map(str::to_owned)), 0xa804_25fb);
    }
}
