#!/usr/bin/env bash
# Start times, Pods a minute and memory of Joey beside containerd with runc, on this machine, with the same image. Writes one JSON
# file to benches/results/ and prints the ratios. COUNT sets how many Pods each round starts.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/start-joey.sh

count=${COUNT:-100}
registry=127.0.0.1:5056
image=$registry/joey/hello:1
work=$(mktemp -d /tmp/joey-bench.XXXXXX)
joey=$PWD/target/release/joey
peers=$PWD/.tools/containerd/root

finish() {
    trap - EXIT
    [ -z "${joey_pid:-}" ] || { "$joey" down --data-dir "$work/joey" >/dev/null 2>&1 || true; kill "$joey_pid" 2>/dev/null || true; }
    if [ -n "${containerd_pid:-}" ]; then
        benches/containerd.sh clean "$work" >/dev/null 2>&1 || true
        kill "$containerd_pid" 2>/dev/null || true
        tail --pid="$containerd_pid" -f /dev/null || true
    fi
    scripts/registry.sh stop "$work/registry" || true
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

scripts/packages.sh jq >&2
scripts/debian-files.sh .tools/containerd containerd runc
demo/build.sh .run/demo
scripts/registry.sh start "$work/registry" "$registry"
skopeo copy -q --dest-tls-verify=false oci:.run/demo:hello "docker://$image"

echo "joey: $count Pods, one and eight at a time" >&2
start_joey "$joey" "$work"
"$joey" image pull --data-dir "$work/joey" "$image" >&2
for parallel in 1 8; do
    "$joey" bench start --data-dir "$work/joey" --image "$image" --count "$count" --parallel $parallel -o json >"$work/joey-$parallel.json"
done

echo "joey: 200 Pods with probes every second" >&2
for probe in http exec; do
    "$joey" bench probes --data-dir "$work/joey" --image "$image" --count 200 --probe $probe -o json >"$work/probes-$probe.json"
done

echo "containerd: $count containers, one and eight at a time" >&2
benches/containerd.sh config "$work" "$peers"
PATH=$peers/usr/bin:$peers/usr/sbin:$PATH "$peers/usr/bin/containerd" --config "$work/containerd.toml" >"$work/containerd.log" 2>&1 &
containerd_pid=$!
benches/containerd.sh import "$work" "$peers" .run/demo
for parallel in 1 8; do
    PATH=$peers/usr/bin:$peers/usr/sbin:$PATH benches/containerd.sh start "$work" "$peers" "$count" $parallel >"$work/containerd-$parallel.json"
done

mkdir -p benches/results
result=benches/results/$(date -u +%Y-%m-%d)-start.json
jq -n --arg date "$(date -u +%Y-%m-%dT%H:%M:%SZ)" --arg kernel "$(uname -r)" --argjson cores "$(nproc)" \
    --arg commit "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
    --slurpfile j1 "$work/joey-1.json" --slurpfile j8 "$work/joey-8.json" \
    --slurpfile ph "$work/probes-http.json" --slurpfile pe "$work/probes-exec.json" \
    --slurpfile c1 "$work/containerd-1.json" --slurpfile c8 "$work/containerd-8.json" \
    '{date: $date, commit: $commit, kernel: $kernel, cores: $cores, joey: [$j1[0], $j8[0]], probes: [$ph[0], $pe[0]], containerd: [$c1[0], $c8[0]]}' >"$result"

jq -r '
  def two: . * 100 | round / 100;
  ["", "at a time", "joey", "containerd", "ratio"],
  (range(2) as $i | .joey[$i] as $j | .containerd[$i] as $c |
    ["to running, median ms", $j.parallel, ($j.running_ms.p50 | two), ($c.running_ms.p50 | two), ($j.running_ms.p50 / $c.running_ms.p50 | two)],
    ["to running, P99 ms", $j.parallel, ($j.running_ms.p99 | two), ($c.running_ms.p99 | two), ($j.running_ms.p99 / $c.running_ms.p99 | two)],
    ["a minute", $j.parallel, ($j.pods_per_minute | round), ($c.pods_per_minute | round), ($j.pods_per_minute / $c.pods_per_minute | two)],
    ["memory each, KiB", $j.parallel, ($j.memory_per_pod_kib | round), ($c.memory_per_pod_kib | round), ($j.memory_per_pod_kib / $c.memory_per_pod_kib | two)]),
  ["idle memory, KiB", "", (.joey[0].idle_memory_kib | round), "", ""]
  | @tsv' "$result" | column -t -s "$(printf '\t')"
jq -r '
  ["", "probe", "% of a core", "KiB", "aim"],
  (.probes[] | ["probed every second, each of \(.count) Pods", .probe, .cpu_percent_per_pod, (.memory_per_pod_kib | round), "0.05 %, 2048 KiB"])
  | @tsv' "$result" | column -t -s "$(printf '\t')"
echo "written to $result"
