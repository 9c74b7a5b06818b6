#!/bin/sh
# bench.sh [FOLDER...] runs the benchmarks of the folders, or all, and prints a table for docs/performance.md: machine,
# date, and for each figure the median of COUNT runs with the least and the greatest. With OLD=FILE (what an earlier run
# left in KEEP=FILE) benchstat says what has changed.
set -eu
cd "$(dirname "$0")/.."
count=${COUNT:-5} time=${TIME:-1s}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
# Folders that are modules of their own come last, each from within.
[ $# -gt 0 ] || set -- $(grep -rlE '^func Benchmark' --include='*_test.go' . | xargs -n1 dirname | sort -u)
own="" main=""
for folder; do
	if [ -f "$folder/go.mod" ]; then own="$own $folder"; else main="$main $folder"; fi
done
load=$(cut -d' ' -f1-3 /proc/loadavg)
# One package at a time: benchmarks that run beside each other measure each other.
run() { go test -p 1 -run '^$' -bench "${BENCH:-.}" -benchmem -benchtime "$time" -count "$count" -timeout 30m "$@" >>"$tmp/bench.txt" 2>&1 || { cat "$tmp/bench.txt"; exit 1; }; }
# shellcheck disable=SC2086 # folders of this tree have no spaces
[ -z "$main" ] || run $main
for folder in $own; do (cd "$folder" && run .); done
echo "$(date -u +%Y-%m-%d), $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1), $(nproc) cores, Linux $(uname -r), $(go env GOVERSION), commit $(git rev-parse --short HEAD), load before: $load"
echo
awk -v cores="$(nproc)" '
	/^pkg:/ { n = split($2, p, "/"); pkg = p[n] }
	/^Benchmark/ {
		name = $1; sub(/^Benchmark/, "", name); sub("-" cores "$", "", name)
		for (i = 3; i < NF; i += 2) if ($(i + 1) != "B/op") {
			key = pkg "." name "\t" $(i + 1)
			if (!(key in n_)) order[++keys] = key
			v[key, ++n_[key]] = $i + 0
		}
	}
	END {
		print "| benchmark | unit | median | least | greatest |"; print "|---|---|---|---|---|"
		for (k = 1; k <= keys; k++) {
			key = order[k]; m = n_[key]
			for (i = 1; i <= m; i++) for (j = i + 1; j <= m; j++) if (v[key, j] < v[key, i]) { t = v[key, i]; v[key, i] = v[key, j]; v[key, j] = t }
			split(key, f, "\t")
			printf "| %s | %s | %.4g | %.4g | %.4g |\n", f[1], f[2], v[key, int((m + 1) / 2)], v[key, 1], v[key, m]
		}
	}' "$tmp/bench.txt"
[ -z "${KEEP:-}" ] || cp "$tmp/bench.txt" "$KEEP"
[ -z "${OLD:-}" ] || bin/tools/benchstat old="$OLD" new="$tmp/bench.txt"
