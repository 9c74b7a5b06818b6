#!/bin/sh
# test.sh runs every test of the tree and ends with the lines of go test that sum them up.
set -eu
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0 # of go test; sh has no pipefail
# PKGS: other packages than all.
{
	go test -timeout 15m ${PKGS:-./...} || echo "exit $?"
	[ -n "${PKGS:-}" ] || CGO_ENABLED=0 go test ./ca/keys || echo "exit $?" # as the static program has it
} 2>&1 | tee "$log"
grep -q '^exit ' "$log" && status=1
echo
echo "summary:"
grep -E '^(ok|FAIL|---|\?|panic:|exit)' "$log" | grep -v 'no test files' || true
ok=$(grep -c '^ok' "$log") || true
bad=$(grep -cE '^FAIL[[:space:]]+[a-z]' "$log") || true
echo "$ok packages passed, $bad failed"
exit $status
