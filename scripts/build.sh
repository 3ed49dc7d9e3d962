#!/usr/bin/env bash
# Builds joey and the agent, which is linked statically because it runs inside sandboxes.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v cargo >/dev/null; then
    # rustup's place, when the shell has not read its profile.
    export PATH="$HOME/.cargo/bin:$PATH"
fi
if ! command -v cargo >/dev/null; then
    echo "error: cargo is missing; Joey needs Rust 1.90 or newer, and Debian 12's own is older" >&2
    echo "hint: install it with rustup (apt-get install curl, then follow rustup's instructions), then run make again" >&2
    exit 1
fi
quiet=()
[ -t 2 ] || quiet=(--quiet)
cargo build "${quiet[@]}" --release --locked -p joey
cargo rustc "${quiet[@]}" --release --locked -p joey-agent -- -C target-feature=+crt-static
# Tests of the agent's crate put a dynamically linked one in its place; machines boot this one.
mkdir -p target/release/static
install -m 0755 target/release/joey-agent target/release/static/joey-agent
