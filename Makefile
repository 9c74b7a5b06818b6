# What a fresh machine needs is Go, gcc, git and make; what else a target needs, it installs itself where it may.
#
#   make demo      the main job in front of your eyes
#   make test      all tests
#   make check     about two minutes, before every commit
#   make interop   real SPIRE programs and Envoy, which you bring along (docs/interop.md), nginx, Docker and others where installed
#   make           the programs, in bin/

.POSIX:
.DELETE_ON_ERROR:
SHELL = /bin/sh

version = github.com/signet-id/signet/internal/version
VERSION = $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT  = $(shell git rev-parse HEAD 2>/dev/null)
TAGS = $(shell . tools/build.sh; echo $$tags)
LDFLAGS = -X $(version).version=$(VERSION) -X $(version).commit=$(COMMIT)

# Packages whose tests start many processes, pack whole programs or measure, and take minutes with the race detector; make
# check leaves them to make test.
heavy   = /test/|/cmd/signet$$|/internal/demo$$|/deploy/image$$
quick   = $$(go list ./... | grep -vE '$(heavy)')

.PHONY: all build hsm demo test interop check fmt-check vet staticcheck race fuzz modules docs generate generated bench scale rotation e2e-kube interop-containers release image image-twice clean tools etcd

all: build

build:
	@mkdir -p bin
	CGO_ENABLED=0 go build -tags '$(TAGS)' -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/... ./examples/...

# The same program with cgo, linked dynamically, for keys in PKCS #11 tokens; the static one cannot load their modules.
hsm:
	@mkdir -p bin
	CGO_ENABLED=1 go build -tags '$(TAGS)' -trimpath -ldflags '$(LDFLAGS)' -o bin/signet-hsm ./cmd/signet

demo: build
	bin/signet demo

# All there is: unit, conformance, fuzz seeds, scripts of the command line, README's commands, end to end.
test: tools/installed etcd
	tools/test.sh

# Unmodified SPIRE programs against this tree. SPIRE_AGENT_BIN, SPIRE_SERVER_BIN and SPIRE_CONTROLLER_MANAGER_BIN name them; what
# is not named is skipped, and says so. INTEROP=TestMove runs one test.
INTEROP = .
interop:
	go test -count=1 -timeout 30m -v -p 1 -run '$(INTEROP)' ./test/interop ./test/envoy ./test/files ./agent/workloadattest/docker

# Containers of real engines, Docker and Podman, as root; make test tries them where they are installed already.
interop-containers:
	@tools/need.sh dockerd=docker.io podman newuidmap=uidmap
	go test -count=1 -timeout 10m -v -run 'TestReal' ./agent/workloadattest/docker

check: fmt-check vet staticcheck modules generated race fuzz
	@echo check: all passed

fmt-check:
	@out=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); [ -z "$$out" ] || { echo "run gofmt -w on:"; echo "$$out"; exit 1; }

vet:
	go vet ./...
	go vet -tags scale ./test/scale ./test/node
	go vet -tags kube ./test/kube

staticcheck: bin/tools/.made
	bin/tools/staticcheck ./...

race: tools/installed etcd
	go test -race -timeout 10m $(quick)

# Each fuzz target for FUZZTIME, which finds what its seeds do not; longer by hand: make fuzz FUZZTIME=5m
FUZZTIME = 400ms
fuzz:
	tools/fuzz.sh $(FUZZTIME)

modules:
	go mod tidy -diff
	go mod verify
	cd tools && go mod tidy -diff && go mod verify
	cd test/bench/engines && go mod tidy -diff && go mod verify
	cd test/etcd && go mod tidy -diff && go mod verify
	cd test/kube/box && go mod tidy -diff && go mod verify

# Documents made from the code: conformance, command line, configuration, and the modules that binaries link.
docs:
	go run ./internal/cli/gendoc > bin/cli.md && mv bin/cli.md docs/reference/cli.md
	go test -count=1 ./internal/importmap ./test/docs -run 'TestModules|TestReference' -update
	go test -count=1 ./internal/conformance -run TestDocument -update
	go test -count=1 ./ca/kube/resources ./ca/registry -run "TestDefinitions|TestPublishedSchemas" -update
	go test -count=1 ./test/helm -run TestValuesAreDocumented -update

# Go code of api/*.proto, with protoc and the plugins of tools/go.mod.
generate: bin/tools/.made
	tools/protoc.sh
	PATH="$(CURDIR)/bin/tools:$$PATH" api/generate.sh

generated: bin/tools/.made
	tools/generated.sh

bench: bin/tools/.made
	tools/bench.sh

# Thousands of entries, streams and agents; docs/performance.md has the figures.
scale:
	go test -tags scale -count=1 -timeout 30m -v -p 1 ./test/scale ./test/node

# Kubernetes, real: two clusters are started, tried and removed, which takes root. The first time builds Kubernetes, for ten minutes.
# E2E='-run TestName' runs one test; SPIRE_AGENT_BIN and SPIRE_SERVER_BIN name SPIRE's programs, SPIFFE_CSI_BIN and CSI_REGISTRAR_BIN
# those of the SPIFFE CSI driver, whose tests skip without them.
E2E = -v
e2e-kube:
	test/kube/e2e.sh $(E2E)

# A hundred agents, traffic that never stops, fifty rotations of each kind of authority; docs/performance.md has the figures.
rotation:
	SIGNET_ROTATION_AGENTS=100 SIGNET_ROTATIONS=50 go test -count=1 -timeout 30m -v ./test/rotation

# Static binaries for linux, the same bytes from the same commit: every one is built twice, in two places.
release:
	tools/release.sh '$(VERSION)' '$(COMMIT)'

# Container images as OCI layouts and archives in dist/images, with SBOMs; no engine is needed. tools/image.sh says what it can be
# told. image-twice builds them twice, in two places, and compares.
image:
	tools/image.sh '$(VERSION)' '$(COMMIT)'

image-twice:
	TWICE=1 tools/image.sh '$(VERSION)' '$(COMMIT)'

tools: bin/tools/.made

bin/tools/.made: tools/go.mod tools/go.sum
	@mkdir -p bin/tools
	cd tools && GOBIN="$(CURDIR)/bin/tools" go install tool
	@touch $@

.PHONY: tools/installed
tools/installed:
	@PATH="$$PATH:/usr/sbin" tools/need.sh openssl softhsm2-util=softhsm2 swtpm swtpm_setup=swtpm-tools dbus-daemon nginx=nginx-light haproxy
	@tools/helm.sh

# etcd's own server and commands, for the tests of CAs of several replicas.
etcd: bin/etcd/.made

bin/etcd/.made: test/etcd/go.mod test/etcd/go.sum
	@mkdir -p bin/etcd
	cd test/etcd && CGO_ENABLED=0 go build -trimpath -o "$(CURDIR)/bin/etcd/etcd" go.etcd.io/etcd/server/v3
	cd test/etcd && CGO_ENABLED=0 go build -trimpath -o "$(CURDIR)/bin/etcd/" go.etcd.io/etcd/etcdctl/v3 go.etcd.io/etcd/etcdutl/v3
	@touch $@

clean:
	rm -rf bin dist
