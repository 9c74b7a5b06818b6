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

fuzz() { # NAME TIME
	(cd "$dir" && "$tmp/fuzz.test" -test.run='^$' -test.fuzz="^$1\$" -test.fuzztime="$2" -test.fuzzminimizetime=1x \
		-test.fuzzcachedir="$tmp/cache" -test.parallel=2 -test.timeout=5m) >"$tmp/out" 2>&1
}

# When the time of a target ends at a bad moment, as on a busy machine, Go's fuzzing calls that end a failure of the target,
# and names no input. A number of runs instead of a time has no such moment.
only_time_ended() {
	grep -q '^    context deadline exceeded$' "$tmp/out" && ! grep -qE 'Failing input|panic' "$tmp/out"
}

for dir in $(grep -rlE '^func Fuzz' --include='*_test.go' . | xargs -n1 dirname | sort -u); do
	go test -c -fuzz=. -o "$tmp/fuzz.test" "$dir"
	for name in $(cat "$dir"/*_test.go | sed -nE 's/^func (Fuzz[A-Za-z0-9_]*)\(.*/\1/p' | sort -u); do
		if ! fuzz "$name" "$time" && ! { only_time_ended && fuzz "$name" 200x; }; then
			cat "$tmp/out"
			failed="$failed $dir:$name"
		fi
		targets=$((targets + 1))
	done
done
echo "fuzz: $targets targets, $time each"
[ -z "$failed" ] || { echo "fuzz: failed:$failed"; exit 1; }
