#!/bin/busybox sh
# The first program of the virtual machine: finds its disk and goes on from there.
/bin/busybox mkdir -p /proc /sys /dev /disk
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in virtio_pci virtio_blk ext4; do
    /bin/busybox modprobe "$module"
done
for _ in $(/bin/busybox seq 100); do
    [ -b /dev/vda ] && break
    /bin/busybox sleep 0.1
done
/bin/busybox mount -t ext4 -o noatime /dev/vda /disk
for folder in proc sys dev; do
    /bin/busybox mount --move "/$folder" "/disk/$folder"
done
exec /bin/busybox switch_root /disk /sbin/init
