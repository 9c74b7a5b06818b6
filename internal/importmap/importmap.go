// Package importmap says which package of signet may import which, and which modules each binary may link. Its test
// holds the tree to that; nothing else calls it. It is the map of docs/decisions and of the package comments as data:
//
//	cmd → ca, agent → workloadapi, policy → spiffe
//
// CA and agent meet on the wire only, so neither ever imports the other, not through a third package either. Within
// them the sub-packages do not know their neighbours, but for the doors of the CA, which know what they serve.
package importmap

import (
	"fmt"
	"slices"
	"strings"
)

// Module is the path of the main module.
const Module = "github.com/signet-id/signet"

// A Package is what `go list` says of one of our packages. All paths are whole import paths.
type Package struct {
	// Path is the package's own path.
	Path string
	// Imports are what its non-test files import.
	Imports []string
	// TestImports are what its test files import.
	TestImports []string
	// Deps are all packages it needs, through others too.
	Deps []string
}

// A rule says which of our own packages those of one pattern may import. Own paths are written relative to Module. A
// pattern is a path, or a path and /... for it and all below it.
type rule struct {
	of  string
	may []string
}

// leaves are small packages that know nothing of the domain and may be imported from everywhere.
var leaves = []string{"internal/durable", "internal/durable/...", "internal/strictyaml", "internal/version", "internal/daemon", "internal/sandbox"}

// rules are looked up from the top; the first that matches a package is the one for it.
var rules = []rule{
	{"spiffe", nil}, // nil: none at all, not even leaves
	{"api/signet/policy/v1", nil},
	{"api/...", []string{"api/signet/policy/v1"}},

	{"policy", []string{"spiffe", "api/signet/policy/v1", "internal/strictyaml"}},
	{"policy/analyse", []string{"policy", "spiffe", "api/signet/policy/v1", "internal/strictyaml"}},
	// An enforcement point that the agent serves on its socket. See docs/decisions/0029-ext-authz-on-the-agents-socket.md.
	{"policy/extauthz", []string{"policy", "spiffe", "api/signet/policy/v1", "workloadapi", "workloadapi/peer"}},
	{"policy/proxy", []string{"policy/...", "spiffe", "jwtauth"}}, // it shows JWT-SVIDs for programs that cannot
	{"policy/...", []string{"policy/...", "spiffe", "api/signet/policy/v1/...", "internal/tally"}},

	{"workloadapi/peer", nil},
	{"workloadapi/...", []string{"workloadapi/...", "policy", "spiffe", "api/signet/policy/v1/..."}},

	{"agent/...", []string{"internal/adminsocket", "internal/tally", "internal/nearmiss", "internal/nodekey", "internal/x509pop", "internal/tpmwire", "internal/tpmdevice", "workloadapi/...", "policy", "spiffe", "api/signet/agent/v1", "api/signet/node/v1", "api/signet/policy/v1/..."}},
	{"ca/...", []string{"internal/adminsocket", "internal/tally", "internal/nearmiss", "internal/nodekey", "internal/x509pop", "internal/tpmwire", "policy", "policy/analyse", "spiffe", "api/..."}},

	// What puts CA and agent together, and what only the command line needs.
	{"internal/durable", nil},
	{"internal/strictyaml", nil},
	{"internal/version", nil},
	{"internal/nearmiss", []string{"spiffe"}},                                // how an entry and a process differ, or a templated Identity and a pod: at the agent, at the CA and on the command line
	{"internal/adminsocket", nil},                                            // where operators talk to either side, and who is one
	{"internal/tally", []string{"policy", "spiffe", "api/signet/policy/v1"}}, // how decisions are counted and kept: by services, agents and CA alike
	{"internal/nodekey", []string{"spiffe"}},                                 // what a node signs to win its SVID back, which both sides must know
	{"internal/tpmdevice", nil},                                              // how commands reach a TPM, for the agent's uses of one
	{"internal/tpmwire", nil},                                                // the messages by which a node shows its TPM, likewise
	{"internal/x509pop", nil},                                                // what a node signs to prove that it holds a certificate's key, likewise
	{"internal/daemon", nil},                                                 // what a service manager and a daemon say to each other
	{"internal/sandbox", nil},                                                // what takes from a process what it does not need; it knows none of the daemons
	{"internal/importmap", nil},
	{"internal/conformance", nil},
	{"internal/...", []string{"..."}},
	{"cmd/signet", []string{"internal/...", "ca/keys/lookup"}}, // with the drivers that it completes
	{"cmd/...", []string{"internal/..."}},
	{"test/...", []string{"..."}},
	{"deploy/...", []string{"internal/..."}},  // what packs and checks what is deployed; no daemon calls it
	{"jwtauth", []string{"policy", "spiffe"}}, // for programs that show and check JWT-SVIDs; it knows the agent by the Workload API only
	{"examples/...", []string{"policy/...", "spiffe"}},
}

// neighbours are the exceptions within ca and agent: the doors know the registry, the authorities and the audit log
// that they serve from, and what keeps state knows the store. See docs/decisions/0001-doors-know-the-registry.md.
var neighbours = map[string][]string{
	"ca/access":     {"ca/registry", "ca/authority", "ca/auditlog", "ca/store"},
	"ca/nodeapi":    {"ca/access", "ca/limits", "ca/nodeattest", "ca/spireproto", "ca/registry", "ca/authority", "ca/auditlog", "ca/store"},
	"ca/adminapi":   {"ca/access", "ca/spireproto", "ca/registry", "ca/authority", "ca/rotation", "ca/auditlog", "ca/store"},
	"ca/rotation":   {"ca/registry", "ca/authority", "ca/auditlog", "ca/store"}, // docs/decisions/0008-rotation.md
	"ca/spireproto": {"ca/registry"},
	"ca/registry":   {"ca/store", "ca/template"},                // docs/decisions/0036-identities-of-pods.md
	"ca/federation": {"ca/registry", "ca/auditlog"},             // keeps bundles in the one, and says so in the other
	"ca/userkeys":   {"ca/registry", "ca/auditlog", "ca/store"}, // likewise, keys of issuers of user tokens
	"ca/authority":  {"ca/store", "ca/keys"},
	// What the CA does in Kubernetes: docs/decisions/0035-kubernetes.md.
	"ca/kube/pods":           {"ca/registry", "ca/template"},
	"ca/kube/watch":          {"ca/registry", "ca/auditlog"},
	"ca/kube/resources":      {"ca/registry", "ca/auditlog", "ca/store"},
	"ca/kube/spireresources": {"ca/registry", "ca/auditlog", "ca/store"},
	"ca/kube/publish":        {"ca/authority"},
	"ca/kube/podcert":        {"ca/registry", "ca/authority", "ca/auditlog"},
	"ca/kube/inject":         {"ca/authority", "ca/auditlog"},
	"agent":                  {onSocket}, // docs/decisions/0029-ext-authz-on-the-agents-socket.md
}

// composers may hold both sides of the wire in one program.
var composers = []string{"cmd/...", "internal/cli", "internal/cli/...", "internal/dev", "internal/demo", "internal/demo/...", "test/..."}

// below policy are the live policy and the enforcement points: libraries for services, never a part of CA or agent, but for
// the one that the agent's socket serves.
const (
	enforcement = "policy/"
	onSocket    = "policy/extauthz"
)

// analysis is the exception: what of policies the CA tells an operator who applies them, pure as package policy is.
const analysis = "policy/analyse"

// pure packages may neither talk to anyone nor touch the machine.
var pure = []string{"spiffe", "policy", "policy/analyse"}

// impure packages may not be imported by a pure one itself, since crypto/x509 and others bring some of them along.
var impure = []string{"net/http/...", "net/rpc", "os", "os/...", "syscall", "golang.org/x/sys/...", "log"}

// pureNet are the names of package net that a pure package may use: they turn text into text.
var pureNet = []string{"JoinHostPort", "SplitHostPort"}

// impureDeps may not be among all that a pure package needs.
var impureDeps = []string{"net/http", "os/exec", "google.golang.org/grpc", "google.golang.org/grpc/..."}

// only names third-party packages that just one place may import.
var only = []struct {
	imported string
	by       []string
}{
	// Bytes of authority keys are seen in one place; drivers of key stores are linked by the program.
	// A node's attestation key is in its TPM, for which the agent has a package.
	{"go.step.sm/crypto/...", []string{"ca/keys", "cmd/signet", "agent/nodeattest/tpm"}},
	{"github.com/aws/...", []string{"ca/keys/lookup"}},
	{"github.com/Azure/...", []string{"ca/keys/lookup"}},
	{"go.etcd.io/bbolt", []string{"ca/store/bolt"}},
	// A parser of foreign BER stays where its input is bounded and fuzzed.
	{"github.com/smallstep/pkcs7", []string{"ca/nodeattest/awsiid", "test/cloudtest"}},
	// What a condition means is said in one place, which makes CEL stricter than it is.
	{"cel.dev/cel-go/...", []string{"policy"}},
	// Clusters are watched in one place, which the agent does not link.
	{"k8s.io/...", []string{"ca/kube/..."}},
	{"go.etcd.io/etcd/...", []string{"ca/store/etcd"}},
	{"github.com/spf13/cobra", []string{"internal/cli", "internal/cli/..."}},
}

// heavy are modules that a binary for every node must not link.
var heavy = []string{"cloud.google.com/...", "github.com/aws/...", "github.com/Azure/...", "go.etcd.io/etcd/...", "k8s.io/...", "sigs.k8s.io/...", "go.step.sm/crypto/kms/..."}

// Check returns what is wrong with the imports of pkgs, one sentence for each fault, ordered by package.
func Check(pkgs []Package) []string {
	var faults []string
	for _, p := range pkgs {
		path, _ := own(p.Path)
		bad := func(format string, args ...any) {
			faults = append(faults, path+" "+fmt.Sprintf(format, args...))
		}
		r, ok := ruleOf(path)
		if !ok {
			bad("has no place in the import map; give it a rule in internal/importmap")
			continue
		}
		for _, i := range p.Imports {
			if i, ok := own(i); ok && !mayImport(path, r, i) {
				bad("imports %s, which its rule for %s does not allow", i, r.of)
			}
		}
		checkSides(path, slices.Concat(p.Deps, p.TestImports), bad)
		checkOnly(path, p.Imports, bad)
		if slices.Contains(pure, path) {
			checkPure(p, bad)
		}
	}
	slices.Sort(faults)
	return slices.Compact(faults)
}

func ruleOf(path string) (rule, bool) {
	for _, r := range rules {
		if matches(path, r.of) {
			return r, true
		}
	}
	return rule{}, false
}

func mayImport(from string, r rule, to string) bool {
	if matchesAny(to, r.may) || r.may != nil && matchesAny(to, leaves) || slices.Contains(neighbours[from], to) {
		return true
	}
	// The package on top puts its sub-packages together, and each of them is one idea that may have parts.
	for _, side := range []string{"ca", "agent"} {
		if strings.HasPrefix(to, side+"/") && (from == side || subPackage(from) == subPackage(to)) {
			return true
		}
	}
	return false
}

// subPackage is the part of a path that names a sub-package of ca or agent: ca/store of ca/store/bolt.
func subPackage(path string) string {
	parts := strings.SplitN(path, "/", 3)
	return strings.Join(parts[:min(2, len(parts))], "/")
}

// checkSides holds ca and agent apart, in tests and through third packages as well.
func checkSides(path string, needs []string, bad func(string, ...any)) {
	side, _, _ := strings.Cut(path, "/")
	other := map[string]string{"ca": "agent", "agent": "ca"}[side]
	for _, n := range needs {
		n, ok := own(n)
		if !ok {
			continue
		}
		switch {
		case other != "" && matches(n, other+"/..."):
			bad("needs %s; CA and agent meet on the wire only", n)
		case other != "" && strings.HasPrefix(n, enforcement) && n != analysis && !(side == "agent" && n == onSocket):
			bad("needs %s; an enforcement point is a library for services", n)
		case other == "" && (n == "ca" || n == "agent") && !matchesAny(path, composers):
			bad("needs %s; only %s run CA or agent", n, strings.Join(composers, ", "))
		}
	}
}

func checkPure(p Package, bad func(string, ...any)) {
	for _, i := range p.Imports {
		if matchesAny(i, impure) {
			bad("imports %s, but is pure", i)
		}
	}
	for _, d := range p.Deps {
		if matchesAny(d, impureDeps) {
			bad("needs %s, but is pure", d)
		}
	}
}

func checkOnly(path string, imports []string, bad func(string, ...any)) {
	for _, o := range only {
		for _, i := range imports {
			if matches(i, o.imported) && !matchesAny(path, o.by) {
				bad("imports %s, which only %s may", i, strings.Join(o.by, ", "))
			}
		}
	}
}

// CheckSlim returns what a binary that runs on every node links and must not. linked are paths of packages.
func CheckSlim(binary string, linked []string) []string {
	var faults []string
	for _, l := range linked {
		if matchesAny(l, heavy) {
			faults = append(faults, fmt.Sprintf("%s links %s, which is too much for a binary on every node", binary, l))
		}
	}
	return faults
}

// own returns a path of this module relative to Module, and whether it is one.
func own(path string) (string, bool) {
	return strings.CutPrefix(path, Module+"/")
}

func matchesAny(path string, patterns []string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(path, p) })
}

// matches tells whether path is what pattern names; ... names every path.
func matches(path, pattern string) bool {
	if top, ok := strings.CutSuffix(pattern, "..."); ok {
		top = strings.TrimSuffix(top, "/")
		return top == "" || path == top || strings.HasPrefix(path, top+"/")
	}
	return path == pattern
}
