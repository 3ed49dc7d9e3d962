#!/usr/bin/env bash
# usage: debian-files.sh DIR PACKAGE...
# Puts the files of Debian packages below DIR without installing them: no service starts, nothing on the machine changes.
set -euo pipefail

dir=$1
shift
[ "$(cat "$dir/.packages" 2>/dev/null || true)" = "$*" ] && exit 0

work="$dir.new"
rm -rf "$work" "$dir"
mkdir -p "$work/.deb" "$work/root"
fetch() { (cd "$work/.deb" && apt-get download -qq -o APT::Sandbox::User=root -o Acquire::Retries=3 "$@"); }
if ! fetch "$@" 2>"$work/.log"; then
    # The package lists may be missing or older than the mirror.
    apt-get update -qq -o DPkg::Lock::Timeout=600 >>"$work/.log" 2>&1 || true
    fetch "$@" 2>>"$work/.log" || { cat "$work/.log" >&2; echo "error: cannot download Debian packages: $*" >&2; exit 1; }
fi
for package in "$work"/.deb/*.deb; do
    dpkg-deb -x "$package" "$work/root"
done
rm -rf "$work/.deb" "$work/.log"
echo "$*" >"$work/.packages"
mv "$work" "$dir"
