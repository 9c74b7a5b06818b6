#!/bin/bash
# Starts a Kubernetes for end-to-end tests, or with "-control-plane"
# an API server for controllers' tests, and waits until it is of use. It
# installs what is missing from Debian's packages, and builds kubebox if its
# sources have changed. down.sh stops it.
#
#   KUBEBOX_BUILD  where to keep what is built (default ~/.cache/kubebox)
#   KUBEBOX_DIR    the cluster's state (default /tmp/kubebox)
#
# Arguments are passed on to "kubebox up". Needs root.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${KUBEBOX_BUILD:-${XDG_CACHE_HOME:-$HOME/.cache}/kubebox}
export KUBEBOX_DIR=${KUBEBOX_DIR:-/tmp/kubebox}

only=
for a in "$@"; do
	if [ "$a" = -control-plane ]; then only=$a; fi
done
bash "$here/build.sh" $only

log=$KUBEBOX_DIR.log
: >"$log"
setsid "$build/kubebox" up -pause "$build/pause.tar" "$@" </dev/null >>"$log" 2>&1 &
pid=$!
trap 'kill "$pid" 2>/dev/null; wait "$pid"; exit 143' INT TERM
until grep -q '^kubebox: ready' "$log"; do
	if ! kill -0 "$pid" 2>/dev/null; then
		cat "$log" >&2
		exit 1
	fi
	sleep 0.1
done
cat "$log"
echo "KUBECONFIG=$KUBEBOX_DIR/host.kubeconfig"
