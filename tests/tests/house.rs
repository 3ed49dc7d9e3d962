//! The house rules, held by reading the repository: form of files, size, names, direction of dependencies, honest documents.

use std::collections::BTreeMap;

use joey_tests::repository;
use joey_tests::source::{Source, files, functions};

/// Fails with every line of `faults`.
#[track_caller]
fn none(what: &str, faults: Vec<String>) {
    assert!(faults.is_empty(), "{what}:\n  {}", faults.join("\n  "));
}

fn rust() -> Vec<Source> {
    let mut all = files("crates", ".rs");
    all.extend(files("tests", ".rs"));
    assert!(all.len() > 50, "the source is found");
    all
}

/// The exceptions listed in `tests/house-exceptions.txt`: `RULE PATH[:FUNCTION] LIMIT REASON…`.
fn exceptions(rule: &str) -> BTreeMap<String, usize> {
    let text = std::fs::read_to_string(repository().join("tests/house-exceptions.txt")).unwrap_or_default();
    let mut found = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.trim().is_empty()) {
        let words: Vec<_> = line.splitn(4, ' ').collect();
        let [kind, path, limit, reason] = words[..] else { panic!("an exception needs a reason: {line}") };
        assert!(reason.trim().len() > 20, "an exception needs a reason: {line}");
        if kind == rule {
            found.insert(path.to_owned(), limit.parse().unwrap_or_else(|_| panic!("no limit in: {line}")));
        }
    }
    found
}

#[test]
fn every_file_says_what_lives_in_it() {
    let bad = rust().into_iter().filter(|file| !file.text.starts_with("//! ")).map(|file| file.path).collect();
    none("these files do not open with //!", bad);
}

#[test]
fn files_and_crates_are_named_after_what_they_hold() {
    let forbidden = ["util", "utils", "common", "helper", "helpers", "manager", "misc"];
    let bad = rust()
        .into_iter()
        .filter(|file| file.path.split(['/', '.', '_', '-']).any(|word| forbidden.contains(&word)))
        .map(|file| file.path)
        .collect();
    none("these names say nothing", bad);
}

#[test]
fn files_are_short() {
    let allowed = exceptions("file");
    let bad = rust()
        .into_iter()
        .map(|file| (file.text.lines().count(), file.path))
        .filter(|(lines, path)| *lines > *allowed.get(path).unwrap_or(&600))
        .map(|(lines, path)| format!("{path} has {lines} lines"))
        .collect();
    none("files of more than 600 lines need an exception in tests/house-exceptions.txt", bad);
    assert!(allowed.values().all(|limit| *limit <= 1000), "1,000 lines is the end");
}

#[test]
fn functions_are_short() {
    let allowed = exceptions("function");
    let mut bad = Vec::new();
    for file in rust() {
        for function in functions(&file.text) {
            let limit = *allowed.get(&format!("{}:{}", file.path, function.name)).unwrap_or(&100);
            if function.length > limit {
                bad.push(format!("{}:{} {} has {} lines", file.path, function.line, function.name, function.length));
            }
        }
    }
    none("functions of more than 100 lines need an exception in tests/house-exceptions.txt", bad);
}

#[test]
fn crates_are_small() {
    let mut sizes: BTreeMap<String, usize> = BTreeMap::new();
    for file in files("crates", ".rs") {
        let name = file.path.split('/').nth(1).unwrap_or_default().to_owned();
        *sizes.entry(name).or_default() += file.text.lines().count();
    }
    let bad = sizes.into_iter().filter(|(_, lines)| *lines > 8000).map(|(n, l)| format!("{n} has {l} lines")).collect();
    none("crates of more than 8,000 lines are split", bad);
}

#[test]
fn nothing_is_left_unfinished() {
    let mut bad = Vec::new();
    for file in rust() {
        if file.path == "tests/tests/house.rs" {
            continue;
        }
        for (number, line) in file.text.lines().enumerate() {
            for word in ["todo!(", "unimplemented!(", "dbg!(", "FIXME", "XXX"] {
                if line.contains(word) {
                    bad.push(format!("{}:{} {word}", file.path, number + 1));
                }
            }
        }
    }
    none("unfinished", bad);
}

#[test]
fn unsafe_code_says_why_it_is_sound() {
    let mut bad = Vec::new();
    for file in rust() {
        if file.path == "tests/tests/house.rs" {
            continue;
        }
        let lines: Vec<_> = file.text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let opens = line.contains("unsafe {") || line.contains("unsafe impl") || line.contains("unsafe extern");
            let near = lines[at.saturating_sub(6)..=at].iter().any(|line| line.contains("SAFETY:"));
            if opens && !line.trim_start().starts_with("//") && !near {
                bad.push(format!("{}:{}", file.path, at + 1));
            }
        }
    }
    none("unsafe without a SAFETY line", bad);
}

#[test]
fn libraries_do_not_read_flags_or_environment() {
    let mut bad = Vec::new();
    for file in files("crates", ".rs") {
        let is_test = |line: &str| file.text.find("#[cfg(test)]").is_some_and(|at| file.text[at..].contains(line));
        // What builds is told by cargo in variables.
        let builds = file.path.ends_with("/build.rs");
        if builds || file.path.starts_with("crates/cli/") || file.path.contains("/tests/") {
            continue;
        }
        for (number, line) in file.text.lines().enumerate() {
            let reads = line.contains("env::var") || line.contains("clap::");
            if reads && !is_test(line) {
                bad.push(format!("{}:{} {}", file.path, number + 1, line.trim()));
            }
        }
    }
    none("only cli reads flags and environment", bad);
}

/// What each crate may depend on, of ours. Dependencies point down only.
const MAY_USE: [(&str, &[&str]); 31] = [
    ("model", &[]),
    ("api", &["model"]),
    ("rpc", &["model", "api"]),
    ("guard", &[]),
    ("disk", &[]),
    ("guest", &["model"]),
    ("diagnosis", &["model", "api", "rpc"]),
    ("store", &["model"]),
    ("image", &["model", "api", "guard", "disk"]),
    ("network", &["model", "api"]),
    ("process", &[]),
    ("hypervisor", &["model", "api", "rpc", "disk", "process"]),
    ("sandbox", &["model", "api", "rpc", "collect", "disk", "process", "hypervisor", "gvisor"]),
    ("collect", &["api"]),
    ("health", &["api"]),
    ("seccomp", &[]),
    ("kernel", &["api"]),
    ("jail", &["api", "kernel"]),
    ("gvisor", &["api", "kernel"]),
    ("archive", &[]),
    ("machine", &["api", "kernel"]),
    (
        "agent",
        &[
            "model",
            "api",
            "rpc",
            "archive",
            "collect",
            "diagnosis",
            "gvisor",
            "health",
            "jail",
            "kernel",
            "machine",
            "seccomp",
        ],
    ),
    ("hidecar", &["api", "collect"]),
    ("instance", &["model", "api", "rpc", "image", "network", "sandbox", "collect", "disk", "hidecar"]),
    ("pool", &["model", "api", "rpc", "store"]),
    ("schema", &["model"]),
    ("pki", &[]),
    ("apiserver", &["model", "api", "store", "schema", "pki"]),
    ("controllers", &["model", "api"]),
    ("podspec", &["model", "api"]),
    ("vnode", &["model", "api", "guard", "rpc", "podspec"]),
];

#[test]
fn dependencies_point_down() {
    let mut bad = Vec::new();
    for manifest in files("crates", "Cargo.toml") {
        let name = manifest.path.split('/').nth(1).unwrap_or_default();
        let Some((_, allowed)) = MAY_USE.iter().find(|(member, _)| *member == name) else {
            assert_eq!(name, "cli", "crate {name} has no line in MAY_USE");
            continue;
        };
        let section = manifest.text.split("[dev-dependencies]").next().unwrap_or_default();
        for line in section.lines().filter_map(|line| line.strip_prefix("joey-")) {
            let used = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if !allowed.contains(&used) {
                bad.push(format!("{name} uses {used}"));
            }
        }
        let kubernetes = section.contains("\nkube.") || section.contains("\nk8s-openapi");
        if kubernetes && !matches!(name, "podspec" | "vnode" | "controllers" | "apiserver") {
            bad.push(format!("{name} names Kubernetes"));
        }
    }
    none("dependencies", bad);
}

#[test]
fn classes_are_named_by_their_own_crate_alone() {
    let mut bad = Vec::new();
    for file in files("crates/instance/src", ".rs") {
        if file.text.contains("joey_sandbox::runc")
            || file.text.contains("\"runc\"") && !file.text.contains("#[cfg(test)]")
        {
            bad.push(file.path);
        }
    }
    none("instance never names a class", bad);
}

/// Every part of the mission, A1 to H3.
fn parts() -> Vec<String> {
    let counts = [('A', 15), ('B', 7), ('C', 5), ('D', 6), ('E', 10), ('F', 7), ('G', 11), ('H', 3)];
    counts.iter().flat_map(|(letter, count)| (1..=*count).map(move |n| format!("{letter}{n}"))).collect()
}

#[test]
fn the_readme_has_a_row_for_every_part() {
    let readme = std::fs::read_to_string(repository().join("README.md")).expect("there is a README");
    let mut bad = Vec::new();
    for part in parts() {
        let rows: Vec<_> = readme.lines().filter(|line| line.starts_with(&format!("| {part} |"))).collect();
        let states = ["works", "first form", "not yet"];
        match rows[..] {
            [row] if states.iter().any(|state| row.contains(&format!("| {state}"))) => {}
            [row] => bad.push(format!("no state in: {row}")),
            _ => bad.push(format!("{part} has {} rows", rows.len())),
        }
    }
    none("README's feature table", bad);
}

#[test]
fn documents_are_there_short_and_true() {
    for name in ["README.md", "ARCHITECTURE.md", "SPECIFICATION.md", "CONTRIBUTING.md", "LICENSE"] {
        assert!(repository().join(name).exists(), "{name}");
    }
    let text = std::fs::read_to_string(repository().join("ARCHITECTURE.md")).expect("it is there");
    assert!(text.lines().count() <= 500, "ARCHITECTURE.md has at most 500 lines");
    let mut bad = Vec::new();
    for entry in std::fs::read_dir(repository().join("crates")).expect("crates are there").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !text.contains(&format!("crates/{name}")) {
            bad.push(format!("crates/{name} is not described"));
        }
    }
    // What it names must exist.
    for word in text.split(|c: char| c.is_whitespace() || "`(),;".contains(c)) {
        let word = word.trim_end_matches(['.', ':']);
        let named = ["crates/", "tests/", "docs/", "scripts/", "demo/"].iter().any(|folder| word.starts_with(folder));
        if named && !word.contains(['*', '<', '…']) && !repository().join(word).exists() {
            bad.push(format!("{word} does not exist"));
        }
    }
    none("ARCHITECTURE.md", bad);
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut bad = Vec::new();
    for file in files("", ".md") {
        let folder = repository().join(&file.path);
        let folder = folder.parent().expect("a file lies in a folder");
        for target in file.text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = target.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !folder.join(target).exists() {
                bad.push(format!("{}: {target}", file.path));
            }
        }
    }
    none("dead links", bad);
}
