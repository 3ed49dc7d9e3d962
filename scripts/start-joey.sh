#!/usr/bin/env bash
# Sourced by benchmarks: starts `joey up` below WORK and waits until it answers. Sets joey_pid; whoever sources it ends it.
#   start_joey PROGRAM WORK
start_joey() {
    "$1" up --data-dir "$2/joey" --listen 127.0.0.1:0 --pod-range 198.19.0.0/16 >"$2/joey.log" 2>&1 &
    joey_pid=$!
    for _ in $(seq 300); do
        "$1" host ls --data-dir "$2/joey" >/dev/null 2>&1 && return
        kill -0 "$joey_pid" 2>/dev/null || break
        sleep 0.1
    done
    cat "$2/joey.log" >&2
    exit 1
}
