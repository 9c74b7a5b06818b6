#!/bin/bash
# Installs the Debian packages that kubebox needs, and builds kubebox and its
# pause image into $KUBEBOX_BUILD, unless that is done already.
# With "-control-plane" no packages.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${KUBEBOX_BUILD:-${XDG_CACHE_HOME:-$HOME/.cache}/kubebox}

if [ "${1:-}" != -control-plane ]; then
	PATH=$PATH:/usr/sbin:/sbin "$here/../../../tools/need.sh" containerd runc /usr/lib/cni/bridge=containernetworking-plugins \
		ip=iproute2 iptables conntrack nsenter=util-linux >/dev/null
fi

mkdir -p "$build"
exec 9>"$build/lock"
flock 9
cd "$here"
key=$(cat go.mod go.sum ./*.go pause/*.go build.sh <(go version) | sha256sum)
if [ "$(cat "$build/key" 2>/dev/null)" = "$key" ]; then
	exit 0
fi
rm -f "$build/key"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${version#v1.}
flags="-s -w -X k8s.io/component-base/version.gitVersion=$version"
flags="$flags -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=${minor%%.*}"
echo "building kubebox for Kubernetes $version; the first time takes some minutes"
CGO_ENABLED=0 go build -trimpath -ldflags "$flags" -o "$build/kubebox" .
CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o "$build/pause" ./pause
"$build/kubebox" image -tag kubebox.test/pause:1 -o "$build/pause.tar" "$build/pause=/pause"
ln -sf kubebox "$build/kubectl"
echo "$key" >"$build/key"
