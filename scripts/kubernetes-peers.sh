#!/usr/bin/env bash
# Builds etcd and Kubernetes' control plane into tests/kubernetes/bin, once for each go.sum. Without Go: says so, loudly.
set -euo pipefail
cd "$(dirname "$0")/../tests/kubernetes"

key=$(cat go.mod go.sum ../../scripts/kubernetes-peers.sh | sha256sum | cut -d' ' -f1)
[ "$(cat bin/.key 2>/dev/null || true)" = "$key" ] && exit 0
if ! command -v go >/dev/null; then
    echo '******************************************************************************' >&2
    echo '* SKIPPED: the tests on a real Kubernetes control plane need Go 1.26 or newer *' >&2
    echo '******************************************************************************' >&2
    exit 0
fi
echo "building etcd and Kubernetes' control plane (once, some minutes)"
rm -rf bin
mkdir -p bin
export CGO_ENABLED=0 GOFLAGS=-mod=readonly
go build -trimpath -ldflags '-s -w' -o bin/etcd go.etcd.io/etcd/server/v3
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
go build -trimpath -ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" -o bin/ k8s.io/kubernetes/cmd/kube-apiserver \
    k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-scheduler
echo "$key" >bin/.key
