#!/usr/bin/env bash
# Every test, the quickest first. Whole-system tests run one after another: they measure, and they look for what is left behind.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PATH:$HOME/.cargo/bin"

[ "$(id -u)" -eq 0 ] || { echo "error: the whole-system tests make sandboxes and so need root" >&2; exit 1; }
scripts/packages.sh bsdutils procps openssl gdb tcpdump tshark busybox-static erofs-utils
# For class rund; its tests say loudly that they were skipped where there is none.
scripts/packages.sh qemu-system-x86 qemu-utils || true
# The same for class gvisor; and for a release of it that is newer than Debian's.
scripts/packages.sh runsc || true
scripts/newer-runsc.sh
scripts/check.sh
scripts/kubectl.sh >/dev/null
scripts/debian-files.sh .tools/docker-registry docker-registry
demo/build.sh .run/demo
scripts/kafka.sh

at() { printf '%d min %02d s' $((SECONDS / 60)) $((SECONDS % 60)); }
echo "== units (after $(at))"
# The test on a real control plane comes at the end, with the peers it needs.
cargo test --release --locked --config tests/units.toml --workspace --exclude joey-tests -- --skip a_real_cluster
echo "== whole system (after $(at))"
# Tests of the agent's crate have put a dynamically linked one in the static one's place.
scripts/build.sh
subjects=()
for file in tests/tests/*.rs; do
    case $(basename "$file" .rs) in
    house | kubernetes) ;;
    *) subjects+=(--test "$(basename "$file" .rs)") ;;
    esac
done
cargo test --release --locked -p joey-tests --no-fail-fast "${subjects[@]}" -- --test-threads=1
echo "== a real Kubernetes (after $(at))"
scripts/test-kubernetes.sh
echo "== every test passed, in $(at)"
