#!/usr/bin/env bash
# Installs the Debian packages named as arguments that are not there yet. Quiet unless it fails.
set -euo pipefail

missing=()
for package in "$@"; do
    state=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ]; then
    echo "error: these Debian packages are missing: ${missing[*]}" >&2
    echo "hint: run this as root, or: apt-get install ${missing[*]}" >&2
    exit 1
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -q -y -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 "$@" </dev/null >>"$log" 2>&1; }
echo "installing Debian packages: ${missing[*]}"
# An installation cut off earlier leaves packages half configured.
dpkg --configure -a >>"$log" 2>&1 || true
if ! { apt update && apt install --no-install-recommends "${missing[@]}"; }; then
    cat "$log" >&2
    echo "error: Debian packages could not be installed: ${missing[*]}" >&2
    exit 1
fi
