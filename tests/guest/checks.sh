#!/bin/sh
# What is tried in the virtual machine. It judges nothing: it says what it saw, a line each on the second serial port, as
# NAME=VALUE with line ends turned into spaces; the test on the outside knows what should be there.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin NO_COLOR=1
image=registry.example/hello:1
groups=/sys/fs/cgroup/joey

say() {
    name=$1
    shift
    printf '%s=%s\n' "$name" "$(printf '%s' "$*" | tr '\n' ' ')" >/dev/ttyS1
    echo "$name: $*"
}
# Runs the rest until it succeeds, for so many seconds.
within() {
    until=$(($(date +%s) + $1))
    shift
    while ! "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $until ] || return 1
        sleep 0.2
    done
}
shows() { joey describe "$1" -o json | grep -q "$2"; }
address() { joey describe "$1" -o json | sed -n 's/^ *"address": "\(.*\)".*/\1/p' | head -n 1; }
number() { joey describe "$1" -o json | sed -n 's/^ *"id": "\(.*\)".*/\1/p' | head -n 1; }
first_process() { head -n 1 "$groups/$(number "$1")/$1/cgroup.procs"; }
# joey up as a service would run it, in the cgroup given.
up() {
    began=$(date +%s)
    echo >/var/log/joey.out
    sh -c "echo \$\$ >$1/cgroup.procs; exec joey up --prepared 2 --core-dumps 16Mi --log info" >/var/log/joey.out 2>>/var/log/joey.log &
    daemon=$!
    within 60 grep -q 'joey is ready' /var/log/joey.out
    say "$2" "$(cat /var/log/joey.out)"
    say "$2.seconds" $(($(date +%s) - began))
}
detached() {
    name=$1
    shift
    joey run --detach --name "$name" --restart never "$@" 2>&1
}
inside() { joey exec web -- sh -c "$1" 2>&1; }

the_kernel() {
    say kernel "$(uname -r)"
    say cgroup.kind "$(stat -f -c %t /sys/fs/cgroup)"
    say cgroup.controllers "$(cat /sys/fs/cgroup/cgroup.controllers)"
    up /sys/fs/cgroup/system.slice/joey.service up
    say import "$(joey image import /image.tar $image 2>&1)"
}

a_pod() {
    say web.run "$(joey run --name web --memory 64Mi --cpu 500m --bandwidth 50M $image 2>&1)"
    within 20 curl -s -m 3 -o /tmp/page "http://$(address web)/"
    say web.page "$(cat /tmp/page)"
    say web.exec "$(inside 'echo hello from $(hostname)')"
    detached clock $image --command sh -- -c 'i=0; while :; do echo $i; i=$((i+1)); sleep 0.2; done'
    within 20 shows clock running
    place=$groups/$(number web)
    say web.cgroups "$(cd "$place" && ls -d */)"
    say web.processes "$(for pid in $(cat "$place/web/cgroup.procs"); do cat "/proc/$pid/comm"; done)"
    say web.agent "$(for pid in $(cat "$place/agent/cgroup.procs"); do cat "/proc/$pid/comm"; done)"
    agent=$(cat "$place/agent/cgroup.procs")
    say web.agent.parent "$(cat "/proc/$(awk '$1 == "PPid:" { print $2 }' "/proc/$agent/status")/comm")"
    say web.zombies "$(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null)"
    say web.above "$(cat "$place/cgroup.procs" $groups/cgroup.procs)"
    for file in memory.max memory.swap.max memory.oom.group cpu.max cpu.weight pids.max; do
        say "web.$file" "$(cat "$place/web/$file")"
    done
    say web.weight.of.instance "$(cat "$place/cpu.weight")"
    say web.usage "$(curl -s --unix-socket /var/lib/joey/joey.sock http://joey/v1/instances/web/usage)"
}

its_view() {
    say view.self "$(inside 'cat /proc/self/cgroup')"
    say view.init "$(inside 'cat /proc/1/cgroup')"
    say view.memory "$(inside 'cat /sys/fs/cgroup/memory.max')"
    say view.below "$(inside 'ls -d /sys/fs/cgroup/*/ 2>/dev/null')"
    say view.mount "$(inside 'grep " /sys/fs/cgroup " /proc/self/mountinfo')"
    say view.write "$(inside 'echo max >/sys/fs/cgroup/memory.max && echo written')"
    say view.make "$(inside 'mkdir /sys/fs/cgroup/own && echo made')"
    say view.remount "$(inside 'mount -o remount,rw /sys/fs/cgroup && echo remounted')"
}

# The machine's own disk and what leads to others, on every kind of mount that a container can write to.
devices() {
    disk=$(cat /sys/class/block/vda/dev | tr : ' ')
    for place in /tmp /dev /dev/shm /run /root; do
        for device in "b $disk" 'c 10 237' 'c 1 1' 'c 1 11'; do
            inside "rm -f $place/node; mknod $place/node $device && head -c 1 $place/node >/dev/null && echo opened" \
                >>/tmp/devices
            inside "rm -f $place/node; mknod $place/node $device && echo x >$place/node && echo opened" >>/tmp/devices
        done
    done
    say devices.opened "$(grep -c opened /tmp/devices)"
    say devices.refused "$(grep -ci 'denied\|not permitted\|read-only' /tmp/devices)"
    say devices.own "$(inside 'echo x >/dev/null && head -c 4 /dev/zero | wc -c && ls /dev')"
}

limits() {
    detached greedy --memory 32Mi $image --command sh -- -c 'tail -c 200m /dev/zero'
    detached busy --cpu 200m $image --command sh -- -c 'while :; do :; done'
    curl -s --unix-socket /var/lib/joey/joey.sock -H 'content-type: application/json' http://joey/v1/instances -d '{
        "name": "bomb", "restartPolicy": "Never", "containers": [{"name": "bomb", "image": "'$image'", "resources": {"pids": 16},
        "command": ["sh", "-c", "(i=0; while [ $i -lt 64 ]; do sleep 1000 & i=$((i+1)); done); exec sleep 1000"]}]}' >/dev/null
    within 30 shows busy running
    file=$groups/$(number busy)/busy/cpu.stat
    say busy.before "$(awk '{print $1 / 1}' /proc/uptime) $(cat "$file")"
    sleep 4
    say busy.after "$(awk '{print $1 / 1}' /proc/uptime) $(cat "$file")"
    within 30 shows greedy terminated
    say greedy "$(joey describe greedy -o json)"
    say greedy.events "$(cat "$groups/$(number greedy)/greedy/memory.events")"
    say greedy.peak "$(cat "$groups/$(number greedy)/greedy/memory.peak")"
    place=$groups/$(number bomb)/bomb
    within 20 grep -q '^max [1-9]' "$place/pids.events"
    say bomb.events "$(cat "$place/pids.events")"
    say bomb.processes "$(wc -l <"$place/cgroup.procs")"
    place=$groups/$(number greedy)
    joey rm -f greedy busy bomb >/dev/null
    say rm.left "$([ -e "$place" ] && ls "$place") $(joey ps | grep -c 'greedy\|busy\|bomb')"
}

# The machine's time and the bytes that reached the disk, when a few had and when all have: the way to the container takes its
# own time here. A container's root is never synced for its own sake: the machine writes it back, at the pace of the container.
written() {
    reached() { awk -v now="$(cut -d ' ' -f 1 /proc/uptime)" -v disk="$(cat /sys/class/block/vda/dev)" \
        '$1 == disk { for (i = 2; i <= NF; i++) if (sub("^wbytes=", "", $i)) print now, $i }' "$place/io.stat"; }
    before=$(reached | cut -d ' ' -f 2)
    more() { [ "$(reached | cut -d ' ' -f 2)" -gt $((${before:-0} + 2097152)) ]; }
    (joey exec slow -- dd if=/dev/zero of=/f bs=256k "$@" 2>/dev/null && sync) &
    within 30 more
    first=$(reached)
    wait $!
    echo "$first $(reached)"
}

# Writes that go through the page cache, which v1 cannot hold.
the_disk() {
    detached slow --disk-bytes 8Mi $image --command sleep -- 1000
    within 30 shows slow running
    place=$groups/$(number slow)/containers
    say slow.disk "$(cat /sys/class/block/vda/dev)"
    say slow.max "$(cat "$place/io.max")"
    sync
    say slow.buffered "$(written count=192)"
    say slow.direct "$(written count=96 oflag=direct)"
    joey rm -f slow >/dev/null
}

# A process of a container, and one of the machine, whose own pattern is the kernel's.
crashes() {
    joey diagnose core enable web
    inside 'kill -SEGV $$'
    say crash.cores "$(joey diagnose core ls web -o json)"
    say crash.written "$(joey diagnose core get web -w - | wc -c)"
    rm -f /tmp/core
    (cd /tmp && ulimit -c unlimited && sh -c 'kill -SEGV $$')
    say crash.of.machine "$(head -c 4 /tmp/core | tail -c 3)"
}

# The daemon dies; one container goes on, another ends meanwhile; a new daemon takes over, this time from the root cgroup.
re_adoption() {
    detached doomed $image --command sleep -- 1000
    within 20 shows doomed running
    before=$(first_process web)
    victim=$(first_process doomed)
    kill -9 $daemon
    wait $daemon
    say killed.service "$(cat /sys/fs/cgroup/system.slice/joey.service/cgroup.procs)"
    kill -9 "$victim"
    sleep 1
    up /sys/fs/cgroup again
    within 10 shows doomed terminated
    say doomed "$(joey describe doomed -o json)"
    say web.again "$(joey describe web -o json)"
    say web.process "$before $(first_process web)"
    say web.exec.again "$(inside 'echo hello from $(hostname)')"
    say clock.log "$(joey logs clock | awk 'NR - 1 != $1 { print "gap at", NR } END { print NR, "lines" }')"
}

nothing_runs() { ! ps | grep -q '[j]oey'; }
the_end() {
    say down "$(joey down 2>&1)"
    wait $daemon
    say left.cgroups "$(find /sys/fs/cgroup -name 'joey*' | grep -v joey.service)"
    say left.mounts "$(grep joey /proc/self/mountinfo)"
    say left.interfaces "$(ls /sys/class/net)"
    say left.tables "$(nft list tables)"
    say left.loops "$(cat /sys/block/loop*/loop/backing_file 2>/dev/null)"
    # The init system takes the ends of adopted agents in its own time.
    within 5 nothing_runs
    say left.processes "$(ps | grep '[j]oey')"
    say left.run "$(ls /run/joey 2>/dev/null)"
    say left.pattern "$(cat /proc/sys/kernel/core_pattern /proc/sys/kernel/core_pipe_limit)"
}

the_kernel
a_pod
its_view
devices
limits
the_disk
crashes
re_adoption
the_end
say end "$(awk '{print $1}' /proc/uptime)"
cat /var/log/joey.log
poweroff -f
