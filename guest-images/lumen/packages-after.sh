#!/bin/sh
# Hook of mmdebstrap, after the packages are installed in $1: fetches Debian's kernel and unpacks it outside of
# the image, since it is started from outside, and keeps all packages for the next build.
# CATALYST_CACHE: folder of packages. CATALYST_WORK: folder of the build.
set -eu
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
cd "$1/var/cache/apt/archives"
kernel=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || {
	echo 'the package linux-image-amd64 names no kernel'
	exit 1
}
version=$(apt-cache show --no-all-versions "$kernel" | sed -n 's/^Version: //p' | head -n 1)
file=${kernel}_$(echo "$version" | sed 's/:/%3a/')_amd64.deb
[ -f "$file" ] || apt-get download "$kernel"
rm -rf "$CATALYST_WORK/kernel"
mkdir "$CATALYST_WORK/kernel"
dpkg-deb --extract "$file" "$CATALYST_WORK/kernel"
echo "$kernel $version" >"$CATALYST_WORK/kernel/package"
for package in *.deb; do
	ln -f "$package" "$CATALYST_CACHE/$package" 2>/dev/null || cp -f "$package" "$CATALYST_CACHE/$package"
done
rm -f -- *.deb
