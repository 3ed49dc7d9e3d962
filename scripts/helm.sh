#!/usr/bin/env bash
# Prints the path of a helm of version 4: the machine's own where it is, else one fetched once into .tools/.
set -euo pipefail
cd "$(dirname "$0")/.."

fits() {
    [[ "$("$1" version --template '{{.Version}}' 2>/dev/null </dev/null)" == v4.* ]]
}

own=$(command -v helm || true)
if [ -n "$own" ] && fits "$own"; then
    echo "$own"
    exit 0
fi
tool=$PWD/.tools/helm
if ! { [ -x "$tool" ] && fits "$tool"; }; then
    scripts/layer-tool.sh helm
fi
fits "$tool" || { echo "error: no helm of version 4; put one on the PATH" >&2; exit 1; }
echo "$tool"
