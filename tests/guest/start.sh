#!/bin/sh
# What an init system has done when joey starts: the mounts of Debian 12, cgroup v2 alone among them, and a service's cgroup.
mkdir -p /run /tmp /dev/pts /dev/shm
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs /run
mount -t devpts -o gid=5,mode=620,ptmxmode=000 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /sys/fs/cgroup
# A node of systemd's (kmod static-nodes): opening it loads the module.
[ -e /dev/loop-control ] || mknod /dev/loop-control c 10 237
# A machine has an address, which its own requests to Pods come from.
ip=/usr/sbin/ip
$ip link set lo up
modprobe dummy numdummies=0
$ip link add eth0 type dummy
$ip address add 192.0.2.1/24 dev eth0
$ip link set eth0 up
$ip route add default via 192.0.2.254
hostname guest
# As systemd on Debian 12 leaves it: memory and pids are passed on at the root, cpu is not.
echo '+memory +pids' >/sys/fs/cgroup/cgroup.subtree_control
mkdir -p /sys/fs/cgroup/system.slice
echo '+memory +pids' >/sys/fs/cgroup/system.slice/cgroup.subtree_control
mkdir -p /sys/fs/cgroup/system.slice/joey.service
