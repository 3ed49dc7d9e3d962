#!/usr/bin/env bash
# The peer's side of the comparison: containerd with runc, on a root of its own.
#   containerd.sh config WORK PEERS                 writes WORK/containerd.toml
#   containerd.sh import WORK PEERS LAYOUT          waits for containerd and imports the image
#   containerd.sh start  WORK PEERS COUNT PARALLEL  starts COUNT containers, prints one JSON object, removes them
#   containerd.sh clean  WORK                       removes what is left
# Its containers have no network and no Kubernetes above them; `ctr run -d` returns when the process runs.
set -euo pipefail

verb=$1 work=$2 peers=${3:-}
image=bench.local/joey/hello:1
ctr() { "${peers:-$(cat "$work/peers")}/usr/bin/ctr" --address "$work/containerd.sock" --namespace joey-bench "$@"; }

case $verb in
config)
    echo "$peers" >"$work/peers"
    cat >"$work/containerd.toml" <<CONFIG
version = 2
root = "$work/containerd-root"
state = "$work/containerd-state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "$work/containerd.sock"
[ttrpc]
address = "$work/containerd.sock.ttrpc"
CONFIG
    ;;
import)
    for _ in $(seq 100); do
        ctr version >/dev/null 2>&1 && break
        sleep 0.1
    done
    tar -C "$4" -cf "$work/image.tar" .
    ctr images import --index-name "$image" "$work/image.tar" >/dev/null
    ;;
start)
    count=$4 parallel=$5
    one() {
        local begin end
        begin=$(date +%s%N)
        ctr run -d "$image" "b$1" >/dev/null 2>&1
        end=$(date +%s%N)
        echo $(((end - begin) / 1000))
    }
    export -f one ctr
    export work peers image
    begin=$(date +%s%N)
    seq "$count" | xargs -P "$parallel" -I{} bash -c 'one {}' >"$work/times"
    end=$(date +%s%N)
    # What each container costs beside itself: the proportional memory of its shim.
    memory=0 shims=0
    for entry in /proc/[0-9]*; do
        { tr '\0' ' ' <"$entry/cmdline"; } 2>/dev/null | grep -q -- "containerd-shim-runc-v2 .*$work" || continue
        pss=$(sed -n 's/^Pss: *\([0-9]*\).*/\1/p' "$entry/smaps_rollup" 2>/dev/null || echo 0)
        memory=$((memory + ${pss:-0})) shims=$((shims + 1))
    done
    sort -n "$work/times" | awk -v count="$count" -v parallel="$parallel" -v nanoseconds=$((end - begin)) \
        -v memory=$memory -v shims=$shims '
        { t[NR] = $1 / 1000 }
        function at(p,   i) { i = int((NR * p + 99) / 100); return t[i < 1 ? 1 : i] }
        END { printf "{\"class\":\"containerd\",\"count\":%d,\"parallel\":%d,\"running_ms\":{\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f},", \
                  NR, parallel, at(50), at(90), at(99);
              printf "\"pods_per_minute\":%.1f,\"memory_per_pod_kib\":%.1f}\n", NR / (nanoseconds / 6e10), shims ? memory / shims : 0 }'
    "$0" clean "$work"
    ;;
clean)
    ctr tasks ls -q | xargs -r -P 4 -I{} sh -c "$(cat "$work/peers")/usr/bin/ctr --address $work/containerd.sock -n joey-bench tasks kill -s 9 {} || true" >/dev/null 2>&1
    for _ in $(seq 50); do
        [ -z "$(ctr tasks ls | grep RUNNING || true)" ] && break
        sleep 0.1
    done
    ctr tasks ls -q | xargs -r -n 20 "$(cat "$work/peers")/usr/bin/ctr" --address "$work/containerd.sock" -n joey-bench tasks rm >/dev/null 2>&1 || true
    ctr containers ls -q | xargs -r -n 20 "$(cat "$work/peers")/usr/bin/ctr" --address "$work/containerd.sock" -n joey-bench containers rm >/dev/null 2>&1 || true
    ;;
esac
