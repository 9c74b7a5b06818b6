#!/bin/sh
# image.sh VERSION COMMIT: packs signet, signet-agent, signet-proxy and the examples into container images, in dist/images: for each
# an OCI image layout NAME/, an archive NAME.tar that engines load, and SBOMs. It prints the digests. Needs Go and git, and no engine.
#
#   PREFIX=HOST/FOLDER   what stands before the images' names; default localhost
#   ARCHS=amd64,arm64    architectures
#   OUT=FOLDER           where to; default dist/images
#   TWICE=1              builds once more, from a copy of the tree elsewhere with a build cache of its own; the digests must be
#                        the same
set -eu
cd "$(dirname "$0")/.."
. tools/build.sh
version=${1:?version} commit=${2:-}
out=${OUT:-dist/images} archs=${ARCHS:-amd64,arm64}
# The commit's time, so that the same commit has the same; of a tree without git, none.
at=$(TZ=UTC0 git log -1 --format=%cd --date=format-local:%Y-%m-%dT%H:%M:%SZ 2>/dev/null || echo 1970-01-01T00:00:00Z)
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT

images() { # from bin out
	mkdir -p "$2" "$3"
	for arch in $(echo "$archs" | tr , ' '); do
		build "$1" "$2" "$version" "$commit" "$arch" signet signet-agent signet-proxy documents-service call
	done
	go run ./deploy/image -version "$version" -commit "$commit" -time "$at" -prefix "${PREFIX:-localhost}" -arch "$archs" -out "$3" "$2"
}

rm -f "$out/DIGESTS"
images "$PWD" "$tmp/bin" "$out" >"$tmp/digests"
if [ -n "${TWICE:-}" ]; then
	copy "$tmp/tree"
	GOCACHE="$tmp/cache" images "$tmp/tree" "$tmp/bin2" "$tmp/images" >"$tmp/digests2"
	diff "$tmp/digests" "$tmp/digests2" || { echo "image: the digests differ between two builds" >&2; exit 1; }
	diff -r "$out" "$tmp/images" || { echo "image: two builds differ" >&2; exit 1; }
fi
cp "$tmp/digests" "$out/DIGESTS"
cat "$out/DIGESTS"
