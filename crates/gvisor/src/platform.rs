//! Which platform works on this host: tried with a sandbox that ends at once.

use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use joey_kernel::sys;

use crate::command::log_of;
use crate::{Runsc, monitor, spec};

/// How long a sandbox of nothing may take; it takes a fraction of a second.
const LIMIT: Duration = Duration::from_secs(5);
/// Between two looks at it.
const LOOK: Duration = Duration::from_millis(10);

/// The first platform, from the fastest, in which `inside` runs to its end; or why there is none. `dir` is made and removed again. Blocks.
pub fn choose(program: &Path, inside: &Path, dir: &Path) -> Result<String, String> {
    let known = Command::new(program).arg("flags").output().map_err(|error| format!("runsc cannot run: {error}"))?;
    let known = String::from_utf8_lossy(&[known.stdout, known.stderr].concat()).into_owned();
    let mut tried = Vec::new();
    // Not KVM: where it does not work it hangs, and where it does, class `rund` has it.
    for platform in ["systrap", "ptrace"].into_iter().filter(|name| *name == "ptrace" || known.contains(name)) {
        match works(program, inside, dir, platform) {
            Ok(()) => return Ok(platform.to_owned()),
            Err(why) => tried.push(format!("{platform}: {why}")),
        }
    }
    Err(tried.join("; "))
}

fn works(program: &Path, inside: &Path, dir: &Path, platform: &str) -> Result<(), String> {
    let run = || -> io::Result<Result<(), String>> {
        remove(dir)?;
        let (root, state) = (dir.join("root"), dir.join("state"));
        std::fs::create_dir_all(&root)?;
        std::fs::create_dir_all(&state)?;
        std::fs::copy(inside, root.join(spec::INSIDE.trim_start_matches('/')))?;
        let mut config = spec::holder("probe", &root);
        // A namespace of its own: nothing of the host's is to be taken over.
        config["linux"]["namespaces"] = serde_json::json!(
            ["pid", "ipc", "uts", "mount", "network"].map(|kind| { serde_json::json!({ "type": kind }) })
        );
        std::fs::write(dir.join("config.json"), config.to_string())?;
        let runsc = Runsc { program: program.to_owned(), platform: platform.to_owned(), root: state };
        let mut command = runsc.run(&format!("joey-probe-{}", std::process::id()), dir);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        ended(&mut command.spawn()?)
    };
    let said = || monitor::last_error(&std::fs::read(log_of(dir)).unwrap_or_default());
    let tried = run().unwrap_or_else(|error| Err(error.to_string())).map_err(|why| said().unwrap_or(why));
    let _ = remove(dir);
    tried
}

/// What releases of 2026 mount below their state where there is no network, and leave there.
const LEFT_MOUNTED: &str = "state/null-netns";

fn ended(child: &mut Child) -> io::Result<Result<(), String>> {
    let end = Instant::now() + LIMIT;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(Ok(())),
            Some(status) => return Ok(Err(status.to_string())),
            None if Instant::now() < end => std::thread::sleep(LOOK),
            None => {
                // Its sandbox dies with it.
                child.kill()?;
                child.wait()?;
                return Ok(Err(format!("it hangs for {} s", LIMIT.as_secs())));
            }
        }
    }
}

fn remove(dir: &Path) -> io::Result<()> {
    // An error says that nothing is mounted, or the removal says what is.
    let _ = sys::unmount(dir.join(LEFT_MOUNTED));
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
