#!/usr/bin/env bash
# Formatting, lints and house checks. The same profile as the build, so that dependencies are compiled once.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

echo "== formatting"
cargo fmt --all --check
# What is no module of a crate cargo does not find.
rustfmt --check --edition 2024 crates/hypervisor/plugin/lean.rs
echo "== lints"
cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings
echo "== house checks"
cargo test --release --locked -p joey-tests --test house
