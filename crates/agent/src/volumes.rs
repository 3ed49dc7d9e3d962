//! Volumes: made before the first container starts, shown to containers whole or in part, renewed while they run.
//!
//! Files whose contents are given (ConfigMaps, Secrets, tokens) are in memory, in the layout that Kubernetes promises, so that
//! new contents are one change for all who look:
//!
//! ```text
//! files/V/key     ─► ..data/key
//! files/V/..data  ─► ..2026_11_21_08_00_00.123456789     a new link, renamed over the old one
//! files/V/..2026_11_21_08_00_00.123456789/key
//! ```
//!
//! An empty directory on the disk is shown as an overlay upon it. A mount of the directory itself would tell in the container's
//! table of mounts where it lies on the host:
//!
//! ```text
//! volumes/V         what containers wrote
//! volumes/.V/shown  the overlay: `data`, a link to it, upon `none`, with `work` for the kernel
//! ```

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::Response;
use hyper::body::Incoming;
use jiff::Timestamp;
use joey_api::agent::{AgentConfig, AgentMount, AgentVolume, VolumeFiles, VolumeUpdated};
use joey_api::instance::FileContent;
use joey_api::validate::relative_path_is_safe;
use joey_model::{ErrorKind, Fault};
use joey_rpc::{BODY_LIMIT, Body, json_answer};

use crate::supervisor::Agent;
use crate::sys;

const DATA: &str = "..data";
/// How long those who read replaced files may go on with them.
const KEPT: Duration = Duration::from_secs(10);

/// How a path within a volume is walked: never out of it, not over links of /proc, not onto other mounts.
const BENEATH: u64 = 0x08 | 0x02 | 0x01;
const NO_SYMLINKS: u64 = 0x04;
/// Attempts while others rename what is walked through.
const ATTEMPTS: u32 = 16;

/// What the owners' group may do to files and directories at least (the kubelet's masks).
const GROUP_READS: u32 = 0o440;
const GROUP_ENTERS: u32 = 0o2550;
const GROUP_WRITES: u32 = 0o2770;

/// Where a volume is, as the agent sees it.
fn place(dir: &Path, volume: &AgentVolume) -> PathBuf {
    dir.join(if volume.files.is_some() { "files" } else { "volumes" }).join(&volume.name)
}

/// What containers see of it.
fn shown(dir: &Path, volume: &AgentVolume) -> PathBuf {
    if is_on_disk(volume) { behind(dir, volume).join("shown") } else { place(dir, volume) }
}

/// Where the overlay of an empty directory on the disk is made. No volume's name begins with a point.
fn behind(dir: &Path, volume: &AgentVolume) -> PathBuf {
    dir.join("volumes").join(format!(".{}", volume.name))
}

/// Whether containers can only read it, whatever they ask for.
pub fn is_read_only(volume: &AgentVolume) -> bool {
    volume.files.is_some() || !volume.layers.is_empty() || volume.nfs.as_ref().is_some_and(|nfs| nfs.read_only)
}

/// Whether it is an empty directory on the disk.
pub fn is_on_disk(volume: &AgentVolume) -> bool {
    !volume.memory && volume.nfs.is_none() && !is_read_only(volume)
}

/// The place of what is in an empty directory on the disk, or of what a server has.
pub fn on_disk(dir: &Path, volume: &AgentVolume) -> PathBuf {
    place(dir, volume)
}

/// Makes all of them. Contents are where they are shown afterwards, and no more in the configuration.
pub fn prepare(dir: &Path, config: &mut AgentConfig) -> io::Result<()> {
    if config.volumes.iter().any(|volume| volume.files.is_some()) {
        let files = dir.join("files");
        make_dir(&files, 0o755, None)?;
        // Programs may be among them, so they can be started.
        sys::mount("tmpfs", files, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, "mode=755")?;
    }
    let group = config.fs_group;
    for volume in &mut config.volumes {
        let place = place(dir, volume);
        let made = match volume.files.as_mut().map(std::mem::take) {
            Some(files) => make_dir(&place, 0o755, group.map(|group| (group, GROUP_ENTERS)))
                .and_then(|()| renew(&place, &files, group).map(drop)),
            None if !volume.layers.is_empty() => stack(&place, &volume.layers),
            // What a server has is mounted later, and is nobody's to change but the server's.
            None if volume.nfs.is_some() => make_dir(&place, 0o755, None),
            None if volume.memory => in_memory(&place, volume.size_limit_bytes, group),
            // Every user of the containers may write, as into the kubelet's.
            None => make_dir(&place, 0o777, group.map(|group| (group, GROUP_WRITES)))
                .and_then(|()| cover(&behind(dir, volume), &volume.name)),
        };
        made.map_err(|error| io::Error::new(error.kind(), format!("volume \"{}\": {error}", volume.name)))?;
    }
    Ok(())
}

fn in_memory(place: &Path, size: Option<u64>, group: Option<u32>) -> io::Result<()> {
    make_dir(place, 0o700, None)?;
    let size = size.map_or_else(String::new, |bytes| format!(",size={bytes}"));
    sys::mount("tmpfs", place, "tmpfs", libc::MS_NOSUID | libc::MS_NODEV, &format!("mode=1777{size}"))?;
    own(place, 0o1777, group.map(|group| (group, GROUP_WRITES)))
}

/// Makes the overlay upon an empty directory. The names in the options are all that the table of mounts tells. What is in it ends
/// with the Pod: `volatile` keeps fsync, and the end of the mount, from waiting until the host's whole disk is written.
fn cover(behind: &Path, name: &str) -> io::Result<()> {
    // One that was used so is not taken again.
    match std::fs::remove_dir_all(behind.join("work")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    for dir in ["", "none", "work", "shown"] {
        make_dir(&behind.join(dir), 0o755, None)?;
    }
    match symlink(Path::new("..").join(name), behind.join("data")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::env::set_current_dir(behind)?;
    let flags = libc::MS_NODEV | libc::MS_NOSUID;
    sys::mount("overlay", "shown", "overlay", flags, "lowerdir=none,upperdir=data,workdir=work,volatile")?;
    std::env::set_current_dir("/")
}

/// An image's layers, one upon the other, over an empty directory: overlay wants two at least. They are named by short links,
/// which the mount then covers: containers see the names in their table of mounts.
fn stack(place: &Path, layers: &[String]) -> io::Result<()> {
    make_dir(place, 0o755, None)?;
    make_dir(&place.join("n"), 0o755, None)?;
    let mut names = String::new();
    for (number, layer) in layers.iter().enumerate() {
        symlink(layer, place.join(number.to_string()))?;
        names.push_str(&format!("{number}:"));
    }
    std::env::set_current_dir(place)?;
    let flags = libc::MS_RDONLY | libc::MS_NODEV | libc::MS_NOSUID;
    sys::mount("overlay", ".", "overlay", flags, &format!("lowerdir={names}n"))?;
    std::env::set_current_dir("/")
}

/// Makes a directory where it is missing, with exactly this mode, whatever the umask.
fn make_dir(path: &Path, mode: u32, group: Option<(u32, u32)>) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && std::fs::symlink_metadata(path)?.is_dir() => {}
        made => made?,
    }
    own(path, mode, group)
}

/// Gives a file its mode, and to a group what the group may do beside that.
fn own(path: &Path, mode: u32, group: Option<(u32, u32)>) -> io::Result<()> {
    if let Some((group, _)) = group {
        chown(path, None, Some(group))?;
    }
    // After the owner: a change of owner takes bits away.
    std::fs::set_permissions(path, Permissions::from_mode(mode | group.map_or(0, |(_, bits)| bits)))
}

/// A file as it is wanted.
struct Wanted<'a> {
    path: &'a Path,
    bytes: Vec<u8>,
    mode: u32,
    user: u32,
}

impl<'a> Wanted<'a> {
    fn of(file: &'a FileContent, group: Option<u32>) -> io::Result<Self> {
        let wrong = |what: String| io::Error::new(io::ErrorKind::InvalidInput, what);
        if !relative_path_is_safe(&file.path) || file.path.starts_with("..") {
            return Err(wrong(format!("path \"{}\" leaves the volume", file.path)));
        }
        let bytes = STANDARD.decode(&file.base64).map_err(|_| wrong(format!("\"{}\" is not base64", file.path)))?;
        let mode = (file.mode & 0o777) | group.map_or(0, |_| GROUP_READS);
        Ok(Self { path: Path::new(&file.path), bytes, mode, user: file.user.unwrap_or(0) })
    }

    /// What is shown of it in the volume itself: the first part of its path.
    fn top(&self) -> Option<&'a std::ffi::OsStr> {
        self.path.iter().next()
    }
}

/// How a renewal went.
#[derive(Debug, PartialEq, Eq)]
enum Renewed {
    Same,
    /// What was shown before is still there under this name.
    Changed {
        before: Option<OsString>,
    },
}

/// Brings a volume to these contents: for all who look it has either the old ones or the new ones, whole.
fn renew(place: &Path, files: &[FileContent], group: Option<u32>) -> io::Result<Renewed> {
    let wanted = files.iter().map(|file| Wanted::of(file, group)).collect::<io::Result<Vec<_>>>()?;
    let before = std::fs::read_link(place.join(DATA)).ok().map(PathBuf::into_os_string);
    if let Some(before) = &before
        && holds(&place.join(before), &wanted)
    {
        return Ok(Renewed::Same);
    }
    let fresh = generation(place)?;
    let new = place.join(&fresh);
    if let Err(error) = write(&new, &wanted, group) {
        let _ = std::fs::remove_dir_all(&new);
        return Err(error);
    }
    let link = place.join("..data_tmp");
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(&fresh, &link)?;
    std::fs::rename(link, place.join(DATA))?;
    show(place, &wanted)?;
    for entry in std::fs::read_dir(place)?.flatten() {
        let (name, kind) = (entry.file_name(), entry.file_type()?);
        if kind.is_dir() && name != fresh && before.as_ref() != Some(&name) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(Renewed::Changed { before })
}

/// Whether a generation has exactly these files.
fn holds(generation: &Path, wanted: &[Wanted<'_>]) -> bool {
    let same = |file: &Wanted<'_>| -> io::Result<bool> {
        let found = File::open(generation.join(file.path))?;
        let meta = found.metadata()?;
        let alike = (meta.mode() & 0o7777, meta.uid(), meta.len()) == (file.mode, file.user, file.bytes.len() as u64);
        Ok(alike && std::fs::read(generation.join(file.path))? == file.bytes)
    };
    count(generation).is_ok_and(|files| files == wanted.len()) && wanted.iter().all(|file| same(file).unwrap_or(false))
}

fn count(dir: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        files += if entry.file_type()?.is_dir() { count(&entry.path())? } else { 1 };
    }
    Ok(files)
}

/// Makes the directory of a new generation, named by the time.
fn generation(place: &Path) -> io::Result<OsString> {
    loop {
        let now = Timestamp::now();
        let name = format!("..{}.{:09}", now.strftime("%Y_%m_%d_%H_%M_%S"), now.subsec_nanosecond());
        match DirBuilder::new().mode(0o700).create(place.join(&name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| name.into()),
        }
    }
}

fn write(generation: &Path, wanted: &[Wanted<'_>], group: Option<u32>) -> io::Result<()> {
    let enters = group.map(|group| (group, GROUP_ENTERS));
    for file in wanted {
        let mut at = generation.to_owned();
        for part in file.path.parent().into_iter().flat_map(Path::iter) {
            at.push(part);
            make_dir(&at, 0o755, enters)?;
        }
        let target = generation.join(file.path);
        let mut made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&target)?;
        made.write_all(&file.bytes)?;
        chown(&target, Some(file.user), group)?;
        std::fs::set_permissions(&target, Permissions::from_mode(file.mode))?;
    }
    own(generation, 0o755, enters)
}

/// Brings the names that are shown to those of the present generation.
fn show(place: &Path, wanted: &[Wanted<'_>]) -> io::Result<()> {
    let tops: BTreeSet<_> = wanted.iter().filter_map(Wanted::top).collect();
    for top in &tops {
        match symlink(Path::new(DATA).join(top), place.join(top)) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    for entry in std::fs::read_dir(place)? {
        let entry = entry?;
        let name = entry.file_name();
        if !name.as_encoded_bytes().starts_with(b"..") && !tops.contains(name.as_os_str()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Answers `PUT /v1/volumes/NAME`.
pub async fn put(agent: &Agent, name: &str, body: Incoming) -> Result<Response<Body>, Fault> {
    let VolumeFiles { files } = joey_rpc::read_json(body, BODY_LIMIT).await?;
    let known = agent.config.volumes.iter().find(|volume| volume.name == name && volume.files.is_some());
    let volume = known.ok_or_else(|| {
        Fault::new(ErrorKind::NotFound, "NotFound", format!("there is no volume \"{name}\" of files"))
    })?;
    let place = place(&agent.dir, volume);
    let renewed = renew(&place, &files, agent.config.fs_group).map_err(|error| {
        let kind = match error.kind() {
            io::ErrorKind::InvalidInput => ErrorKind::Invalid,
            _ => ErrorKind::Internal,
        };
        Fault::new(kind, "VolumeNotRenewed", format!("volume \"{name}\" cannot be renewed: {error}"))
    })?;
    if let Renewed::Changed { before: Some(before) } = &renewed {
        let old = place.join(before);
        tokio::spawn(async move {
            tokio::time::sleep(KEPT).await;
            // A later renewal may have removed it.
            let _ = std::fs::remove_dir_all(old);
        });
    }
    Ok(json_answer(&VolumeUpdated { changed: renewed != Renewed::Same }))
}

/// Opens what a mount shows, as it is at this moment. Nothing is looked up by its path again afterwards, so that nobody who can
/// write into the volume leads the mount elsewhere (CVE-2017-1002101, CVE-2021-25741).
pub fn open(dir: &Path, volume: &AgentVolume, mount: &AgentMount) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    // Opened for reading only in name: the path alone is held.
    let whole: OwnedFd = OpenOptions::new().read(true).custom_flags(flags).open(shown(dir, volume))?.into();
    match &mount.sub_path {
        None => Ok(whole),
        Some(path) if relative_path_is_safe(path) => within(whole.as_fd(), Path::new(path), !is_read_only(volume)),
        Some(path) => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("path \"{path}\" leaves the volume"))),
    }
}

/// Opens a path within a volume; what is missing becomes directories as open as the volume itself.
fn within(volume: BorrowedFd<'_>, path: &Path, make: bool) -> io::Result<OwnedFd> {
    match walk(volume, path, libc::O_PATH, BENEATH) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && make => {}
        found => return found,
    }
    let mode = std::fs::metadata(held(volume))?.mode() & 0o7777;
    let directory = libc::O_PATH | libc::O_DIRECTORY;
    let mut at = volume.try_clone_to_owned()?;
    let mut reached = PathBuf::new();
    for part in path {
        reached.push(part);
        // From the volume's top, so that links on the way lead where they lead for others, and never out of it.
        at = match walk(volume, &reached, directory, BENEATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fresh = match sys::mkdirat(at.as_fd(), Path::new(part)) {
                    // Somebody made it meanwhile, or it is a link that leads nowhere, which the opening refuses.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
                    made => made.map(|()| true)?,
                };
                let opened = walk(at.as_fd(), Path::new(part), directory | libc::O_NOFOLLOW, BENEATH | NO_SYMLINKS)?;
                if fresh {
                    std::fs::set_permissions(held(opened.as_fd()), Permissions::from_mode(mode))?;
                }
                opened
            }
            opened => opened?,
        };
    }
    Ok(at)
}

/// openat2, again where somebody renamed something on the way.
fn walk(dir: BorrowedFd<'_>, path: &Path, flags: libc::c_int, resolve: u64) -> io::Result<OwnedFd> {
    let mut last = sys::openat2(dir, path, flags, resolve);
    for _ in 1..ATTEMPTS {
        match &last {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => last = sys::openat2(dir, path, flags, resolve),
            _ => break,
        }
    }
    last
}

fn held(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str, mode: u32) -> FileContent {
        FileContent { path: path.to_owned(), base64: STANDARD.encode(text), mode, user: None }
    }

    /// A directory of the test's own, removed at its end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let place = std::env::temp_dir().join(format!("joey-agent-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&place).unwrap();
            Self(place)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn is_root() -> bool {
        std::fs::metadata("/proc/self").unwrap().uid() == 0
    }

    #[test]
    fn contents_are_replaced_as_a_whole() {
        if !is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let scratch = Scratch::new("renew");
        let place = &scratch.0;
        let read = |path: &str| std::fs::read_to_string(place.join(path)).unwrap();
        let mode = |path: &str| std::fs::metadata(place.join(path)).unwrap().mode() & 0o7777;
        let first = [file("a", "1", 0o640), file("sub/b", "2", 0o400)];
        assert_eq!(renew(place, &first, None).unwrap(), Renewed::Changed { before: None });
        assert_eq!((read("a"), read("sub/b")), ("1".to_owned(), "2".to_owned()));
        assert_eq!((mode("a"), mode("sub/b"), mode("sub")), (0o640, 0o400, 0o755));
        assert_eq!(std::fs::read_link(place.join("sub")).unwrap(), Path::new("..data/sub"));
        let old = std::fs::read_link(place.join(DATA)).unwrap();
        assert_eq!(renew(place, &first, None).unwrap(), Renewed::Same);
        assert_eq!(std::fs::read_link(place.join(DATA)).unwrap(), old);

        // Another mode alone is a change too.
        let second = [file("a", "1", 0o600), file("c", "3", 0o644)];
        let before = Some(old.clone().into_os_string());
        assert_eq!(renew(place, &second, Some(7)).unwrap(), Renewed::Changed { before });
        assert_eq!((read("a"), read("c"), mode("a"), mode("..data")), ("1".into(), "3".into(), 0o640, 0o2755));
        assert_eq!(std::fs::metadata(place.join("a")).unwrap().gid(), 7);
        assert!(!place.join("sub").exists() && place.join(&old).join("sub/b").exists(), "readers of it may go on");
        let before = std::fs::read_link(place.join(DATA)).ok().map(PathBuf::into_os_string);
        assert_eq!(renew(place, &[], None).unwrap(), Renewed::Changed { before });
        assert!(!place.join(&old).exists() && !place.join("a").exists());
    }

    #[test]
    fn what_cannot_be_written_changes_nothing() {
        if !is_root() {
            return eprintln!("SKIPPED: needs root");
        }
        let scratch = Scratch::new("unwritten");
        let place = &scratch.0;
        renew(place, &[file("a", "1", 0o644)], None).unwrap();
        for wrong in [
            vec![file("../x", "", 0o644)],
            vec![file("/x", "", 0o644)],
            vec![file("..data", "", 0o644)],
            vec![file("a", "2", 0o644), file("a/b", "2", 0o644)],
            vec![FileContent { base64: "!".to_owned(), ..file("a", "", 0o644) }],
        ] {
            assert!(renew(place, &wrong, None).is_err(), "{wrong:?}");
            assert_eq!(std::fs::read(place.join("a")).unwrap(), b"1");
            let left = std::fs::read_dir(place).unwrap().count();
            assert_eq!(left, 3, "a name, the link, and one generation");
        }
    }

    #[test]
    fn no_path_leads_out_of_a_volume() {
        let scratch = Scratch::new("within");
        let volume = scratch.0.join("v");
        std::fs::create_dir_all(volume.join("real/deep")).unwrap();
        std::fs::write(scratch.0.join("secret"), "s").unwrap();
        for (name, leads_to) in [
            ("good", "real"),
            ("up", "../secret"),
            ("root", "/"),
            ("proc", "/proc/self/root"),
            ("nowhere", "not-there"),
            ("loop", "loop"),
        ] {
            symlink(leads_to, volume.join(name)).unwrap();
        }
        let top = File::open(&volume).unwrap();
        let inside = |path: &str| within(top.as_fd(), Path::new(path), true);
        let at = |path: &str| std::fs::read_link(held(inside(path).unwrap().as_fd())).unwrap();
        assert_eq!(at("good/deep"), volume.join("real/deep"));
        assert_eq!(at("good/new/er"), volume.join("real/new/er"));
        for path in ["up", "up/x", "root", "root/etc", "proc", "proc/etc", "nowhere", "nowhere/x", "loop", "../secret"]
        {
            let found = inside(path).map(|fd| std::fs::read_link(held(fd.as_fd())));
            assert!(found.is_err(), "{path}: {found:?}");
        }
        assert!(within(top.as_fd(), Path::new("absent"), false).is_err() && !volume.join("absent").exists());
        assert!(!volume.join("not-there").exists());
    }
}
