//! The plugin (`plugin/lean.rs`) by which an emulated machine's monitor gives back the memory of what it translated when the machine
//! idles: 47 MiB of 98, for what takes 60 ms more the next time.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::Stdio;

use super::LIMIT;
use super::library::Library;

/// As `build.rs` builds it.
static PLUGIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lean.so"));
/// What the program says when the plugin answered a probe (`PROBED` there).
const PROBED: &str = "returned error code 77";

/// The plugin, for programs that take it.
#[derive(Debug, Clone)]
pub(super) struct Lean(Library);

impl Lean {
    /// `None` for a program that takes no plugins, or none of this kind: its machines keep what they translated.
    pub(super) async fn open(program: &Path) -> Option<Self> {
        let why = match Self::probed(program).await {
            Ok(Ok(lean)) => return Some(lean),
            Ok(Err(words)) => words,
            Err(error) => error.to_string(),
        };
        tracing::warn!(why, "QEMU takes no plugin: emulated machines keep what they translated");
        None
    }

    /// The plugin, where the program takes it; otherwise what it says.
    async fn probed(program: &Path) -> io::Result<Result<Self, String>> {
        let lean = Self(Library::of(PLUGIN)?);
        let place = format!("file={},probe=on", lean.0.place());
        let mut command = tokio::process::Command::new(program);
        command.args(["-M", "none", "-no-user-config", "-nodefaults", "-display", "none", "-plugin", &place]);
        command.env_clear().stdin(Stdio::null()).kill_on_drop(true);
        let told = tokio::time::timeout(LIMIT, command.output()).await??;
        let words = String::from_utf8_lossy(&told.stderr);
        Ok(if words.contains(PROBED) { Ok(lean) } else { Err(words.trim().to_owned()) })
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.descriptor()
    }
}
