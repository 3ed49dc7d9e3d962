//! Libraries that monitors load, as files in memory; and those that stand in for ones which they are linked with and never call, 2 MiB of
//! each monitor's own memory (`plugin/capstone.rs`, `plugin/pmem.rs`).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use super::LIMIT;
use super::arguments::Sent;
use crate::template::{memory_file, seal};

/// As `build.rs` builds them.
static CAPSTONE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/capstone.so"));
static PMEM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pmem.so"));

#[derive(Debug, Clone)]
pub(super) struct Library(Arc<OwnedFd>);

impl Library {
    pub(super) fn of(bytes: &[u8]) -> io::Result<Self> {
        let mut file = File::from(memory_file(c"joey-library", libc::MFD_ALLOW_SEALING)?);
        file.write_all(bytes)?;
        seal(file.as_fd())?;
        Ok(Self(Arc::new(file.into())))
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Where this process's own children find it.
    pub(super) fn place(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// What has the dynamic linker load these before others, and take them for those of their names (ld.so(8)).
pub(super) fn instead(places: impl Iterator<Item = String>) -> String {
    format!("LD_PRELOAD={}", places.collect::<Vec<_>>().join(":"))
}

/// Those that this program starts with; none for one that wants more of them.
pub(super) async fn stand_ins(program: &Path) -> Vec<(Sent, Library)> {
    let why = match probed(program).await {
        Ok(Ok(all)) => return all,
        Ok(Err(words)) => words,
        Err(error) => error.to_string(),
    };
    tracing::warn!(why, "QEMU takes no stand-ins for its libraries: its processes take 2 MiB more each");
    Vec::new()
}

/// All of them, where the program starts with them; otherwise what it says.
async fn probed(program: &Path) -> io::Result<Result<Vec<(Sent, Library)>, String>> {
    let all = vec![(Sent::Capstone, Library::of(CAPSTONE)?), (Sent::Pmem, Library::of(PMEM)?)];
    let instead = instead(all.iter().map(|(_, library)| library.place()));
    let (name, value) = instead.split_once('=').unwrap_or_default();
    let mut command = tokio::process::Command::new(program);
    // All symbols are looked for at once, also by one that would look when it calls.
    command.arg("--version").env_clear().env(name, value).env("LD_BIND_NOW", "1");
    command.stdin(Stdio::null()).kill_on_drop(true);
    let told = tokio::time::timeout(LIMIT, command.output()).await??;
    let words = String::from_utf8_lossy(&told.stderr);
    Ok(if told.status.success() && words.is_empty() { Ok(all) } else { Err(words.trim().to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &tempfile::TempDir, script: &str) -> std::path::PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let place = dir.path().join("qemu-system-x86_64");
        std::fs::write(&place, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o755)).unwrap();
        place
    }

    #[tokio::test]
    async fn a_program_that_wants_more_of_a_library_gets_the_library() {
        let dir = tempfile::tempdir().unwrap();
        let loaded = program(&dir, "case $(cat /proc/$$/maps) in *joey-library*joey-library*) ;; *) exit 1 ;; esac");
        assert_eq!(stand_ins(&loaded).await.len(), 2);
        let complains = program(&dir, "echo 'undefined symbol: cs_more' >&2");
        assert!(stand_ins(&complains).await.is_empty());
        let fails = program(&dir, "exit 127");
        assert!(stand_ins(&fails).await.is_empty());
        assert!(stand_ins(&dir.path().join("absent")).await.is_empty());
    }
}
