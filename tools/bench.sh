#!/bin/sh
# bench.sh runs all benchmarks and prints them with the machine and the date, as docs/performance.md wants them.
# COUNT runs of each; benchstat gives the median and how far the runs are apart.
set -eu
cd "$(dirname "$0")/.."
count=${COUNT:-5} time=${TIME:-1s}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
dirs=$(grep -rlE '^func Benchmark' --include='*_test.go' . | xargs -n1 dirname | sort -u)
echo "date: $(date -u +%Y-%m-%d)  commit: $(git rev-parse --short HEAD)  cores: $(nproc)  $(go version | cut -d' ' -f3-)"
echo "cpu: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)  kernel: $(uname -r)  load before: $(cut -d' ' -f1-3 /proc/loadavg)"
# One package at a time: benchmarks that run beside each other measure each other.
# shellcheck disable=SC2086 # one word per folder
go test -p 1 -run '^$' -bench "${BENCH:-.}" -benchmem -benchtime "$time" -count "$count" -timeout 30m $dirs | tee "$tmp/bench.txt" | grep -E '^(FAIL|---|panic)' && exit 1
bin/tools/benchstat "$tmp/bench.txt"
