#!/usr/bin/env bash
# Builds the release of gVisor's runsc that tests/gvisor/go.mod names into .tools/newer-runsc, once for each change of that or of this file.
# Where that cannot be done, without Go or without its modules, it says so and leaves nothing.
set -euo pipefail
cd "$(dirname "$0")/../tests/gvisor"
export PATH="/usr/local/go/bin:$PATH" CGO_ENABLED=0 GOFLAGS=-mod=readonly GOTOOLCHAIN=local

place=../../.tools/newer-runsc
key=$(cat go.mod go.sum ../../scripts/newer-runsc.sh | sha256sum | cut -d' ' -f1)
[ "$(cat "$place/.key" 2>/dev/null || true)" = "$key" ] && exit 0
rm -rf "$place"
mkdir -p "$place"
echo "building a newer runsc (once, some minutes)"
if ! go build -trimpath -ldflags '-s -w' -o "$place/runsc" gvisor.dev/gvisor/runsc; then
    rm -rf "$place"
    echo '**********************************************************************************' >&2
    echo '* SKIPPED: the tests of class gvisor with a newer runsc need Go 1.26.3 or newer,  *' >&2
    echo '* and its modules                                                                 *' >&2
    echo '**********************************************************************************' >&2
    exit 0
fi
echo "$key" >"$place/.key"
