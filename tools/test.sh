#!/bin/sh
# test.sh runs every test of the tree and ends with the lines of go test that sum them up.
set -eu
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
# One package of tests at a time and core: end-to-end tests measure times.
{ go vet ./... && go test -timeout 15m "$@" ./... || echo "exit $?"; } 2>&1 | tee "$log"
grep -q '^exit ' "$log" && status=1
echo
echo "summary:"
grep -E '^(ok|FAIL|---|\?|panic:|exit)' "$log" | grep -v 'no test files' || true
ok=$(grep -c '^ok' "$log") || true
bad=$(grep -cE '^FAIL[[:space:]]+[a-z]' "$log") || true
echo "$ok packages passed, $bad failed"
exit $status
