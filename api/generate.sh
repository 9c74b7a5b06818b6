#!/bin/sh
# Generates the Go code of our .proto files. Needs protoc (Debian: protobuf-compiler) and the two plugins, which
# `make generate` installs at the versions named in tools/go.mod.
set -eu
cd "$(dirname "$0")"
find signet -name '*.proto' -print0 | xargs -0 protoc -I . \
	--go_out=.. --go_opt=module=github.com/signet-id/signet \
	--go-grpc_out=.. --go-grpc_opt=module=github.com/signet-id/signet
