#!/bin/bash
# e2e.sh [go test's flags]: the end-to-end tests of Kubernetes, from nothing: builds kubebox and images, starts two clusters, runs
# test/kube, and removes all it made, also when it fails or is interrupted, and what a run left that was killed. Needs root, Go,
# git and apt. make e2e-kube calls it.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "e2e-kube: needs root: it makes namespaces, mounts and cgroups" >&2 && exit 1; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
box=test/kube/box
build=${KUBEBOX_BUILD:-${XDG_CACHE_HOME:-$HOME/.cache}/kubebox}
dir=$(mktemp -d /tmp/signet-e2e-XXXXXX)
name=${dir##*/}
port=$((20000 + $$ % 10000)) # of the CA, on this machine
child=
nodes=()

# began PID: when a process began, which tells it from another one that has its number later. Nothing if it has ended.
began() { sed 's/^.*) //' "/proc/$1/stat" 2>/dev/null | cut -d ' ' -f 20; }
echo "$$ $(began $$)" >"$dir/owner" && mkdir "$dir/t" || { rm -rf "$dir" && exit 1; }
export TMPDIR=$dir/t KUBECACHEDIR=$dir/t # what is in use when it is interrupted would be left, and kubectl's cache always

# run CMD...: in a process group of its own, which an interrupt ends.
run() {
	setsid "$@" </dev/null &
	child=$!
	echo "$child $(began "$child")" >"$dir/child"
	local status=0
	wait "$child" || status=$?
	kill -KILL -- "-$child" 2>/dev/null || true # go test may have been killed, and not what it ran
	child=
	return $status
}

cleanup() {
	local status=$? left=0 n to
	trap '' INT TERM HUP PIPE
	set +e # to the end, also where nobody reads what is said
	if [ -n "$child" ]; then
		kill -- "-$child" 2>/dev/null || kill "$child" 2>/dev/null # which may not have a group yet
		wait "$child" 2>/dev/null
		kill -KILL -- "-$child" 2>/dev/null
	fi
	if [ $status != 0 ]; then
		for n in "$dir"/*/logs "$dir"/*/node2/logs; do
			[ -d "$n" ] || continue
			to=${n#"$dir"/} to=${E2E_LOGS:-dist/e2e-kube}/${to%/logs}
			mkdir -p "$to"
			cp -r "$n/." "$to/"
		done
	fi
	for n in a b c d; do
		[ -d "$dir/$n" ] && { KUBEBOX_DIR=$dir/$n bash $box/down.sh || left=1; }
	done
	rm -rf "$dir" || left=1
	# What a node made goes with its namespaces: nobody may be in them any more, and no cgroup or mount may be left.
	for n in "${nodes[@]}"; do
		if ls -l /proc/[0-9]*/ns/pid 2>/dev/null | grep -F "$n"; then left=1; fi
	done
	if find /sys/fs/cgroup -maxdepth 2 -name "$name-*" 2>/dev/null | grep .; then left=1; fi
	if grep -F "$dir" /proc/self/mounts; then left=1; fi
	if [ $left != 0 ]; then
		echo "e2e-kube: the above is left of the clusters" >&2
		[ $status != 0 ] || status=1
	fi
	exit $status
}
# abandoned removes what is left of runs that were killed, and so could not do it themselves.
abandoned() {
	local old pid since n
	for old in /tmp/signet-e2e-??????; do
		if [ "$old" = "$dir" ] || ! read -r pid since <"$old/owner"; then continue; fi
		if [ "$(began "$pid")" = "$since" ]; then continue; fi # it runs
		echo "e2e-kube: removing $old of a run that was killed"
		if read -r pid since <"$old/child" && [ "$(began "$pid")" = "$since" ]; then kill -KILL -- "-$pid" || true; fi
		for n in a b c d; do
			if [ -d "$old/$n" ]; then KUBEBOX_DIR=$old/$n bash $box/down.sh || true; fi
		done
		rm -rf "$old"
	done 2>/dev/null
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 141' PIPE
trap 'exit 143' TERM

lap=$(date +%s)
say() {
	local now
	now=$(date +%s)
	echo "e2e-kube: $1 after $((now - lap)) s"
	lap=$now
}

run bash $box/build.sh
abandoned
run tools/helm.sh
run make -s etcd
say "kubebox, helm and etcd are there"
run env ARCHS=amd64 OUT="$dir/images" tools/image.sh e2e "$(git rev-parse HEAD 2>/dev/null || true)"
run env ARCHS=amd64 OUT="$dir/next" tools/image.sh e2e-next "$(git rev-parse HEAD 2>/dev/null || true)"
CGO_ENABLED=0 run go build -trimpath -o "$dir/bin/" ./test/kube/workload ./cmd/signet-agent
image() { # TAG FILE=PATH...
	"$build/kubebox" image -tag "$1" -o "$dir/images/${1//[\/:]/_}.tar" "${@:2}"
}
image signet.test/workload:e2e "$dir/bin/workload=/workload" "$dir/bin/signet-agent=/usr/bin/signet-agent"
image signet.test/etcd:e2e bin/etcd/etcd=/etcd
image signet.test/other:e2e "$dir/bin/workload=/workload" go.mod=/other
say "images are built"
for n in a b; do
	run env KUBEBOX_DIR="$dir/$n" bash $box/up.sh -api-port 0 -cgroup-root "/$name-$n" -outward "18081:$port"
	nodes+=("$(readlink "/proc/$(cat "$dir/$n/node.pid")/ns/pid")")
	run "$build/kubebox" load -dir "$dir/$n" "$dir"/images/*.tar "$dir"/next/signet-ca.tar "$dir"/next/signet-agent.tar
done
run env KUBEBOX_DIR="$dir/c" bash $box/up.sh -control-plane -api-port 0
say "two clusters and an API server are up"

export SIGNET_KUBECONFIG=$dir/a/host.kubeconfig SIGNET_KUBECONFIG_OTHER=$dir/b/host.kubeconfig
export SIGNET_KUBECONFIG_WEBHOOK=$dir/c/host.kubeconfig SIGNET_KUBE_WEBHOOK_HOST=localhost
export SIGNET_KUBEBOX=$build/kubebox SIGNET_KUBEBOX_DIR=$dir/a SIGNET_KUBEBOX_DIR_OTHER=$dir/b
export SIGNET_KUBEBOX_DIR_NODES=$dir/d SIGNET_KUBE_ARCHIVES=$dir/images
export SIGNET_KUBE_CA_LISTEN=127.0.0.1:$port SIGNET_KUBE_CA_ADDRESS=10.90.0.1:18081
export SIGNET_KUBE_NODE_ROOT SIGNET_KUBE_CGROUP_ROOT=/$name-a SIGNET_KUBE_CGROUP_ROOT_OTHER=/$name-b
SIGNET_KUBE_NODE_ROOT=/proc/$(cat "$dir/a/node.pid")/root
export SIGNET_KUBECTL=${KUBECTL:-$PWD/bin/tools/kubectl} HELM=${HELM:-$PWD/bin/tools/helm}
export SIGNET_KUBE_IMAGE=kubebox.test/pause:1 SIGNET_KUBE_IMAGES=localhost SIGNET_KUBE_TAG=e2e SIGNET_KUBE_TAG_NEXT=e2e-next
export SIGNET_KUBE_WORKLOAD_IMAGE=signet.test/workload:e2e SIGNET_KUBE_OTHER_IMAGE=signet.test/other:e2e
export SIGNET_KUBE_ETCD_IMAGE=signet.test/etcd:e2e
run go test -tags kube -count=1 -timeout 60m "$@" ./test/kube
say "tests passed"
