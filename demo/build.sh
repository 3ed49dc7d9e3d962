#!/usr/bin/env bash
# usage: build.sh LAYOUT
# Makes the demo image on the spot as an OCI layout: LAYOUT, tag "hello". Three layers: busybox (a shell and tools), nginx of
# Debian with the libraries it loads, and the page with its configuration. Nothing is installed on the machine.
set -euo pipefail
cd "$(dirname "$0")/.."

layout=$(realpath -m "$1")
key=$(cat demo/build.sh demo/nginx.conf demo/index.html | sha256sum | cut -d' ' -f1)
[ "$(cat "$layout/.key" 2>/dev/null || true)" = "$key" ] && exit 0

scripts/debian-files.sh .tools/demo-files nginx nginx-common busybox-static libc6 libcrypt1 libpcre2-8-0 libssl3 zlib1g
files=.tools/demo-files/root
work=$layout.new
rm -rf "$work" "$layout"
mkdir -p "$work"

base=$work/base
mkdir -p "$base"/{bin,etc,root,tmp,run,proc,sys,dev}
chmod 1777 "$base/tmp"
chmod 0700 "$base/root"
install -m 0755 $files/bin/busybox "$base/bin/busybox"
for tool in $("$base/bin/busybox" --list); do
    [ "$tool" = busybox ] || ln -s busybox "$base/bin/$tool"
done
printf 'root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n' \
    >"$base/etc/passwd"
printf 'root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n' >"$base/etc/group"
printf 'hosts: files dns\n' >"$base/etc/nsswitch.conf"

nginx=$work/nginx
mkdir -p "$nginx"/{usr/sbin,lib64,etc/nginx,var/lib/nginx,var/log/nginx}
install -m 0755 $files/usr/sbin/nginx "$nginx/usr/sbin/nginx"
install -m 0644 $files/etc/nginx/mime.types "$nginx/etc/nginx/mime.types"
# The libraries nginx names, and those that they name.
library_dir=lib/$(gcc -dumpmachine 2>/dev/null || echo x86_64-linux-gnu)
mkdir -p "$nginx/$library_dir"
needs() { readelf -d "$1" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p'; }
queue=$(needs "$nginx/usr/sbin/nginx")
while [ -n "$queue" ]; do
    next=
    for name in $queue; do
        [ -e "$nginx/$library_dir/$name" ] || [ -e "$nginx/lib64/$name" ] && continue
        found=$(find $files/lib $files/usr/lib $files/lib64 -name "$name" | head -n 1)
        [ -n "$found" ] || { echo "error: nginx needs $name, which none of its packages has" >&2; exit 1; }
        case $name in
        ld-linux-*) continue ;;
        *) install -m 0755 "$(readlink -f "$found")" "$nginx/$library_dir/$name" ;;
        esac
        next="$next $(needs "$nginx/$library_dir/$name")"
    done
    queue=$next
done
loader=$(readelf -l "$nginx/usr/sbin/nginx" | sed -n 's/.*interpreter: \(.*\)\]/\1/p')
install -D -m 0755 "$(find $files/lib -name "$(basename "$loader")" -type f | head -n 1)" "$nginx$loader"

page=$work/page
mkdir -p "$page/etc/nginx" "$page/var/www"
install -m 0644 demo/nginx.conf "$page/etc/nginx/nginx.conf"
install -m 0644 demo/index.html "$page/var/www/index.html"

umoci init --layout "$work/oci"
umoci new --image "$work/oci:hello"
for layer in base nginx page; do
    tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work/$layer" -cf "$work/$layer.tar" .
    umoci raw add-layer --image "$work/oci:hello" "$work/$layer.tar"
done
umoci config --image "$work/oci:hello" --config.env PATH=/usr/sbin:/bin --config.workingdir / \
    --config.exposedports 80/tcp --config.stopsignal SIGQUIT \
    --config.entrypoint /usr/sbin/nginx --config.cmd -g --config.cmd 'daemon off;'
umoci gc --layout "$work/oci"
echo "$key" >"$work/oci/.key"
mv "$work/oci" "$layout"
rm -rf "$work"
