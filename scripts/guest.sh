#!/usr/bin/env bash
# Makes a virtual machine below .tools/guest: Debian 12's kernel, a disk with joey and what it calls, and the first file
# system, which finds the disk. Prints the folder; prints nothing where there is no QEMU to run it with. The tests on cgroup v2
# need it: the machine they run on may have v1, and another kernel.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo '******************************************************************************' >&2
    printf '* SKIPPED: %-65s *\n' "$1" >&2
    echo '******************************************************************************' >&2
    exit 0
}
[ "$(uname -m)" = x86_64 ] || skip "the tests in a virtual machine are for x86_64"
scripts/packages.sh qemu-system-x86 >&2 || skip "the tests in a virtual machine need QEMU, which cannot be installed"
scripts/packages.sh nftables iproute2 curl e2fsprogs >&2
demo/build.sh .run/demo >&2

# The kernel that Debian's meta package for virtual machines names now.
meta() { apt-cache show linux-image-cloud-amd64 2>/dev/null | sed -n 's/^Depends: \(linux-image-[^ ,]*\).*/\1/p' | head -n 1; }
package=$(meta)
[ -n "$package" ] || { apt-get update -qq -o DPkg::Lock::Timeout=600 >&2 && package=$(meta); }
scripts/debian-files.sh .tools/guest-kernel "$package" >&2

busybox=$(realpath .tools/demo-files/root/bin/busybox)
kernel=$(realpath .tools/guest-kernel/root)
release=$(basename "$kernel"/lib/modules/*)
out=$PWD/.tools/guest
rm -rf "$out"
mkdir -p "$out/first" "$out/disk"

# Which file of the kernel's needs which.
modules=$kernel/lib/modules/$release
[ -e "$modules/modules.dep" ] || "$busybox" depmod -b "$kernel" "$release"

# The first file system: busybox, and what the disk needs.
cd "$out/first"
mkdir -p bin sbin "lib/modules/$release"
install -m 0755 "$busybox" bin/busybox
ln -s ../bin/busybox sbin/modprobe
install -m 0755 "$OLDPWD/tests/guest/first.sh" init
cp "$modules"/modules.{dep,alias,symbols,builtin} "lib/modules/$release"
needs() { sed -n "s|^\([^:]*/$1\.ko\): *\(.*\)|\1 \2|p" "$modules/modules.dep"; }
for name in virtio_pci virtio_blk ext4 crc32c_generic crc32c-intel; do
    for file in $(needs "$name"); do
        install -D -m 0644 "$modules/$file" "lib/modules/$release/$file"
    done
done
find . | "$busybox" cpio -o -H newc 2>/dev/null | gzip -1 >"$out/initrd"
cd "$OLDPWD"

# The disk: joey, the programs it calls with the libraries they load, the image, the kernel's modules.
disk=$out/disk
mkdir -p "$disk"/{usr/bin,usr/sbin,usr/lib/modules,usr/lib64,etc,proc,sys,dev,run,tmp,var/log,var/lib,root,guest}
for folder in bin sbin lib lib64; do
    ln -s "usr/$folder" "$disk/$folder"
done
libraries_of() { ldd "$1" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p'; }
# put PROGRAM AT: with the libraries it loads.
put() {
    local library
    install -D -m 0755 "$1" "$disk$2"
    for library in $(libraries_of "$1"); do
        [ -e "$disk$library" ] || install -D -m 0755 "$(readlink -f "$library")" "$disk$library"
    done
}
PATH=$PATH:/usr/sbin:/sbin
for program in nft ip tc curl; do
    place=$(command -v $program)
    put "$(readlink -f "$place")" "$place"
done
for program in joey joey-agent; do
    put "target/release/$program" "/usr/bin/$program"
done
install -m 0755 "$busybox" "$disk/usr/bin/busybox"
for tool in $("$busybox" --list); do
    [ -e "$disk/usr/bin/$tool" ] || [ -e "$disk/usr/sbin/$tool" ] || ln -s busybox "$disk/usr/bin/$tool"
done
for tool in init modprobe; do
    ln -s ../bin/busybox "$disk/usr/sbin/$tool"
done
printf 'root:x:0:0:root:/root:/bin/sh\n' >"$disk/etc/passwd"
printf 'root:x:0:\n' >"$disk/etc/group"
printf '127.0.0.1 localhost\n' >"$disk/etc/hosts"
printf 'nameserver 127.0.0.1\n' >"$disk/etc/resolv.conf"
printf '::sysinit:/guest/start.sh\n::once:/guest/checks.sh\n' >"$disk/etc/inittab"
install -m 0755 tests/guest/start.sh tests/guest/checks.sh "$disk/guest"
tar -C .run/demo -cf "$disk/image.tar" .
cp -r "$modules" "$disk/usr/lib/modules/$release"
cp "$kernel"/boot/vmlinuz-* "$out/vmlinuz"
mke2fs -q -t ext4 -d "$disk" "$out/disk.ext4" 1G >/dev/null
rm -rf "$disk" "$out/first"
echo "$out"
