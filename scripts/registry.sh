#!/usr/bin/env bash
# usage: registry.sh start|stop STATE_DIR ADDRESS
# Runs Debian's docker-registry on a loopback address, its data below STATE_DIR. Starting it twice changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

verb=$1 state=$(realpath -m "$2") address=${3:-}
pid() { cat "$state/registry.pid" 2>/dev/null || echo 0; }
# The pid file may be older than the machine's last start: look at the program behind the number.
alive() { [ "$(pid)" -gt 0 ] && readlink "/proc/$(pid)/exe" 2>/dev/null | grep -q docker-registry; }

case $verb in
start)
    curl -fs -o /dev/null "http://$address/v2/" && alive && exit 0
    alive && kill "$(pid)"
    scripts/debian-files.sh .tools/docker-registry docker-registry
    mkdir -p "$state/data"
    cat >"$state/registry.yml" <<CONFIG
version: 0.1
log: {level: warn, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: $state/data}, delete: {enabled: true}}
http: {addr: "$address"}
CONFIG
    setsid .tools/docker-registry/root/usr/bin/docker-registry serve "$state/registry.yml" \
        >"$state/registry.log" 2>&1 </dev/null &
    echo $! >"$state/registry.pid"
    for _ in $(seq 100); do
        curl -fs -o /dev/null "http://$address/v2/" && exit 0
        alive || break
        sleep 0.1
    done
    cat "$state/registry.log" >&2
    echo "error: docker-registry does not answer on $address" >&2
    echo "hint: is another program listening there? (ss -ltnp)" >&2
    exit 1
    ;;
stop)
    if alive; then kill "$(pid)"; fi
    rm -f "$state/registry.pid"
    ;;
esac
