//! The repository's own source as the house checks read it.

use std::path::{Path, PathBuf};

use crate::repository;

/// A file of the repository.
#[derive(Debug, Clone)]
pub struct Source {
    /// Relative to the repository's root.
    pub path: String,
    pub text: String,
}

/// Every file that git would keep and whose name ends in `ending`, below `folder`.
pub fn files(folder: &str, ending: &str) -> Vec<Source> {
    let root = repository();
    let mut found = Vec::new();
    collect(&root, &root.join(folder), ending, &mut found);
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn collect(root: &Path, folder: &Path, ending: &str, found: &mut Vec<Source>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path: PathBuf = entry.path();
        let name = entry.file_name().to_string_lossy().into_owned();
        if path.is_dir() {
            if !matches!(name.as_str(), "target" | ".git" | ".run" | ".tools" | "bin" | "node_modules") {
                collect(root, &path, ending, found);
            }
        } else if name.ends_with(ending)
            && let Ok(text) = std::fs::read_to_string(&path)
        {
            let path = path.strip_prefix(root).expect("it lies below the root").display().to_string();
            found.push(Source { path, text });
        }
    }
}

/// The durable steps, as the source names them: every `checkpoint::reached("…")`. Those of agents begin with `agent.`, those of
/// machines that are being made with `machine.`.
pub fn checkpoints() -> Vec<String> {
    let mut found = Vec::new();
    for file in files("crates", ".rs").iter().filter(|file| !file.path.starts_with("crates/model/")) {
        for rest in file.text.split("reached(\"").skip(1) {
            found.extend(rest.split('"').next().map(str::to_owned));
        }
    }
    found.sort();
    found.dedup();
    found
}

/// A function of a Rust file.
#[derive(Debug, Clone)]
pub struct Function {
    pub name: String,
    /// The line of its signature, from 1.
    pub line: usize,
    /// Lines from its signature to its closing brace.
    pub length: usize,
}

/// The functions of a file formatted by rustfmt: a closing brace stands in the column of its signature.
pub fn functions(text: &str) -> Vec<Function> {
    let lines: Vec<_> = text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        let indent = line.len() - line.trim_start().len();
        let closing = format!("{}}}", " ".repeat(indent));
        let end = lines[at..].iter().position(|line| *line == closing);
        let one_line = line.trim_end().ends_with(['}', ';']);
        let length = if one_line { 1 } else { end.map_or(1, |end| end + 1) };
        found.push(Function { name, line: at + 1, length });
    }
    found
}

fn function_name(line: &str) -> Option<String> {
    let mut rest = line.trim_start();
    for word in ["pub(crate) ", "pub(super) ", "pub ", "const ", "async ", "unsafe ", "extern \"C\" "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    let rest = rest.strip_prefix("fn ")?;
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'))?;
    Some(rest[..end].to_owned())
}
