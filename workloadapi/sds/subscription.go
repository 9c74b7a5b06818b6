package sds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"

	"github.com/signet-id/signet/workloadapi"
)

const (
	// wildcard asks for everything that the caller has.
	wildcard = "*"

	// maxNames bounds the resources that one stream names. An Envoy names three or four.
	maxNames = 256

	// maxNameBytes bounds one name: a SPIFFE ID has at most 2048 bytes.
	maxNameBytes = 2048

	// maxNamesBytes bounds what a stream keeps of all its names.
	maxNamesBytes = 64 << 10
)

// A subscription is what a stream asks for. It is not changed, but replaced.
type subscription struct {
	all   bool // everything that the caller has, by its own name
	named []string
}

func (s subscription) has(name string) bool { return s.all || slices.Contains(s.named, name) }

// names returns each resource that is asked for, once.
func (s subscription) names(o *offer) []string {
	names := slices.Clone(s.named)
	if s.all {
		names = append(names, o.names()...)
		slices.Sort(names)
	}
	return slices.Compact(names)
}

// replaced is the subscription after a request that lists all it wants. An empty list wants everything if it comes first
// or after such a one, and nothing otherwise.
func (s subscription) replaced(names []string, first bool) (subscription, error) {
	if len(names) == 0 && (first || s.all && len(s.named) == 0) {
		return subscription{all: true}, nil
	}
	return subscription{}.changed(names, nil, false)
}

// changed is the subscription after a request that adds and removes. The first request of a stream that adds nothing
// wants everything.
func (s subscription) changed(add, remove []string, first bool) (subscription, error) {
	next := subscription{all: s.all || first && len(add) == 0}
	if len(add) > maxNames || len(remove) > maxNames {
		return s, tooMany(max(len(add), len(remove)))
	}
	named := map[string]bool{}
	for _, name := range s.named {
		named[name] = true
	}
	for _, name := range remove {
		if delete(named, name); name == wildcard {
			next.all = false
		}
	}
	for _, name := range add {
		switch {
		case name == wildcard:
			next.all = true
		case name == "":
			return s, badArgument("a resource name is empty")
		case len(name) > maxNameBytes:
			return s, badArgument("a resource name has %d bytes: at most %d are allowed", len(name), maxNameBytes)
		default:
			named[name] = true
		}
	}
	bytes := 0
	for name := range named {
		next.named = append(next.named, name)
		bytes += len(name)
	}
	if len(named) > maxNames {
		return s, tooMany(len(named))
	}
	if bytes > maxNamesBytes {
		return s, badArgument("the resource names have %d bytes together: at most %d are allowed on a stream", bytes, maxNamesBytes)
	}
	slices.Sort(next.named)
	return next, nil
}

func tooMany(n int) error {
	return badArgument("%d resources are named: at most %d are allowed on a stream", n, maxNames)
}

// checkNames bounds what a client says it has.
func checkNames(have map[string]version) error {
	if len(have) > maxNames {
		return tooMany(len(have))
	}
	bytes := 0
	for name, v := range have {
		if bytes += len(name) + len(v); bytes > maxNamesBytes {
			return badArgument("initial_resource_versions has more than %d bytes", maxNamesBytes)
		}
	}
	return nil
}

// checkType refuses to be asked for anything but secrets. A stream of this service may leave out what it asks for.
func checkType(typeURL string) error {
	if typeURL != "" && typeURL != secretType {
		return badArgument("type_url is %s: here are only resources of type %s", printable(typeURL), secretType)
	}
	return nil
}

// nonces number the responses of a stream, so that an answer can be told from an answer to an earlier one.
type nonces struct {
	last   uint64
	judged uint64 // the newest that the client has answered
}

func (n *nonces) next() string {
	n.last++
	return strconv.FormatUint(n.last, 10)
}

// A refusal is what a client said against a response.
type refusal struct {
	nonce   string
	message string
}

// answered takes in an answer. It is stale if it is not to the last response; the first request of a stream may carry
// the nonce of an earlier stream. A refusal counts once.
func (n *nonces) answered(nonce string, detail *rpcstatus.Status) (refused *refusal, stale bool) {
	if nonce == "" || n.last == 0 {
		return nil, false
	}
	to, err := strconv.ParseUint(nonce, 10, 64)
	if err != nil || to > n.last || to == 0 {
		return nil, true
	}
	if to > n.judged {
		n.judged = to
		if detail != nil {
			refused = &refusal{nonce: nonce, message: detail.GetMessage()}
		}
	}
	return refused, to != n.last
}

// ended is the error of a stream that Follow has left. A client that has said all it wanted gets no error.
func ended(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), io.EOF) {
		return nil
	}
	return err
}

func badArgument(format string, args ...any) error {
	return &workloadapi.ArgumentError{Text: fmt.Sprintf(format, args...)}
}
