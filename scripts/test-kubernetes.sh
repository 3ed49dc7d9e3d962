#!/usr/bin/env bash
# Builds a real control plane from the modules named in tests/kubernetes/go.mod, once, and runs Joey's virtual node on it.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin:/usr/local/go/bin"

scripts/kubernetes-peers.sh
[ -x tests/kubernetes/bin/kube-apiserver ] || exit 0
scripts/packages.sh openssl
scripts/kubectl.sh >/dev/null
scripts/debian-files.sh .tools/docker-registry docker-registry
demo/build.sh .run/demo
# The whole workspace is named so that nothing is compiled again with other features than the other tests'.
cargo test --release --locked --config tests/units.toml --workspace --exclude joey-tests --test real_cluster
cargo test --release --locked -p joey-tests --test kubernetes -- --test-threads=1
