#!/bin/sh
# release.sh VERSION COMMIT: builds the programs for linux/amd64 and linux/arm64 into dist/, twice: in this tree, and in
# a copy of it elsewhere with a build cache of its own. The two must be the same bytes. All are static but signet-hsm, which
# loads PKCS #11 modules: it is built with the C compiler of this machine, for this machine's architecture.
set -eu
cd "$(dirname "$0")/.."
. tools/build.sh
version=${1:?version} commit=${2:-}
pkg=github.com/signet-id/signet/internal/version
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT

programs() { # from to
	for arch in amd64 arm64; do
		# shellcheck disable=SC2046 # their names have no spaces
		build "$1" "$2" "$version" "$commit" "$arch" $(ls "$1/cmd")
	done
}

hsm() { # from to
	(cd "$1" && CGO_ENABLED=1 GOFLAGS= go build -tags "$tags" -trimpath -buildvcs=false \
		-ldflags "-s -w -buildid= -X $pkg.version=$version -X $pkg.commit=$commit" \
		-o "$2/signet-hsm_linux_$(go env GOARCH)" ./cmd/signet)
}

rm -rf dist
mkdir -p dist "$tmp/dist"
programs "$PWD" "$PWD/dist"
hsm "$PWD" "$PWD/dist"
copy "$tmp/tree"
GOCACHE="$tmp/cache" programs "$tmp/tree" "$tmp/dist"
GOCACHE="$tmp/cache" hsm "$tmp/tree" "$tmp/dist"
for f in dist/*; do
	cmp "$f" "$tmp/$f" || { echo "release: $f differs between two builds"; exit 1; }
	case $f in dist/signet-hsm_*) continue ;; esac
	if command -v readelf >/dev/null 2>&1 && readelf -l "$f" | grep -q INTERP; then
		echo "release: $f is not static"
		exit 1
	fi
done
(cd dist && sha256sum -- * >"$tmp/SHA256SUMS" && mv "$tmp/SHA256SUMS" .)
cat dist/SHA256SUMS
