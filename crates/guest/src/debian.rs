//! Fetches the package of a kernel for virtual machines with a Debian host's own tools, which check what they download.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::error::{GuestError, Result};

/// Packages that depend on the latest kernel; the first that is known is taken. The first has what microVMs need longer.
const LATEST: [&str; 2] = ["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"];
const IMAGE: &str = "linux-image-";
/// Most steps from a package to the one that holds the kernel.
const MOST_STEPS: usize = 3;
/// As much of what a failed command said is told.
const MOST_SAID: usize = 600;

/// Downloads the package of a kernel into a directory, and returns its file. `name`: a package `linux-image-*`, or one that
/// depends on such a one; the latest kernel for virtual machines if it is not given.
///
/// Blocks for as long as apt takes. The host's package lists are fetched when they are empty or too old.
pub fn fetch_package(into: &Path, name: Option<&str>) -> Result<PathBuf> {
    Apt { path: "/usr/sbin:/usr/bin:/sbin:/bin".into() }.fetch(into, name)
}

struct Apt {
    /// Where its programs are looked for.
    path: String,
}

impl Apt {
    fn fetch(&self, into: &Path, name: Option<&str>) -> Result<PathBuf> {
        let asked = name.as_ref().map_or(LATEST.as_slice(), std::slice::from_ref);
        if let Some(name) = asked.iter().find(|name| !is_name(name)) {
            let detail = "that is no name of a package".to_owned();
            return Err(GuestError::Fetch { package: (*name).to_owned(), detail });
        }
        fs::create_dir_all(into).map_err(GuestError::host("make", into))?;
        let mut is_updated = false;
        let package = match self.find(asked)? {
            Some(package) => package,
            None => {
                is_updated = true;
                self.update(asked[0])?;
                self.find(asked)?.ok_or_else(|| GuestError::Fetch {
                    package: asked.join(" or "),
                    detail: "this host's package sources do not have it".into(),
                })?
            }
        };
        match self.download(into, &package) {
            // The list may name a version that is no longer offered.
            Err(GuestError::Fetch { .. }) if !is_updated => {
                self.update(&package)?;
                let package = self.find(asked)?.unwrap_or(package);
                self.download(into, &package)
            }
            done => done,
        }
    }

    /// The first of these packages that is known, or the one with a kernel that it leads to.
    fn find(&self, names: &[&str]) -> Result<Option<String>> {
        for name in names {
            let mut found = None;
            let mut next = Some((*name).to_owned());
            for _ in 0..MOST_STEPS {
                let Some(name) = next.take() else { break };
                let shown = self.run("apt-cache", &["show", "--no-all-versions", &name], Path::new("/"), &name)?;
                let text = String::from_utf8_lossy(&shown.stdout);
                if shown.status.success() && !text.trim().is_empty() {
                    next = kernel_it_needs(&text).filter(|needed| *needed != name);
                    found = Some(name);
                }
            }
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    fn update(&self, package: &str) -> Result<()> {
        let updated = self.run("apt-get", &["update"], Path::new("/"), package)?;
        succeeded("apt-get update", &updated, package)
    }

    fn download(&self, into: &Path, package: &str) -> Result<PathBuf> {
        // What is cut off has no name in `into`.
        let folder = tempfile::Builder::new().prefix(".fetch-").tempdir_in(into);
        let folder = folder.map_err(GuestError::host("make a folder in", into))?;
        // As root apt would download as a user who may not write there, and warn about it.
        let options = ["-o", "APT::Sandbox::User=root", "download", package];
        let downloaded = self.run("apt-get", &options, folder.path(), package)?;
        succeeded("apt-get download", &downloaded, package)?;
        let listed = fs::read_dir(folder.path()).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let files = listed.map_err(GuestError::host("list", folder.path()))?;
        let Some(file) = files.iter().find(|file| file.path().extension().is_some_and(|end| end == "deb")) else {
            let detail = "apt-get download left no file".to_owned();
            return Err(GuestError::Fetch { package: package.to_owned(), detail });
        };
        let place = into.join(file.file_name());
        fs::rename(file.path(), &place).map_err(GuestError::host("move a package to", &place))?;
        Ok(place)
    }

    fn run(&self, program: &str, arguments: &[&str], folder: &Path, package: &str) -> Result<Output> {
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", &self.path).current_dir(folder).stdin(Stdio::null());
        command.output().map_err(|error| GuestError::Fetch {
            package: package.to_owned(),
            detail: match error.kind() {
                io::ErrorKind::NotFound => format!("this host has no {program}, as Debian and its kin have"),
                _ => format!("{program} cannot be started: {error}"),
            },
        })
    }
}

fn succeeded(command: &str, output: &Output, package: &str) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<_> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut said = said.join("; ");
    let too_much = said.len().saturating_sub(MOST_SAID);
    let start = (too_much..=said.len()).find(|&at| said.is_char_boundary(at)).unwrap_or_default();
    said.drain(..start);
    let detail = format!("{command} ended with {}: {said}", output.status);
    Err(GuestError::Fetch { package: package.to_owned(), detail })
}

/// Debian Policy 5.6.7: what does not begin with a letter or digit would be an option.
fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+.-".contains(&byte);
    name.bytes().all(is_allowed) && name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.len() > 1
}

/// The package with a kernel that a package depends on, by what `apt-cache show` says of it.
fn kernel_it_needs(description: &str) -> Option<String> {
    let needs = description.lines().find_map(|line| line.strip_prefix("Depends:"))?;
    let names = needs.split([',', '|']).filter_map(|one| one.trim().split([' ', '(', ':']).next());
    names.filter(|name| name.starts_with(IMAGE) && is_name(name)).map(str::to_owned).next()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A host whose apt is these two scripts; the directory that is returned holds them, and what they note.
    fn host(cache: &str, get: &str) -> (tempfile::TempDir, Apt) {
        let dir = tempfile::tempdir().unwrap();
        for (name, script) in [("apt-cache", cache), ("apt-get", get)] {
            let path = dir.path().join(name);
            fs::write(&path, format!("#!/bin/sh\nhost={}\n{script}\n", dir.path().display())).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("{}:/usr/bin:/bin", dir.path().display());
        (dir, Apt { path })
    }

    const META: &str = r#"case "$3" in
linux-image-cloud-amd64) echo "Package: $3"; echo "Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1-2), other";;
linux-image-6.1.0-9-cloud-amd64) echo "Package: $3"; echo "Depends: kmod, linux-base (>= 4.3~)";;
*) echo "N: Unable to locate package $3" >&2; exit 100;;
esac"#;
    const DOWNLOAD: &str = r#"case "$*" in
update) echo update >>$host/log;;
*download*) echo "$*" >>$host/log; echo package >"$4_6.1-2_amd64.deb";;
esac"#;

    #[test]
    fn the_latest_kernel_is_found_and_downloaded() {
        let (dir, apt) = host(META, DOWNLOAD);
        let into = dir.path().join("new/into");
        let file = apt.fetch(&into, None).unwrap();
        assert_eq!(file, into.join("linux-image-6.1.0-9-cloud-amd64_6.1-2_amd64.deb"));
        assert_eq!(fs::read_to_string(&file).unwrap(), "package\n");
        assert_eq!(fs::read_dir(&into).unwrap().count(), 1, "nothing else is left");
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log, "-o APT::Sandbox::User=root download linux-image-6.1.0-9-cloud-amd64\n");
    }

    #[test]
    fn empty_lists_are_fetched_once() {
        let cache = format!("[ -e $host/log ] || exit 100\n{META}");
        let (dir, apt) = host(&cache, DOWNLOAD);
        apt.fetch(dir.path(), Some("linux-image-cloud-amd64")).unwrap();
        let log = fs::read_to_string(dir.path().join("log")).unwrap();
        assert_eq!(log.lines().filter(|line| *line == "update").count(), 1);

        let (dir, apt) = host("exit 100", DOWNLOAD);
        let error = apt.fetch(dir.path(), None).unwrap_err();
        assert!(error.to_string().contains("linux-image-cloud-amd64 cannot be fetched"), "{error}");
        assert!(error.hint().unwrap().contains("kernel as a file"));
        assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), "update\n");
    }

    #[test]
    fn what_is_no_longer_offered_is_looked_for_again() {
        let get =
            format!("[ \"$1\" = update ] || [ -e $host/log ] || {{ echo '404 Not Found' >&2; exit 100; }}\n{DOWNLOAD}");
        let (dir, apt) = host(META, &get);
        assert!(apt.fetch(dir.path(), None).unwrap().exists());
    }

    #[test]
    fn a_failure_names_the_command_and_tells_what_it_said() {
        let (dir, apt) = host(META, "echo W: old >&2; echo E: no network >&2; exit 100");
        let error = apt.fetch(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("apt-get update ended with exit status: 100: W: old; E: no network"), "{error}");
        let nowhere = Apt { path: "/nonexistent".into() };
        let error = nowhere.fetch(dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("has no apt-cache"), "{error}");
        let (dir, apt) = host(META, "true");
        assert!(apt.fetch(dir.path(), None).unwrap_err().to_string().contains("left no file"));
    }

    #[test]
    fn names_are_those_of_packages() {
        for name in ["-o", "../x", "a b", "", "x", "Linux"] {
            assert!(!is_name(name), "{name}");
            let error = Apt { path: String::new() }.fetch(Path::new("/nonexistent"), Some(name)).unwrap_err();
            assert!(error.to_string().contains("no name of a package"));
        }
        assert!(is_name("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(kernel_it_needs("Depends: a, linux-image-1:amd64 (= 1) | b\n").unwrap(), "linux-image-1");
        assert_eq!(kernel_it_needs("Package: x\n"), None);
    }
}
