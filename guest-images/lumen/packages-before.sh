#!/bin/sh
# Hook of mmdebstrap, before anything is downloaded into $1: packages of earlier builds come from the cache.
# CATALYST_CACHE: folder of packages.
set -eu
archives=$1/var/cache/apt/archives
mkdir -p "$archives"
find "$CATALYST_CACHE" -name '*.deb' -exec cp -lf -t "$archives" {} + ||
	find "$CATALYST_CACHE" -name '*.deb' -exec cp -f -t "$archives" {} +
