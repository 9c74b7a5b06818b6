#!/bin/sh
# need.sh PROGRAM[=PACKAGE]...: installs programs that tests use and that are missing, as root on a system with apt.
set -eu
missing=
for want in "$@"; do
	command -v "${want%%=*}" >/dev/null 2>&1 || missing="$missing ${want##*=}"
done
[ -z "$missing" ] && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "please install:$missing" >&2
	exit 1
fi
apt-get -q update
# shellcheck disable=SC2086 # one word per package
DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing
