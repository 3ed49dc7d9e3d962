//! The mount namespace in which the network namespaces are held, and the one thread that lives there.
//!
//! A network namespace without processes lives as long as a mount of its file. Were those mounts in the host's table, every
//! sandbox's own mount namespace would begin with a copy of all of them, and memory and time would grow with the square of the
//! instances (unbindable mounts are copied there too). So they are in a mount namespace of the daemon's own, which is one mount
//! in the run directory, of a kind that the kernel leaves out of such copies. Everybody else reaches the files through the
//! thread's root in `/proc`; a symbolic link in the run directory leads there and is renewed by every life of the daemon.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use tokio::sync::oneshot;

use crate::error::NetworkError;
use crate::namespace::is_held;

type Job = Box<dyn FnOnce() + Send>;

/// Runs work in the mount namespace; its thread ends with this, the namespace stays.
pub(crate) struct Holder {
    jobs: mpsc::Sender<Job>,
}

impl Holder {
    /// Enters the namespace that `file` holds, or makes one, and lets `link` lead to the folder inside.
    pub(crate) async fn open(file: &Path, link: &Path) -> Result<Self, NetworkError> {
        let (jobs, work) = mpsc::channel::<Job>();
        let (entered, entry) = oneshot::channel();
        let earlier = is_held(file).then(|| File::open(file)).transpose();
        let earlier = earlier.map_err(NetworkError::io("open", file.display()))?;
        let is_new = earlier.is_none();
        let scratch = file.parent().unwrap_or(Path::new("/run")).to_owned();
        std::thread::Builder::new()
            .name("netns-holder".to_owned())
            .spawn(move || {
                let made = enter(earlier, &scratch);
                let whole = made.is_ok();
                let _ = entered.send(made.map(|()| nix::unistd::gettid()));
                if whole {
                    work.iter().for_each(|job| job());
                }
            })
            .map_err(NetworkError::io("start thread of", file.display()))?;
        let thread = entry.await.map_err(|_| NetworkError::io("enter", file.display())(ended()))??;
        let root = format!("/proc/{}/task/{thread}", std::process::id());
        if is_new {
            File::create(file).map_err(NetworkError::io("create", file.display()))?;
            mount(Some(format!("{root}/ns/mnt").as_str()), file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(NetworkError::errno("mount", file.display()))?;
        }
        let renewed = link.with_extension("new");
        let lead = || {
            let _ = std::fs::remove_file(&renewed);
            std::os::unix::fs::symlink(format!("{root}/root/netns"), &renewed)?;
            std::fs::rename(&renewed, link)
        };
        lead().map_err(NetworkError::io("renew", link.display()))?;
        Ok(Self { jobs })
    }

    /// Holds `namespace` under `name`.
    pub(crate) async fn hold(&self, namespace: OwnedFd, name: String) -> Result<(), NetworkError> {
        let object = name.clone();
        self.run(object, move || {
            let path = format!("/netns/{name}");
            File::create(&path).map_err(NetworkError::io("create", &path))?;
            let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
            mount(Some(source.as_str()), path.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(NetworkError::errno("mount", path))
        })
        .await
    }

    /// Lets go of what is held under `name`, if anything; the kernel removes it, pair and all, once no process is left inside.
    pub(crate) async fn let_go(&self, name: String) -> Result<(), NetworkError> {
        self.run(name.clone(), move || {
            let path = format!("/netns/{name}");
            while is_held(Path::new(&path)) {
                umount2(path.as_str(), MntFlags::MNT_DETACH).map_err(NetworkError::errno("unmount", &path))?;
            }
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(NetworkError::io("remove", path)(error)),
                _ => Ok(()),
            }
        })
        .await
    }

    async fn run(
        &self,
        object: String,
        job: impl FnOnce() -> Result<(), NetworkError> + Send + 'static,
    ) -> Result<(), NetworkError> {
        let (done, result) = oneshot::channel();
        // A thread that is gone drops the job, and with it `done`.
        let _ = self.jobs.send(Box::new(move || drop(done.send(job()))));
        result.await.unwrap_or_else(|_| Err(NetworkError::io("hold or let go of", object)(ended())))
    }
}

fn ended() -> io::Error {
    io::Error::other("the thread that holds namespaces ended")
}

/// Puts this thread, and no other, into the namespace.
fn enter(earlier: Option<File>, scratch: &Path) -> Result<(), NetworkError> {
    let object = scratch.display();
    if let Some(earlier) = earlier {
        unshare(CloneFlags::CLONE_FS).map_err(NetworkError::errno("unshare root for", &object))?;
        return setns(earlier, CloneFlags::CLONE_NEWNS).map_err(NetworkError::errno("enter holder in", &object));
    }
    let nothing = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).map_err(NetworkError::errno("unshare mounts for", &object))?;
    let build = || -> nix::Result<()> {
        mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)?;
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("joey"), scratch, Some("tmpfs"), flags, Some("mode=0700,size=16m"))?;
        nix::unistd::chdir(scratch)?;
        // The host's mounts must not be held by this namespace: a layer unmounted there has to go.
        nix::unistd::pivot_root(".", ".")?;
        umount2(".", MntFlags::MNT_DETACH)?;
        nix::unistd::chdir("/")?;
        for folder in ["/netns", "/proc"] {
            nix::unistd::mkdir(folder, nix::sys::stat::Mode::S_IRWXU)?;
        }
        mount(Some("proc"), "/proc", Some("proc"), flags, nothing)
    };
    build().map_err(NetworkError::errno("build holder in", &object))
}
