#!/usr/bin/env bash
# Builds the release of gVisor's runsc that tests/gvisor/go.mod names into .tools/newer-runsc, once for each go.sum. Without Go: says so.
set -euo pipefail
cd "$(dirname "$0")/../tests/gvisor"
export PATH="$PATH:/usr/local/go/bin" CGO_ENABLED=0 GOFLAGS=-mod=readonly

place=../../.tools/newer-runsc
key=$(cat go.mod go.sum ../../scripts/newer-runsc.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$place/.key" 2>/dev/null || true)" = "$key" ] && exit 0
if ! command -v go >/dev/null; then
    echo '********************************************************************************' >&2
    echo '* SKIPPED: the tests of class gvisor with a newer runsc need Go 1.26 or newer    *' >&2
    echo '********************************************************************************' >&2
    exit 0
fi
echo "building a newer runsc (once, some minutes)"
rm -rf "$place"
mkdir -p "$place"
go build -trimpath -ldflags '-s -w' -o "$place/runsc" gvisor.dev/gvisor/runsc
echo "$key" >"$place/.key"
