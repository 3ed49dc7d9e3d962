#!/usr/bin/env bash
# Prints the path of a kubectl of 1.30 or newer: the machine's own where it is, else one fetched once into .tools/.
set -euo pipefail
cd "$(dirname "$0")/.."

wanted=30
fits() {
    local minor
    # Builds of distributors write "32+" for the minor version.
    minor=$("$1" version --client -o json 2>/dev/null </dev/null | sed -n 's/.*"minor": *"\([0-9]*\).*/\1/p' | head -n 1)
    [ "${minor:-0}" -ge $wanted ]
}

own=$(command -v kubectl || true)
if [ -n "$own" ] && fits "$own"; then
    echo "$own"
    exit 0
fi
tool=$PWD/.tools/kubectl
if ! { [ -x "$tool" ] && fits "$tool"; }; then
    scripts/layer-tool.sh kubectl
fi
fits "$tool" || { echo "error: no kubectl of 1.$wanted or newer; put one on the PATH" >&2; exit 1; }
echo "$tool"
