#!/usr/bin/env bash
# Start times, first answers and memory of each sandbox class on this machine, with the same image in one run; then a hundred machines at
# once. Writes one JSON file to benches/results/ and prints the figures. COUNT sets how many Pods each class starts, two seconds apart.
# Memory is that of Pods that have idled for 45 s and, the hundred, for a minute. Then COPIES machines that nobody kept ready: each is the
# first one of a new `joey up`, two seconds after that has answered, so that its monitor has begun and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/start-joey.sh

count=${COUNT:-15}
copies=${COPIES:-16}
image=registry.example/joey/hello:1
work=$(mktemp -d /tmp/joey-bench.XXXXXX)
joey=$PWD/target/release/joey

finish() {
    trap - EXIT
    [ -z "${joey_pid:-}" ] || { "$joey" down --data-dir "$work/joey" >/dev/null 2>&1 || true; kill "$joey_pid" 2>/dev/null || true; }
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT TERM

scripts/packages.sh jq >&2
scripts/packages.sh runsc >&2 || true
guests=$(scripts/machines.sh)
demo/build.sh .run/demo
mkdir -p "$work/joey"
[ -z "$guests" ] || cp -a "$guests" "$work/joey/guests"

start_joey "$joey" "$work"
tar -C .run/demo -cf "$work/hello.tar" .
"$joey" image import --data-dir "$work/joey" "$work/hello.tar" "$image" >&2
round() { "$joey" bench start --data-dir "$work/joey" --image "$image" -o json "$@"; }

# The first machine of all boots, and a template is made beside it.
[ -z "$guests" ] || round --class rund --count 4 --pause 2 >/dev/null
for class in $("$joey" host ls --data-dir "$work/joey" -o json | jq -r '.[0].classes[]'); do
    echo "$class: $count Pods, two seconds apart" >&2
    round --class "$class" --count "$count" --pause 2 --settle 45 --http 80 >"$work/1-$class.json"
done
if [ -n "$guests" ]; then
    echo "rund: 100 Pods at once" >&2
    round --class rund --count 100 --parallel 4 --settle 60 >"$work/2-many.json"
    echo "rund: $copies copies that nobody kept ready" >&2
    for number in $(seq "$copies"); do
        "$joey" down --data-dir "$work/joey" >/dev/null
        start_joey "$joey" "$work"
        sleep 2
        "$joey" run --data-dir "$work/joey" --class rund --name "copy$number" "$image" >/dev/null
        # Milliseconds until the agent answers; a machine that was kept ready is no copy, and left out.
        "$joey" describe --data-dir "$work/joey" -o json "copy$number" |
            jq '.status.timings // {} | select(has("sandbox.copy") and has("sandbox.give")) |
                [."sandbox.copy", ."sandbox.files", ."sandbox.give", ."sandbox.answer"] | add / 1000' >>"$work/answers"
        "$joey" rm --data-dir "$work/joey" --grace 0 "copy$number" >/dev/null
    done
fi

mkdir -p benches/results
touch "$work/answers"
result=benches/results/$(date -u +%Y-%m-%d)-classes.json
jq -s --arg date "$(date -u +%Y-%m-%dT%H:%M:%SZ)" --arg kernel "$(uname -r)" --argjson cores "$(nproc)" \
    --arg commit "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" \
    --argjson host "$("$joey" host ls --data-dir "$work/joey" -o json | jq '.[0]')" \
    --slurpfile answers "$work/answers" \
    'def at(part): sort | .[(length - 1) * part | round];
    {date: $date, commit: $commit, kernel: $kernel, cores: $cores, machines: $host.machines, rounds: .,
     copies: {count: ($answers | length), answer_ms: {p50: ($answers | at(0.5)), p90: ($answers | at(0.9)), min: ($answers | min)}}}' \
    "$work"/[12]-*.json >"$result"
jq -r '
  def two: . * 100 | round / 100;
  ["class", "Pods", "at a time", "to running, median ms", "P90", "to first answer, median ms", "a minute", "memory each, MiB"],
  (.rounds[] | [.class, .count, .parallel, (.running_ms.p50 | two), (.running_ms.p90 | two), (if .http_ms then (.http_ms.p50 | two) else "" end),
    (.pods_per_minute | round), (.memory_per_pod_kib / 1024 | two)])
  | @tsv' "$result" | column -t -s "$(printf '\t')"
jq -r '.copies | select(.count > 0) |
  "\(.count) copies that nobody kept ready answer after \(.answer_ms.p50) ms (median; P90 \(.answer_ms.p90), least \(.answer_ms.min))"' "$result"
echo "written to $result"
