#!/usr/bin/env bash
# The demo: a registry with an image made on the spot, joey, and one Pod, shown from every side. May be run again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."

data=${DATA:-/var/lib/joey}
registry=127.0.0.1:5055
image=$registry/joey/hello:1
joey=$(realpath -m target/release/joey)
log=.run/joey.log
say() { printf '\n\033[1m%s\033[0m\n' "$*" | if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9;]*m//g'; fi; }
fail() { printf 'error: %s\n' "$1" >&2; [ -z "${2:-}" ] || printf 'hint: %s\n' "$2" >&2; exit 1; }

[ "$(id -u)" -eq 0 ] || fail "joey needs root: it makes namespaces, cgroups and mounts" "run make as root"
mkdir -p .run
# Two runs at once would fight over the same Pod.
exec 9>.run/lock
flock -w 600 9 || fail "another make run is at work"

kubectl=$(scripts/kubectl.sh)
kc() { "$kubectl" --kubeconfig "$data/kubeconfig" "$@"; }

scripts/registry.sh start .run/registry "$registry" 9>&-
demo/build.sh .run/demo
skopeo copy -q --dest-tls-verify=false oci:.run/demo:hello "docker://$image"

# What class rund boots. Without it all the rest works.
if [ "$(uname -m)" = x86_64 ] && scripts/packages.sh qemu-system-x86; then
    package=$(find "$data/guests/packages" -name '*.deb' 2>/dev/null | sort | tail -n 1 || true)
    "$joey" --data-dir "$data" guest build ${package:+--package "$package"} || echo "class rund is left out: no guest was made" >&2
fi

# A joey that runs is kept, unless its program was built anew.
ready() { [ -f "$data/kubeconfig" ] && kc --request-timeout=2s get --raw /readyz >/dev/null 2>&1; }
pid() { cat .run/joey.pid 2>/dev/null || echo 0; }
exe() { [ "$(pid)" -gt 0 ] && readlink "/proc/$(pid)/exe" 2>/dev/null || true; }
case $(exe) in
"$joey") ready || kill -9 "$(pid)" ;;
"$joey (deleted)") kill "$(pid)" 2>/dev/null || true ;;
esac
for _ in $(seq 100); do
    case $(exe) in
    "$joey (deleted)") sleep 0.1 ;;
    *) break ;;
    esac
done
if ! ready; then
    setsid "$joey" up --data-dir "$data" >>"$log" 2>&1 </dev/null 9>&- &
    echo $! >.run/joey.pid
    for _ in $(seq 300); do
        ready && break
        [ "$(exe)" = "$joey" ] || { tail -n 20 "$log" >&2; fail "joey ended at its start" "its log is $log"; }
        sleep 0.1
    done
    ready || { tail -n 20 "$log" >&2; fail "joey is not ready after 30 s" "its log is $log"; }
fi
echo "joey is ready; its log is $log, its kubeconfig $data/kubeconfig"

# A Pod left by an earlier run with other fields cannot be changed in place, and one that ended does not come back.
phase=$(kc get pod hello --ignore-not-found -o jsonpath='{.status.phase}')
case $phase in
"" | Running | Pending) ;;
*) kc delete pod hello --wait >/dev/null ;;
esac
kc apply -f examples/hello.yaml || { kc delete pod hello --ignore-not-found --wait && kc apply -f examples/hello.yaml; }
kc wait --for=condition=Ready pod/hello --timeout=120s || {
    kc describe pod hello >&2
    fail "Pod hello is not ready after 120 s" "its events are above; joey's log is $log"
}

say '$ kubectl get pods -o wide'
kc get pods -o wide
address=$(kc get pod hello -o jsonpath='{.status.podIP}')
say "\$ curl http://$address/"
curl -fsS --max-time 10 "http://$address/"
say '$ kubectl logs hello'
kc logs hello | tail -n 5
say '$ kubectl exec hello -- sh -c "hostname; id; ps"'
kc exec hello -- sh -c 'hostname; id; ps'

say 'What to try next'
cat <<NEXT
  export KUBECONFIG=$data/kubeconfig PATH=$PWD/target/release:\$PATH
  $kubectl exec -it hello -- sh
  $kubectl logs -f hello
  joey run $image --name web --bandwidth 5M
  joey ps
  joey exec -it web -- sh
  make down        # ends all of it and leaves nothing behind
NEXT
