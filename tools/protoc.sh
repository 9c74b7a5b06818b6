#!/bin/sh
# protoc.sh makes sure that there is a protoc.
exec "$(dirname "$0")/need.sh" protoc=protobuf-compiler
