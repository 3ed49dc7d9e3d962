//! Builds what QEMU loads (`plugin`): libraries in C's form without Rust's own, so that they need nothing that QEMU has not loaded
//! already.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=plugin");
    let lean = place("lean.so");
    run(rustc("lean").args(["--crate-type=cdylib", "-Clto=fat", "-Cstrip=symbols", "-o"]).arg(&lean));
    stand_in("capstone", "libcapstone.so.4", "{ global: cs_*; local: *; };");
    // As the original's symbols are versioned, so are these: the dynamic linker asks for it.
    stand_in("pmem", "libpmem.so.1", "LIBPMEM_1.0 { global: pmem_*; local: *; };");
}

/// Builds what is taken for a library of this name, and has its symbols.
fn stand_in(source: &str, name: &str, symbols: &str) {
    let (object, script) = (place(&format!("{source}.o")), place(&format!("{source}.map")));
    run(rustc(source).args(["--crate-type=lib", "--emit=obj", "-o"]).arg(&object));
    std::fs::write(&script, symbols).expect("cargo's directory can be written");
    let linker = std::env::var_os("RUSTC_LINKER").unwrap_or_else(|| "cc".into());
    let scripted = format!("-Wl,--version-script={}", script.display());
    let named = format!("-Wl,-soname,{name},--strip-all,--gc-sections,-z,now");
    run(Command::new(linker)
        .args(["-shared", "-nostdlib", &named, &scripted, "-o"])
        .args([&place(&format!("{source}.so")), &object])
        .arg("-lc"));
}

fn rustc(source: &str) -> Command {
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["--edition=2024", "-Dwarnings", "-Cpanic=abort", "-Copt-level=s", "-Crelocation-model=pic"]);
    rustc.arg(format!("--crate-name=joey_{source}")).arg("--target").arg(variable("TARGET"));
    rustc.arg(Path::new("plugin").join(source).with_extension("rs"));
    rustc
}

fn run(command: &mut Command) {
    let ended = command.status().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(ended.success(), "{command:?} failed");
}

fn place(name: &str) -> PathBuf {
    PathBuf::from(variable("OUT_DIR")).join(name)
}

fn variable(name: &str) -> std::ffi::OsString {
    std::env::var_os(name).unwrap_or_else(|| panic!("cargo sets {name}"))
}
