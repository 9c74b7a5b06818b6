#!/bin/sh
# fuzz.sh TIME: runs each fuzz target of the tree for TIME, one after the other. What it finds is kept by Go in the
# package's testdata/fuzz. A package's test binary is built once for all its targets. Without a bound on it, Go would spend
# the whole time on making the first new input of a target smaller.
set -eu
cd "$(dirname "$0")/.."
root=$PWD
time=${1:-1s}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
targets=0
failed=
for dir in $(grep -rlE '^func Fuzz' --include='*_test.go' . | xargs -n1 dirname | sort -u); do
	go test -c -fuzz=. -o "$tmp/fuzz.test" "$dir"
	for name in $(cat "$dir"/*_test.go | sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' | sort -u); do
		if ! (cd "$dir" && "$tmp/fuzz.test" -test.run='^$' -test.fuzz="^$name\$" -test.fuzztime="$time" -test.fuzzminimizetime=1x \
			-test.fuzzcachedir="$tmp/cache" -test.parallel=2 -test.timeout=5m) >"$tmp/out" 2>&1; then
			cat "$tmp/out"
			failed="$failed $dir:$name"
		fi
		targets=$((targets + 1))
	done
done
echo "fuzz: $targets targets, $time each"
[ -z "$failed" ] || { echo "fuzz: failed:$failed"; exit 1; }
