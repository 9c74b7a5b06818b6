#!/bin/sh
# generated.sh says whether the generated code belongs to the .proto files. Lines that name the version of protoc do not
# count. Without a protoc it has nothing to compare with and says so.
set -eu
cd "$(dirname "$0")/.."
if ! command -v protoc >/dev/null 2>&1; then
	echo "generated: no protoc here, nothing compared (make generate installs it)"
	exit 0
fi
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/tree"
cp -r api "$tmp/tree/"
PATH="$PWD/bin/tools:$PATH" "$tmp/tree/api/generate.sh"
if ! diff -r -I '^//.*protoc  *v' api "$tmp/tree/api"; then
	echo "generated: code and .proto files differ; run make generate"
	exit 1
fi
