#!/usr/bin/env bash
# What virtual machines need: QEMU, and a guest made once below .tools/machines. Prints the folder of guests; prints nothing where there
# is no QEMU or no kernel to be had, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo '******************************************************************************' >&2
    printf '* SKIPPED: %-65s *\n' "$1" >&2
    echo '******************************************************************************' >&2
    exit 0
}
[ "$(uname -m)" = x86_64 ] || skip "class rund is for x86_64 so far"
scripts/packages.sh qemu-system-x86 qemu-utils >&2 || skip "class rund needs QEMU, which cannot be installed"
data=$PWD/.tools/machines
mkdir -p "$data"
package=$(find "$data/guests/packages" -name '*.deb' 2>/dev/null | sort | tail -n 1 || true)
target/release/joey --data-dir "$data" guest build ${package:+--package "$package"} >&2 || skip "no guest can be made for class rund"
echo "$data/guests"
