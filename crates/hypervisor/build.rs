//! Builds the plugin that QEMU loads (`plugin/lean.rs`): a library in C's form without Rust's own, so that it needs nothing that QEMU has
//! not loaded already.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    let variable = |name: &str| std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"));
    let source = "plugin/lean.rs";
    println!("cargo::rerun-if-changed={source}");
    let library = PathBuf::from(variable("OUT_DIR")).join("lean.so");
    let built = Command::new(variable("RUSTC"))
        .args(["--edition=2024", "--crate-type=cdylib", "--crate-name=joey_lean", "-Dwarnings", "-Cpanic=abort"])
        .args(["-Copt-level=s", "-Clto=fat", "-Cstrip=symbols", "-Crelocation-model=pic", "--target"])
        .arg(variable("TARGET"))
        .arg("-o")
        .args([library.as_os_str(), source.as_ref()])
        .status();
    assert!(built.expect("rustc runs").success(), "{source} could not be built");
}
