#!/usr/bin/env bash
# Ends the demo: Pods, joey, registry. What was built and fetched stays; see `make clean`.
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-/var/lib/joey}
joey=$(realpath -m target/release/joey)
if [ -S "$data/joey.sock" ] && [ -r "$data/kubeconfig" ]; then
    # The Pod of the demo goes for good, so that the next demo begins with a new one; other Pods come back with joey.
    "$(scripts/kubectl.sh)" --kubeconfig "$data/kubeconfig" --request-timeout=5s delete -f examples/hello.yaml \
        --ignore-not-found --timeout=20s || echo "the demo's Pod stays: no Kubernetes API answers"
fi
if [ -x "$joey" ] && [ -d "$data" ]; then
    "$joey" down --data-dir "$data"
fi
pid=$(cat .run/joey.pid 2>/dev/null || echo 0)
if [ "$pid" -gt 0 ] && readlink "/proc/$pid/exe" 2>/dev/null | grep -q "^$joey"; then
    kill "$pid"
    tail --pid="$pid" -f /dev/null
fi
rm -f .run/joey.pid
scripts/registry.sh stop .run/registry
